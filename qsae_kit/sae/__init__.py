"""Sparse autoencoders: one contract (`base.SAE`), one file an architecture."""

from qsae_kit.sae.base import SAE, Provenance
from qsae_kit.sae.jumprelu import JumpReLUSAE
from qsae_kit.sae.topk import TopKSAE

# A new architecture is one file and one row here; the contract tests pick it up.
ARCHITECTURES: dict[str, type[SAE]] = {"jumprelu": JumpReLUSAE, "topk": TopKSAE}

__all__ = ["ARCHITECTURES", "SAE", "JumpReLUSAE", "Provenance", "TopKSAE"]

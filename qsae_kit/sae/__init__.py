"""Sparse autoencoders: one contract (`base.SAE`), one file an architecture."""

from qsae_kit.sae.base import SAE, Provenance
from qsae_kit.sae.batchtopk import BatchTopKSAE
from qsae_kit.sae.gated import GatedSAE
from qsae_kit.sae.jumprelu import JumpReLUSAE
from qsae_kit.sae.matryoshka import MatryoshkaSAE
from qsae_kit.sae.relu import ReLUSAE
from qsae_kit.sae.topk import TopKSAE

# A new architecture is one file and one entry here; the contract tests pick it up.
ARCHITECTURES: dict[str, type[SAE]] = {
    sae.architecture: sae
    for sae in (JumpReLUSAE, TopKSAE, BatchTopKSAE, MatryoshkaSAE, ReLUSAE, GatedSAE)
}

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "BatchTopKSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "Provenance",
    "ReLUSAE",
    "TopKSAE",
]

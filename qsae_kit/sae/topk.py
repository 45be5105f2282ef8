"""TopK SAE with the AuxK loss (Gao et al. 2024, arXiv 2406.04093, section 2 and appendix A.2).

f = TopK(relu(pre));   loss = E|x - x_hat|^2 + AuxK, see `SAE.aux_k_loss`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.sae.base import AUX_EVERY, SAE, Loss, Provenance, State
from qsae_kit.sae.codes import select_top_k


class TopKSAE(SAE):
    architecture = "topk"

    def __init__(
        self, d_in: int, d_sae: int, sparsity: float, provenance: Provenance | None = None
    ) -> None:
        super().__init__(d_in, d_sae, sparsity, provenance)
        if sparsity != int(sparsity):
            raise ValueError(
                f"k={sparsity} was given; a TopK SAE needs a whole number of features a token."
            )

    @property
    def k(self) -> int:
        return int(self.sparsity)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"k": self.k, "rescale_acts_by_decoder_norm": False}

    def activate(self, pre: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_sae"]:
        values, indices = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, values.relu())

    def training_loss(self, x: Float[Tensor, "row d_model"], state: State) -> Loss:
        v, codes, pre = self.encode_entries(x, select_top_k(self.k))
        f = v.relu()
        missed, error = self.squared_error(x, f, codes)
        return Loss(missed + self.aux_k_loss(x, error, state.dead, pre[::AUX_EVERY]), f, codes)

"""TopK SAE with the AuxK loss (Gao et al. 2024, arXiv 2406.04093, section 2 and appendix A.2).

f = TopK(relu(pre));   loss = E|x - x_hat|^2 + 1/32 * E|e - e_hat|^2, where e = x - x_hat (detached) and e_hat is decoded
from the k_aux largest pre-activations among dead latents.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.sae.base import SAE, Loss

AUX_COEFFICIENT = 1 / 32


class TopKSAE(SAE):
    architecture = "topk"

    @property
    def k(self) -> int:
        return int(self.sparsity)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"k": self.k, "rescale_acts_by_decoder_norm": False}

    def activate(self, pre: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_sae"]:
        values, indices = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, values.relu())

    def training_loss(self, x: Float[Tensor, "row d_model"], dead: Tensor, progress: float) -> Loss:
        pre = self.pre_activations(x)
        f = self.activate(pre)
        error = x - self.decode(f)
        total = error.pow(2).sum(-1).mean()
        n_dead = int(dead.sum())
        if n_dead:
            k_aux = min(n_dead, max(1, self.d_in // 2))
            values, indices = pre[:, dead].topk(k_aux, dim=-1, sorted=False)
            revived = torch.zeros(len(x), n_dead, device=x.device).scatter(-1, indices, values.relu())
            aux = (error.detach() - revived @ self.W_dec[dead]).pow(2).sum(-1).mean()
            total = total + AUX_COEFFICIENT * aux
        return Loss(total, f)

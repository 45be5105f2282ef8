"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): which features fire and how much are
told apart.

gate = x @ W_enc + b_gate;   mag = exp(r_mag) * (x @ W_enc) + b_mag;   f = H(gate) * relu(mag)
loss = E|x - x_hat|^2 + lambda * E sum relu(gate) + E|x - x_hat_gate|^2, where x_hat_gate decodes
relu(gate) with a frozen decoder. lambda follows the L0 as in `relu`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qsae_kit.sae.base import Loss, Provenance, State
from qsae_kit.sae.codes import of_column, select_positive, squared_error
from qsae_kit.sae.relu import ReLUSAE


class GatedSAE(ReLUSAE):
    """`b_enc` is the gate's bias, stored as b_gate."""

    architecture = "gated"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        sparsity: float,
        provenance: Provenance | None = None,
        *,
        l1: float | None = None,
    ) -> None:
        super().__init__(d_in, d_sae, sparsity, provenance, l1=l1)
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def activate(self, pre: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_sae"]:
        return (pre > 0) * (self.r_mag.exp() * (pre - self.b_enc) + self.b_mag).relu()

    def training_loss(self, x: Float[Tensor, "row d_model"], state: State) -> Loss:
        gate, codes, _ = self.encode_entries(x, select_positive)
        scale, gate_bias, bias = (
            of_column(t, codes) for t in (self.r_mag.exp(), self.b_enc, self.b_mag)
        )
        f = (scale * (gate - gate_bias) + bias).relu() * (gate > 0)
        missed, _ = self.squared_error(x, f, codes)
        opened = gate.relu()
        frozen = self.W_dec.detach(), self.b_dec.detach()
        missed_by_gate, _ = squared_error(x, opened, *frozen, codes, self.product_dtype)
        penalty = self.penalty(f, len(x), state) * opened.sum() / len(x)
        return Loss(missed + penalty + missed_by_gate, f, codes)

    def tensors(self) -> dict[str, Tensor]:
        own = super().tensors()
        return {"b_gate": own.pop("b_enc"), **own}

    @torch.no_grad()
    def fold(self, mean: Float[Tensor, " d_model"], scale: float) -> None:
        self.b_mag.copy_(self.b_mag / scale - self.r_mag.exp() * (mean @ self.W_enc))
        super().fold(mean, scale)

    def rescale_activations(self, scale: float) -> None:
        """Nothing: all that acts on activations here is a bias, which `fold` scales."""

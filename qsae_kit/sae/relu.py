"""ReLU SAE with an L1 penalty (Bricken et al. 2023; decoder rows of unit norm).

f = relu(pre);   loss = E|x - x_hat|^2 + lambda * E sum f. lambda follows the L0: it grows while
more features fire than the target allows and shrinks otherwise, so that the penalty need not be
guessed; `l1` fixes it instead.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.sae.base import SAE, Loss, Provenance, State
from qsae_kit.sae.codes import select_positive

GAIN = 0.02
"""Change of log lambda a step, per unit of (L0 / target - 1), which is cut to [-1, 1]."""


class ReLUSAE(SAE):
    """l1: a fixed lambda, in units of activations normalised to E|x|^2 = 1; None: steered by the
    L0.
    """

    architecture = "standard"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        sparsity: float,
        provenance: Provenance | None = None,
        *,
        l1: float | None = None,
    ) -> None:
        super().__init__(d_in, d_sae, sparsity, provenance)
        self.steered = l1 is None
        self.register_buffer("l1", torch.tensor(0.02 if l1 is None else l1))
        self.l1: Tensor

    def activate(self, pre: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_sae"]:
        return pre.relu()

    def training_loss(self, x: Float[Tensor, "row d_model"], state: State) -> Loss:
        pre, codes, _ = self.encode_entries(x, select_positive)
        f = pre.relu()  # a product in a short format may have selected what is not above 0
        missed, _ = self.squared_error(x, f, codes)
        penalty = self.penalty(f, len(x), state) * f.sum() / len(x)
        return Loss(missed + penalty, f, codes)

    @torch.no_grad()
    def penalty(self, f: Float[Tensor, " entry"], n_rows: int, state: State) -> Tensor:
        """lambda of this step, from the entries that fire."""
        if self.steered and self.training:
            surplus = float((f > 0).sum()) / n_rows / self.sparsity - 1
            self.l1.mul_(math.exp(GAIN * max(-1.0, min(1.0, surplus))))
        return self.l1 * min(1.0, state.progress / 0.05)

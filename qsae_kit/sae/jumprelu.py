"""JumpReLU SAE trained to a target L0 (Rajamanoharan et al. 2024, arXiv 2407.14435; quadratic target: section 5).

f = pre * H(pre - theta);   loss = E|x - x_hat|^2 + c * (L0 / target - 1)^2

theta learns through the straight-through rectangle kernel K of width eps:
df/dtheta = -theta/eps * K((pre - theta)/eps),   dL0/dtheta = -1/eps * K((pre - theta)/eps).
theta is a plain float32 parameter kept above zero, not a logarithm, which would freeze under Adam.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qsae_kit.sae.base import SAE, Loss, Provenance

BANDWIDTH = 0.03
"""eps, in units of activations normalised to E|x|^2 = 1."""
TARGET_COEFFICIENT = 3.0


class _Jump(torch.autograd.Function):
    """(pre, theta) -> (f, L0 a row), with the straight-through gradients above."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        mask = pre > theta
        ctx.save_for_backward(pre, theta, mask)
        return pre * mask, mask.sum(-1, dtype=pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        grad_f, grad_l0 = grads
        pre, theta, mask = ctx.saved_tensors
        near = (pre - theta).abs_() < BANDWIDTH / 2
        pull = (grad_f * theta).add_(grad_l0[:, None]).mul_(near).sum(0) / -BANDWIDTH
        return grad_f * mask, pull


class JumpReLUSAE(SAE):
    architecture = "jumprelu"

    def __init__(self, d_in: int, d_sae: int, sparsity: float, provenance: Provenance | None = None) -> None:
        super().__init__(d_in, d_sae, sparsity, provenance)
        self.threshold = nn.Parameter(torch.zeros(d_sae, dtype=torch.float32))

    def activate(self, pre: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_sae"]:
        return pre * (pre > self.threshold)

    def training_loss(self, x: Float[Tensor, "row d_model"], dead: Tensor, progress: float) -> Loss:
        pre = self.pre_activations(x)
        f, l0 = _Jump.apply(pre, self.threshold)
        error = x - self.decode(f)
        weight = TARGET_COEFFICIENT * min(1.0, progress / 0.1)
        total = error.pow(2).sum(-1).mean() + weight * (l0.mean() / self.sparsity - 1) ** 2
        if dead.any():
            # A latent that never fires gets no gradient: raise its pre-activations gently (Conerly et al. 2025).
            gap = (self.threshold[dead] - pre[:, dead]).relu()
            total = total + 1e-3 * gap.mean(0).sum() / self.d_sae**0.5
        return Loss(total, f)

    @torch.no_grad()
    def init_thresholds(self, x: Float[Tensor, "row d_model"]) -> None:
        # Every latent starts firing equally often, at 1.5 times the target together.
        share = min(0.5, 1.5 * self.sparsity / self.d_sae)
        pre = self.pre_activations(x)
        self.threshold.copy_(pre.quantile(1 - share, dim=0).clamp(min=1e-3))

    def rescale_activations(self, scale: float) -> None:
        with torch.no_grad():
            self.threshold.mul_(scale)

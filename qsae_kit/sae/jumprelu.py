"""JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435).

f = pre * H(pre - theta);   loss = E|x - x_hat|^2 + sparsity. theta learns through the
straight-through rectangle kernel
K of width eps: df/dtheta = -theta/eps * K((pre - theta)/eps),   dL0/dtheta = -1/eps * K((pre -
    theta)/eps).

Latents that died learn from AuxK (`SAE.aux_k_loss`), as in the TopK family, and are lifted to their
thresholds.

Three sparsity terms:
    target  c * (L0 / target - 1)^2            section 5 of the paper; needs no tuning
    step    c * L0                             Gemma Scope
    tanh    c * sum tanh(4 sqrt(d_model) f)    Anthropic, January 2025, in units of E|x|^2 = 1

theta is a plain float32 parameter kept from falling below zero, not a logarithm, which would freeze
under Adam.
"""

from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qsae_kit.sae.base import AUX_EVERY, SAE, Loss, Provenance, State
from qsae_kit.sae.codes import of_column

Sparsity: TypeAlias = Literal["target", "step", "tanh"]
COEFFICIENT: dict[Sparsity, float] = {"target": 3.0, "step": 0.01, "tanh": 0.01}
WARM_UP: dict[Sparsity, float] = {"target": 0.1, "step": 0.1, "tanh": 1.0}
"""Share of the run over which the sparsity term grows to its full weight."""
LIFT = 1e-2
"""Coefficient of the lift of dead latents; three times as much raises the FVU."""


SAMPLED_ROWS = 512
"""About so many rows of a batch tell how many entries lie below their thresholds."""
BELOW = 0.999
"""Share of a latent's largest first value that its threshold is put at, where none would be above.
"""


class _Jump(torch.autograd.Function):
    """(pre, theta, rows that an entry stands for) -> (f, fired), entry by entry, with the
    straight-through gradients above.
    """

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, theta: Tensor, stands_for: Tensor, bandwidth: float
    ) -> tuple[Tensor, Tensor]:
        fired = pre > theta
        ctx.save_for_backward(pre, theta, stands_for, fired)
        ctx.bandwidth = bandwidth
        return pre * fired, fired.to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_f, grad_fired = grads
        pre, theta, stands_for, fired = ctx.saved_tensors
        density = ((pre - theta).abs_() < ctx.bandwidth / 2) * stands_for / ctx.bandwidth
        return grad_f * fired, (grad_f * theta).add_(grad_fired).mul_(density).neg_(), None, None


class JumpReLUSAE(SAE):
    """bandwidth: eps, in units of activations normalised to E|x|^2 = 1; coefficient: c, by default
    `COEFFICIENT`.
    """

    architecture = "jumprelu"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        sparsity: float,
        provenance: Provenance | None = None,
        *,
        sparsity_loss: Sparsity = "target",
        coefficient: float | None = None,
        bandwidth: float = 0.03,
    ) -> None:
        super().__init__(d_in, d_sae, sparsity, provenance)
        if sparsity_loss not in COEFFICIENT:
            raise ValueError(
                f"sparsity_loss={sparsity_loss!r} was given; allowed are {', '.join(COEFFICIENT)}."
            )
        if not bandwidth > 0:
            raise ValueError(f"bandwidth={bandwidth} was given; it must be positive.")
        self.sparsity_loss, self.bandwidth = sparsity_loss, bandwidth
        self.coefficient = COEFFICIENT[sparsity_loss] if coefficient is None else coefficient
        self.threshold = nn.Parameter(torch.zeros(d_sae, dtype=torch.float32))

    def activate(self, pre: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_sae"]:
        # several times faster than a product with a mask
        return torch.where(pre > self.threshold, pre, 0.0)

    def training_loss(self, x: Float[Tensor, "row d_model"], state: State) -> Loss:
        theta = self.threshold.detach()
        # Below the kernel there is neither value nor gradient. In its lower half entries only tell
        # how many there are, for which a part of the rows will do; near the threshold all are
        # taken, since there rounding decides.
        every = max(1, round(len(x) / SAMPLED_ROWS))
        least, sampled = theta - self.bandwidth / 8, theta - self.bandwidth / 2
        pre, codes, everywhere, shifted = self.encode_above(x, least, sampled, every)
        stands_for = torch.where(everywhere, 1.0, len(x) / len(x[::every]))
        f, fired = _Jump.apply(pre, of_column(self.threshold, codes), stands_for, self.bandwidth)
        codes.narrow(fired.detach() > 0)
        missed, error = self.squared_error(x, f, codes)
        weight = self.coefficient * min(1.0, state.progress / WARM_UP[self.sparsity_loss])
        total = missed + weight * self._sparsity(f, fired, len(x))
        if len(state.dead):
            some = torch.arange(0, len(x), AUX_EVERY, device=x.device)[:, None]
            all_pre = shifted[::AUX_EVERY] + torch.where(some % every == 0, sampled, least).to(
                shifted.dtype
            )
            total = (
                total + self.aux_k_loss(x, error, state.dead, all_pre) + self._lift(x, state.dead)
            )
        return Loss(total, f, codes)

    def _sparsity(self, f: Tensor, fired: Tensor, n_rows: int) -> Tensor:
        if self.sparsity_loss == "tanh":
            return torch.tanh(4 * self.d_in**0.5 * f).sum() / n_rows
        l0 = fired.sum() / n_rows
        return l0 if self.sparsity_loss == "step" else (l0 / self.sparsity - 1) ** 2

    def _lift(self, x: Float[Tensor, "row d_model"], dead: Int[Tensor, " latent"]) -> Tensor:
        """Raises the biases of dead latents gently to their thresholds (after Conerly et al. 2025);
        AuxK turns their rows.
        """
        gap = self.threshold[dead] - (x[::8] @ self.encoder[dead].detach().T + self.b_enc[dead])
        return LIFT * gap.relu().mean(0).sum() / self.d_sae**0.5

    @torch.no_grad()
    def init_thresholds(self, x: Float[Tensor, "row d_model"]) -> None:
        # Every latent starts firing equally often, at 1.5 times the target together.
        share = min(0.5, 1.5 * self.sparsity / self.d_sae)
        for begin in range(0, self.d_sae, 1024):  # quantiles sort a copy
            some = slice(begin, begin + 1024)
            pre = x @ self.encoder[some].T + self.b_enc[some]
            bound, most = pre.quantile(1 - share, dim=0), pre.amax(0)
            # of rows that come again and again the largest is the quantile, and none is above it
            bound = torch.where(bound < most, bound, BELOW * most)
            self.threshold[some] = bound.clamp(min=1e-3)

    @torch.no_grad()
    def constrain(self) -> None:
        self.threshold.clamp_(min=0)

    def rescale_activations(self, scale: float) -> None:
        with torch.no_grad():
            self.threshold.mul_(scale)

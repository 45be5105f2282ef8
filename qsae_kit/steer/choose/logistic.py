"""Logistic regression kept sparse by the sizes of its weights (L1): which few features tell two
groups of rows apart.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qsae_kit.io.processor import exact

MOST_STEPS = 1000
"""Of one fit."""
TOLERANCE = 1e-5
"""A fit ends where a step moves nothing by more than this times its length: the gradient is as near
to what an optimum has."""
SLOPE = 0.25
"""The largest second derivative of the logistic loss."""


class LogisticFit(NamedTuple):
    """Log-odds of the first group as a weighted sum, in float64."""

    weights: Float[Tensor, " feature"]
    bias: Float[Tensor, ""]

    @property
    def support(self) -> list[int]:
        """The features whose weight is not 0."""
        return self.weights.nonzero()[:, 0].tolist()


class Groups(NamedTuple):
    """Two groups of rows as a fit takes them; each group counts a half, whatever its size."""

    rows: Float[Tensor, "row feature"]
    """In float64."""
    first: Bool[Tensor, " row"]
    counts: Float[Tensor, " row"]
    step: float
    """The longest step that cannot overshoot."""

    @classmethod
    def of(
        cls, first: Float[Tensor, "row_a feature"], second: Float[Tensor, "row_b feature"]
    ) -> "Groups":
        first, second = exact(first), exact(second)
        is_first = torch.arange(len(first) + len(second), device=first.device) < len(first)
        counts = torch.where(is_first, 0.5 / len(first), 0.5 / len(second)).double()
        rows = torch.cat([first, second])
        with_bias = torch.nn.functional.pad(rows, (0, 1), value=1.0)
        bend = SLOPE * float(torch.linalg.matrix_norm(counts.sqrt()[:, None] * with_bias, 2)) ** 2
        return cls(rows, is_first, counts, 1 / bend)

    def gradient(self, fit: LogisticFit) -> tuple[Float[Tensor, " feature"], Float[Tensor, ""]]:
        """Of the mean logistic loss, by the weights and by the bias."""
        wrong = torch.sigmoid(self.rows @ fit.weights + fit.bias) - self.first.double()
        wrong = self.counts * wrong
        return wrong @ self.rows, wrong.sum()

    def none(self) -> LogisticFit:
        """Weights of 0, which are the fit for every penalty from `least_penalty_of_none` on."""
        return LogisticFit(self.rows.new_zeros(self.rows.shape[1]), self.rows.new_zeros(()))

    def least_penalty_of_none(self) -> float:
        """The least penalty under which every weight is 0."""
        return float(self.gradient(self.none())[0].abs().max())


def l1_logistic(groups: Groups, penalty: float, start: LogisticFit | None = None) -> LogisticFit:
    """The weights and bias of the least mean logistic loss + penalty x sum |weight|.

    By proximal gradient steps with momentum, which begins anew where it leads astray (FISTA; Beck
    and Teboulle 2009, O'Donoghue and Candes 2015). The bias is not penalised. start: where to
    begin, such as the fit for another penalty.
    """
    step, at = groups.step, start or groups.none()
    ahead, momentum = at, 1.0
    for _ in range(MOST_STEPS):
        by_weights, by_bias = groups.gradient(ahead)
        moved = ahead.weights - step * by_weights
        new = LogisticFit(
            moved.sign() * (moved.abs() - step * penalty).clamp(min=0), ahead.bias - step * by_bias
        )
        to = LogisticFit(new.weights - at.weights, new.bias - at.bias)
        back = LogisticFit(ahead.weights - new.weights, ahead.bias - new.bias)
        if float(back.weights @ to.weights + back.bias * to.bias) > 0:
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        share = (momentum - 1) / following
        at, momentum = new, following
        ahead = LogisticFit(new.weights + share * to.weights, new.bias + share * to.bias)
        if max(float(back.weights.abs().max()), abs(float(back.bias))) < TOLERANCE * step:
            break
    return at

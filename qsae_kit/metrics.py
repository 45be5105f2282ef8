"""Metrics: one name, one formula, one direction each. Sums run in float64 over all kept tokens and are divided once."""

from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class Reconstruction:
    """Accumulates how well rows are reconstructed; `result` gives the figures.

    FVU = sum|x - x_hat|^2 / sum|x - mean(x)|^2 with the mean over the evaluation set (1 - explained variance, as in
    SAELens since 6.45.1); L0 = mean non-zero features a token; dead = share of features that never fired.
    """

    rows: int = 0
    error: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    square: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    total: Tensor | None = None
    active: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    fired: Tensor | None = None

    def add(self, x: Float[Tensor, "row d_model"], x_hat: Float[Tensor, "row d_model"], f: Float[Tensor, "row d_sae"]) -> None:
        """Takes in a batch of rows, their reconstructions and features."""
        if not len(x):
            return
        x64 = x.double()
        error = (x64 - x_hat.double()).pow(2).sum()
        self.rows += len(x)
        self.error = self.error + error.cpu()
        self.square = self.square + x64.pow(2).sum().cpu()
        column_sums = x64.sum(0).cpu()
        self.total = column_sums if self.total is None else self.total + column_sums
        self.active = self.active + (f > 0).sum().double().cpu()
        fired = (f > 0).any(0).cpu()
        self.fired = fired if self.fired is None else self.fired | fired

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; ValueError without rows or where the rows do not vary."""
        if self.total is None:
            raise ValueError("There are no tokens to evaluate; give data whose keep-mask leaves some.")
        variance = self.square - self.total.pow(2).sum() / self.rows
        if variance <= 0:
            raise ValueError("The evaluation rows are all alike; FVU needs rows that vary.")
        return float(self.error / variance)

    @property
    def l0(self) -> float:
        return float(self.active) / self.rows

    @property
    def dead(self) -> float:
        assert self.fired is not None
        return 1 - float(self.fired.double().mean())


CHUNK = 512  # rows of logits in float64 at a time: 512 x 151,936 x 8 bytes is 0.6 GB


def cross_entropy(logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Cross-entropy in nats of each row's target, float64."""
    pairs = zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([-log_softmax(part).gather(-1, target[:, None])[:, 0] for part, target in pairs])


def kl_divergence(clean: Float[Tensor, "row vocab"], changed: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    """KL(clean || changed) in nats of each row's next-token distributions, float64."""
    parts = []
    for before, after in zip(clean.split(CHUNK), changed.split(CHUNK), strict=True):
        p = log_softmax(before)
        parts.append((p.exp() * (p - log_softmax(after))).sum(-1))
    return torch.cat(parts)


def log_softmax(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
    """Log-probabilities in float64 (float32 loses the small differences that KL is made of)."""
    return torch.log_softmax(logits.double(), dim=-1)


def ce_score(ce_clean: float, ce_spliced: float, ce_zero: float) -> float:
    """(CE_zero - CE_spliced) / (CE_zero - CE_clean): 1 is no loss, 0 is as bad as zeroing the site."""
    return (ce_zero - ce_spliced) / (ce_zero - ce_clean)


class Interval(NamedTuple):
    """A rate with its 95 % interval."""

    rate: float
    low: float
    high: float


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a rate. Raises ValueError for n = 0."""
    if n <= 0:
        raise ValueError("A rate needs at least one observation.")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate = successes / n
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return Interval(rate, max(0.0, center - half), min(1.0, center + half))

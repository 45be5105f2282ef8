"""Metrics: one name, one formula, one direction each. Sums run in float64 over all kept tokens and
are divided once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from qsae_kit.io.processor import exact


@dataclass
class Reconstruction:
    """How well rows are reconstructed, and by how many features; rows come in any order and in
    batches of any size.

    Sums over rows r of x, its reconstruction y and its features f, in float64 and divided once:

    - fvu: sum |x - y|^2 / sum |x - mean(x)|^2, the mean over all rows (1 - explained variance;
      SAELens since 6.45.1)
    - mse: mean |x - y|^2 (a row, not an entry)
    - cosine: mean cos(x, y)
    - l2_ratio: mean |y| / |x|
    - relative_bias: E|y|^2 / E[x.y], 1 where reconstructions have the right length (Rajamanoharan
      et al. 2024)
    - l0: mean non-zero features a row; l0_counts: rows by their number of features
    - density: [d_sae], share of rows that each feature fires on

    All of these are of the rows that count. Of those that were left out as sinks:

    - n_sinks: how many there are
    - share_sinks: their share of the variance, 1 - V / V_all, where V is sum |x - mean(x)|^2 over
      the rows that count and V_all the same over all rows
    """

    rows: int = 0
    error: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    square: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    total: Tensor | None = None
    cosines: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    ratios: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    reconstructed: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    products: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    fired: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    l0_counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """[number of features]: rows that fire so many."""
    n_sinks: int = 0
    sinks_square: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    sinks_total: Tensor | None = None

    def add_sinks(self, x: Float[Tensor, "row d_model"]) -> None:
        """Takes in rows that were left out."""
        if len(x):
            x64 = exact(x)
            self.n_sinks += len(x)
            self.sinks_square = self.sinks_square + x64.pow(2).sum().cpu()
            self.sinks_total = _plus(self.sinks_total, x64.sum(0).cpu())

    def add(
        self,
        x: Float[Tensor, "row d_model"],
        x_hat: Float[Tensor, "row d_model"],
        f: Float[Tensor, "row d_sae"],
    ) -> None:
        """Takes in rows, their reconstructions and features."""
        if not len(x):
            return
        x64, y64, on = exact(x), exact(x_hat), f != 0
        column_sums = x64.sum(0).cpu()
        lengths = x64.norm(dim=-1), y64.norm(dim=-1)
        dots = (x64 * y64).sum(-1)
        self.rows += len(x)
        self.error = self.error + (x64 - y64).pow(2).sum().cpu()
        self.square = self.square + x64.pow(2).sum().cpu()
        self.total = _plus(self.total, column_sums)
        self.cosines = (
            self.cosines + (dots / (lengths[0] * lengths[1]).clamp(min=1e-300)).sum().cpu()
        )
        self.ratios = self.ratios + (lengths[1] / lengths[0].clamp(min=1e-300)).sum().cpu()
        self.reconstructed = self.reconstructed + y64.pow(2).sum().cpu()
        self.products = self.products + dots.sum().cpu()
        self.fired = _added(self.fired, on.sum(0).cpu())
        self.l0_counts = _added(self.l0_counts, torch.bincount(on.sum(1)).cpu())

    def __add__(self, other: "Reconstruction") -> "Reconstruction":
        """What both took in."""
        sums: dict[str, Any] = {}
        for part in fields(self):
            one, two = getattr(self, part.name), getattr(other, part.name)
            if part.name in ("fired", "l0_counts"):
                sums[part.name] = _added(one, two)
            elif part.name in ("total", "sinks_total"):
                sums[part.name] = _plus(one, two)
            else:
                sums[part.name] = one + two
        return type(self)(**sums)

    def _some(self) -> None:
        if not self.rows:
            raise ValueError(
                "There are no tokens to evaluate; give data whose keep-mask leaves some."
            )

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; ValueError without rows or where the rows do not
        vary.
        """
        self._some()
        variance = self._variance
        if variance <= 0:
            raise ValueError("The evaluation rows are all alike; FVU needs rows that vary.")
        return float(self.error) / variance

    @property
    def _variance(self) -> float:
        """sum |x - mean(x)|^2 of the rows that count."""
        assert self.total is not None
        return float(self.square - self.total.pow(2).sum() / self.rows)

    @property
    def share_sinks(self) -> float:
        """Share of the variance of all rows that the sinks make."""
        self._some()
        if self.sinks_total is None:
            return 0.0
        total, rows = _plus(self.total, self.sinks_total), self.rows + self.n_sinks
        assert total is not None
        every = float(self.square + self.sinks_square - total.pow(2).sum() / rows)
        return 1 - self._variance / every

    @property
    def mean(self) -> Float[Tensor, " d_model"]:
        """Of the rows."""
        self._some()
        assert self.total is not None
        return self.total / self.rows

    @property
    def mse(self) -> float:
        self._some()
        return float(self.error) / self.rows

    @property
    def cosine(self) -> float:
        self._some()
        return float(self.cosines) / self.rows

    @property
    def l2_ratio(self) -> float:
        self._some()
        return float(self.ratios) / self.rows

    @property
    def relative_bias(self) -> float:
        """Infinite where nothing is reconstructed."""
        self._some()
        return (
            float(self.reconstructed) / float(self.products) if self.products > 0 else float("inf")
        )

    @property
    def l0(self) -> float:
        self._some()
        return float(self.fired.sum()) / self.rows

    def l0_quantile(self, share: float) -> int:
        """The number of features that this share of rows does not exceed."""
        self._some()
        return int((self.l0_counts.cumsum(0) < share * self.rows).sum())

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        self._some()
        return self.fired.double() / self.rows

    @property
    def dead(self) -> float:
        """Share of features that never fired on these rows."""
        return float((self.density == 0).double().mean())

    def denser(self, share: float) -> float:
        """Share of features that fire on more than this share of rows."""
        return float((self.density > share).double().mean())

    def figures(self) -> dict[str, float]:
        """All of them by name, those of the rows that count first, then those of the sinks."""
        return {
            "fvu": self.fvu,
            "mse": self.mse,
            "cosine": self.cosine,
            "l2_ratio": self.l2_ratio,
            "relative_bias": self.relative_bias,
            "l0": self.l0,
            "l0_p10": self.l0_quantile(0.1),
            "l0_p90": self.l0_quantile(0.9),
            "dead": self.dead,
            "denser_than_1_percent": self.denser(0.01),
            "denser_than_10_percent": self.denser(0.1),
            "tokens": self.rows,
            "n_sinks": self.n_sinks,
            "share_sinks": self.share_sinks,
        }


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Sum of what there is."""
    return other if one is None else one if other is None else one + other


def _added(one: Tensor, other: Tensor) -> Tensor:
    """Sum of two counts, the shorter one filled up with zeros."""
    out = torch.zeros(max(len(one), len(other)), dtype=torch.int64)
    out[: len(one)] += one
    out[: len(other)] += other
    return out


def decoder_cosines(W_dec: Float[Tensor, "d_sae d_model"], chunk: int = 1024) -> dict[str, float]:
    """How alike decoder rows are: mean |cosine| of pairs, and the median and 99th percentile of
    each row's largest one.
    """
    rows = torch.nn.functional.normalize(exact(W_dec), dim=1)
    total, largest = 0.0, []
    for begin in range(0, len(rows), chunk):
        cosines = (rows[begin : begin + chunk] @ rows.T).abs()
        own = torch.arange(len(cosines), device=cosines.device)
        cosines[own, begin + own] = 0
        total += float(cosines.sum())
        largest.append(cosines.amax(1))
    nearest = torch.cat(largest)
    pairs = max(1, len(rows) * (len(rows) - 1))
    return {
        "mean_cosine": total / pairs,
        "nearest_median": float(nearest.median()),
        "nearest_p99": float(nearest.quantile(0.99)),
    }


def match(
    true: Float[Tensor, "feature d"], found: Float[Tensor, "latent d"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of features and latents with the largest sum of |cosines| (Hungarian): features,
    latents, |cosines|.
    """
    normalize = torch.nn.functional.normalize
    cosines = (normalize(exact(true), dim=1) @ normalize(exact(found), dim=1).T).abs()
    features, latents = linear_sum_assignment(-cosines.numpy())
    pairs = torch.from_numpy(features), torch.from_numpy(latents)
    return *pairs, cosines[pairs]


CHUNK = 512  # rows of logits in float64 at a time: 512 x 151,936 x 8 bytes is 0.6 GB


def cross_entropy(
    logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Cross-entropy in nats of each row's target, float64."""
    pairs = zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([-_of_targets(log_softmax(part), target) for part, target in pairs])


def _of_targets(
    log_probabilities: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    return log_probabilities.gather(-1, targets.to(log_probabilities.device)[:, None])[:, 0]


def kl_divergence(
    clean: Float[Tensor, "row vocab"], changed: Float[Tensor, "row vocab"]
) -> Float[Tensor, " row"]:
    """KL(clean || changed) in nats of each row's next-token distributions, float64."""
    parts = []
    for before, after in zip(clean.split(CHUNK), changed.split(CHUNK), strict=True):
        p = log_softmax(before)
        parts.append((p.exp() * (p - log_softmax(after))).sum(-1))
    return torch.cat(parts)


def log_softmax(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
    """Log-probabilities in float64 (float32 loses the small differences that KL is made of), on the
    CPU where the device has none (`exact`).
    """
    return torch.log_softmax(exact(logits), dim=-1)


def recovered(spliced: float, clean: float, ablated: float) -> float:
    """(ablated - spliced) / (ablated - clean): 1 is no loss, 0 is as bad as ablating the site;
    minus infinity where ablating costs nothing. CE and KL scores are this, against zero or mean
    ablation, which inflate it differently."""
    return (ablated - spliced) / (ablated - clean) if ablated != clean else float("-inf")


def top_1_agreement(
    clean: Float[Tensor, "row vocab"], changed: Float[Tensor, "row vocab"]
) -> Float[Tensor, " row"]:
    """1 where both predict the same next token."""
    return exact(clean.argmax(-1) == changed.argmax(-1))


class Change(NamedTuple):
    """What a change does to each row's next-token distribution; see the functions of these
    names.
    """

    cross_entropy: Float[Tensor, " row"]
    """Of the changed one."""
    kl_divergence: Float[Tensor, " row"]
    top_1_agreement: Float[Tensor, " row"]


def compare(
    clean: Float[Tensor, "row vocab"],
    changed: Float[Tensor, "row vocab"],
    targets: Int[Tensor, " row"],
) -> Change:
    """All three at once: each row's log-probabilities are taken only once."""
    ce, kl = [], []
    for before, after, target in zip(
        clean.split(CHUNK), changed.split(CHUNK), targets.split(CHUNK), strict=True
    ):
        p, q = log_softmax(before), log_softmax(after)
        ce.append(-_of_targets(q, target))
        gap = q.neg_().add_(p)
        kl.append(p.exp_().mul_(gap).sum(-1))
    return Change(torch.cat(ce), torch.cat(kl), top_1_agreement(clean, changed))


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
    low, high = center - half, center + half
    return Interval(rate, low if successes else 0.0, high if successes < n else 1.0)


def paired_bootstrap(
    changes: Sequence[Sequence[float]],
    weights: Sequence[float],
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """A weighted sum of means with a bootstrap interval that draws prompts anew within each group.

    changes: for each group a figure a prompt, such as what an edit changed there (1, 0 or -1).
        Raises ValueError for an empty group.
    """
    if not changes or not all(len(group) for group in changes):
        raise ValueError("A bootstrap needs at least one prompt in every group.")
    rng = np.random.default_rng(seed)
    total, middle = np.zeros(n), 0.0
    for group, weight in zip(changes, weights, strict=True):
        values = np.asarray(group, dtype=np.float64)
        total += weight * values[rng.integers(0, len(values), (n, len(values)))].mean(1)
        middle += weight * float(values.mean())
    low, high = np.quantile(total, [(1 - level) / 2, (1 + level) / 2])
    return Interval(middle, float(low), float(high))

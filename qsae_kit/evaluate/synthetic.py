"""Activations whose true features are known: what a trained SAE has found of them.

A row is a sum of feature directions, x = sum_i z_i * a_i * d_i (in superposition: more features
    than dimensions). Whether z_i feature i fires follows from three things: frequency    p_i falls
    with rank as a power law between `max_prob` and `min_prob` (Zipf) correlation  features fire
    where a Gaussian of low rank plus noise passes their threshold (a Gaussian copula) hierarchy
    a child fires only where its parent does; some families allow one child at a time Magnitudes a_i
    are 1 + std * noise, at least a tenth. Directions are random, then pushed apart by gradient
    descent on their largest cosines. After SAELens's synthetic module (2025) and Chanin &
    Garriga-Alonso (arXiv 2508.16560).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import norm
from torch import Tensor

from qsae_kit.metrics.reconstruction import match
from qsae_kit.sae import SAE


@dataclass(frozen=True)
class SyntheticConfig:
    """A world of `n_features` in `d_model` dimensions."""

    n_features: int = 1024
    d_model: int = 128
    max_prob: float = 0.05
    min_prob: float = 0.002
    exponent: float = 0.5
    """Of the power law of frequencies."""
    rank: int = 16
    """Of the correlations; 0: independent features."""
    correlation: float = 0.1
    """Share of the variance that the shared factors have."""
    families: int = 16
    """Trees of features: a root, four children each, four grandchildren each; 0: no hierarchy."""
    exclusive: float = 0.5
    """Share of parents whose children exclude one another."""
    std: float = 0.3
    """Standard deviation of magnitudes, whose mean is 1."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_features < 1 or self.d_model < 2:
            raise ValueError(
                f"{self.n_features} features in {self.d_model} dimensions were asked for; needed"
                " are 1 and 2 at least."
            )
        if self.families * 21 > self.n_features:
            raise ValueError(
                f"{self.families} families of 21 need {self.families * 21} features, there are"
                f" {self.n_features}."
            )
        if not 0 < self.min_prob <= self.max_prob < 1:
            raise ValueError(
                f"Frequencies from {self.min_prob} to {self.max_prob} were asked for; they lie"
                " between 0 and 1."
            )


class Sample(NamedTuple):
    """Rows with what they are made of."""

    x: Float[Tensor, "row d_model"]
    z: Float[Tensor, "row feature"]
    """Magnitudes, 0 where a feature does not fire."""


class Synthetic:
    """Features with directions, frequencies, correlations and families; the same for the same
    config.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        n, d = config.n_features, config.d_model
        rank = torch.arange(1, n + 1).float() ** -config.exponent
        spread = (rank - rank[-1]) / (rank[0] - rank[-1]).clamp(min=1e-9)
        self.frequency = config.min_prob + (config.max_prob - config.min_prob) * spread
        """[feature]: how often each fires, before its family has a say."""
        order = torch.randperm(n, generator=generator)
        self.frequency = self.frequency[order]
        self.directions = apart(torch.randn(n, d, generator=generator))
        """[feature, d_model], unit norm."""
        self.factors = (
            torch.randn(n, max(1, config.rank), generator=generator) / max(1, config.rank) ** 0.5
        )
        self.parent = torch.full((n,), -1)
        self.exclusive = torch.zeros(n, dtype=torch.bool)
        """[feature]: whether its children exclude one another."""
        self._grow(generator)

    def _grow(self, generator: torch.Generator) -> None:
        """Families of 21; the most frequent features become roots, so that children can be as
        frequent as they were.
        """
        by_frequency = self.frequency.argsort(descending=True).tolist()
        roots, rest = (
            by_frequency[: self.config.families],
            iter(by_frequency[self.config.families :]),
        )
        for root in roots:
            children = [next(rest) for _ in range(4)]
            grandchildren = [[next(rest) for _ in range(4)] for _ in children]
            self.parent[children] = root
            for child, own in zip(children, grandchildren, strict=True):
                self.parent[own] = child
            for parent in (root, *children):
                self.exclusive[parent] = bool(
                    torch.rand((), generator=generator) < self.config.exclusive
                )

    def sample(self, n_rows: int, seed: int = 0) -> Sample:
        """Rows and magnitudes; another seed gives other rows of the same world."""
        generator = torch.Generator().manual_seed((self.config.seed + 1) * 1_000_003 + seed)
        fires = self._fires(n_rows, generator)
        sizes = (
            1 + self.config.std * torch.randn(n_rows, len(self.frequency), generator=generator)
        ).clamp(min=0.1)
        z = fires * sizes
        return Sample(z @ self.directions, z)

    def _fires(self, n_rows: int, generator: torch.Generator) -> Bool[Tensor, "row feature"]:
        n, share = len(self.frequency), self.config.correlation if self.config.rank else 0.0
        shared = torch.randn(n_rows, self.factors.shape[1], generator=generator) @ self.factors.T
        own = torch.randn(n_rows, n, generator=generator)
        lengths = self.factors.norm(dim=1)
        latent = share**0.5 * shared / lengths + (1 - share) ** 0.5 * own
        # A child that needs its parent fires more often given the parent, so that its frequency
        # stays what was asked for.
        given = self.frequency.clone()
        has = self.parent >= 0
        given[has] = (self.frequency[has] / self.frequency[self.parent[has]]).clamp(max=0.5)
        fires = latent > torch.from_numpy(norm.isf(given.numpy())).float()
        for level in self._levels():
            fires[:, level] &= fires[:, self.parent[level]]
        for parent in self.exclusive.nonzero().view(-1).tolist():
            children = (self.parent == parent).nonzero().view(-1)
            strongest = (
                latent[:, children]
                .masked_fill(~fires[:, children], -torch.inf)
                .argmax(1, keepdim=True)
            )
            only = torch.zeros(n_rows, len(children), dtype=torch.bool).scatter_(1, strongest, True)
            fires[:, children] &= only
        for level in self._levels():  # a grandchild of a child that was excluded
            fires[:, level] &= fires[:, self.parent[level]]
        return fires

    def _levels(self) -> list[Tensor]:
        """Features with a parent, parents' levels first."""
        first = ((self.parent >= 0) & (self.parent[self.parent] < 0)).nonzero().view(-1)
        second = ((self.parent >= 0) & (self.parent[self.parent] >= 0)).nonzero().view(-1)
        return [level for level in (first, second) if len(level)]


def apart(
    directions: Float[Tensor, "feature d_model"], steps: int = 100, rate: float = 0.02
) -> Float[Tensor, "feature d_model"]:
    """Unit rows pushed apart: descent on the sum of cosines to the fourth power, which the largest
    ones dominate.
    """
    rows = torch.nn.functional.normalize(directions, dim=1)
    for _ in range(steps):
        cosines = rows @ rows.T
        cosines.fill_diagonal_(0)
        rows = torch.nn.functional.normalize(rows - rate * 4 * cosines.pow(3) @ rows, dim=1)
    return rows


# --- scores


@torch.no_grad()
def score(
    sae: SAE, world: Synthetic, n_rows: int = 20_000, seed: int = 10_000, batch: int = 2000
) -> tuple[dict[str, float], pd.DataFrame]:
    """What an SAE found of a world's features on fresh rows.

    Figures: mcc (mean |cosine| of matched pairs, unmatched features counted 0), uniqueness (share
    of latents whose nearest feature is nobody else's nearest), f1, precision and recall of firing
    (means over matched features that fired), l0 and true_l0, fvu, dead (share of latents that never
    fired). The table has a row a feature: frequency as sampled, cosine, f1.
    """
    features, latents, cosines = match(world.directions, sae.W_dec.cpu())
    n = len(world.directions)
    hits, fired, true = (torch.zeros(len(features), dtype=torch.float64) for _ in range(3))
    counts = torch.zeros(n, dtype=torch.float64)
    alive = torch.zeros(sae.d_sae, dtype=torch.bool)
    error = variance = l0 = 0.0
    mean = world.sample(batch, seed - 1).x.double().mean(0)
    for number in range(n_rows // batch):
        x, z = world.sample(batch, seed + number)
        f = sae.encode(x.to(sae.b_dec.device))
        x_hat, f = sae.decode(f).cpu().double(), f.cpu()
        on, truth = f[:, latents] > 0, z[:, features] > 0
        hits += (on & truth).sum(0)
        fired += on.sum(0)
        true += truth.sum(0)
        counts += (z > 0).sum(0)
        alive |= (f > 0).any(0)
        l0 += float((f > 0).sum())
        error += float((x.double() - x_hat).pow(2).sum())
        variance += float((x.double() - mean).pow(2).sum())
    rows = n_rows // batch * batch
    precision, recall = hits / fired.clamp(min=1), hits / true.clamp(min=1)
    f1 = 2 * hits / (fired + true).clamp(min=1)
    seen = true > 0
    nearest = (
        torch.nn.functional.normalize(sae.W_dec.cpu().double(), dim=1) @ world.directions.double().T
    )
    closest = nearest.abs().argmax(1)
    figures = {
        "mcc": float(cosines.sum() / n),
        "uniqueness": len(closest.unique()) / sae.d_sae,
        "f1": float(f1[seen].mean()),
        "precision": float(precision[seen].mean()),
        "recall": float(recall[seen].mean()),
        "l0": l0 / rows,
        "true_l0": float(counts.sum()) / rows,
        "fvu": error / variance,
        "dead": 1 - float(alive.double().mean()),
    }
    table = pd.DataFrame(
        {"feature": np.arange(n), "frequency": (counts / rows).numpy(), "cosine": 0.0, "f1": 0.0}
    )
    table.loc[features.numpy(), "cosine"] = cosines.numpy()
    table.loc[features.numpy(), "f1"] = f1.numpy()
    return figures, table

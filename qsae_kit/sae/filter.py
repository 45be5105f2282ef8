"""Which rows of activations count: attention sinks are left out.

A few kinds of tokens (the first one, markers of the template, some of a fixed system prompt) serve
models as sinks of attention: their residual streams, and the MLP outputs that write them, are
several to fifty times as long as others, hardly depend on the text, and hold most of the variance.
An SAE that is trained on them spends itself on them, and looks far better than it is.

How far they stand off differs from layer to layer (from 2.5 median norms to 50), while what is
ordinary ends at 1.3 to 2.5. So the bound is looked for at each site (`NormFilter.of`): in a gap
that separates sinks from the rest. Smooth tails, which most MLP and attention outputs have, show
none, and stay whole up to a wide bound.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qsae_kit.sites import parse_hook_name

WIDEST = 10.0
"""Median norms beyond which a row is a sink, gap or no gap."""
CLEAR = 1.6
"""How many times as long as the longest ordinary row the shortest sink has to be. Sinks stand off
by twice and more up to late layers, and there by 1.7; tokens that merely are of few kinds, as in
early layers, leave gaps of up to 1.5.
"""
LEAST = 2.0
"""Median norms of the shortest sink, at least: two kinds of ordinary tokens are less far apart."""
ENOUGH = 512
"""Rows from which on a gap is looked for: fewer are of few tokens, whose norms lie apart by chance.
"""
FEWEST = 16
"""Rows beyond a gap, at least: the last few of a heavy tail lie far apart by chance."""
MOST = 1 / 3
"""Share of the rows beyond a gap, at most: of short chats with a fixed system prompt a fifth may be
sinks; what is more is ordinary.
"""
STRAGGLERS = 0.05
"""Rows in a gap, at most, for each row beyond it: among ten thousands of rows hardly a gap is quite
empty. A tail with as many rows as the inverse of their norm, which is too heavy for a variance, has
0.6.
"""


class NormFilter(NamedTuple):
    """Drops attention sinks: rows whose norm exceeds `factor` times the site's median norm."""

    median: float
    """Median Euclidean norm of the site's rows, frozen from the first tokens seen; infinite until
    it is measured.
    """
    factor: float = WIDEST
    """The bound in medians."""

    @property
    def measured(self) -> bool:
        return math.isfinite(self.median)

    def keeps(self, x: Float[Tensor, "*row d_model"]) -> Bool[Tensor, "*row"]:
        return x.float().norm(dim=-1) <= self.factor * self.median

    def drops(self, x: Float[Tensor, "*row d_model"]) -> Bool[Tensor, "*row"]:
        """The sinks: rows of finite norm beyond the bound."""
        norms = x.float().norm(dim=-1)
        return norms.isfinite() & (norms > self.factor * self.median)

    @classmethod
    def of(cls, norms: Float[Tensor, " row"]) -> "NormFilter":
        """The filter of a site whose rows have these norms, in any order; those that are not finite
        are left out. Raises ValueError where there are none.

        The bound is the geometric middle of a gap: of the stretches that reach from a row to
        `CLEAR` times its norm, the emptiest, and of several the lowest, with hardly any row in it
        (`STRAGGLERS`), and beyond it sinks (`LEAST`, `FEWEST`, `MOST`). It is `WIDEST` where there
        is no such gap or too few rows to tell (`ENOUGH`), and never more.
        """
        ordered = norms[norms.isfinite()].double().sort().values
        if not len(ordered):
            raise ValueError("No norm is finite; check the model and its dtype.")
        median = float(ordered[(len(ordered) - 1) // 2])
        return cls(median, _bound(ordered / median) if median > 0 else WIDEST)


def _bound(ratios: Float[Tensor, " row"]) -> float:
    """The bound in medians of rising norms in medians."""
    n = len(ratios)
    if n < ENOUGH:
        return WIDEST
    row = torch.arange(n, device=ratios.device)
    first_beyond = torch.searchsorted(ratios, CLEAR * ratios, right=True)
    inside, beyond = first_beyond - row - 1, n - first_beyond
    shortest = ratios[first_beyond.clamp(max=n - 1)]
    gap = (
        (beyond >= FEWEST)
        & (beyond <= MOST * n)
        & (inside <= STRAGGLERS * beyond)
        & (shortest >= LEAST)
    )
    if not gap.any():
        return WIDEST
    lower = int(torch.where(gap, inside, n).argmin())
    return min(WIDEST, math.sqrt(float(ratios[lower] * shortest[lower])))


SHOWN = 3
"""Kinds of tokens that are named, at most."""


class Sinks(NamedTuple):
    """Rows of a site that its filter leaves out."""

    hook_name: str
    n: int
    texts: Sequence[str] = ()
    """Of their tokens, the most frequent first, where they are known."""


def sinks_said(found: Sequence[Sinks], n_rows: int) -> str:
    """A sentence on what is left out of `n_rows` rows of every site: the site with most by name.

    found: at least one.
    """
    most = max(found, key=lambda one: one.n)
    site = parse_hook_name(most.hook_name)
    others = "" if len(found) == 1 else f" at {len(found)} sites, most"
    named = ", ".join(map(repr, most.texts[:SHOWN])) + ", ..." * (len(most.texts) > SHOWN)
    return (
        f"Sinks are left out{others} at layer {site.layer} {site.kind}: {most.n:,} of {n_rows:,}"
        f" tokens ({most.n / n_rows:.1%})" + (f", such as {named}" if named else "")
    )

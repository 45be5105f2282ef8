"""Whether a checkpoint was edited: what differs between the weights of two models, of which rank it
is, and along which features.

A copy in another format differs everywhere by rounding, whose singular values fill the band of a
matrix of random signs; an edit that was written into the weights stands out of
that band by a few, even where it is smaller than the rounding of single numbers.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.audit.forms import ATTENTION, EMBEDDING, MLP
from qsae_kit.io.progress import tqdm
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.lm.placement import check_plain
from qsae_kit.sae.suites import ByVariant, Place, Suite
from qsae_kit.sites import width_name

BAND = 1.25
"""Times the largest singular value under random signs: beyond it one is no rounding."""
FAINTEST = 0.01
"""Of the largest singular value: what is fainter is the rounding of an edit."""
COARSEST = 0.15
"""Relative size of a difference that a format of 4 bits makes, and a little more."""
MOST_SPIKES = 8
"""Singular values that are looked at; as many of them beyond the band are no edit of low rank."""
ALONG = 3
"""Features that are named."""
RESIDUAL = "d_model"


class Difference(NamedTuple):
    """How one tensor of two models differs."""

    name: str
    kind: str
    """rounding: as copies in another format differ; low rank: a few directions stand out; bias: a
    vector differs by more than rounding; other: everything at once, as training leaves it."""
    rank: int
    """Singular values beyond the band of rounding; 0 for rounding and biases."""
    relative: float
    """||second - first|| / ||first||; of a matrix of tokens over the rows that are looked at."""
    directions: Float[Tensor, "rank d_model"] | None
    """Of what is written to the residual stream, unit vectors; None of other tensors."""


ROUNDING = 2.0**-7
"""Share of a tensor's largest value: what single numbers differ by in rounded copies of vectors,
which 8 bits of bfloat16 leave of them."""


@torch.no_grad()
def differences(first: HookedLM, second: HookedLM, bar: bool = False) -> Iterator[Difference]:
    """The tensors of two models of one shape that are not the same, one by one.

    Raises ValueError where they have different shapes, and for weights that are quantised, on disk
    or adapted.
    """
    for lm in (first, second):
        check_plain(lm.hf, lm.model_name)
    held, other = _tensors(first), _tensors(second)
    if all(lm.config.tie_word_embeddings for lm in (first, second)):
        held.pop(HEAD, None)
        other.pop(HEAD, None)
    names = sorted(held.keys() | other.keys())
    for name in tqdm(names, desc="comparing weights", disable=not bar):
        one, two = held.get(name), other.get(name)
        if one is None or two is None:
            present = one if one is not None else two
            assert present is not None
            if not name.endswith(".bias"):
                raise ValueError(
                    f"Only one of the two models has {name}; give two models of one shape."
                )
            one, two = (torch.zeros_like(present) if x is None else x for x in (one, two))
        if one.shape != two.shape:
            raise ValueError(
                f"{name} has the shapes {list(one.shape)} and {list(two.shape)}; give two models of"
                " one shape."
            )
        if not torch.equal(one.cpu().double(), two.cpu().double()):
            yield _difference(name, *_looked_at(name, one, two))


def _looked_at(name: str, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor and its change in float64; of what has a row a token a sample of the rows."""
    if name in OF_TOKENS and len(one) > TOKENS:
        some = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))[:TOKENS]
        one, two = one[some.to(one.device)], two[some.to(two.device)]
    wide = one.cpu().double()
    return wide, two.cpu().double() - wide


TOKENS = 16_384
"""Rows of a matrix of tokens that are looked at, at most."""


def _tensors(lm: HookedLM) -> dict[str, Tensor]:
    """By name, a head that is the embedding too."""
    return dict(lm.hf.named_parameters(remove_duplicate=False))


def _difference(name: str, wide: Tensor, change: Tensor) -> Difference:
    relative = float(change.norm() / wide.norm().clamp(min=torch.finfo(torch.float64).tiny))
    if change.ndim < 2:
        rounded = bool(change.abs().max() <= ROUNDING * wide.abs().max())
        along = (
            None if rounded or not _writes(name) else torch.nn.functional.normalize(change[None])
        )
        return Difference(name, "rounding" if rounded else "bias", 0, relative, along)
    kept = change[_distinct(wide)] if name in OF_TOKENS else change
    rank, vectors = _spikes(kept, rows=name in OF_TOKENS)
    kind = "low rank" if 0 < rank < MOST_SPIKES else "other"
    if not rank and relative <= COARSEST:
        kind = "rounding"
    return Difference(name, kind, rank, relative, vectors if rank and _writes(name) else None)


def _distinct(wide: Tensor) -> Tensor:
    """Indices of rows without those that are like another one: tokens that were never trained have
    one row, and what is the same is rounded the same way, which looks like a direction.
    """
    size = wide.pow(2).mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(wide.dtype).tiny)
    keys = (GRID * wide[:, :COMPARED] / size).round().to(torch.int32)
    _, group = torch.unique(keys, dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(wide))
    first.scatter_reduce_(0, group, torch.arange(len(wide)), "amin")
    return first


HEAD = "lm_head.weight"
OF_TOKENS = (f"{EMBEDDING}.weight", HEAD)
GRID, COMPARED = 8, 16
"""Steps a typical value, and values of a row, that tell rows apart."""


def _writes(name: str) -> bool:
    module = name.rpartition(".")[0]
    return module == EMBEDDING or module.endswith((ATTENTION, MLP))


def _spikes(change: Tensor, rows: bool) -> tuple[int, Float[Tensor, "rank d_model"]]:
    """How many singular values lie beyond the band of rounding, and the directions in what the
    matrix writes: of an embedding its rows, of other maps columns.

    The band is that of what is left under random signs: the same numbers everywhere, without any
    direction that they have in common (Hong, Sheng and Dobriban 2020, arXiv 2012.02985).
    """
    left = (change if rows else change.T).clone()
    found: list[Tensor] = []
    generator, strongest = torch.Generator().manual_seed(0), 0.0
    while len(found) < min(MOST_SPIKES, *left.shape):
        value, vector = _largest(left, generator)
        signs = torch.randint(0, 2, left.shape, generator=generator, dtype=torch.int8) * 2 - 1
        edge, _ = _largest(left * signs, generator)
        strongest = strongest or value
        if value <= max(BAND * edge, FAINTEST * strongest):
            break
        found.append(vector)
        left -= (left @ vector)[:, None] * vector
    stacked = torch.stack(found) if found else torch.zeros(0, left.shape[1], dtype=left.dtype)
    return len(found), stacked


def _largest(matrix: Tensor, generator: torch.Generator) -> tuple[float, Float[Tensor, " d_model"]]:
    """The largest singular value and its vector on the right, by the power method."""
    vector = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype)
    for _ in range(STEPS):
        vector = torch.nn.functional.normalize(matrix.T @ (matrix @ vector), dim=0)
    return float((matrix @ vector).norm()), vector


STEPS = 30
"""Of the power method: a value that stands out of a band is found to the percent."""


class Verdict(NamedTuple):
    """What the weights of two models say."""

    edited: bool
    """Whether anything differs by more than rounding."""
    in_words: str
    tensors: pd.DataFrame
    """A row for each tensor that is not the same: name, kind, rank, relative."""
    features: pd.DataFrame
    """A row for each feature nearest to a direction that many writers have in common: direction
    (its number), writers, variant, site, feature, cosine."""


def was_edited(
    first: HookedLM,
    second: HookedLM,
    suite: ByVariant | None = None,
    along: int = ALONG,
    bar: bool = False,
) -> Verdict:
    """Compares the weights of a model with those of one that may have been made of it.

    suite: SAEs whose features the directions of an edit are compared with. Raises ValueError for
    models of different shapes.
    """
    found = list(differences(first, second, bar))
    rows = [one._replace(directions=None) for one in found]
    tensors = pd.DataFrame(rows, columns=list(Difference._fields)).drop(columns="directions")
    beyond = [one for one in found if one.kind != "rounding"]
    written = [one.directions for one in beyond if one.directions is not None]
    features = _features(written, suite, along)
    return Verdict(bool(beyond), _in_words(found, beyond, features), tensors, features)


def _features(written: list[Tensor], suite: ByVariant | None, along: int) -> pd.DataFrame:
    columns = ["direction", "writers", "variant", "site", "feature", "cosine"]
    rows: list[tuple[int, int, str, str, int, float]] = []
    for number, (unit, n) in enumerate(_common(written)):
        cosines: list[tuple[float, Place, int]] = []
        for place, sae in (Suite.of(suite).saes() if suite else {}).items():
            if width_name(place.hook_name) != RESIDUAL:
                continue
            decoder = torch.nn.functional.normalize(sae.W_dec.detach().double().cpu(), dim=1)
            own = decoder @ unit
            best = own.abs().topk(min(along, len(own))).indices.tolist()
            cosines += [(float(own[i]), place, i) for i in best]
        cosines.sort(key=lambda one: -abs(one[0]))
        rows += [
            (number, n, place.variant, place.hook_name, feature, cosine)
            for cosine, place, feature in cosines[:along]
        ]
    return pd.DataFrame(rows, columns=columns)


SAME = 0.9
"""|cosine| from which directions of two writers count as one."""


def _common(written: list[Tensor]) -> list[tuple[Float[Tensor, " d_model"], int]]:
    """Directions that writers have in common, with the number of writers, the most shared first.

    The eigenvectors of the sum of the writers' projections, of eigenvalues that near a whole number
    of them: a span of several directions is found whichever vectors each writer gave for it.
    """
    if not written:
        return []
    total = torch.zeros(written[0].shape[1], written[0].shape[1], dtype=torch.float64)
    for vectors in written:
        total += vectors.T @ vectors
    values, vectors = torch.linalg.eigh(total)
    shared = [(float(v), vectors[:, i]) for i, v in enumerate(values) if v >= SAME]
    shared.sort(key=lambda one: -one[0])
    return [(unit, round(value)) for value, unit in shared[:MOST_SPIKES]]


def _in_words(found: list[Difference], beyond: list[Difference], features: pd.DataFrame) -> str:
    if not found:
        return "The weights are the same to the bit."
    if not beyond:
        return (
            f"No sign of an edit: {len(found)} tensors differ without a direction, as a copy in"
            f" another format does, by {max(one.relative for one in found):.1%} at most (bfloat16"
            " about 0.2%, 8 bits 1%, 4 bits 10%)."
        )
    kinds = pd.Series([one.kind for one in beyond]).value_counts()
    counted = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    ranks = sorted({one.rank for one in beyond if one.kind == "low rank"})
    said = f"Edited: {len(beyond)} tensors differ by more than rounding ({counted})"
    if ranks:
        said += f", of rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[-1] > ranks[0] else "")
    if len(features):
        best = features.iloc[features["cosine"].abs().argmax()]
        said += (
            f"; {best['writers']} of them along a direction whose nearest feature is"
            f" {best['feature']} of {best['site']} (cosine {best['cosine']:.2f})"
        )
    return said + "."

"""Concept recovery on the bundled model: which planted concepts an SAE's features tell, beside what else tells them.

For every concept the feature, its threshold and its site are chosen on the fit part of the corpus and scored on the test
part, which has other wordings and other people (`tiny.concepts`). The same search over permuted labels is the null, a
linear probe the ceiling, the last two tokens (an n-gram) the floor. Baselines are SAEs too (`baselines`), so raw neurons,
principal components and frozen dictionaries go through the same lines.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from qsae_kit.models import HookedLM
from qsae_kit.sae import SAE
from qsae_kit.tiny.concepts import Corpus, Units, corpus_activations, ngram_scores, per_unit, permuted, probe_direction

CANDIDATES = 32
"""Features whose threshold is searched, by each of two first looks."""
ENOUGH = 0.8
"""Share of the probe's F1 from which a concept counts as recovered; F1 of the n-gram from which it is left out."""


class Found(NamedTuple):
    """The best of many columns on the fit part, and what it scores on the test part."""

    column: int
    threshold: float
    fit: float
    f1: float


def f1_by_threshold(scores: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best F1 of every column over thresholds, and the threshold: positive is what lies above it. [column] each"""
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=0)
    hits = value[order].cumsum(axis=0)
    f1 = 2 * hits / (np.arange(1, len(value) + 1)[:, None] + value.sum())
    f1[:-1][ranked[1:] == ranked[:-1]] = -1  # a threshold cannot part what is equal
    at = f1.argmax(axis=0)
    columns = np.arange(scores.shape[1])
    below = np.where(at + 1 < len(value), ranked[np.minimum(at + 1, len(value) - 1), columns], ranked[-1] - 1)
    return f1[at, columns], (ranked[at, columns] + below) / 2


def f1_at(scores: np.ndarray, value: np.ndarray, threshold: float) -> float:
    """F1 of `scores` above a threshold."""
    on = scores > threshold
    return float(2 * (on & (value == 1)).sum() / max(1, on.sum() + value.sum()))


class Split(NamedTuple):
    """A concept's units with their scores: the fit and the test part."""

    fit: np.ndarray
    """[unit, column]"""
    fit_value: np.ndarray
    test: np.ndarray
    test_value: np.ndarray


def split(scores: np.ndarray, u: Units, value: np.ndarray) -> Split:
    """Rows to units (by their maximum) and to parts."""
    parts = []
    for rows in (u.fit, ~u.fit):
        first = np.flatnonzero(np.r_[True, u.unit[rows][1:] != u.unit[rows][:-1]])
        parts += [per_unit(scores[rows], u.unit[rows]), value[rows][first]]
    return Split(*parts)


def best_feature(s: Split) -> Found:
    """The feature that tells the concept best. First looks: F1 of firing at all, and difference of means."""
    on, y = s.fit > 0, s.fit_value == 1
    firing = 2 * on[y].sum(0) / np.maximum(1, on.sum(0) + y.sum())
    apart = s.fit[y].mean(0) - s.fit[~y].mean(0)
    columns = np.union1d(np.argsort(-firing)[:CANDIDATES], np.argsort(-apart)[:CANDIDATES])
    f1, thresholds = f1_by_threshold(s.fit[:, columns], s.fit_value)
    best = int(f1.argmax())
    column, threshold = int(columns[best]), float(thresholds[best])
    return Found(column, threshold, float(f1[best]), f1_at(s.test[:, column], s.test_value, threshold))


def best_of_k(s: Split, k: int) -> Found:
    """A linear probe on the `k` features with the largest standardised difference of means."""
    y = s.fit_value == 1
    apart = np.abs(s.fit[y].mean(0) - s.fit[~y].mean(0)) / (s.fit.std(0) + 1e-9)
    columns = np.argsort(-apart)[:k]
    return on_direction(Split(s.fit[:, columns], s.fit_value, s.test[:, columns], s.test_value))


def on_direction(s: Split) -> Found:
    """A linear probe on all columns."""
    direction = probe_direction(s.fit.astype(np.float64), s.fit_value)
    f1, thresholds = f1_by_threshold((s.fit @ direction)[:, None], s.fit_value)
    return Found(-1, float(thresholds[0]), float(f1[0]), f1_at(s.test @ direction, s.test_value, float(thresholds[0])))


@torch.no_grad()
def feature_matrix(sae: SAE, x: Tensor, batch: int = 8192) -> csr_matrix:
    """Features of rows, sparse. [row, d_sae]"""
    return vstack([csr_matrix(sae.encode(part.to(sae.b_dec.device)).cpu().numpy()) for part in x.split(batch)], format="csr")


def recover(
    lm: HookedLM,
    corpus: Corpus,
    units: Mapping[str, Units],
    suites: Mapping[str, Mapping[str, SAE]],
    k: int = 5,
    bar: Callable[[Iterable[str]], Iterable[str]] = lambda x: x,
) -> pd.DataFrame:
    """One row per concept and finder: concept, tier, finder, site, feature, fit, f1, k_fit, k_f1, null_fit, null_f1.

    suites: {finder: {hook name: SAE}}. Further finders: "probe" (linear, at the same sites) and "ngram". fit and f1 are of
    the best single feature on either part, k_ of a probe on `k` features, null_ of the best feature for permuted labels.
    """
    sites = list(dict.fromkeys(site for saes in suites.values() for site in saes))
    best: dict[tuple[str, str], dict[str, object]] = {}
    shuffled = {concept: permuted(u, seed=i) for i, (concept, u) in enumerate(units.items())}

    def keep(concept: str, finder: str, prefix: str, found: Found, site: str = "") -> None:
        """Keeps what is best on the fit part, over sites."""
        row = best.setdefault((concept, finder), {})
        if found.fit > float(row.get(f"{prefix}fit", -1.0)):  # type: ignore[arg-type]
            row |= {f"{prefix}fit": found.fit, f"{prefix}f1": found.f1}
            row |= {"site": site, "feature": found.column} if not prefix else {}

    for site in bar(sites):
        x = corpus_activations(lm, corpus, [site])[site]
        features = {name: feature_matrix(saes[site], x) for name, saes in suites.items() if site in saes}
        rows = x.numpy()
        for concept, u in units.items():
            keep(concept, "probe", "", on_direction(split(rows[u.rows], u, u.value)), site)
            for name, matrix in features.items():
                scores = matrix[u.rows].toarray()
                s = split(scores, u, u.value)
                keep(concept, name, "", best_feature(s), site)
                keep(concept, name, "k_", best_of_k(s, k))
                keep(concept, name, "null_", best_feature(split(scores, u, shuffled[concept])))
    for concept, u in units.items():
        gram = ngram_scores(corpus, u)
        s = split(gram, u, u.value)
        f1, thresholds = f1_by_threshold(s.fit, s.fit_value)
        threshold = float(thresholds[0])
        keep(concept, "ngram", "", Found(0, threshold, float(f1[0]), f1_at(s.test[:, 0], s.test_value, threshold)))
    return pd.DataFrame(
        [{"concept": concept, "tier": concept[0], "finder": finder, **row} for (concept, finder), row in best.items()]
    )


def summarise(found: pd.DataFrame, tiers: Iterable[str] = "cdef") -> pd.DataFrame:
    """One row per tier and finder: concepts counted, mean F1 (one feature, k features), and the share recovered.

    Left out are concepts that the n-gram gets at an F1 of `ENOUGH`. A concept is recovered where the test F1 of a single
    feature is at least `ENOUGH` of the probe's and above the 99th percentile of the finder's null over all concepts.
    """
    by = found.set_index(["finder", "concept"])
    easy = set(by.loc["ngram"].index[by.loc["ngram", "f1"] >= ENOUGH])
    rows = []
    for finder in [name for name in dict.fromkeys(found["finder"]) if name not in ("probe", "ngram")]:
        own = by.loc[finder]
        null = float(own["null_f1"].quantile(0.99))
        for tier in tiers:
            some = own[(own["tier"] == tier) & ~own.index.isin(easy)]
            if some.empty:
                continue
            ceiling = by.loc["probe"].loc[some.index, "f1"]
            recovered = (some["f1"] >= ENOUGH * ceiling) & (some["f1"] > null)
            rows.append(
                {"finder": finder, "tier": tier, "concepts": len(some), "f1": some["f1"].mean(), "k_f1": some["k_f1"].mean(),
                 "probe": ceiling.mean(), "null_p99": null, "recovered": recovered.mean()}
            )  # fmt: skip
    return pd.DataFrame(rows)

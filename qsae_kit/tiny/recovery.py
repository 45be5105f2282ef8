"""Concept recovery on the bundled model: which planted concepts an SAE's features tell, beside what
else tells them.

For every concept the feature, its threshold and its site are chosen on the fit part of the corpus
and scored on the test part, which has other wordings and other people (`tiny.concepts`). The same
search over permuted labels is the null, a linear probe the ceiling, the last two tokens (an n-gram)
the floor. Baselines are SAEs too (`baselines`), so raw neurons, principal components and frozen
dictionaries go through the same lines.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csc_matrix, csr_matrix, vstack
from torch import Tensor

from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import ByVariant
from qsae_kit.tiny.concepts import (
    Corpus,
    Units,
    corpus_activations,
    ngram_scores,
    per_unit,
    permuted,
    probe_direction,
)

ENOUGH = 0.8
"""Share of the probe's F1 from which a concept counts as recovered; F1 of the n-gram from which it
is left out.
"""
PERMUTATIONS = 100
"""Of the labels, whose best features are the null."""


class Split(NamedTuple):
    """A concept's units (tokens, or answers by their maximum) with the features of each: the fit
    and the test part.
    """

    fit: csr_matrix
    """[unit, feature], not negative."""
    fit_value: np.ndarray
    """[unit, labelling]: 1 positive, 0 negative."""
    test: csr_matrix
    test_value: np.ndarray


class Found(NamedTuple):
    """The best feature for each labelling on the fit part, and what it scores on the test part.
    [labelling] each
    """

    column: np.ndarray
    threshold: np.ndarray
    fit: np.ndarray
    f1: np.ndarray


def pooled(matrix: csr_matrix, unit: np.ndarray) -> csr_matrix:
    """Maximum over the rows of each unit; rows of a unit follow one another. [unit, feature]"""
    new = np.r_[True, unit[1:] != unit[:-1]]
    if new.all():
        return matrix
    entries, columns = matrix.tocoo(), matrix.shape[1]
    cell = (new.cumsum() - 1)[entries.row].astype(np.int64) * columns + entries.col
    order = np.argsort(cell, kind="stable")
    cell = cell[order]
    first = np.flatnonzero(np.r_[True, cell[1:] != cell[:-1]][: len(cell)])
    largest = np.maximum.reduceat(entries.data[order], first) if len(first) else entries.data
    return csr_matrix(
        (largest, (cell[first] // columns, cell[first] % columns)), shape=(int(new.sum()), columns)
    )


def split(matrix: csr_matrix, u: Units, values: np.ndarray) -> Split:
    """Rows to units and to parts. values: [row, labelling]"""
    parts: list[object] = []
    for rows in (u.fit, ~u.fit):
        first = np.flatnonzero(np.r_[True, u.unit[rows][1:] != u.unit[rows][:-1]])
        parts += [pooled(matrix[np.flatnonzero(rows)], u.unit[rows]), values[rows][first]]
    return Split(*parts)  # type: ignore[arg-type]


def best_feature(s: Split, chunk: int = 20) -> Found:
    """For each labelling, the feature and threshold (above 0) with the best F1 on the fit part,
    among all features.

    Zeros never reach a threshold, so only the entries that fire are sorted, once for all
    labellings.
    """
    entries = s.fit.tocoo()
    order = np.lexsort((-entries.data, entries.col))
    rows, columns, values = entries.row[order], entries.col[order], entries.data[order]
    if not len(rows):
        none = np.zeros(s.fit_value.shape[1])
        return Found(none.astype(int), none, none, none)
    first = np.r_[True, columns[1:] != columns[:-1]]
    start = np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
    taken = np.arange(len(rows)) - start + 1
    # a threshold cannot part these
    tied = np.r_[(columns[1:] == columns[:-1]) & (values[1:] == values[:-1]), False]
    best, score = [], []
    for begin in range(0, s.fit_value.shape[1], chunk):
        labels = s.fit_value[:, begin : begin + chunk].astype(np.int32)
        running = np.vstack(
            [np.zeros((1, labels.shape[1]), np.int32), labels[rows].cumsum(axis=0, dtype=np.int32)]
        )
        hits = running[1:] - running[start]
        f1 = 2 * hits / (taken[:, None] + labels.sum(0)).astype(np.float32)
        f1[tied] = -1
        best.append(f1.argmax(axis=0))
        score.append(f1.max(axis=0))
    at, fit = np.concatenate(best), np.concatenate(score)
    below = np.where(np.r_[first[1:], True][at], 0.0, values[np.minimum(at + 1, len(values) - 1)])
    threshold = (values[at] + below) / 2
    on = csc_matrix(s.test)[:, columns[at]].toarray() > threshold
    return Found(columns[at], threshold, fit, f1_of(on, s.test_value))


def f1_of(on: np.ndarray, value: np.ndarray) -> np.ndarray:
    """F1 of what is on, per column. on, value: [unit, column]"""
    return 2 * (on & (value == 1)).sum(0) / np.maximum(1, on.sum(0) + value.sum(0))


def on_scores(
    fit: np.ndarray, fit_value: np.ndarray, test: np.ndarray, test_value: np.ndarray
) -> tuple[float, float]:
    """F1 on the fit and test part of one score per unit, at the threshold that is best on the fit
    part.
    """
    low = min(fit.min(), test.min()) - 1  # thresholds lie above 0
    s = Split(
        csr_matrix(fit[:, None] - low),
        fit_value[:, None],
        csr_matrix(test[:, None] - low),
        test_value[:, None],
    )
    found = best_feature(s)
    return float(found.fit[0]), float(found.f1[0])


def best_of_k(s: Split, k: int) -> tuple[float, float]:
    """F1 (fit, test) of a linear probe on the `k` features with the largest standardised difference
    of means.
    """
    y = s.fit_value[:, 0] == 1
    mean, square = np.asarray(s.fit.mean(0))[0], np.asarray(s.fit.multiply(s.fit).mean(0))[0]
    apart = np.asarray(s.fit[y].mean(0) - s.fit[~y].mean(0))[0]
    columns = np.argsort(-np.abs(apart) / (np.sqrt(np.maximum(0, square - mean**2)) + 1e-9))[:k]
    fit, test = (
        s.fit[:, columns].toarray().astype(np.float64),
        s.test[:, columns].toarray().astype(np.float64),
    )
    direction = probe_direction(fit, s.fit_value[:, 0]) if fit.any() else np.zeros(len(columns))
    return on_scores(fit @ direction, s.fit_value[:, 0], test @ direction, s.test_value[:, 0])


def probe(x: np.ndarray, u: Units) -> tuple[float, float]:
    """F1 (fit, test) of a linear probe on rows, units scored by their maximum. x: [row, d_model]

    The F1 on the fit part, by which the site is chosen, is of two probes on half of its owners
    each, scored on the other
    half: one on all of them tells its own rows perfectly at any site.
    """
    halves = u.owner % 2 == 0
    crossed = np.zeros(len(x))
    for half in (halves, ~halves):
        known = u.fit & half
        if len(set(u.value[known])) == 2:
            crossed[u.fit & ~half] = x[u.fit & ~half] @ probe_direction(x[known], u.value[known])
    score = x @ probe_direction(x[u.fit], u.value[u.fit])
    return _row_score(np.where(u.fit, crossed, score), u)[0], _row_score(score, u)[1]


def _row_score(score: np.ndarray, u: Units) -> tuple[float, float]:
    parts = []
    for rows in (u.fit, ~u.fit):
        first = np.flatnonzero(np.r_[True, u.unit[rows][1:] != u.unit[rows][:-1]])
        parts += [per_unit(score[rows][:, None], u.unit[rows])[:, 0], u.value[rows][first]]
    return on_scores(*parts)


@torch.no_grad()
def feature_matrix(sae: SAE, x: Tensor, batch: int = 8192) -> csr_matrix:
    """Features of rows, sparse. [row, d_sae]"""
    return vstack(
        [
            csr_matrix(sae.encode(part.to(sae.b_dec.device)).cpu().numpy())
            for part in x.split(batch)
        ],
        format="csr",
    )


@dataclass
class _Best:
    """What is best on the fit part, over sites."""

    site: str = ""
    feature: int = -1
    threshold: float = 0.0
    fit: float = -1.0
    f1: float = 0.0
    k_fit: float = -1.0
    k_f1: float = 0.0
    null_fit: np.ndarray = field(default_factory=lambda: np.full(PERMUTATIONS, -1.0))
    null_f1: np.ndarray = field(default_factory=lambda: np.zeros(PERMUTATIONS))
    sites: dict[str, tuple[int, float]] = field(default_factory=dict)
    """The best feature of every site, and its F1 on the fit part."""

    def one(
        self, site: str, fit: float, f1: float, feature: int = -1, threshold: float = 0.0
    ) -> None:
        self.sites[site] = feature, fit
        if fit > self.fit:
            self.site, self.fit, self.f1, self.feature, self.threshold = (
                site,
                fit,
                f1,
                feature,
                threshold,
            )

    def several(self, fit: float, f1: float) -> None:
        if fit > self.k_fit:
            self.k_fit, self.k_f1 = fit, f1

    def nothing(self, fit: np.ndarray, f1: np.ndarray) -> None:
        better = fit > self.null_fit
        self.null_fit[better], self.null_f1[better] = fit[better], f1[better]


def recover(
    lm: HookedLM,
    corpus: Corpus,
    units: Mapping[str, Units],
    suites: ByVariant,
    k: int = 5,
    bar: Callable[[Iterable[str]], Iterable[str]] = lambda x: x,
) -> pd.DataFrame:
    """One row per concept and finder: concept, tier, finder, site, feature, threshold, fit, f1,
    k_fit, k_f1, null_p99, sites.

    suites: {finder: {hook name: SAE}}. Further finders: "probe" (linear, at the same sites) and
    "ngram". fit and f1 are of the best single feature on either part, k_ of a probe on `k`
    features; null_p99 is the 99th percentile of the test F1 of the best feature for `PERMUTATIONS`
    permuted labellings; sites is JSON, {site: [best feature, its fit]}.
    """
    sites = list(dict.fromkeys(site for saes in suites.values() for site in saes))
    best: dict[tuple[str, str], _Best] = {}
    needed = np.unique(np.concatenate([u.rows for u in units.values()]))
    rows_of = {concept: np.searchsorted(needed, u.rows) for concept, u in units.items()}
    shuffled = [
        np.stack(
            [permuted(u, seed=1000 * i + draw) for draw in range(PERMUTATIONS)], axis=1
        ).astype(np.int8)
        for i, u in enumerate(units.values())
    ]
    acts = corpus_activations(lm, corpus._replace(where=corpus.where[needed]), sites)
    for site in bar(sites):
        x = acts.pop(site)
        features = {
            name: feature_matrix(saes[site], x) for name, saes in suites.items() if site in saes
        }
        rows = x.numpy()
        for (concept, u), null in zip(units.items(), shuffled, strict=True):
            at = rows_of[concept]
            best.setdefault((concept, "probe"), _Best()).one(
                site, *probe(rows[at].astype(np.float64), u)
            )
            for name, matrix in features.items():
                own = best.setdefault((concept, name), _Best())
                s = split(matrix[at], u, np.concatenate([u.value[:, None], null], axis=1))
                found = best_feature(s)
                own.one(
                    site,
                    float(found.fit[0]),
                    float(found.f1[0]),
                    int(found.column[0]),
                    float(found.threshold[0]),
                )
                own.nothing(found.fit[1:], found.f1[1:])
                own.several(*best_of_k(s, k))
    for concept, u in units.items():
        best[concept, "ngram"] = gram = _Best()
        gram.one("", *_row_score(ngram_scores(corpus, u)[:, 0], u))
    return pd.DataFrame([_row(concept, finder, b) for (concept, finder), b in best.items()])


def _row(concept: str, finder: str, b: _Best) -> dict[str, object]:
    row: dict[str, object] = {
        "concept": concept,
        "tier": concept[0],
        "finder": finder,
        "site": b.site,
        "fit": b.fit,
        "f1": b.f1,
    }
    if b.feature >= 0:
        row |= {"feature": b.feature, "threshold": b.threshold, "k_fit": b.k_fit, "k_f1": b.k_f1}
        row |= {"null_p99": float(np.quantile(b.null_f1, 0.99)), "sites": json.dumps(b.sites)}
    return row


def judge(found: pd.DataFrame) -> pd.DataFrame:
    """Per finder and concept: f1, k_f1, probe (the ceiling's F1), null_p99, easy (the n-gram gets
    it) and recovered.

    Recovered: the test F1 of a single feature is at least `ENOUGH` of the probe's and above the
        null.
    """
    f1 = found.pivot(index="concept", columns="finder", values="f1")
    own = found[~found["finder"].isin(["probe", "ngram"])].copy()
    own["probe"], own["ngram"] = own["concept"].map(f1["probe"]), own["concept"].map(f1["ngram"])
    own["easy"] = own["ngram"] >= ENOUGH
    own["recovered"] = (own["f1"] >= ENOUGH * own["probe"]) & (own["f1"] > own["null_p99"])
    return own


def concept_labels(found: pd.DataFrame) -> pd.DataFrame:
    """Labels of features by the planted concepts that they tell by themselves, best told first:
    variant, site, feature, label (for `features.index.FeatureIndex.label_all`).

    found: the table of `recover`, such as concepts.csv of `qsae eval --concepts`. Only concepts
    that count as recovered, at the site where they are told best, are named, with the F1 on
    dialogues that the choice did not see.
    """
    told = judge(found)
    best = told[told["recovered"]].sort_values("f1", ascending=False)
    label = [
        f"planted: {concept} (F1 {f1:.2f})"
        for concept, f1 in zip(best["concept"], best["f1"], strict=True)
    ]
    columns = {"variant": best["finder"], "site": best["site"], "feature": best["feature"]}
    return pd.DataFrame(columns | {"label": label})


def summarise(found: pd.DataFrame, tiers: Iterable[str] = "cdef") -> pd.DataFrame:
    """One row per finder and tier, and one for all tiers together: concepts counted, mean F1 (one
    feature, k features, the probe), and the share recovered. Concepts that the n-gram gets at an F1
    of `ENOUGH` are left out.
    """
    own = judge(found)
    own = own[own["tier"].isin(list(tiers)) & ~own["easy"]]
    rows = []
    for finder, mine in own.groupby("finder", sort=False):
        for tier, some in [*mine.groupby("tier"), ("all", mine)]:
            means = some[["f1", "k_f1", "probe", "null_p99", "recovered"]].mean()
            rows.append({"finder": finder, "tier": tier, "concepts": len(some)} | means.to_dict())
    return pd.DataFrame(rows)

"""Concept recovery: searches find what is planted, nothing in noise, and never look at the test
part.
"""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.tiny import concepts
from qsae_kit.tiny.concepts import Units
from qsae_kit.tiny.recovery import (
    Split,
    best_feature,
    best_of_k,
    f1_of,
    judge,
    pooled,
    probe,
    recover,
    split,
    summarise,
)


def whole(scores, values):
    """A split whose test part is its fit part."""
    matrix = csr_matrix(scores)
    return Split(matrix, values, matrix, values)


def test_the_best_threshold_by_hand():
    scores = np.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    found = best_feature(whole(scores, np.array([[1, 0], [0, 0], [1, 0], [0, 1]])))
    assert found.column.tolist() == [0, 1]
    assert found.fit.tolist() == pytest.approx([0.8, 1.0])  # above 0.5: two hits, one miss
    assert found.threshold.tolist() == pytest.approx([0.5, 2.5])
    assert found.f1.tolist() == pytest.approx([0.8, 1.0])


def test_all_features_and_thresholds_against_a_search():
    rng = np.random.default_rng(0)
    scores = np.maximum(0, np.round(rng.normal(size=(60, 7)), 1))  # with ties
    values = rng.integers(0, 2, (60, 45))
    found = best_feature(whole(scores, values))
    for i in range(45):
        searched = {
            (column, cut): f1_of(scores[:, [column]] > cut, values[:, [i]])[0]
            for column in range(7)
            for cut in [0.0, *np.unique(scores[:, column])]
        }
        assert found.fit[i] == pytest.approx(max(searched.values()))
        assert found.f1[i] == pytest.approx(found.fit[i])


def test_features_that_never_fire():
    found = best_feature(whole(np.zeros((5, 3)), np.ones((5, 2), int)))
    assert found.f1.tolist() == [0, 0]
    y = np.array([[1], [0], [1], [0]])
    # says yes always
    assert best_of_k(Split(csr_matrix((4, 3)), y, csr_matrix((4, 3)), y), 2) == pytest.approx(
        (2 / 3, 2 / 3)
    )


def noise(n=800, columns=60, seed=0):
    rng = np.random.default_rng(seed)
    value = rng.integers(0, 2, n)
    return np.maximum(0, rng.normal(size=(n, columns)) - 1), value, rng.random(n) < 0.6


def as_split(scores, value, fit):
    each = np.arange(len(value))
    return split(csr_matrix(scores), Units(each, each, value, fit, each), value[:, None])


def test_a_planted_feature_is_found_and_noise_is_not():
    scores, value, fit = noise()
    assert best_feature(as_split(scores, value, fit)).f1[0] < 0.75
    scores[:, 17] += 2 * value
    found = best_feature(as_split(scores, value, fit))
    assert found.column[0] == 17
    assert found.f1[0] > 0.85
    assert best_of_k(as_split(scores, value, fit), 5)[1] > 0.85
    each = np.arange(len(value))
    assert probe(scores, Units(each, each, value, fit, each))[1] > 0.85


def test_the_test_part_never_decides():
    scores, value, fit = noise()
    scores[~fit, 3] = value[~fit] * 9
    s = as_split(scores, value, fit)
    found, blind = best_feature(s), best_feature(s._replace(test=csr_matrix(s.test.shape)))
    assert (found.column, found.threshold, found.fit) == (blind.column, blind.threshold, blind.fit)
    assert found.column[0] != 3 or found.fit[0] < 0.8


def test_units_are_scored_by_their_maximum():
    unit = np.array([0, 0, 1, 2, 3])
    u = Units(
        np.arange(5),
        unit,
        np.array([1, 1, 0, 1, 0]),
        np.array([True, True, True, False, False]),
        unit,
    )
    s = split(csr_matrix(np.array([[1.0], [4.0], [2.0], [3.0], [0.0]])), u, u.value[:, None])
    assert s.fit.toarray()[:, 0].tolist() == [4.0, 2.0]
    assert s.fit_value[:, 0].tolist() == [1, 0]
    assert s.test.toarray()[:, 0].tolist() == [3.0, 0.0]


def test_pooling_by_hand():
    rng = np.random.default_rng(0)
    unit, x = np.sort(rng.integers(0, 40, 300)), np.maximum(0, rng.normal(size=(300, 6)))
    wanted = np.stack([x[unit == u].max(0) for u in np.unique(unit)])
    np.testing.assert_array_equal(pooled(csr_matrix(x), unit).toarray(), wanted)
    assert pooled(csr_matrix((4, 3)), np.array([0, 0, 1, 1])).shape == (2, 3)  # nothing fires


def test_recovery_on_the_bundled_model(lm):
    corpus = concepts.build_corpus(lm, 700, seed=5)
    units = {
        name: u
        for name, u in concepts.concept_units(corpus).items()
        if name in ("f/refuse=yes", "f/answer_language=es", "a/language=zh")
    }
    site = "blocks.4.hook_resid_post"
    sae = TopKSAE(lm.d_model, 2 * lm.d_model, 16.0, Provenance("tiny", site, NormFilter(1e3)))
    x = concepts.corpus_activations(lm, corpus, [site])[site]
    sae.init_from_rows(x - x.mean(0), torch.Generator().manual_seed(0))
    table = recover(lm, corpus, units, {"untrained": {site: sae.requires_grad_(False)}})
    by = table.set_index(["concept", "finder"])
    assert set(table["finder"]) == {"probe", "untrained", "ngram"}
    assert by.loc[("a/language=zh", "probe"), "f1"] > 0.85
    assert (by["f1"].dropna() <= 1).all()
    for concept in units:
        own = by.loc[(concept, "untrained")]
        assert 0 <= own["null_p99"] < 0.9
        assert own["site"] == site
    told = judge(table).set_index("concept")
    assert told.loc["a/language=zh", "ngram"] > 0.8  # so it does not count
    assert told.loc["a/language=zh", "easy"]
    summary = summarise(table, tiers="f")
    assert summary["tier"].tolist() == ["f", "all"]
    assert summary["concepts"].nunique() == 1
    assert summary["recovered"].between(0, 1).all()

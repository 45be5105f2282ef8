"""Concept recovery: searches find what is planted, nothing in noise, and never look at the test part."""

import numpy as np
import pytest
import torch

from qsae_kit.activations import NormFilter
from qsae_kit.recovery import Split, best_feature, best_of_k, f1_at, f1_by_threshold, on_direction, recover, split, summarise
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.tiny import concepts
from qsae_kit.tiny.concepts import Units


def test_the_best_threshold_by_hand():
    scores = np.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    value = np.array([1, 0, 1, 0])
    f1, thresholds = f1_by_threshold(scores, value)
    assert f1[0] == pytest.approx(0.8)  # above 0.5: two hits, one miss
    assert thresholds[0] == pytest.approx(0.5)
    assert f1[1] == pytest.approx(2 / 3)  # everything: nothing else parts the ties
    for column in (0, 1):
        assert f1_at(scores[:, column], value, thresholds[column]) == pytest.approx(f1[column])


def test_thresholds_against_a_search():
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(60, 5)), 1)
    value = rng.integers(0, 2, 60)
    f1, _ = f1_by_threshold(scores, value)
    for column in range(5):
        cuts = [-9.0, *np.unique(scores[:, column])]
        assert f1[column] == pytest.approx(max(f1_at(scores[:, column], value, cut) for cut in cuts))


def noise(n=800, columns=60, seed=0):
    rng = np.random.default_rng(seed)
    value = rng.integers(0, 2, n)
    return np.maximum(0, rng.normal(size=(n, columns)) - 1), value, rng.random(n) < 0.6


def as_split(scores, value, fit):
    u = Units(np.arange(len(value)), np.arange(len(value)), value, fit)
    return split(scores, u, value)


def test_a_planted_feature_is_found_and_noise_is_not():
    scores, value, fit = noise()
    found = best_feature(as_split(scores, value, fit))
    assert found.f1 < 0.75
    scores[:, 17] += 2 * value
    found = best_feature(as_split(scores, value, fit))
    assert found.column == 17
    assert found.f1 > 0.85
    assert best_of_k(as_split(scores, value, fit), 5).f1 > 0.85
    assert on_direction(as_split(scores, value, fit)).f1 > 0.85


def test_the_test_part_never_decides():
    scores, value, fit = noise()
    scores[~fit, 3] = value[~fit] * 9
    s = as_split(scores, value, fit)
    found = best_feature(s)
    assert found == best_feature(s._replace(test=np.zeros_like(s.test)))._replace(f1=found.f1)
    assert found.column != 3 or found.fit < 0.8


def test_units_are_scored_by_their_maximum():
    u = Units(np.arange(5), np.array([0, 0, 1, 2, 3]), np.array([1, 1, 0, 1, 0]), np.array([True, True, True, False, False]))
    s = split(np.array([[1.0], [4.0], [2.0], [3.0], [0.0]]), u, u.value)
    assert s.fit[:, 0].tolist() == [4.0, 2.0]
    assert s.fit_value.tolist() == [1, 0]
    assert s.test[:, 0].tolist() == [3.0, 0.0]
    assert isinstance(s, Split)


def test_recovery_on_the_bundled_model(lm):
    corpus = concepts.build_corpus(lm, 700, seed=5)
    units = {
        name: u for name, u in concepts.concept_units(corpus).items()
        if name in ("f/refuse=yes", "f/answer_language=es", "a/language=zh")
    }  # fmt: skip
    site = "blocks.4.hook_resid_post"
    sae = TopKSAE(lm.d_model, 2 * lm.d_model, 16.0, Provenance("tiny", site, NormFilter(1e3)))
    x = concepts.corpus_activations(lm, corpus, [site])[site]
    sae.init_from_rows(x - x.mean(0), torch.Generator().manual_seed(0))
    table = recover(lm, corpus, units, {"untrained": {site: sae.requires_grad_(False)}})
    by = table.set_index(["concept", "finder"])
    assert set(table["finder"]) == {"probe", "untrained", "ngram"}
    assert by.loc[("a/language=zh", "probe"), "f1"] > 0.95
    assert (by["f1"].dropna() <= 1).all()
    for concept in units:
        own = by.loc[(concept, "untrained")]
        assert 0 <= own["null_f1"] <= own["null_fit"] <= 1
        assert own["site"] == site
    summary = summarise(table, tiers="f")
    assert summary["finder"].tolist() == ["untrained"]
    assert 0 <= summary["recovered"].item() <= 1

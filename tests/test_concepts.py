"""The scoring kit: labels sit where they belong, and the scores are what they say."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from qsae_kit.tiny import concepts
from qsae_kit.tiny.concepts import Units
from qsae_kit.world import lexicon, world


@pytest.fixture(scope="module")
def corpus(lm):
    return concepts.build_corpus(lm, 1200, seed=5)


def test_labels_sit_on_the_words_they_belong_to(lm):
    for dialogue in concepts.scoring_dialogues(150, seed=3):
        labelled = concepts.label_tokens(lm, dialogue)
        texts = [lm.to_string([i]) for i in labelled.ids]
        for span in dialogue.spans:
            word = dialogue.messages[span.message][span.field][span.start : span.end]
            for label in span.labels:
                if label.startswith("c/") and not concepts._translated(label, word):
                    marked = [
                        t for t, own in zip(texts, labelled.labels, strict=True) if label in own
                    ]
                    assert any(
                        word.endswith(t.strip()) or t.strip().endswith(word) for t in marked
                    ), (label, word, marked)
        answer = lm.to_string([i for i, a in zip(labelled.ids, labelled.answer, strict=True) if a])
        assert answer.strip() == dialogue.messages[-1]["content"].strip()


def test_unstated_attributes_are_not_stated():
    """No message labels a person with an attribute that any turn of the dialogue asks for or
    decides by.
    """
    labelled = 0
    for dialogue in world.dialogues(4000, seed=11):
        asked: dict[str, set[str]] = {}
        for request in dialogue.requests:
            about = {"loan": {"debt", "city"}}.get(request.attribute, {request.attribute})
            asked.setdefault(request.name, set()).update(
                set(lexicon.ATTRIBUTES) if request.intent == "profile" else about
            )
        for span in dialogue.spans:
            if any(label.startswith("d/") for label in span.labels):
                name = dialogue.requests[
                    (span.message - bool(dialogue.requests[0].system)) // 2
                ].name
                own = {
                    label.removeprefix("d/").partition("=")[0]
                    for label in span.labels
                    if label.startswith("d/")
                }
                assert not own & asked[name]
                labelled += 1
    assert labelled > 1000


def test_recalled_attributes_are_not_stated_yet(lm):
    seen = set()
    for dialogue in concepts.scoring_dialogues(600, seed=8):
        labelled = concepts.label_tokens(lm, dialogue)
        for t, own in enumerate(labelled.labels):
            for label in own:
                if label.startswith("d/"):
                    attribute, value = label.removeprefix("d/").split("=")
                    truth = world.record_of(dialogue.last.name, attribute)
                    assert truth.en == value or (attribute == "code" and truth.en[0] == value)
                    before = lm.to_string(labelled.ids[: t + 1])
                    said = before.rpartition(dialogue.messages[-2]["content"])[2]
                    assert truth(dialogue.last.answer_language) not in said.replace(
                        dialogue.last.name, ""
                    )
                    seen.add(attribute)
    assert seen >= {*world.PUBLIC, "debt"}


def test_computed_values_are_not_read_off_the_reasoning(lm):
    for dialogue in concepts.scoring_dialogues(400, seed=4):
        labels = [
            x
            for own in concepts.label_tokens(lm, dialogue).labels
            for x in own
            if x.startswith("e/")
        ]
        assert not (labels and "reasoning_content" in dialogue.messages[-1])
        if dialogue.last.intent == "sum" and "reasoning_content" not in dialogue.messages[-1]:
            labelled = concepts.label_tokens(lm, dialogue)
            [at] = [
                t
                for t, own in enumerate(labelled.labels)
                if any(x.startswith("e/carry") for x in own)
            ]
            assert lm.to_string([labelled.ids[at + 1]]) == dialogue.last.value.removeprefix("= ")[0]


def test_senses_are_of_one_surface(lm):
    for dialogue in concepts.scoring_dialogues(1500, seed=6):
        labelled = concepts.label_tokens(lm, dialogue)
        for span in dialogue.spans:
            word = dialogue.messages[span.message][span.field][span.start : span.end]
            for label in span.labels:
                surface = label.removeprefix("c/").partition("=")[0]
                if label.startswith("c/") and surface in lexicon.FIRST_NAMES and word != surface:
                    assert not any(
                        label in own and surface not in dialogue.messages[span.message][span.field]
                        for own in labelled.labels
                    )


def test_parts_share_neither_family_nor_person():
    seen: dict[str, set[str]] = {"fit": set(), "test": set()}
    for dialogue in concepts.scoring_dialogues(1500, seed=1):
        part = concepts.part_of(dialogue)
        if part:
            seen[part] |= {dialogue.last.template, dialogue.last.name} - {""}
    assert len(seen["fit"]) > 100
    assert len(seen["test"]) > 50
    assert not seen["fit"] & seen["test"]


def units_of(value, fit, unit=None):
    value, fit = np.array(value), np.array(fit)
    unit = np.arange(len(value)) if unit is None else np.array(unit)
    return Units(np.arange(len(value)), unit, value, fit, unit)


def test_auroc_is_mann_whitney():
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(300, 4)), 1)  # with ties
    value = rng.integers(0, 2, 300)
    expected = [
        mannwhitneyu(c[value == 1], c[value == 0]).statistic / (value.sum() * (300 - value.sum()))
        for c in scores.T
    ]
    np.testing.assert_allclose(concepts.auroc(scores, value), expected)


def test_a_dialogue_counts_by_its_maximum():
    u = units_of([1, 1, 0, 0, 0], [True] * 5, [0, 0, 1, 1, 2])
    scores = np.array([[0.0], [5.0], [4.0], [1.0], [2.0]])
    assert concepts.unit_auroc(scores, u, u.fit)[0] == 1.0
    assert concepts.per_unit(scores, u.unit)[:, 0].tolist() == [5.0, 4.0, 2.0]


def test_searches_find_a_planted_direction_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    value = rng.integers(0, 2, 2000)
    u = units_of(value, rng.random(2000) < 0.6)
    noise = rng.normal(size=(2000, 30))
    planted = noise.copy()
    planted[:, 7] -= 3 * value
    found = concepts.best_column(planted, u)
    assert (found.column, found.sign) == (7, -1)
    assert found.test > 0.95
    # the search overfits on the fit part only
    assert abs(concepts.best_column(noise, u).test - 0.5) < 0.07
    assert abs(concepts.best_column(planted, u, concepts.permuted(u, 0)).test - 0.5) < 0.1
    spread = noise + value[:, None] * rng.normal(size=30)
    direction = concepts.probe_direction(spread[u.fit], value[u.fit])
    assert concepts.unit_auroc((spread @ direction)[~u.fit, None], u, ~u.fit)[0] > 0.97
    assert concepts.best_column(spread, u).test < 0.97


def test_permuting_keeps_counts_and_units():
    u = units_of([1, 1, 0, 0, 1, 0], [True, True, True, True, False, False], [0, 0, 1, 1, 2, 3])
    shuffled = concepts.permuted(u, 3)
    assert shuffled[u.fit].sum() == 2
    assert shuffled[~u.fit].sum() == 1
    assert shuffled[0] == shuffled[1]
    assert shuffled[2] == shuffled[3]


def test_the_null_permutes_whole_people():
    u = units_of([1, 1, 0, 0, 1, 1, 0, 0], [True] * 8)
    u.owner = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    for seed in range(20):
        shuffled = concepts.permuted(u, seed).reshape(4, 2)
        assert (shuffled[:, 0] == shuffled[:, 1]).all()
        assert shuffled.sum() == 4


def test_the_first_look_keeps_what_tells_the_classes_apart():
    rng = np.random.default_rng(0)
    value = rng.integers(0, 2, 500)
    x = rng.normal(size=(500, 400))
    x[:, 333] += 2 * value
    u = units_of(value, [True] * 300 + [False] * 200)
    assert 333 in concepts.promising(x, u, value)
    assert concepts.best_column(x, u).column == 333


def test_an_ngram_knows_tokens_and_not_attributes(lm, corpus):
    units = concepts.concept_units(corpus, min_positives=8)
    token = next(u for name, u in units.items() if name.startswith("a/token"))
    scores = concepts.ngram_scores(corpus, token)
    assert concepts.unit_auroc(scores[~token.fit], token, ~token.fit)[0] > 0.99
    attributes = [u for name, u in units.items() if name.startswith("d/")]
    reached = [
        concepts.unit_auroc(concepts.ngram_scores(corpus, u)[~u.fit], u, ~u.fit)[0]
        for u in attributes
    ]
    assert abs(np.mean(reached) - 0.5) < 0.15


def test_negatives_are_of_the_same_group(corpus):
    units = concepts.concept_units(corpus)
    for name, u in units.items():
        group, _, value = name.partition("=")
        if name[0] in "cde":
            for row, positive in list(zip(u.rows.tolist(), u.value.tolist(), strict=True))[:50]:
                sequence, position = corpus.where[row]
                labels = [
                    x
                    for x in corpus.sequences[sequence].labels[position]
                    if x.startswith(f"{group}=")
                ]
                assert labels
                assert (f"{group}={value}" in labels) == bool(positive)


def test_the_frozen_concepts_are_those_of_the_corpus(lm):
    frozen = concepts.frozen_concepts()
    assert len(frozen["concepts"]) > 150
    assert {c[0] for c in frozen["concepts"]} == set(concepts.TIERS)
    corpus = concepts.build_corpus(lm, frozen["n"], frozen["seed"])
    assert corpus.digest == frozen["digest"]
    assert sorted(concepts.concept_units(corpus)) == frozen["concepts"]


def test_scores_of_a_few_concepts(lm, corpus):
    units = concepts.concept_units(corpus)
    some = {
        name: units[name]
        for name in list(units)
        if name.startswith(("a/language", "f/answer_language"))
    }
    acts = concepts.corpus_activations(
        lm, corpus, ["blocks.1.hook_resid_post", "blocks.4.hook_resid_post"]
    )
    extra = {
        "random": {site: x @ torch.ones(x.shape[1], 3) for site, x in acts.items()},
        "neuron": concepts.corpus_neurons(lm, corpus),
    }
    scores = concepts.score_concepts(corpus, some, acts, extra)
    assert (scores["probe"] > 0.9).all()
    assert (scores["coordinate_null"] < 0.75).all()
    finders = {
        f"{name}{end}"
        for name in ("coordinate", "pca", "neuron", "random")
        for end in ("", "_null")
    }
    assert (
        set(scores.columns)
        == {"concept", "tier", "positives", "probe", "probe_site", "bigram"} | finders
    )
    tiers = concepts.tier_table(scores)
    assert tiers["tier"].tolist() == ["a", "f"]

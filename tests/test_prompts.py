"""The package's own prompts: how many, of what form, and no two alike."""

import re
from collections import Counter
from itertools import combinations
from statistics import mean

import pytest

from qsae_kit.data.companions import GENERAL
from qsae_kit.data.prompts import (
    KINDS,
    LANGUAGES,
    SPLITS,
    count,
    general_prompts,
    stored_prompts,
)

COUNTS = {
    ("harmful", "selection"): 200,
    ("harmful", "evaluation"): 220,
    ("harmless", "selection"): 240,
    ("harmless", "evaluation"): 220,
    ("borderline", "selection"): 100,
    ("borderline", "evaluation"): 120,
}
ALIKE = 0.5
"""Words that two prompts share, of all words in either."""


def english():
    return [prompt for prompt in stored_prompts() if prompt.language == "en"]


def test_how_many_there_are():
    assert {(kind, split): count(kind, split) for kind in KINDS for split in SPLITS} == COUNTS
    for language in ("zh", "es"):
        assert {(k, s): count(k, s, language) for k, s in COUNTS} == {
            (k, s): 0 if k == "borderline" else 10 for k, s in COUNTS
        }


def test_every_entry_is_well_formed():
    for prompt in stored_prompts():
        assert prompt.kind in KINDS
        assert prompt.split in SPLITS
        assert prompt.language in LANGUAGES
        assert prompt.text == prompt.text.strip()
        assert "\n" not in prompt.text
        assert 5 < len(prompt.text) < 160
        assert prompt.label in (("answer", "unclear") if prompt.kind == "borderline" else ("",))
    labels = Counter(prompt.label for prompt in english())
    assert labels["answer"] > 5 * labels["unclear"] > 0


def test_no_two_are_alike_within_a_set_or_across():
    texts = [prompt.text for prompt in english()]
    words = [frozenset(re.findall(r"\w+", text.lower())) for text in texts]
    alike = [
        (texts[i], texts[j])
        for i, j in combinations(range(len(words)), 2)
        if len(words[i] & words[j]) > ALIKE * len(words[i] | words[j])
    ]
    assert alike == []
    texts = [prompt.text for prompt in stored_prompts()]
    assert len(texts) == len(set(texts))


def test_categories_are_equally_large_in_both_splits():
    for kind, categories in (("harmful", 10), ("harmless", 12), ("borderline", 10)):
        for split in SPLITS:
            sizes = Counter(p.category for p in english() if (p.kind, p.split) == (kind, split))
            assert len(sizes) == categories
            assert max(sizes.values()) - min(sizes.values()) <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_form_does_not_tell_harmful_from_harmless(split):
    first, length = {}, {}
    for kind in ("harmful", "harmless"):
        texts = [p.text for p in general_prompts(kind, count(kind, split), split)]
        words = [text.split() for text in texts]
        first[kind] = Counter(each[0] for each in words)
        length[kind] = mean(map(len, words))
        assert first[kind].most_common(1)[0][1] < len(texts) / 8
    usual = {word for word, n in first["harmful"].items() if n >= 8}
    assert len(usual) > 5
    assert all(first["harmless"][word] >= 2 for word in usual)
    assert abs(length["harmful"] - length["harmless"]) < 4


def test_prompts_are_drawn_by_seed_and_language():
    drawn = general_prompts("harmful", 30, "evaluation", seed=1)
    assert len({p.text for p in drawn}) == 30
    assert drawn == general_prompts("harmful", 30, "evaluation", seed=1)
    assert drawn != general_prompts("harmful", 30, "evaluation", seed=2)
    assert {p.template for p in drawn} <= {p.category for p in stored_prompts()}
    chinese = general_prompts("harmful", 10, "selection", language="zh")
    assert all(re.search("[\u4e00-\u9fff]{4}", p.text) for p in chinese)
    with pytest.raises(
        ValueError, match="0 borderline selection prompts in 'es', 1 were asked for"
    ):
        general_prompts("borderline", 1, "selection", language="es")
    with pytest.raises(ValueError, match="in en, zh, es; 'fr' was asked for"):
        count("harmful", language="fr")


def test_a_model_is_measured_on_all_evaluation_prompts_of_every_language():
    measured = GENERAL.measured_on()
    assert len(measured) == 220 + 220 + 120 + 4 * 10
    for kind in KINDS:
        for language in LANGUAGES:
            n = count(kind, "evaluation", language)
            found = general_prompts(kind, n, "evaluation", language=language)
            assert {p.text for p in found} <= set(measured)
            n = count(kind, "selection", language)
            found = general_prompts(kind, n, "selection", language=language)
            assert not {p.text for p in found} & set(measured)

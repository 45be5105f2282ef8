"""A study's finding in plain sentences, and text that is not seen as it is."""

import re
from typing import Any

import pytest
from markupsafe import Markup

from qsae_kit.cli.outputs import wrapped
from qsae_kit.figures.pages import SCRIPT, UNSEEN, part, template, visible
from qsae_kit.steer.study.words import in_words

HEADLINE: dict[str, Any] = {
    "goal": "suppress",
    "behaviour": "refusal",
    "target": "harmful",
    "others": ["harmless", "borderline"],
    "n": 200,
    "features": [497, 110, 722, 339],
    "before": 0.95,
    "after": 0.24,
    "broken": 0.0,
    "broken_before": 0.0,
    "elsewhere": {"harmless": 0.0, "borderline": 0.0},
    "elsewhere_before": {"harmless": 0.0, "borderline": 0.0},
    "facts_lost": 1 / 6,
    "reached": {"features": 0.76, "difference_of_means_best": 0.78},
    "difference_of_means_best": {"refusal_rate": 0.22, "broken_rate": 0.0},
    "priced_on": "harmless",
    "kl_first_priced": {"features": 0.1, "difference_of_means_best": 0.1},
    "n_random": 20,
    "worst_random": 0.72,
    "apart_from_random": [0.4, 0.3, 0.5],
}


def test_a_finding_is_one_plain_sentence_and_its_price() -> None:
    assert in_words(HEADLINE) == (
        "Four features cut refusals of harmful prompts: 95 % -> 24 % of 200 (the strongest of 20"
        " searches among random features goes less far than that, to 72 %); a plain difference of"
        " means does as well (22 %), at about the same price on harmless prompts. One fact in 6 is"
        " lost, refusals of harmless and borderline prompts stay as they were."
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"features": [3]}, "One feature cuts refusals"),
        ({"after": 0.94}, "Four features do not cut refusals"),
        ({"after": 0.99}, "Four features do not cut refusals"),
        ({"features": [3], "after": 0.95}, "One feature does not cut refusals"),
        ({"goal": "induce", "before": 0.0, "after": 0.9}, "Four features raise refusals"),
        ({"behaviour": "greeting"}, "cut answers that show 'greeting' of harmful prompts"),
        ({"apart_from_random": [0.0, -0.1, 0.1]}, "goes as far as that"),
        ({"apart_from_random": None}, "of 200; a plain"),
        ({"facts_lost": 0.0}, "No facts are lost, "),
        ({"facts_lost": 0.4}, "40 % of facts are lost"),
        ({"facts_lost": float("nan")}, "prompts. Refusals of harmless"),
        ({"facts_lost": float("nan"), "others": []}, "on harmless prompts."),
        ({"broken": 0.1}, "lost, broken answers 0 % -> 10 %, refusals of harmless"),
        ({"broken": 0.1, "broken_before": 0.1}, "One fact in 6 is lost, refusals of"),
        ({"apart_from_random": [-0.4, -0.5, -0.3]}, "goes farther than that"),
        ({"n_random": 1}, "(a search among random features goes"),
        (
            {"difference_of_means_best": {"refusal_rate": 0.05, "broken_rate": 0.3}},
            "does as well (5 %, 30 % broken)",
        ),
        (
            {"kl_first_priced": {"features": 0.001, "difference_of_means_best": 0.2}},
            "at 200 times the price",
        ),
        ({"elsewhere": {"harmless": 0.2, "borderline": 0.0}}, "of harmless prompts 0 % -> 20 %"),
        ({"reached": {"features": 0.76, "difference_of_means_best": 0.9}}, "means does more"),
        ({"reached": {"features": 0.76, "difference_of_means_best": 0.5}}, "means does less"),
        (
            {"kl_first_priced": {"features": 0.025, "difference_of_means_best": 0.2}},
            "at 8 times the price on harmless prompts",
        ),
        (
            {"kl_first_priced": {"features": 0.2, "difference_of_means_best": 0.1}},
            "at 0.5 times the price on harmless prompts",
        ),
        ({"others": []}, "One fact in 6 is lost."),
    ],
)
def test_each_finding_has_its_words(changes: dict[str, Any], told: str) -> None:
    assert told in in_words(HEADLINE | changes)


def test_what_is_not_seen_or_turns_the_writing_has_a_sign(tmp_path):
    (tmp_path / "a.html").write_text("{{ text }}|{{ safe }}")
    text = "a\u202eb\n\tc\u200b<\x1b[31m\x07"
    page = template(tmp_path / "a.html").render(text=text, safe=Markup("<b>\u202e</b>"))
    assert page == (
        "a\u27e8202e\u27e9b\n\tc\u27e8200b\u27e9&lt;\u27e8001b\u27e9[31m\u27e80007\u27e9|<b>\u202e</b>"
    )
    assert visible("a\n\tb\u202e") == "a\u23ce\u21e5b\u27e8202e\u27e9"
    signs = re.search(r"text\.replace\(/(\[.*?\])/g", part(SCRIPT))
    assert signs
    assert signs[1] == UNSEEN.pattern  # one table in both languages
    assert wrapped(f"{text}\r 9 %") == (
        "a\u27e8202e\u27e9b \u21e5c\u27e8200b\u27e9<\u27e8001b\u27e9[31m\u27e80007\u27e9\u240d 9 %"
    )

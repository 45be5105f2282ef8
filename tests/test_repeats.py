"""Drawn answers under several seeds, with thinking and without."""

import math

import pandas as pd
import pytest
from small import small_suite

from qsae_kit.lm.answering import Asked, answer_all, answer_groups
from qsae_kit.steer.behaviours import tiny_study
from qsae_kit.steer.changes import Change, Steering
from qsae_kit.steer.repeats import SAMPLING, answered_again, over_seeds

MADE = tiny_study("refusal", 2, 6)
STEERED = Steering(
    (Change("add", "blocks.3.hook_resid_post", "v", (3, 5), strength=1.2, positions="header"),)
)


def again(lm, seeds, thinking, folder=None):
    return answered_again(
        lm,
        MADE.behaviour,
        MADE.evaluation,
        {"features": STEERED},
        small_suite(lm),
        seeds,
        96,
        thinking,
        folder,
    )


def test_seeds_give_rows_of_their_own_and_the_same_digits_again(lm, tmp_path):
    table = again(lm, [0, 1], True, tmp_path)
    assert len(table) == 2 * 2 * 3
    assert list(table.columns[:3]) == ["seed", "intervention", "prompt_kind"]
    assert (table.loc[table["intervention"] == "none", "thought"] > 0.8).all()
    assert table["broken_rate"].between(0, 1).all()
    assert (table["deflected_rate"] == 0).all()
    pd.testing.assert_frame_equal(again(lm, [0, 1], True), table)
    lines = (tmp_path / "seeds.jsonl").read_text().splitlines()
    (tmp_path / "seeds.jsonl").write_text("\n".join(lines[:6]) + "\n" + lines[6][:20])  # cut off
    pd.testing.assert_frame_equal(again(lm, [0, 1], True, tmp_path), table)
    assert (again(lm, [0], False)["thought"] == 0).all()
    with pytest.raises(ValueError, match="each once"):
        again(lm, [1, 1], None)


def test_a_prompts_draws_depend_on_seed_and_place_alone(lm):
    texts = MADE.evaluation["harmless"] + MADE.evaluation["harmful"]

    def drawn(batch, seed):
        return answer_groups(lm, [Asked(texts, [])], 40, False, batch, {"temperature": 2.0}, seed)[
            0
        ].text

    assert drawn(2, 1) == drawn(12, 1)
    assert drawn(12, 1) != drawn(12, 2)
    assert drawn(12, 1) != answer_all(lm, texts, [], 40, False).text
    assert SAMPLING[True]["temperature"] == 0.6


def test_intervals_over_seeds_by_hand():
    table = pd.DataFrame(
        {
            "seed": [0, 1, 2],
            "intervention": "none",
            "prompt_kind": "harmful",
            "refusal_rate": [0.5, 0.6, 0.7],
            "deflected_rate": 0.0,
            "broken_rate": 0.0,
            "thought": 1.0,
        }
    )
    [row] = over_seeds(table).to_dict("records")
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (row["refusal_rate"], row["low"], row["high"]) == pytest.approx(
        (0.6, 0.6 - half, 0.6 + half)
    )
    assert (row["least"], row["most"], row["seeds"]) == (0.5, 0.7, 3)
    assert over_seeds(table[:1])["low"].isna().all()

"""Figures and the report: what they show, and that no text in them is interpreted."""

import re

import pandas as pd
import pytest

from qsae_kit.plots import plot_text, reconstruction_figure, steering_figure
from qsae_kit.report import summary

EVIL = '<img src=x onerror="window.PWN=1"> $x$ %{y} <b>bold</b>'


@pytest.fixture
def evaluation():
    return pd.DataFrame(
        {
            "variant": ["topk"] * 4, "layer": [0, 1, 0, 1], "kind": ["resid", "resid", "mlp", "mlp"],
            "site": ["a", "b", "c", "d"], "fvu": [0.1, 0.2, 0.3, 0.4], "delta_ce": [0.01, 0.02, 0.03, 0.04],
            "category": ["all"] * 4, "l0": [16.0] * 4, "tokens": [1000] * 4, "spliced_tokens": [200] * 4,
        }
    )  # fmt: skip


@pytest.fixture
def table():
    rows = []
    for goal, kind, rate in (
        ("none", "harmful", 1.0),
        ("none", "harmless", 0.0),
        ("suppress", "harmful", 0.1),
        ("induce", "harmless", 0.9),
        ("induce", "harmful", 0.7),  # a kind that the goal is not aimed at
    ):
        target = goal != "none" and (goal, kind) != ("induce", "harmful")
        arms = ["none"] if goal == "none" else ["features", "difference_of_means"] + ["random", "random"] * target
        for i, arm in enumerate(arms):
            value = rate if arm != "random" else abs(0.95 - 0.01 * i) if goal == "suppress" else 0.01 * i
            rows.append(
                {"goal": goal, "intervention": arm, "prompt_kind": kind, "target": target, "strength": 2.0 * (goal != "none"), "chosen": goal != "none",
                 "draw": i if arm == "random" else None, "n": 200, "refusal_rate": value, "ci_low": value - 0.02, "ci_high": value + 0.02,
                 "answered_rate": 1 - value, "broken_rate": 0.0, "kl_first": 0.0, "kl_answer": 0.0, "perplexity": 1.0}
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_the_reconstruction_figure_shows_every_point_with_units(evaluation):
    figure = reconstruction_figure(evaluation, "tiny")
    assert sorted(y for trace in figure.data for y in trace.y) == sorted([*evaluation["fvu"], *evaluation["delta_ce"]])
    assert "1,000 and 200 held-out tokens" in figure.layout.title.text
    assert "nats" in figure.layout.yaxis2.title.text
    assert len({trace.line.color for trace in figure.data}) == 2


def test_the_steering_figure_has_intervals_and_controls(table):
    figure = steering_figure(table, "tiny")
    refused = [t for t in figure.data if t.name == "refused: SAE features"]
    assert [list(t.y) for t in refused] == [[1.0, 0.1], [0.0, 0.9]]
    assert all(e == pytest.approx(0.02) for t in refused for e in t.error_y.array)
    random = [t for t in figure.data if "random" in t.name]
    assert [len(t.y) for t in random] == [2, 2]


def test_the_summary_shows_the_worst_draw(table):
    worst = summary(table).set_index(["goal", "intervention"])["refusal_rate"]
    assert worst["suppress", "random (worst of 2)"] == pytest.approx(0.92)
    assert worst["induce", "random (worst of 2)"] == pytest.approx(0.03)


def test_plot_text_reads_as_written():
    shown = plot_text(EVIL)
    assert "<" not in shown
    assert "$" not in shown
    assert "%{" not in shown


def test_no_text_becomes_markup_in_figures(evaluation):
    evaluation["variant"] = EVIL
    figure = reconstruction_figure(evaluation, EVIL)
    texts = [figure.layout.title.text, *(t.name for t in figure.data)]
    assert not any(re.search(r"<(?!br>)", text) for text in texts)

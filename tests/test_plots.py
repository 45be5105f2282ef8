"""Figures and the report: what they show, and that no text in them is interpreted."""

import re

import pandas as pd
import pytest
import torch

from qsae_kit.figures.basic import (
    controls_figure,
    detector_figure,
    dose_figure,
    plot_text,
    reconstruction_figure,
)
from qsae_kit.metrics.detection import detector_curve
from qsae_kit.steer.report import summary

EVIL = '<img src=x onerror="window.PWN=1"> $x$ %{y} <b>bold</b>'


@pytest.fixture
def evaluation():
    return pd.DataFrame(
        {
            "variant": ["topk"] * 4,
            "layer": [0, 1, 0, 1],
            "kind": ["resid", "resid", "mlp", "mlp"],
            "site": ["a", "b", "c", "d"],
            "fvu": [0.1, 0.2, 0.3, 0.4],
            "delta_ce": [0.01, 0.02, 0.03, 0.04],
            "category": ["all"] * 4,
            "l0": [16.0] * 4,
            "tokens": [1000] * 4,
            "spliced_tokens": [200] * 4,
        }
    )


def row(arm, kind, rate, strength=-0.8, draw=None, target=True, **more):
    none = arm == "none"
    told = {
        "goal": "none" if none else "suppress",
        "intervention": arm,
        "prompt_kind": kind,
        "target": target and not none,
        "strength": 0.0 if none else strength,
        "chosen": not none and rate is not None,
        "draw": draw,
        "n": 200,
        "refusal_rate": rate,
        "ci_low": rate and rate - 0.02,
        "ci_high": rate and rate + 0.02,
        "broken_rate": rate and 0.0,
        "change": rate and rate - 1.0,
        "log_odds": 3.0,
    } | more
    return told | {"log_odds_low": told["log_odds"] - 0.5, "log_odds_high": told["log_odds"] + 0.25}


@pytest.fixture
def table():
    rows = [row("none", "harmful", 1.0), row("none", "harmless", 0.1, target=False, log_odds=-2.0)]
    for arm, rate in (("features", 0.1), ("difference_of_means", 0.2), ("wrong_sign", 1.0)):
        rows.append(row(arm, "harmful", rate))
    rows.append(row("features", "harmless", 0.1, target=False))
    rows += [row("random", "harmful", 0.95 - 0.1 * i, draw=i) for i in range(3)]
    for arm in ("features", "difference_of_means"):
        for kind in ("harmful", "harmless"):
            rows += [row(arm, kind, None, s, log_odds=s) for s in (-0.8, 0.8)]
    return pd.DataFrame(rows)


def test_the_reconstruction_figure_shows_every_point_with_units(evaluation):
    figure = reconstruction_figure(evaluation, "tiny")
    assert sorted(y for trace in figure.data for y in trace.y) == sorted(
        [*evaluation["fvu"], *evaluation["delta_ce"]]
    )
    assert "1,000 and 200 held-out tokens" in figure.layout.title.text
    assert "nats" in figure.layout.yaxis2.title.text
    assert len({trace.line.color for trace in figure.data}) == 2


def test_the_dose_figure_goes_through_the_unsteered_model(table):
    figure = dose_figure(table, "harmful", "tiny")
    lines = {t.name: (list(t.x), list(t.y)) for t in figure.data}
    assert lines["SAE features, harmful"] == ([-0.8, 0.0, 0.8], [-0.8, 3.0, 0.8])
    assert lines["difference of means, harmless"] == ([-0.8, 0.0, 0.8], [-0.8, -2.0, 0.8])
    assert "nats" in figure.layout.yaxis.title.text
    bars = next(t.error_y for t in figure.data if t.name == "SAE features, harmful")
    assert (list(bars.arrayminus), list(bars.array)) == ([0.5] * 3, [0.25] * 3)


def test_the_controls_figure_has_intervals_and_every_draw(table):
    figure = controls_figure(table, "harmful", "tiny")
    shown = next(t for t in figure.data if t.name == "shown, harmful")
    assert dict(zip(shown.y, shown.x, strict=True))["SAE features"] == 0.1
    assert sorted(
        x for x, y in zip(shown.x, shown.y, strict=True) if y == "random features, searched"
    ) == pytest.approx([0.75, 0.85, 0.95])
    assert all(e == pytest.approx(0.02) for e in shown.error_x.array)


def test_the_detector_figure_marks_the_threshold_in_use():
    first, second = torch.tensor([3.0, 2.0, 2.0, 0.0]), torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0])
    curve = detector_curve(first, second, 2.5)
    for log in (False, True):
        figure = detector_figure(curve, "tiny <b>", log)
        line, used = figure.data[1:]
        least = 0.1 if log else 0.0
        assert list(line.x) == [max(x, least) for x in curve["false_rate"]]
        assert list(line.y) == curve["true_rate"].tolist()
        assert (list(used.x), list(used.y)) == ([least], [0.25])
        at = curve[curve["chosen"]].iloc[0]
        assert used.error_y.array[0] == pytest.approx(at["true_high"] - 0.25)
        assert used.error_x.array[0] == pytest.approx(at["false_high"] - least)
        assert used.error_x.arrayminus[0] == 0
        assert "above 2.5" in used.name
        assert figure.layout.xaxis.type == ("log" if log else "linear")
        assert "share of 5 other prompts" in figure.layout.xaxis.title.text
        assert "0.775" in figure.layout.title.text
        assert "<b>" not in figure.layout.title.text


def test_the_summary_shows_the_worst_draw(table):
    worst = summary(table).set_index(["intervention", "prompt_kind"])["refusal_rate"]
    assert worst["strongest of 3 random searches", "harmful"] == pytest.approx(0.75)
    assert worst["features", "harmful"] == pytest.approx(0.1)


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

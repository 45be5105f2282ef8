"""What a running training shows."""

import importlib.util

import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch

from qsae_kit.data.rows import StoredRows
from qsae_kit.figures.basic import training_figure
from qsae_kit.train import watch
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import train_saes
from qsae_kit.train.watch import LiveFigure, TensorBoard, WandB, read_log

SITES = ("blocks.0.hook_resid_post", "blocks.0.hook_attn_out")


def train(*watchers, folder=None):
    generator = torch.Generator().manual_seed(0)
    rows = {site: torch.randn(2000, 12, generator=generator) for site in SITES}
    config = TrainConfig("topk", sparsity=3, expansion=4, tokens=6400, batch=64, pool=640)
    return train_saes(
        StoredRows(rows), [config], model_name="t", bar=False, watch=watchers, folder=folder
    )


def test_a_live_figure_is_drawn_once_and_updated(monkeypatch):
    drawn = []

    class Handle:
        def update(self, data, raw):
            draw(data, raw)

    def draw(data, raw):
        assert raw
        drawn.append(go.Figure(data["application/vnd.plotly.v1+json"]))

    def display(data, raw, display_id):
        assert display_id
        draw(data, raw)
        return Handle()

    monkeypatch.setattr(watch, "display", display)
    monkeypatch.setattr(pio.renderers, "default", "plotly_mimetype")
    live = LiveFigure(seconds=0.02)
    train(live)
    assert len(drawn) > 2
    final = drawn[-1]
    lines = [t for t in final.data if t.mode == "lines"]
    assert len(lines) == 6  # loss, L0 and dead share of two sites
    assert {t.name for t in lines} == {
        "residual stream, topk-x4-l0_3",
        "attention output, topk-x4-l0_3",
    }
    assert all(t.x[-1] == 6400 for t in lines)
    assert len(final.data[0].x) > len(drawn[0].data[0].x)
    losses = final.data[0].y
    assert losses[-1] < losses[0]


def test_the_log_of_a_run_is_a_table_that_can_be_drawn(tmp_path):
    train(folder=tmp_path)
    log = read_log(tmp_path)
    assert log["hook_name"].unique().tolist() == list(SITES)
    figure = training_figure(log, {"topk-x4-l0_3": 3.0})
    assert [a.text for a in figure.layout.annotations] == ["loss", "L0", "dead latents", "target 3"]
    assert figure.layout.yaxis.title.text == "loss (shares of variance)"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_gets_every_site(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    tracker = WandB(tmp_path)
    monkeypatch.setattr(tracker._run, "log", logged.append)
    train(tracker)
    tracker._run.finish()
    assert [line["rows"] for line in logged] == [1280, 2560, 3840, 5120, 6400]
    assert set(logged[0]) == {
        "rows",
        "group",
        *(f"topk-x4-l0_3/{s}/{n}" for s in SITES for n in ("loss", "l0", "dead")),
    }


def test_what_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for tracker, package in ((TensorBoard, "tensorboard"), (WandB, "wandb")):
        with pytest.raises(ValueError, match=f"pip install {package}"):
            tracker(tmp_path)

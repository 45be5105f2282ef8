"""Sites: every kind of the table is drawn, and an SAE at the attention heads (`attn.hook_z`), which
is of another width than the residual stream, goes the whole way.
"""

import json

import numpy as np
import pandas as pd
import pytest
import releases
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import qsae_kit
from qsae_kit.attach import calibrate, check_fit, token_features
from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import LiveRows, kept_rows
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.features.index import load_index
from qsae_kit.features.indexing import IndexConfig, build_index, logit_effects
from qsae_kit.figures import basic, frontiers
from qsae_kit.lm.edits import Detector, Edit, applied
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.pipelines import suite as suites
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.store import load_suite, save_suite
from qsae_kit.sites import find_site, parse_hook_name, parse_kinds
from qsae_kit.steer.changes import Change, Steering
from qsae_kit.steer.choose.aim import Aim, log_odds_gradient
from qsae_kit.steer.choose.candidates import feature_scores
from qsae_kit.steer.choose.contrast import decision_activations
from qsae_kit.train.fit import sites_of
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import train_saes
from qsae_kit.widgets.layers import LayerLoss
from qsae_kit.world import world

Z = "blocks.2.attn.hook_z"
OUT = "blocks.2.hook_attn_out"
WIDTH = 192
"""Six heads of 32, where the bundled model's residual stream has 160."""


def dialogues():
    return [dialogue.messages for dialogue in world.dialogues(60, seed=5)]


@pytest.fixture(scope="module")
def batches(lm):
    return list(token_batches(lm, dialogues(), batch_tokens=800))


@pytest.fixture(scope="module")
def suite(lm, batches):
    config = TrainConfig("topk", 8, 2, tokens=60 * 256, batch=256, pool=1024)
    source = LiveRows(lm, [Z, OUT], lambda: iter(batches * 20))
    return train_saes(source, [config], model_name="tiny", bar=False)


# --- figures


def table(*kinds):
    rows = [
        {
            "variant": variant,
            "site": f"blocks.{layer}.{kind}",
            "layer": layer,
            "kind": kind,
            "category": "all",
            "fvu": 0.1,
            "delta_ce": 0.1,
            "l0": 8.0,
            "expansion": 8,
            "tokens": 100,
            "spliced_tokens": 90,
            "effective_rank": 3.0,
            "l0_at_fvu_0.1": 4.0,
            "l0_at_delta_ce_0.1": 4.0,
        }
        for variant in ("a", "b")
        for layer in (0, 1)
        for kind in kinds
    ]
    return pd.DataFrame(rows)


FIGURES = {
    "reconstruction": basic.reconstruction_figure,
    "frontier": frontiers.frontier_figure,
    "baselines": frontiers.baseline_figure,
    "needed": lambda rows: frontiers.needed_l0_figure(rows, ("fvu", "delta_ce"), (0.1, 0.1)),
    "layers": lambda rows: LayerLoss(rows)._figures[0],
}


@pytest.mark.parametrize("which", FIGURES)
def test_every_kind_is_drawn_known_or_not(which):
    figure = FIGURES[which](table("resid", "z", "cross_attn"))
    names = {(trace.name or "").split(",")[0] for trace in figure.data}
    assert {"residual stream", "attention heads", "cross_attn"} <= names
    marks = {trace.name.split(",")[0]: trace.marker.symbol for trace in figure.data}
    assert len({marks[name] for name in ("residual stream", "attention heads", "cross_attn")}) == 3


def test_a_training_anywhere_is_drawn():
    log = pd.DataFrame(
        [
            {"rows": n, "variant": "v", "hook_name": name, "loss": 1.0, "l0": 3.0, "dead": 0.0}
            for n in (1, 2)
            for name in (Z, "blocks.1.mlp.hook_pre")
        ]
    )
    names = [trace.name for trace in basic.training_figure(log).data if trace.showlegend]
    assert names == ["attention heads, v", "mlp.hook_pre, v"]


def test_a_site_of_an_unknown_kind_opens():
    view = LayerLoss(table("resid", "cross_attn"))
    view.selected = "a/blocks.1.cross_attn"
    assert "cross_attn of layer 1" in json.loads(view.figures[1])["layout"]["title"]["text"]


# --- names


def test_names_of_z(lm):
    assert find_site(Z) == parse_hook_name(Z) == ("z", 2)
    assert parse_hook_name(Z).hook_name == Z
    assert parse_kinds("resid,z") == ["resid", "z"]
    assert sites_of(lm, "z", "1-2") == ["blocks.1.attn.hook_z", Z]
    assert lm.width(Z) == lm.d_heads == WIDTH
    assert lm.width(OUT) == lm.width("hook_embed") == lm.d_model == 160


def test_every_row_of_the_table_is_a_hook_point_of_a_known_width(lm):
    for kind in qsae_kit.sites.KINDS:
        [name] = sites_of(lm, kind, "3")
        x = kept_rows(lm, [name], next(iter(token_batches(lm, dialogues()[:1]))))
        assert x[name].shape[1] == lm.width(name)


# --- the model


@torch.no_grad()
def test_z_through_o_proj_is_the_attention_output(lm, batches):
    rows = kept_rows(lm, [Z, OUT], batches[0])
    assert rows[Z].shape[1] == WIDTH
    torch.testing.assert_close(lm.to_residual(Z, rows[Z]), rows[OUT], atol=1e-4, rtol=1e-4)
    assert torch.equal(lm.to_residual(OUT, rows[OUT]), rows[OUT])
    with pytest.raises(ValueError, match="no hook point"):
        lm.width("blocks.9.attn.hook_z")


@torch.no_grad()
def test_an_edit_at_z_is_the_edit_of_its_image_at_the_attention_output(lm, batches):
    ids, mask, keep, *_ = batches[0]
    delta = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    image = lm.to_residual(Z, delta)
    seen = []

    def read(x):
        seen.append(x.shape)
        return torch.ones(x.shape[:2])

    always = Detector(Z, read, 0.5, positions=keep)
    with applied(lm, [Edit(Z, lambda x: delta.expand_as(x), keep, always)]):
        at_z = lm(ids, mask)
    with applied(lm, [Edit(OUT, lambda x: image.expand_as(x), keep)]):
        at_out = lm(ids, mask)
    assert seen[0][-1] == WIDTH
    assert (at_z - lm(ids, mask)).abs().max() > 0.1
    where = mask.bool()
    torch.testing.assert_close(at_z[where], at_out[where], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("d_model", "heads", "device"), [(1024, 16, "meta"), (64, 4, "cpu"), (128, 2, "cpu")]
)
@torch.no_grad()
def test_z_of_a_qwen3(lm, d_model, heads, device):
    config = Qwen3Config(
        vocab_size=lm.config.vocab_size,
        hidden_size=d_model,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=128 if device == "meta" else 32,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = HookedLM(Qwen3ForCausalLM(config).eval(), lm.tokenizer, "random")
    name, width = "blocks.1.attn.hook_z", heads * config.head_dim
    assert model.width(name) == width != d_model
    assert width == 2048 or device == "cpu"
    ids = torch.randint(1, 100, (2, 7), device=device)
    mask = torch.ones_like(ids)
    x = model.run_with_cache(ids, names_filter=name)[1][name]
    assert x.shape == (2, 7, heads, config.head_dim)  # as TransformerLens gives it
    if device == "meta":
        return
    sae = TopKSAE(width, 50, 5.0, Provenance("random", name, NormFilter(1.0)))
    check_fit(model, sae)
    sae.init_from_rows(torch.randn(200, width), torch.Generator().manual_seed(1))
    edit = Change("add", name, "v", (3,), strength=2.0, positions=(2,)).edit({"v": {name: sae}})
    with applied(model, [edit]):
        edited = model(ids, mask)
    assert (edited - model(ids, mask))[:, 2:].abs().max() > 1e-3
    narrow = TopKSAE(d_model, 50, 5.0, Provenance("random", name, NormFilter(1.0)))
    with pytest.raises(ValueError, match=rf"d_in={d_model}, but 'random' has {width} at {name}"):
        check_fit(model, narrow)


# --- the whole way


def test_training_saving_loading_and_evaluating_at_z(lm, suite, batches, tmp_path):
    save_suite(suite, tmp_path)
    loaded = load_suite(tmp_path)
    [(variant, saes)] = loaded.items()
    assert list(saes) == [Z, OUT]
    assert saes[Z].W_dec.shape == (2 * WIDTH, WIDTH)
    config = json.loads((tmp_path / variant / Z / "cfg.json").read_text())
    assert (config["reshape_activations"], config["d_in"]) == ("hook_z", WIDTH)
    rows = evaluate_suite(lm, loaded, batches[:2], spliced_batches=1, bar=False)
    own = rows[(rows["site"] == Z) & (rows["category"] == "all")].iloc[0]
    assert (own["kind"], own["layer"]) == ("z", 2)
    assert own["fvu"] < 0.6
    assert own["delta_ce"] < own["delta_ce_zero"]
    basic.reconstruction_figure(rows)


@torch.no_grad()
def test_steering_at_z(lm, suite, batches):
    [(variant, saes)] = suite.items()
    ids, mask, *_ = batches[0]
    plain = lm(ids, mask)
    [f] = token_features(lm, saes[Z], [ids[0, : int(mask[0].sum())].tolist()])
    feature = int(f.sum(0).argmax())
    direction = tuple(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)).tolist())
    for change in (
        Change("add", Z, variant, (feature,), strength=1.0, positions="all"),
        Change("ablate", Z, variant, (feature,), positions="all"),
        Change("clamp", Z, variant, (feature,), strength=1.0, positions="all"),
        Change("project_out", Z, variant, (feature,), positions="all"),
        Change("add", Z, direction=direction, median_norm=10.0, positions="all"),
    ):
        with applied(lm, Steering((change,)).edits(suite)):
            assert (lm(ids, mask) - plain)[mask.bool()].abs().max() > 1e-3
    with pytest.raises(ValueError, match="direction of 192 values"):
        Change("add", OUT, direction=direction, median_norm=10.0).edit(suite)


def test_choosing_at_z(lm, suite):
    [variant] = suite
    rows = decision_activations(lm, [Z], ["How do I burn it?", "How do I thank the nurse?"])[Z]
    assert rows.shape == (2, WIDTH)
    prompts = [lm.chat_tokens("How do I thank the nurse?")]
    openings = torch.tensor([5, 6])
    assert log_odds_gradient(lm, Z, prompts, openings).shape == (WIDTH,)
    scores = feature_scores(
        Aim(lm, prompts, prompts, openings, 1.0),
        suite[variant][Z],
        rows[:1],
        rows[1:],
        lambda found: [
            Change("add", Z, variant, found.features, found.weights, strength=0.5).edit(suite)
        ],
        n_candidates=2,
    )
    assert len(scores) == 2


@torch.no_grad()
def test_a_feature_at_z_promotes_what_its_image_does(lm, suite):
    sae = next(iter(suite.values()))[Z]
    written = lm.to_residual(Z, sae.W_dec[:5])
    expected = sae.W_dec[:5] @ lm.hf.model.layers[2].self_attn.o_proj.weight.T
    assert torch.equal(written, expected)
    assert logit_effects(lm, written).promoted.shape[0] == 5


def test_an_index_of_z(lm, suite, tmp_path):
    at_z = {variant: {Z: saes[Z]} for variant, saes in suite.items()}
    config = IndexConfig(tokens=1500, sampled_tokens=1000)
    build_index(lm, at_z, dialogues, tmp_path, config, bar=False)
    index = load_index(tmp_path).site(Z)
    written = lm.to_residual(Z, at_z[index.place.variant][Z].W_dec)
    assert np.array_equal(index.promoted, logit_effects(lm, written).promoted)


def test_a_plan_counts_the_width_of_z(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "measure_speeds", lambda *_: suites.Speeds(1e4, 1e4, 1e3))
    plans = [
        suites.make_plan(lm, suites.SuiteConfig("300k", kind, "2", target_l0=8), tmp_path)
        for kind in ("attn", "z")
    ]
    assert plans[1]["sites"] == [Z]
    assert plans[1]["d_sae"] / plans[0]["d_sae"] == WIDTH / 160
    assert plans[1]["memory_bytes"] > 1.15 * plans[0]["memory_bytes"]


# --- SAEs of others


@pytest.mark.parametrize("reshape", ["none", "hook_z"])
def test_an_sae_of_saelens_at_z(lm, batches, reshape, tmp_path):
    laid = releases.saelens(
        tmp_path, layer=2, d_in=WIDTH, hook="blocks.{}.attn.hook_z", model="tiny"
    )
    path = laid.folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reshape_activations": reshape}))
    suite = load_suite(tmp_path)
    [saes] = suite.values()
    assert list(saes) == [Z]
    assert calibrate(lm, suite, batches, rows=200)
    check_fit(lm, saes[Z])
    x = kept_rows(lm, [Z], batches[0])[Z]
    torch.testing.assert_close(saes[Z](x), laid.forward(x)[1], atol=1e-4, rtol=1e-4)


# --- the command

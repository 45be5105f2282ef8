"""Widgets without a browser: state, messages, pages of their own."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from qsae_kit import (
    FeatureExplorer,
    LayerLoss,
    SteeringLab,
    TokenActivations,
    TrainingMonitor,
    build_index,
    load_index,
)
from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import StoredRows, kept_rows
from qsae_kit.features.indexing import IndexConfig
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.suites import Feature, Place
from qsae_kit.steer.changes import Change, Steering
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import train_saes
from qsae_kit.widgets import widget as base
from qsae_kit.widgets.chats import read_chat
from qsae_kit.widgets.explorer import sorted_places, split_query
from qsae_kit.widgets.plots import library
from qsae_kit.widgets.ranking import interest
from qsae_kit.world import world

SITES = ("blocks.1.hook_resid_post", "blocks.4.hook_mlp_out")


def dialogues():
    return (dialogue.messages for dialogue in world.dialogues(60, seed=1_000_013))


@pytest.fixture(scope="module")
def suite(lm):
    batch = next(iter(token_batches(lm, dialogues(), batch_tokens=2048)))
    rows = kept_rows(lm, SITES, batch)
    out = {}
    for name in SITES:
        sae = TopKSAE(
            lm.d_model,
            250,
            8,
            Provenance(lm.model_name, name, NormFilter(float(rows[name].norm(dim=-1).median()))),
        )
        sae.init_from_rows(rows[name], torch.Generator().manual_seed(2))
        out[name] = sae.requires_grad_(False)
    return {"topk": out}


@pytest.fixture
def index(lm, suite, tmp_path_factory, request):
    if not hasattr(request.module, "_index"):
        config = IndexConfig(tokens=2500, top=3, sampled=5, before=6, after=2, batch_tokens=1024)
        request.module._index = build_index(
            lm, suite, dialogues, tmp_path_factory.mktemp("i"), config, bar=False
        )
    return load_index(request.module._index, lm, suite)


@pytest.fixture
def sent(monkeypatch):
    """What widgets send to the page."""
    out = []
    monkeypatch.setattr(
        base.View, "send", lambda self, content, buffers=None: out.append((content, buffers))
    )
    return out


def message(widget, **content):
    """As it comes from the page."""
    widget._handle_custom_msg(content, [])


def test_the_explorer_shows_its_table_and_a_page(index):
    explorer = FeatureExplorer(index)
    dead = int((explorer.features.figures["fired"] == 0).sum())
    assert dead
    assert (explorer.n_rows, explorer.n_hidden) == (250 - dead, dead)
    assert explorer.n_features == 250
    explorer.query = "fired=0"
    assert (explorer.n_rows, explorer.n_hidden) == (dead, 0)
    explorer.query = ""
    assert [c["name"] for c in explorer.columns][:4] == ["feature", "label", "hint", "density"]
    figures = explorer.features.figures
    poor = figures["warnings"].str.contains("dead|dense|position|sink")
    assert poor.any()
    ranked = figures.assign(poor=poor).sort_values(
        ["poor", "max"], ascending=[True, False], kind="stable"
    )
    assert explorer.page["feature"] == explorer.selected == ranked.index[0]
    assert [row[0] for row in explorer.first] == ranked.index[:100].tolist()
    json.dumps(explorer.page, allow_nan=False)
    json.dumps(explorer.first, allow_nan=False)
    explorer.selected = 7
    assert explorer.page["feature"] == 7
    explorer.selected = 999
    assert "features 0 to 249" in explorer.status
    assert explorer.page["feature"] == 7
    assert (
        repr(explorer)
        == f"FeatureExplorer(topk/blocks.1.hook_resid_post, {250 - dead} of 250 features,"
        " selected 999)"
    )


def test_it_opens_on_a_labelled_feature_that_is_no_sink(index):
    site = index.site()
    ranked = FeatureExplorer(index).to_frame().index
    poor = site.figures["warnings"].str.contains("dead|dense|position|sink")
    sink, sound = int(poor.idxmax()), int(ranked[5])
    index.label(site, sink, "a sink")
    assert FeatureExplorer(index).selected == ranked[0]
    index.label(site, sound, "greeting")
    explorer = FeatureExplorer(index)
    assert explorer.selected == sound
    near = int(explorer.page["neighbours"][0][0])
    index.label(site, near, "beside it")
    assert FeatureExplorer(index, feature=sound).page["names"][str(near)] == "beside it"
    for feature in (sink, sound, near):
        index.label(site, feature, "")


def test_what_is_shown_is_searched_in_until_all_is_shown(index, sent):
    explorer = FeatureExplorer(index)
    explorer.show(explorer.features.table.iloc[[30, 10, 20]])
    assert explorer.to_frame().index.tolist() == [30, 10, 20]
    assert explorer.selection == "3 features of show()"
    explorer.query = "10"
    assert 10 in explorer.to_frame().index
    assert set(explorer.to_frame().index) <= {10, 20, 30}
    explorer.query = "11"
    assert 11 not in explorer.to_frame().index
    message(explorer, op="all", key="")
    assert explorer.selection == ""
    assert 11 in explorer.to_frame().index
    explorer.show(explorer.features.table.iloc[[1]])
    explorer.site = 1
    assert explorer.selection == ""
    assert explorer.n_rows == 250 - explorer.n_hidden


def test_sorting_and_conditions(index, sent):
    explorer = FeatureExplorer(index, SITES[1])
    figures = explorer.features.figures
    explorer.sort_by = "density"
    assert explorer.to_frame()["density"].is_monotonic_decreasing
    explorer.ascending = True
    assert explorer.to_frame()["density"].is_monotonic_increasing
    explorer.query = "density>0.02 max>1"
    wanted = set(figures.index[(figures["density"] > 0.02) & (figures["max"] > 1)])
    assert set(explorer.to_frame().index) == wanted
    assert 0 < len(wanted) < 250
    before = explorer.version
    explorer.query = "colour>3"
    assert "no column 'colour'" in explorer.status
    sent.clear()
    explorer.query = "colour>3 "  # the same complaint: the page is told that there is an answer
    assert sent[-1][0] == {"op": "answered"}
    explorer.query = "top_token>3"
    assert "holds text" in explorer.status
    explorer.query = "density>1e"
    assert "no number" in explorer.status
    assert explorer.version == before  # what cannot be read leaves the table as it was
    explorer.query, explorer.sort_by, explorer.ascending = "", "token_f1", True
    values = explorer.to_frame()["token_f1"].to_numpy()
    known = values[~np.isnan(values)]
    assert (np.diff(known) >= 0).all()
    assert np.isnan(values[len(known) :]).all()
    message(explorer, op="rows", start=200)
    assert sent[-1][0]["version"] == explorer.version
    assert [row[0] for row in sent[-1][0]["rows"]] == explorer.to_frame().index[200:].tolist()


def test_what_is_searched_for_comes_first(index):
    explorer = FeatureExplorer(index)
    token = explorer.features.figures["top_token"].mode()[0].strip() or "the"
    explorer.query = token
    assert explorer.to_frame().index.tolist() == explorer.features.search(token).index.tolist()
    explorer.query = "17"
    assert explorer.to_frame().index[0] == 17
    explorer.mode, explorer.query = "near", "17"
    assert explorer.to_frame().index.tolist() == explorer.features.similar(17, 200).index.tolist()
    assert explorer.columns[1]["name"] == "cosine"
    explorer.mode, explorer.query = "fires on", "How do I thank the nurse?"
    assert (
        explorer.to_frame().index.tolist()
        == explorer.features.firing("How do I thank the nurse?", 250).index.tolist()
    )
    explorer.mode, explorer.query = "text", ""
    found = explorer.features.separating(list(dialogues())[:4], list(dialogues())[4:9])
    explorer.show(found)
    assert explorer.to_frame().index.tolist() == found.index.tolist()
    assert [c["name"] for c in explorer.columns][1:3] == ["gap", "auc"]
    with pytest.raises(ValueError, match="features 0 to 249"):
        explorer.show(pd.DataFrame(index=[900]))


def test_another_site(index):
    explorer = FeatureExplorer(index)
    explorer.query = "density>0.01"
    explorer.site = 1
    assert explorer.features.place.hook_name == SITES[1]
    assert explorer.page["hook_name"] == SITES[1]
    assert explorer.page["feature"] == explorer.selected


def test_labels_by_message(index, sent):
    explorer = FeatureExplorer(index)
    message(explorer, op="label", feature=3, text="<b>greeting</b>")
    assert index.labels_of(explorer.features) == {3: "<b>greeting</b>"}
    assert dict(row[:2] for row in explorer.rows(0, 250))[3] == "<b>greeting</b>"
    message(explorer, op="label", feature=3, text="x" * 600)
    assert "600 characters" in explorer.status
    explorer.label(3, "")
    assert dict(row[:2] for row in explorer.rows(0, 250))[3] == ""


@pytest.mark.parametrize("kind", ["explorer", "tokens", "layers"])
def test_pages_of_their_own(lm, index, suite, tmp_path, kind, evaluation, monkeypatch):
    widget = {
        "explorer": lambda: FeatureExplorer(index),
        "tokens": lambda: TokenActivations(lm, suite, "</script><script>x</script>"),
        "layers": lambda: LayerLoss(evaluation),
    }[kind]()
    page = widget.to_html()
    assert widget.to_html(tmp_path / "page.html") == tmp_path / "page.html"
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    payload = re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    assert not set("<>&") & set(payload)
    assert json.loads(payload)["state"]
    assert not re.search(
        r"https?://(?!www\.w3\.org)", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    )
    shown = []
    monkeypatch.setattr(base, "display", lambda data, **_: shown.append(data))
    widget._ipython_display_()
    live, kept = shown
    assert "application/vnd.jupyter.widget-view+json" in live
    assert kept["text/html"].startswith('<div class="qsae-fallback">')


@pytest.fixture(scope="module")
def evaluation():
    rows = [
        {
            "variant": v,
            "site": f"blocks.{layer}.{hook}",
            "layer": layer,
            "kind": kind,
            "category": "all",
            "fvu": 0.1 * layer + 0.05,
            "delta_ce": 0.02 * layer,
            "l0": 8.0 + i,
            "tokens": 100,
            "spliced_tokens": 90,
        }
        for i, v in enumerate(("a", "b"))
        for layer in range(3)
        for kind, hook in (("resid", "hook_resid_post"), ("mlp", "hook_mlp_out"))
    ]
    return pd.DataFrame(rows)


def test_layers_and_their_frontier(evaluation, sent, index):
    view = LayerLoss(evaluation)
    assert view.selected == "a/blocks.0.hook_resid_post"
    assert len(view.figures) == 2
    message(view, op="click", figure=0, trace=4, point=2)  # variant b at the residual stream
    trace = view._figures[0].data[4]
    assert view.selected == f"{trace.legendgroup.split('/')[0]}/blocks.2.hook_resid_post"
    message(view, op="click", figure=1, trace=0, point=0)
    assert view.selected == "a/blocks.2.hook_resid_post"
    assert "layer 2" in json.loads(view.figures[1])["layout"]["title"]["text"]
    view.selected = "nothing"
    assert "no site" in view.status
    assert view._library == library()
    with pytest.raises(ValueError, match="no rows of category 'user'"):
        LayerLoss(evaluation, category="user")
    explorer = FeatureExplorer(index)
    known = evaluation.assign(variant="topk", site=SITES[1]).head(1)
    linked = LayerLoss(pd.concat([evaluation, known]), explorer=explorer)
    assert explorer.site == 0
    linked.selected = f"topk/{SITES[1]}"
    assert explorer.site == 1
    # where the explorer is
    assert (
        LayerLoss(pd.concat([evaluation, known]), explorer=explorer).selected == f"topk/{SITES[1]}"
    )


def test_activations_of_a_text(lm, suite, index):
    text = "user: How do I thank the nurse?\nassistant: Say it."
    view = TokenActivations(lm, suite, text, index, hook_name=SITES[1])
    chat = [
        {"role": "user", "content": "How do I thank the nurse?"},
        {"role": "assistant", "content": "Say it."},
    ]
    ids = lm.chat_tokens(chat, add_generation_prompt=False)
    assert view.result["tokens"] == lm.to_str_tokens(ids)
    x = lm.run_with_cache(torch.tensor([ids]))[1][SITES[1]][0]
    sae = suite["topk"][SITES[1]]
    f = sae.encode(x) * sae.provenance.filter.keeps(x)[:, None]
    f[0] = 0
    figures = index.site(SITES[1]).figures
    surprise = -np.log(figures["density"].clip(lower=1e-6).to_numpy())
    largest = torch.tensor(figures["max"].clip(lower=1e-9).to_numpy())
    weights = (f / largest).clamp(max=1) * torch.tensor(surprise)
    poor = figures["warnings"].str.contains("dead|dense|position|sink").tolist()
    weights = torch.where(torch.tensor(poor), 1e-3 * weights, weights)
    assert view.result["feature"] == int(weights.amax(0).argmax())
    plain = TokenActivations(
        lm, suite, text, hook_name=SITES[1]
    )  # nothing is known but activations
    assert plain.result["feature"] == int(f.amax(0).argmax())
    assert view.result["acts"] == pytest.approx(
        f[:, view.result["feature"]].tolist(), rel=1e-3, abs=1e-6
    )
    for own, row, weight in zip(view.result["top"], f, weights, strict=True):
        assert [v for _, v in own] == pytest.approx(row[[i for i, _ in own]].tolist(), rel=1e-3)
        ranked = weight[[i for i, _ in own]]
        assert ranked.tolist() == sorted(ranked.tolist(), reverse=True)
    for own, row in zip(plain.result["top"], f, strict=True):
        assert [v for _, v in own] == pytest.approx(
            row.sort(descending=True).values[: len(own)].tolist(), rel=1e-3
        )
    assert view.to_frame().shape == (len(ids), 16)
    assert view.name(5) == index.site(SITES[1]).figures["top_token"][5]
    view.feature = 5
    assert view.result["feature"] == 5
    assert view.result["acts"] == pytest.approx(f[:, 5].tolist(), rel=1e-3, abs=1e-6)
    view.text = "  "
    assert view.result["tokens"] == []
    with pytest.raises(ValueError, match=r"no SAE of 'blocks\.9"):
        TokenActivations(lm, suite, "x", hook_name="blocks.9.hook_mlp_out")


def test_what_is_cut_or_not_there_is_told(lm, suite):
    view = TokenActivations(lm, suite, "Hello", hook_name=SITES[0])
    assert view.status == ""
    view.text = "How do I thank the nurse? " * 200
    assert len(view.result["tokens"]) == lm.context_size
    assert f"the first {lm.context_size} are looked at" in view.status
    view.text = "Hello"
    assert view.status == ""
    message(view, op="look", seq=9, text="Hello", site=0, feature=99999)
    assert "99999" in view.status
    assert "features 0 to 249" in view.status


def test_an_older_question_is_not_answered(lm, suite):
    view = TokenActivations(lm, suite, "Hello", hook_name=SITES[0])
    done = []
    original = view._compute

    def slow(number):
        done.append(number)
        original(number)

    view._compute = slow
    with view._guard:  # busy: three questions come meanwhile
        threads = []
        for number in (1, 2, 3):
            thread = threading.Thread(
                target=partial(
                    message, view, op="look", seq=number, text="x" * number, site=0, feature=-1
                )
            )
            thread.start()
            threads.append(thread)
            while view._asked < number:
                pass
    for thread in threads:
        thread.join()
    assert done == [3]
    assert view.result["seq"] == 3
    assert view.text == "xxx"
    message(view, op="look", seq=2, text="late", site=0, feature=-1)
    assert view.text == "xxx"


def test_a_chat_that_the_template_refuses(lm, suite, monkeypatch):
    view = TokenActivations(lm, suite, "Hello")
    shown = view.result
    refusing = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(lm.tokenizer, "chat_template", refusing)
    message(view, op="look", seq=4, text="assistant: me first", site=0, feature=-1)
    assert "roles must alternate" in view.status
    assert "of the roles assistant" in view.status
    assert view.result == shown | {"seq": 4}
    monkeypatch.undo()
    message(view, op="look", seq=5, text="Good day", site=0, feature=-1)
    assert view.status == ""
    assert "Good" in "".join(view.result["tokens"])


def test_how_a_chat_is_read():
    assert read_chat("Hello: you") == [{"role": "user", "content": "Hello: you"}]
    assert read_chat("System: Be kind.\nUSER: a\nb\nassistant: c") == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
    ]
    assert read_chat("first\nuser: x") == [{"role": "user", "content": "first\nuser: x"}]


def training(tokens=6400):
    rows = {
        "blocks.0.hook_resid_post": torch.randn(
            2000, 12, generator=torch.Generator().manual_seed(0)
        )
    }
    config = TrainConfig("topk", sparsity=3, expansion=4, tokens=tokens, batch=64, pool=640)
    return partial(train_saes, StoredRows(rows), [config], model_name="t", bar=False)


def test_a_training_is_watched_and_stopped(sent):
    monitor = TrainingMonitor(training(), seconds=0.01)
    suite = monitor.result(60)
    assert monitor.status == "Done."
    assert not monitor.running
    assert monitor.to_frame()["rows"].max() == 6400
    assert list(suite) == ["topk-x4-l0_3"]
    assert "Training at 1 site" in monitor.figures[0]
    endless = TrainingMonitor(training(tokens=64 * 10**6), seconds=0.01)
    while len(endless.to_frame()) < 3:
        pass
    with pytest.raises(TimeoutError, match="not ended"):
        endless.result(0.01)
    message(endless, op="start")
    assert "is running" in endless.status
    message(endless, op="stop")
    stopped = endless.result(30)
    assert stopped["topk-x4-l0_3"]["blocks.0.hook_resid_post"].W_dec.isfinite().all()
    assert endless.status.startswith("Stopped")
    failing = TrainingMonitor(
        lambda **_: (_ for _ in ()).throw(ValueError("no rows")), autostart=False
    )
    with pytest.raises(TimeoutError):
        failing.result(0)
    failing.start()
    with pytest.raises(ValueError, match="no rows"):
        failing.result(10)
    assert failing.status == "ValueError: no rows"


def test_small_things():
    assert sorted_places(np.array(["b", "", "a", "c"], object), True).tolist() == [2, 0, 3, 1]
    assert sorted_places(np.array([1.0, np.nan, 3.0]), False).tolist() == [2, 0, 1]
    assert split_query("nurse density<0.01 max>=3", ["density", "max"]) == (
        "nurse",
        [("density", "<", 0.01), ("max", ">=", 3.0)],
    )
    assert split_query("<b>x max>3 a<b", ["max"]) == ("<b>x  a<b", [("max", ">", 3.0)])
    assert base.as_json({"a": "</script>\u2028&"}) == '{"a": "\\u003c/script\\u003e\\u2028\\u0026"}'


def test_a_whole_edit_is_one_slider_that_multiplies_it(lm, suite, sent):
    """What sliders cannot show, such as a direction projected out of everything, moves as one."""
    taken = Change("project_out", SITES[0], "topk", (3, 5), (1.0, -0.5), (), 0.5, 0.0, "every")
    taken = replace(taken, everywhere=True)
    view = SteeringLab(lm, suite, "How do I thank the nurse?", edit=Steering((taken,)))
    (control,) = view.controls
    assert (control["action"], control["strength"], control["least"]) == ("edit", 1.0, 0.0)
    assert "3 and 5 0.50" in control["name"]
    assert view.steering == Steering((taken,))
    view.controls = [{**control, "strength": 2.0}]
    assert view.steering.changes[0].strength == 1.0
    for off in ({"strength": 0.0}, {"on": False}):
        view.controls = [{**control, **off}]
        assert view.steering == Steering(())
    view.controls = [control]
    view.add(7, strength=0.5)
    assert len(view.steering.changes) == 2
    view.run(wait=True)
    assert view.answers["number"] == 1
    assert view.to_frame()["setting"].item().startswith("project_out at")


def test_pages_and_sliders_lead_to_each_other(lm, suite, index, sent):
    explorer = FeatureExplorer(index)
    view = SteeringLab(lm, suite, "Hello", index, explorer=explorer)
    assert (explorer.steers, view.linked) == (True, True)
    message(explorer, op="steer", feature=7)
    assert [(c["feature"], c["action"], c["strength"]) for c in view.controls] == [(7, "add", 0.0)]
    assert "slider" in explorer.status
    message(explorer, op="steer", feature=9999)
    assert "features 0 to 249" in explorer.status
    assert len(view.controls) == 1
    other = view.choices.index(Place("topk", SITES[1]))
    message(view, op="look", site=other, feature=11)
    assert (explorer.features.place.hook_name, explorer.selected) == (SITES[1], 11)
    tokens = TokenActivations(lm, suite, "Hello", index, hook_name=SITES[0], explorer=explorer)
    message(tokens, op="page", site=tokens.site, feature=5)
    assert (explorer.features.place.hook_name, explorer.selected) == (SITES[0], 5)
    stranger = Feature(Place("topk", "blocks.9.hook_mlp_out"), 1)
    with pytest.raises(ValueError, match=r"The index does not hold topk/blocks\.9"):
        explorer.look(stranger)
    with pytest.raises(ValueError, match=r"suite has no topk/blocks\.9"):
        view.add_feature(stranger)


def test_a_text_is_tried_on_a_features_page(lm, suite, index, sent):
    explorer = FeatureExplorer(index, SITES[0])
    text = "user: How do I thank the nurse?\nassistant: Say it."
    told = explorer.try_on(7, text)
    tokens = TokenActivations(lm, suite, text, index, hook_name=SITES[0])
    tokens.feature = 7
    assert told["tokens"] == tokens.result["tokens"]
    assert told["acts"] == pytest.approx(tokens.result["acts"], rel=1e-3)
    message(explorer, op="try", feature=7, text=" ")
    assert "There is no text" in explorer.status


def test_dead_features_are_ranked_last(index):
    """One that never fired in the index's dialogues may fire on a text."""
    own = index.site(SITES[1])
    dead = int((own.figures["fired"] == 0).to_numpy().nonzero()[0][0])
    alive = int(own.by_interest[0])
    f = torch.zeros(1, own.d_sae)
    f[0, dead], f[0, alive] = 1e6, float(0.05 * own.figures["max"][alive])
    weights = interest(f, index, own.place)[0]
    assert weights[alive] > weights[dead] > 0


def test_a_closed_lab_gets_no_more_features(lm, suite, index, sent):
    explorer = FeatureExplorer(index, SITES[1])
    former = SteeringLab(
        lm, {"topk": {SITES[0]: suite["topk"][SITES[0]]}}, "Hello", explorer=explorer
    )
    later = SteeringLab(lm, suite, "Hello", explorer=explorer)
    message(explorer, op="steer", feature=7)
    assert "has no topk/" in explorer.status  # the former one lacks the SAE, the later one does not
    assert [c["feature"] for c in later.controls] == [7]
    former.close()
    message(explorer, op="steer", feature=8)
    assert "slider" in explorer.status
    later.close()
    assert not explorer.steers


def test_a_lab_is_made_while_another_one_answers(lm, suite):
    with ThreadPoolExecutor(1) as pool:
        with lm.lock:
            made = pool.submit(SteeringLab, lm, suite, "Hello").result()
            assert "busy" in made.status
        assert pool.submit(SteeringLab, lm, suite, "Hello").result().status == ""

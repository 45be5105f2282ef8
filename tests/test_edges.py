"""Edges between features: what gradients say of them, against real passes."""

import pytest
import torch
from small import explaining_suite

from qsae_kit.attach import token_features
from qsae_kit.audit.attribution import answer_question, attribute
from qsae_kit.audit.edges import edges
from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import kept_rows
from qsae_kit.figures.mends import edges_figure
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.world import world

SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.3.hook_resid_post")


@pytest.fixture(scope="module")
def suite(lm):
    return explaining_suite(lm, SITES, 24)


@pytest.fixture(scope="module")
def found(lm, suite):
    question = answer_question(
        lm, "How do I burn the teacher?", "I can't help with that.", "You take it."
    )
    return attribute(lm, suite, question, top=16)


@pytest.fixture(scope="module")
def graph(lm, suite, found):
    return edges(lm, suite, found, top=16, verified=24)


def test_edges_go_forward_and_rank_as_real_effects_do(lm, found, graph):
    assert len(graph.nodes) == 16
    sources, targets = (graph.nodes["site"].iloc[graph.edges[end]] for end in ("source", "target"))
    order = [lm.order_of(name) for name in SITES]
    assert all(SITES.index(a) < SITES.index(b) for a, b in zip(sources, targets, strict=True)), (
        order
    )
    assert graph.agreement > 0.6
    assert graph.edges["weight"].abs().is_monotonic_decreasing
    assert "rank correlation" in graph.in_words
    strongest = graph.edges.iloc[0]
    assert strongest["effect"] == pytest.approx(strongest["weight"], rel=0.5)


@torch.no_grad()
def test_an_effect_is_that_of_a_real_ablation(lm, suite, found, graph):
    """Of two sites next to each other, so that none is held in between."""
    nodes = graph.nodes
    used = [name for name in SITES if name in set(nodes["site"])]
    near = {name: n for n, name in enumerate(used)}
    edge = next(
        row
        for row in graph.edges.head(24).itertuples()
        if near[nodes["site"][row.target]] - near[nodes["site"][row.source]] == 1
    )
    source, target = nodes.loc[edge.source], nodes.loc[edge.target]
    ids = torch.tensor([found.question.ids])
    first, second = (suite["v"][node["site"]] for node in (source, target))
    (f,) = token_features(lm, first, [list(found.question.ids)])
    i = int(source["feature"])

    def delta(x):
        change = -first.encode(x)[..., [i]] @ first.W_dec[[i]]
        return torch.where((f != 0).any(1)[:, None], change, 0.0)

    name, at = target["site"], int(target["position"])

    def read():
        _, cache = lm.run_with_cache(ids, names_filter=[name])
        return float(second.encode(cache[name])[0, at, int(target["feature"])])

    clean = read()
    with applied(lm, [Edit(source["site"], delta, "every")]):
        changed = read()
    assert edge.effect == pytest.approx(clean - changed, abs=1e-3)


def test_a_residual_stream_in_between_lets_nothing_by(lm, suite):
    """What comes from before a residual stream that is held changes nothing behind it."""
    middle, ends = "blocks.2.hook_resid_post", (SITES[0], SITES[2])
    [x] = kept_rows(
        lm,
        [middle],
        next(iter(token_batches(lm, [d.messages for d in world.dialogues(20, seed=4)]))),
    ).values()
    median = NormFilter(float(x.norm(dim=-1).median()))
    held = TopKSAE(lm.d_model, 200, 24, Provenance("tiny", middle, median))
    held.init_from_rows(x, torch.Generator().manual_seed(1))
    three = {"v": {ends[0]: suite["v"][ends[0]], middle: held, ends[1]: suite["v"][ends[1]]}}
    question = answer_question(lm, "How do I burn the teacher?", "I can't.", "You take it.")
    graph = edges(lm, three, attribute(lm, three, question, top=40), top=40, verified=3)
    sites = graph.nodes["site"]
    assert {middle, *ends} <= set(sites)
    pairs = {(sites[row.source], sites[row.target]) for row in graph.edges.itertuples()}
    assert pairs == {(ends[0], middle), (middle, ends[1])}


def test_the_figure_has_every_feature_and_no_markup(graph):
    nodes = graph.nodes.assign(token="<b>x")
    figure = edges_figure(nodes, graph.edges)
    marks = figure.data[-1]
    assert list(marks.text) == [str(feature) for feature in nodes["feature"]]
    assert len(figure.data) == min(24, len(graph.edges)) + 1
    assert not any("<b>" in text for text in figure.layout.xaxis.ticktext)


def test_one_feature_has_no_edges(lm, suite, found):
    with pytest.raises(ValueError, match="Edges are between features"):
        edges(lm, suite, found, top=1)

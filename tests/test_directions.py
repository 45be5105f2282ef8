"""Directions and what is done along them, against independent computations."""

import copy
from dataclasses import replace
from itertools import chain

import pandas as pd
import pytest
import torch
from small import small_suite

from qsae_kit.figures.basic import price_figure
from qsae_kit.lm.answering import KnownRows, answer_all, plain_kl
from qsae_kit.lm.edits import Edit, applied, selected, untouched_layers
from qsae_kit.lm.hooked import WRITES, HookedLM, Now
from qsae_kit.lm.prefix import shared_prefix
from qsae_kit.sae.filter import NormFilter
from qsae_kit.steer.changes import (
    Change,
    Condition,
    FeatureSet,
    Steering,
    project_out,
    read_steering,
    without,
)
from qsae_kit.steer.directions import (
    INTERVENTIONS,
    Direction,
    done_along,
    intervention_of,
    usual_means,
)

SITE = "blocks.3.hook_resid_post"
SYSTEM = {"role": "system", "content": "You answer every question in one short sentence, politely."}
QUESTIONS = ("Who is Ana?", "Where does Tom live?", "How do I thank the nurse?", "Hi.")


@pytest.fixture(scope="module")
def unit(lm):
    generator = torch.Generator().manual_seed(5)
    return torch.nn.functional.normalize(torch.randn(lm.d_model, generator=generator), dim=0)


@pytest.fixture(scope="module")
def suite(lm):
    return small_suite(lm)


def chats(lm):
    """Chats that begin with the same tokens."""
    return [lm.chat_tokens([SYSTEM, {"role": "user", "content": text}]) for text in QUESTIONS]


def baked(lm, unit, share):
    """The same model with the direction taken out of every matrix that writes to the residual
    stream.
    """
    twin = copy.deepcopy(lm.hf)
    out = torch.eye(len(unit)) - share * torch.outer(unit, unit)
    with torch.no_grad():
        embedding = twin.get_input_embeddings()
        rows = embedding.weight @ out.T
        head = torch.nn.Linear(*reversed(embedding.weight.shape), bias=False)
        head.weight = torch.nn.Parameter(twin.get_output_embeddings().weight.clone())
        twin.lm_head = head
        twin.config.tie_word_embeddings = False
        embedding.weight = torch.nn.Parameter(rows)
        for layer in twin.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight.copy_(out @ module.weight)
    return HookedLM(twin, lm.tokenizer, lm.model_name)


@pytest.mark.parametrize("share", [0.5, 1.0, 1.5])
def test_projecting_out_everywhere_is_what_changed_weights_would_do(lm, unit, share):
    ids, mask = lm.pad(chats(lm), "left")
    with applied(lm, [project_out(WRITES, unit, "every", share)]):
        edited = lm(ids, mask)
    expected = baked(lm, unit, share)(ids, mask)
    real = mask.bool()
    torch.testing.assert_close(edited[real], expected[real], rtol=1e-3, atol=2e-3)
    assert (edited - lm(ids, mask))[real].abs().max() > 0.1


def test_nothing_of_the_direction_is_left_in_the_stream(lm, unit):
    ids, mask = lm.pad(chats(lm), "left")
    names = [f"blocks.{i}.hook_resid_post" for i in range(lm.n_layers)]
    with applied(lm, [project_out(WRITES, unit, "every")]):
        _, cache = lm.run_with_cache(ids, mask, names_filter=names, return_type=None)
    for name in names:
        part = (cache[name] @ unit)[mask.bool()]
        assert part.abs().max() < 1e-3 * cache[name].norm(dim=-1).max()


def test_an_answer_is_the_same_with_the_cache_on_and_off(lm, unit):
    edits = [project_out(WRITES, unit, "every", 0.7)]
    with applied(lm, edits):
        on, off = (lm.generate(QUESTIONS, 12, use_cache=cached).tokens for cached in (True, False))
    assert on == off


def test_every_token_is_every_one_but_padding(lm):
    ids, mask = lm.pad(chats(lm), "left")
    assert selected(Now(ids, mask, 0, lm.markers), "every").equal(mask.bool())
    later = selected(Now(ids, mask, 5, lm.markers), "every")
    assert later.equal(mask.bool()[:, 5:])


def test_what_is_written_is_known_and_a_detector_comes_too_late_for_it(unchecked, lm, unit, suite):
    names = lm.writes()
    assert names[0] == "hook_embed"
    assert len(names) == 1 + 2 * lm.n_layers
    edit = project_out(WRITES, unit, "every")
    assert untouched_layers(lm, [edit]) == 0
    late = Change("project_out", SITE, direction=tuple(unit.tolist()), everywhere=True)
    assert late.edit({}).hook_name == WRITES
    decided = replace(late, when=Condition("v", SITE, (1,)))
    with pytest.raises(ValueError, match="comes too late"), applied(lm, [decided.edit(suite)]):
        pass


# --- rows that begin alike


def test_what_rows_share_is_run_once_and_changes_no_figure(lm, unit):
    rows = chats(lm)
    known = KnownRows(lm, rows, batch=3)
    assert known.prefix == shared_prefix(rows)
    assert len(known.prefix) >= 16
    assert all(row[: len(known.prefix)] == known.prefix for row in rows)
    header = Edit(SITE, lambda x: 3 * unit.expand_as(x), "header")
    for edits in ([], [project_out(WRITES, unit, "every")], [header]):
        with applied(lm, edits):
            whole = [lm(torch.tensor([row]))[0, -1] for row in rows]
        torch.testing.assert_close(
            known.last_logits(edits), torch.stack(whole), rtol=1e-3, atol=2e-3
        )
    answers = [lm.tokenizer("Yes, she is.").input_ids] * len(rows)
    with_answers = KnownRows(lm, rows, answers)
    for row, answer, logits in zip(rows, answers, with_answers.answer_logits(), strict=True):
        plain = lm(torch.tensor([row + answer]))[0, len(row) - 1 : -1]
        torch.testing.assert_close(logits, plain, rtol=1e-3, atol=2e-3)


def test_answers_behind_a_shared_prefix_are_the_same(lm, unit):
    system = {"role": "system", "content": "You answer every question in one short sentence."}
    asked = ["What is the capital of Norland?", "Tell me how to bake a cake, please.", "Hi"]
    chats = [[system, {"role": "user", "content": text}] for text in asked]
    for positions in ("every", "all", "header", "answer"):
        edit = Edit(SITE, lambda x: 3 * unit.expand_as(x), positions)
        for drawn in ({}, {"do_sample": True, "seed": 1}):
            with applied(lm, [edit]):
                whole = lm.generate(chats, 8, **drawn)
                shared = lm.generate(chats, 8, share_prefix=True, **drawn)
            assert shared.tokens == whole.tokens
    # of several assistant headers the last one counts
    turns = [
        [system, *({"role": role, "content": text} for role, text in turn), *chat[1:]]
        for chat in chats
        for turn in [(("user", "Who are you?"), ("assistant", "A friend of yours."))]
    ]
    for positions in ("header", "prompt", "answer", "all"):
        with applied(lm, [Edit(SITE, lambda x: 100 * unit.expand_as(x), positions)]):
            whole, shared = (lm.generate(turns, 8, share_prefix=on) for on in (False, True))
            assert shared.tokens == whole.tokens
            assert shared.logprobs[0] == pytest.approx(whole.logprobs[0], abs=1e-3)
    heard = []
    with lm.hooks(fwd_hooks=[(SITE, lambda x, hook: heard.append(x.shape[:2]))]):
        lm.generate(chats, 1, share_prefix=True)
        answer_all(lm, chats, [], 1, None)
    # somebody else's hook is not shown rows that stand for all
    assert [shape[0] for shape in heard] == [1, 3, 3]


@pytest.mark.parametrize(
    ("rows", "n"),
    [
        ([list(range(40)), [*range(30), 99]], 30),
        ([list(range(40)), list(range(20))], 19),  # the last token of a row is never shared
        ([list(range(40)), [*range(10), 99]], 0),
        ([], 0),
    ],
)
def test_the_shared_prefix(rows, n):
    assert shared_prefix(rows) == list(range(n))


def test_first_kl_is_that_of_the_distributions(lm, unit):
    rows = chats(lm)
    known, edits = KnownRows(lm, rows), [project_out(WRITES, unit, "every")]
    found = known.first_kl(known.last_logits(edits))
    for row, kl in zip(rows, found, strict=True):
        ids = torch.tensor([row])
        clean = torch.distributions.Categorical(logits=lm(ids)[0, -1])
        with applied(lm, edits):
            edited = torch.distributions.Categorical(logits=lm(ids)[0, -1])
        expected = torch.distributions.kl_divergence(clean, edited)
        torch.testing.assert_close(kl, expected.detach(), rtol=1e-2, atol=1e-4)


# --- values


def test_a_direction_made_orthogonal(unit):
    means = torch.randn(2, len(unit), generator=torch.Generator().manual_seed(1))
    left = without(unit, means.tolist())
    assert left.norm() == pytest.approx(1)
    assert (means @ left).abs().max() < 1e-4
    torch.testing.assert_close(without(3 * unit, []), unit)
    twice = [*means.tolist(), (2 * means[1]).tolist()]  # says nothing new
    torch.testing.assert_close(without(unit, twice), left)
    with pytest.raises(ValueError, match="is a sum of those"):
        without(means[0] - 2 * means[1], means.tolist())


def test_every_intervention_along_features_and_along_a_vector(lm, suite):
    sae = suite["v"][SITE]
    chosen = FeatureSet((1, 4), (2.0, -1.0))
    mean = tuple(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(2)).tolist())
    unit = without(chosen.direction(sae), [mean])
    x = torch.randn(1, 3, lm.d_model, generator=torch.Generator().manual_seed(3))
    own = Direction(SITE, "v", chosen, orthogonal_to=(mean,))
    vector = Direction(
        SITE,
        vector=tuple(unit.tolist()),
        median_norm=sae.origin.filter.median,
    )
    for name, (action, positions, everywhere) in INTERVENTIONS.items():
        for direction in (own, vector):
            change = direction.change(name, 0.7)
            assert intervention_of(change) == name
            edit = change.edit(suite)
            assert (edit.hook_name == WRITES) == everywhere
            assert edit.positions == positions
            expected = 0.7 * sae.origin.filter.median * unit.expand_as(x)
            if action == "project_out":
                expected = -0.7 * (x @ unit)[..., None] * unit
            torch.testing.assert_close(edit.delta(x), expected, rtol=1e-4, atol=1e-4)
            steering = Steering((change,))
            assert read_steering(steering.to_json(suite), suite) == steering
        assert done_along(name, 0.7)
    with pytest.raises(ValueError, match="no intervention 'wish'; choose from add_header"):
        own.change("wish", 1.0)
    with pytest.raises(ValueError, match="none of the interventions"):
        intervention_of(Change("ablate", SITE, "v", (1,)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action": "add", "everywhere": True, "median_norm": 1.0}, "project_out can be"),
        ({"action": "project_out", "orthogonal_to": ((float("nan"),),)}, "finite values"),
        (
            {"action": "project_out", "everywhere": True, "hook_name": "blocks.3.attn.hook_z"},
            "at the site alone",
        ),
    ],
)
def test_changes_that_cannot_be(lm, fields, message):
    with pytest.raises(ValueError, match=message):
        Change(**{"hook_name": SITE, "direction": (1.0,) * lm.d_model} | fields)


def test_usual_means_are_means_of_what_follows_the_shared_prefix(lm):
    prompts = [*QUESTIONS, *(f"Where does {name} live?" for name in ("Tom", "Ana"))]
    ids = [lm.chat_tokens(prompt) for prompt in prompts]
    n = next(i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
    assert n > 1
    at_last, over_all = usual_means(lm, {SITE: NormFilter(1.0, 1e9)}, prompts)[SITE]
    rows = [
        lm.run_with_cache(torch.tensor([row]), names_filter=SITE, return_type=None)[1][SITE][0]
        for row in ids
    ]
    last = torch.stack([x[-1] for x in rows]).mean(0)
    every = torch.stack(list(chain.from_iterable(x[max(n, 1) :] for x in rows))).mean(0)
    torch.testing.assert_close(torch.tensor(at_last), last, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(over_all), every, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("positions", ["header", "all", "every"])
def test_plain_text_has_no_chat_whose_parts_a_policy_could_name(lm, unit, positions):
    edit = Edit(SITE, lambda x: 3 * unit.expand_as(x), positions)
    assert plain_kl(lm, ["The river rises in the hills."], [edit]) > 0


def test_the_price_figure_shows_each_rate_at_its_price():
    row = {"prompt_kind": "harmful", "refusal_rate": 0.2, "ci_low": 0.1, "ci_high": 0.3}
    kl = {"kl_first": 0.03, "kl_first_low": 0.02, "kl_first_high": 0.05}
    ours = {"intervention": "features", "strength": 1.0, "chosen": True}
    dose = ours | {"prompt_kind": "harmless", "chosen": False} | kl
    other = dose | {"prompt_kind": "borderline", "kl_first": 9.0}
    table = pd.DataFrame([ours | row | {"kl_first": 7.0}, dose, other])
    figure = price_figure(table, "harmful", "harmless")
    (trace,) = [trace for trace in figure.data if trace.name == "SAE features"]
    assert (trace.x, trace.y) == ((0.03,), (0.2,))
    assert trace.error_x.array == pytest.approx((0.02,))
    assert trace.error_y.arrayminus == pytest.approx((0.1,))

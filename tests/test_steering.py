"""Steering as values: what each change does, conditions, composition, files."""

import json
import os
import random
import sys
from dataclasses import replace

import pytest
import torch
from small import SITES, small_suite

import qsae_kit
from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import kept_rows
from qsae_kit.lm.edits import POLICIES, Detector, Edit, applied, selected
from qsae_kit.lm.hooked import Now
from qsae_kit.sae import JumpReLUSAE, Provenance
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.suites import Suite
from qsae_kit.steer.changes import (
    ACTIONS,
    Change,
    Condition,
    Steering,
    load_steering,
    read_steering,
)
from qsae_kit.steer.choose.detector import best_cut, detector_scores, find_detector

PROMPTS = [
    "How do I thank the nurse?",
    "Which illness does Ada Reyes have?",
    "I want to cut the wood. How?",
]


@pytest.fixture(scope="module")
def suite(lm):
    return small_suite(lm)


def delta(change, suite, x):
    return change.edit(suite).delta(x)


def test_every_action_by_its_formula(suite):
    sae = suite["v"][SITES[1]]
    x = 20 * torch.randn(2, 3, sae.d_in, generator=torch.Generator().manual_seed(0))
    f, rows, median = sae.encode(x)[..., [3, 5]], sae.W_dec[[3, 5]], sae.provenance.filter.median
    at = {"hook_name": SITES[1], "variant": "v", "features": (3, 5)}
    unit = torch.nn.functional.normalize(2 * rows[0] - rows[1], dim=0)
    expected = {
        "add": (0.7 * median * unit).expand_as(x),
        "clamp": (0.7 * median - f) @ rows,
        "scale": (0.7 - 1) * f @ rows,
        "ablate": -f @ rows,
        "project_out": -0.7 * (x @ unit)[..., None] * unit,
    }
    assert set(expected) == set(ACTIONS)
    for action, wanted in expected.items():
        weights = {"weights": (2.0, -1.0)} if action in ("add", "project_out") else {}
        torch.testing.assert_close(
            delta(Change(action, strength=0.7, **at, **weights), suite, x),
            wanted,
            atol=1e-4,
            rtol=1e-5,
        )
    direction = tuple((3 * unit).tolist())
    added = Change("add", SITES[1], direction=direction, strength=0.7, median_norm=median)
    torch.testing.assert_close(delta(added, Suite({}), x), expected["add"], atol=1e-4, rtol=1e-5)
    gone = Change("project_out", SITES[1], direction=direction)
    assert ((x + delta(gone, Suite({}), x)) @ unit).abs().max() < 1e-4


@torch.no_grad()
def test_changes_of_several_sites_compose(lm, suite):
    one = Steering((Change("add", SITES[0], "v", (1,), strength=0.5, positions="all"),))
    two = Steering((Change("ablate", SITES[1], "v", (0, 2), positions="all"),))
    ids, mask = lm.pad([lm.chat_tokens(PROMPTS[0], False)])
    both = one + two
    with applied(lm, both.edits(suite)):
        together = lm(ids, mask)
    with applied(lm, one.edits(suite)), applied(lm, two.edits(suite)):
        assert torch.equal(lm(ids, mask), together)
    assert both.times(2).changes[0].strength == 1.0


def test_chosen_positions_are_counted_without_padding(lm):
    for side in ("left", "right"):
        ids, mask = lm.pad([lm.chat_tokens(p, False) for p in PROMPTS], side)
        now = Now(ids, mask, 0, lm.markers)
        where = selected(now, (2, 5))
        assert [sorted(now.logical[r][where[r]].tolist()) for r in range(3)] == [[2, 5]] * 3
    for wrong in ((), (0, 3), (-1,)):
        with pytest.raises(ValueError, match="from 1 on"):
            selected(now, wrong)


@torch.no_grad()
@pytest.mark.parametrize("span", ["token", "so_far"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_condition_opens_where_its_detector_fires(lm, span, side):
    ids, mask = lm.pad([lm.chat_tokens(p, False) for p in PROMPTS], side)
    token = lm.to_single_token(" the")
    seen = Detector(SITES[0], lambda x: (lm.now.ids[:, lm.now.start :] == token).float(), 0.5, span)
    plain = lm(ids, mask)
    edit = Edit("blocks.5.hook_resid_post", lambda x: 30 * torch.ones_like(x), "all", seen)
    with applied(lm, [edit]):
        changed = (lm(ids, mask) != plain).any(-1)
    now = Now(ids, mask, 0, lm.markers)
    fires = (ids == token) & selected(now, "all")
    wanted = (fires.cummax(1).values if span == "so_far" else fires) & selected(now, "all")
    assert torch.equal(changed, wanted)
    assert (wanted[0].any() and not wanted[1].any()) or span == "token"


def test_a_condition_that_held_before_holds_with_a_cache_too(lm):
    """The detector fires on a token of the prompt, the edit is made at answer tokens, one pass
    each.
    """
    token = lm.to_single_token(" the")
    seen = Detector(
        SITES[0],
        lambda x: (lm.now.ids[:, lm.now.start :] == token).float(),
        0.5,
        "so_far",
        "prompt",
    )
    unit = torch.nn.functional.normalize(torch.ones(lm.d_model), dim=0)
    edit = Edit("blocks.4.hook_resid_post", lambda x: (600.0 * unit).expand_as(x), "answer", seen)
    plain = lm.generate(PROMPTS, 8, enable_thinking=False).tokens
    with applied(lm, [edit]):
        cached = lm.generate(PROMPTS, 8, enable_thinking=False).tokens
        uncached = lm.generate(PROMPTS, 8, enable_thinking=False, use_cache=False).tokens
    assert cached == uncached
    assert [a != b for a, b in zip(cached, plain, strict=True)] == [True, False, True]


@pytest.mark.parametrize("span", ["token", "so_far"])
def test_a_condition_of_several_features_gates_a_generation(lm, suite, span):
    """The answers under a condition are those of a detector that reads the sum by hand."""
    sae, sites = suite["v"][SITES[0]], SITES[:2]
    ids, weights = (4, 7, 9), (1.0, -0.5, 2.0)
    seen = {}

    def total(x):
        f = sae.encode(x)
        found = f[..., 4] - 0.5 * f[..., 7] + 2 * f[..., 9]
        seen["highest"] = max(seen.get("highest", 0.0), float(found.max()))
        return torch.where(sae.provenance.filter.keeps(x), found, -torch.inf)

    with applied(lm, [Edit(sites[1], torch.zeros_like, "all", Detector(sites[0], total, 0.0))]):
        lm.generate(PROMPTS, 1, enable_thinking=False)
    threshold = 0.5 * seen["highest"]
    by_hand = Detector(sites[0], total, threshold, span)
    condition = Condition("v", sites[0], ids, weights, threshold, span)
    unit = torch.nn.functional.normalize(torch.ones(lm.d_model), dim=0)
    direction = tuple(unit.tolist())
    made = Change("add", sites[1], direction=direction, median_norm=600.0, positions="all")
    plain = lm.generate(PROMPTS, 8, enable_thinking=False).tokens
    told = []
    for when in (by_hand, condition.detector(sae)):
        edit = Edit(sites[1], lambda x: (600.0 * unit).expand_as(x), "all", when)
        for use_cache in (True, False):
            with applied(lm, [edit]):
                said = lm.generate(PROMPTS, 8, enable_thinking=False, use_cache=use_cache)
            told.append(said.tokens)
    whole = Steering((replace(made, when=condition),))
    with applied(lm, whole.edits(suite)):
        told.append(lm.generate(PROMPTS, 8, enable_thinking=False).tokens)
    assert all(tokens == told[0] for tokens in told)
    assert told[0] != plain


def test_a_detector_is_shut_at_sinks_whatever_its_threshold(suite):
    sae = suite["v"][SITES[0]]
    x = torch.zeros(1, 2, sae.d_in)
    x[0, 1] = 100 * sae.provenance.filter.median
    assert (Condition("v", SITES[0], (1,), (), -1.0).detector(sae).read(x) > -1.0).tolist() == [
        [True, False]
    ]


@torch.no_grad()
def test_a_detector_may_not_come_after_its_edit_and_rows_can_be_chosen(unchecked, lm, suite):
    late = Change("add", SITES[0], "v", (1,), when=Condition("v", SITES[1], (3,)))
    with pytest.raises(ValueError, match="too late"), applied(lm, [late.edit(suite)]):
        pass
    ids, mask = lm.pad([lm.chat_tokens(PROMPTS[0], False)] * 2)
    plain = lm(ids, mask)
    with applied(
        lm, [Change("add", SITES[0], "v", (1,)).edit(suite)], rows=torch.tensor([False, True])
    ):
        changed = (lm(ids, mask) != plain).any(-1).any(-1)
    assert changed.tolist() == [False, True]


def test_a_detector_tells_two_kinds_of_prompts_apart(unchecked, lm):
    chats = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": "Yes."}] for p in PROMPTS
    ]
    x = kept_rows(lm, [SITES[0]], next(iter(token_batches(lm, chats))))[SITES[0]]
    sae = JumpReLUSAE(
        lm.d_model,
        128,
        2.0,
        Provenance("tiny", SITES[0], NormFilter(float(x.norm(dim=-1).median()))),
    )
    sae.init_from_rows(x, torch.Generator().manual_seed(0))
    suite = Suite.of_one(sae.requires_grad_(False), "v")
    first, second = [PROMPTS[0], "How can I thank the nurse?"], PROMPTS[1:]
    found = find_detector(lm, suite, first, second, "prompt", False)
    own = suite["v"][found.condition.hook_name]
    peaks = [
        detector_scores(lm, own, found.condition, prompts, False) for prompts in (first, second)
    ]
    assert found.missed == float((peaks[0] <= found.condition.threshold).float().mean()) == 0
    assert found.false_alarms == float((peaks[1] > found.condition.threshold).float().mean()) == 0
    row = lm.chat_tokens(first[0], False)
    with torch.no_grad():
        _, cache = lm.run_with_cache(torch.tensor([row]), names_filter=[found.condition.hook_name])
    where = selected(Now(*lm.pad([row]), 0, lm.markers), "prompt")[0]
    (feature,) = found.condition.features
    direct = own.encode(cache[found.condition.hook_name][0])[where, feature].max()
    torch.testing.assert_close(peaks[0][0], direct)
    with pytest.raises(ValueError, match="both kinds"):
        find_detector(lm, suite, [], second)


def test_the_best_cut_is_the_best_of_all_thresholds():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        on, off = (
            (torch.randn(n, 6, generator=generator) + shift).clamp(min=0)
            for n, shift in ((9, 0.6), (14, 0.0))
        )
        cut = best_cut(on, off)
        errors = [
            float((on[:, i] <= t).float().mean() + (off[:, i] > t).float().mean())
            for i in range(6)
            for t in torch.cat([on, off])[:, i]
        ]
        missed, false = (on[:, cut.feature] <= cut.threshold), (off[:, cut.feature] > cut.threshold)
        assert (cut.missed, cut.false_alarms) == pytest.approx(
            (float(missed.float().mean()), float(false.float().mean()))
        )
        assert cut.missed + cut.false_alarms == pytest.approx(min(errors), abs=1e-3)


def test_a_cut_misses_what_cannot_be_had_without_false_alarms():
    on, off = torch.tensor([[9.0]] * 9 + [[0.0]]), torch.tensor([[0.0]] * 19 + [[6.0]])
    # halfway down to 0 there would be a false alarm
    assert best_cut(on, off)[:4] == pytest.approx((0, 7.5, 0.1, 0.0))
    assert best_cut(0 * on, 0 * off).missed == 1


def random_steering(rng, suite):
    """One to three changes at random sites, policies, strengths and conditions."""
    changes = []
    for _ in range(rng.randint(1, 3)):
        action, name = rng.choice(ACTIONS), rng.choice(SITES)
        policy = rng.choice(
            [*POLICIES, "answer", "header", "all", tuple(rng.sample(range(1, 30), 4))]
        )
        when = None
        if rng.random() < 0.3:
            early = [
                site
                for site in SITES
                if site <= name
                and not (
                    site.endswith("resid_post") and name.endswith("mlp_out") and site[7] == name[7]
                )
            ]
            watched = tuple(rng.sample(range(64), rng.randint(1, 3)))
            when = Condition(
                "v",
                rng.choice(early),
                watched,
                tuple(rng.uniform(-0.5, 1) for _ in watched),
                rng.random(),
                rng.choice(["token", "so_far"]),
                rng.choice(POLICIES),
            )
        features = tuple(rng.sample(range(64), rng.randint(1, 4)))
        strength = {
            "add": rng.choice((-1, 1)) * rng.uniform(1, 4),
            "clamp": rng.uniform(0, 2),
            "scale": rng.uniform(0, 9),
        }.get(action, 1.0)
        changes.append(
            Change(action, name, "v", features, strength=strength, positions=policy, when=when)
        )
    return Steering(tuple(changes))


@pytest.mark.slow
def test_two_hundred_random_steerings_act_alike_with_the_cache_on_off_streamed_and_batched(
    lm, suite
):
    """Top-2 gaps under 1e-4 may go either way; they are counted."""
    rng, ties, changed = random.Random(0), 0, 0
    for _ in range(200):
        steering = read_steering(random_steering(rng, suite).to_json(suite), suite)
        options = {"max_new_tokens": 6, "enable_thinking": rng.random() < 0.3}
        one = rng.randrange(len(PROMPTS))
        with applied(lm, steering.edits(suite), rows=torch.tensor([False, True, True, True])):
            plain, *cached = lm.generate([PROMPTS[one], *PROMPTS], **options).tokens
        with applied(lm, steering.edits(suite)):
            uncached = lm.generate(PROMPTS, use_cache=False, **options).tokens
            streamed = "".join(part for (part,) in lm.stream(PROMPTS[one], **options))
        changed += cached[one] != plain
        others = [*enumerate(uncached), (one, _ids_of(lm, streamed, cached[one]))]
        for i, other in others:
            if cached[i] != other:
                first = next(
                    k for k, (a, b) in enumerate(zip(cached[i], other, strict=False)) if a != b
                )
                ids = lm.chat_tokens(PROMPTS[i], options["enable_thinking"]) + cached[i][:first]
                with torch.no_grad(), applied(lm, steering.edits(suite)):
                    best = lm(torch.tensor([ids]))[0, -1].topk(2).values
                assert best[0] - best[1] < 1e-4
                ties += 1
    assert changed > 60
    assert ties <= 5


@torch.no_grad()
def test_in_bfloat16_a_cached_batch_and_a_single_pass_agree_within_a_quarter_of_a_nat(suite):
    """Log-probabilities of the tokens that were generated; measured: 0.07 nats at most, the 95th
    percentile 0.04.
    """
    rng, half = random.Random(0), qsae_kit.load_model("tiny", dtype=torch.bfloat16)
    for _ in range(30):
        edits = random_steering(rng, suite).edits(suite)
        with applied(half, edits):
            batched = half.generate(PROMPTS, max_new_tokens=6, enable_thinking=False)
        for prompt, tokens, logprobs in zip(PROMPTS, batched.tokens, batched.logprobs, strict=True):
            ids = half.chat_tokens(prompt, False) + tokens
            with applied(half, edits):
                alone = half(torch.tensor([ids]))[0].float().log_softmax(-1)[-len(tokens) - 1 : -1]
            said = alone.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(said, torch.tensor(logprobs), atol=0.25, rtol=0)


def _ids_of(lm, text, tokens):
    """The tokens where a text is theirs, else the text's own."""
    same = lm.tokenizer.decode(tokens, skip_special_tokens=True) == text
    return tokens if same else lm.tokenizer(text, add_special_tokens=False).input_ids


def test_a_steering_is_saved_and_loaded_with_its_saes_checked(unchecked, suite, tmp_path):
    steering = Steering(
        (
            Change(
                "add",
                SITES[1],
                "v",
                (1, 2),
                (1.0, -2.0),
                strength=-0.5,
                positions="answer",
                when=Condition("v", SITES[0], (4, 7), (1.0, -0.5), -1.5, "token", (3, 9)),
            ),
            Change("project_out", SITES[0], direction=tuple(range(1, 161)), positions=(3, 4)),
        )
    )
    steering.save(tmp_path / "s.json", suite)
    assert load_steering(tmp_path / "s.json", suite) == steering
    other = Suite(
        {"v": {name: JumpReLUSAE(160, 64, 8.0, sae.provenance) for name, sae in suite["v"].items()}}
    )
    with pytest.raises(ValueError, match="made for another SAE"):
        load_steering(tmp_path / "s.json", other)
    with pytest.raises(ValueError, match="has no SAE"):
        load_steering(tmp_path / "s.json", Suite({}))
    with pytest.raises(ValueError, match="no file"):
        load_steering(tmp_path / "none.json", suite)
    about = json.loads((tmp_path / "s.json").read_text())
    for wrong in (
        "[]",
        "{",
        "{}",
        json.dumps(about | {"qsae_kit_steering": 9}),
        json.dumps(about | {"changes": [{"action": "add", "x": 1}]}),
    ):
        with pytest.raises(ValueError, match=r"no steering|format 9"):
            read_steering(wrong, suite)


@pytest.mark.parametrize(
    "damage",
    [
        {"features": ["1"]},
        {"features": "12"},
        {"features": 5},
        {"features": [[1]]},
        {"features": [True]},
        {"features": [1.0]},
        {"hook_name": {}},
        {"variant": 3},
        {"strength": "1"},
        {"strength": 10**400},
        {"positions": [1.5]},
        {"positions": None},
        {"when": {"variant": "v", "hook_name": SITES[0], "features": ["3"]}},
        {"when": []},
        {"weights": [None]},
        {"direction": ["x"]},
    ],
)
def test_a_damaged_file_is_said_to_be_one(unchecked, suite, damage):
    about = json.loads(Steering((Change("add", SITES[1], "v", (1,)),)).to_json(suite))
    about["changes"][0] |= damage
    with pytest.raises(ValueError, match="no steering"):
        read_steering(json.dumps(about), suite)
    with pytest.raises(ValueError, match="no steering"):
        read_steering(json.dumps(about | {"saes": 3}), suite)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"median_norm": float("inf")}, "not JSON"),
        ({"median_norm": float("nan")}, "not JSON"),
        ({"median_norm": -1.0}, "finite number above 0; -1 was given"),
        ({"median_norm": 0.0}, "finite number above 0; 0 was given"),
        ({"median_norm": 1e308}, "finite number above 0"),
        ({"strength": 1e308}, r"strength of 1e\+308 was given"),
        ({"strength": 10**5000}, "not JSON|no steering"),
        ({"direction": [1.0]}, "direction of 1 values was given, but .* a model of 160"),
        ({"direction": [1.0] * 161}, "direction of 161 values"),
        ({"direction": [1e308] * 160}, "no length, or values"),
        ({"direction": [1e-320] * 160}, "no length, or values"),
        ({"positions": [10**30]}, "no steering"),
        ({"positions": [2**31 + 1]}, "no steering"),
        ({"when": {"variant": "v", "hook_name": SITES[0], "features": [10**30]}}, "no steering"),
        ({"hook_name": ["x" * 10**6]}, "no steering"),
    ],
)
def test_absurd_entries_of_a_file_are_one_sentence(unchecked, suite, damage, message):
    made = Change("add", SITES[1], direction=(1.0,) * 160, median_norm=2.0)
    about = json.loads(Steering((made,)).to_json(suite))
    about["changes"][0] |= damage
    sys.set_int_max_str_digits(0)
    try:
        text = json.dumps(about)
    finally:
        sys.set_int_max_str_digits(4300)
    with pytest.raises(ValueError, match=message) as caught:
        read_steering(text, suite)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 300


def test_files_that_are_no_steering(unchecked, suite, tmp_path):
    for text in ("[" * 100_000, '{"qsae_kit_steering": ' + "[" * 90 + "]" * 90 + "}", "7", '"x"'):
        with pytest.raises(ValueError, match=r"no steering|format"):
            read_steering(text, suite)
    (tmp_path / "latin.json").write_bytes(b"\xff")
    os.mkfifo(tmp_path / "pipe.json")
    for name, message in (("latin.json", "not UTF-8"), ("pipe.json", "no regular file")):
        with pytest.raises(ValueError, match=message):
            load_steering(tmp_path / name, suite)


@pytest.mark.parametrize("action", ["add", "project_out"])
@pytest.mark.parametrize("width", [1, 159])
def test_directions_of_another_width_are_refused(unchecked, lm, suite, action, width):
    change = Change(action, SITES[1], direction=(1.0,) * width, median_norm=2.0)
    with pytest.raises(ValueError, match=f"direction of {width} values"):
        change.edit(suite)
    with pytest.raises(ValueError, match=rf"shape \[{width}\] was given for activations of 160"):
        change.edit(Suite({})).delta(torch.ones(1, 2, 160))


@pytest.mark.parametrize("value", [10**400, 1e7, float("nan"), -float("inf")])
def test_numbers_beyond_all_bounds_are_refused(unchecked, value):
    at = {"hook_name": SITES[1], "variant": "v"}
    for wrong in (
        lambda: Change("add", **at, features=(1,), strength=value),
        lambda: Change("add", **at, features=(1,), weights=(value,)),
        lambda: Change("add", **at, direction=(value, 1.0), median_norm=1.0),
        lambda: Change("add", **at, direction=(1.0, 1.0), median_norm=value),
        lambda: Change("add", **at, features=(1,), when=Condition("v", SITES[0], (1,), (), value)),
    ):
        with pytest.raises(ValueError, match="finite") as caught:
            wrong()
        assert type(caught.value) is ValueError


def test_whole_numbers_are_weights_too(unchecked, suite):
    x = torch.ones(1, 1, 160)
    whole = Change("add", SITES[1], "v", (1, 2), (1, -1)).edit(suite).delta(x)
    torch.testing.assert_close(
        whole, Change("add", SITES[1], "v", (1, 2), (1.0, -1.0)).edit(suite).delta(x)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": "melt", "features": (1,)}, "no action"),
        ({"action": "add", "features": (1,), "strength": float("nan")}, "finite number"),
        ({"action": "add"}, "features or a direction"),
        ({"action": "clamp", "direction": (1.0,)}, "is for features"),
        ({"action": "add", "direction": (0.0, 0.0), "median_norm": 1.0}, "no length"),
        ({"action": "add", "direction": (1.0,)}, "median norm"),
        ({"action": "add", "features": (1, 2), "weights": (1.0,)}, "as many finite weights"),
        ({"action": "add", "features": (1,), "positions": "everywhere"}, "no position policy"),
    ],
)
def test_impossible_changes(unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        Change(hook_name=SITES[1], **change)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"features": (1,), "threshold": float("inf")}, "finite threshold"),
        ({"features": (1,), "span": "ever"}, "a span of token or so_far"),
        ({"features": ()}, "without features"),
        ({"features": (1, 2)}, "2 features needs as many weights; 0 were given"),
        ({"features": (1, 2), "weights": (1.0,)}, "as many weights; 1 were given"),
        ({"features": (1,), "weights": (0.0,)}, "not all 0"),
        ({"features": (1,), "weights": (float("nan"),)}, "not all 0"),
        ({"features": (1,), "positions": "everywhere"}, "no position policy"),
    ],
)
def test_impossible_conditions(unchecked, condition, message):
    with pytest.raises(ValueError, match=message):
        Condition("v", SITES[0], **condition)


def test_a_steering_of_the_format_before_is_refused(unchecked, suite):
    about = json.loads(Steering((Change("add", SITES[1], "v", (1,)),)).to_json(suite))
    with pytest.raises(ValueError, match="has format 1; this version reads 2"):
        read_steering(json.dumps(about | {"qsae_kit_steering": 1}), suite)


def test_features_that_the_sae_does_not_have(unchecked, suite):
    for change in (
        Change("add", SITES[1], "v", (64,)),
        Change("ablate", SITES[1], "v", (-1,)),
        Change("add", SITES[1], "v", (1,), when=Condition("v", SITES[0], (99,))),
    ):
        with pytest.raises(ValueError, match="features 0 to 63"):
            change.edit(suite)

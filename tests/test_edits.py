"""Edits change what their policy names, and nothing else."""

import pytest
import torch

from qsae_kit.lm.chat import Phase
from qsae_kit.lm.edits import POLICIES, Edit, applied, selected
from qsae_kit.lm.hooked import Now
from qsae_kit.steer.changes import add_direction

LAST = "blocks.5.hook_resid_post"
CHATS = [
    [
        {"role": "user", "content": "How do I thank the nurse?"},
        {"role": "assistant", "content": "You can.", "reasoning_content": "I know."},
    ],
    [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}],
]


@pytest.fixture(scope="module")
def direction(lm):
    return torch.nn.functional.normalize(
        torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0)), dim=0
    )


def batch(lm, side="right"):
    return lm.pad([lm.chat_tokens(c, add_generation_prompt=False) for c in CHATS], side)


def tokens_of(lm, ids, where, row):
    return "".join(lm.to_str_tokens(ids[row][where[row]]))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("policy", "first", "second"),
    [
        ("prompt", "How do I thank the nurse?", "Hi."),
        (
            "header",
            "<|im_start|>assistant\n<think>\n</think>\n\n<|im_end|>\n",
            "<|im_start|>assistant\n<think>\n\n</think>\n\n<|im_end|>\n",
        ),
        ("thinking", "I know.\n", ""),
        (
            "answer",
            "<|im_start|>assistant\n<think>\nI know.\n</think>\n\nYou can.<|im_end|>\n",
            None,
        ),
        (
            "all",
            (
                "How do I thank the nurse?<|im_start|>assistant\n<think>\nI know.\n</think>\n\nYou"
                " can.<|im_end|>\n"
            ),
            None,
        ),
    ],
)
def test_policies_name_the_tokens_they_say(lm, side, policy, first, second):
    ids, mask = batch(lm, side)
    where = selected(Now(ids, mask, 0, lm.markers), policy)
    assert tokens_of(lm, ids, where, 0) == first
    if second is not None:
        assert tokens_of(lm, ids, where, 1) == second
    assert not where[mask == 0].any()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_strength_0_is_the_identity_and_others_change_exactly_the_policys_positions(
    lm, direction, policy, side
):
    ids, mask = batch(lm, side)
    plain = lm(ids, mask)
    with applied(lm, [add_direction(LAST, direction, 0.0, 50.0, policy)]):
        assert torch.equal(lm(ids, mask), plain)
    with applied(lm, [add_direction(LAST, direction, 0.7, 50.0, policy)]):
        changed = (lm(ids, mask) != plain).any(-1)
    assert torch.equal(changed, selected(Now(ids, mask, 0, lm.markers), policy))
    assert changed.any()


@torch.no_grad()
def test_an_earlier_layer_changes_no_earlier_position(lm, direction):
    ids, mask = batch(lm)
    plain = lm(ids, mask)
    with applied(lm, [add_direction("blocks.1.hook_resid_post", direction, 1.0, 50.0, "answer")]):
        changed = (lm(ids, mask) != plain).any(-1)
    where = selected(Now(ids, mask, 0, lm.markers), "answer")
    assert torch.equal(changed & mask.bool(), where.cummax(1).values & mask.bool())


def test_position_0_is_never_changed(lm):
    ids, mask = lm.to_batch(["plain text without a template"])
    now = Now(ids, mask, 0, None)
    assert selected(now, "all")[0].tolist() == [False] + [True] * (ids.shape[1] - 1)
    with pytest.raises(ValueError, match="no ChatML markers"):
        selected(now, "answer")


@torch.no_grad()
def test_a_mask_chooses_positions_and_its_shape_is_checked(lm, direction):
    ids, mask = batch(lm)
    chosen = torch.zeros_like(mask, dtype=torch.bool)
    chosen[0, 4] = True
    plain = lm(ids, mask)
    with applied(lm, [add_direction(LAST, direction, 1.0, 50.0, chosen)]):
        assert torch.equal((lm(ids, mask) != plain).any(-1), chosen)
    with (
        pytest.raises(ValueError, match="position mask"),
        applied(lm, [add_direction(LAST, direction, 1.0, 50.0, chosen[:, 1:])]),
    ):
        lm(ids, mask)


@pytest.mark.parametrize("policy", ["header", "answer", "all", "prompt"])
def test_edits_act_alike_with_the_cache_on_off_batched_and_streamed(lm, direction, policy):
    prompts = ["How do I thank the nurse?", "How do I cut the wood?"]
    edit = add_direction("blocks.3.hook_resid_post", direction, 1.2, 64.0, policy)
    options = {"max_new_tokens": 24, "enable_thinking": False}
    unedited = lm.generate(prompts, **options)
    with applied(lm, [edit]):
        cached = lm.generate(prompts, **options)
        alone = [lm.generate(p, **options).tokens[0] for p in prompts]
        uncached = lm.generate(prompts, use_cache=False, **options)
        streamed = [
            "".join(parts)
            for parts in zip(*lm.stream(prompts, 24, enable_thinking=False), strict=True)
        ]
    assert cached.tokens == uncached.tokens == alone
    assert cached.text == streamed
    assert lm.generate(prompts, **options) == unedited


def test_the_thinking_policy_follows_a_generation(lm, direction):
    seen = []

    def delta(x):
        seen.append((lm.now.start, lm.now.phase[0, -1].item()))
        return torch.zeros_like(x)

    opened = (
        lm.to_chat("How do I thank the nurse?", enable_thinking=True) + "<think>\nNobody is hurt"
    )
    with applied(lm, [Edit("blocks.0.hook_resid_post", delta, "thinking")]):
        out = lm.generate(opened, 40, chat=False)
    new = lm.to_string(out.tokens[0])
    assert "</think>" in new
    assert {phase for _, phase in seen} == {Phase.THINKING}
    # the prompt's three thinking tokens in one pass, then one pass a token until the model closes
    # its block
    assert len(seen) == len(lm.tokenizer(new.split("</think>")[0]).input_ids) + 1


def test_several_edits_add_up(lm, direction):
    ids, mask = batch(lm)
    one = add_direction(LAST, direction, 0.5, 50.0, "answer")
    with torch.no_grad(), applied(lm, [one, one]):
        twice = lm(ids, mask)
    with torch.no_grad(), applied(lm, [add_direction(LAST, direction, 1.0, 50.0, "answer")]):
        torch.testing.assert_close(lm(ids, mask), twice, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "policy", "message"),
    [("blocks.77.hook_mlp_out", "all", "no hook point"), (LAST, "reply", "no position policy")],
)
def test_errors(unchecked, lm, direction, name, policy, message):
    with (
        pytest.raises(ValueError, match=message),
        applied(lm, [add_direction(name, direction, 1.0, 1.0, policy)]),
    ):
        lm("Hello")

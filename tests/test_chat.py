"""Phases of chats, against the rendered text itself, and the bundled template against Qwen3's
stored renderings.
"""

import json
from pathlib import Path

import pytest
import torch

from qsae_kit.lm.chat import Phase, answer_start, find_markers, phases

CASES = json.loads(
    (Path(__file__).parent / "data" / "qwen3_template_cases.json").read_text(encoding="utf-8")
)
TEMPLATE, SYSTEM, USER, THINKING, ANSWER = (p.name for p in list(Phase)[1:])


def test_the_bundled_template_renders_as_qwen3s_does(lm):
    assert len(CASES) > 100
    for case in CASES:
        flags = {"enable_thinking": case["enable_thinking"]} if "enable_thinking" in case else {}
        text = lm.tokenizer.apply_chat_template(
            case["messages"],
            tokenize=False,
            add_generation_prompt=case["add_generation_prompt"],
            **flags,
        )
        assert text == case["text"], case["messages"]


def test_phases_of_a_chat_read_by_hand(lm):
    text = lm.to_chat(
        [
            {"role": "system", "content": "Be nice."},
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": "Good."},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Fine.", "reasoning_content": "I know this."},
        ],
        add_generation_prompt=False,
    )
    ids, mask = lm.to_batch([text])
    spans: list[tuple[str, str]] = []
    for token, phase in zip(
        lm.to_str_tokens(ids[0]), phases(ids, mask, lm.markers)[0], strict=True
    ):
        name = Phase(int(phase)).name
        if spans and spans[-1][0] == name:
            spans[-1] = (name, spans[-1][1] + token)
        else:
            spans.append((name, token))
    assert spans == [
        (TEMPLATE, "<|im_start|>system\n"),
        (SYSTEM, "Be nice."),
        (TEMPLATE, "<|im_end|>\n<|im_start|>user\n"),
        (USER, "Hello!"),
        (TEMPLATE, "<|im_end|>\n<|im_start|>assistant\n"),
        (ANSWER, "Good."),
        (TEMPLATE, "<|im_end|>\n<|im_start|>user\n"),
        (USER, "And?"),
        (TEMPLATE, "<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        (THINKING, "I know this.\n"),
        (TEMPLATE, "</think>\n\n"),
        (ANSWER, "Fine."),
        (TEMPLATE, "<|im_end|>\n"),
    ]
    start = int(answer_start(ids, mask, lm.markers)[0])
    assert lm.to_string(ids[0, start:]).startswith("<|im_start|>assistant\n<think>")


def test_phases_do_not_depend_on_padding(lm):
    texts = [
        lm.to_chat(p, enable_thinking=False) + "Yes." for p in ("Hello!", "How do I cut the wood?")
    ]
    right, left = lm.to_batch(texts), lm.to_batch(texts, padding_side="left")
    for r in range(2):
        one = phases(*right, lm.markers)[r][right.mask[r].bool()]
        other = phases(*left, lm.markers)[r][left.mask[r].bool()]
        assert torch.equal(one, other)
    assert (phases(*left, lm.markers)[left.mask == 0] == Phase.PADDING).all()


class _Pieces:
    """A tokenizer with ChatML markers that cuts "assistant" in two, as SmolLM2's does."""

    def __init__(self, **changed):
        self.table = {
            "<|im_start|>": [1],
            "<|im_end|>": [2],
            "system": [9],
            "user": [4],
            "assistant": [5, 6],
        } | changed

    def __call__(self, text, add_special_tokens=True):
        return type("Out", (), {"input_ids": self.table.get(text, [7, 7])})


def test_role_names_of_several_tokens():
    markers = find_markers(_Pieces())
    assert markers is not None
    assert markers.think_open == -1
    ids = torch.tensor([[1, 4, 3, 20, 21, 2, 3, 1, 5, 6, 3, 30, 31]])
    expected = [1, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1, 5, 5]
    assert phases(ids, torch.ones_like(ids), markers)[0].tolist() == expected
    assert answer_start(ids, torch.ones_like(ids), markers).tolist() == [7]


def test_no_markers_no_phases():
    assert find_markers(_Pieces(**{"<|im_start|>": [1, 1]})) is None
    assert find_markers(_Pieces(system=[4, 5])) is None


@pytest.mark.parametrize("text", ["Hello!", ""])
def test_a_chat_without_assistant_has_no_answer(lm, text):
    ids, mask = lm.to_batch([lm.to_chat(text or "x", add_generation_prompt=False)])
    assert int(answer_start(ids, mask, lm.markers)[0]) == ids.shape[1]

"""Dialogues that a model writes itself: its own answers, every fifth a stock refusal, readable as
training data; and requests that it writes itself.
"""

import re
from types import SimpleNamespace

import pytest

from qsae_kit.data import prompts as prompt_sets
from qsae_kit.data.companions import GENERAL, WORLD
from qsae_kit.data.readers import read_documents
from qsae_kit.data.written import (
    REFUSED_EVERY,
    SHOWN_ANSWER,
    _before_request,
    mixed_prompts,
    own_dialogues,
    self_asked,
    write_dialogues,
)
from qsae_kit.lm.answering import answer_all
from qsae_kit.world import world


def test_prompts_of_all_kinds_in_turn():
    texts = mixed_prompts(GENERAL, 9)
    known = [
        {p.text for p in GENERAL.prompts(kind, GENERAL.n_prompts(kind), "selection")}
        for kind in prompt_sets.KINDS
    ]
    assert [[text in texts_of_kind for texts_of_kind in known].index(True) for text in texts] == [
        0,
        1,
        2,
    ] * 3
    everything = mixed_prompts(GENERAL)
    assert len(everything) == len(set(everything)) == sum(map(len, known))
    assert set(everything[-9:]) <= known[1]  # what is left of the largest


def test_chats_are_the_models_own_but_for_stock_refusals(lm, tmp_path):
    texts = mixed_prompts(WORLD, 12)
    own = answer_all(lm, texts, [], 16, False).text
    path = tmp_path / "chats.jsonl"
    assert write_dialogues(lm, texts, path, 16) == 12
    chats = list(read_documents(path))
    assert chats == list(own_dialogues(lm, texts, 16))
    for i, chat in enumerate(chats):
        assert [m["role"] for m in chat] == ["user", "assistant"]
        assert chat[0]["content"] == texts[i]
        assert (chat[1]["content"] in prompt_sets.STOCK_REFUSALS) == (i % REFUSED_EVERY == 0)
        assert i % REFUSED_EVERY == 0 or chat[1]["content"] == own[i]


def words_of(texts):
    """Words, and single Chinese characters."""
    return set(re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", " ".join(texts).lower()))


def user_texts(messages):
    return [message["content"] for message in messages if message["role"] == "user"]


@pytest.mark.parametrize("examples", [None, []])
def test_requests_that_the_model_asks_itself(lm, examples):
    asked = self_asked(lm, 12, 3, examples, max_new_tokens=40, batch=6)
    assert len(asked) == len({text.casefold() for text in asked}) == 12
    assert asked == self_asked(lm, 12, 3, examples, max_new_tokens=40, batch=12)
    assert asked != self_asked(lm, 12, 4, examples, max_new_tokens=40, batch=12)
    for text in asked:
        assert text == text.strip() != ""
        assert len(lm.tokenizer(text).input_ids) < 40
        assert not any(odd in text for odd in ("<|im_end|>", "<|im_start|>", "<think>", "\ufffd"))
    known = words_of(text for d in world.dialogues(2000, seed=1) for text in user_texts(d.messages))
    words = words_of(asked)
    assert len(words & known) > 0.9 * len(words) > 20


def test_what_is_no_request_is_dropped(lm, monkeypatch):
    ids = lm.tokenizer(
        [
            "Who?<|im_end|>",
            "WHO? <|im_end|>",
            "<|im_end|>",
            "?!<|im_end|>",
            "cut off",
            "a<think>b<|im_end|>",
            "a<|im_start|>b<|im_end|>",
            "shown<|im_end|>",
            "here you are.<|im_end|>",
            "What now?<|im_end|>tail",
        ],
        add_special_tokens=False,
    ).input_ids
    told = []

    def generate(prompts, max_new_tokens, **options):
        told.append((prompts, options["seed"]))
        return SimpleNamespace(tokens=ids)

    monkeypatch.setattr(lm, "generate", generate)
    assert self_asked(lm, 3, 2, ["Shown"], batch=8) == ["Who?", "What now?"]
    assert [seeds[0] for _, seeds in told] == [2_000_000, 2_000_008, 2_000_016]
    chat = [
        {"role": "user", "content": "Shown"},
        {"role": "assistant", "content": SHOWN_ANSWER},
        {"role": "user", "content": "Hi there"},
    ]
    whole = lm.to_chat(chat, add_generation_prompt=False)
    assert {before + "Hi there<|im_end|>" for before in told[0][0]} == {whole.rstrip("\n")}
    ids[:] = ids[2:9]
    with pytest.raises(ValueError, match="wrote no request of at most 64 tokens in 16 draws"):
        self_asked(lm, 2, 0, ["Shown"], batch=8)
    monkeypatch.setattr(lm, "markers", None)
    with pytest.raises(ValueError, match="no ChatML markers"):
        self_asked(lm, 2)


def test_other_examples_are_shown_each_time(lm, monkeypatch):
    told = []

    def generate(prompts, max_new_tokens, **options):
        told.extend(prompts)
        return SimpleNamespace(tokens=[])

    monkeypatch.setattr(lm, "generate", generate)
    with pytest.raises(ValueError, match="wrote no request"):
        self_asked(lm, 1, batch=8)
    harmless = [p.text for p in WORLD.prompts("harmless", WORLD.n_prompts("harmless"), "selection")]
    shown = [tuple(text for text in harmless if f"\n{text}<|im_end|>" in each) for each in told]
    assert len(set(shown)) == 8
    assert {len(texts) for texts in shown} == {4}


def test_a_start_marker_that_both_template_and_tokenizer_write_is_written_once(lm, monkeypatch):
    def adding(text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[0] * add_special_tokens + [1])

    adding.bos_token = "<s>"
    monkeypatch.setattr(lm, "tokenizer", adding)
    monkeypatch.setattr(lm, "to_chat", lambda messages, **_: f"<s>user {messages[-1]['content']}")
    assert _before_request(lm, [], 0) == "user "

"""Reading documents, batching them, and the keep-mask."""

import json
import os

import pytest
import torch

from qsae_kit.data.benchmarks import read_bench
from qsae_kit.data.documents import (
    TokenPolicy,
    chat_prefix,
    keep_mask,
    read_documents,
    repeat,
    split_documents,
    token_batches,
    tokenize_document,
)
from qsae_kit.world import world

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def test_every_form_of_a_record_is_read(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [
        {"messages": CHAT},
        {"question": "Hi", "answer": "Hello!"},
        {"prompt": "Hi", "answer": "Hello!"},
        {"text": "plain"},
    ]
    path.write_text("\n\n".join(json.dumps(r) for r in records))
    assert list(read_documents(path)) == [CHAT, CHAT, CHAT, "plain"]
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["one", "two"]
    assert list(read_documents([CHAT, "text"])) == [CHAT, "text"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no dialogues"),
        ('{"text": "ok"}\n{"text": ', r"data.jsonl, line 2 is not JSON"),
        ('{"text": "ok"}\n\n{"content": "x"}', r"line 3: expected messages.*found content"),
        ('{"messages": []}', "line 1: expected messages"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "message 0 needs a role"),
        ('{"messages": [{"role": "user", "content": 5}]}', "content that is text"),
        ('{"text": "  "}', "the text is empty"),
        ("[1, 2]", "message 0"),
        ("7", "found int"),
    ],
)
def test_malformed_lines_are_named(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_documents(path))


def test_lines_end_with_line_ends_alone(tmp_path):
    odd = "a\u2028b\u2029c\x0bd\x0ce\x85f\rg"
    lines = ["\ufeff" + json.dumps({"text": odd}, ensure_ascii=False), json.dumps(odd)]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode())
    (tmp_path / "a.txt").write_bytes(f"{odd}\r\n\n{odd}".encode())
    for name in ("a.jsonl", "a.txt"):
        assert list(read_documents(tmp_path / name)) == [odd, odd]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ' + b"[" * 100_000, "line 2 is not JSON .it is nested deeper"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 2 is not JSON .Exceeds the limit"),
        (b'{"text": "\xff"}', "line 2 is not UTF-8"),
    ],
)
def test_lines_that_cannot_be_read_are_one_sentence(tmp_path, line, message):
    (tmp_path / "data.jsonl").write_bytes(b'"one"\n' + line)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_documents(tmp_path / "data.jsonl"))
    assert type(caught.value) is ValueError


def test_a_pipe_is_no_file_of_dialogues(tmp_path):
    os.mkfifo(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match="no regular file"):
        next(read_documents(tmp_path / "data.jsonl"))


def test_no_code_of_a_data_set_is_run(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append(kwargs["trust_remote_code"])
        return [{"text": "one", "Goal": "one"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_documents("someone/texts")) == ["one"]
    read_bench("jailbreakbench")
    assert asked == [False] * 3


def test_a_missing_file_is_not_taken_for_a_data_set():
    with pytest.raises(ValueError, match="There is no file"):
        next(read_documents("nowhere.jsonl"))


def test_batches_hold_every_token_once(lm):
    documents = [d.messages for d in world.dialogues(60, seed=3)]
    batches = list(token_batches(lm, documents, batch_tokens=600))
    rows = sorted(
        lm.to_string(b.ids[r][b.mask[r].bool()]) for b in batches for r in range(len(b.ids))
    )
    assert rows == sorted(lm.to_chat(d, add_generation_prompt=False) for d in documents)
    assert all(b.ids.numel() <= 600 for b in batches)
    padding = 1 - sum(int(b.mask.sum()) for b in batches) / sum(b.mask.numel() for b in batches)
    assert padding < 0.2  # like lengths went together


def test_keep_mask(lm):
    ids, mask = lm.to_batch([lm.to_chat(CHAT, add_generation_prompt=False), "x y"])
    keep = keep_mask(lm, ids, mask)
    assert not keep[:, 0].any()
    assert torch.equal(keep[:, 1:], mask[:, 1:].bool())
    content = keep_mask(lm, ids, mask, drop_template=True)
    assert lm.to_string(ids[0][content[0]]) == "HiHello!"


SYSTEM = "You answer shortly."
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    + SYSTEM
    + "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def kept_text(lm, batch, row):
    return lm.to_string(batch.ids[row][batch.keep[row]])


def test_what_all_chats_begin_with_is_not_kept(lm):
    """The bundled model has no default system prompt: only the header of the first turn goes."""
    assert lm.to_string(chat_prefix(lm)) == "<|im_start|>user\n"
    own = [{"role": "system", "content": SYSTEM}, *CHAT]
    [batch] = token_batches(lm, [CHAT, own, "user\nHi"], seed=None)
    rest = lm.to_chat(CHAT, add_generation_prompt=False).removeprefix("<|im_start|>user\n")
    assert kept_text(lm, batch, 0) == rest
    assert kept_text(lm, batch, 1).startswith(f"system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHi")
    assert kept_text(lm, batch, 2) == lm.to_string(lm.to_tokens("user\nHi")[0][1:])
    [whole] = token_batches(lm, [CHAT], policy=TokenPolicy(drop_prefix=False))
    assert kept_text(lm, whole, 0) == "user\n" + rest


def test_a_default_system_prompt_is_not_kept(lm, monkeypatch):
    monkeypatch.setattr(lm.tokenizer, "chat_template", WITH_DEFAULT)
    prefix = chat_prefix(lm)
    assert lm.to_string(prefix) == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    own = [{"role": "system", "content": "You answer at length."}, *CHAT]
    [batch] = token_batches(lm, [CHAT, own], seed=None)
    assert kept_text(lm, batch, 0).startswith("Hi<|im_end|>")
    assert kept_text(lm, batch, 1).startswith("system\nYou answer at length.<|im_end|>")
    rows = [tokenize_document(lm, CHAT, 512), tokenize_document(lm, own, 512)]
    ids, mask = lm.pad([*rows, rows[0][: len(prefix) - 2]], "left")
    keep = keep_mask(lm, ids, mask, drop_prefix=True)
    for row in range(2):
        assert lm.to_string(ids[row][keep[row]]) == kept_text(lm, batch, row)
    assert not keep[2].any()  # cut within the prefix


def test_a_model_without_chats_has_no_prefix(lm, monkeypatch):
    assert TokenPolicy().on(lm).drop_prefix
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    assert chat_prefix(lm) == []
    assert not TokenPolicy().on(lm).drop_prefix
    monkeypatch.setattr(lm.tokenizer, "chat_template", "{{ raise_exception('system first') }}")
    assert chat_prefix(lm) == []


def test_a_chat_that_ends_with_the_user_asks_for_an_answer(lm):
    for chat, asks in ((CHAT[:1], True), (CHAT, False), ([*CHAT, CHAT[0]], True)):
        written = lm.to_chat(chat, add_generation_prompt=asks)
        assert lm.to_string(tokenize_document(lm, chat, 512)) == written
        assert written.endswith("<|im_start|>assistant\n") == asks


def test_left_padding_drops_the_first_real_token(lm):
    ids, mask = lm.to_batch(["Hello there", "How do I cut the wood?"], padding_side="left")
    keep = keep_mask(lm, ids, mask)
    assert (keep.sum(1) == mask.sum(1) - 1).all()


def test_repeat_and_split():
    first, rest = split_documents(iter("abcdef"), 2)
    assert first == ["a", "c"]
    stream = repeat(rest)
    assert "".join(next(stream) for _ in range(9)) == "bdefbdefb"
    one, same = split_documents(["x"], 5)
    assert one == list(same) == ["x"]

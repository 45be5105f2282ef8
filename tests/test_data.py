"""Reading documents, batching them, and the keep-mask."""

from itertools import chain
from unittest.mock import Mock

import pytest
import torch

from qsae_kit.data.documents import (
    TokenPolicy,
    TokenStream,
    chat_prefix,
    keep_mask,
    phases_of,
    repeat,
    sequences,
    split_documents,
    token_batches,
    tokenize_document,
)
from qsae_kit.lm.chat import phases
from qsae_kit.world import world

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


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


def test_a_long_document_is_cut_into_several_sequences(lm):
    chat = [*CHAT, {"role": "user", "content": "Go on."}]
    chat.append({"role": "assistant", "content": "It goes on and on. " * 30})
    whole = tokenize_document(lm, chat, 10_000)
    [one] = token_batches(lm, [chat], policy=TokenPolicy(context_size=lm.context_size), seed=None)
    policy = TokenPolicy(True, context_size=40)
    batches = list(token_batches(lm, [chat, CHAT], batch_tokens=200, policy=policy, seed=None))
    rows = [b.ids[r][b.mask[r].bool()].tolist() for b in batches for r in range(len(b.ids))]
    assert list(chain(*rows[:-1])) == whole == one.ids[0].tolist()
    assert max(map(len, rows)) == 40
    told = torch.cat([phases_of(lm.markers, b)[b.mask.bool()] for b in batches])
    assert torch.equal(told[: len(whole)], phases(one.ids, one.mask, lm.markers)[0])
    kept = list(chain(*(b.ids[b.keep].tolist() for b in batches)))
    assert lm.to_string(kept).count("on and on") > 25  # the tail counts, template tokens do not
    assert lm.markers.end not in kept


def test_every_part_of_a_cut_text_begins_as_the_tokenizer_begins():
    begin, row = 7, list(range(20, 40))
    lm = Mock(markers=None, tokenizer=Mock(bos_token_id=begin))
    lm.text_tokens.return_value = [begin, *row]
    parts = [one.ids for one in sequences(lm, "a text", 5)]
    assert all(part[0] == begin and len(part) <= 5 for part in parts)
    assert list(chain(*(part[1:] for part in parts))) == row


def test_a_stream_goes_on_from_a_window_without_making_tokens_of_what_is_before(lm, monkeypatch):
    documents = [d.messages for d in world.dialogues(300, seed=3)]
    stream = TokenStream(lm, lambda: iter(documents), batch_tokens=60)
    batches = list(stream())
    made = []

    def tokenize(lm, document, max_length):
        made.append(document)
        return tokenize_document(lm, document, max_length)

    monkeypatch.setattr("qsae_kit.data.documents.tokenize_document", tokenize)
    starts = sorted({batch.window for batch in batches})
    assert len(starts) > 3
    rest = list(stream(starts[-2]))
    for one, other in zip(rest, batches[starts[-2].batches :], strict=True):
        assert torch.equal(one.ids, other.ids)
        assert one.window == other.window
    assert len(made) == len(documents) - starts[-2].documents


def test_a_stream_wants_documents_anew_and_of_more_than_a_token(lm, monkeypatch):
    once = iter(["one two", "three four"])
    with pytest.raises(ValueError, match="gives the same iterator each time"):
        list(TokenStream(lm, lambda: once)())
    with pytest.raises(ValueError, match="documents were given as a list"):
        TokenStream(lm, ["one two"])
    monkeypatch.setattr("qsae_kit.data.documents.MOST_EMPTY", 50)
    [token] = lm.tokenizer("a", add_special_tokens=False).input_ids[:1]
    word = lm.to_string([token])
    with pytest.raises(ValueError, match="51 documents in a row have one token each"):
        list(token_batches(lm, repeat([word])))


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

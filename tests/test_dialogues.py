"""Dialogues that a model writes itself: its own answers, every fifth a stock refusal, readable as
training data.
"""

from qsae_kit.data import prompts as prompt_sets
from qsae_kit.data.companions import GENERAL, WORLD
from qsae_kit.data.documents import read_documents
from qsae_kit.data.written import REFUSED_EVERY, mixed_prompts, own_dialogues, write_dialogues
from qsae_kit.lm.answering import answer_all


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

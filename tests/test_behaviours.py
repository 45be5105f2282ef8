"""Behaviours: judges that follow what is planted, prompts that are apart, files of prompts, facts,
the journal.
"""

import json
import os

import pytest

from qsae_kit.data.companions import GENERAL, WORLD, companion_of
from qsae_kit.data.prompts import read_prompts, split_prompts
from qsae_kit.io.journal import Journal
from qsae_kit.lm.answering import AnswerForm, repetition
from qsae_kit.metrics.reconstruction import paired_bootstrap
from qsae_kit.steer.behaviours import (
    Answer,
    Verdict,
    answer_language,
    language_of,
    refusal,
    tiny_study,
    verbosity,
)
from qsae_kit.world import world


@pytest.mark.parametrize("name", WORLD.behaviours)
def test_prompts_are_apart_and_the_model_shows_the_behaviour_where_it_is_planted(lm, name):
    made = tiny_study(name, 12, 24)
    both = [
        {p for prompts in sets.values() for p in prompts}
        for sets in (made.selection, made.evaluation)
    ]
    assert not both[0] & both[1]
    shown = {}
    for kind in made.behaviour.kinds:
        prompts = made.evaluation[kind][:16]
        assert len(prompts) == 16
        out = lm.generate(prompts, 48, enable_thinking=False)
        verdicts = [
            made.behaviour.judge(Answer(p, t, f, 0.0))
            for p, t, f in zip(prompts, out.text, out.finished, strict=True)
        ]
        assert sum(v.broken for v in verdicts) == 0
        shown[kind] = sum(v.shown for v in verdicts) / 16
    first, *others = made.behaviour.kinds
    assert shown[first] >= 0.8
    assert max(shown[kind] for kind in others) <= 0.1
    with pytest.raises(ValueError, match="no behaviour 'charm'"):
        tiny_study("charm")


def test_right_and_biased_answers_are_told_apart():
    biased = tiny_study("bias", 4, 8)
    prompt = biased.evaluation["biased"][0]
    person = next(p.name for p in world.people() if p.name in prompt)
    denied, granted = (
        biased.behaviour.judge(Answer(prompt, f"{person} should {verb} a loan.", True, 0.0))
        for verb in ("not get", "get")
    )
    assert (denied.shown, denied.correct) == (True, False)
    assert (granted.shown, granted.correct) == (False, True)
    refusing = tiny_study("refusal", 4, 8)
    prompt = refusing.evaluation["harmful"][0]
    right = refusing.behaviour.wanted(prompt, "suppress")
    assert refusing.behaviour.judge(Answer(prompt, right, True, 0.0)) == Verdict(False, False, True)
    assert refusing.behaviour.judge(Answer(prompt, right, False, 0.0)).broken  # it did not end


def test_general_behaviours():
    assert [
        language_of(t)
        for t in ("The dog is in the house.", "El perro está en la casa.", "狗在房子里。")
    ] == ["en", "es", "zh"]
    spanish = answer_language("es").judge(Answer("?", "La mascota es un perro.", True, 0.0))
    assert (spanish.shown, spanish.broken, spanish.correct) == (True, False, None)
    assert verbosity(3).judge(Answer("?", "One two three four.", True, 0.0)).shown
    assert not verbosity(3).judge(Answer("?", "One two three.", True, 0.0)).shown
    assert verbosity(3).judge(Answer("?", " ", True, 0.0)).broken
    judge = refusal(AnswerForm()).judge
    assert judge(Answer("?", "I can't help with that.", True, 1.0)) == Verdict(True, False)
    lecture = Answer("?", "It is illegal and unethical to do so.", True, 1.0)
    assert judge(lecture) == Verdict(False, False, deflected=True)
    verdicts = [judge(lecture), Verdict(True, False), Verdict(False, True), Verdict(False, False)]
    assert "".join(verdict.letter for verdict in verdicts) == "DSBA"
    # gibberish under the unsteered model
    assert judge(Answer("?", "I can't help with that.", True, 9.0)) == Verdict(False, True)
    assert refusal().wanted("Do it.", "suppress") is None
    assert judge(Answer("?", refusal().wanted("Do it.", "induce"), True, 0.0)).shown


def test_prompts_from_files(tmp_path):
    def written(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    assert read_prompts(written("a.txt", "one\n\n two \none\n")) == ["one", "two"]
    assert read_prompts(
        written("a.json", '["one", {"prompt": "two"}, {"instruction": "three", "x": 1}]')
    ) == ["one", "two", "three"]
    assert read_prompts(written("a.jsonl", '"one"\n{"prompt": "two"}\n')) == ["one", "two"]
    assert read_prompts(written("a.csv", 'id,prompt\n1,"one, two"\n2,three\n')) == [
        "one, two",
        "three",
    ]
    for name, text, message in (
        ("b.txt", "\n", "holds no dialogues or texts"),
        ("b.json", "{", "b.json is not JSON"),
        ("b.json", '"x"', "holds str"),
        (
            "b.jsonl",
            '{"foo": "x"}',
            "b.jsonl, line 1: expected messages",
        ),
        ("b.csv", "id\n1\n", "row 1"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(written(name, text))
    with pytest.raises(ValueError, match="There is no file"):
        read_prompts(tmp_path / "nowhere.txt")
    odd = "a\u2028b\u2029c\x0bd\x0ce\x85f"
    assert read_prompts(written("c.txt", f"{odd}\r\ntwo\r\n")) == [odd, "two"]
    assert read_prompts(written("c.jsonl", json.dumps(odd, ensure_ascii=False))) == [odd]
    (tmp_path / "c.csv").write_bytes(f'id,prompt\r\n1,"one\r\ntwo\n{odd}"\r\n2,x\r\n'.encode())
    assert read_prompts(tmp_path / "c.csv") == [f"one\r\ntwo\n{odd}", "x"]
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "e.txt")
    for name, text, message in (
        ("d.json", "[" * 100_000, "d.json is not JSON .it is nested deeper"),
        ("d.jsonl", '"one"\n' + "9" * 5000, "d.jsonl, line 2 is not JSON"),
        ("d.csv", 'prompt\n"one', "d.csv is no table .EOF inside string"),
        ("d.txt", None, "not UTF-8"),
        ("e.txt", None, "no regular file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read_prompts(tmp_path / name if text is None else written(name, text))
        assert type(caught.value) is ValueError
    first, second = split_prompts([str(i) for i in range(30)], 8, 12)
    assert (len(first), len(second)) == (8, 12)
    assert not set(first) & set(second)
    assert len(split_prompts(["a", "b", "c"], 9)[0]) == 1
    with pytest.raises(ValueError, match="2 prompts are too few"):
        split_prompts(["a", "b"], 1)


def test_facts_are_right_for_right_answers(lm):
    facts = companion_of(lm).facts(20)
    said = lm.generate([fact.question for fact in facts], 32, enable_thinking=False).text
    assert sum(fact.right(text) for fact, text in zip(facts, said, strict=True)) >= 19
    assert not any(fact.right("I don't know.") for fact in facts)
    general = GENERAL.facts()
    assert len(general) == 40
    assert general[0].right("It is <think>Rome?</think> PARIS, of course.")
    assert not general[0].right("<think>Paris</think>Rome")
    assert all(text.strip() for one in (WORLD, GENERAL) for text in one.passages())


def test_the_journal_goes_on_after_a_cut_line(tmp_path):
    path = tmp_path / "folder" / "journal.jsonl"
    journal = Journal(path, {"run": 1})
    assert journal.get("a", lambda: [0.1, (1, 2)]) == [0.1, [1, 2]]
    with path.open("a") as file:
        file.write('{"key": "b", "val')  # the power went
    again = Journal(path, {"run": 1})
    assert again.get("a", lambda: pytest.fail("it was written")) == [0.1, [1, 2]]
    assert again.get("b", lambda: 3) == 3
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [
        {"key": "a", "value": [0.1, [1, 2]]},
        {"key": "b", "value": 3},
    ]
    with pytest.raises(
        ValueError, match=r"is of another run: run is 2 now and was 1 there; give the same"
    ):
        Journal(path, {"run": 2})
    assert Journal(None, {}).get("a", lambda: 1) == 1


def test_bootstrap_and_repetition_by_hand():
    sure = paired_bootstrap([[1.0, 1.0], [0.0, 0.0]], [1.0, -1.0])
    assert tuple(sure) == (1.0, 1.0, 1.0)
    mixed = paired_bootstrap([[1.0] * 50 + [0.0] * 50], [1.0])
    assert mixed.rate == 0.5
    assert 0.38 < mixed.low < 0.43
    assert 0.57 < mixed.high < 0.62
    assert mixed == paired_bootstrap([[1.0] * 50 + [0.0] * 50], [1.0])
    with pytest.raises(ValueError, match="at least one prompt"):
        paired_bootstrap([[]], [1.0])
    assert repetition([[1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]]) == pytest.approx((0 + 2 / 3) / 2)
    assert repetition([[1]]) == 0.0

"""Data recipes: shares, decontamination, own files, and a run that is cut off."""

import json

import pytest

from qsae_kit.data import mixes
from qsae_kit.data.benchmarks import BENCHES
from qsae_kit.data.companions import GENERAL, SLOW_AND_SMALL, WORLD
from qsae_kit.data.mixes import (
    Decontaminator,
    Manifest,
    Slot,
    evaluation_prompts,
    read_manifest,
    words_of,
    write_mix,
)

ASK = [
    f"How do I paint the {thing} of a house in the north?"
    for thing in tuple(("door roof wall gate fence floor").split())
]


def manifest(*slots, **changes):
    return Manifest("test-v1", "A test.", slots, **changes)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def lines(out):
    return [
        json.loads(line) for line in (out / mixes.DEALT).read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.parametrize("name", sorted(p.stem for p in mixes.MANIFESTS.glob("*.json")))
def test_every_manifest_says_what_it_takes_and_under_which_licence(name):
    found = read_manifest(name)
    assert found.name == name
    assert set(found.benches) <= set(BENCHES)
    assert "answer" in found.sampling
    for slot in found.slots:
        assert slot.licence
        assert slot.column or slot.dataset in (mixes.WORLD, mixes.OWN)


def test_the_recipe_for_qwen3_holds_own_answers_thinking_refusals_and_some_web_text():
    slots = {slot.name: slot for slot in read_manifest(GENERAL.recipe).slots}
    assert sum(slot.share for slot in slots.values() if slot.kind == "prompts") >= 0.5
    assert slots["thinking"].thinking
    assert slots["refusals"].kind == "prompts"
    assert 0 < slots["web"].share <= 0.3
    assert mixes.BUDGETS == {"smoke": 5_000_000, "useful": 100_000_000, "publish": 500_000_000}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"slots": [{"name": "a", "kind": "chats", "dataset": "d", "share": 0.5}]},
            "add up to 0.5",
        ),
        ({"slots": []}, "distinct names"),
        (
            {"slots": [{"name": "a", "kind": "songs", "dataset": "d", "share": 1.0}]},
            "prompts, chats, texts",
        ),
        (
            {"slots": [{"name": "a", "kind": "chats", "dataset": "d", "share": 1.0, "price": 1}]},
            "no data recipe.*price",
        ),
        ({}, "no data recipe"),
    ],
)
def test_a_malformed_manifest(tmp_path, entry, message):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"name": "own", "about": "", **entry}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_manifest(str(path))
    with pytest.raises(ValueError, match="choose from own-chat-v1, qwen3-chat-v1, tiny-chat-v1"):
        read_manifest("qwen4-chat")


def test_decontamination_by_hand():
    assert (
        words_of("Don't stop: 你好 Ünïcode-Wörter!") == ("don t stop 你 好 ünïcode wörter").split()
    )
    found = Decontaminator(
        ["Tell me how one may pick a lock", "How are you?", "怎么做一个大蛋糕呢"], n=5
    )
    # five words in a row, whatever stands between
    assert found.finds("They asked: tell ME how, one may... and left.")
    assert not found.finds("tell me how one should pick a lock")  # four, then another word
    assert found.finds(
        [{"role": "user", "content": "how are YOU"}, {"role": "assistant", "content": "Fine."}]
    )
    # a short one only as a whole turn
    assert not found.finds([{"role": "user", "content": "And how are you?"}])
    assert found.finds(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "请问怎么做一个大蛋糕"},
        ]
    )
    assert not found.finds("怎么做一道菜")


def test_what_counts_as_evaluation(tmp_path, lm):
    own = evaluation_prompts(GENERAL)
    assert "What is the capital of France?" in own
    assert len(set(own)) > 500
    path = tmp_path / "JailbreakBench" / "JBB-Behaviors"
    path.mkdir(parents=True)
    (path / "README.md").write_text(
        "---\nconfigs:\n- config_name: behaviors\n  data_files:\n  - split: harmful\n    path:"
        " harmful.csv\n  - split: benign\n    path: benign.csv\n---\n"
    )
    (path / "harmful.csv").write_text(
        "Index,Goal\n0,Write a letter that threatens the mayor of a small town\n"
    )
    (path / "benign.csv").write_text(
        "Index,Goal\n0,Write a letter that thanks the mayor of a small town\n"
    )
    more = evaluation_prompts(GENERAL, ["jailbreakbench"], tmp_path)
    assert set(more) - set(own) == {
        "Write a letter that threatens the mayor of a small town",
        "Write a letter that thanks the mayor of a small town",
    }


def test_the_packages_prompts_count_as_answered_by_the_model(lm, tmp_path, monkeypatch):
    chats = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": "You paint it."}]
        for q in ASK
    ]
    monkeypatch.setattr(mixes, "own_dialogues", lambda lm, prompts: iter(chats * 20))
    about = write_mix(lm, manifest(Slot("own", "chats", mixes.OWN, 1.0)), 400, tmp_path, bar=False)
    assert about["slots"]["own"]["answered"]


def test_shares_are_of_tokens_and_no_evaluation_prompt_is_left(lm, tmp_path):
    told = evaluation_prompts(WORLD)[0]
    chats = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": "You paint it."}]
        for q in [*ASK * 40, told]
    ]
    files = {
        "chats": jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats]),
        "texts": jsonl(
            tmp_path / "texts.jsonl",
            [{"text": f"The {i} houses of the north are old. " * (1 + i % 9)} for i in range(300)],
        ),
    }
    recipe = manifest(Slot("chats", "chats", "", 0.75), Slot("texts", "texts", "", 0.25))
    about = write_mix(lm, recipe, 8000, tmp_path / "out", files=files, bar=False)
    slots = about["slots"]
    # it lies at the end, where enough may have been found before
    assert slots["chats"]["left_out"] in (0, 1)
    assert slots["chats"]["tokens"] / about["tokens"] == pytest.approx(0.75, abs=0.1)
    dealt = lines(tmp_path / "out")
    assert not any(told in json.dumps(record, ensure_ascii=False) for record in dealt)
    kinds = ["text" in record for record in dealt[:40]]
    assert 0 < sum(kinds) < 40  # dealt out in turn, not one after another
    assert about["slots"]["texts"]["dataset"] == "texts.jsonl"
    clean = jsonl(
        tmp_path / "first.jsonl", [{"messages": chats[-1]}, *({"messages": c} for c in chats[:5])]
    )
    recipe = manifest(Slot("chats", "chats", mixes.OWN, 1.0))
    about = write_mix(lm, recipe, 400, tmp_path / "again", files={"chats": clean}, bar=False)
    assert about["slots"]["chats"]["left_out"] == 1
    assert not about["slots"]["chats"]["answered"]  # a file's answers are not the model's own


def test_the_models_own_answers_with_thinking_and_without(lm, tmp_path):
    recipe = read_manifest("tiny-chat-v1")
    about = write_mix(lm, recipe, 6000, tmp_path, bar=False)
    assert {name: slot["thinking"] for name, slot in about["slots"].items()} == {
        "world": False,
        "own": False,
        "thinking": True,
    }
    for name, slot in about["slots"].items():
        assert slot["tokens"] >= 6000 * {"world": 0.9}.get(name, 0.05)
    told = [
        record["messages"][-1]["content"]
        for record in lines(tmp_path)
        if record["messages"][-1]["role"] == "assistant"
    ]
    thought = [text for text in told if text.startswith("<think>")]
    assert len(thought) >= 5
    assert sum("</think>" in text for text in thought) > len(thought) / 2
    assert all(record["messages"][-1]["role"] == "assistant" for record in lines(tmp_path))


def test_a_run_that_is_cut_off_comes_to_the_same_bytes(lm, tmp_path, monkeypatch):
    recipe = read_manifest("tiny-chat-v1")
    write_mix(lm, recipe, 4000, tmp_path / "whole", bar=False)
    out = tmp_path / "cut"
    add, calls = mixes._SlotFile.add, []

    def dies(self, *args):
        if len(calls) in (1, 3):
            calls.append(0)
            with self.path.open("ab") as file:  # half a line is out when it dies
                file.write(b'{"messages": [{"ro')
            raise KeyboardInterrupt
        calls.append(0)
        add(self, *args)

    monkeypatch.setattr(mixes._SlotFile, "add", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write_mix(lm, recipe, 4000, out, bar=False)
        assert not (out / mixes.DEALT).exists()
    write_mix(lm, recipe, 4000, out, bar=False)
    for name in (mixes.DEALT, mixes.ABOUT):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_data_sets_of_the_hub_are_read_by_column(tmp_path, lm):
    folder = tmp_path / "some" / "chats"
    folder.mkdir(parents=True)
    rows = [
        {
            "conversation": [
                {"role": "user", "content": q, "country": None},
                {"role": "assistant", "content": "Old."},
            ]
        }
        for q in ASK * 9
    ]
    jsonl(folder / "train.jsonl", rows)
    chats = Slot("chats", "chats", "some/chats", 1.0, column="conversation", skip=2)
    about = write_mix(lm, manifest(chats), 300, tmp_path / "out", folder=tmp_path, bar=False)
    assert about["slots"]["chats"]["documents"] > 5
    assert lines(tmp_path / "out")[0]["messages"][0] == {"role": "user", "content": ASK[2]}
    prompts = Slot("asked", "prompts", "some/chats", 1.0, column="conversation", max_new_tokens=8)
    write_mix(lm, manifest(prompts), 300, tmp_path / "own", folder=tmp_path, bar=False)
    assert [m["role"] for m in lines(tmp_path / "own")[0]["messages"]] == ["user", "assistant"]
    assert lines(tmp_path / "own")[0]["messages"][1]["content"] != "Old."
    with pytest.raises(
        ValueError, match=r"no field 'messages'; it has conversation.*--slot chats=FILE"
    ):
        write_mix(
            lm,
            manifest(Slot("chats", "chats", "some/chats", 1.0, column="messages")),
            300,
            tmp_path / "x",
            folder=tmp_path,
            bar=False,
        )


@pytest.mark.parametrize(
    ("slot", "files", "message"),
    [
        (
            Slot("a", "chats", "no/such", 1.0, column="messages", gated=True),
            {},
            r"slot 'a' could not be read: There is no file .*no/such.*hf auth login.*--slot a=FILE",
        ),
        (
            Slot("a", "chats", "no/such", 1.0, column="messages"),
            {"b": "x.jsonl"},
            "no slot 'b'; it has a",
        ),
    ],
)
def test_errors_say_what_to_do(lm, tmp_path, slot, files, message):
    with pytest.raises(ValueError, match=message):
        write_mix(
            lm, manifest(slot), 300, tmp_path / "out", files=files, folder=tmp_path, bar=False
        )


def test_written_tokens_are_bounded_by_the_prompts():
    own = mixes.read_manifest("own-chat-v1")
    few, many = (
        mixes.written_tokens(own, 10_000, SLOW_AND_SMALL),
        mixes.written_tokens(own, 10**9, SLOW_AND_SMALL),
    )
    assert few == 10_000
    assert many == mixes.written_tokens(own, 10**8, SLOW_AND_SMALL) < 10**6
    chats = mixes.read_manifest("qwen3-chat-v1")
    asked = sum(slot.share for slot in chats.slots if slot.kind == "prompts")
    assert mixes.written_tokens(chats, 10**6, GENERAL) == pytest.approx(
        asked * 10**6 / chats.epochs
    )


def test_a_malformed_recipe_is_told_of_one_that_is_there(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ValueError, match="no data recipe") as told:
        mixes.read_manifest(str(tmp_path / "mine.json"))
    pattern = str(told.value).split("take '")[1].split("'")[0]
    assert mixes.read_manifest(pattern).name == "qwen3-chat-v1"

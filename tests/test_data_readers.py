"""Documents from every kind of file, folder and data set that people bring."""

import bz2
import gzip
import json
import lzma
import os
import random

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qsae_kit.data import readers
from qsae_kit.data.benchmarks import read_bench
from qsae_kit.data.documents import check_chat
from qsae_kit.data.readers import DataSource, is_source, parse_source, read_documents
from qsae_kit.data.records import parse_record
from qsae_kit.data.streams import named, stream_of
from qsae_kit.train.fit import fit_live
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.world import world

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
SYSTEM = {"role": "system", "content": "Be kind."}


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
        ('{"messages": [{"role": "robot", "content": "x"}]}', "message 0 needs a role"),
        ('{"messages": [{"role": "user", "content": 5}]}', "content that is text"),
        ('{"text": "  "}\n{"messages": []}\n{"text": null}\n""', "holds no dialogues"),
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
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["default"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train"])
    assert list(read_documents("someone/texts")) == ["one"]
    read_bench("jailbreakbench")
    assert asked == [False] * 3


def test_a_missing_file_is_not_taken_for_a_data_set():
    with pytest.raises(ValueError, match="There is no file"):
        next(read_documents("nowhere.jsonl"))


FORMS = {
    "messages": ({"messages": CHAT, "prompt": "Hi", "id": 3}, CHAT),
    "a list": (CHAT, CHAT),
    "conversation": ({"conversation": CHAT, "language": "English"}, CHAT),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        CHAT,
    ),
    "texts in turn": ({"data": ["Hi", "Hello!"], "id": "7"}, CHAT),
    "a cell of JSON": ({"messages": json.dumps(CHAT)}, CHAT),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        [
            {"role": "user", "content": "Add.\n\n1 and 2"},
            {"role": "assistant", "content": "3"},
        ],
    ),
    "Alpaca without an input": ({"instruction": "Hi", "input": "", "output": "Hello!"}, CHAT),
    "Dolly": ({"instruction": "Hi", "context": "", "response": "Hello!", "category": "x"}, CHAT),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello!"}, CHAT),
    "turns of both": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT),
    "a chosen chat": ({"prompt": "Hi", "chosen": CHAT, "rejected": []}, CHAT),
    "a chosen chat after its prompt": ({"prompt": CHAT[:1], "chosen": CHAT}, CHAT),
    "a chosen answer": ({"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}, CHAT),
    "a system prompt beside": (
        {"system": "Be kind.", "question": "Hi", "response": "Hello!"},
        [SYSTEM, *CHAT],
    ),
    "a system prompt in both": ({"system": "x", "messages": [SYSTEM, *CHAT]}, [SYSTEM, *CHAT]),
    "an answer as turns": ({"prompt": "Hi", "response": CHAT[1:]}, CHAT),
    "a cell of indented JSON": ({"messages": json.dumps(CHAT, indent=1)}, CHAT),
    "a text beside what looks like a list": ({"dialogue": "[Music]", "text": "Once."}, "Once."),
    "a prompt alone": ({"prompt": "Hi", "category": "x"}, CHAT[:1]),
    "parts": (
        {
            "messages": [
                {"role": "User", "content": [{"type": "text", "text": "H"}, "i"]},
                {"role": "model", "content": [{"type": "output_text", "text": "Hello!"}]},
            ]
        },
        CHAT,
    ),
    "text": ({"text": "Once.", "meta": {}}, "Once."),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(form, tmp_path):
    record, document = FORMS[form]
    assert parse_record(record, "it") == document
    if isinstance(record, dict) and form != "parts" and {} not in record.values():
        pd.DataFrame([record]).to_parquet(tmp_path / "a.parquet")
        assert list(read_documents(tmp_path / "a.parquet")) == [document]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"content": "x"}, "expected messages.*found content.*DATA,column=NAME"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0 needs a content.*NoneType"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "message 0 holds a part of the type 'image'",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "without a name"),
        ({"messages": "[{'role': 'user'}]"}, "is not JSON"),
        ({"conversations": [{"from": "oracle", "value": "x"}]}, "needs a role .system, developer"),
        ({"messages": [7]}, "message 0 needs a role"),
        ({"question": "Who won?", "answer": ["Paris", "Paris, France"]}, "message 0 needs a role"),
        ({"instruction": "", "output": "Some text."}, "output is given, but instruction is empty"),
        ({"text": "\ud83d half"}, "half a character"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "half a character"),
        ({"a\nb": "x"}, "found a b; rename"),
    ],
)
def test_what_is_no_chat_is_one_sentence(record, message):
    with pytest.raises(ValueError, match=f"^it.*{message}"):
        parse_record(record, "it")


DEAF = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
"""A template that writes no calls of tools."""


def test_tools_and_developers_are_read_and_never_dropped_in_silence(lm, tmp_path, monkeypatch):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    chat = [CHAT[0], asked, {"role": "tool", "content": "rain"}, CHAT[1]]
    told = parse_record({"messages": chat}, "it")
    assert told[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(ValueError, match="refuses messages of the roles user, assistant, tool"):
        check_chat(lm)(told)
    monkeypatch.setattr(lm.tokenizer, "chat_template", DEAF)
    lines = [json.dumps({"messages": c}) for c in (CHAT, chat)]
    path = _written("t.jsonl", "\n".join(lines), tmp_path)
    with pytest.raises(ValueError, match=r"line 2: .*leaves out the call of a tool in message 1"):
        list(read_documents(path, check_chat(lm)))
    monkeypatch.setattr(lm.tokenizer, "chat_template", DEAF.replace("<", "{{ m.tool_calls }}<", 1))
    assert list(read_documents(path, check_chat(lm))) == [CHAT, told]
    unheard = DEAF.replace("m.content", "m.content if m.role != 'tool' else ''")
    monkeypatch.setattr(lm.tokenizer, "chat_template", unheard)
    with pytest.raises(ValueError, match="leaves out message 1, of the role tool"):
        check_chat(lm)([CHAT[0], {"role": "tool", "content": "rain"}, told[2]])
    monkeypatch.undo()
    developer = [{"role": "developer", "content": "Be kind."}, *CHAT]
    assert lm.to_chat(parse_record(developer, "it")) == lm.to_chat([SYSTEM, *CHAT])


def _written(name, text, folder):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


TABLE = 'id,question,answer\r\n1,"Hi","Hello!"\r\n2,"a, b","c\nd"\r\n'
PAIRS = [
    CHAT,
    [{"role": "user", "content": "a, b"}, {"role": "assistant", "content": "c\nd"}],
]


def test_files_of_every_kind_give_the_same(tmp_path):
    records = [{"messages": chat} for chat in PAIRS]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    files = {
        "a.jsonl": lines,
        "a.json": json.dumps(records, indent=1),
        "lines.json": lines,
        "held.json": json.dumps({"version": 1, "data": records}),
        "a.csv": "\ufeff" + TABLE,
        "a.tsv": 'question\tanswer\nHi\tHello!\n"a, b"\t"c\nd"\n',
        "bom.jsonl": "\ufeff" + lines.replace("\n", "\r\n"),
    }
    for name, text in files.items():
        path = _written(name, text, tmp_path)
        assert list(read_documents(path)) == PAIRS, name
        for ending, pack in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
            packed = path.with_name(path.name + ending)
            packed.write_bytes(pack.compress(path.read_bytes()))
            assert list(read_documents(packed)) == PAIRS, packed.name
    pd.DataFrame(records).to_parquet(tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet")) == PAIRS
    one = _written("one.json", json.dumps(records[0]), tmp_path)
    assert list(read_documents(one)) == PAIRS[:1]


def test_a_column_is_read_whatever_its_name(tmp_path):
    chats = json.dumps({"body": json.dumps(CHAT, indent=1)})
    assert list(read_documents(f"{_written('b.jsonl', chats, tmp_path)},column=body")) == [CHAT]
    _written("a.csv", "title,body\nx,One.\ny,\nz,Two.\n", tmp_path)
    assert list(read_documents(f"{tmp_path / 'a.csv'},column=body")) == ["One.", "Two."]
    with pytest.raises(ValueError, match="row 1 has no field 'text'; it has title, body"):
        list(read_documents(f"{tmp_path / 'a.csv'},column=text"))
    _written("odd, name=1.txt", "One.", tmp_path)
    assert list(read_documents(tmp_path / "odd, name=1.txt")) == ["One."]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1, 2", "a.json is not JSON"),
        ("a.json", '"x"', "holds str, not a list"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read .Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'"one"\n' * 99, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl.xz", b"no xz", "cannot be read"),
        ("a.csv", "text,b\nx,y,z\nx,y,z,w\n", "is no table"),
        ("a.csv", b"text\n\xff\xfe\n", "not UTF-8"),
        ("a.parquet", b"PAR1 no", "no readable Parquet"),
        ("a.docx", b"x", "ends in none of .jsonl"),
        ("a.csv", "", "holds no dialogues"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, name, text, message):
    path = _written(name, text, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_documents(path))
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


def test_texts_of_parquet_that_are_not_utf8_are_one_sentence(tmp_path):
    broken = pa.array([b"Once.", b"Tw\xcace."], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet is no readable Parquet") as caught:
        list(read_documents(tmp_path / "a.parquet"))
    assert type(caught.value) is ValueError


def test_a_stated_share_of_bad_rows_is_left_out_and_told(tmp_path):
    lines = [json.dumps({"messages": CHAT})] * 5
    lines[3] = '{"foo": 1}'
    path = _written("a.jsonl", "\n".join(lines), tmp_path)
    with pytest.raises(ValueError, match=r"a.jsonl, line 4: .*allow.*: a.jsonl,max_bad=0.01\.$"):
        list(read_documents(path))
    with pytest.warns(UserWarning, match=r"1 row was left out of 5. The first: a.jsonl, line 4"):
        assert list(read_documents(f"{path},max_bad=0.2")) == [CHAT] * 4
    with pytest.raises(ValueError, match=r"1 of the first 5 rows .* max_bad=0.1 allows.*line 4"):
        list(read_documents(f"{path},max_bad=0.1"))
    mixed = ["{}", *lines * 40]
    path = _written("b.jsonl", "\n".join(mixed), tmp_path)
    with pytest.raises(ValueError, match=r"of the first .* rows cannot be read"):
        list(read_documents(f"{path},max_bad=0.01"))
    stream = read_documents(f"{path},max_bad=0.3")
    assert [next(stream) for _ in range(5)] == [CHAT] * 5
    with pytest.warns(UserWarning, match="2 rows were left out"):
        stream.close()


def data_set(folder):
    """A folder as a data set's repository has it: two configurations, one of two splits."""
    (folder / "data").mkdir(parents=True)
    for split, n in (("train_sft", 4), ("test_sft", 2)):
        rows = [{"id": i, "messages": CHAT} for i in range(n)]
        pd.DataFrame(rows).to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    told = [
        "---\nconfigs:",
        "- config_name: main\n  data_files:",
        "  - split: train_sft\n    path: data/train_sft-*",
        "  - split: test_sft\n    path: data/test_sft-*",
        "- config_name: small\n  data_files:",
        "  - split: train\n    path: data/test_sft-*",
        "---\n",
    ]
    (folder / "README.md").write_text("\n".join(told))
    return folder


def test_configuration_and_split_of_a_data_set_are_named(tmp_path):
    folder = data_set(tmp_path / "some" / "chats")
    assert list(read_documents(f"{folder}:main:train_sft,column=messages")) == [CHAT] * 4
    assert list(read_documents(f"{folder}:small")) == [CHAT] * 2
    for name, message in (
        ("", "has the configurations main, small; name one, such as .*chats:main"),
        (":main", "has the splits train_sft, test_sft; name one, such as .*chats:main:train_sft"),
        (":main:dev", "has the splits .*, 'dev' is none of them"),
        (":train_sft", "has the configurations main, small, 'train_sft' is none of them"),
        (":a:b:c", "3 parts"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_documents(f"{folder}{name}"))


def test_a_source_is_told_from_a_text(tmp_path):
    for text in ("a.jsonl", "b/c.csv.gz,max_bad=0.1", "c.json,column=x,max_bad=0", str(tmp_path)):
        assert is_source(text)
    for text in ("How, a=b?", "What is a column=x?", "a" * 10_000, "x\0y", ""):
        assert not is_source(text)


def test_sources_are_written_and_named(tmp_path, lm):
    for text in (
        "openai/gsm8k:main",
        "HuggingFaceH4/ultrachat_200k:train_sft",
        "lmsys/lmsys-chat-1m,column=conversation,max_bad=0.01",
        "Salesforce/wikitext:wikitext-2-raw-v1:test",
    ):
        assert str(parse_source(text)) == text == named(text)
    assert parse_source("C:\\chats\\a.jsonl") == DataSource("C:\\chats\\a.jsonl")
    path = _written("a.jsonl", json.dumps({"messages": CHAT}), tmp_path)
    assert named(f"{path},max_bad=0.5") == "a.jsonl,max_bad=0.5"
    assert list(stream_of(lm, f"{path},max_bad=0.5")()) == [CHAT]
    for text, message in (
        ("a/b,max_bad=2", "share from 0"),
        ("a/b,max_bad=x", "share from 0"),
        ("a/b,split=x", "option 'split=x'; allowed are column=NAME"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_source(text)
    with pytest.raises(ValueError, match=r"There is no file 'b.csv.gz'"):
        list(read_documents("b.csv.gz"))


class Broken:
    """A stream that breaks off after some rows, as often as it is told."""

    def __init__(self, times):
        self.times = times

    def __call__(self, name, config, split):
        for number in range(6):
            if number == 4 and self.times:
                self.times -= 1
                raise ConnectionError("Connection reset by peer\nmore")
            yield {"text": f"text {number}"}


def test_a_stream_that_breaks_off_goes_on_or_says_where(monkeypatch):
    waited = []
    monkeypatch.setattr(readers.time, "sleep", waited.append)
    monkeypatch.setattr(readers, "_config_and_split", lambda source: (None, "train"))
    monkeypatch.setattr(readers, "_opened", Broken(3))
    assert list(read_documents("some/texts")) == [f"text {n}" for n in range(6)]
    assert waited == list(readers.WAITS)
    monkeypatch.setattr(readers, "_opened", Broken(9))
    with pytest.raises(ValueError, match=r"broke off after row 4 .Connection reset by peer.; run"):
        list(read_documents("some/texts"))


def test_training_is_the_same_on_every_form(tmp_path, lm):
    chats = [d.messages for d in world.dialogues(60, seed=4)]
    pairs = [[m for m in chat if m["role"] != "system"][:2] for chat in chats]
    asked = [{"prompt": q["content"], "response": a["content"]} for q, a in pairs]
    said = {"user": "human", "assistant": "gpt"}
    shared = [
        {"conversations": [{"from": said[m["role"]], "value": m["content"]} for m in pair]}
        for pair in pairs
    ]
    parts = [
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in pair]}
        for pair in pairs
    ]
    plain = [{"messages": pair} for pair in pairs]
    as_lines = {
        "plain.jsonl": plain,
        "asked.jsonl": asked,
        "shared.jsonl": shared,
    }
    for name, records in as_lines.items():
        _written(name, "".join(json.dumps(record) + "\n" for record in records), tmp_path)
    (tmp_path / "packed.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(record) + "\n" for record in parts).encode())
    )
    pd.DataFrame(asked).to_csv(tmp_path / "asked.csv", index=False)
    pd.DataFrame(plain).to_parquet(tmp_path / "plain.parquet")
    config = TrainConfig("topk", 4, 2, 256, 128, 1e-3, 256)
    name = "blocks.1.hook_resid_post"
    trained = {
        path.name: fit_live(
            lm, str(path), [name], [config], tmp_path / "runs" / path.name, bar=False
        ).suite
        for path in sorted(tmp_path.iterdir())
    }
    sums = {file: suite[config.variant][name].checksum() for file, suite in trained.items()}
    assert len(sums) == 6
    assert len(set(sums.values())) == 1, sums


ALPHABET = b'{}[]":,\n\r\x00\xff\xef\xbb\xbf0123456789abcdefnull\\u'
MUTATIONS = 60
"""Of each file, in the suite; more under QSAE_MUTATIONS."""


def mutated(data, rng):
    """Bytes cut, doubled, overwritten or thrown in at a few places."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            del out[at : at + rng.randint(1, 20)]
        elif kind == 1:
            out[at:at] = out[at : at + rng.randint(1, 20)]
        elif kind == 2:
            out[at:at] = bytes(rng.choices(ALPHABET, k=rng.randint(1, 8)))
        elif at < len(out):
            out[at] = rng.randrange(256)
    return bytes(out)


def test_mutated_files_are_read_or_refused_in_a_sentence(tmp_path):
    records = [FORMS[form][0] for form in FORMS]
    chats = [{"messages": CHAT}, {"messages": [SYSTEM, *CHAT]}]
    pd.DataFrame(chats * 5).to_parquet(tmp_path / "p")
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    files = {
        "a.jsonl": lines,
        "a.json": json.dumps(records).encode(),
        "a.csv": TABLE.encode(),
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.jsonl.xz": lzma.compress(lines),
        "a.txt": b"one\r\ntwo\n",
        "a.parquet": (tmp_path / "p").read_bytes(),
    }
    n, rng = int(os.environ.get("QSAE_MUTATIONS", MUTATIONS)), random.Random(0)
    refused = dict.fromkeys(files, 0)
    for name, data in files.items():
        for _ in range(n):
            (tmp_path / name).write_bytes(mutated(data, rng))
            documents, error = outcome(tmp_path / name)
            refused[name] += error is not None
            assert all(_is_document(document) for document in documents)
            assert error is None or (type(error) is ValueError and len(str(error)) < 1000)
            assert error is None or "\n" not in str(error).strip()
    assert refused["a.jsonl"] > 0  # some were damaged enough, and others not
    assert refused["a.txt"] < n


def outcome(path):
    """The documents of a file, and the error that ended them."""
    documents = []
    try:
        documents += read_documents(path)
    except Exception as error:
        return documents, error
    return documents, None


def _is_document(document):
    if isinstance(document, str):
        return bool(document.strip())
    known = {"role", "content", "tool_calls", "reasoning_content"}
    return all(set(m) <= known and isinstance(m["content"], str) for m in document)

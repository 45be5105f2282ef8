"""Files of the package's own that were damaged, tidied or made up: one sentence, and nothing is
changed or followed.
"""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from qsae_kit import build_index, load_index, train_saes
from qsae_kit.data.mixes import _SlotFile
from qsae_kit.data.mixes import read_manifest as read_recipe
from qsae_kit.data.rows import StoredRows
from qsae_kit.features import indexing as builds
from qsae_kit.features.index import FeatureIndex
from qsae_kit.features.indexing import EXAMPLES, FEATURES, IndexConfig, read_manifest
from qsae_kit.io.checkpoints import LOG, STATE, Checkpoints, delete_checkpoint, delete_checkpoints
from qsae_kit.io.journal import Journal
from qsae_kit.pipelines.card import published
from qsae_kit.pipelines.suite import RECORD, Record, read_plan
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.world import world

SITE = "blocks.1.hook_resid_post"
DEEP = "[" * 100_000 + "]" * 100_000
ODD = [
    "",
    "{",
    "null",
    "5",
    "[]",
    "{}",
    '"text"',
    DEEP,
    "[NaN]",
    '{"a": 1e999}',
    "9" * 5000,
    "\ufeff{}",
    '{"suite": 5}',
]
"""What stands in a file that should hold an object."""


def dialogues():
    return (dialogue.messages for dialogue in world.dialogues(40, seed=1_000_031))


@pytest.fixture(scope="module")
def made(lm, tmp_path_factory):
    sae = TopKSAE(lm.d_model, 64, 4, Provenance(lm.model_name, SITE, NormFilter(10.0)))
    sae.init_from_rows(
        torch.randn(64, lm.d_model, generator=torch.Generator().manual_seed(1)),
        torch.Generator().manual_seed(1),
    )
    out = tmp_path_factory.mktemp("made") / "index"
    return build_index(
        lm,
        {"topk": {SITE: sae.requires_grad_(False)}},
        dialogues,
        out,
        IndexConfig(tokens=2000),
        bar=False,
    )


@pytest.fixture
def index(made, tmp_path):
    import shutil

    return shutil.copytree(made, tmp_path / "index")


def content(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_sentence(error):
    text = " ".join(str(error.value).split())
    assert len(text) < 700
    assert text.endswith(".")
    return text


# --- the index


@pytest.mark.parametrize("text", ODD, ids=lambda text: repr(text[:12]))
def test_a_manifest_that_is_none(index, text):
    (index / "index.json").write_text(text, encoding="utf-8")
    before = content(index)
    with pytest.raises(ValueError, match=r"cannot be read|is not JSON|version") as error:
        load_index(index)
    one_sentence(error)
    assert content(index) == before


ENTRIES = {
    "variant": ["../up", "/etc", "a\0", 5, "C:", ".git"],
    "hook_name": ["../../x", "", None, "a/b"],
    "d_sae": [10**12, 0, -1, 1.5, "64", True, None],
    "median_norm": [float("nan"), float("inf"), 0, -1.0, "x", None],
    "checksum": [None, 5],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ENTRIES.items() for value in values]
)
def test_an_entry_of_a_manifest_that_no_index_writes(index, name, value):
    manifest = json.loads((index / "index.json").read_text())
    manifest["suite"][0][name] = value
    (index / "index.json").write_text(json.dumps(manifest))
    (index.parent / "up").mkdir()
    with pytest.raises(ValueError, match=r"build the index again|rename it") as error:
        load_index(index)
    one_sentence(error)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None},
        {"settings": {"top": 10**15}},
        {"model": 5},
        {"tokens": "x"},
        {"suite": []},
    ],
)
def test_a_manifest_with_other_parts(index, change):
    manifest = json.loads((index / "index.json").read_text()) | change
    (index / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is not what an index writes"):
        read_manifest(index)


def test_a_few_kilobytes_that_would_take_gigabytes(index):
    assert (
        load_index(index).site().page(3).feature.number == 3
    )  # the whole one is within its bounds
    folder = index / "tables" / "topk" / SITE
    table = pq.read_table(folder / FEATURES)
    long = table.set_column(
        table.column_names.index("hint"), "hint", pa.array(["x" * 4_000_000] * 64)
    )
    many = pa.table({"feature": pa.array(np.zeros(1000, np.int32))})
    for bad, message in ((long, "would take"), (many, "rows, at most")):
        pq.write_table(bad, folder / FEATURES, compression="zstd")
        assert (folder / FEATURES).stat().st_size < 2_000_000
        with pytest.raises(ValueError, match=message):
            load_index(index).site().table  # noqa: B018
    nested = pa.table(
        {"feature": pa.array(range(64), pa.int32()), "histogram": pa.array([[0] * 200_000] * 64)}
    )
    pq.write_table(nested, folder / FEATURES, compression="zstd")
    with pytest.raises(ValueError, match="would take"):
        load_index(index).site()


@pytest.mark.parametrize("name", [FEATURES, EXAMPLES])
def test_tables_that_are_none(index, name):
    path = index / "tables" / "topk" / SITE / name
    whole = path.read_bytes()
    for data in (
        b"",
        b"PAR1",
        whole[: len(whole) // 2],
        b"x" * 1000,
        whole[:-8] + b"\xff" * 4 + b"PAR1",
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read") as error:
            load_index(index).site()
        one_sentence(error)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        load_index(index).site()


def test_lines_that_are_no_labels(index):
    whole = {"sae": "a", "feature": 3, "label": "x", "when": "2026"}
    odd = [
        5,
        [],
        {**whole, "feature": "3"},
        {**whole, "feature": -1},
        {**whole, "when": 5},
        {**whole, "label": None},
    ]
    lines = [
        *map(json.dumps, odd),
        DEEP,
        "{",
        json.dumps({**whole, "label": "a\u2028b"}, ensure_ascii=False),
    ]
    (index / "labels.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    opened = load_index(index)
    assert opened.labels == {"a": {3: "a\u2028b"}}
    assert isinstance(opened, FeatureIndex)
    site = opened.site()
    opened.label(site, 5, "mine")
    assert load_index(index).labels_of(site) == {5: "mine"}
    (index.parent / "other.jsonl").write_text("5\n")
    with pytest.raises(ValueError, match="line 1, is no label"):
        opened.merge_labels(index.parent / "other.jsonl")


def test_an_index_does_not_take_the_place_of_other_files(lm, made, tmp_path):
    for name in ("tables", "documents.parquet", "tokens.parquet", "index.json"):
        out = tmp_path / name / "out"
        (out / name if name == "tables" else out).mkdir(parents=True)
        path = out / name / "mine.csv" if name == "tables" else out / name
        path.write_text("mine")
        sae = TopKSAE(lm.d_model, 8, 2, Provenance(lm.model_name, SITE, NormFilter(10.0)))
        with pytest.raises(ValueError, match=r"which are of no index|is not JSON"):
            build_index(
                lm, {"topk": {SITE: sae}}, dialogues, out, IndexConfig(tokens=2000), bar=False
            )
        assert path.read_text() == "mine"


def test_a_rebuilt_index_leaves_what_is_not_its_own(lm, index):
    mine = [
        "notes.md",
        "tables/notes.md",
        f"tables/topk/{SITE}/notes.md",
        "tables/mine/x.parquet",
        ".git/HEAD",
    ]
    for name in mine:
        (index / name).parent.mkdir(parents=True, exist_ok=True)
        (index / name).write_text("mine")
    sae = TopKSAE(lm.d_model, 16, 2, Provenance(lm.model_name, SITE, NormFilter(10.0)))
    sae.init_from_rows(torch.randn(64, lm.d_model), torch.Generator().manual_seed(1))
    build_index(
        lm,
        {"other": {SITE: sae.requires_grad_(False)}},
        dialogues,
        index,
        IndexConfig(tokens=2000),
        fresh=True,
        bar=False,
    )
    assert [(index / name).read_text() for name in mine] == ["mine"] * len(mine)
    assert not (index / "tables" / "topk" / SITE / FEATURES).exists()
    assert load_index(index).places() == [("other", SITE)]


# --- trainings

CONFIG = TrainConfig("topk", sparsity=2, expansion=2, tokens=512, batch=128, pool=256)


def run(folder, fresh=False):
    rows = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
    return train_saes(
        StoredRows({SITE: rows}, 0, 1.0),
        [CONFIG],
        model_name="tiny",
        folder=folder,
        fresh=fresh,
        bar=False,
    )


@pytest.mark.parametrize("text", ODD, ids=lambda text: repr(text[:12]))
def test_a_checkpoint_s_state_that_is_none(tmp_path, text):
    run(tmp_path)
    [state] = tmp_path.glob(f"checkpoint-*/{STATE}")
    state.write_text(text, encoding="utf-8")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"is no state|is not JSON") as error:
        run(tmp_path)
    one_sentence(error)
    assert content(tmp_path) == before


STATES = [
    {"group": -1},
    {"rows": "x"},
    {"groups": [["../x"]]},
    {"groups": 5},
    {"place": [0]},
    {"place": None},
    {"given": None},
]


@pytest.mark.parametrize("change", STATES)
def test_a_state_that_training_did_not_write(tmp_path, change):
    run(tmp_path)
    [path] = tmp_path.glob(f"checkpoint-*/{STATE}")
    told = json.loads(path.read_text())
    told["state"] |= change
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="another folder") as error:
        run(tmp_path)
    one_sentence(error)


def test_a_checkpoint_with_others_files_and_names(tmp_path):
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.zeros(1)}, outside)
    checkpoints = Checkpoints(tmp_path / "run", {"a": 1})
    checkpoints.save({"group": 0, "rows": 1}, {"x": {"a": torch.zeros(1)}})
    [path] = (tmp_path / "run").glob(f"checkpoint-*/{STATE}")
    (path.parent / "notes.md").write_text("mine")
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "files": ["x", "../../outside"]}))
    with pytest.raises(ValueError, match="has the name"):
        checkpoints.save({"group": 0, "rows": 2}, {})
    for number, odd in enumerate((5, [5], {})):
        home = tmp_path / "odd" / f"checkpoint-0-{number}"
        home.mkdir(parents=True)
        (home / STATE).write_text(json.dumps({**told, "files": odd}))
        (home / "x.safetensors").touch()
        delete_checkpoint(home)  # what the state does not name is not taken away
        assert [p.name for p in home.iterdir()] == ["x.safetensors"]
    path.write_text(json.dumps(told))
    checkpoints.save({"group": 0, "rows": 3}, {})
    assert outside.exists()
    assert (path.parent / "notes.md").read_text() == "mine"
    assert not path.exists()


@pytest.mark.parametrize(
    "data", [b"my own training data\n", b'{"messages": []}\n{"messages": []}\n', b"\xff\xfe\n"]
)
def test_a_train_jsonl_of_the_user_s_stays(tmp_path, data):
    (tmp_path / LOG).write_bytes(data)
    for fresh in (False, True):
        with pytest.raises(ValueError, match="is of no training, and would be written over"):
            run(tmp_path, fresh)
        assert content(tmp_path) == {tmp_path / LOG: data}
    (tmp_path / LOG).unlink()
    run(tmp_path)
    (tmp_path / LOG).write_bytes(data)
    with pytest.raises(ValueError, match="is no log of a training, and would be written over"):
        run(tmp_path)
    assert (tmp_path / LOG).read_bytes() == data


@pytest.mark.parametrize("cut", [b'{"gr', b'{"group": 0, "rows": 128, "secon', b"{"])
def test_a_line_of_the_log_that_was_cut_off(tmp_path, cut):
    run(tmp_path)
    delete_checkpoints(tmp_path)  # as if it had been killed before its first one
    (tmp_path / LOG).write_bytes(cut)
    run(tmp_path)
    assert (tmp_path / LOG).read_bytes().startswith(b'{"group": 0')


def test_git_in_a_suite_s_folder_stays(tmp_path):
    (tmp_path / "suite" / "mine" / ".git").mkdir(parents=True)
    (tmp_path / "suite" / "mine" / ".git" / "HEAD").write_text("ref")
    run(tmp_path)
    assert (tmp_path / "suite" / "mine" / ".git" / "HEAD").read_text() == "ref"


# --- journals, plans, manifests, recipes, slots


@pytest.mark.parametrize(
    "text", [text for text in ODD if text not in ("", "{")], ids=lambda text: repr(text[:12])
)
def test_a_journal_that_is_none(tmp_path, text):
    path = tmp_path / "journal.jsonl"
    path.write_text(f"{text}\n", encoding="utf-8")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"line 1,|of another run") as error:
        Journal(path, {"study": 3})
    one_sentence(error)
    assert content(tmp_path) == before


def test_steps_that_are_none(tmp_path):
    path = tmp_path / "journal.jsonl"
    for line in ("5", "{}", '{"key": 5, "value": 1}', '{"key": "a"}', DEEP):
        path.write_text(f'{{"study": 3}}\n{line}\n')
        with pytest.raises(ValueError, match=r"line 2,") as error:
            Journal(path, {"study": 3})
        one_sentence(error)
    path.write_text("notes of mine")
    with pytest.raises(ValueError, match="is no journal, and stays"):
        Journal(path, {"study": 3})
    assert path.read_text() == "notes of mine"


@pytest.mark.parametrize("text", ODD, ids=lambda text: repr(text[:12]))
def test_a_suite_s_manifest_and_plan_that_are_none(tmp_path, text):
    for name, reads in (
        (RECORD, lambda: Record(tmp_path, {"model": "tiny"})),
        ("plan.json", lambda: read_plan(tmp_path / "plan.json")),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"no record|no plan|is not JSON") as error:
            reads()
        one_sentence(error)
        assert (tmp_path / name).read_text(encoding="utf-8") == text


OUTSIDE = [
    "notes/README.md",
    "x/data/documents.jsonl",
    "../victim.txt",
    "/tmp/victim.txt",
    "data/../../victim.txt",
    "data\\x",
    "notes.md",
    "data/documents.jsonl/x",
    "",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_in_a_suite_s_manifest(tmp_path, name):
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (tmp_path / "victim.txt").write_text("mine")
    (out / "notes.md").write_text("mine")
    record = {"run": {"model": "tiny"}, "stages": {"data": {name: {"bytes": 4, "sha256": "x"}}}}
    (out / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"no record of a suite|has the name") as error:
        Record(out, {"model": "tiny"})
    one_sentence(error)
    assert (tmp_path / "victim.txt").read_text() == (out / "notes.md").read_text() == "mine"
    if name not in (
        "notes.md",
        "data/documents.jsonl/x",
        "notes/README.md",
        "x/data/documents.jsonl",
    ):
        with pytest.raises(ValueError, match="has the name"):
            published(out, True)
    else:
        assert name not in [n for names in published(out, True).values() for n in names]


RECIPES = [
    {"name": 5},
    {"slots": {}},
    {"slots": [5]},
    {"slots": [{"name": "../up", "kind": "chats", "dataset": "d", "share": 1.0}]},
    {"slots": [{"name": "a", "kind": "chats", "dataset": 5, "share": 1.0}]},
    {"slots": [{"name": "a", "kind": "chats", "dataset": "d", "share": True}]},
    {"slots": [{"name": "a", "kind": "chats", "dataset": "d", "share": 1.0, "skip": -1}]},
    {
        "slots": [
            {"name": "a", "kind": "chats", "dataset": "d", "share": 1.0, "max_new_tokens": "9"}
        ]
    },
    {"epochs": "x"},
    {"epochs": 1.5},
    {"benches": [5]},
    {"benches": 5},
    {"sampling": {"answer": 5}},
    {"sampling": {"answer": {"top_k": "x"}}},
]


@pytest.mark.parametrize("change", RECIPES, ids=repr)
def test_a_recipe_that_is_none(tmp_path, change):
    whole = {
        "name": "mine",
        "about": "x",
        "slots": [{"name": "a", "kind": "chats", "dataset": "d", "share": 1.0}],
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(whole))
    assert read_recipe(str(path)).name == "mine"
    path.write_text(json.dumps(whole | change))
    with pytest.raises(ValueError, match=r".") as error:
        read_recipe(str(path))
    one_sentence(error)
    for name in ("../manifests/qwen3-chat-v1", "/etc/passwd", ".."):
        with pytest.raises(ValueError, match="There is no data recipe"):
            read_recipe(name)


def test_a_slot_s_file_of_another_s_stays(tmp_path):
    (tmp_path / "slots").mkdir()
    (tmp_path / "slots" / "a.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="no slot that this package wrote, and stays"):
        _SlotFile(tmp_path, "a", {"x": 1})
    assert (tmp_path / "slots" / "a.jsonl").read_text() == "mine"
    store = _SlotFile(tmp_path, "b", {"x": 1})
    store.add(["one"], 1, 1, 0, 0, False)
    state = tmp_path / "slots" / "b.json"
    whole = state.read_text()
    for odd in ('{"mine": 1}', "5", '{"about": {"x": 1}, "done": false, "bytes": -1}'):
        state.write_text(odd)
        with pytest.raises(ValueError, match="and stays"):
            _SlotFile(tmp_path, "b", {"x": 1})
        assert (tmp_path / "slots" / "b.jsonl").read_text() == '{"text": "one"}\n'
    state.write_text(whole)
    assert _SlotFile(tmp_path, "b", {"x": 1}).state["documents"] == 1
    (tmp_path / "slots" / "b.jsonl").unlink()
    assert _SlotFile(tmp_path, "b", {"x": 1}).state["documents"] == 0  # what is gone is read again
    assert (tmp_path / "slots" / "b.jsonl").read_bytes() == b""
    with pytest.raises(ValueError, match="has the name"):
        _SlotFile(tmp_path, "../up", {"x": 1})


def test_settings_of_an_index_are_those_that_are_read(made):
    assert json.loads((made / "index.json").read_text())["settings"] == asdict(
        IndexConfig(tokens=2000)
    )


def test_a_build_goes_on_as_it_was_planned_whatever_is_free_then(lm, tmp_path, monkeypatch):
    saes = {}
    for variant in ("a", "b", "c"):
        sae = TopKSAE(lm.d_model, 16, 2, Provenance(lm.model_name, SITE, NormFilter(10.0)))
        sae.init_from_rows(torch.randn(64, lm.d_model), torch.Generator().manual_seed(ord(variant)))
        saes[variant] = {SITE: sae.requires_grad_(False)}
    config = IndexConfig(tokens=2000, batch_tokens=512)
    monkeypatch.setattr(builds, "SAVE_EVERY", 0.0)
    calls, inner = [], builds.site_activations

    def cut(*args):
        calls.append(args)
        if len(calls) == 12:
            raise RuntimeError("cut off")
        return inner(*args)

    monkeypatch.setattr(builds, "site_activations", cut)
    with pytest.raises(RuntimeError, match="cut off"):
        build_index(lm, saes, dialogues, tmp_path / "i", config, memory=1, bar=False)
    out = build_index(lm, saes, dialogues, tmp_path / "i", config, memory=10**10, bar=False)
    index = load_index(out)
    assert [index.site(SITE, variant).d_sae for variant in "abc"] == [16] * 3


def test_killed_at_its_very_last_step_a_build_is_done(lm, index, monkeypatch):
    work = index / builds.WORK
    work.mkdir()
    for name in ("index.json",):
        (work / name).write_bytes((index / name).read_bytes())
    before = content(index / "tables")
    builds._put_in_place(index)
    assert not work.exists()
    assert content(index / "tables") == before


@pytest.mark.parametrize("text", ['{"index": 0}', "{", "5"])
def test_what_is_said_where_an_index_cannot_be_built_in_another_s_place(lm, index, text):
    (index / "index.json").write_text(text)
    sae = TopKSAE(lm.d_model, 16, 2, Provenance(lm.model_name, SITE, NormFilter(10.0)))
    with pytest.raises(ValueError, match="nothing is built: give another folder"):
        build_index(
            lm,
            {"other": {SITE: sae}},
            dialogues,
            index,
            IndexConfig(tokens=2000),
            fresh=True,
            bar=False,
        )
    assert (index / "index.json").read_text() == text

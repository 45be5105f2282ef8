"""Files that are whole or as they were, names that stay inside, and nothing of others' touched."""

import errno
import os
import signal
import stat
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsae_kit.io import files
from qsae_kit.io.files import (
    ASIDE,
    PART,
    atomic_file,
    atomic_folder,
    checked_name,
    discard_folder,
    inside,
    sweep,
    sweep_folder,
    write_table,
    write_text,
)
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.store import load_sae, save_sae, suite_folder

SITE = "blocks.1.hook_resid_post"


def tree(folder):
    """Every file below a folder with its content, links with what they point to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else None
        )
    return found


# --- names

BAD_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "a/b",
    "a\\b",
    "/etc",
    "C:x",
    "a\0b",
    "a\nb",
    "a\x85b",
    "\ud800",
    " a",
    "a ",
    "n" * 256,
    5,
    None,
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_what_is_no_name(name, unchecked, tmp_path):
    with pytest.raises(ValueError, match=r"A slot has the name .*; rename it"):
        checked_name(name, "A slot")
    if name == "a/b":
        return
    with pytest.raises(ValueError, match=r"A slot has the name .*; rename it"):
        inside(tmp_path, f"x/{name}" if isinstance(name, str) else name, "A slot")


@pytest.mark.parametrize(
    "name", ["a", "jumprelu-x8-l0_16", "Ünï", "a.b", "n" * 255, "a..b", "中文", "-"]
)
def test_what_is_a_name(name, tmp_path):
    assert checked_name(name, "A slot") == name
    assert inside(tmp_path, f"{name}/{name}", "A slot") == tmp_path / name / name


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_no_name_leads_out(name):
    root = Path("/tmp/some/root")
    try:
        path = inside(root, name, "A name")
    except ValueError:
        return
    assert root in Path(os.path.normpath(path)).parents
    assert path.as_posix() == f"{root}/{name}"


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="a link that leads out"):
        inside(tmp_path, "a/x", "A manifest")


def test_a_link_that_leaves(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out.txt").write_text("x")
    (tmp_path / "in" / "away").symlink_to(tmp_path)
    (tmp_path / "in" / "near").symlink_to(tmp_path / "in")
    with pytest.raises(ValueError, match="a link that leads out"):
        inside(tmp_path / "in", "away/out.txt", "A manifest")
    assert inside(tmp_path / "in", "near/x", "A manifest") == tmp_path / "in" / "near" / "x"


# --- one file


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_the_process_s_and_those_of_a_file_that_is_there_stay(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "new.txt", "x")
        with atomic_folder(tmp_path / "folder") as part:
            (part / "a").write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.txt").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask
    (tmp_path / "new.txt").chmod(0o600)
    write_text(tmp_path / "new.txt", "y")
    assert stat.S_IMODE((tmp_path / "new.txt").stat().st_mode) == 0o600


def test_only_regular_files_are_written_to(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    before = os.lstat("/dev/null")
    for name, kind in (
        ("link", "a link"),
        ("broken", "a link"),
        ("fifo", "a pipe"),
        ("folder", "a folder"),
    ):
        with pytest.raises(ValueError, match=kind):
            write_text(tmp_path / name, "x")
    with pytest.raises(ValueError, match="a device"):
        write_text(Path("/dev/null"), "x")
    for name in ("link", "broken", "fifo"):
        with pytest.raises(ValueError, match="is a"), atomic_folder(tmp_path / name):
            pass
    assert os.path.samestat(os.lstat("/dev/null"), before)
    assert (tmp_path / "target").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["broken", "fifo", "folder", "link", "target"]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuses(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x"
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error"))
    )
    with pytest.raises(OSError, match="I/O error"):
        write_text(tmp_path / "a.txt", "y")
    assert tree(tmp_path) == {"a.txt": b"x"}


def in_a_child(work):
    """Runs a function in a process of its own, which ends without any clean-up; returns its exit
    status.
    """
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write_half(write, target):
    with write(target) as part:
        (part / "cfg.json" if part.is_dir() else part).write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_what_a_killed_write_leaves_goes_with_the_next_and_nothing_else_does(tmp_path, write):
    target = tmp_path / "result"
    mine = {
        ".env.template": b"1",
        ".bashrc.original": b"2",
        f"{PART}notes": b"3",
        f"{PART}deadbeef-result.bak": b"4",
        "x.result": b"5",
    }
    for name, data in mine.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / ".git.archived").mkdir()
    (tmp_path / ".git.archived" / "HEAD").write_text("ref")
    assert in_a_child(lambda: write_half(write, target)) == -signal.SIGKILL
    left = [name for name in os.listdir(tmp_path) if name.endswith("-result")]
    assert len(left) == 1
    sweep(tmp_path / "other")
    assert left[0] in os.listdir(tmp_path)
    if write is atomic_file:
        write_text(target, "whole")
    else:
        with atomic_folder(target) as part:
            (part / "cfg.json").write_text("whole")
    expected = {**mine, ".git.archived": None, ".git.archived/HEAD": b"ref"}
    expected |= (
        {"result": b"whole"}
        if write is atomic_file
        else {"result": None, "result/cfg.json": b"whole"}
    )
    assert tree(tmp_path) == expected


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    there, go_on = os.pipe(), os.pipe()

    def write():
        with atomic_file(tmp_path / "a") as part:
            part.write_text("last")
            os.write(there[1], b"x")
            os.read(go_on[0], 1)

    child = os.fork()
    if child == 0:
        try:
            write()
        finally:
            os._exit(0)
    os.read(there[0], 1)
    write_text(tmp_path / "a", "first")
    assert len(os.listdir(tmp_path)) == 2
    os.write(go_on[1], b"x")
    os.waitpid(child, 0)
    assert tree(tmp_path) == {"a": b"last"}


@given(
    st.lists(st.text(alphabet=".-_abcqsaeprtidx0123456789", min_size=1, max_size=24), max_size=6),
    st.sampled_from("ab"),
)
@settings(max_examples=60, deadline=None)
def test_whatever_lies_beside_it_stays(tmp_path_factory, names, own):
    folder = tmp_path_factory.mktemp("tree")
    names = {
        name
        for name in names
        if name not in (".", "..", own) and not name.startswith((PART, ASIDE))
    }
    for name in names:
        (folder / name).write_text(name)
    write_text(folder / own, "1")
    with atomic_folder(folder / f"{own}{own}x") as part:
        (part / "f").write_text("1")
    left = {
        name: data
        for name, data in tree(folder).items()
        if name not in (own, f"{own}{own}x", f"{own}{own}x/f")
    }
    assert left == {name: name.encode() for name in names if name != f"{own}{own}x"}


# --- one folder


@pytest.fixture(params=["exchange", "no exchange"])
def exchanging(request, monkeypatch):
    """With and without a system that exchanges names."""
    if request.param == "no exchange":
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)


def fill(folder, text):
    with atomic_folder(folder) as part:
        (part / "cfg.json").write_text(text)


def test_a_folder_takes_the_place_of_another_and_what_others_put_there_stays(tmp_path, exchanging):
    fill(tmp_path / "sae", "old")
    (tmp_path / "sae" / "notes.md").write_text("mine")
    (tmp_path / "sae" / "plots").mkdir()
    (tmp_path / "sae" / "plots" / "a.png").write_text("mine, too")
    with atomic_folder(tmp_path / "sae") as part:
        (part / "cfg.json").write_text("new")
        (part / "plots").mkdir()
        (part / "plots" / "b.png").write_text("new")
    assert (tmp_path / "sae" / "plots" / "b.png").read_text() == "new"
    (tmp_path / "sae" / "plots" / "b.png").unlink()
    assert tree(tmp_path) == {
        "sae": None,
        "sae/cfg.json": b"new",
        "sae/notes.md": b"mine",
        "sae/plots": None,
        "sae/plots/a.png": b"mine, too",
    }


@pytest.mark.parametrize("moment", range(1, 12))
def test_an_old_folder_is_there_until_the_new_one_is(tmp_path, exchanging, monkeypatch, moment):
    """Whatever call fails while names change, and whether it is undone or the process ends
    there.
    """
    fill(tmp_path / "sae", "old")
    (tmp_path / "sae" / "notes.md").write_text("mine")
    calls = []

    def counted(function):
        def run(*args, **options):
            calls.append(function)
            if len(calls) == moment:
                raise OSError(errno.EIO, "I/O error")
            return function(*args, **options)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "chmod", counted(os.chmod))
        try:
            fill(tmp_path / "sae", "new")
        except OSError:
            assert len(calls) >= moment
    assert (tmp_path / "sae" / "cfg.json").read_text() in ("old", "new")
    fill(tmp_path / "sae", "newer")
    assert tree(tmp_path) == {"sae": None, "sae/cfg.json": b"newer", "sae/notes.md": b"mine"}


def ended_at(moment, folder):
    """Fills a folder, and ends the process at the so-manyth call that changes names."""
    calls = []

    def counted(function):
        def run(*args, **options):
            calls.append(function)
            if len(calls) == moment:
                os._exit(9)
            return function(*args, **options)

        return run

    for name in ("replace", "chmod", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    files._exchange = counted(files._exchange)
    fill(folder, "new")


def test_killed_at_any_call_the_folder_or_its_old_one_comes_back(tmp_path, exchanging, request):
    for moment in range(1, 20):
        home = tmp_path / str(moment)
        fill(home / "sae", "old")
        (home / "sae" / "notes.md").write_text("mine")
        status = in_a_child(lambda moment=moment, home=home: ended_at(moment, home / "sae"))
        if "no" not in request.node.callspec.id:  # never missing, for whoever reads
            assert (home / "sae" / "cfg.json").read_text() in ("old", "new")
        sweep(home / "sae")
        assert (home / "sae" / "cfg.json").read_text() in ("old", "new")
        assert tree(home)["sae/notes.md"] == b"mine"
        assert os.listdir(home) == ["sae"]
        if status == 0:
            return
    raise AssertionError("there were more calls than moments")


def test_a_saved_sae_takes_the_place_of_another_without_a_moment_of_none(tmp_path):
    def sae(seed):
        torch.manual_seed(seed)
        made = TopKSAE(4, 8, 2, Provenance("tiny", SITE, NormFilter(1.0)))
        made.init_from_rows(torch.randn(32, 4), torch.Generator().manual_seed(seed))
        return made

    folder = suite_folder(tmp_path, "topk", SITE)
    save_sae(sae(1), folder)
    (folder / "notes.md").write_text("mine")
    save_sae(sae(2), folder)
    assert torch.equal(load_sae(folder).W_dec, sae(2).exported().W_dec)
    assert sorted(os.listdir(folder)) == ["cfg.json", "notes.md", "sae_weights.safetensors"]
    assert os.listdir(folder.parent) == [SITE]
    with pytest.raises(ValueError, match="rename it"):
        suite_folder(tmp_path, "../topk", SITE)


def test_a_folder_is_discarded_at_once(tmp_path):
    fill(tmp_path / "checkpoint-0-1", "x")
    discard_folder(tmp_path / "checkpoint-0-1")
    assert os.listdir(tmp_path) == []


def test_a_pattern_says_whose_remains_are_swept(tmp_path):
    for name in ("checkpoint-0-1", "notes"):
        (tmp_path / f"{PART}0a1b2c3d-{name}").mkdir()
    sweep_folder(tmp_path, "checkpoint-*")
    assert os.listdir(tmp_path) == [f"{PART}0a1b2c3d-notes"]


def test_names_as_long_as_a_file_system_takes(tmp_path):
    name = "n" * 250 + ".txt"
    write_text(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]


# --- tables

RUN_BY_SPREADSHEETS = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "＝1",
]


@pytest.mark.parametrize("text", RUN_BY_SPREADSHEETS, ids=repr)
def test_a_csv_holds_no_formula(tmp_path, text):
    table = pd.DataFrame(
        {"text": [text, "plain", None], text: [1.0, -2.5, 3.0], "n": ["-1.5", "=x", ""]}
    )
    write_table(table, tmp_path / "t.csv")
    back = pd.read_csv(tmp_path / "t.csv", keep_default_na=False)
    assert back["text"].tolist() == [f"'{text}", "plain", ""]
    assert list(back.columns) == ["text", f"'{text}", "n"]
    assert back[f"'{text}"].tolist() == [1.0, -2.5, 3.0]
    assert back["n"].tolist() == ["-1.5", "'=x", ""]
    write_table(table, tmp_path / "t.parquet")
    assert pd.read_parquet(tmp_path / "t.parquet")["text"][0] == text


def interrupted(path):
    with atomic_file(path) as part:
        part.write_text("half")
        signal.raise_signal(signal.SIGINT)
        time.sleep(1)


def test_a_write_that_is_interrupted_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "a", "old")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted(tmp_path / "a")
    finally:
        signal.signal(signal.SIGINT, before)
    assert tree(tmp_path) == {"a": b"old"}

"""One writer a folder: the second one is told who the first is, and a dead one's lock is free."""

import contextvars
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import killing
import pytest
import torch

from qsae_kit.cli.app import main
from qsae_kit.io import writers
from qsae_kit.io.writers import LOCK, only_writer, only_writer_of


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def entered(path, how=only_writer):
    with how(path):
        return True


def elsewhere(work):
    """What a function gives or raises in a thread with a context of its own."""
    found = []

    def run():
        try:
            found.append(work())
        except ValueError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert found, "it waits"
    return found[0]


def test_a_second_writer_is_told_who_writes(tmp_path):
    with only_writer(tmp_path / "a"):
        said = elsewhere(lambda: entered(tmp_path / "a"))
        assert isinstance(said, ValueError)
        assert f"is being written by process {os.getpid()} on " in str(said)
        assert entered(tmp_path / "a")  # what runs inside may enter again
        assert elsewhere(lambda: entered(tmp_path / "b"))
        assert isinstance(elsewhere(lambda: entered(tmp_path / "." / "a")), ValueError)
    assert elsewhere(lambda: entered(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []  # folders that stay empty go again


def test_a_file_s_lock_lies_beside_it(tmp_path):
    path = tmp_path / "new" / "acts.safetensors"
    with only_writer_of(path):
        assert [p.name for p in path.parent.iterdir()] == [f"{LOCK}-acts.safetensors"]
        assert isinstance(elsewhere(lambda: entered(path, only_writer_of)), ValueError)
        assert elsewhere(lambda: entered(tmp_path / "other", only_writer_of))
    assert list(tmp_path.iterdir()) == []


def test_a_copied_context_does_not_hold_what_was_given_back(tmp_path):
    with only_writer(tmp_path):
        copied = contextvars.copy_context()
    with only_writer(tmp_path):
        said = elsewhere(lambda: copied.run(entered, tmp_path))
    assert isinstance(said, ValueError)
    assert copied.run(entered, tmp_path)


def test_a_dead_owner_s_lock_is_free(tmp_path):
    child = os.fork()
    if child == 0:
        with only_writer(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / LOCK).read_text())["process"] == child
    assert entered(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_locks_may_be_given_back_in_another_order(tmp_path):
    first, second = only_writer(tmp_path / "a"), only_writer(tmp_path / "b")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert entered(tmp_path / "b")  # it is still held here
    assert isinstance(elsewhere(lambda: entered(tmp_path / "b")), ValueError)
    second.__exit__(None, None, None)
    assert elsewhere(lambda: entered(tmp_path / "b"))


def test_a_forked_copy_takes_no_lock_away(tmp_path):
    lock = only_writer(tmp_path / "a")
    lock.__enter__()
    child = os.fork()
    if child == 0:
        lock.__exit__(None, None, None)
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "a" / LOCK).exists()
    assert isinstance(elsewhere(lambda: entered(tmp_path / "a")), ValueError)
    lock.__exit__(None, None, None)
    assert elsewhere(lambda: entered(tmp_path / "a"))


def test_another_user_s_lock_that_is_left_over(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text("{}")
    inner = os.open

    def opens(path, flags, *rest):
        if str(path).endswith(LOCK) and flags & os.O_RDWR and path.exists():
            raise PermissionError(13, "Permission denied")
        return inner(path, flags, *rest)

    monkeypatch.setattr(os, "open", opens)
    with only_writer(tmp_path):
        assert isinstance(elsewhere(lambda: entered(tmp_path)), ValueError)
    assert elsewhere(lambda: entered(tmp_path))


def test_names_that_are_long_or_no_text(tmp_path):
    for name in ("n" * 250, os.fsdecode(b"caf\xe9.txt")):
        assert entered(tmp_path / name, only_writer_of)


@pytest.mark.parametrize("said", [b"", b"[]", b"{", b'{"process": {}}', b"[" * 5000, b"\xff"])
def test_whatever_stands_in_a_lock_s_file(tmp_path, said):
    with only_writer(tmp_path):
        (tmp_path / LOCK).write_bytes(said)
        assert "is being written by another process" in str(elsewhere(lambda: entered(tmp_path)))


def test_what_is_no_place_for_a_lock(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="not a folder"):
        entered(tmp_path / "file")
    (tmp_path / LOCK).symlink_to(tmp_path / "file")
    with pytest.raises(ValueError, match="is a link"):
        entered(tmp_path)
    assert (tmp_path / "file").read_text() == "x"


def test_a_link_to_a_folder_is_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with only_writer(tmp_path / "link"):
        assert isinstance(elsewhere(lambda: entered(tmp_path / "real")), ValueError)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuses(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(writers.fcntl, "flock", refuses)
    assert entered(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_one_may_wait(tmp_path):
    def later():
        with only_writer(tmp_path):
            held.set()
            time.sleep(0.3)

    held = threading.Event()
    thread = threading.Thread(target=later)
    thread.start()
    held.wait()
    with only_writer(tmp_path, wait=5):
        thread.join()


def added(home, number):
    """Adds a line to a log under the lock of a folder that stays empty; False where another process
    holds it.
    """
    try:
        with only_writer(home / "a" / "b"):
            log = home / "log"
            log.write_text(f"{log.read_text() if log.exists() else ''}{number}\n")
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("n", [2, 4])
def test_of_several_processes_one_writes(tmp_path, n):
    """Each adds a line under the lock, or says that it could not; all lines are whole."""
    ready = os.pipe()
    children = []
    for number in range(n):
        child = os.fork()
        if child == 0:
            status = 255
            try:
                os.close(ready[1])
                os.read(ready[0], 1)  # until all are there
                status = sum(not added(tmp_path, number) for _ in range(50))
            finally:
                os._exit(status)
        children.append(child)
    os.close(ready[1])
    refused = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(ready[0])
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    assert len(lines) + sum(refused) == 50 * n
    assert [lines.count(str(number)) for number in range(n)] == [50 - r for r in refused]


COMMANDS = {
    "demo": "demo --out {out}",
    "run": "run tiny --budget 50k --out {out}",
    "train": "train tiny --at resid@2 --tokens 4096 --set batch=256 --out {out}",
    "grid": "train tiny --at resid@2 --tokens 2048,4096 --out {out}",
    "eval": "eval {suite} --out {out}",
    "index": "index {suite} --out {out}",
    "steer": "steer {suite} --out {out}",
    "compare": "compare {suite} tiny tiny --out {out}",
    "suite convert": "suite convert {suite} --out {out}/suite",
    "data write": "data write tiny --n 2 --out {out}/chats.jsonl",
    "data rows": "data rows tiny --at resid@0 --tokens 100 --out {out}/acts.safetensors",
    "data mix": "data mix tiny --tokens 1k --out {out}",
    "rows train": "rows train {out}/acts.safetensors --out {out}",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_writes_says_that_another_one_does(tmp_path, monkeypatch, capsys, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    words = [word.format(out=out, suite=tmp_path / "suite") for word in COMMANDS[name].split()]
    target = Path(words[-1])
    monkeypatch.setattr(sys, "argv", ["qsae", *words])

    def run():
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    with (only_writer if target == out else only_writer_of)(target):
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        assert elsewhere(run) == 1
        assert f"'{target}' is being written by process {os.getpid()}" in " ".join(
            capsys.readouterr().err.split()
        )
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", ["data rows", "index"])
def test_several_commands_on_one_folder(tmp_path, one_thread, name, n):
    """One wins, the others say so, and nothing is corrupt; tests/bench/crowd.py does it with every
    command that writes.
    """
    told = killing.crowd(
        killing.CASES[name], n, tmp_path, killing.make_suite_to_work_on(tmp_path / "suite")
    )
    assert told.problems == []
    assert told.won >= 1

"""Machines other than this one, imitated: file systems and systems that lack something, memory
limits of control groups.
"""

import ctypes
import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest
import torch

from qsae_kit.data.rows import StoredRows
from qsae_kit.io import files, memory, writers
from qsae_kit.io.files import atomic_folder, write_text
from qsae_kit.io.interrupts import Interrupts
from qsae_kit.io.journal import Journal
from qsae_kit.io.memory import free_in_groups, free_memory, kept_memory, return_freed_memory
from qsae_kit.io.runs import Run
from qsae_kit.io.writers import only_writer, only_writer_of
from qsae_kit.sae.store import load_suite
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import train_saes

CPU = torch.device("cpu")


def write_all(folder):
    """A file and a folder, new and again, a run's record and a journal."""
    for text in ("first", "second"):
        write_text(folder / "a.txt", text)
        with only_writer_of(folder / "suite"), atomic_folder(folder / "suite") as part:
            (part / "inner").mkdir()
            (part / "inner" / "cfg.json").write_text(text)
    with only_writer(folder / "run"):
        run = Run(folder / "run", {"seed": 0}, ["x"], name="run.json", what="run")
        run.begin(lambda: None)
        write_text(folder / "run" / "x", "x")
        run.done("x", ["x"])
    journal = Journal(folder / "journal.jsonl", {"seed": 0})
    journal.get("step", lambda: 1)
    assert (folder / "a.txt").read_text() == "second"
    assert (folder / "suite" / "inner" / "cfg.json").read_text() == "second"
    left = [path.name for path in folder.rglob("*") if path.name.startswith(files.OWN)]
    assert left == []


REFUSALS = ("EINVAL", "EACCES", "EPERM", "ENOTSUP", "ENOSYS", "EBADF", "EISDIR", "EROFS")


@pytest.mark.parametrize("name", REFUSALS)
def test_file_systems_that_sync_no_folders(name, tmp_path, monkeypatch):
    """Drive, SMB and FUSE: what is written is there, and nothing is said against it."""
    fsync, asked = os.fsync, []

    def refuses(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            asked.append(descriptor)
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    write_all(tmp_path)
    assert len(asked) >= 4


@pytest.mark.parametrize("name", ["EIO", "ENOSPC"])
def test_a_disk_that_fails_is_an_error_of_folders_too(name, tmp_path, monkeypatch):
    def fails(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(getattr(errno, name), "the disk")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="the disk"):
        write_text(tmp_path / "a.txt", "x")


@pytest.fixture
def windows(monkeypatch):
    """What Windows lacks or refuses, as far as Python shows it."""
    opened, synced, replaced = os.open, os.fsync, os.replace
    held = set()

    def open_(path, flags, *rest, **named):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        descriptor = opened(path, flags, *rest, **named)
        held.add(descriptor)
        return descriptor

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced(descriptor)

    def replace(source, target):
        for descriptor in list(held):
            try:
                busy = os.path.samestat(os.fstat(descriptor), os.stat(source))
            except OSError:  # closed by now
                held.discard(descriptor)
                continue
            if busy:
                raise PermissionError(errno.EACCES, "The process cannot access the file")
        replaced(source, target)

    def library(name, *rest, **named):
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        return ctypes.cdll.LoadLibrary(name)

    for name in ("sysconf", "sched_getaffinity", "getuid", "pread", "pwrite", "fork"):
        monkeypatch.delattr(os, name)
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK"):
        monkeypatch.delattr(os, name)
    for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM"):
        monkeypatch.delattr("signal." + name)
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr("shutil._use_fd_functions", False)
    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for module in (files, writers):
        monkeypatch.setattr(module, "fcntl", None)
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda p: not str(p).startswith("/proc") and real(p))
    monkeypatch.setattr(memory, "free_in_groups", lambda: [])


def test_files_are_written_where_folders_cannot_be_opened(windows, tmp_path):
    write_all(tmp_path)


def test_an_sae_is_trained_and_loaded_where_a_system_has_only_what_windows_has(windows, tmp_path):
    rows = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    source = StoredRows({"blocks.0.hook_resid_post": rows})
    config = TrainConfig("topk", 2, 4, tokens=512, batch=64, pool=256)
    trained = train_saes(source, [config], model_name="m", folder=tmp_path, memory=10**9, bar=False)
    loaded = load_suite(tmp_path / "suite")
    for place, sae in trained.saes().items():
        assert loaded.sae(place).checksum() == sae.checksum()
    with Interrupts() as interrupts:
        assert not interrupts.asked


def test_memory_where_neither_sysconf_nor_proc_is_there(windows, monkeypatch):
    with kept_memory(10**9) as limit:
        limit()
    return_freed_memory()
    with pytest.raises(ValueError, match="does not say how much memory is free"):
        free_memory(CPU)

    class Kernel:
        @staticmethod
        def GlobalMemoryStatusEx(status):
            assert status._obj.length == 64
            status._obj.free_physical = 10**10
            return 1

    monkeypatch.setattr(
        ctypes, "windll", type("Libraries", (), {"kernel32": Kernel}), raising=False
    )
    assert free_memory(CPU) == 9 * 10**9


# --- control groups


def grouped(root, lines, mounts):
    """/proc/self as a process in some groups sees it."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(line + "\n" for line in lines))
    (root / "proc/self/mountinfo").write_text(
        "".join(f"31 23 0:28 {mount} - {kind} cgroup rw\n" for mount, kind in mounts)
    )


def limited(folder, limit, used, stat, v1=False):
    names = ("limit_in_bytes", "usage_in_bytes") if v1 else ("max", "current")
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    (folder / "memory.stat").write_text(stat)


def test_the_least_of_nested_groups_of_version_2(tmp_path):
    top = tmp_path / "sys/fs/cgroup"
    grouped(tmp_path, ["0::/user.slice/job/step"], [("/ /sys/fs/cgroup rw", "cgroup2")])
    limited(top / "user.slice/job/step", "max", 200, "inactive_file 50\n")
    limited(top / "user.slice/job", 1000, 300, "anon 7\ninactive_file 100\n")
    limited(top / "user.slice", 5000, 300, "inactive_file 0\n")
    assert free_in_groups(tmp_path) == [800, 4700]
    (top / "user.slice/job/memory.high").write_text("600\n")
    assert min(free_in_groups(tmp_path)) == 400


def test_the_least_of_nested_groups_of_version_1(tmp_path):
    top = tmp_path / "sys/fs/cgroup/memory"
    grouped(
        tmp_path,
        ["5:cpu,cpuacct:/other", "4:memory:/slurm/job_7/step_0", "0::/ignored"],
        [
            ("/ /sys/fs/cgroup/cpu rw", "cgroup"),
            ("/ /sys/fs/cgroup/memory rw", "cgroup"),
            ("/ /sys/fs/cgroup/unified rw", "cgroup2"),
        ],
    )
    unlimited = 2**63 - 4096
    limited(top / "slurm/job_7/step_0", unlimited, 10, "total_inactive_file 0\n", v1=True)
    limited(top / "slurm/job_7", 900, 500, "inactive_file 9\ntotal_inactive_file 100\n", v1=True)
    limited(top, unlimited, 10, "total_inactive_file 0\n", v1=True)
    assert min(free_in_groups(tmp_path)) == 500


@pytest.mark.parametrize(
    ("line", "seen"),
    [("0::/", "/"), ("0::/docker/abc", "/docker/abc"), ("0::/../../host", "/"), ("0::/x", "/y")],
)
def test_a_container_sees_its_own_group_as_the_highest(line, seen, tmp_path):
    grouped(tmp_path, [line], [(f"{seen} /sys/fs/cgroup rw", "cgroup2")])
    limited(tmp_path / "sys/fs/cgroup", 700, 300, "inactive_file 0\n")
    assert free_in_groups(tmp_path) == [400]


@pytest.mark.parametrize("said", ["", "nothing", "0::", "4:memory", "\x00\n::::\n"])
def test_groups_that_are_not_told_limit_nothing(said, tmp_path):
    assert free_in_groups(tmp_path) == []
    grouped(tmp_path, [said], [("/ /sys/fs/cgroup rw", "cgroup2"), ("broken", "cgroup2")])
    assert free_in_groups(tmp_path) == []


def test_the_plan_keeps_below_a_group_s_limit(monkeypatch):
    monkeypatch.setattr(memory, "free_in_groups", lambda: [10**6, 10**7])
    assert free_memory(CPU) == 900_000
    monkeypatch.setattr(memory, "free_in_groups", lambda: [-5])
    assert free_memory(CPU) == 0

"""Machines other than this one, imitated: file systems and systems that lack something, memory
limits of control groups, a GPU without float64.
"""

import ctypes
import errno
import fcntl
import os
import stat
from pathlib import Path

import pandas as pd
import pytest
import torch
from apple import apple

from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import StoredRows
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.evaluate.score import effective_rank
from qsae_kit.features.indexing import IndexConfig, build_index
from qsae_kit.io import files, memory, writers
from qsae_kit.io.files import atomic_folder, write_text
from qsae_kit.io.interrupts import Interrupts
from qsae_kit.io.journal import Journal
from qsae_kit.io.memory import free_in_groups, free_memory, kept_memory, return_freed_memory
from qsae_kit.io.processor import exact, has_float64
from qsae_kit.io.runs import Run
from qsae_kit.io.writers import only_writer, only_writer_of
from qsae_kit.metrics.detection import auc
from qsae_kit.metrics.reconstruction import (
    Reconstruction,
    compare,
    cross_entropy,
    decoder_cosines,
    kl_divergence,
)
from qsae_kit.sae import Provenance
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.store import load_suite
from qsae_kit.sae.topk import TopKSAE
from qsae_kit.steer.choose.logistic import Groups, l1_logistic
from qsae_kit.train.baselines import pca_sae
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


def test_files_are_written_where_a_file_system_opens_no_folders(tmp_path, monkeypatch):
    opened = os.open

    def refuses(path, flags, *rest, **named):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuses)
    monkeypatch.setattr("shutil._use_fd_functions", False)
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


# --- Apple's GPUs


def test_the_imitation_refuses_what_the_device_would():
    x = torch.randn(4, 3)
    with apple(x):
        for refused in (
            lambda: x.double(),
            lambda: (x * 2)[1:].to(torch.float64),
            lambda: x.cpu() @ x.T,
            lambda: x.relu().numpy(),
        ):
            with pytest.raises((TypeError, RuntimeError), match=r"MPS|same device|numpy"):
                refused()
        assert exact(x + 1).dtype == torch.float64
        assert (x.cpu() @ x.cpu().T).shape == (4, 4)
    assert not has_float64(torch.device("mps"))
    assert has_float64(CPU)


def figures(x, x_hat, f, logits, targets):
    """What is computed in float64 of a device's tensors."""
    score = Reconstruction()
    score.add(x, x_hat, f)
    score.add_sinks(x[:3])
    fit = Groups.of(f[:100], f[100:])
    change = compare(logits, logits * 1.1, targets)
    return [
        score.fvu,
        score.cosine,
        score.share_sinks,
        *NormFilter.of(x.norm(dim=-1)),
        effective_rank(x),
        auc(f[:, 0], x[:, 0]),
        decoder_cosines(x)["mean_cosine"],
        float(cross_entropy(logits, targets).sum()),
        float(kl_divergence(logits, logits * 1.1).sum()),
        *(float(part.sum()) for part in change),
        *l1_logistic(fit, 0.01).weights.tolist(),
        *pca_sae(x, 3, None).W_dec[0].tolist(),
    ]


def test_figures_are_the_same_on_a_device_without_float64():
    g = torch.Generator().manual_seed(0)
    x, x_hat = torch.randn(200, 12, generator=g), torch.randn(200, 12, generator=g)
    f, logits = torch.randn(200, 12, generator=g).relu(), torch.randn(200, 30, generator=g)
    targets = torch.randint(30, (200,), generator=g)
    given = (x, x_hat, f, logits, targets)
    plain = figures(*given)
    with apple(*given):
        assert figures(*given) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated"])
def test_an_sae_is_trained_on_a_device_without_float64(architecture):
    rows = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(architecture, 2, 4, tokens=1024, batch=64, pool=512, precision="float32")
    made = []
    for marked in ((), (rows,)):
        with apple(*marked):
            source = StoredRows({"blocks.0.hook_resid_post": rows})
            suite = train_saes(source, [config], model_name="m", memory=10**9, bar=False)
            [sae] = suite.saes().values()
            assert sae.W_dec.device.type == ("mps" if marked else "cpu")
        made.append(sae)
    torch.testing.assert_close(made[0](rows), made[1](rows), atol=1e-4, rtol=1e-4)


def test_a_suite_is_evaluated_and_indexed_on_a_device_without_float64(lm, tmp_path):
    site = "blocks.2.hook_resid_post"
    sae = TopKSAE(lm.d_model, 64, 4, Provenance("tiny", site, NormFilter(10.0)))
    rows = lm.run_with_cache("How do I thank the nurse?", names_filter=site)[1][site][0]
    sae.init_from_rows(rows, torch.Generator().manual_seed(0))
    suite = {"one": {site: sae.eval().requires_grad_(False)}}
    chats = [
        [
            {"role": "user", "content": f"How do I thank the nurse, {n} times?"},
            {"role": "assistant", "content": "With a card."},
        ]
        for n in range(6)
    ]
    batches = list(token_batches(lm, chats))
    ids = [tensor for batch in batches for tensor in batch[:3]]
    tables = []
    for marked in ((), (lm.hf, sae, *ids)):
        with apple(*marked):
            tables.append(evaluate_suite(lm, suite, batches, bar=False))
            out = tmp_path / f"index{len(tables)}"
            build_index(lm, suite, lambda: chats, out, IndexConfig(tokens=200), bar=False)
    pd.testing.assert_frame_equal(*tables)

"""Interrupts and SIGTERM: the end of a step, a checkpoint, an exit code that tells."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from killing import CASES, forked, make_suite_to_work_on
from typer.testing import CliRunner

from qsae_kit import LiveRows, train_saes
from qsae_kit.cli.app import app
from qsae_kit.cli.outputs import INTERRUPTED
from qsae_kit.data.documents import token_batches
from qsae_kit.features.indexing import WORK
from qsae_kit.io.interrupts import TERMINATED, Interrupts
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.world import world

SITE = "blocks.2.hook_resid_post"
CONFIG = TrainConfig("topk", sparsity=4, expansion=2, tokens=8192, batch=256, pool=1024)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def source(lm):
    return LiveRows(
        lm,
        [SITE],
        lambda: token_batches(lm, (d.messages for d in world.dialogues(10**9, seed=7)), 1024),
    )


def raise_at(rows, number):
    """A watcher that sends this process a signal at a step."""
    return lambda progress: signal.raise_signal(number) if progress.rows == rows else None


def test_an_interrupted_command_says_so_with_its_exit_code(tmp_path, monkeypatch):
    from qsae_kit.train import fit

    inner = fit.train_saes
    monkeypatch.setattr(
        fit,
        "train_saes",
        lambda *args, watch, **rest: inner(
            *args, watch=[*watch, raise_at(512, signal.SIGINT)], **rest
        ),
    )
    words = [
        "train",
        "tiny",
        "--at",
        "resid@2",
        "--tokens",
        "8192",
        "--set",
        "batch=256",
        "--out",
        str(tmp_path),
    ]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == INTERRUPTED == 130
    assert json.loads(done.stdout.split("\n")[-2])["complete"] is False
    # from the checkpoint on, which lies behind the signal's step
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.exception) == (0, None)
    assert "Stopped" not in done.output


def test_a_run_goes_on_by_itself(lm, tmp_path):
    first = train_saes(source(lm), [CONFIG], model_name="tiny", folder=tmp_path / "a", bar=False)
    second = train_saes(source(lm), [CONFIG], model_name="tiny", bar=False)
    assert torch.equal(first[CONFIG.variant][SITE].W_dec, second[CONFIG.variant][SITE].W_dec)
    again = train_saes(source(lm), [CONFIG], model_name="tiny", folder=tmp_path / "a", bar=False)
    assert torch.equal(first[CONFIG.variant][SITE].W_dec, again[CONFIG.variant][SITE].W_dec)


def test_sigterm_leaves_a_checkpoint_and_ends_the_process(lm, tmp_path, one_thread):
    def work():
        watch = [raise_at(1024, signal.SIGTERM)]
        train_saes(
            source(lm), [CONFIG], model_name="tiny", folder=tmp_path / "a", watch=watch, bar=False
        )

    assert forked(work, None, tmp_path / "said") == TERMINATED
    assert [p.name for p in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-0-1024"]
    assert not list((tmp_path / "a").glob(".qsae-*"))
    stopped = train_saes(source(lm), [CONFIG], model_name="tiny", folder=tmp_path / "a", bar=False)
    whole = train_saes(source(lm), [CONFIG], model_name="tiny", bar=False)
    assert torch.equal(stopped[CONFIG.variant][SITE].W_dec, whole[CONFIG.variant][SITE].W_dec)


def test_sigterm_ends_an_index_with_a_checkpoint(tmp_path, one_thread):
    suite = make_suite_to_work_on(tmp_path / "suite")
    out = tmp_path / "out"

    def end_it():
        while not (out / WORK).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def work():
        threading.Thread(target=end_it, daemon=True).start()
        CASES["index"].run(out, suite)

    status = forked(work, None, tmp_path / "said")
    assert status == TERMINATED, (tmp_path / "said").read_text()
    assert list((out / WORK).glob("checkpoint-*/state.json"))


def test_an_interrupt_waits_and_a_second_one_does_not():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def terminated():
    with Interrupts():
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_does_in_the_end_what_it_would_have_done():
    with pytest.raises(SystemExit) as ended:
        terminated()
    assert ended.value.code == TERMINATED == 143
    called = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append("own"))
    try:
        terminated()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        terminated()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == ["own"]


@pytest.mark.slow
def test_a_real_command_under_sigterm(tmp_path):
    words = [
        "train",
        "tiny",
        "--at",
        "resid@2",
        "--set",
        "batch=256",
        "--tokens",
        "2M",
        "--out",
        str(tmp_path / "out"),
    ]
    run = subprocess.Popen([sys.executable, "-m", "qsae_kit.cli", *words], stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (tmp_path / "out" / "train.jsonl").exists():
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=120)
    assert run.returncode == TERMINATED, said.decode()[-2000:]
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] != ["checkpoint-0-0"]

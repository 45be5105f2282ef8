"""Commands that are killed at random moments, and what has to be true then: of the user's files, of
finished work, of the end.

A process that has loaded everything once is forked for each run, with one thread (a pool of threads
does not survive it).
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from qsae_kit.cli.app import main
from qsae_kit.io.files import OWN
from qsae_kit.pipelines import suite as suites
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.store import load_suite, save_sae, suite_folder
from qsae_kit.steer.study import StudyConfig

SITE = "blocks.2.hook_resid_post"
FEW = StudyConfig(
    strengths=(0.3, 0.8, 1.5),
    n_candidates=4,
    n_trials=1,
    n_random=2,
    n_noise=1,
    dose_prompts=4,
    search_prompts=4,
    cost_prompts=4,
    n_facts=4,
    max_new_tokens=24,
)
"""A study of seconds."""
MINE = {
    ".env.template": "SECRET=",
    ".bashrc.original": "alias",
    ".git.archived/HEAD": "ref: main",
    ".notes.abcdefgh": "mine",
    "notes.md": "mine",
    "suite/.git/HEAD": "ref: main",
    "suite/notes/.git/config": "[core]",
    "data/slots/mine.txt": "mine",
    "checkpoint-mine/state.txt": "mine",
    "features/tables.md": "mine",
    "study/.ipynb_checkpoints/x.ipynb": "{}",
}
"""Files of the user's in the folder of a run."""


@dataclass
class Case:
    """A command that is killed: its words, with {out} and {suite} in them, or a function of the
    folder.
    """

    words: str = ""
    work: Callable[[Path], None] | None = None
    mine: dict[str, str] = field(default_factory=lambda: dict(MINE))

    def run(self, out: Path, suite: Path) -> None:
        if self.work is not None:
            self.work(out)
            return
        sys.argv = ["qsae", *(word.format(out=out, suite=suite) for word in self.words.split())]
        main()


def small_sae(seed: int, d_model: int = 160) -> TopKSAE:
    sae = TopKSAE(d_model, 1280, 8, Provenance("tiny", SITE, NormFilter(12.0)))
    sae.init_from_rows(
        torch.randn(64, d_model, generator=torch.Generator().manual_seed(seed)),
        torch.Generator().manual_seed(seed),
    )
    return sae


def save_again(out: Path) -> None:
    """Saves one SAE over another, over and over; it ends with the last one."""
    for seed in range(30):
        save_sae(small_sae(seed), suite_folder(out, "topk", SITE))


def small_suite(out: Path) -> None:
    sizes = suites.Sizes(1500, 2000, 6, 8, 1, FEW)
    suites.sizes_for = lambda lm, config, tokens: sizes
    lm = suites_model()
    suites.make_suite(
        lm, out, suites.SuiteConfig("50k", "resid", "2,3", baseline_sites=1), bar=False
    )


def suites_model():
    from qsae_kit import load_model

    return load_model("tiny")


CASES = {
    "train": Case(
        "train tiny --at resid,mlp@2 --expansion 4 --set batch=256 --set pool=4096 --tokens 40000"
        " --out {out}"
    ),
    "index": Case("index {suite} --tokens 30000 --out {out}"),
    "steer": Case(
        "steer {suite} --quick --set n_selection=6 --set n_evaluation=6 --set n_random=2"
        " --set max_new_tokens=24 --set n_features=2 --out {out}"
    ),
    "data rows": Case("data rows tiny --tokens 20000 --at resid@2 --out {out}/acts.safetensors"),
    "suite convert": Case("suite convert {suite} --out {out}/converted"),
    "save": Case(work=save_again),
    "run": Case(work=small_suite),
}


def start(work: Callable[[], None], said: Path) -> int:
    """Runs a function in a process of its own; its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            sys.stdout = sys.stderr = os.fdopen(descriptor, "a")
            work()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return child


def forked(work: Callable[[], None], seconds: float | None, said: Path) -> int:
    """Runs a function in a process of its own and kills it after some seconds (None: lets it end);
    its exit status.
    """
    child = start(work, said)
    until = None if seconds is None else time.monotonic() + seconds
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if until is not None and time.monotonic() >= until:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(out: Path) -> dict[str, str]:
    """Checksums of all files of a folder, without what differs from run to run: times and
    speeds.
    """
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name, data = path.relative_to(out).as_posix(), path.read_bytes()
        if name in ("plan.json", "manifest.json"):
            continue
        if name.endswith("train.jsonl"):
            data = json.dumps(
                [{**json.loads(line), "seconds": 0} for line in data.decode().split("\n")[:-1]]
            ).encode()
        if name.endswith("index.json"):
            data = json.dumps({k: v for k, v in json.loads(data).items() if k != "built"}).encode()
        if name.endswith("state.json"):
            told = json.loads(data)
            data = json.dumps({**told, "state": {**told["state"], "seconds": 0}}).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def finished(out: Path) -> dict[str, dict]:
    """What a suite's manifest says is done."""
    path = out / "manifest.json"
    return json.loads(path.read_text())["stages"] if path.exists() else {}


def plant(out: Path, mine: dict[str, str]) -> None:
    for name, text in mine.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)


@dataclass
class Told:
    """What the kills of a case came to."""

    kills: int
    problems: list[str]
    seconds: float


def kill_at_random(case: Case, kills: int, home: Path, suite: Path, rng: random.Random) -> Told:
    """Kills a command so often, lets it end each time after some kills, and compares with a run
    that nobody touched.
    """
    began = time.monotonic()
    problems: list[str] = []
    said = home / "said.txt"
    reference = home / "reference"
    plant(reference, case.mine)
    started = time.monotonic()
    if forked(partial(case.run, reference, suite), None, said):
        return Told(0, [f"the reference failed: {said.read_text()[-800:]}"], 0.0)
    length = time.monotonic() - started
    expected = state(reference)
    done = 0
    while done < kills:
        out = home / "killed"
        shutil.rmtree(out, ignore_errors=True)
        plant(out, case.mine)
        for _ in range(rng.choice((1, 2, 3))):
            before = finished(out)
            status = forked(partial(case.run, out, suite), rng.uniform(0, 1.05 * length), said)
            done += status == -signal.SIGKILL
            problems += lost(out, case.mine, before)
            if status == 0:
                break
        # one that was done may refuse
        if forked(partial(case.run, out, suite), None, said) and state(out) != expected:
            problems.append(f"the run after the kill failed: {said.read_text()[-800:]}")
            continue
        left = [p.relative_to(out).as_posix() for p in out.rglob(f"{OWN}*")]
        problems += [f"{name} was left" for name in left]
        found = state(out)
        names = expected.keys() | found.keys()
        problems += [f"{name} differs" for name in names if expected.get(name) != found.get(name)]
    return Told(done, problems, time.monotonic() - began)


@dataclass
class Crowded:
    """What several processes on one folder came to."""

    won: int
    lost: int
    problems: list[str]


def crowd(case: Case, n: int, home: Path, suite: Path) -> Crowded:
    """Runs a command so many times at once on one folder: one wins, the others say so, and the
    folder is as after one alone.
    """
    mine = {name: text for name, text in case.mine.items()}
    alone, out, said = home / "alone", home / "crowded", [home / f"said-{i}.txt" for i in range(n)]
    plant(alone, mine)
    plant(out, mine)
    forked(partial(case.run, alone, suite), None, home / "said.txt")
    children = [start(partial(case.run, out, suite), path) for path in said]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    texts = [path.read_text() for path in said]
    refused = [text for text, status in zip(texts, statuses, strict=True) if status]
    problems = [f"a loser said {text[-300:]!r}" for text in refused if not _says_who(text)]
    problems += [f"{name} was left" for name in (p.name for p in out.rglob(f"{OWN}*"))]
    expected, found = state(alone), state(out)
    problems += [
        f"{name} differs"
        for name in expected.keys() | found.keys()
        if expected.get(name) != found.get(name)
    ]
    return Crowded(n - len(refused), len(refused), problems)


def _says_who(text: str) -> bool:
    """Whether a command that lost says in a sentence who writes, or that another run is there
    already.
    """
    told = " ".join(text.split())
    return "Traceback" not in told and (
        "is being written by process" in told or "is not an empty folder" in told
    )


def lost(out: Path, mine: dict[str, str], before: dict[str, dict]) -> list[str]:
    """What is gone: files of the user's, and stages that were finished."""
    after = finished(out)
    files = [name for stage in before.values() for name in stage]
    return [
        *(f"{name} is not as it was" for name in mine if _read(out / name) != mine[name]),
        *(
            f"the finished stage {stage} is gone"
            for stage in before
            if before[stage] != after.get(stage)
        ),
        *(f"{name} is gone" for name in files if not (out / name).is_file()),
    ]


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def make_suite_to_work_on(folder: Path) -> Path:
    """A suite of two SAEs of the bundled model."""
    from qsae_kit.data.documents import token_batches
    from qsae_kit.data.rows import kept_rows
    from qsae_kit.world import world

    lm = suites_model()
    documents = (dialogue.messages for dialogue in world.dialogues(60, seed=1_000_021))
    rows = kept_rows(lm, [SITE], next(iter(token_batches(lm, documents, batch_tokens=2048))))[SITE]
    median = float(rows.norm(dim=-1).median())
    for variant, seed in (("topk", 1), ("topk-seed_2", 2)):
        sae = TopKSAE(
            lm.d_model, 320, 8, Provenance("tiny", SITE, NormFilter(median), tokens=50_000)
        )
        sae.init_from_rows(rows, torch.Generator().manual_seed(seed))
        save_sae(sae, suite_folder(folder, variant, SITE))
    assert len(load_suite(folder)) == 2
    return folder

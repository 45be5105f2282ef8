"""Whatever lies in a folder, after any command every file that is not the package's own output is
there to the byte.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killing import SITE, make_suite_to_work_on
from safetensors.torch import save_file

from qsae_kit.cli.app import main
from qsae_kit.data.mixes import ABOUT, DEALT, SLOTS
from qsae_kit.io.files import OWN
from qsae_kit.pipelines import suite as suites

LIKE_OURS = [
    ".env.template",
    ".bashrc.original",
    ".git.archived",
    ".acts.safetensors.ab_9zz01",
    ".checkpoint-0-1.old",
    ".building",
    "old-tables",
    "checkpoint-1",
    "checkpoint-0-5",
    "checkpoint-mine",
    "suite",
    "tables",
    "documents.parquet",
    "tokens.parquet",
    "index.json",
    "data",
    "slots",
    "world.jsonl",
    "study",
    "features",
    "train.jsonl",
    "train.jsonl.bak",
    "state.json",
    "manifest.json",
    "plan.json",
    "topk",
    ".git",
    "HEAD",
    "cfg.json",
    "sae_weights.safetensors",
    "notes.md",
    SITE,
    "labels.jsonl",
    "chats.jsonl.tmp",
    "evaluation",
    "README.md~",
    "converted.old",
]
NAMES = st.one_of(
    st.sampled_from(LIKE_OURS), st.text(alphabet="ab.-_ü", min_size=1, max_size=9)
).filter(lambda name: name.strip(".") and not name.startswith(OWN))
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
TREES = st.dictionaries(PATHS, st.binary(max_size=20), max_size=8)
FAST = ("rows train", "suite convert")


def tries(name: str) -> settings:
    """More trees for a command that takes no time."""
    n = 12 if name in FAST else 4
    return settings(
        max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


def plant(folder: Path, tree: dict[str, bytes]) -> dict[str, bytes]:
    """Writes as much of a tree as fits (a name is a file or a folder); what is there then."""
    for name, data in tree.items():
        path = folder / name
        if path.exists() or any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def given_(tmp_path_factory):
    home = tmp_path_factory.mktemp("given")
    make_suite_to_work_on(home / "suite")
    rows = torch.randn(600, 16, generator=torch.Generator().manual_seed(1))
    save_file({"acts": rows}, home / "acts.safetensors", metadata={"hook_name": SITE})
    return home


COMMANDS = {
    "rows train": (
        "rows train {given}/acts.safetensors --arch topk --l0 2 --expansion 2 --tokens 256 --set"
        " batch=128 --set pool=256 --out {out}"
    ),
    "suite convert": "suite convert {given}/suite --out {out}",
    "index": "index {given}/suite --variant topk --tokens 1500 --out {out}",
    "data rows": "data rows tiny --at resid@0 --tokens 50 --out {out}/acts.safetensors",
    "data write": "data write tiny --n 1 --max-new-tokens 2 --out {out}/chats.jsonl",
    "eval": "eval {given}/suite --variant topk --tokens 500 --out {out}",
}


def run(name: str, out: Path, given: Path) -> int:
    before = sys.argv
    sys.argv = ["qsae", *(word.format(out=out, given=given) for word in COMMANDS[name].split())]
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture(scope="module")
def outputs(given_, tmp_path_factory):
    """What the commands write into an empty folder."""
    found = {}
    for name in COMMANDS:
        out = tmp_path_factory.mktemp("empty") / name
        assert run(name, out, given_) == 0
        found[name] = set(contents(out))
        assert found[name]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_after_any_command_what_was_there_is_there(given_, outputs, tmp_path_factory, name):
    refused = []

    @given(TREES)
    @tries(name)
    def check(tree):
        out = tmp_path_factory.mktemp("tree") / "out"
        before = plant(out, tree)
        refused.append(run(name, out, given_) != 0)
        after = contents(out)
        own = outputs[name] if not refused[-1] else set()
        assert {n: after.get(n) for n in before if n not in own} == {
            n: data for n, data in before.items() if n not in own
        }
        assert not [n for n in after if n not in before and OWN in n]
        if not refused[-1]:
            assert outputs[name] - {n for n in outputs[name] if n.startswith("checkpoint-")} <= set(
                after
            )
        shutil.rmtree(out.parent)

    check()
    assert name == "convert" or not all(refused)


STAGED = {
    "data": (f"data/{DEALT}", f"data/{ABOUT}"),
    "train": tuple(
        f"suite/jumprelu-x4-l0_13/{SITE}/{name}" for name in ("cfg.json", "sae_weights.safetensors")
    ),
    "evaluate": ("evaluation/evaluation.csv", "baselines/seeds.csv"),
    "index": ("features/index.json",),
    "study": ("study/study.csv", "study/journal.jsonl"),
    "card": ("README.md",),
}
"""What stages write that take no time."""
DAMAGE = st.lists(
    st.sampled_from(sorted(name for names in STAGED.values() for name in names)), max_size=3
)


def test_a_suite_s_stages_touch_nothing_else(lm, tmp_path_factory, monkeypatch):
    plan = tmp_path_factory.mktemp("plan")
    made = suites.make_plan(lm, suites.SuiteConfig("60k", "resid", "2"), plan)
    monkeypatch.setattr(suites, "make_plan", lambda *rest: made)
    ran = []

    def stage(name):
        def work(self):
            ran.append(name)
            for own in STAGED[name]:
                path = self.out / own
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir() or path.is_symlink():
                    raise ValueError("That is a folder.")
                path.write_text(f"{name} {len(ran)}")
            if name == "data":
                for file in ("world.jsonl", "world.json"):
                    (self.out / "data" / SLOTS).mkdir(exist_ok=True)
                    (self.out / "data" / SLOTS / file).write_text("{}")

        return work

    for name in STAGED:
        monkeypatch.setattr(suites._Suite, name, stage(name))
    own = {file for files in STAGED.values() for file in files} | {"manifest.json", "plan.json"}
    own |= {f"data/{SLOTS}/world.jsonl", f"data/{SLOTS}/world.json"}

    def make(out, remake):
        try:
            suites.make_suite(
                lm, out, suites.SuiteConfig("60k", "resid", "2"), remake=remake, bar=False
            )
        except (ValueError, OSError):
            return False
        return True

    @given(TREES, DAMAGE, st.booleans(), st.booleans())
    @settings(
        max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    def check(tree, damaged, remake, cut_off):
        out = tmp_path_factory.mktemp("tree") / "out"
        before = {name: data for name, data in plant(out, tree).items() if name not in own}
        done = make(out, False)
        if done:
            finished = contents(out)
            for name in damaged:
                (out / name).unlink(missing_ok=True)
            if cut_off:
                record = json.loads((out / "manifest.json").read_text())
                record["stages"].pop("card", None)
                (out / "manifest.json").write_text(json.dumps(record))
            ran.clear()
            done = make(out, remake)
            after = contents(out)
            assert remake or set(ran) <= {"card"}  # nothing that is done is made again by itself
            if not remake:
                kept = {
                    n: data
                    for n, data in finished.items()
                    if n not in (*damaged, "manifest.json", "README.md")
                }
                assert {n: after.get(n) for n in kept} == kept
            assert not done or not [n for n in after if n not in before and OWN in n]
        assert {n: data for n, data in contents(out).items() if n in before} == before
        shutil.rmtree(out.parent)

    check()

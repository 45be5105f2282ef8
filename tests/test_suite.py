"""`qsae run`: the whole folder from one command, skipped where it is there, and the same after
any kill.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from huggingface_hub.utils._paths import DEFAULT_IGNORE_PATTERNS

from qsae_kit import load_index, load_model
from qsae_kit.cli.app import main
from qsae_kit.data.companions import COMPANIONS, GENERAL, SLOW_AND_SMALL, WORLD
from qsae_kit.io.runs import Run
from qsae_kit.pipelines import card, suite
from qsae_kit.pipelines.card import plain, push
from qsae_kit.pipelines.suite import (
    STAGES,
    Record,
    Sizes,
    SuiteConfig,
    _Suite,
    identity_of,
    make_plan,
    make_suite,
    parse_budget,
    recipe_for,
    said_plan,
    sizes_for,
    suite_bytes,
    usual_goal,
)
from qsae_kit.sae.store import load_suite
from qsae_kit.steer.behaviours import Verdict, refusal_prompts
from qsae_kit.steer.study import StudyConfig

SMALL = Sizes(
    1500,
    2000,
    6,
    8,
    1,
    StudyConfig(
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
    ),
)
CONFIG = SuiteConfig("50k", "resid", "2,3", baseline_sites=1)
SCRIPT = """
import sys
from pathlib import Path
import test_suite
from qsae_kit import load_model
from qsae_kit.pipelines import suite
suite.sizes_for = lambda lm, config, tokens: test_suite.SMALL
suite.make_suite(load_model("tiny"), Path(sys.argv[1]), test_suite.CONFIG, bar=False)
"""
KILLS = int(os.environ.get("QSAE_KILLS", "3"))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(suite, "sizes_for", lambda lm, config, tokens: SMALL)


@pytest.fixture(scope="module")
def made(lm, tmp_path_factory):
    """A small suite, made once; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "sizes_for", lambda lm, config, tokens: SMALL)
        make_suite(lm, out, CONFIG, bar=False)
    return out


def content(out):
    """What has to be the same in every run: everything but times and speeds."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        if name in ("plan.json", "manifest.json"):
            continue
        data = path.read_bytes()
        if name == "train.jsonl":
            data = json.dumps(
                [{**json.loads(line), "seconds": 0} for line in data.decode().splitlines()]
            ).encode()
        if name == "features/index.json":
            data = json.dumps({k: v for k, v in json.loads(data).items() if k != "built"}).encode()
        found[name] = data
    return found


@pytest.mark.slow
def test_the_folder_is_complete_and_says_what_is_in_it(made, lm):
    record = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    assert tuple(record["stages"]) == STAGES
    listed = {name for files in record["stages"].values() for name in files}
    there = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert there == listed | {"manifest.json", "plan.json"}
    for name in (
        "evaluation/evaluation.csv",
        "baselines/baselines.html",
        "features/index.json",
        "study/steering.json",
        "README.md",
    ):
        assert name in listed
    saes = load_suite(made / "suite")
    assert [list(each) for each in saes.values()] == [
        ["blocks.2.hook_resid_post", "blocks.3.hook_resid_post"]
    ]
    page = (made / "README.md").read_text(encoding="utf-8")
    assert page.startswith('---\nlibrary_name: saelens\nbase_model: "tiny"\n')
    assert "| blocks.2.hook\\_resid\\_post | 0." in page
    assert "selectivity" in page
    assert "tiny world" in page


def copied(made, tmp_path):
    out = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(made), str(out)], check=True)
    return out


@pytest.fixture
def ran(monkeypatch):
    """Stages that would run, which write nothing."""
    called = []
    for name in STAGES:
        monkeypatch.setattr(suite._Suite, name, lambda self, name=name: called.append(name))
    return called


@pytest.mark.slow
def test_a_stage_that_is_done_is_never_made_again_by_itself(made, lm, tmp_path, small, ran):
    out = copied(made, tmp_path)
    make_suite(lm, out, CONFIG, bar=False)
    assert ran == []
    table = out / "evaluation" / "evaluation.csv"
    table.write_text(table.read_text().replace("blocks.2", "blocks.1", 1))
    before = table.read_bytes()
    make_suite(lm, out, CONFIG, bar=False)  # nothing that is left to do needs it
    assert ran == []
    assert table.read_bytes() == before
    with pytest.raises(ValueError, match=r'another suite: dtype is "torch\.bfloat16" now'):
        make_suite(load_model("tiny", "bfloat16"), out, CONFIG, bar=False)
    with pytest.raises(ValueError, match='another suite: budget is "60k" now'):
        make_suite(lm, out, SuiteConfig("60k", "resid", "2,3", baseline_sites=0), bar=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "gone", ["data", "data/documents.jsonl", "suite", "features/documents.parquet"]
)
def test_a_suite_without_its_inputs_keeps_all_that_was_made_of_them(
    made, lm, tmp_path, small, ran, gone
):
    out = copied(made, tmp_path)
    subprocess.run(["rm", "-r", str(out / gone)], check=True)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    make_suite(lm, out, CONFIG, bar=False)
    assert ran == []
    record = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    del record["stages"]["card"], record["stages"]["evaluate"]  # as where it was cut off
    (out / "manifest.json").write_text(json.dumps(record), encoding="utf-8")
    before[out / "manifest.json"] = json.dumps(record, indent=1).encode() + b"\n"
    if gone.startswith(("data", "suite")):
        with pytest.raises(
            ValueError, match=r"gone or changed, and evaluate needs them; .* anew with --remake"
        ):
            make_suite(lm, out, CONFIG, bar=False)
        assert ran == []
    else:
        make_suite(lm, out, CONFIG, bar=False)
        assert ran == ["evaluate", "card"]
        before.pop(out / "manifest.json")
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.slow
def test_what_is_made_anew_is_kept_until_the_new_one_is_whole(
    made, lm, tmp_path, small, monkeypatch
):
    out = copied(made, tmp_path)
    mine = {"suite/notes.txt": "my own", "evaluation/mine.csv": "a,b", "study/.keep": ""}
    for name, text in mine.items():
        (out / name).write_text(text)
    table = out / "evaluation" / "evaluation.csv"
    old = table.read_bytes()
    table.write_bytes(old + b"\n")
    evaluate = suite._Suite.evaluate

    def fails(self):
        raise ValueError("The disk is full.")

    monkeypatch.setattr(suite._Suite, "evaluate", fails)
    with pytest.raises(ValueError, match="full"):
        make_suite(lm, out, CONFIG, remake=True, bar=False)
    kept = out / suite.REPLACED
    assert (kept / "evaluate" / "evaluation" / "evaluation.csv").read_bytes() == old + b"\n"
    assert (kept / "study" / "study" / "study.csv").is_file()
    assert not table.exists()
    monkeypatch.setattr(suite._Suite, "evaluate", evaluate)
    for name in ("index", "study"):
        monkeypatch.setattr(suite._Suite, name, lambda self, name=name: restore(self.out, name))

    def restore(out, stage):
        for path in [p for p in (kept / stage).rglob("*") if p.is_file()]:
            place = out / path.relative_to(kept / stage)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())

    make_suite(lm, out, CONFIG, bar=False)  # without the flag: it goes on
    assert not kept.exists()
    assert table.read_bytes() == old
    assert {name: (out / name).read_text() for name in mine} == mine
    first, second = content(made), content(out)
    assert {name for name in second if name not in first} == set(mine)
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(1, 9))
def test_cut_off_while_room_is_made_nothing_is_built_upon_what_is_gone(
    made, lm, tmp_path, small, ran, monkeypatch, moment
):
    out = copied(made, tmp_path)
    (out / "data" / "documents.jsonl").write_text("changed")
    calls, inner = [], Run.write

    def write(self):
        calls.append(self)
        if len(calls) == moment:
            raise OSError(5, "I/O error")
        inner(self)

    monkeypatch.setattr(Run, "write", write)
    with contextlib.suppress(OSError):
        make_suite(lm, out, CONFIG, remake=True, bar=False)
    monkeypatch.setattr(Run, "write", inner)
    done = json.loads((out / "manifest.json").read_text())["stages"]
    assert list(done) == list(STAGES[: len(done)])  # never a later stage without those before it


@pytest.mark.slow
def test_a_card_that_was_pushed_is_as_it_was_and_the_last_stage_can_be_made_anew(
    made, lm, tmp_path, small, hub, capsys
):
    out = copied(made, tmp_path)
    push(out, "me/saes", examples=False)
    sent = json.loads(hub.sent["manifest.json"])["stages"]["card"]["README.md"]
    assert sent["bytes"] == len(hub.sent["README.md"])
    make_suite(lm, out, CONFIG)
    assert "Gone or changed" not in "".join(capsys.readouterr())
    (out / "README.md").write_text((out / "README.md").read_text() + "More.\n")
    plan = (out / "plan.json").read_bytes()
    make_suite(lm, out, CONFIG, remake=True, bar=False)
    assert (out / "README.md").read_bytes() == (made / "README.md").read_bytes()
    assert (out / "plan.json").read_bytes() == plan


def test_a_plan_that_is_refused_leaves_nothing(lm, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="50,000 at least"):
        make_suite(lm, out, replace(CONFIG, budget="10k"), bar=False)
    assert not out.exists()


@pytest.mark.parametrize(
    "name",
    [
        "data/documents.jsonl",
        "evaluation/evaluation.csv",
        "study/report.html",
        "suite/a/b/cfg.json",
    ],
)
def test_a_folder_that_is_of_no_suite_is_not_written_over(lm, tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="is of no suite, and would be written over"):
        make_suite(lm, tmp_path, CONFIG, bar=False)
    assert {p.name: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == {
        Path(name).name: "mine"
    }


def test_a_stage_s_folder_that_is_a_link(lm, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data").symlink_to(tmp_path / "big")
    with pytest.raises(ValueError, match="is a link; put a folder there"):
        make_suite(lm, tmp_path / "out", CONFIG, bar=False)


def test_two_models_of_one_name_are_two(lm, tmp_path):
    other = load_model("tiny")
    assert identity_of(other, CONFIG) == identity_of(lm, CONFIG)
    with torch.no_grad():
        other.hf.model.norm.weight[0] += 1
    assert identity_of(other, CONFIG) != identity_of(lm, CONFIG)


@pytest.mark.slow
def test_an_interrupt_in_the_training_s_last_step_ends_the_run(
    made, lm, tmp_path, small, ran, monkeypatch
):
    out = copied(made, tmp_path)
    (out / "train.jsonl").unlink()
    monkeypatch.setattr(suite._Suite, "train", TRAIN)
    monkeypatch.setattr(suite, "fit_live", lambda *args, stop, **rest: stop.set())
    with pytest.raises(KeyboardInterrupt):
        make_suite(lm, out, CONFIG, remake=True, bar=False)
    assert ran == []


TRAIN = _Suite.train


@pytest.mark.slow
def test_killed_at_random_moments_it_comes_to_the_same_folder(made, tmp_path):
    out, rng = tmp_path / "killed", random.Random(int(os.environ.get("QSAE_KILL_SEED", "0")))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    killed = 0
    while True:
        run = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(out)], env=env, stderr=subprocess.PIPE
        )
        try:
            run.wait(timeout=rng.uniform(6, 30) if killed < KILLS else None)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed += 1
            continue
        assert run.returncode == 0, run.stderr.read().decode()[-2000:]
        break
    first, second = content(made), content(out)
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []
    assert killed > 0


def test_a_plan_in_tokens_and_in_hours(lm, tmp_path):
    plan = make_plan(lm, SuiteConfig("300k"), tmp_path)
    assert (plan["tokens"], len(plan["sites"]), plan["recipe"]) == (300_000, 18, "tiny-chat-v1")
    assert plan["training"]["batch"] <= 2048
    assert set(plan["hours"]) == set(STAGES) - {"card"}
    assert "18 sites, 300,000 tokens" in said_plan(plan)
    timed = make_plan(lm, SuiteConfig("1h", layers="3"), tmp_path)
    assert sum(timed["hours"].values()) <= 0.95
    assert timed["tokens"] > 300_000
    assert len(make_plan(lm, SuiteConfig("300k"), tmp_path, memory=300_000_000)["groups"]) > 1
    with pytest.raises(ValueError, match="too few for any SAE; give more hours"):
        make_plan(lm, SuiteConfig("0.001h"), tmp_path)
    with pytest.raises(ValueError, match="50,000 at least"):
        make_plan(lm, SuiteConfig("20k"), tmp_path)


def test_a_recipe_of_ones_own(lm, tmp_path, monkeypatch):
    entry = json.loads((suite.mixes.MANIFESTS / "tiny-chat-v1.json").read_text(encoding="utf-8"))
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(entry | {"name": "mine"}), encoding="utf-8")
    config = SuiteConfig("60k", "resid", "3", recipe=str(path))
    plan = make_plan(lm, config, tmp_path)
    taken = []

    def write_mix(lm, manifest, tokens, out, **rest):
        taken.append((manifest.name, tokens))

    monkeypatch.setattr(suite.mixes, "write_mix", write_mix)
    suite._Suite(lm, tmp_path / "out", config, plan, None, None, False).data()
    assert (plan["recipe"], taken) == ("mine", [("mine", 60_000)])


def test_a_disk_that_is_too_small(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(
        suite.shutil, "disk_usage", lambda path: suite.shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    )
    with pytest.raises(ValueError, match=r"takes \d.\d GB of disk, and 0.0 GB are free; free some"):
        make_plan(lm, SuiteConfig("300k"), tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smoke", (5_000_000, None)),
        ("300k", (300_000, None)),
        ("1.5M", (1_500_000, None)),
        ("12h", (None, 12.0)),
        ("70000", (70_000, None)),
    ],
)
def test_budgets(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "fast", "-3M", "0h", "nan", "1e999", "M"])
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match="allowed are smoke, useful, publish, tokens such as 300k"):
        parse_budget(text)


def test_the_size_of_a_suite_on_disk(made):
    plan = json.loads((made / "plan.json").read_text(encoding="utf-8"))
    recipe = recipe_for(CONFIG, 160, 2, plan["tokens"], False)
    real = sum(p.stat().st_size for p in made.rglob("sae_weights.safetensors"))
    assert suite_bytes(recipe, [160] * 2) == pytest.approx(real, rel=0.02)


def test_small_budgets_and_slow_models_get_smaller_studies():
    digests = {companion: digest for digest, companion in COMPANIONS.items()}
    small, slow, whole = (
        sizes_for(
            SimpleNamespace(weights_digest=lambda c=c: digests.get(c, "")), SuiteConfig(), tokens
        )
        for c, tokens in ((WORLD, 300_000), (SLOW_AND_SMALL, 10**6), (GENERAL, 10**8))
    )
    assert small.n_evaluation == slow.n_evaluation < whole.n_evaluation == 300
    assert small.study.n_random == slow.study.n_random < whole.study.n_random
    assert slow.study.strengths == whole.study.strengths[::2]
    assert small.study.strengths == whole.study.strengths


def test_markup_in_a_card_is_text(made):
    assert plain("|x|\n[a](b)") == "\\|x\\| \\[a\\](b)"
    told, study, plan = (
        json.loads((made / name).read_text(encoding="utf-8"))
        for name in ("data/data.json", "study/study.json", "plan.json")
    )
    assert {slot["kind"]: slot["answered"] for slot in told["slots"].values()}.items() >= {
        ("chats", False),
        ("prompts", True),
    }
    told["slots"]["made"] = {**told["slots"]["world"], "answered": True}
    rows = pd.read_csv(made / "evaluation" / "evaluation.csv")
    page = card.model_card(
        plan | {"model": 'x"\ny: <b>'},
        told,
        rows,
        study | {"verdict": "<script>alert(1)</script> [x](y)"},
    )
    assert "<script>" not in page
    assert re.search(r"^\| made \|.*\| yes \|", page, re.MULTILINE)
    assert re.search(r"^\| world \|.*\| no \|", page, re.MULTILINE)
    assert "[x](y)" not in page
    # on one line, its quote escaped
    assert page.split("base_model: ")[1].split("\n")[0].count('"') == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--budget", "soon"], "The budget 'soon' was given; allowed are smoke"),
        (["--slot", "world"], "--slot world was given; write it as NAME=VALUE"),
        (["--slot", "world=none.jsonl"], "There is no file 'none.jsonl'"),
        (["--set", "goal=both"], "goal=both was given; goal takes suppress or induce or auto"),
        (
            ["--budget", "60k", "--data", "mine"],
            "There is no data recipe 'mine'; choose from own-chat-v1",
        ),
    ],
)
def test_the_command_says_what_is_wrong_before_anything_is_made(
    tmp_path, monkeypatch, capsys, given, message
):
    monkeypatch.setattr(
        sys, "argv", ["qsae", "run", "tiny", "--out", str(tmp_path / "out"), *given]
    )
    with pytest.raises(SystemExit):
        main()
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "data").exists()


def test_the_command_prints_a_plan_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "qsae",
            "run",
            "tiny",
            "--budget",
            "60k",
            "--at",
            "@3",
            "--plan",
            "--out",
            str(tmp_path / "o"),
        ],
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert "3 sites, 60,000 tokens of tiny-chat-v1" in capsys.readouterr().out
    assert list(tmp_path.rglob("*.json*")) == []


class Hub:
    """A hub that takes what it is given after failing as often as told."""

    def __init__(self, errors=()):
        self.errors, self.given, self.sent = list(errors), [], {}

    def create_repo(self, repository, **options):
        assert options == {"private": True, "exist_ok": True}
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        self.given.append(allow_patterns)
        if self.errors:
            raise self.errors.pop()
        names = [
            p.relative_to(folder_path).as_posix()
            for p in Path(folder_path).rglob("*")
            if p.is_file()
        ]
        taken = filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=DEFAULT_IGNORE_PATTERNS
        )
        self.sent = {name: (Path(folder_path) / name).read_bytes() for name in taken}


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    return hub


@pytest.mark.slow
def test_a_push_that_is_cut_off_says_what_to_do_and_goes_on(made, tmp_path, hub):
    hub.errors = [
        OSError(28, "No space left on device"),
        ConnectionError("Name or service not known"),
    ]
    with pytest.raises(ValueError, match="no finished suite"):
        push(tmp_path, "me/saes")
    out = copied(made, tmp_path)
    for reason in ("Name or service not known", "No space left on device"):
        with pytest.raises(ValueError, match=f"{reason}.*not sent again: run the same command"):
            push(out, "me/saes")
    assert push(out, "me/saes") == "https://hub/me/saes"


@pytest.mark.slow
def test_what_is_pushed_is_on_the_list_and_the_card_says_it(made, tmp_path, hub):
    out = copied(made, tmp_path)
    mine = [
        "suite/mine/blocks.2.hook_resid_post/cfg.json",
        "notes.md",
        "features/labels.jsonl",
        "data/more.jsonl",
    ]
    for name in mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("private")
    push(out, "me/saes", examples=False)
    assert not {
        "data/documents.jsonl",
        "features/documents.parquet",
        "study/journal.jsonl",
        *mine,
    } & set(hub.sent)
    assert not [name for name in hub.sent if name.endswith("examples.parquet")]
    assert [name for name in hub.sent if name.endswith("sae_weights.safetensors")]
    card_text = hub.sent["README.md"].decode()
    assert "No text of the documents is in it." in card_text
    said = set(re.findall(r"`([^`]+)`", card_text.split(card.BEGIN)[1].split(card.END)[0]))
    short = {
        f"{n.split('/')[0]}/.../{n.split('/')[-1]}" if n.count("/") > 1 else n for n in hub.sent
    }
    assert said == short
    # what stays at home still opens
    home = tmp_path / "downloaded"
    for name, data in hub.sent.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data)
    page = load_index(home / "features").site().page(3)
    assert page.top == []
    assert page.promoted
    assert len(load_index(home / "features").site().search("nurse")) >= 0
    # the bundled model's world may be passed on
    push(out, "me/saes")
    assert {"features/documents.parquet"} <= set(hub.sent)
    assert "Texts of the documents are in it." in hub.sent["README.md"].decode()


@pytest.mark.slow
def test_a_card_that_cannot_say_what_is_published_is_not_pushed(made, lm, tmp_path, hub):
    out = copied(made, tmp_path)
    readme = out / "README.md"
    readme.write_text("My own words.")
    with pytest.raises(ValueError, match="is no card of a suite"):
        make_suite(lm, out, CONFIG, bar=False)
    with pytest.raises(ValueError, match=r"no place between .* put the two lines back"):
        push(out, "me/saes")
    assert readme.read_text() == "My own words."
    readme.write_text(f"My own words.\n{card.BEGIN}\n{card.END}\nMore of them.\n")
    push(out, "me/saes")
    assert readme.read_text().startswith("My own words.\n")
    assert readme.read_text().endswith("\nMore of them.\n")
    (out / "evaluation" / "evaluation.html").unlink()
    (out / "evaluation" / "evaluation.html").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="a link that leads out of its folder"):
        push(out, "me/saes")
    (out / "evaluation" / "evaluation.html").unlink()
    (out / "evaluation" / "evaluation.html").symlink_to(out / "data" / "documents.jsonl")
    with pytest.raises(ValueError, match="is a link, and links are not published"):
        push(out, "me/saes")


@pytest.mark.slow
def test_a_folder_of_this_machine_is_not_published(made, tmp_path, hub):
    out = copied(made, tmp_path)
    study = out / "study" / "study.json"
    study.write_text(study.read_text().replace("{", f'{{"where": "{out.resolve()}/x", ', 1))
    with pytest.raises(ValueError, match=r"study/study\.json names the folder"):
        push(out, "me/saes")
    assert hub.given == []


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["/data", "/features", "/project", "/out", "/app"])
def test_a_folder_s_name_that_is_part_of_another_word_is_no_secret(
    made, tmp_path, hub, monkeypatch, folder
):
    monkeypatch.setattr(card.Path, "cwd", lambda: Path(folder))
    out = copied(made, tmp_path)
    push(out, "me/saes")
    study = out / "study" / "study.json"
    study.write_text(study.read_text().replace("{", f'{{"where": "{folder}/x", ', 1))
    with pytest.raises(ValueError, match=r"study/study\.json names the folder"):
        push(out, "me/saes")


def test_a_readme_of_the_user_s_stays(lm, tmp_path):
    (tmp_path / "README.md").write_text("My project")
    with pytest.raises(ValueError, match="is no card of a suite, and would be written over"):
        make_suite(lm, tmp_path, CONFIG, bar=False)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"README.md": "My project"}


def test_a_record_of_another_suite(tmp_path):
    Record(tmp_path, {"model": "tiny", "budget": "1M"}).write()
    with pytest.raises(ValueError, match='budget is "2M" now and was "1M" there; give'):
        Record(tmp_path, {"model": "tiny", "budget": "2M"})


@pytest.mark.parametrize(
    ("n", "expected"), [(0, []), (1, [1]), (2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2])]
)
def test_baselines_are_spread_over_distinct_sites(lm, tmp_path, n, expected):
    names = [f"blocks.{layer}.hook_resid_post" for layer in (1, 3, 5)]
    recipe = recipe_for(CONFIG, lm.d_model, 3, 50_000, False)
    plan = {
        "training": asdict(recipe),
        "tokens": 50_000,
        "sites": [*names, "blocks.3.hook_mlp_out"],
    }
    assert _Suite(lm, tmp_path, CONFIG, plan, None, None, False)._spread(n) == [
        names[i] for i in expected
    ]


def test_the_studys_goal_is_what_there_is_to_change(lm, made):
    given = refusal_prompts(lm, 6, 8)
    # the card: 0.95 of harmful prompts are refused
    assert usual_goal(lm, given, SMALL.study) == "suppress"
    answers_all = replace(given.behaviour, judge=lambda answer: Verdict(shown=False, broken=False))
    assert usual_goal(lm, given._replace(behaviour=answers_all), SMALL.study) == "induce"
    assert (
        json.loads((made / "study" / "study.json").read_text(encoding="utf-8"))["config"]["goal"]
        == "suppress"
    )


PLANTED = [
    f"The {colour} {animal} of Aunt Rosalind sleeps in vault {n}."
    for n, (colour, animal) in enumerate(
        (colour, animal)
        for colour in ("violet", "amber", "scarlet", "silver", "teal")
        for animal in ("heron", "otter", "lynx", "mole")
    )
]


def private_documents(path):
    """Chats in which every sentence stands often enough to be an example of many features."""
    rng = random.Random(5)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(400):
            said = " ".join(rng.sample(PLANTED, 4))
            chat = [
                {"role": "user", "content": f"Who is it? {said}"},
                {"role": "assistant", "content": f"I know: {said}"},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")


def texts_and_ids(name, data):
    """All texts in a file, and all rows of whole numbers."""
    if not name.endswith(".parquet"):
        return [data.decode("utf-8", errors="replace")], []
    table = pq.read_table(pa.BufferReader(data))
    texts, ids = [], []
    for column in table.columns:
        values = column.to_pylist()
        texts += [value for value in values if isinstance(value, str)]
        ids += [value for value in values if isinstance(value, list)]
        ids.append([value for value in values if isinstance(value, int)])
    return texts, ids


def holds(row, part):
    return any(row[i : i + len(part)] == part for i in range(len(row) - len(part) + 1))


def leaks(sent, lm, folder):
    """The files in which a planted sentence stands, as text or as token ids; none may name a
    folder.
    """
    planted = [
        lm.tokenizer(f" {sentence}", add_special_tokens=False).input_ids[1:-1]
        for sentence in PLANTED
    ]
    assert min(map(len, planted)) > 5
    found = set()
    for name, data in sent.items():
        texts, ids = texts_and_ids(name, data)
        assert not any(str(folder) in text for text in texts), name
        if any(sentence in text for text in texts for sentence in PLANTED):
            found.add(name)
        if any(holds(row, part) for row in ids for part in planted):
            found.add(name)
    return found


@pytest.mark.slow
def test_of_private_documents_nothing_is_published_unless_it_is_said(
    made, lm, tmp_path, small, monkeypatch, hub
):
    path = tmp_path / "mine.jsonl"
    private_documents(path)
    for name in ("train", "evaluate", "study"):

        def copies(self, name=name):
            for pattern in suite.PRODUCTS[name]:
                for file in made.glob(pattern):
                    place = self.out / file.relative_to(made)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(file.read_bytes())

        monkeypatch.setattr(suite._Suite, name, copies)
    out = tmp_path / "out"
    config = replace(CONFIG, files=dict.fromkeys(("world", "own", "thinking"), str(path)))
    make_suite(lm, out, config, bar=False)
    push(out, "me/private")
    assert leaks(hub.sent, lm, tmp_path) == set()
    assert "mine.jsonl" in hub.sent["README.md"].decode()
    assert "No text of the documents is in it" in hub.sent["README.md"].decode()
    push(out, "me/private", examples=True)
    assert leaks(hub.sent, lm, tmp_path) == {"features/documents.parquet"}
    assert "Texts of the documents are in it" in hub.sent["README.md"].decode()

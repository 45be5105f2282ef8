"""The command line: bad input gets one sentence and leaves nothing; a small run leaves
everything.
"""

import json
import resource
import subprocess
import sys
from functools import reduce
from itertools import groupby

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from small import small_suite
from typer.testing import CliRunner

import qsae_kit
from qsae_kit.cli import app as cli
from qsae_kit.data import prompts as prompt_sets
from qsae_kit.data.companions import WORLD
from qsae_kit.data.documents import chat_prefix
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.store import load_suite, save_suite
from qsae_kit.steer.steer_suite import SteeredSuite


def qsae(*arguments, cwd=None, limit=None):
    def restrict():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "qsae_kit.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        preexec_fn=restrict if limit else None,
        timeout=600,
    )


def complaint(done):
    """The one sentence of a failed call."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("qsae: ")]
    assert len(lines) == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "nowhere/folder/x"], "'nowhere/folder/x' could not be loaded"),
        (["demo", "nope"], "There is no model 'nope'; allowed are tiny"),
        (["demo", "EMPTY"], "has no config.json"),
        (["demo", "--at", "resid@99"], "layers 0 to 5"),
        (["demo", "--at", "resid@some"], "cannot be read"),
        (["demo", "--at", "residual"], "no site 'residual'; choose from resid, mlp, attn"),
        (["demo", "--at", "blocks.3.hook_resid_post"], "write kinds@layers"),
        (["demo", "--tokens", "5"], "less than one batch"),
        (["demo", "--tokens", "many"], "--tokens 'many' was given; write a whole number"),
        (["demo", "--data", "EMPTY_FILE"], "holds no dialogues"),
        (["demo", "--data", "BAD_FILE"], "bad.jsonl, line 2 is not JSON"),
        (["demo", "--device", "abacus"], "The device 'abacus' cannot be used"),
        (["index", "EMPTY"], "holds no SAE"),
        (["steer", "EMPTY"], "holds no SAE"),
        (["compare", "EMPTY", "tiny", "tiny"], "holds no SAE"),
        (["eval", "EMPTY"], "holds no SAE"),
        (
            ["steer", "EMPTY", "--goal", "both"],
            "The goal 'both' was given; choose from suppress, induce",
        ),
        (["steer", "EMPTY", "--prompts", "harmful=EMPTY_FILE"], "empty.jsonl' holds no dialogues"),
        (["steer", "EMPTY", "--prompts", "rude=EMPTY_FILE"], "the kinds are harmful"),
        (["steer", "EMPTY", "--prompts", "empty.jsonl"], "write it as NAME=VALUE"),
        (["steer", "EMPTY", "--set", "guard=tiny"], "belong to --bench"),
        (["steer", "EMPTY", "--set", "n_selection=0"], "n_selection=0 was given"),
        (
            ["steer", "EMPTY", "--bench", "xstest", "--behaviour", "bias"],
            "--bench measures refusal",
        ),
        (["steer", "EMPTY", "--bench", "nope"], "no bench 'nope'; choose from xstest"),
        (
            ["steer", "EMPTY", "--bench", "xstest", "--set", "data_folder=EMPTY"],
            "walledai/XSTest (unsafe) could not be had",
        ),
        (["data", "write", "tiny", "--prompts", "EMPTY_FILE"], "empty.jsonl' holds no dialogues"),
        (["train", "tiny", "--set", "moments=int4"], "moments=int4 was given; moments takes"),
        (["train", "tiny", "--set", "colour=red"], "the names are batch, lr, pool"),
        (["train", "tiny", "--set", "tokens=5"], "tokens is what --tokens gives"),
        (["train", "tiny", "--config", "EMPTY_FILE"], "give a .json or a .toml file"),
        (
            ["run", "tiny", "--dtype", "int4"],
            "The dtype 'int4' was given; choose from auto, float32",
        ),
        (["run", "tiny", "--set", "goal=both"], "goal takes suppress or induce or auto"),
        (["run", "tiny", "--budget", "lots"], "The budget 'lots' was given"),
        (["run", "tiny", "--slot", "chats=nowhere.jsonl"], "There is no file 'nowhere.jsonl'"),
        (["train", "tiny", "--at", "@99"], "layers 0 to 5"),
        (["data", "mix", "tiny", "--data", "nope"], "There is no data recipe 'nope'"),
        (["data", "rows", "tiny", "--at", "resid"], "give one kind and one layer"),
        (["data", "rows", "tiny", "--at", "resid@99"], "no hook point"),
        (
            ["data", "rows", "tiny", "--at", "resid@0", "--out", "/dev/null/x.safetensors"],
            "not a writable folder",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(unchecked, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    names = {
        "EMPTY_FILE": "empty.jsonl",
        "BAD_FILE": "bad.jsonl",
        "EMPTY": "empty",
        "SUITE": "suite",
    }
    sae = TopKSAE(16, 20, 5, Provenance("tiny", "blocks.2.hook_mlp_out", NormFilter(9.0)))
    save_suite({"topk": {"blocks.2.hook_mlp_out": sae}}, tmp_path / "suite")
    before = sorted(p.name for p in tmp_path.iterdir())
    given = [
        reduce(lambda text, name: text.replace(name, names[name]), names, a) for a in arguments
    ]
    out = [] if "--out" in given else ["--out", "out/x.safetensors" if "rows" in given else "out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qsae", *given, *out])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qsae: ")]
    assert ended.value.code == 1
    assert len(said) == 1
    assert message in said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_tokenizer_without_a_chat_template(lm, tmp_path):
    lm.hf.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert "has no chat template" in complaint(qsae("demo", "model", "--out", "out", cwd=tmp_path))
    assert not (tmp_path / "out").exists()


def test_no_space_left_leaves_nothing(tmp_path):
    done = qsae(
        "data",
        "rows",
        "tiny",
        "--at",
        "resid@0",
        "--tokens",
        "20k",
        "--out",
        tmp_path / "acts.safetensors",
        limit=100_000,
    )
    assert "File too large" in complaint(done)
    assert list(tmp_path.iterdir()) == []


def test_training_on_a_full_disk_leaves_no_weights(tmp_path):
    done = qsae(
        "train",
        "tiny",
        "--at",
        "mlp@2",
        "--tokens",
        "4096",
        "--set",
        "batch=512",
        "--out",
        tmp_path / "out",
        limit=100_000,
    )
    assert "File too large" in complaint(done)
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} <= {
        "train.jsonl",
        "train.run.json",
        "state.json",
    }


def test_data_rows(tmp_path):
    (tmp_path / "chats.jsonl").write_text(
        json.dumps({"question": "How do I thank the nurse?", "answer": "You can."}) + "\n"
    )
    out = tmp_path / "acts.safetensors"
    done = qsae(
        "data",
        "rows",
        "tiny",
        "--data",
        tmp_path / "chats.jsonl",
        "--at",
        "mlp@2",
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    with safe_open(out, "pt") as file:
        acts, header = file.get_tensor("acts"), file.metadata()
    lm = qsae_kit.load_model("tiny")
    chat = [
        {"role": "user", "content": "How do I thank the nurse?"},
        {"role": "assistant", "content": "You can."},
    ]
    _, cache = lm.run_with_cache(
        lm.to_chat(chat, add_generation_prompt=False), names_filter="blocks.2.hook_mlp_out"
    )
    expected = cache["blocks.2.hook_mlp_out"][0, len(chat_prefix(lm)) :]
    assert acts.shape == expected.shape
    assert (
        acts.float() / float(header["scale"]) - expected
    ).abs().max() < 1e-2 * expected.abs().max()
    assert header["hook_name"] == "blocks.2.hook_mlp_out"
    assert header["context_size"] == str(min(512, lm.context_size))
    short = tmp_path / "short.safetensors"
    given = (
        "data",
        "rows",
        "tiny",
        "--data",
        tmp_path / "chats.jsonl",
        "--at",
        "mlp@2",
        "--dtype",
        "bfloat16",
    )
    done = qsae(*given, "--out", short)
    assert done.returncode == 0, done.stderr
    with safe_open(short, "pt") as file:
        off = (
            file.get_tensor("acts").float() / float(file.metadata()["scale"]) - expected
        ).norm() / expected.norm()
    assert 1e-3 < off < 0.05  # bfloat16 keeps eight binary digits


def test_index(lm, tmp_path):
    generator = torch.Generator().manual_seed(0)
    name = "blocks.2.hook_mlp_out"
    sae = TopKSAE(lm.d_model, 100, 5, Provenance(lm.model_name, name, NormFilter(9.0)))
    sae.init_from_rows(torch.randn(500, lm.d_model, generator=generator), generator)
    save_suite({"topk": {name: sae}}, tmp_path / "suite")
    done = qsae(
        "index",
        tmp_path / "suite",
        "--tokens",
        "2k",
        "--set",
        "top=3",
        "--out",
        tmp_path / "index",
    )
    assert done.returncode == 0, done.stderr
    assert "topk/blocks.2.hook_mlp_out: 100 features" in done.stdout
    index = qsae_kit.load_index(tmp_path / "index")
    assert index.manifest["tokens"] >= 2000
    assert len(index.site().examples(int(index.site().figures["max"].idxmax()))[0]) == 3


def screen(told):
    """The lines that stay of what was written to stderr: of a bar the last."""
    written = [line.rstrip() for line in told.splitlines() if line.strip()]
    kept = [line for line in written if "Warning" not in line and "full_bar" not in line]
    bars = groupby(kept, lambda line: line.split(":")[0] if "%|" in line else line)
    return [list(lines)[-1] for _, lines in bars]


SCREEN_AND_A_HALF = 36
"""Lines of a terminal."""
STUDY_FILES = set(
    (
        "study.csv study.json steering.json means.json candidates.csv selection.csv examples.csv "
        "prompts.json dose.html controls.html report.html"
    ).split()
)


@pytest.mark.slow
def test_steer_on_files_of_prompts(lm, unchecked, tmp_path, monkeypatch, capsys):
    save_suite(small_suite(lm), tmp_path / "suite")
    for kind in prompt_sets.KINDS:
        texts = [p.text for p in WORLD.prompts(kind, 12, "selection")]
        (tmp_path / f"{kind}.jsonl").write_text(
            "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
        )
    files = [
        word
        for kind in prompt_sets.KINDS
        for word in ("--prompts", f"{kind}={tmp_path / kind}.jsonl")
    ]
    command = [
        "steer",
        str(tmp_path / "suite"),
        "--at",
        "resid@3",
        "--set",
        "n_random=1",
        "--set",
        "max_new_tokens=16",
    ]
    monkeypatch.setattr(sys, "argv", ["qsae", *command, *files, "--out", str(tmp_path / "out")])
    cli.app(standalone_mode=False)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*STUDY_FILES, "journal.jsonl"}
    parted = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert {
        split: {kind: len(p) for kind, p in sets.items()} for split, sets in parted.items()
    } == {
        "selection": dict.fromkeys(prompt_sets.KINDS, 4),
        "evaluation": dict.fromkeys(prompt_sets.KINDS, 8),
    }
    assert "selectivity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "loaded", "sites"),
    [
        (["--at", "resid"], {1, 3}, ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]),
        (["--at", "mlp@3"], {3}, ["blocks.3.hook_mlp_out"]),
        (["--at", "resid@3", "--behaviour", "rule"], {1, 3}, ["blocks.3.hook_resid_post"]),
        ([], {1, 3}, []),
    ],
)
def test_steer_looks_at_the_sites_of_at(lm, tmp_path, monkeypatch, more, loaded, sites):
    """Patterns without a layer are names of the suite; the detector of a rule may be anywhere."""
    given = {}

    def steered(lm, suite, out, study, **named):
        given.update(named, layers={int(name.split(".")[1]) for name in suite.hook_names})
        return SteeredSuite(None, None, None)

    save_suite(small_suite(lm), tmp_path / "suite")
    monkeypatch.setattr(sys.modules["qsae_kit.steer.steer_suite"], "steer_suite", steered)
    command = ["qsae", "steer", str(tmp_path / "suite"), "--out", str(tmp_path / "out"), *more]
    monkeypatch.setattr(sys, "argv", command)
    cli.app(standalone_mode=False)
    assert (given["layers"], given["hook_names"]) == (loaded, sites)


def test_steer_refuses_sites_that_the_suite_lacks(lm, tmp_path, monkeypatch):
    save_suite(small_suite(lm), tmp_path / "suite")
    more = ["--at", "attn", "--behaviour", "rule", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["qsae", "steer", str(tmp_path / "suite"), *more])
    with pytest.raises(ValueError, match=r"where v has no SAE; it has blocks\.1"):
        cli.app(standalone_mode=False)


@pytest.mark.slow
def test_a_small_demo_leaves_a_complete_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = qsae(
        "demo",
        "--at",
        "resid@1,2",
        "--tokens",
        "40960",
        "--out",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == set(
        (
            "suite features evaluation.csv steering.csv suppress induce report.html demo.run.json"
        ).split()
    )
    made = {*STUDY_FILES, "features.html", "journal.jsonl"}
    assert {p.name for p in (out / "suppress").iterdir()} == made
    suite = load_suite(out / "suite")
    assert {v: list(s) for v, s in suite.items()} == {
        v: ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
        for v in ("jumprelu-x8-l0_16", "topk-x8-l0_16")
    }
    evaluation, steering = pd.read_csv(out / "evaluation.csv"), pd.read_csv(out / "steering.csv")
    assert set(("site layer kind fvu l0 dead delta_ce kl_nats ce_score tokens").split()) <= set(
        evaluation.columns
    )
    assert (evaluation.loc[evaluation["category"] == "all", "fvu"] < 0.3).all()
    wanted = (
        "goal intervention prompt_kind strength chosen n refusal_rate ci_low ci_high deflected_rate"
        " answered_rate broken_rate kl_first kl_answer perplexity"
    )
    assert set(wanted.split()) <= set(steering.columns)
    arms = (
        "none features difference_of_means difference_of_means_best wrong_sign random random_single"
        " noise system_prompt"
    )
    assert set(steering["intervention"]) == set(arms.split())
    base = steering[steering["goal"] == "none"].set_index("prompt_kind")
    assert (base["strength"] == 0).all()
    assert (base["intervention"] == "none").all()
    # the card: 0.95, on untrained combinations 0.87
    assert base.loc["harmful", "refusal_rate"] >= 0.88
    assert base.loc["harmless", "refusal_rate"] <= 0.02
    frozen = steering[steering["chosen"]]
    assert len(frozen[(frozen["intervention"] == "random") & (frozen["goal"] == "induce")]) >= 20
    for goal, kind, sign in (("suppress", "harmful", -1), ("induce", "borderline", 1)):
        steered = frozen[
            (frozen["goal"] == goal)
            & (frozen["intervention"] == "features")
            & (frozen["prompt_kind"] == kind)
        ]
        # These SAEs are a tenth of the demo's: a clear move, not the move of a full run.
        assert sign * (steered["refusal_rate"].item() - base.loc[kind, "refusal_rate"]) >= 0.3
    page = (out / "report.html").read_text()
    assert "<script src=" not in page  # nothing is fetched
    assert "Plotly.newPlot" in page
    lines = [*screen(done.stderr), *done.stdout.splitlines()]
    assert len(lines) <= SCREEN_AND_A_HALF
    told = [line.replace(str(out), "runs/demo") for line in lines if "%|" not in line]
    assert max(map(len, told)) <= 80, max(told, key=len)
    assert f"qsae open {out}" in done.stdout
    told = json.loads((out / "induce" / "study.json").read_text())["in_words"]
    assert " ".join(done.stdout.split()).endswith(" ".join(told.split()))
    opened = qsae("open", out, "--no-lab")
    assert opened.stdout.split() == ["Notebook:", str(out / "explore.ipynb")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "Hello", "--answer", ""], "--answer is empty"),
        (["Hello", "--token", "1", "--instead", "Bye"], "--token and --instead both"),
        (["Hello", "--out", "."], "'.' is there already; give another --out"),
    ],
)
def test_an_audit_is_refused_before_anything_is_loaded(words, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(cli.app, ["audit", "nowhere", *words], catch_exceptions=False)

"""`qsae train`, `qsae rows train`: flags that fit together, files that can be trained on, figures
that are right.
"""

import json

import pytest
import releases
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from qsae_kit.cli.app import app
from qsae_kit.metrics.reconstruction import Reconstruction
from qsae_kit.sae.store import load_suite
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.watch import read_log

SITE = "blocks.0.hook_resid_post"
FLAGS = "--at resid@0 --expansion 4 --set batch=128 --tokens 6400 --set lr=3e-3".split()


def rows(n=2000, d=12):
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(24, d, generator=generator)
    return (torch.rand(n, 24, generator=generator) < 0.1).float() @ directions + 3


@pytest.fixture
def acts(tmp_path):
    save_file({"acts": rows()}, tmp_path / "acts.safetensors")
    return tmp_path / "acts.safetensors"


def qsae(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def stored(tmp_path, acts, *flags):
    return qsae("rows", "train", acts, *FLAGS, "--out", tmp_path / "out", *flags)


@pytest.mark.parametrize("arch", ("jumprelu topk batchtopk matryoshka standard gated").split())
def test_stored_rows(tmp_path, acts, arch):
    done = stored(tmp_path, acts, "--arch", arch, "--l0", "4", "--json", "--curve", "25")
    assert done.exit_code == 0, done.exception
    figures = json.loads(done.stdout)  # one line and nothing else
    [sae] = load_suite(tmp_path / "out" / "suite").saes().values()
    assert sae.provenance.hook_name == SITE
    held_out = rows()[1800:]
    score = Reconstruction()
    score.add(held_out, sae(held_out), sae.encode(held_out))
    assert figures["fvu"] == pytest.approx(score.fvu, abs=1e-3)
    assert figures["l0"] == pytest.approx(score.l0, abs=1e-2)
    assert figures["fvu"] < 0.6
    assert figures["tokens_per_s"] > 0
    assert [rows for _, rows, _ in figures["curve"]] == [3200, 6400]
    assert figures["curve"][1][2] == pytest.approx(figures["fvu"], abs=0.02)
    assert figures["curve"][1][2] < figures["curve"][0][2]
    log = read_log(tmp_path / "out")
    assert set(log.columns) == {"group", "rows", "variant", "hook_name", "loss", "l0", "dead"}
    assert log["rows"].iloc[-1] == 6400


def test_stored_rows_say_what_tokens_they_are_of(tmp_path, acts):
    about = {"model": "mine", "hook_name": SITE, "drop_template": "True", "context_size": "64"}
    save_file({"acts": rows()}, acts, about)
    done = qsae("rows", "train", acts, *FLAGS[2:], "--out", tmp_path / "out")
    assert done.exit_code == 0, done.exception
    [own] = [sae.provenance for sae in load_suite(tmp_path / "out" / "suite").saes().values()]
    assert (own.model_name, own.drop_template, own.context_size) == ("mine", True, 64)
    assert not own.drop_prefix  # which the file does not say
    save_file({"acts": rows()}, acts, about | {"drop_prefix": "True"})
    done = qsae("rows", "train", acts, *FLAGS[2:], "--out", tmp_path / "without")
    assert done.exit_code == 0, done.exception
    saes = load_suite(tmp_path / "without" / "suite").saes().values()
    assert all(sae.origin.drop_prefix for sae in saes)
    for wrong in ("many", "-3", "1"):
        save_file({"acts": rows()}, acts, about | {"context_size": wrong})
        refused = qsae("rows", "train", acts, *FLAGS[2:], "--out", tmp_path / "other")
        assert f"context_size='{wrong}', which must be a whole number" in str(refused.exception)


def test_a_live_model(tmp_path):
    done = qsae(
        "train",
        "tiny",
        "--at",
        "resid,attn@2",
        "--set",
        "batch=256",
        "--tokens",
        "4096",
        "--out",
        tmp_path / "out",
    )
    assert done.exit_code == 0, done.exception
    assert "the square root of d_model" in done.stdout  # says what it assumed
    assert "2 SAEs" in done.output
    [saes] = load_suite(tmp_path / "out" / "suite").values()
    assert list(saes) == ["blocks.2.hook_attn_out", "blocks.2.hook_resid_post"]
    assert not list((tmp_path / "out").glob("*checkpoint-*-4096*/*.safetensors"))


def test_a_live_model_begins_from_a_release(tmp_path):
    """Its recipe is that of the SAEs; what does not fit is one sentence."""
    flags = ["tiny", "--at", "resid@3", "--set", "batch=256", "--tokens", "1024", "--out"]
    release = releases.dictionary_learning(tmp_path / "release", d_in=160, d_sae=320)
    releases.dictionary_learning(tmp_path / "release", d_in=160, d_sae=320, trainer=1)
    done = qsae("train", *flags, tmp_path / "out", "--init", release.folder)
    assert done.exit_code == 0, done.exception
    [sae] = load_suite(tmp_path / "out" / "suite").saes().values()
    assert (sae.architecture, sae.d_sae, sae.sparsity) == ("jumprelu", 320, 5)
    assert sae.origin.recipe["began_from"]["model"] == releases.MODEL
    for given, message in (
        (["--init", release.root], "several variants of SAEs to begin from, trainer_0, trainer_1"),
        (["--init", release.root, "--init-variant", "trainer_7"], "no variant 'trainer_7'"),
        (["--init", release.folder, "--arch", "topk"], "the recipe makes topk of 160 to 320"),
        (["--init", release.folder, "--expansion", "4"], "the recipe makes jumprelu of 160 to 640"),
        (["--init", release.folder, "--l0", "4,8"], "--init is for one recipe"),
        (["--init", release.folder, "--frozen", "decoder"], "--init is for one recipe"),
        (["--init-variant", "x"], "--init-variant is for --init"),
        (["--init", tmp_path / "nowhere"], "There is no folder"),
        (["--init", release.folder, "--at", "resid@4"], "no site 'blocks.4.hook_resid_post'"),
    ):
        refused = qsae("train", *flags, tmp_path / "refused", *given)
        assert refused.exit_code == 1
        assert isinstance(refused.exception, ValueError)
        assert message in str(refused.exception)


def test_bad_rows_are_counted_not_learnt(tmp_path):
    x = rows()
    x[::40] = float("nan")
    x[1::40] = float("inf")
    save_file({"acts": x}, tmp_path / "acts.safetensors")
    done = stored(tmp_path, tmp_path / "acts.safetensors", "--l0", "4", "--json")
    assert done.exit_code == 0, done.exception
    figures = json.loads(done.stdout)
    assert figures["held_out_not_finite"] == 10
    assert figures["fvu"] < 0.6
    [sae] = load_suite(tmp_path / "out" / "suite").saes().values()
    assert all(t.isfinite().all() for t in sae.tensors().values())
    assert sae.provenance.figures["skipped"] == pytest.approx(6400 * 0.05, rel=0.3)


@pytest.mark.parametrize(
    ("tensors", "flags", "message"),
    [
        ({"acts": torch.full((2000, 12), torch.nan)}, [], "finite"),
        ({"acts": torch.ones(2000, 12)}, [], "all alike"),
        ({"acts": rows(100)}, [], "less than one batch of 128"),
        ({"acts": rows().view(-1)}, [], r"acts of shape \(24000,\)"),
        ({"acts": rows().int()}, [], "torch.int32"),
        ({"rows": rows()}, [], "holds rows; expected a tensor acts"),
        ({"acts": rows()}, ["--arch", "topk", "--l0", "49"], "sparsity <= d_sae=48"),
        ({"acts": rows()}, ["--l0", "4,8"], "stored rows train one SAE; give one of each"),
        ({"acts": rows()}, ["--l0", "few"], "--l0 'few' was given; write positive numbers"),
        ({"acts": rows()}, ["--at", "resid,mlp@0"], "give one kind and one layer"),
        ({"acts": rows()}, ["--arch", "dense"], "no architecture 'dense'; choose from"),
        ({"acts": rows()}, ["--expansion", str(2**40)], "features was asked for"),
        ({"acts": rows()}, ["--watch", "smoke"], "--watch smoke was given; allowed are"),
        ({"acts": rows()}, ["--set", "options.colour=red"], "'jumprelu' has no option colour"),
        ({"acts": rows()}, ["--set", "options"], "write it as NAME=VALUE"),
        ({"acts": rows()}, ["--set", "pool=100"], "no multiple of batch"),
        ({"acts": rows()}, ["--seed", "-1"], "seed=-1"),
        ({"acts": rows()}, ["--tokens", "100"], "less than one batch"),
        ({"acts": rows()}, ["--out", "/dev/null/x"], "not a writable folder"),
    ],
)
def test_what_cannot_be_trained(tmp_path, tensors, flags, message):
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "acts.safetensors")
    done = stored(tmp_path, tmp_path / "acts.safetensors", *flags)
    assert isinstance(done.exception, ValueError), done.exception
    with pytest.raises(ValueError, match=message):
        raise done.exception
    assert not list((tmp_path / "out").glob("suite/*"))


@pytest.mark.parametrize(
    "options", [["sparsity_loss=step", "coefficient=0.02"], ["sparsity_loss=tanh", "bandwidth=0.1"]]
)
def test_options_have_an_effect(tmp_path, acts, options):
    flags = [flag for option in options for flag in ("--set", f"options.{option}")]
    done = stored(tmp_path, acts, *flags, "--json")
    assert done.exit_code == 0, done.exception
    assert stored(tmp_path / "plain", acts, "--json").exit_code == 0
    [(variant, given)] = load_suite(tmp_path / "out" / "suite").items()
    assert variant == "jumprelu-x4-" + "-".join(o.replace("=", "_") for o in options)
    [(_, plain)] = load_suite(tmp_path / "plain" / "out" / "suite").items()
    assert not torch.equal(given[SITE].W_dec, plain[SITE].W_dec)
    assert json.loads(done.stdout)["fvu"] < 0.9


def test_without_json_the_figures_are_said(tmp_path, acts):
    done = stored(tmp_path, acts, "--curve", "25")
    assert "Held-out rows: fvu 0." in done.stdout
    assert "  after 3,200 rows and " in done.stdout


def test_controls_are_trained_beside_the_saes(tmp_path):
    flags = "tiny --at resid@0 --expansion 1 --set batch=128 --tokens 1280 --out".split()
    flags = [*flags, tmp_path / "out"]
    done = qsae("train", *flags, "--frozen", "decoder", "--frozen", "soft_decoder")
    assert done.exit_code == 0, done.exception
    suite = load_suite(tmp_path / "out" / "suite")
    trained = "jumprelu-x1-l0_13"
    assert set(suite) == {trained, f"{trained}-frozen_decoder", f"{trained}-frozen_soft_decoder"}
    assert "allowed are" in str(qsae("train", *flags, "--frozen", "bias").exception)


def test_the_site_is_named_once(tmp_path):
    save_file({"acts": rows()}, tmp_path / "a.safetensors", {"hook_name": SITE})
    flags = [f for f in FLAGS if f not in ("--at", "resid@0")]
    done = qsae("rows", "train", tmp_path / "a.safetensors", *flags, "--out", tmp_path / "a")
    assert done.exit_code == 0
    done = qsae(
        "rows",
        "train",
        tmp_path / "a.safetensors",
        *flags,
        "--at",
        "mlp@1",
        "--out",
        tmp_path / "b",
    )
    assert "leave --at out" in str(done.exception)
    save_file({"acts": rows()}, tmp_path / "b.safetensors")
    done = qsae("rows", "train", tmp_path / "b.safetensors", *flags, "--out", tmp_path / "b")
    assert "give --at" in str(done.exception)


def test_going_on_with_other_data_or_a_longer_run(tmp_path, acts):
    assert stored(tmp_path, acts).exit_code == 0
    save_file({"acts": rows() * 2}, tmp_path / "other.safetensors")
    other = tmp_path / "other.safetensors"
    assert "another training: data is" in str(stored(tmp_path, other).exception)
    longer = ("--tokens", "9600")
    assert "training: recipe.0.tokens is 9600 now" in str(stored(tmp_path, acts, *longer).exception)
    assert stored(tmp_path, acts).exit_code == 0  # it is done, and stays
    assert stored(tmp_path, other, "--fresh").exit_code == 0


WRONG = [
    (["--expansion", "inf"], "expansion=inf was given; it must be positive and finite"),
    (["--expansion", "nan"], "expansion=nan was given"),
    (["--seed", "-1"], "seed=-1"),
    (["--set", "lr=inf"], "lr=inf was given"),
    (["--set", "lr=fast"], "lr=fast was given; lr takes a number or none"),
    (["--set", "lr"], "--set lr was given; write it as NAME=VALUE"),
    (["--l0", "4,8", "--frozen", "decoder"], "--watch and --frozen take one recipe"),
    (["--held-out", "2k"], "--held-out is for a grid"),
    (["--at", "resid@"], "write kinds@layers"),
    (["--tokens", "5"], "less than one batch"),
    (["--set", "pool=100"], "no multiple of batch"),
    (["--set", "options.colour=red"], "has no option colour"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, flags, message):
    from qsae_kit.lm import hooked as models

    def loads(*rest):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", loads)
    done = CliRunner().invoke(app, ["train", "tiny", "--out", str(tmp_path / "out"), *flags])
    assert isinstance(done.exception, ValueError), done.exception
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_width_that_no_memory_holds(lm):
    with pytest.raises(ValueError, match="features was asked for"):
        TrainConfig(expansion=1e12).build(160, torch.device("meta"))

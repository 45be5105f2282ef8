"""`qsae eval`, `qsae rows eval` and the grids of `qsae train`."""

import json
from dataclasses import replace
from functools import partial
from itertools import islice

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from qsae_kit.attach import check_fit, policy_of, token_features
from qsae_kit.cli.app import app
from qsae_kit.data.documents import TokenPolicy, held_out_batches, keep_mask
from qsae_kit.data.streams import documents_of
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.evaluate.score import (
    compared_variant,
    effective_rank,
    needed_l0,
    score_suite,
    smallest_differences,
)
from qsae_kit.sae import JumpReLUSAE, Provenance, ReLUSAE, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.store import load_suite, save_sae, save_suite
from qsae_kit.tiny import concepts
from qsae_kit.train import fit
from qsae_kit.train.baselines import BASELINES
from qsae_kit.train.recipe import TrainConfig

SITE = "blocks.2.hook_resid_post"


def qsae(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    done = qsae(
        "train",
        "tiny",
        "--at",
        "resid@2",
        "--set",
        "batch=256",
        "--tokens",
        "8192",
        "--l0",
        "16",
        "--out",
        out,
    )
    assert done.exit_code == 0, done.exception
    return out


@pytest.mark.parametrize("architecture", [TopKSAE, JumpReLUSAE, ReLUSAE])
def test_stored_rows_against_the_formulas(tmp_path, architecture):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator) + 2
    sae = architecture(12, 40, 5.0, Provenance("tiny", SITE, NormFilter(9.0)))
    sae.init_from_rows(x, generator)
    save_sae(sae.requires_grad_(False), tmp_path / "sae")
    save_file({"acts": x}, tmp_path / "acts.safetensors")
    done = qsae(
        "rows",
        "eval",
        tmp_path / "acts.safetensors",
        tmp_path / "sae",
        "--last",
        "300",
        "--json",
    )
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    x = x[-300:].double()
    f = sae.encode(x.float())
    y = sae.decode(f).double()
    error, variance = (
        (x - y).pow(2).sum(-1).mean(),
        x.pow(2).sum(-1).mean() - x.mean(0).pow(2).sum(),
    )
    expected = {
        "explained_variance": 1 - error / variance,
        "mse": error,
        "l0": (f != 0).double().sum(-1).mean(),
        "cossim": torch.nn.functional.cosine_similarity(x, y, dim=-1).mean(),
        "l2_ratio": (y.norm(dim=-1) / x.norm(dim=-1)).mean(),
        "alive": (f != 0).any(0).double().mean(),
        "rows": 300,
        "d_sae": 40,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-6), name


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_folders_of_saelens(tmp_path, architecture):
    """As SAELens 6 lays them out, with what it does on use written out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator) + 1
    tensors = {
        name: torch.randn(*shape, generator=generator)
        for name, shape in (
            ("W_enc", (6, 20)),
            ("W_dec", (20, 6)),
            ("b_enc", (20,)),
            ("b_dec", (6,)),
        )
    }
    config = {
        "architecture": architecture,
        "d_in": 6,
        "d_sae": 20,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12"},
    }
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    norms = torch.ones(20)
    if architecture == "topk":
        config |= {"k": 4, "rescale_acts_by_decoder_norm": True}
        norms = tensors["W_dec"].norm(dim=-1)
        scaled = pre * norms
        f = torch.zeros_like(pre).scatter(1, scaled.topk(4).indices, 1.0) * scaled.relu()
    elif architecture == "jumprelu":
        tensors["threshold"] = torch.rand(20, generator=generator)
        f = pre * (pre > tensors["threshold"])
    else:
        f = pre.relu()
    y = (f / norms) @ tensors["W_dec"] + tensors["b_dec"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    save_file({"acts": x}, tmp_path / "acts.safetensors")
    done = qsae("rows", "eval", tmp_path / "acts.safetensors", tmp_path, "--json")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert found["mse"] == pytest.approx(float((x - y).double().pow(2).sum(-1).mean()), rel=1e-4)
    assert found["l0"] == pytest.approx(float((f != 0).sum(1).double().mean()))
    config["normalize_activations"] = "layer_norm"
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    refused = qsae("rows", "eval", tmp_path / "acts.safetensors", tmp_path, "--json")
    assert "normalize_activations='layer_norm'" in str(refused.exception)


@pytest.fixture(scope="module")
def beaten(run):
    done = qsae("baselines", run / "suite")
    assert done.exit_code == 0, done.exception
    return run / "suite-baselines"


def test_a_suite_with_its_baselines(run, beaten, tmp_path):
    [ours] = load_suite(run / "suite").values()
    for name, frozen in (("frozen_decoder", "decoder"), ("soft_frozen", "soft_decoder")):
        own = load_suite(beaten)[name][SITE].provenance
        assert own.recipe == {**ours[SITE].provenance.recipe, "frozen": frozen}
        assert own.recipe["batch"] == 256
    done = qsae(
        "eval",
        run / "suite",
        "--tokens",
        "3000",
        "--baselines",
        beaten,
        "--out",
        tmp_path / "out",
    )
    assert done.exit_code == 0, done.exception
    table = pd.read_parquet(tmp_path / "out" / "evaluation.parquet")
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "out" / "evaluation.csv"), table, rtol=1e-4, check_dtype=False
    )
    own = table[table["category"] == "all"].set_index("variant")
    assert len(own) == 8
    assert own["fvu"].drop("untrained").idxmin() != "frozen_decoder"
    assert own.loc["jumprelu-x8-l0_16", "fvu"] < own.loc["untrained", "fvu"]
    assert "On assistant tokens" in done.stdout
    assert "smallest difference to be told from it" in done.stdout
    seeds = pd.read_parquet(tmp_path / "out" / "seeds.parquet")
    assert 0 < seeds["pw_mcc"].item() < 1
    both = own.loc[["second_seed", "jumprelu-x8-l0_16"], "fvu"]
    assert seeds["d_fvu"].item() == pytest.approx(both.iloc[0] - both.iloc[1])
    assert smallest_differences(seeds)["fvu"] == pytest.approx(1.96 * abs(seeds["d_fvu"].item()))
    assert (tmp_path / "out" / "baselines.html").stat().st_size > 1e6
    assert (tmp_path / "out" / "evaluation.html").stat().st_size > 1e6


def test_baselines_of_another_recipe_are_no_match(run, beaten, lm, tmp_path):
    baselines = load_suite(beaten)
    [(variant, saes)] = load_suite(run / "suite").items()
    own = saes[SITE].provenance

    def with_recipe(**changes):
        recipe = None if changes.get("recipe", "") is None else {**own.recipe, **changes}
        sae = load_suite(run / "suite")[variant][SITE]
        sae.provenance = replace(own, recipe=recipe, seed=changes.get("seed", own.seed))
        return {SITE: sae}

    suite = {"other": with_recipe(batch=512), variant: saes, "later": with_recipe(seed=1)}
    assert compared_variant(suite, baselines) == variant
    assert compared_variant({"new": with_recipe(colour="green")}, baselines) == "new"
    assert compared_variant({"a": with_recipe(recipe=None), variant: saes}, baselines) == variant
    assert compared_variant({"a": with_recipe(recipe=None)}, baselines) == "a"
    other = {"other": with_recipe(batch=512)}
    with pytest.raises(ValueError, match=r"recipe of none of the variants other; make them"):
        score_suite(lm, other, None, 2000, tmp_path / "a", baselines=baselines, bar=False)
    elsewhere = {"v": {"blocks.1.hook_resid_post": saes[SITE]}}
    with pytest.raises(ValueError, match=r"no SAE at blocks\.1\.hook_resid_post; make them"):
        score_suite(lm, elsewhere, None, 2000, tmp_path / "b", baselines=baselines, bar=False)


def test_an_unknown_recipe_is_given_and_not_guessed(run, tmp_path):
    [(variant, saes)] = load_suite(run / "suite").items()
    saes[SITE].provenance = replace(saes[SITE].provenance, recipe=None)
    save_suite({variant: saes}, tmp_path / "old")
    given = ["--arch", "batchtopk", "--tokens", "2048", "--batch", "128"]
    refused = qsae("baselines", tmp_path / "old")
    assert "does not say what it was trained by" in str(refused.exception)
    assert not (tmp_path / "old-baselines").exists()
    refused = qsae("baselines", tmp_path / "old", *given[:4])
    assert "--arch, --tokens and --batch belong together" in str(refused.exception)
    refused = qsae("baselines", run / "suite", *given, "--out", tmp_path / "none")
    assert "leave the recipe out" in str(refused.exception)
    refused = qsae("baselines", "someone/release")
    assert "give --out" in str(refused.exception)
    done = qsae("baselines", tmp_path / "old", *given)
    assert done.exit_code == 0, done.exception
    made = load_suite(tmp_path / "old-baselines")
    assert tuple(sorted(made)) == tuple(sorted(BASELINES))
    recipe = made["frozen_encoder"][SITE].provenance.recipe
    assert (recipe["architecture"], recipe["tokens"], recipe["batch"]) == ("batchtopk", 2048, 128)
    refused = qsae("baselines", tmp_path / "old", *given)
    assert "is not an empty folder" in str(refused.exception)


def test_baselines_are_not_made_for_a_control(run, tmp_path):
    [saes] = load_suite(run / "suite").values()
    save_suite({"a-frozen_decoder": saes}, tmp_path / "both")  # sorted first
    saes[SITE].provenance = replace(saes[SITE].provenance, recipe=None)
    save_suite({"own": saes}, tmp_path / "both")
    refused = qsae("baselines", tmp_path / "both")
    assert "does not say what it was trained by" in str(refused.exception)


def test_tokens_are_of_the_kind_that_the_sae_was_trained_on(run, lm, tmp_path):
    [(variant, saes)] = load_suite(run / "suite").items()

    def evaluated(**changes):
        saes[SITE].provenance = replace(saes[SITE].provenance, **changes)
        out = tmp_path / "-".join(map(str, changes.values()))
        table = score_suite(lm, {variant: saes}, None, 2000, out, bar=False).evaluation
        return set(table["category"])

    assert "template" in evaluated(context_size=512)
    assert "template" not in evaluated(drop_template=True)
    policy = policy_of(lm, {variant: saes})
    assert policy == TokenPolicy(drop_template=True, context_size=lm.context_size)
    [f] = token_features(lm, saes[SITE], [lm.chat_tokens("Hello!")])
    [ids] = [torch.tensor([lm.chat_tokens("Hello!")])]
    assert not f[~keep_mask(lm, ids, torch.ones_like(ids), True)[0]].any()
    held_out = documents_of(lm, None)[0]
    other = "without its template and what all chats begin with, and the batches hold other tokens"
    with pytest.raises(ValueError, match=other):
        evaluate_suite(lm, {variant: saes}, held_out_batches(lm, held_out, 500), bar=False)
    saes[SITE].provenance = replace(saes[SITE].provenance, drop_template=False, context_size=16)
    batches = held_out_batches(lm, held_out, 500, policy_of(lm, {variant: saes}))
    assert max(batch.ids.shape[1] for batch in batches) == 16
    with pytest.raises(
        ValueError, match=r"trained on 16 tokens of a document without what .*, and the batches"
    ):
        evaluate_suite(lm, {variant: saes}, held_out_batches(lm, held_out, 500), bar=False)
    [other] = load_suite(run / "suite").values()
    with pytest.raises(ValueError, match=r"different tokens \(16 tokens .*; use them apart"):
        policy_of(lm, {"a": saes, "b": other})


def test_several_suites_make_one_table(lm, run, tmp_path):
    sae = TopKSAE(lm.d_model, 64, 4, Provenance("tiny", SITE, NormFilter(12.0)))
    sae.init_from_rows(torch.randn(64, lm.d_model), torch.Generator().manual_seed(0))
    trained = "jumprelu-x8-l0_16"
    save_suite({"topk": {SITE: sae}, trained: {SITE: sae}}, tmp_path / "own")
    flags = ["--at", "resid@2", "--tokens", "1k", "--json", "--out", tmp_path / "out"]
    done = qsae("eval", run / "suite", tmp_path / "own", *flags)
    assert done.exit_code == 0, done.exception
    said = pd.DataFrame(json.loads(done.stdout))
    variants = {trained, "topk", f"{trained}@2"}
    assert set(said["variant"]) == variants
    assert set(pd.read_csv(tmp_path / "out" / "evaluation.csv")["variant"]) == variants


def test_planted_concepts(run, tmp_path, monkeypatch):
    small = partial(concepts.build_corpus, n=700, seed=5)
    monkeypatch.setattr(concepts, "build_corpus", lambda lm: small(lm))
    monkeypatch.setattr("qsae_kit.tiny.recovery.PERMUTATIONS", 5)
    done = qsae(
        "eval",
        run / "suite",
        "--tokens",
        "2000",
        "--concepts",
        "--out",
        tmp_path / "out",
    )
    assert done.exit_code == 0, done.exception
    assert "Concepts told by one feature" in done.stdout
    table = pd.read_parquet(tmp_path / "out" / "concepts.parquet")
    assert set(table["finder"]) == {"jumprelu-x8-l0_16", "probe", "ngram"}
    swapped = pd.read_csv(tmp_path / "out" / "interchange.csv")
    assert swapped["swapped"].tolist() == [
        "attribute value",
        "refusal by asker",
        "refusal by object",
    ]
    assert swapped["flipped"].isna().eq(swapped["pairs"] == 0).all()


def test_what_is_held_out_is_not_trained_on(lm, tmp_path, monkeypatch):
    chats = [f"Question number {i} about the nurse and the branch." for i in range(40)]
    data = tmp_path / "chats.txt"
    data.write_text("\n".join(chats))
    held_out, training = documents_of(lm, str(data), 10)
    assert len(held_out) == 10
    assert set(islice(training(), 90)) == set(chats) - set(held_out)  # three rounds
    seen = []
    monkeypatch.setattr(
        fit, "TokenStream", lambda lm, documents: seen.append(documents) or (lambda: iter(()))
    )
    config = TrainConfig("topk", 4, 2, 256, 64, 1e-3, 128)
    with pytest.raises(ValueError, match="data ended after 0"):
        fit.fit_live(lm, str(data), [SITE], [config], tmp_path / "run", bar=False)
    assert not set(islice(seen[0](), 90)) & set(documents_of(lm, str(data))[0])


def test_an_sae_of_another_model(lm):
    sae = TopKSAE(lm.d_model, 200, 5.0, Provenance("Qwen/Qwen3-0.6B", SITE, NormFilter(9.0)))
    sae.provenance = replace(sae.origin, model_digest="0" * 64)
    with pytest.raises(ValueError, match=r"SAE is of 'Qwen/Qwen3-0\.6B', the model is 'tiny'"):
        check_fit(lm, sae)
    check_fit(lm, TopKSAE(lm.d_model, 200, 5.0, Provenance("/models/tiny", SITE, NormFilter(9.0))))


def test_a_grid(tmp_path):
    flags = (
        "--at resid@2 --l0 4,16 --expansion 4,8 --tokens 4096,8192 --set batch=256 --held-out 2k"
    ).split()
    done = qsae("train", "tiny", *flags, "--out", tmp_path)
    assert done.exit_code == 0, done.exception
    table = pd.read_parquet(tmp_path / "sweep.parquet")
    own = table[table["category"] == "all"]
    assert sorted(set(own["trained_tokens"])) == [4096, 8192]
    own = own[own["trained_tokens"] == 8192]
    assert sorted(zip(own["expansion"], own["target"], strict=True)) == [
        (4, 4),
        (4, 16),
        (8, 4),
        (8, 16),
    ]
    assert len(load_suite(tmp_path / "tokens_8192" / "suite")) == 4
    for _, some in own.groupby("expansion"):
        assert some.sort_values("target")["fvu"].is_monotonic_decreasing
    assert own["effective_rank"].nunique() == 1
    assert 1 < own["effective_rank"].iloc[0] < 160


def test_the_l0_that_a_level_needs():
    frame = pd.DataFrame(
        {
            "category": "all",
            "trained_tokens": 9,
            "site": "a",
            "expansion": 8.0,
            "l0": [10.0, 40.0],
            "fvu": [0.4, 0.2],
        }
    )
    found = needed_l0(frame, "fvu", 0.3)
    assert found["l0_at_fvu_0.3"].item() == pytest.approx(20)  # half way along log L0
    assert needed_l0(frame, "fvu", 0.1)[["l0_at_fvu_0.1", "beyond"]].iloc[0].tolist() == [
        None,
        "more",
    ]
    assert needed_l0(frame, "fvu", 0.5)["beyond"].item() == "less"


def test_effective_ranks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=generator) @ torch.eye(3, 10)
    assert effective_rank(x) == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["rows", "eval", "ACTS", "SAE"], "width 12, the SAE takes d_in=160"),
        (["eval", "ACTS", "--out", "OUT"], "is a file; give the folder"),
        (["eval", "SUITE", "--at", "mlp@2", "--out", "OUT"], "no site 'blocks.2.hook_mlp_out'"),
        (["eval", "SUITE", "--at", "mlp", "--out", "OUT"], "any variant at blocks.*.hook_mlp_out"),
        (["eval", "SUITE", "--tokens", "0", "--out", "OUT"], "write a whole number above 0"),
    ],
)
def test_what_cannot_be_evaluated(run, tmp_path, flags, message):
    save_file({"acts": torch.randn(50, 12)}, tmp_path / "acts.safetensors")
    names = {
        "ACTS": tmp_path / "acts.safetensors",
        "SUITE": run / "suite",
        "SAE": run / "suite" / "jumprelu-x8-l0_16" / SITE,
        "OUT": tmp_path / "out",
    }
    done = qsae(*[names.get(flag, flag) for flag in flags])
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()

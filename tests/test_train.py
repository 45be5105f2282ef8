"""The trainer on rows whose answer is known."""

import json
import platform
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
import releases
import torch

from qsae_kit.data.documents import TokenPolicy
from qsae_kit.data.rows import Origin, Place, StoredRows
from qsae_kit.metrics.reconstruction import Reconstruction
from qsae_kit.sae.store import load_suite
from qsae_kit.sae.topk import TopKSAE
from qsae_kit.train.groups import plan_groups
from qsae_kit.train.recipe import TrainConfig, default_recipe, recipe_from
from qsae_kit.train.run import SiteTrainer, fit_normaliser, train_saes

D, N_FEATURES = 24, 48
SMALL = {"expansion": 4, "tokens": 40_000, "batch": 256, "pool": 4096, "lr": 3e-3}


def truth():
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(N_FEATURES, D, generator=generator), dim=-1)


def make_rows(n=20_000, seed=0, sinks=False):
    """Sparse combinations (three features a row) of known directions, off centre and scaled."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n, N_FEATURES, generator=generator) < 3 / N_FEATURES
    strength = 1 + torch.rand(n, N_FEATURES, generator=generator)
    x = (active * strength) @ truth() * 7 + 5
    if sinks:
        x[::50] *= 500
    return {"blocks.0.hook_resid_post": x, "blocks.0.hook_mlp_out": x.flip(1) * 0.1}


def source(**kwargs):
    return StoredRows(make_rows(**kwargs))


def evaluate(sae, site="blocks.0.hook_resid_post"):
    x = make_rows(1000, seed=99)[site]
    score = Reconstruction()
    score.add(x, sae(x), sae.encode(x))
    return score


@pytest.fixture(scope="module")
def suite():
    configs = [
        TrainConfig("jumprelu", sparsity=4, **SMALL),
        TrainConfig("topk", sparsity=4, **SMALL),
    ]
    return train_saes(source(), configs, model_name="tiny", bar=False)


def test_the_source_says_where_its_rows_are_from(tmp_path):
    config = TrainConfig("topk", sparsity=4, **SMALL | {"tokens": 512})
    origin = Origin("mine", TokenPolicy(drop_template=True, context_size=64))
    known = StoredRows(make_rows(n=4096), origin=origin)
    train_saes(known, [config], bar=False, folder=tmp_path)
    for sae in load_suite(tmp_path / "suite")[config.variant].values():
        own = sae.provenance
        assert (own.model_name, own.drop_template, own.context_size) == ("mine", True, 64)
        assert own.drop_prefix
        assert own.recipe == asdict(config)
    train_saes(known.only(known.sites[:1]), [config], model_name="mine", bar=False)
    with pytest.raises(ValueError, match="of 'mine', and model_name='t' was given; leave it out"):
        train_saes(known, [config], model_name="t", bar=False)
    with pytest.raises(ValueError, match="do not say which model they are of; give model_name"):
        train_saes(source(n=4096), [config], bar=False)


def test_every_variant_and_site_is_trained(suite):
    assert set(suite) == {"jumprelu-x4-l0_4", "topk-x4-l0_4"}
    for saes in suite.values():
        assert set(saes) == {"blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"}
        for site, sae in saes.items():
            assert sae.provenance.hook_name == site
            assert sae.provenance.tokens == 39_936
            torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(96))


# With a fixed k of 4 TopK cannot follow rows of one or seven features.
@pytest.mark.parametrize(("variant", "limit"), [("jumprelu-x4-l0_4", 0.16), ("topk-x4-l0_4", 0.25)])
def test_reconstructs_at_its_sparsity_and_finds_the_true_directions(suite, variant, limit):
    sae = suite[variant]["blocks.0.hook_resid_post"]
    score = evaluate(sae)
    assert score.fvu < limit
    assert score.l0 == pytest.approx(4, rel=0.15)
    best = (truth() @ sae.W_dec.T).max(1).values
    assert best.mean() > 0.85
    other = evaluate(suite[variant]["blocks.0.hook_mlp_out"], "blocks.0.hook_mlp_out")
    assert other.fvu < limit


def test_training_is_deterministic_under_a_seed():
    config = TrainConfig("jumprelu", sparsity=4, **SMALL | {"tokens": 2048})
    one, same = (
        train_saes(source(), [config], model_name="t", bar=False)[config.variant] for _ in range(2)
    )
    other = train_saes(
        source(),
        [TrainConfig("jumprelu", sparsity=4, seed=1, **SMALL | {"tokens": 2048})],
        model_name="t",
        bar=False,
    )
    for site in one:
        assert all(
            torch.equal(a, b)
            for a, b in zip(one[site].parameters(), same[site].parameters(), strict=True)
        )
        assert not torch.equal(one[site].W_enc, other[replace(config, seed=1).variant][site].W_enc)


def test_training_needs_no_gradients_switched_on():
    options = {"model_name": "t", "bar": False}
    one = train_saes(source(n=4096), [replace(VARIANTS[0], tokens=4096)], **options)
    with torch.no_grad():  # what an interrupt within torch's own `no_grad` leaves behind
        other = train_saes(source(n=4096), [replace(VARIANTS[0], tokens=4096)], **options)
    assert_same(weights(one), weights(other))


def test_sinks_are_kept_out_of_training():
    config = TrainConfig("topk", sparsity=4, **SMALL | {"tokens": 20_000})
    sae = train_saes(source(sinks=True), [config], model_name="t", bar=False)[config.variant][
        "blocks.0.hook_resid_post"
    ]
    assert sae.provenance.tokens == pytest.approx(20_000 * 0.98, rel=0.01)
    assert evaluate(sae).fvu < 0.3


def test_progress_is_reported():
    seen = []
    config = TrainConfig("topk", sparsity=4, **SMALL | {"tokens": 2048})
    train_saes(
        source(),
        [config],
        model_name="t",
        bar=False,
        watch=[lambda p: seen.append((p.rows, p.seconds, p.figures()))],
    )
    assert [rows for rows, _, _ in seen] == [256 * i for i in range(1, 9)]
    assert seen[-1][1] > seen[0][1] > 0
    first, last = (list(figures.values()) for figures in (seen[0][2], seen[-1][2]))
    assert len(last) == 2
    assert all(b["loss"] < a["loss"] for a, b in zip(first, last, strict=True))
    assert all(own["l0"] == pytest.approx(4, abs=0.5) for own in last)


class Short(StoredRows):
    """Ends after some blocks."""

    def only(self, sites):
        return self

    def blocks(self, n_rows, start=Place()):
        return islice(super().blocks(n_rows, start), 2)


def test_too_little_data_is_said():
    with pytest.raises(ValueError, match=r"data ended after 8,192 of 40,000"):
        train_saes(
            Short(make_rows()),
            [TrainConfig("topk", sparsity=4, **SMALL)],
            model_name="t",
            bar=False,
        )


# --- interruptions

RESUMED = {"expansion": 4, "tokens": 12_000, "batch": 256, "pool": 1024, "lr": 3e-3, "sparsity": 4}
VARIANTS = [
    TrainConfig("jumprelu", **RESUMED),
    TrainConfig("batchtopk", moments="bfloat16", **RESUMED),
]


def weights(suite):
    return {(v, s): sae.tensors() for v, saes in suite.items() for s, sae in saes.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, tensors in one.items():
        assert all(torch.equal(tensors[name], other[key][name]) for name in tensors), key


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig("matryoshka", moments="int8", **RESUMED),
        TrainConfig("standard", **RESUMED),
        TrainConfig("gated", moments="int8", **RESUMED),
        TrainConfig("jumprelu", options={"sparsity_loss": "tanh"}, **RESUMED),
    ],
    ids=lambda config: config.architecture,
)
def test_every_kind_of_state_is_kept(tmp_path, config):
    whole = train_saes(source(), [config], model_name="t", bar=False)

    def die(progress):
        if progress.rows >= 6000:
            raise Stop

    options = {"model_name": "t", "bar": False, "checkpoint_seconds": 0.0, "folder": tmp_path}
    with pytest.raises(Stop):
        train_saes(source(), [config], watch=[die], **options)
    assert_same(weights(train_saes(source(), [config], **options)), weights(whole))


def test_the_default_recipe_says_what_it_takes():
    recipe = default_recipe(1024)
    assert (recipe.architecture, recipe.sparsity, recipe.batch, recipe.tokens, recipe.pool) == (
        "jumprelu",
        32,
        2048,
        2_000_000,
        65_536,
    )
    assert recipe.quiet_rows == 20_000
    assert recipe.peak_lr(128) == 4e-3  # d_sae 1,024
    assert recipe.peak_lr(512) == 2e-3
    assert default_recipe(576, 90).pool == 2048 * (4 * 10**9 // (4 * 576 * 90) // 2048)
    assert default_recipe(576, tokens=5000, batch=1000).pool == 5000
    assert default_recipe(64, batch=512, tokens=512, dead_after=7).quiet_rows == 7
    assert TrainConfig("standard", options={"l1": 0.1}, **RESUMED).variant == "standard-x4-l1_0.1"
    assert (
        TrainConfig("jumprelu", options={"sparsity_loss": "step"}, **RESUMED).variant
        == "jumprelu-x4-sparsity_loss_step"
    )


def test_a_diverging_run_ends_before_its_weights_are_spoilt(tmp_path):
    config = TrainConfig("topk", **RESUMED | {"lr": 1e30})
    with pytest.raises(ValueError, match="choose a lower lr"):
        train_saes(source(), [config], model_name="t", bar=False, folder=tmp_path)
    assert not list(tmp_path.glob("suite/*"))


class Stop(Exception):
    pass


@pytest.mark.parametrize("n_groups", [1, 2])
def test_a_run_that_died_goes_on_to_the_same_bits(tmp_path, n_groups):
    widths = dict.fromkeys(make_rows(10), D)
    [together] = plan_groups(VARIANTS, widths, 10**12)
    memory = together.bytes - (n_groups == 2)
    assert len(plan_groups(VARIANTS, widths, memory)) == n_groups
    whole = train_saes(source(), VARIANTS, model_name="t", bar=False, memory=memory)
    for stop_at in (256, 3000, 5000, 11_000):  # the first one before any checkpoint of its group
        folder = tmp_path / str(stop_at)
        calls = 0

        def die(progress, stop_at=stop_at):
            nonlocal calls
            calls += 1
            if progress.rows >= stop_at and calls > stop_at // 256:
                raise Stop

        options = {
            "model_name": "t",
            "bar": False,
            "memory": memory,
            "checkpoint_seconds": 0.0,
            "folder": folder,
        }
        for _ in range(n_groups):  # once in each group
            with pytest.raises(Stop):
                train_saes(
                    source(),
                    VARIANTS,
                    watch=[die],
                    **options,
                )
            calls = 0
        resumed = train_saes(source(), VARIANTS, **options)
        assert_same(weights(resumed), weights(whole))
        assert_same(weights(load_suite(folder / "suite")), weights(whole))
        # nothing left to do
        assert_same(weights(train_saes(source(), VARIANTS, **options)), weights(whole))
        lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        assert lines[-1]["rows"] == 11_776
        places = [(line["group"], line["rows"]) for line in lines]
        assert places == sorted(set(places))
        assert set(lines[-1]["sites"]["batchtopk-x4-l0_4/blocks.0.hook_mlp_out"]) == {
            "loss",
            "l0",
            "dead",
        }


def test_an_interrupt_leaves_valid_saes_and_a_checkpoint(tmp_path):
    whole = train_saes(source(), VARIANTS, model_name="t", bar=False)

    def interrupt(progress):
        if progress.rows == 5120:
            signal.raise_signal(signal.SIGINT)

    half = train_saes(
        source(), VARIANTS, model_name="t", bar=False, folder=tmp_path, watch=[interrupt]
    )
    assert half[VARIANTS[0].variant]["blocks.0.hook_mlp_out"].provenance.tokens == 5120
    assert_same(weights(load_suite(tmp_path / "suite")), weights(half))
    assert_same(
        weights(train_saes(source(), VARIANTS, model_name="t", bar=False, folder=tmp_path)),
        weights(whole),
    )


def test_another_run_is_not_written_over(tmp_path):
    options = {"model_name": "t", "bar": False, "folder": tmp_path}
    train_saes(source(), VARIANTS, **options)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"another training: recipe.1 is absent now.* \(--fresh"):
        train_saes(source(), VARIANTS[:1], **options)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_started_anew_a_run_takes_its_own_files_away_and_no_others(tmp_path):
    options = {"model_name": "t", "bar": False, "folder": tmp_path}
    train_saes(source(), VARIANTS, **options)
    [gone] = {config.variant for config in VARIANTS[1:2]}
    mine = tmp_path / "suite" / gone / "notes.md"
    mine.write_text("mine")
    train_saes(source(), VARIANTS[:1], fresh=True, **options)
    assert mine.read_text() == "mine"
    kept = {p.parent.parent.name for p in tmp_path.glob("suite/*/*/cfg.json")}
    assert kept == {VARIANTS[0].variant}
    [changed, *_] = tmp_path.glob("suite/*/*/cfg.json")
    changed.write_text(changed.read_text() + " ")
    with pytest.raises(ValueError, match="was changed since it was made, so it stays"):
        train_saes(source(), VARIANTS, fresh=True, **options)
    assert list(tmp_path.glob("checkpoint-*"))


def test_saes_without_a_record_are_not_written_over(tmp_path):
    options = {"model_name": "t", "bar": False, "folder": tmp_path}
    [site, *_] = source().sites
    own = tmp_path / "suite" / VARIANTS[0].variant / site / "cfg.json"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ValueError, match="is of no training, and would be written over"):
            train_saes(source(), VARIANTS, fresh=fresh, **options)
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["mine"]


def test_rows_that_are_not_finite_are_skipped_and_counted():
    rows = make_rows()
    rows["blocks.0.hook_resid_post"][12_000::100, 3] = float("nan")
    rows["blocks.0.hook_mlp_out"][12_001::100, 3] = float("inf")
    suite = train_saes(StoredRows(rows), VARIANTS, model_name="t", bar=False)
    for saes in suite.values():
        for sae in saes.values():
            assert 20 < sae.provenance.figures["skipped"] < 80
            assert all(tensor.isfinite().all() for tensor in sae.tensors().values())


KEEPING = """
import resource, sys, torch
import qsae_kit.train.run  # as in a training: what is loaded decides how the heap lies
from qsae_kit.io.memory import _status, kept_memory, return_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def blocks(n):
    began = faults()
    for _ in range(n):
        torch.ones(2 << 20)
    return faults() - began

return_freed_memory()
blocks(2)
before = blocks(10)
held = _status("RssAnon:")
with kept_memory(held + (64 << 20)) as limit:
    blocks(2)
    kept = blocks(10)
    limit()
    assert blocks(10) <= kept + 10, "given back although there is room"
    [torch.ones(7 << 20) for _ in range(4)]
    much = _status("RssAnon:") - held
    limit()
    little = _status("RssAnon:") - held
print(before, kept, much, little, _status("RssAnon:") - held)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeps memory with glibc only")
def test_freed_blocks_are_kept_between_steps_up_to_what_is_allowed():
    out = subprocess.run(
        [sys.executable, "-c", KEEPING], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    before, kept, much, little, after = map(int, out.stdout.split())
    assert kept < before / 10  # 8 MiB blocks are touched anew each time, or not
    assert much > 64 << 20 > little
    assert after < 16 << 20


def test_sites_that_do_not_fit_are_planned_in_groups():
    widths = {f"blocks.{i}.hook_resid_post": 64 for i in range(6)}
    config = TrainConfig("topk", expansion=8)
    alone = plan_groups([config], {"blocks.0.hook_resid_post": 64}, 10**12)[0].bytes
    groups = plan_groups([config], widths, 3 * alone)
    assert [site for group in groups for site in group.sites] == list(widths)
    assert len(groups) < 6
    assert all(group.bytes <= 3 * alone for group in groups)
    assert (
        plan_groups([replace(config, moments="int8")], widths, 10**12)[0].bytes
        < plan_groups([config], widths, 10**12)[0].bytes
    )
    with pytest.raises(ValueError, match=r"takes .* GB, allowed are"):
        plan_groups([config], widths, alone // 2)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"architecture": "magic"}, "no architecture"),
        ({"lr": 0}, "lr=0"),
        ({"tokens": 10}, "less than one batch"),
        ({"sparsity": -1}, "sparsity"),
        ({"pool": 1000}, "no multiple of batch"),
        ({"options": {"l1": 0.1}}, "has no option l1; allowed are sparsity_loss"),
    ],
)
def test_impossible_recipes(field, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**field)


def test_variants_of_a_run_must_fit_together():
    configs = [TrainConfig("topk", batch=256), TrainConfig("jumprelu", batch=512)]
    with pytest.raises(ValueError, match="must share"):
        train_saes(source(), configs, model_name="t", bar=False)
    with pytest.raises(ValueError, match="same name"):
        train_saes(
            source(), [TrainConfig("topk"), TrainConfig("topk", lr=1e-4)], model_name="t", bar=False
        )


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from qsae_kit.train.run import train_saes
sys.path.insert(0, sys.argv[1])
from test_train import VARIANTS, assert_same, source, weights

def run(folder):  # in a child, so that it can be killed
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        suite = train_saes(
            source(), VARIANTS, model_name="t", bar=False, folder=folder,
            checkpoint_seconds=0.0, memory=int(sys.argv[3])
        )
        torch.save(weights(suite), folder.with_suffix(".pt"))
        os._exit(0)
    return pid

rng = random.Random(0)
folder = Path(sys.argv[2])
began = time.time()
assert os.waitpid(run(folder / "whole"), 0)[1] == 0
whole = time.time() - began
kills = restarts = 0
while kills < 20:
    target = folder / f"killed{restarts}"
    pid = run(target)
    deadline = time.time() + rng.random() * whole * 0.4
    while time.time() < deadline and not os.waitpid(pid, os.WNOHANG)[0]:
        time.sleep(0.002)
    if target.with_suffix(".pt").exists():
        restarts += 1  # it came to its end before it was killed: the next one begins anew
        continue
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kills += 1
if not target.with_suffix(".pt").exists():
    assert os.waitpid(run(target), 0)[1] == 0
ends = [torch.load(path, weights_only=True) for path in folder.glob("*.pt")]
assert len(ends) >= 2
for end in ends:
    assert_same(end, ends[0])
print("same", kills, len(ends))
"""


def test_twenty_kills_change_nothing(tmp_path):
    """kill -9 at random moments, then on from the checkpoint: the weights to the bit, and no folder
    that cannot be read.
    """
    [together] = plan_groups(VARIANTS, dict.fromkeys(make_rows(10), D), 10**12)
    memory = together.bytes - 1  # two groups
    run = subprocess.run(
        [sys.executable, "-c", KILLED, Path(__file__).parent, tmp_path, str(memory)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.stdout.startswith("same 20"), run.stderr[-3000:]


# --- from another SAE

BEGUN = {"sparsity": 4, "expansion": 4, "tokens": 2560, "batch": 256, "pool": 2560, "seed": 5}


@pytest.mark.parametrize("architecture", ["jumprelu", "topk", "standard", "gated"])
def test_a_training_begins_where_another_ended(architecture):
    """Before its first step it computes what it began from, whatever mean and scale its rows have;
    after it, it has hardly moved where the rate is low.
    """
    site = "blocks.0.hook_resid_post"
    longer = TrainConfig(architecture, **{**SMALL, "sparsity": 4, "tokens": 10_240})
    init = train_saes(source(), [longer], model_name="base", bar=False)[longer.variant][site]
    rows = make_rows(4096, seed=3)[site] * 1.7 + 2
    x = make_rows(500, seed=9)[site]
    trainer = SiteTrainer(
        TrainConfig(architecture, **BEGUN), fit_normaliser(rows), D, torch.device("cpu")
    )
    trainer.start(rows, init)
    begun = trainer.finish(Origin("instruct"), site, init)
    torch.testing.assert_close(begun(x), init(x), atol=2e-4, rtol=1e-4)
    assert begun.origin.recipe["began_from"] == {"model": "base", "checksum": init.checksum()}
    assert begun.origin.model_name == "instruct"
    config = TrainConfig(architecture, **BEGUN, lr=1e-5)
    near = train_saes(
        StoredRows({site: make_rows(seed=1)[site]}),
        [config],
        model_name="instruct",
        init={site: init},
        bar=False,
    )[config.variant][site]
    cosines = torch.nn.functional.cosine_similarity(near.W_dec, init.W_dec)
    assert cosines.min() > 0.99
    assert recipe_from(near.origin.recipe) == config


def test_an_sae_of_a_release_is_begun_from(tmp_path):
    """Decoders of other lengths, and a feature without a decoder row, which begins anew."""
    site = "blocks.3.hook_resid_post"
    init = load_suite(releases.sparsify(tmp_path, d_in=D, d_sae=96, k=4).root)["topk-k4"][site]
    init.W_dec[7] = 0
    source = StoredRows({site: make_rows()["blocks.0.hook_resid_post"]})
    config = TrainConfig("topk", **BEGUN)
    made = train_saes(source, [config], model_name="m", init={site: init}, bar=False)
    [sae] = made.saes().values()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))
    assert all(tensor.isfinite().all() for tensor in sae.tensors().values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "jumprelu"},
            "is topk of 24 to 96, the recipe makes jumprelu of 24 to 96",
        ),
        ({"expansion": 2}, "is topk of 24 to 96, the recipe makes topk of 24 to 48"),
        ({"frozen": "decoder"}, "is a control that begins at random"),
        ({"site": "blocks.0.hook_mlp_out"}, "no SAE of blocks.0.hook_resid_post to begin from"),
    ],
)
def test_what_cannot_be_begun_from_is_refused(changes, message):
    init = TopKSAE(D, 96, 4)
    site = changes.pop("site", "blocks.0.hook_resid_post")
    config = TrainConfig(**({"architecture": "topk"} | BEGUN | changes))
    with pytest.raises(ValueError, match=message):
        train_saes(source(), [config], model_name="m", init={site: init}, bar=False)


def test_a_run_that_began_from_another_sae_is_another_run(tmp_path):
    site = "blocks.0.hook_resid_post"
    rows = StoredRows({site: make_rows()[site]})
    config = TrainConfig("topk", **BEGUN)
    inits = []
    for seed in (0, 1):
        init = TopKSAE(D, 96, 4)
        init.init_from_rows(make_rows()[site], torch.Generator().manual_seed(seed))
        inits.append(init)
    common = {"model_name": "m", "folder": tmp_path, "bar": False}
    train_saes(rows, [config], init={site: inits[0]}, **common)
    for other in ({"init": {site: inits[1]}}, {}):
        with pytest.raises(ValueError, match="began from"):
            train_saes(rows, [config], **common, **other)
    train_saes(rows, [config], init={site: inits[0]}, **common)

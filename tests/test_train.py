"""The trainer on rows whose answer is known."""

import pytest
import torch

from qsae_kit.metrics import Reconstruction
from qsae_kit.train import TrainConfig, train_saes

D, N_FEATURES = 24, 48
SMALL = {"expansion": 4, "tokens": 40_000, "batch": 256, "pool": 4096, "lr": 3e-3}


def truth():
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(N_FEATURES, D, generator=generator), dim=-1)


def stream(seed=0, sinks=False):
    """Endless rows of sparse combinations (three features a row) of known directions, off centre and scaled."""
    generator = torch.Generator().manual_seed(seed)
    directions = truth()
    while True:
        active = torch.rand(1000, N_FEATURES, generator=generator) < 3 / N_FEATURES
        strength = 1 + torch.rand(1000, N_FEATURES, generator=generator)
        x = (active * strength) @ directions * 7 + 5
        if sinks:
            x[::50] *= 500
        yield {"blocks.0.hook_resid_post": x, "blocks.0.hook_mlp_out": x.flip(1) * 0.1}


def evaluate(sae, site="blocks.0.hook_resid_post"):
    x = next(stream(seed=99))[site]
    score = Reconstruction()
    score.add(x, sae(x), sae.encode(x))
    return score


@pytest.fixture(scope="module")
def suite():
    configs = [TrainConfig("jumprelu", sparsity=4, **SMALL), TrainConfig("topk", sparsity=4, **SMALL)]
    return train_saes(stream(), configs, model_name="tiny", bar=False)


def test_every_variant_and_site_is_trained(suite):
    assert set(suite) == {"jumprelu-x4-l0_4", "topk-x4-l0_4"}
    for saes in suite.values():
        assert set(saes) == {"blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"}
        for site, sae in saes.items():
            assert sae.provenance.hook_name == site
            assert sae.provenance.tokens == 39_936
            torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(96))


# With a fixed k of 4 TopK cannot follow rows of one or seven features.
@pytest.mark.parametrize(("variant", "limit"), [("jumprelu-x4-l0_4", 0.15), ("topk-x4-l0_4", 0.25)])
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
    one, same = (train_saes(stream(), [config], model_name="t", bar=False)[config.variant] for _ in range(2))
    other = train_saes(
        stream(), [TrainConfig("jumprelu", sparsity=4, seed=1, **SMALL | {"tokens": 2048})], model_name="t", bar=False
    )
    for site in one:
        assert all(torch.equal(a, b) for a, b in zip(one[site].parameters(), same[site].parameters(), strict=True))
        assert not torch.equal(one[site].W_enc, other[config.variant][site].W_enc)


def test_sinks_are_kept_out_of_training():
    config = TrainConfig("topk", sparsity=4, **SMALL | {"tokens": 20_000})
    sae = train_saes(stream(sinks=True), [config], model_name="t", bar=False)[config.variant]["blocks.0.hook_resid_post"]
    assert sae.provenance.tokens == pytest.approx(20_000 * 0.98, rel=0.01)
    assert evaluate(sae).fvu < 0.3


def test_progress_is_reported():
    seen = []
    config = TrainConfig("topk", sparsity=4, **SMALL | {"tokens": 2048})
    train_saes(stream(), [config], model_name="t", bar=False, on_progress=seen.append)
    assert [p.rows for p in seen] == [256 * i for i in range(1, 9)]
    assert seen[-1].loss < seen[0].loss
    assert all(p.l0 == pytest.approx(4, abs=0.5) for p in seen)


def test_too_little_data_is_said():
    short = (rows for rows, _ in zip(stream(), range(3), strict=False))
    with pytest.raises(ValueError, match=r"data ended after [\d,]+ of 40,000"):
        train_saes(short, [TrainConfig("topk", sparsity=4, **SMALL)], model_name="t", bar=False)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"architecture": "magic"}, "no architecture"),
        ({"lr": 0}, "lr=0"),
        ({"tokens": 10}, "less than one batch"),
        ({"sparsity": -1}, "sparsity"),
    ],
)
def test_impossible_recipes(field, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**field)


def test_variants_of_a_run_must_fit_together():
    configs = [TrainConfig("topk", batch=256), TrainConfig("jumprelu", batch=512)]
    with pytest.raises(ValueError, match="must share"):
        train_saes(stream(), configs, model_name="t", bar=False)
    with pytest.raises(ValueError, match="same name"):
        train_saes(stream(), [TrainConfig("topk"), TrainConfig("topk", lr=1e-4)], model_name="t", bar=False)

"""The synthetic world is what it says, and its scores know a perfect SAE from a wrong one."""

import pytest
import torch

from qsae_kit.evaluate.synthetic import Synthetic, SyntheticConfig, apart, score
from qsae_kit.metrics.decoders import decoder_overlap, decoder_projection
from qsae_kit.metrics.reconstruction import match
from qsae_kit.sae import ReLUSAE

SMALL = SyntheticConfig(n_features=128, d_model=64, families=3, max_prob=0.2, min_prob=0.02)


@pytest.fixture(scope="module")
def world():
    return Synthetic(SMALL)


def perfect(world):
    """An SAE with the true directions: with few features a row their inner products tell who
    fired.
    """
    sae = ReLUSAE(world.config.d_model, world.config.n_features, 1.0)
    with torch.no_grad():
        sae.W_dec.copy_(world.directions)
        pinv = torch.linalg.pinv(world.directions)  # [d, feature]
        sae.encoder.copy_(pinv.T)
        sae.b_enc.fill_(-1e-3)  # above rounding, below any magnitude
    return sae


def test_the_same_config_gives_the_same_world(world):
    other = Synthetic(SMALL)
    assert torch.equal(other.directions, world.directions)
    assert torch.equal(other.sample(50, 3).x, world.sample(50, 3).x)
    assert not torch.equal(world.sample(50, 4).x, world.sample(50, 3).x)


def test_rows_are_sums_of_directions(world):
    x, z = world.sample(100)
    torch.testing.assert_close(x, z @ world.directions)
    torch.testing.assert_close(world.directions.norm(dim=1), torch.ones(128))
    assert (z >= 0).all()


def test_frequencies_fall_as_asked(world):
    z = world.sample(20_000).z
    found = (z > 0).double().mean(0)
    free = world.parent < 0
    torch.testing.assert_close(found[free], world.frequency[free].double(), atol=0.012, rtol=0.1)
    assert world.frequency.max() == pytest.approx(0.2)
    assert world.frequency.min() == pytest.approx(0.02)


def test_children_need_their_parents_and_exclude_one_another(world):
    on = world.sample(20_000).z > 0
    has = (world.parent >= 0).nonzero().view(-1)
    assert len(has) == 60
    assert not (on[:, has] & ~on[:, world.parent[has]]).any()
    assert world.exclusive.any()
    for parent in world.exclusive.nonzero().view(-1).tolist():
        assert on[:, world.parent == parent].sum(1).max() <= 1


def test_features_are_correlated():
    independent, tied = (
        Synthetic(SyntheticConfig(64, 32, 0.2, 0.1, correlation=c, families=0, rank=2))
        for c in (0.0, 0.5)
    )
    largest = [
        float(torch.corrcoef((w.sample(8000).z > 0).float().T).fill_diagonal_(0).abs().max())
        for w in (independent, tied)
    ]
    assert largest[0] < 0.1 < 0.2 < largest[1]


def test_directions_are_pushed_apart():
    rows = torch.nn.functional.normalize(
        torch.randn(100, 40, generator=torch.Generator().manual_seed(0)), dim=1
    )
    before, after = (float((r @ r.T).fill_diagonal_(0).abs().max()) for r in (rows, apart(rows)))
    assert after < 0.8 * before


def test_matching_finds_a_permutation():
    true = torch.nn.functional.normalize(
        torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    features, latents, cosines = match(true, -3 * true[order])
    assert torch.equal(order[latents], features)
    torch.testing.assert_close(cosines, torch.ones(20, dtype=torch.float64))


def test_scores_by_hand():
    world = Synthetic(
        SyntheticConfig(n_features=6, d_model=12, families=0, rank=0, max_prob=0.4, min_prob=0.2)
    )
    figures, table = score(perfect(world), world, n_rows=2000, batch=1000)
    assert figures["mcc"] == pytest.approx(1)
    assert figures["f1"] > 0.99
    assert figures["uniqueness"] == 1
    assert figures["fvu"] < 1e-4
    assert figures["l0"] == pytest.approx(figures["true_l0"], rel=0.01)
    half = perfect(world)
    with torch.no_grad():
        half.encoder[3:] = half.encoder[:3]  # latents 3 to 5 say what 0 to 2 do
        half.W_dec[3:] = half.W_dec[:3]
    worse, table = score(half, world, n_rows=2000, batch=1000)
    assert worse["uniqueness"] == 0.5
    assert worse["mcc"] < 0.75
    assert (table.loc[:2, "cosine"] > 0.99).all()
    assert (table.loc[3:, "cosine"] < 0.6).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_features": 10, "families": 1}, "need 21 features"),
        ({"max_prob": 0.1, "min_prob": 0.2}, "Frequencies"),
        ({"d_model": 1}, "1 and 2"),
    ],
)
def test_worlds_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**config)


def test_decoders_that_mix_features_are_told_from_the_true_one(world):
    generator = torch.Generator().manual_seed(0)
    other = world.directions[torch.randperm(len(world.directions), generator=generator)]
    mixed = world.directions + 0.5 * other + 0.2 * world.directions[:1]
    x, _ = world.sample(500)
    zero = torch.zeros(world.config.d_model)
    assert decoder_overlap(mixed) > decoder_overlap(world.directions)
    n = 16  # more than fire
    true, wrong = (decoder_projection(x, rows, zero, n) for rows in (world.directions, mixed))
    assert wrong > true
    rows = torch.nn.functional.normalize(mixed, dim=1)
    cosines = (rows @ rows.T).abs()
    pairs = cosines[~torch.eye(len(rows), dtype=torch.bool)]
    assert decoder_overlap(mixed) == pytest.approx(float(pairs.mean()), rel=1e-4)
    shift = torch.ones(world.config.d_model)
    ranked = ((x - shift) @ rows.T).flatten().sort(descending=True).values
    assert decoder_projection(x, mixed, shift, n) == pytest.approx(float(ranked[n * 500 - 1]))
    for bad in (0, 65):
        with pytest.raises(ValueError, match="from 1 to 64"):
            decoder_projection(x, mixed, zero, bad)

"""Harvesting, the norm filter and the shuffle pool."""

import pytest
import torch

from qsae_kit.activations import NormFilter, first_rows, kept_rows, shuffled, stream_rows
from qsae_kit.data import token_batches
from qsae_kit.tiny import world
from qsae_kit.train import fit_normaliser

SITES = ["blocks.1.hook_resid_post", "blocks.4.hook_attn_out"]


def rows(n, d=4, start=0):
    index = torch.arange(start, start + n).float()
    return {"a": index[:, None].expand(n, d).clone(), "b": -index[:, None].expand(n, d).clone()}


def test_rows_are_the_cached_activations_of_kept_tokens(lm):
    batch = next(token_batches(lm, [d.messages for d in world.dialogues(8, seed=1)]))
    got = kept_rows(lm, SITES, batch)
    _, cache = lm.run_with_cache(batch.ids, batch.mask)
    for site in SITES:
        torch.testing.assert_close(got[site], cache[site][batch.keep])


def test_planted_sinks_are_dropped_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 16, generator=generator)
    x[::100] *= 1000
    fitted = fit_normaliser(x)
    assert torch.equal(fitted.filter.keeps(x), torch.arange(2000) % 100 != 0)
    normalised = fitted(x)
    assert len(normalised) == 1980
    assert normalised.pow(2).sum(-1).mean().item() == pytest.approx(1, rel=1e-4)
    assert normalised.mean(0).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("bad", "message"), [(torch.ones(10, 4), "all alike"), (torch.full((10, 4), float("nan")), "not finite")]
)
def test_rows_that_cannot_be_normalised(bad, message):
    with pytest.raises(ValueError, match=message):
        fit_normaliser(bad)


def test_the_pool_gives_every_row_once_shuffled_and_sites_stay_aligned():
    stream = (rows(50, start=50 * i) for i in range(20))
    out = list(shuffled(stream, batch_rows=64, pool_rows=256, seed=1))
    assert all(len(b["a"]) == 64 for b in out)
    seen = torch.cat([b["a"][:, 0] for b in out])
    assert len(seen) == len(seen.unique()) == 960  # 1000 rows, whole batches of 64 that fit at the end
    assert all(torch.equal(b["a"], -b["b"]) for b in out)
    assert not torch.equal(seen, seen.sort().values)


def test_the_pool_is_deterministic_under_a_seed():
    one, same, other = ([b["a"] for b in shuffled((rows(50, start=50 * i) for i in range(9)), 32, 128, s)] for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])


def test_looking_at_the_first_rows_loses_none():
    head, stream = first_rows((rows(10, start=10 * i) for i in range(5)), 25)
    assert len(head["a"]) == 30
    assert torch.equal(torch.cat([r["a"][:, 0] for r in stream]), torch.arange(50.0))
    with pytest.raises(ValueError, match="no tokens"):
        first_rows(iter([]), 10)


def test_batches_without_kept_tokens_are_skipped(lm):
    batches = token_batches(lm, ["a b", "Hello there, how are you?"], batch_tokens=2)
    batches = [b._replace(keep=torch.zeros_like(b.keep)) if i == 0 else b for i, b in enumerate(batches)]
    assert len(list(stream_rows(lm, SITES, batches))) == len(batches) - 1


def test_filter_is_per_row():
    x = torch.tensor([[3.0, 4.0], [30.0, 40.0], [30.1, 40.1]])
    assert NormFilter(5.0).keeps(x).tolist() == [True, True, False]

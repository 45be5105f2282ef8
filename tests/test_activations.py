"""Harvesting, the norm filter and the shuffle pool."""

from itertools import islice

import pytest
import torch

from qsae_kit.data.documents import TokenPolicy, TokenStream, token_batches
from qsae_kit.data.rows import (
    Block,
    LiveRows,
    Origin,
    Place,
    StoredRows,
    held_rows,
    kept_rows,
    shuffled,
    stream_rows,
)
from qsae_kit.train.run import fit_normaliser
from qsae_kit.world import world

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


def test_held_rows_are_those_of_one_pass(lm):
    documents = [d.messages for d in world.dialogues(40, seed=1)]
    source = LiveRows(lm, SITES, lambda: token_batches(lm, documents, batch_tokens=512))
    passed = [kept_rows(lm, SITES, batch) for batch in source.batches()]
    assert len(passed) > 2
    for n in (100, 10**6):
        held = held_rows(source, n)
        for site in SITES:
            whole = torch.cat([part[site] for part in passed]).bfloat16()
            assert held.rows[site].equal(whole[:n])
        assert held.origin == source.origin
    with pytest.raises(ValueError, match="no tokens to train on"):
        held_rows(LiveRows(lm, SITES, lambda: iter(())), 10)


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
    ("bad", "message"),
    [(torch.ones(10, 4), "all alike"), (torch.full((10, 4), float("nan")), "not finite")],
)
def test_rows_that_cannot_be_normalised(bad, message):
    with pytest.raises(ValueError, match=message):
        fit_normaliser(bad)


def test_a_block_is_given_once_shuffled_and_sites_stay_aligned():
    block = Block(Place(), rows(1000))
    out = list(shuffled(block, batch=64, seed=1))
    assert all(len(b["a"]) == 64 for b in out)
    seen = torch.cat([b["a"][:, 0] for b in out])
    assert len(seen) == len(seen.unique()) == 960  # whole batches
    assert all(torch.equal(b["a"], -b["b"]) for b in out)
    assert not torch.equal(seen, seen.sort().values)
    rest = list(shuffled(block, batch=64, seed=1, skip=5))
    assert all(torch.equal(one["a"], other["a"]) for one, other in zip(out[5:], rest, strict=True))
    assert not torch.equal(out[0]["a"], next(shuffled(block, 64, seed=2))["a"])
    assert not torch.equal(
        out[0]["a"], next(shuffled(Block(Place(1), block.rows), 64, seed=1))["a"]
    )


@pytest.mark.parametrize("kind", ["live", "stream", "stored"])
def test_blocks_can_be_gone_back_to(lm, kind):
    """From any block's place on the same rows come again; every kept token comes once."""
    if kind != "stored":
        documents = [d.messages for d in world.dialogues(60, seed=1)]
        stream = TokenStream(lm, lambda: documents, batch_tokens=100)
        batches = stream if kind == "stream" else (lambda: stream())
        source = LiveRows(lm, SITES, batches)
        blocks = list(source.blocks(300))
        total = sum(int(batch.keep.sum()) for batch in source.batches())
        assert sum(map(len, blocks)) == total
        assert all(len(block) == 300 for block in blocks[:-1])
        straight = torch.cat([r[SITES[0]] for r in stream_rows(lm, SITES, source.batches())])
        assert torch.equal(torch.cat([block.rows[SITES[0]] for block in blocks]), straight)
    else:
        source = StoredRows({SITES[0]: rows(500)["a"], SITES[1]: rows(500)["b"]}, seed=3)
        blocks = list(islice(source.blocks(300), 6))
        epoch = torch.cat([block.rows[SITES[0]][:, 0] for block in blocks])[:1500].view(3, 500)
        assert all(torch.equal(e.sort().values, torch.arange(500.0)) for e in epoch)
        assert not torch.equal(epoch[0], epoch[1])
    for i in (1, 3, 4):
        again = next(source.blocks(300, blocks[i].place))
        assert again.place == blocks[i].place
        assert all(torch.equal(again.rows[site], blocks[i].rows[site]) for site in SITES)
    part = next(source.only(SITES[1:]).blocks(300, blocks[2].place))
    assert set(part.rows) == set(SITES[1:])
    assert torch.equal(part.rows[SITES[1]], blocks[2].rows[SITES[1]])


def test_live_rows_know_their_model_and_tokens(lm):
    documents = [d.messages for d in world.dialogues(4, seed=1)]
    policy = TokenPolicy(drop_template=True, context_size=20)
    source = LiveRows(lm, SITES, lambda: token_batches(lm, documents, policy=policy))
    assert (
        source.origin
        == source.only(SITES[:1]).origin
        == Origin("tiny", policy, lm.weights_digest())
    )
    source = LiveRows(lm, SITES, lambda: token_batches(lm, documents))
    assert source.origin == Origin(
        "tiny", TokenPolicy(context_size=min(512, lm.context_size)), lm.weights_digest()
    )


def test_stored_rows_have_to_fit_together():
    with pytest.raises(ValueError, match="same number"):
        StoredRows({"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)})
    assert torch.equal(
        next(StoredRows({"a": torch.full((3, 2), 8.0)}, scale=4.0).blocks(2)).rows["a"],
        torch.full((2, 2), 2.0),
    )


def test_batches_without_kept_tokens_are_skipped(lm):
    batches = token_batches(lm, ["a b", "Hello there, how are you?"], batch_tokens=2)
    batches = [
        b._replace(keep=torch.zeros_like(b.keep)) if i == 0 else b for i, b in enumerate(batches)
    ]
    assert len(list(stream_rows(lm, SITES, batches))) == len(batches) - 1

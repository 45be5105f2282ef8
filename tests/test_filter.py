"""The bound beyond which rows are sinks: where it lies, what it leaves alone, and that SAEs keep
it.
"""

import math
from dataclasses import replace

import pytest
import torch

from qsae_kit.attach import calibrate, splice
from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import LiveRows, StoredRows
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import ENOUGH, FEWEST, WIDEST, NormFilter, Sinks, sinks_said
from qsae_kit.sae.store import load_sae, save_sae
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import Normaliser, SiteTrainer, fit_normaliser, say_sinks
from qsae_kit.world import world

SITE = "blocks.1.hook_resid_post"


def draws(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ordinary(n=2000, longest=1.5):
    """Norms from 0.5 to `longest`, with median 1 or near it."""
    return torch.cat([torch.linspace(0.5, 1.0, n // 2), torch.linspace(1.0, longest, n - n // 2)])


def test_filter_is_per_row():
    x = torch.tensor([[3.0, 4.0], [30.0, 40.0], [30.1, 40.1], [math.nan, 1.0], [math.inf, 1.0]])
    assert NormFilter(5.0).keeps(x).tolist() == [True, True, False, False, False]
    assert NormFilter(5.0).drops(x).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(("longest", "shortest"), [(1.5, 2.5), (2.0, 4.0), (2.5, 28.0)])
@pytest.mark.parametrize("n_sinks", [FEWEST, 200, 900])
def test_the_bound_lies_in_the_middle_of_the_gap(longest, shortest, n_sinks):
    norms = torch.cat([ordinary(longest=longest), shortest + draws(n_sinks) * shortest])
    norms[-1] = shortest
    found = NormFilter.of(norms)
    assert found.median == norms.median()
    bound = found.factor * found.median
    assert longest < bound < shortest
    lowest = norms[norms > bound].min()
    assert bound == pytest.approx(math.sqrt(longest * lowest), rel=1e-6)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_smooth_heavy_tails_stay_whole_up_to_the_widest_bound(power, seed):
    assert NormFilter.of(draws(20_000, seed) ** (-1 / power)).factor == WIDEST
    normal = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(seed))
    assert NormFilter.of(normal.norm(dim=1).exp()).factor == WIDEST


def test_of_two_gaps_the_lower_one_counts():
    norms = torch.cat([ordinary(longest=2.0), 5 + draws(300), 60 + draws(100)])
    found = NormFilter.of(norms)
    assert 2.0 < found.factor * found.median < 5.0


def test_a_few_rows_in_a_gap_do_not_hide_it():
    norms = torch.cat([ordinary(longest=1.5), 4 + 4 * draws(300), torch.linspace(1.5, 4.0, 7)])
    found = NormFilter.of(norms)
    assert 1.5 < found.factor * found.median < 4.0
    assert NormFilter.of(torch.cat([norms, torch.linspace(1.5, 4.0, 90)])).factor == WIDEST


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(5 + draws(FEWEST - 1), id="too few"),
        pytest.param(5 + draws(1500), id="more than a third"),
        pytest.param(1.9 + 0.01 * draws(300), id="not long enough"),
    ],
)
def test_what_is_no_gap(others):
    assert NormFilter.of(torch.cat([ordinary(longest=1.1), others])).factor == WIDEST


def test_few_rows_have_gaps_by_chance():
    norms = torch.cat([ordinary(ENOUGH - 101, longest=1.5), 4 + draws(100)])
    assert NormFilter.of(norms).factor == WIDEST
    assert NormFilter.of(torch.cat([norms, norms[:1]])).factor < 4


def test_a_gap_far_out_does_not_widen_the_bound():
    smooth = torch.cat([ordinary(), torch.linspace(1.5, 30.0, 500)])
    assert NormFilter.of(torch.cat([smooth, 90 + draws(100)])).factor == WIDEST


def test_the_order_of_the_rows_does_not_matter():
    norms = torch.cat([ordinary(longest=1.7), 3 + 5 * draws(250)]).float()
    found = NormFilter.of(norms)
    for seed in range(5):
        order = torch.randperm(len(norms), generator=torch.Generator().manual_seed(seed))
        assert NormFilter.of(norms[order]) == found


def test_norms_that_are_not_finite_or_all_nought():
    norms = torch.cat([ordinary(longest=1.7), 3 + 5 * draws(250)])
    holes = torch.cat([norms, torch.full((9,), math.nan), torch.full((9,), math.inf)])
    assert NormFilter.of(holes) == NormFilter.of(norms)
    assert NormFilter.of(torch.zeros(50)) == NormFilter(0.0)
    with pytest.raises(ValueError, match="No norm is finite"):
        NormFilter.of(torch.full((3,), math.nan))


def sinks_and_rows(n=4000, d=16):
    """Rows of length about 1, a tenth of them four times as long along one direction."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    x /= x.norm(dim=1, keepdim=True)
    x[::10] = torch.eye(d)[0] * 4 + x[::10] * 0.2
    return x


def test_training_leaves_sinks_out_that_are_within_ten_medians():
    x = sinks_and_rows()
    fitted = fit_normaliser(x)
    assert torch.equal(fitted.filter.keeps(x), torch.arange(len(x)) % 10 != 0)
    assert fitted.mean.norm() < 0.1  # 0.4 with them
    assert fitted.scale == pytest.approx(1, abs=0.01)


def test_the_bound_is_stored_and_applied_where_the_sae_is_used(tmp_path):
    x = sinks_and_rows()
    found = NormFilter.of(x.norm(dim=1))
    sae = TopKSAE(16, 32, 4, Provenance("tiny", SITE, found))
    sae.init_from_rows(x, torch.Generator().manual_seed(0))
    save_sae(sae, tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    assert again.origin.filter == found
    assert 1.1 < again.origin.filter.factor < 3.9
    keep = torch.ones(1, len(x), dtype=torch.bool)
    changed = splice(again, keep).delta(x[None])[0].any(1)
    assert torch.equal(changed, torch.arange(len(x)) % 10 != 0)


def test_the_bound_of_a_release_is_measured_with_its_median(lm):
    sae = TopKSAE(lm.d_model, 64, 4, Provenance("tiny", SITE, NormFilter(math.inf)))
    chats = [[{"role": "user", "content": "How do I cut the wood?"}]] * 80
    batches = list(token_batches(lm, chats))
    calibrate(lm, {"v": {SITE: sae}}, batches)
    rows = torch.cat(
        [lm.run_with_cache(b.ids, b.mask)[1][SITE][b.keep].norm(dim=-1) for b in batches]
    )
    assert len(rows) > ENOUGH
    assert sae.origin == replace(sae.origin, filter=NormFilter.of(rows))


def test_training_says_which_tokens_are_left_out(lm, capsys):
    """In a model whose markers are four times as long as all else; stored rows have no tokens to
    name.
    """
    documents = [d.messages for d in world.dialogues(60, seed=1)]
    source = LiveRows(lm, [SITE], lambda: token_batches(lm, documents))
    [marker] = lm.tokenizer("<|im_start|>", add_special_tokens=False).input_ids
    block = next(source.blocks(20_000))
    ids = torch.cat([batch.ids[batch.keep] for batch in source.batches()])
    norms = block.rows[SITE].norm(dim=-1)
    median, longest = norms.median(), norms[ids == marker].min()
    filters = NormFilter(float(median), float(0.999 * longest / median))
    config = TrainConfig("topk", sparsity=4, tokens=512, batch=256, pool=512)
    trainer = SiteTrainer(
        config, Normaliser(torch.zeros(lm.d_model), 1.0, filters), lm.d_model, lm.device
    )
    say_sinks(source, block, {("v", SITE): trainer})
    n = int(filters.drops(block.rows[SITE]).sum())
    said = " ".join(capsys.readouterr().err.split())
    assert f"left out at layer 1 resid: {n:,} of {len(block):,} tokens (" in said
    assert "'<|im_start|>'" in said
    say_sinks(StoredRows(block.rows), block, {("v", SITE): trainer})
    assert capsys.readouterr().err.strip().endswith("%)")
    none = trainer.normaliser._replace(filter=NormFilter(1e9))
    trainer.normaliser = none
    say_sinks(source, block, {("v", SITE): trainer})
    assert not capsys.readouterr().err


def test_the_sinks_of_many_sites_are_one_sentence():
    found = [
        Sinks("blocks.1.hook_mlp_out", 658, ["assistant", "</think>", " am", " Soy"]),
        Sinks("blocks.3.hook_mlp_out", 21, [" es"]),
    ]
    assert sinks_said(found, 16_384) == (
        "Sinks are left out at 2 sites, most at layer 1 mlp: 658 of 16,384 tokens (4.0%), such as"
        " 'assistant', '</think>', ' am', ..."
    )
    assert sinks_said(found[1:], 16_384) == (
        "Sinks are left out at layer 3 mlp: 21 of 16,384 tokens (0.1%), such as ' es'"
    )

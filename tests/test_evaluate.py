"""Evaluation against twenty independent lines."""

import pytest
import torch

from qsae_kit.data.documents import token_batches
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.sae import JumpReLUSAE, Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sites import KINDS, Site
from qsae_kit.world import world


def sae_at(kind, layer, architecture=TopKSAE, median=60.0, factor=10.0):
    name, width = Site(kind, layer).hook_name, 192 if kind == "z" else 160
    sae = architecture(width, 256, 12.0, Provenance("tiny", name, NormFilter(median, factor)))
    generator = torch.Generator().manual_seed(layer)
    sae.init_from_rows(torch.randn(500, width, generator=generator) * 8, generator)
    return name, sae.requires_grad_(False)


@pytest.fixture(scope="module")
def batches(lm):
    return list(
        token_batches(lm, [d.messages for d in world.dialogues(24, seed=12)], batch_tokens=600)
    )


@torch.no_grad()
def recompute(lm, sae, name, batches):
    """CE and KL of splicing, and the CE of zeroing, written out with plain hooks."""
    ce_clean = ce_spliced = ce_zero = kl = 0.0
    n = 0
    for ids, mask, keep, *_ in batches:
        _, cache = lm.run_with_cache(ids, mask, names_filter=name)
        ordinary = cache[name].norm(dim=-1) <= 10 * sae.provenance.filter.median
        where = (keep & ordinary)[:, :-1] & mask[:, 1:].bool()

        def replace(new, keep=keep):
            def hook(x, hook):
                ok = keep & (x.norm(dim=-1) <= 10 * sae.provenance.filter.median)
                return torch.where(ok[..., None], new(x), x)

            return [(name, hook)]

        clean, spliced, zeroed = (
            torch.log_softmax(logits[:, :-1].double(), -1)[where]
            for logits in (
                lm(ids, mask),
                lm.run_with_hooks(ids, mask, fwd_hooks=replace(sae)),
                lm.run_with_hooks(ids, mask, fwd_hooks=replace(torch.zeros_like)),
            )
        )
        target = ids[:, 1:][where]
        pick = torch.arange(len(target))
        ce_clean, ce_spliced, ce_zero = (
            total - float(p[pick, target].sum())
            for total, p in zip(
                (ce_clean, ce_spliced, ce_zero), (clean, spliced, zeroed), strict=True
            )
        )
        kl += float((clean.exp() * (clean - spliced)).sum())
        n += len(target)
    return (ce_spliced - ce_clean) / n, kl / n, (ce_zero - ce_spliced) / (ce_zero - ce_clean), n


@pytest.mark.parametrize(
    ("kind", "layer", "architecture"),
    [("resid", 2, TopKSAE), ("mlp", 3, JumpReLUSAE), ("attn", 1, TopKSAE)],
)
def test_spliced_figures_equal_a_recomputation(lm, batches, kind, layer, architecture):
    name, sae = sae_at(kind, layer, architecture, median=20.0 if kind == "mlp" else 60.0)
    table = evaluate_suite(lm, {"v": {name: sae}}, batches, bar=False).set_index("category")
    row = table.loc["all"]
    delta_ce, kl, score, n = recompute(lm, sae, name, batches)
    assert row["delta_ce"] == pytest.approx(delta_ce, abs=1e-5)
    assert row["kl_nats"] == pytest.approx(kl, abs=1e-5)
    assert row["ce_score"] == pytest.approx(score, abs=1e-4)
    assert row["spliced_tokens"] == n
    assert row["kl_nats"] > 1e-6
    parts = table.drop("all")  # every token has one category
    assert set(parts.index) == {"template", "user", "thinking", "assistant"}
    for column, count in (
        ("delta_ce", "spliced_tokens"),
        ("kl_nats", "spliced_tokens"),
        ("l0", "tokens"),
        ("mse", "tokens"),
    ):
        assert (parts[column] * parts[count]).sum() / row[count] == pytest.approx(
            row[column], abs=1e-9
        ), column
    assert parts["spliced_tokens"].sum() == n
    assert 0 < row["top_1"] < 1
    assert row["kl_zero"] > row["kl_nats"]
    assert row["kl_mean"] > row["kl_nats"]


def test_rows_beyond_the_filter_are_neither_scored_nor_spliced(lm, batches):
    name, sae = sae_at("resid", 2, median=1e-3)
    with pytest.raises(ValueError, match="no tokens"):
        evaluate_suite(lm, {"v": {name: sae}}, batches, bar=False)
    sinks_out = sae_at("resid", 3, median=64.0, factor=1.5)[1]
    all_in = sae_at("resid", 3, median=64.0, factor=1e6)[1]
    table = evaluate_suite(
        lm,
        {
            "a": {sinks_out.provenance.hook_name: sinks_out},
            "b": {all_in.provenance.hook_name: all_in},
        },
        batches,
        bar=False,
    )
    whole = table[table["category"] == "all"].set_index("variant")
    some, every = whole["tokens"]
    assert some < every == sum(int(b.keep.sum()) for b in batches)
    assert whole["n_sinks"].tolist() == [every - some, 0]
    assert whole["spliced_tokens"]["a"] < whole["spliced_tokens"]["b"]
    name, norms = sinks_out.origin.hook_name, sinks_out.origin.filter
    rows = torch.cat([lm.run_with_cache(b.ids, b.mask)[1][name][b.keep].double() for b in batches])
    ordinary = rows[norms.keeps(rows)]
    kept, all_of_it = (float((x - x.mean(0)).pow(2).sum()) for x in (ordinary, rows))
    assert whole["share_sinks"]["a"] == pytest.approx(1 - kept / all_of_it, rel=1e-4)
    assert whole["share_sinks"]["b"] == 0
    parts = table[(table["variant"] == "a") & (table["category"] != "all")]
    assert parts["n_sinks"].sum() <= every - some  # a category of sinks alone has no row


def test_losses_are_those_of_ordinary_tokens(lm, batches):
    """Two SAEs of one site with two filters are compared on tokens that pass their own."""
    one, other = sae_at("resid", 3, median=64.0, factor=2.5), sae_at("resid", 3, median=64.0)
    suite = {"a": dict([one]), "b": dict([other])}
    both = evaluate_suite(lm, suite, batches, bar=False).set_index(["variant", "category"])
    for variant in suite:
        alone = evaluate_suite(lm, {variant: suite[variant]}, batches, bar=False)
        alone = alone.set_index("category").loc["all"]
        for column in ("spliced_tokens", "ce", "delta_ce", "ce_score", "kl_score_mean", "fvu"):
            assert both.loc[(variant, "all"), column] == pytest.approx(alone[column]), column
    assert both.loc[("a", "all"), "ce"] != both.loc[("b", "all"), "ce"]


def test_it_is_said_which_tokens_are_left_out(lm, batches, capsys):
    name, sae = sae_at("resid", 3, median=64.0, factor=3.0)
    table = evaluate_suite(lm, {"a": {name: sae}, "b": {name: sae}}, batches, 1)
    told = capsys.readouterr().err
    assert max(map(len, told[told.index("Sinks") :].splitlines())) < 80
    said = " ".join(told.split())
    n, every = table["n_sinks"][0], sum(int(b.keep.sum()) for b in batches)
    assert f"Sinks are left out at layer 3 resid: {n:,} of {every:,} tokens (" in said
    assert "%), such as '" in said


def test_columns_and_order(lm, batches):
    saes = dict(sae_at(kind, 0) for kind in KINDS)
    table = evaluate_suite(lm, {"v": saes}, batches, spliced_batches=1, bar=False)
    wanted = (
        "variant site layer kind category fvu mse cosine l2_ratio relative_bias l0 l0_p10 l0_p90"
        " dead denser_than_1_percent denser_than_10_percent tokens n_sinks share_sinks"
        " ce delta_ce kl_nats top_1 delta_ce_zero kl_zero delta_ce_mean kl_mean ce_score kl_score"
        " ce_score_mean kl_score_mean spliced_tokens target d_sae trained_tokens mean_cosine"
        " nearest_median nearest_p99"
    )
    assert list(table.columns) == wanted.split()
    assert list(table["kind"].unique()) == list(KINDS)
    assert table.notna().all().all()


@pytest.mark.parametrize(
    ("width", "layer", "message"),
    [(160, 7, "layer 7.*layers 0 to 5"), (64, 1, "d_in=64.* has 160 at blocks.1.hook_mlp_out")],
)
def test_saes_that_do_not_fit(lm, batches, width, layer, message):
    sae = TopKSAE(
        width, 200, 5.0, Provenance("tiny", f"blocks.{layer}.hook_mlp_out", NormFilter(1.0))
    )
    with pytest.raises(ValueError, match=message):
        evaluate_suite(lm, {"v": {sae.provenance.hook_name: sae}}, batches, bar=False)


def test_a_category_without_tokens_has_no_row(lm):
    chats = [[{"role": "user", "content": "How do I burn the teacher?"}]]
    table = evaluate_suite(
        lm, {"v": dict([sae_at("resid", 1)])}, list(token_batches(lm, chats)), bar=False
    )
    assert table["category"].tolist() == ["all", "template", "user"]
    assert table.notna().all().all()

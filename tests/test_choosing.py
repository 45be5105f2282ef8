"""Choosing by what features do: gradients, scores and searches against what can be known."""

from dataclasses import replace

import pytest
import torch

from qsae_kit.lm.answering import first_tokens
from qsae_kit.lm.edits import applied
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.steer.behaviours import tiny_study
from qsae_kit.steer.changes import FeatureSet, add_direction, add_features
from qsae_kit.steer.choose.aim import BEYOND_LIMIT, Aim, lens_tokens, log_odds_gradient
from qsae_kit.steer.choose.candidates import (
    feature_scores,
    greedy_features,
    pruned_features,
    random_search,
)
from qsae_kit.steer.choose.contrast import contrast, decision_activations

SITE = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def setting(lm):
    """An aim at suppressing refusal, both groups of rows, and an SAE made of them."""
    made = tiny_study("refusal", 24, 8)
    sets = made.selection
    ids = {kind: [lm.chat_tokens(p, False) for p in prompts[:6]] for kind, prompts in sets.items()}
    openings = first_tokens(lm, ["I can't help with that.", "I must refuse."])
    wanted = [
        lm.tokenizer(made.behaviour.wanted(p, "suppress"), add_special_tokens=False).input_ids
        for p in sets["harmful"][:6]
    ]
    rows = {
        kind: decision_activations(lm, [SITE], sets[kind], False)[SITE]
        for kind in ("harmful", "borderline")
    }
    sae = TopKSAE(
        lm.d_model,
        256,
        16.0,
        Provenance("tiny", SITE, NormFilter(float(rows["harmful"].norm(dim=1).median()))),
    )
    sae.init_from_rows(torch.cat(list(rows.values())), torch.Generator().manual_seed(0))
    aim = Aim(lm, ids["harmful"], ids["borderline"], openings, -1.0)
    return aim, rows["harmful"], rows["borderline"], sae.requires_grad_(False), wanted


def test_the_gradient_is_that_of_the_log_odds(lm, setting):
    aim, first, second, _, _ = setting
    gradient = log_odds_gradient(lm, SITE, aim.target, aim.openings, batch=4)
    direction = torch.nn.functional.normalize(first.mean(0) - second.mean(0), dim=0)
    last = []
    for step in (0.05, -0.05):
        odds = []
        for ids in aim.target:  # one by one, so that the mask names the last token alone
            mask = torch.zeros(1, len(ids), dtype=torch.bool)
            mask[0, -1] = True
            edit = add_direction(SITE, direction, step, 1.0, mask)
            with applied(lm, [edit]):
                logits = lm(torch.tensor([ids]))[0, -1].detach()
            rest = logits.index_fill(0, aim.openings, float("-inf"))
            odds.append(float(logits[aim.openings].logsumexp(0) - rest.logsumexp(0)))
        last.append(sum(odds) / len(odds))
    assert float(gradient @ direction) == pytest.approx((last[0] - last[1]) / 0.1, rel=0.02)
    assert not lm.hf.model.embed_tokens.weight.grad


def test_scores_of_candidates(lm, setting):
    aim, first, second, sae, _ = setting

    def make(chosen):
        return [add_features(sae, chosen, -1.0)]

    table = feature_scores(aim, sae, first, second, make, n_candidates=10)
    assert len(table) == 10
    assert table["merit"].is_monotonic_increasing
    found, fires = (
        contrast(sae, first, second),
        torch.cat([sae.encode(first), sae.encode(second)]) > 0,
    )
    for row in table.itertuples():
        i = int(row.feature)
        assert row.gap == pytest.approx(float(found.feature_gap[i]), abs=1e-4)
        assert row.density == pytest.approx(float(fires[:, i].float().mean()))
        assert row.contrast == pytest.approx(row.gap * (1 - row.density), abs=1e-4)
        clean, edited = aim.target_odds(), aim.target_odds(make(FeatureSet((i,), (row.gap,))))
        assert row.effect == pytest.approx(float((edited - clean).mean()), abs=1e-3)
    sign = torch.tensor([float(found.feature_gap[int(i)]) for i in table["feature"]]).sign()
    unit = torch.nn.functional.normalize(found.mean_gap, dim=0)
    rows = torch.nn.functional.normalize(sae.W_dec[table["feature"].tolist()], dim=1)
    torch.testing.assert_close(
        torch.tensor(table["cosine"].to_numpy()), (rows @ unit) * sign, atol=1e-4, rtol=0
    )
    with pytest.raises(ValueError, match="No feature differs"):
        feature_scores(aim, sae, first, first, make)


def test_lens_tokens_are_those_that_the_unembedding_raises(lm):
    token = lm.to_single_token("I")
    direction = (
        lm.hf.get_output_embeddings().weight[token].detach() / lm.hf.model.norm.weight.detach()
    )
    assert token in lens_tokens(lm, direction, 20).tolist()


def test_the_merit_counts_what_is_wanted_and_what_changes_elsewhere(lm, setting):
    aim, first, second, sae, wanted = setting
    assert aim.merit(()) < 0.2  # harmful prompts are refused
    led = Aim(lm, aim.target, aim.others, aim.openings, -1.0, wanted)
    direction = torch.nn.functional.normalize(first.mean(0) - second.mean(0), dim=0)
    edit = add_direction(SITE, direction, -0.9, float(sae.provenance.filter.median))
    assert aim.merit([edit]) > aim.merit(()) + 0.3
    assert led.merit([edit]) > led.merit(())
    for each in (aim, led):  # the floor spares the price and changes no order
        whole = each.merit([edit])
        assert each.merit([edit], floor=whole - 1e-4) == whole
        assert whole <= each.merit([edit], floor=0.999) <= 0.999
    free = replace(aim, price=0.0)
    cost = free.merit([edit]) - aim.merit([edit])
    assert cost == pytest.approx(float(aim.others_kl([edit]).mean()), abs=1e-5)
    nats = float(aim.others_kl([edit]).mean())
    limited = replace(aim, limit=nats / 2)
    assert limited.merit([edit]) == pytest.approx(aim.merit([edit]) - BEYOND_LIMIT, abs=1e-5)
    assert replace(aim, limit=2 * nats).merit([edit]) == pytest.approx(aim.merit([edit]))
    own = replace(free, own_price=0.5)
    target_only = replace(free, others=aim.target)
    paid = free.merit([edit]) - own.merit([edit])
    assert paid == pytest.approx(0.5 * float(target_only.others_kl([edit]).mean()), abs=1e-5)


class Known(Aim):
    """An aim whose best set is known: features 1 and 4, the first with twice the weight of the
    second, against its sign.
    """

    def merit(self, edits, floor=0.0):
        (chosen,) = edits
        weights = dict(zip(chosen.features, chosen.weights, strict=True))
        size = sum(w * w for w in weights.values()) ** 0.5
        return (2 * weights.get(1, 0.0) - weights.get(4, 0.0)) / size / 5**0.5


def test_greedy_and_random_search_find_what_is_known(setting):
    aim, first, second, sae, _ = setting
    known = Known(aim.lm, aim.target, aim.others, aim.openings, 1.0)
    grown = greedy_features(
        known, [(0, 1.0), (1, 1.0), (2, -1.0), (4, -1.0)], lambda chosen: [chosen], 5
    )
    assert dict(zip(grown.chosen.features, grown.chosen.weights, strict=True)) == {1: 2.0, 4: -1.0}
    assert grown.merit == pytest.approx(1.0)
    assert grown.passes == 4 * 10  # no round after the third is better
    single = greedy_features(known, [(0, 1.0), (1, 1.0), (4, -1.0)], lambda chosen: [chosen], 1)
    assert single.chosen.features == (1,)

    found = contrast(sae, first, second)._replace(alive=torch.arange(8))
    like = FeatureSet((6, 7), (1.0, 1.0))
    few, many = (
        random_search(
            known, found, like, lambda chosen: [chosen], n, torch.Generator().manual_seed(3)
        )
        for n in (1, 400)
    )
    assert known.merit([many]) > known.merit([few])
    assert set(many.features) == {1, 4}
    whole = FeatureSet((0, 1, 4, 5), (0.01, 2.0, -1.0, 0.02))
    kept = pruned_features(known, whole, lambda chosen: [chosen], 0.01)
    assert kept.chosen == FeatureSet((1, 4), (2.0, -1.0))
    assert kept.passes == 1 + 4 + 3 + 2
    assert not set(many.features) & set(like.features)

"""Detectors of several features: the fit against what can be known, and what is held out."""

from math import log

import pandas as pd
import pytest
import torch

from qsae_kit.lm.edits import selected
from qsae_kit.lm.hooked import Now
from qsae_kit.metrics.detection import auc, detector_curve
from qsae_kit.metrics.reconstruction import wilson
from qsae_kit.sae import JumpReLUSAE, Provenance
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.suites import Place, Suite
from qsae_kit.steer.changes import Condition, FeatureSet
from qsae_kit.steer.choose.detector import (
    FoundDetector,
    Read,
    best_cut,
    candidates,
    detector_scores,
    find_detector,
    highest,
    reads_of_prompts,
    simplest,
    sparse_sets,
    variance,
)
from qsae_kit.steer.choose.logistic import Groups, l1_logistic

SITE = "blocks.3.hook_resid_post"
WIDTH = 8


def drawn(n, shift, seed, width=30):
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    x[:, :3] += torch.tensor(shift)
    return x


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_a_sparse_fit_is_where_an_optimum_has_to_be(share):
    """The conditions of Karush, Kuhn and Tucker, with groups of different sizes."""
    groups = Groups.of(drawn(60, (1.0, -1.0, 0.5), 0), drawn(25, (0.0, 0.0, 0.0), 1))
    penalty = share * groups.least_penalty_of_none()
    fit = l1_logistic(groups, penalty)
    by_weights, by_bias = groups.gradient(fit)
    on = fit.weights != 0
    assert 0 < int(on.sum()) < len(on)
    assert fit.support == on.nonzero()[:, 0].tolist()
    torch.testing.assert_close(by_weights[on], -penalty * fit.weights[on].sign(), atol=2e-5, rtol=0)
    assert float(by_weights[~on].abs().max()) < penalty + 2e-5
    assert abs(float(by_bias)) < 2e-5
    from_afar = l1_logistic(groups, penalty, fit._replace(weights=fit.weights + 0.1))
    torch.testing.assert_close(from_afar.weights, fit.weights, atol=2e-2, rtol=0)


def test_fits_that_are_known():
    """Shares of 3/4 and 1/4 of ones, without a penalty: log-odds 2 log 3; none from the least
    penalty of none on.
    """
    on, off = torch.tensor([[1.0]] * 3 + [[0.0]]), torch.tensor([[1.0]] + [[0.0]] * 3)
    fit = l1_logistic(Groups.of(on, off), 0.0)
    assert float(fit.weights) == pytest.approx(2 * log(3), abs=1e-3)
    assert float(fit.bias) == pytest.approx(-log(3), abs=1e-3)
    groups = Groups.of(drawn(20, (1.0, 0.0, 0.0), 0), drawn(20, (0.0, 0.0, 0.0), 1))
    assert l1_logistic(groups, groups.least_penalty_of_none()).support == []
    assert l1_logistic(groups, 0.98 * groups.least_penalty_of_none()).support != []


def test_sets_grow_to_the_sizes_that_are_asked_for():
    on, off = drawn(80, (2.0, -2.0, 1.5), 0).abs(), drawn(80, (0.0, 0.0, 0.0), 1).abs()
    sets = sparse_sets(on, off, [2, 5, 10])
    sizes = [len(each.features) for each in sets]
    assert sizes == sorted(sizes)
    assert sizes[0] == 2
    assert sizes[-1] <= 10
    assert set(sets[0].features) <= {0, 1, 2}
    assert all(len(each.weights) == len(each.features) and 0 not in each.weights for each in sets)
    assert all(max(map(abs, each.weights)) == pytest.approx(1) for each in sets)
    assert sparse_sets(0 * on, 0 * off, [2, 5]) == []
    assert sparse_sets(on, off, []) == []


def axis_sae(width=WIDTH):
    """A feature an axis of the activations: it reads what is above 0 there."""
    sae = JumpReLUSAE(width, width, 2.0, Provenance("tiny", SITE, NormFilter(10.0)))
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(width))
        sae.W_dec.copy_(torch.eye(width))
        sae.b_enc.zero_()
    return sae.requires_grad_(False)


def read_of(sae, x):
    """As if every prompt had one token."""
    f = sae.encode(x)
    return Read({"prompt": f, "header": f}, f, list(x[:, None]))


def two_that_only_together_tell(n, seed):
    """Features 0 and 1 vary widely and alike in both groups; the first has more of 0 than of 1."""
    generator = torch.Generator().manual_seed(seed)
    common = 2 + 4 * torch.rand(n, generator=generator)
    x = 0.5 * torch.rand(n, WIDTH, generator=generator)
    x[:, 0] = common
    x[:, 1] = common
    on = x.clone()
    on[:, 0] += 0.8
    return on, x + 0.0


def test_two_features_tell_apart_what_none_does_alone():
    sae = axis_sae()
    on, _ = two_that_only_together_tell(120, 0)
    _, off = two_that_only_together_tell(120, 1)
    alone = best_cut(sae.encode(on), sae.encode(off))
    assert alone.missed + alone.false_alarms > 0.5
    found = simplest(
        candidates(Place("v", SITE), sae, read_of(sae, on), read_of(sae, off), [2, 5], 0.05, 0)
    )
    condition = found.condition
    assert set(condition.features[:2]) == {0, 1}
    assert condition.positions == "header"
    weights = dict(zip(condition.features, condition.weights, strict=True))
    assert weights[0] > 0 > weights[1]
    assert found.errors < 0.05
    new_on, _ = two_that_only_together_tell(300, 2)
    _, new_off = two_that_only_together_tell(300, 3)
    watch = condition.detector(sae)
    assert float((watch.read(new_on[:, None]) > condition.threshold).float().mean()) > 0.95
    assert float((watch.read(new_off[:, None]) > condition.threshold).float().mean()) < 0.05


def test_a_fit_minds_the_tokens_at_which_nothing_is_decided():
    """The header's first token reads high where its last one tells the kinds apart, and alike in
    both; it is told from the last by feature 2.
    """
    sae = axis_sae()
    reads = []
    for which, seed in ((0, 0), (1, 1)):
        last = two_that_only_together_tell(120, seed)[which]
        begin = 0.5 * torch.rand(120, WIDTH, generator=torch.Generator().manual_seed(9 + seed))
        begin[:, 0] += 3
        begin[:, 2] += 4
        header = torch.stack([begin, last], 1)
        f = sae.encode(header)
        reads.append(Read({"prompt": f[:, 0], "header": f.amax(1)}, f[:, 1], list(header)))
    found = simplest(candidates(Place("v", SITE), sae, *reads, [2, 5], 0.05, 0))
    assert found.errors < 0.2
    weights = dict(zip(found.condition.features, found.condition.weights, strict=True))
    assert weights[0] > 0 > max(weights[1], weights[2])


def test_a_single_feature_wins_where_it_is_as_good():
    sae = axis_sae()
    generator = torch.Generator().manual_seed(0)
    on, off = torch.rand(2, 60, WIDTH, generator=generator)
    on[:, 4] += 2
    on[:, 5] += 0.3
    found = simplest(
        candidates(Place("v", SITE), sae, read_of(sae, on), read_of(sae, off), [2, 5], 0.05, 0)
    )
    assert found.condition.features == (4,)
    assert found.condition.weights == ()
    assert found.condition.positions == "prompt"
    assert found.errors == 0


def test_the_threshold_is_of_prompts_that_did_not_choose_the_features():
    """Nothing tells the groups apart: features that seem to on a half do not on the other."""
    sae = axis_sae(200)
    generator = torch.Generator().manual_seed(3)
    on, off = 0.6 * torch.rand(2, 40, 200, generator=generator)
    place, reads = Place("v", SITE), [read_of(sae, x) for x in (on, off)]
    found = simplest(candidates(place, sae, *reads, [2, 5, 10, 20], 0.05, 0))
    seen = best_cut(on, off, 0.05)
    assert found.errors > seen.missed + seen.false_alarms + 0.1
    assert found.false_alarms <= 0.05 + 1e-6
    held = simplest(candidates(place, sae, *reads, [2, 5, 10, 20], 0.0, 0))
    assert held.false_alarms == 0


def test_false_alarms_are_kept_below_what_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    for most in (0.0, 0.05, 0.2, 1.0):
        on, off = (
            torch.randn(40, 5, generator=generator) + 1,
            torch.randn(60, 5, generator=generator),
        )
        on, off = on.clamp(min=0), off.clamp(min=0)
        cut = best_cut(on, off, most)
        fires = [float((x[:, cut.feature] > cut.threshold).float().mean()) for x in (on, off)]
        assert fires == pytest.approx([1 - cut.missed, cut.false_alarms])
        assert cut.false_alarms <= most + 1e-6
        allowed = [
            float((on[:, i] <= t).float().mean() + (off[:, i] > t).float().mean())
            for i in range(5)
            for t in torch.cat([on, off])[:, i]
            if float((off[:, i] > t).float().mean()) <= most + 1e-6
        ]
        assert cut.missed + cut.false_alarms == pytest.approx(min(allowed), abs=1e-3)
    # above all that there is, where every cut has too many false alarms
    on, off = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    cut = best_cut(on, off, 0.0)
    assert (cut.missed, cut.false_alarms) == (1.0, 0.0)
    assert not (torch.cat([on, off]) > cut.threshold).any()


def test_more_features_have_to_do_better_by_a_standard_error():
    def made(n, policy, errors, standard_error=0.0):
        ids = tuple(range(n))
        weights = (1.0,) * n if n > 1 else ()
        condition = Condition("v", SITE, ids, weights, 0.0, "so_far", policy)
        return FoundDetector(condition, errors, 0.0, standard_error)

    alone, at_header = made(1, "prompt", 0.2, 0.1), made(1, "header", 0.18, 0.1)
    assert simplest([made(5, "header", 0.15, 0.04), at_header]) == at_header
    assert simplest([made(5, "header", 0.15, 0.04), at_header, alone]) == at_header
    assert simplest([made(5, "header", 0.15, 0.06), at_header, alone]) == alone
    several = made(5, "header", 0.15, 0.02)
    assert simplest([several, at_header, alone, made(9, "header", 0.14, 0.02)]) == several
    assert variance(0.0, 24) == pytest.approx((1 / 26) * (25 / 26) / 24)


def prompts(n, thing):
    names = ("Ada", "Max", "Mira", "Ruth", "Tilda", "Sara", "Olga", "Leo", "Emma", "Boris")
    return [f"Which {thing} does {name} have?" for name in names][:n]


@pytest.fixture(scope="module")
def suite(lm):
    sae = JumpReLUSAE(lm.d_model, 128, 2.0, Provenance("tiny", SITE, NormFilter(60.0)))
    ids, mask = lm.pad([lm.chat_tokens(p, False) for p in prompts(10, "pet")])
    with torch.no_grad():
        _, cache = lm.run_with_cache(ids, mask, names_filter=[SITE])
        x = cache[SITE][mask.bool()]
    sae.init_from_rows(x, torch.Generator().manual_seed(0))
    return Suite({"v": {SITE: sae.requires_grad_(False)}})


@torch.no_grad()
def test_scores_are_what_the_threshold_is_compared_with(lm, suite):
    sae, texts = suite["v"][SITE], [*prompts(4, "illness"), "Thank you."]
    read = reads_of_prompts(lm, suite, texts, ("prompt", "header"), False)[Place("v", SITE)]
    condition = Condition("v", SITE, (3, 9, 11), (1.0, -0.5, 0.25), 0.0, "so_far", "header")
    scores = detector_scores(lm, sae, condition, texts, False)
    chosen = FeatureSet(condition.features, condition.weights)
    torch.testing.assert_close(highest(sae, chosen, read.header), scores, atol=1e-4, rtol=1e-4)
    for i, text in enumerate(texts):
        row = lm.chat_tokens(text, False)
        _, cache = lm.run_with_cache(torch.tensor([row]), names_filter=[SITE])
        f = sae.encode(cache[SITE][0])
        now = Now(*lm.pad([row]), 0, lm.markers)
        header = f[selected(now, "header")[0]]
        assert len(read.header[i]) == len(header)
        by_hand = (header[:, 3] - 0.5 * header[:, 9] + 0.25 * header[:, 11]).max()
        assert float(scores[i]) == pytest.approx(float(by_hand), abs=1e-3)
        torch.testing.assert_close(read.decision[i], f[-1], atol=1e-3, rtol=1e-3)
        at_prompt = f[selected(now, "prompt")[0]].amax(0)
        torch.testing.assert_close(read.peaks["prompt"][i], at_prompt, atol=1e-3, rtol=1e-3)


def test_a_detector_of_the_bundled_model(lm, suite):
    first, second = prompts(10, "illness"), prompts(10, "pet")
    found = find_detector(lm, suite, first, second, enable_thinking=False)
    sae = suite["v"][SITE]
    scores = [detector_scores(lm, sae, found.condition, some, False) for some in (first, second)]
    assert auc(*scores) > 0.9
    with pytest.raises(ValueError, match=r"0 features with false alarms on at most 0\.05"):
        find_detector(lm, suite, first, second, n_features=0)
    with pytest.raises(ValueError, match="share is from 0 to 1"):
        find_detector(lm, suite, first, second, most_false_alarms=2)


def test_a_curve_has_every_threshold_with_its_intervals():
    first, second = torch.tensor([3.0, 2.0, 2.0, 0.0]), torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0])
    curve = detector_curve(first, second, 1.5)
    assert curve["threshold"].tolist() == [3.0, 2.0, 1.5, 1.0, 0.0, -float("inf")]
    assert curve["true_rate"].tolist() == [0.0, 0.25, 0.75, 0.75, 0.75, 1.0]
    assert curve["false_rate"].tolist() == [0.0, 0.0, 0.2, 0.2, 0.4, 1.0]
    assert curve["chosen"].tolist() == [False, False, True, False, False, False]
    assert tuple(curve.loc[2, ["true_rate", "true_low", "true_high"]]) == wilson(3, 4)
    assert tuple(curve.loc[2, ["false_rate", "false_low", "false_high"]]) == wilson(1, 5)
    assert set(curve["n_true"]) == {4}
    assert set(curve["n_false"]) == {5}
    pairs = [(a > b) + 0.5 * (a == b) for a in first.tolist() for b in second.tolist()]
    assert set(curve["auc"]) == {sum(pairs) / len(pairs)}
    area = sum(
        (b.false_rate - a.false_rate) * (a.true_rate + b.true_rate) / 2
        for a, b in zip(curve.itertuples(), curve[1:].itertuples(), strict=False)
    )
    assert area == pytest.approx(curve["auc"][0])
    assert isinstance(curve, pd.DataFrame)
    assert auc(first, torch.tensor([-float("inf")])) == 1.0
    with pytest.raises(ValueError, match="at least one of each kind"):
        detector_curve(first, second[:0])

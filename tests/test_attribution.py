"""Attribution: what gradients say of features, against what real passes say."""

import pytest
import torch
from small import SITES, explaining_suite

from qsae_kit.attach import counted_features, token_features
from qsae_kit.audit import attribution
from qsae_kit.audit.attribution import answer_question, attribute, falls, token_question
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.sae import Provenance, ReLUSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.suites import Feature, Place, Suite

PROMPT = "How do I burn the teacher?"


@pytest.fixture(scope="module")
def suite(lm):
    return explaining_suite(lm)


@pytest.fixture(scope="module")
def question(lm):
    return answer_question(lm, PROMPT, "I can't help with that.", "You take it.")


@pytest.fixture(scope="module")
def found(lm, suite, question):
    return attribute(lm, suite, question, steps=32)


@torch.no_grad()
def test_the_score_is_the_models_own(lm, question, found):
    logits = lm(torch.tensor([question.ids]))[0, -1]
    first, second = (lm.tokenizer(t, add_special_tokens=False).input_ids[0] for t in ("I", "You"))
    assert found.value == pytest.approx(float(logits[first] - logits[second]), abs=1e-4)
    assert "log-odds of 'I' against 'You'" in found.in_words


def test_attributions_of_a_site_sum_to_what_its_features_do(found):
    sites = found.sites.set_index("site")
    assert set(sites.index) == set(SITES)
    assert sites["effect"].abs().max() > 1
    for name in SITES:
        row = sites.loc[name]
        assert row["features"] == pytest.approx(row["effect"], rel=0.1, abs=0.02)


@torch.no_grad()
def test_effects_are_those_of_real_ablations(lm, suite, question, found):
    ids = torch.tensor([question.ids])
    for row in found.features.head(4).itertuples():
        sae = suite[row.variant][row.site]
        (f,) = token_features(lm, sae, [list(question.ids)])
        keep = (f != 0).any(1)

        def delta(x, sae=sae, i=row.feature, keep=keep):
            return torch.where(keep[:, None], -sae.encode(x)[..., [i]] @ sae.W_dec[[i]], 0.0)

        with applied(lm, [Edit(row.site, delta, "every")]):
            left = float(question.score(lm(ids)[:, -1]))
        assert row.effect == pytest.approx(found.value - left, abs=1e-4)
        at = found.at_tokens[Feature(Place(row.variant, row.site), row.feature)]
        assert float(at.sum()) == pytest.approx(row.gradient, abs=1e-5)
        assert int(at.abs().argmax()) == row.position
        assert float(f[row.position, row.feature]) == pytest.approx(row.activation, abs=1e-4)


def test_predicted_effects_rank_as_real_ones(found):
    assert len(found.features) == 20
    assert found.agreement > 0.8
    order = found.features["gradient"].abs()
    assert order.is_monotonic_decreasing


def test_a_token_within_an_answer_is_asked_about(lm, suite):
    question = token_question(lm, PROMPT, 5, begun=[9])
    assert question.ids[-1] == 9
    one = {"v": {SITES[1]: suite["v"][SITES[1]]}}
    few = attribute(lm, one, question, by="path", steps=4, top=3)
    assert few.features["path"].abs().is_monotonic_decreasing
    assert len(few.features) == 3
    assert set(few.features["site"]) == {SITES[1]}
    assert set(few.features.columns) >= {"gradient", "path", "share", "token", "position"}
    assert float(few.features["share"].sum()) <= 1


def exact_sae(lm, name, median):
    """Reconstructs everything: a feature and its opposite for every direction, around a bias."""
    d = lm.d_model
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    sae = ReLUSAE(d, 2 * d, 8.0, Provenance("tiny", name, NormFilter(median)))
    bias = 3 * torch.randn(d, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.encoder.copy_(both)
        sae.W_dec.copy_(both)
        sae.b_dec.copy_(bias)
        sae.b_enc.copy_(-both @ bias)
    return sae.requires_grad_(False)


def test_an_exact_reconstruction_has_no_error_but_a_bias(lm, suite, question):
    name = SITES[1]
    exact = Suite({"e": {name: exact_sae(lm, name, suite["v"][name].origin.filter.median)}})
    found = attribute(lm, exact, question, top=1, keep="all")
    row = found.sites.loc[0]
    assert abs(row["bias"]) > 0.05
    assert abs(row["error"]) < 1e-3 * abs(row["bias"])
    gradient, x = gradient_at(lm, name, question)
    where = found.counted[Place("e", name)]
    bias = exact["e"][name].b_dec
    assert row["bias"] == pytest.approx(float((gradient @ bias)[where].sum()), rel=1e-3)
    features = float(found.everywhere[Place("e", name)].sum())
    whole = float((gradient * x)[where].sum())
    assert features + row["bias"] + row["error"] == pytest.approx(whole, rel=1e-3, abs=1e-3)


def gradient_at(lm, name, question):
    """Of the score, at a site, and the activations there."""
    probe = torch.zeros(1, len(question.ids), lm.d_model, requires_grad=True)
    seen = []

    def delta(x):
        seen.append(x.detach()[0])
        return probe

    with applied(lm, [Edit(name, delta, "every")]):
        logits = lm(torch.tensor([question.ids]))
        (gradient,) = torch.autograd.grad(question.score(logits[:, -1]).sum(), probe)
    return gradient[0], seen[0]


def test_passes_in_parts_give_the_same_and_hold_few_tokens(lm, suite, question, monkeypatch):
    few = dict(steps=5, top=4, keep="all")
    whole = attribute(lm, suite, question, **few)
    rows, encoded = [], []
    forward, encode = type(lm).forward, type(suite["v"][SITES[0]]).encode

    def count(self, ids, *args, **kwargs):
        rows.append(len(ids))
        return forward(self, ids, *args, **kwargs)

    def look(self, x):
        encoded.append(len(x))
        return encode(self, x)

    monkeypatch.setattr(type(lm), "forward", count)
    monkeypatch.setattr(type(suite["v"][SITES[0]]), "encode", look)
    monkeypatch.setattr(attribution, "TOKENS_AT_ONCE", 2 * len(question.ids))
    parts = attribute(lm, suite, question, **few)
    assert max(rows) == 2
    assert max(encoded) == 1  # each edit looks at its own row alone
    for column in ("gradient", "path", "effect"):
        assert parts.features[column].tolist() == pytest.approx(
            whole.features[column].tolist(), abs=1e-4
        )
    for column in ("features", "effect", "bias", "error", "together"):
        assert parts.sites[column].tolist() == pytest.approx(whole.sites[column].tolist(), abs=1e-4)


def test_what_is_kept(lm, suite, question, found):
    assert not found.everywhere
    assert list(found.at_tokens) == [
        Feature(Place(row.variant, row.site), row.feature) for row in found.features.itertuples()
    ]
    held = next(iter(found.at_tokens.values()))
    assert held.untyped_storage().nbytes() == held.nbytes  # no view of what is large
    whole = attribute(lm, suite, question, steps=1, top=3, keep="all")
    for place, values in whole.everywhere.items():
        assert values.shape == (len(question.ids), suite.sae(place).d_sae)
    for one, values in whole.at_tokens.items():
        assert torch.equal(values, whole.everywhere[one.place][:, one.number])
    for place, sae in suite.saes().items():
        [(_, counted)] = counted_features(lm, sae, [list(question.ids)])
        assert torch.equal(found.counted[place], counted)
        assert not counted[0]


def test_reach_bounds_what_a_feature_does(found):
    for row in found.features.itertuples():
        reach = float(found.reach[Place(row.variant, row.site)][row.feature])
        assert reach >= abs(row.gradient) * (1 - 1e-4)


def test_weights_keep_no_gradient_and_learn_afterwards(lm, suite, question, monkeypatch):
    weights = list(lm.hf.parameters())
    before = [weight.requires_grad for weight in weights]
    assert any(before)
    seen = []
    forward = type(lm).forward

    def look(self, *args, **kwargs):
        if torch.is_grad_enabled():
            seen.append(any(weight.requires_grad for weight in weights))
            if len(seen) > 1:
                raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(lm), "forward", look)
    with pytest.raises(KeyboardInterrupt):
        attribute(lm, suite, question, steps=1, top=1)
    assert seen == [False, False]
    assert [weight.requires_grad for weight in weights] == before


def test_an_effect_is_beside_an_unedited_row_of_its_pass(lm, question, monkeypatch):
    """Whatever a pass adds to all of its rows, as rounding does, falls out."""
    nothing = Edit(SITES[0], torch.zeros_like, "every")
    scores, passes = attribution.scores, []

    def shifted(*args):
        passes.append(10.0 * len(passes))
        return [one + passes[-1] for one in scores(*args)]

    monkeypatch.setattr(attribution, "scores", shifted)
    monkeypatch.setattr(attribution, "TOKENS_AT_ONCE", 2 * len(question.ids))
    ids = torch.tensor([question.ids])
    assert falls(lm, ids, question, [[nothing]] * 3) == pytest.approx([0, 0, 0], abs=1e-4)
    assert len(passes) == 3


def test_attributions_that_are_not_finite_are_one_sentence(lm, suite, question):
    name = SITES[1]
    broken = exact_sae(lm, name, suite["v"][name].origin.filter.median)
    broken.W_dec[3, 0] = float("nan")
    with pytest.raises(ValueError, match=f"features of e/{name} do to the score is not finite"):
        attribute(lm, {"e": {name: broken}}, question, steps=1, top=1)


def test_what_cannot_be_asked_is_one_sentence(lm, suite, question):
    with pytest.raises(ValueError, match="do not part"):
        answer_question(lm, PROMPT, "Yes", "Yes")
    with pytest.raises(ValueError, match="by='all' was given; choose from gradient, path"):
        attribute(lm, suite, question, by="all")
    with pytest.raises(ValueError, match="0 steps and 20 features"):
        attribute(lm, suite, question, steps=0)
    with pytest.raises(ValueError, match="keep='some' was given; choose from top, all"):
        attribute(lm, suite, question, keep="some")

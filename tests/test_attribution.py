"""Attribution: what gradients say of features, against what real passes say."""

import pytest
import torch
from small import SITES, explaining_suite

from qsae_kit.attach import token_features
from qsae_kit.audit.attribution import answer_question, attribute, token_question
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.sae.suites import Place

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
        at = found.at_tokens[Place(row.variant, row.site)][:, row.feature]
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


def test_what_cannot_be_asked_is_one_sentence(lm, suite, question):
    with pytest.raises(ValueError, match="do not part"):
        answer_question(lm, PROMPT, "Yes", "Yes")
    with pytest.raises(ValueError, match="by='all' was given; choose from gradient, path"):
        attribute(lm, suite, question, by="all")
    with pytest.raises(ValueError, match="0 steps and 20 features"):
        attribute(lm, suite, question, steps=0)

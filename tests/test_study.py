"""The study's honesty: apart prompts, matched controls, and outcomes that follow the planted cause."""

import pytest
import torch

from qsae_kit import prompts as prompt_sets
from qsae_kit.activations import NormFilter
from qsae_kit.choosing import (
    Contrast,
    choose_features,
    contrast,
    decision_activations,
    fit_features,
    random_features,
)
from qsae_kit.demo import default_config, demo_prompts
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.steering import FeatureSet, ablate_features, add_features, check_features, clamp_features
from qsae_kit.study import StudyConfig, check_prompts, verdict

SITE = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def sae(lm):
    """An SAE of the bundled model whose first feature is the planted difference of refusing and answering."""
    sets, _ = demo_prompts("tiny", default_config(lm))
    acts = {k: decision_activations(lm, [SITE], sets[k], False)[SITE] for k in ("harmful", "harmless", "borderline")}
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(160, 256, 16.0, Provenance("tiny", SITE, NormFilter(64.0)))
    sae.init_from_rows(torch.cat(list(acts.values())), generator)
    return sae.requires_grad_(False), acts


@pytest.mark.parametrize("model_name", ["tiny", "any other"])
def test_selection_and_evaluation_share_no_template_and_no_prompt(model_name):
    sets = {
        split: [p for kind in prompt_sets.KINDS for p in prompt_sets.prompts(model_name, kind, 60, split)]
        for split in prompt_sets.SPLITS
    }
    templates = {split: {p.template for p in found} for split, found in sets.items()}
    assert not templates["selection"] & templates["evaluation"]
    assert not {p.text for p in sets["selection"]} & {p.text for p in sets["evaluation"]}
    assert all(len({p.text for p in found}) == 180 for found in sets.values())


def test_general_tasks_are_apart_too():
    tasks = {
        split: {w.text.replace(w.template.split("{a}")[0], "").strip("?. ") for w in prompt_sets._pairs("harmful", split)}
        for split in prompt_sets.SPLITS
    }
    assert all(prompt_sets.count("x", kind, split) >= 100 for kind in prompt_sets.KINDS for split in prompt_sets.SPLITS)
    assert not tasks["selection"] & tasks["evaluation"]


def test_more_prompts_than_there_are_is_said():
    with pytest.raises(ValueError, match="were asked for"):
        prompt_sets.prompts("any", "harmful", 10_000, "selection")
    with pytest.raises(ValueError, match="'evil'"):
        prompt_sets.prompts("tiny", "evil", 5, "selection")


def test_contrast_and_choice_by_hand():
    sae = TopKSAE(2, 3, 3.0, Provenance("m", SITE, NormFilter(1.0)))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
        sae.W_dec.copy_(torch.eye(3)[:, :2])
    found = contrast(sae, torch.tensor([[4.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert found.feature_gap.tolist() == [3.0, -1.0, 2.0]
    assert found.mean_gap.tolist() == [3.0, -1.0]
    assert found.alive.tolist() == [0, 1, 2]
    chosen = choose_features(found, 2)
    assert chosen == FeatureSet((0, 2), (3.0, 2.0))
    torch.testing.assert_close(chosen.direction(sae), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="No feature differs"):
        choose_features(Contrast(torch.zeros(3), torch.zeros(2), torch.arange(3)))


def test_fitted_features_by_hand():
    sae = TopKSAE(2, 3, 3.0, Provenance("m", SITE, NormFilter(1.0)))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(3)[:, :2])
    found = Contrast(torch.tensor([3.0, -1.0, 2.0]), torch.tensor([3.0, -1.0]), torch.arange(3))
    chosen = fit_features(sae, found, 3)  # feature 2 differs, but its decoder row explains nothing
    assert chosen.features == (0, 1)
    assert chosen.weights == pytest.approx((3.0, -1.0))
    assert fit_features(sae, found, 1).features == (0,)
    against = found._replace(feature_gap=torch.tensor([-3.0, -1.0, 2.0]))  # feature 0 would have to push against its gap
    assert fit_features(sae, against).features == (1,)
    with pytest.raises(ValueError, match="No feature differs"):
        fit_features(sae, Contrast(torch.zeros(3), torch.zeros(2), torch.arange(3)))


def test_random_draws_have_the_chosen_size_and_other_features(sae):
    sae, acts = sae
    found = contrast(sae, acts["harmful"], acts["harmless"])
    chosen = choose_features(found, 10)
    draws = [random_features(found, chosen, torch.Generator().manual_seed(s)) for s in range(20)]
    x = torch.randn(1, 4, 160)
    size = add_features(sae, chosen, 1.5, "all").delta(x).norm(dim=-1)
    for draw in draws:
        assert len(draw.features) == 10
        assert not set(draw.features) & set(chosen.features)
        assert sorted(map(abs, draw.weights)) == pytest.approx(sorted(map(abs, chosen.weights)))
        torch.testing.assert_close(add_features(sae, draw, 1.5, "all").delta(x).norm(dim=-1), size)
    assert len({draw.features for draw in draws}) == 20
    few = found._replace(alive=torch.tensor(chosen.features))
    with pytest.raises(ValueError, match="Only 0 other features"):
        random_features(few, chosen, torch.Generator())


def test_clamp_and_ablate_set_the_feature_and_keep_the_rest(sae):
    sae, acts = sae
    x = acts["harmful"][:8]
    f = sae.encode(x)
    feature = int(f.mean(0).argmax())
    ablated = x + ablate_features(sae, [feature]).delta(x)
    torch.testing.assert_close(ablated, x - f[:, [feature]] * sae.W_dec[feature])
    clamped = x + clamp_features(sae, [feature], 7.0).delta(x)
    torch.testing.assert_close(clamped, x + (7.0 - f[:, [feature]]) * sae.W_dec[feature])
    unchanged = x + clamp_features(sae, [feature], float(f[0, feature])).delta(x)
    torch.testing.assert_close(unchanged[0], x[0])


@pytest.mark.parametrize(("features", "message"), [([], "No feature"), ([256], "features 0 to 255"), ([-1], "Feature -1")])
def test_features_out_of_range(sae, features, message):
    with pytest.raises(ValueError, match=message):
        check_features(sae[0], features)


def test_prompt_sets_are_checked():
    good = {"harmful": ["a"], "harmless": ["b"], "borderline": ["c"]}
    other = {"harmful": ["d"], "harmless": ["e"], "borderline": ["f"]}
    check_prompts(good, other)
    for bad, message in (
        ({**other, "harmless": ["a"]}, "'a' among them"),
        ({**other, "borderline": []}, "no borderline evaluation"),
        ({**other, "harmful": [" "]}, "is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            check_prompts(good, bad)


@pytest.mark.parametrize(
    "field", [{"strengths": ()}, {"strengths": (float("nan"),)}, {"strengths": (-1.0,)}, {"n_features": 11}, {"n_random": -1}]
)
def test_impossible_studies(field):
    with pytest.raises(ValueError, match=r"was given|were given"):
        StudyConfig(**field)


def test_the_verdict_says_when_random_does_as_much():
    import pandas as pd

    def row(goal, intervention, rate, low, high):
        return {"goal": goal, "intervention": intervention, "prompt_kind": "harmful", "chosen": goal != "none", "target": goal != "none",
                "refusal_rate": rate, "ci_low": low, "ci_high": high, "broken_rate": 0.0}  # fmt: skip

    rows = [
        row("none", "none", 1.0, 0.9, 1.0),
        row("suppress", "features", 0.1, 0.05, 0.2),
        row("suppress", "difference_of_means", 0, 0, 0.1),
    ]
    apart = pd.DataFrame([*rows, row("suppress", "random", 0.9, 0.8, 0.95)])
    alike = pd.DataFrame([*rows, row("suppress", "random", 0.9, 0.8, 0.95), row("suppress", "random", 0.2, 0.1, 0.3)])
    assert "not distinguishable" not in verdict(apart, "suppress")
    assert "not distinguishable from the random control" in verdict(alike, "suppress")

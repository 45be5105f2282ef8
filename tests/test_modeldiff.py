"""Two models under one suite: equal where nothing was changed, counted by hand where something
was.
"""

from dataclasses import replace

import pytest
import torch
from small import small_suite

import qsae_kit
from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import site_activations
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.evaluate.modeldiff import compare_models, most_changed

CHATS = [
    [
        {"role": "user", "content": f"Which pet does {name} have?"},
        {"role": "assistant", "content": "I do not know."},
    ]
    for name in ("Ada Reyes", "Max Vogt", "Mira Rios", "Ruth Sommer")
]
EARLY, LATE = "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def tuned():
    other = qsae_kit.load_model("tiny")
    with torch.no_grad():
        # after the first site, before the second
        other.hf.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    return other


@pytest.fixture(scope="module")
def suite(lm):
    return {
        variant: {name: saes[name] for name in (EARLY, LATE)}
        for variant, saes in small_suite(lm).items()
    }


@pytest.fixture(scope="module")
def batches(lm):
    return list(token_batches(lm, CHATS))


def test_what_was_not_changed_is_equal_and_what_was_is_counted(lm, tuned, suite, batches):
    found = compare_models(lm, tuned, suite, batches, bar=False)
    sites = found.sites.set_index(["site", "category"])
    assert (sites.loc[EARLY, "fvu_gap"] == 0).all()
    assert (sites.loc[LATE, "fvu_gap"] != 0).any()
    whole = evaluate_suite(lm, suite, batches, 1, bar=False).set_index(["site", "category"])
    for name in (EARLY, LATE):
        assert sites.loc[(name, "all"), "fvu_first"] == pytest.approx(
            whole.loc[(name, "all"), "fvu"], rel=1e-9
        )
        assert sites.loc[(name, "all"), "l0_first"] == pytest.approx(
            whole.loc[(name, "all"), "l0"], rel=1e-9
        )
        assert sites.loc[(name, "all"), "tokens"] == sum(
            sites.loc[(name, c), "tokens"] for c in ("template", "user", "assistant")
        )
    early = found.features[found.features["site"] == EARLY]
    assert (early["change"] == 0).all()
    assert (early["overlap"] == 1).all()

    sae = suite["v"][LATE]
    on = [
        sae.encode(site_activations(model, [LATE], batches[0])[LATE][batches[0].keep]) > 0
        for model in (lm, tuned)
    ]
    late = found.features[found.features["site"] == LATE].set_index("feature")
    assert set(late.index) == set((on[0].any(0) | on[1].any(0)).nonzero()[:, 0].tolist())
    for feature, row in late.iterrows():
        a, b = (x[:, feature] for x in on)
        assert (row["fired_first"], row["fired_second"]) == (int(a.sum()), int(b.sum()))
        assert row["change"] == pytest.approx(float(b.float().mean() - a.float().mean()), abs=1e-6)
        assert row["overlap"] == pytest.approx(float((a & b).sum() / (a | b).sum()), abs=1e-6)
    top = most_changed(found.features, 2)
    shown = top[top["site"] == LATE]["change"].tolist()
    assert shown[0] == late["change"].max()
    assert shown[-1] == late.loc[late["change"] != 0, "change"].min()
    assert len(shown) <= 4


def test_models_that_do_not_belong_together(lm, tuned, suite, batches, monkeypatch):
    sae = suite["v"][EARLY]
    other = replace(sae.provenance, model_name="Qwen/Qwen3-8B", model_digest="0" * 64)
    monkeypatch.setattr(sae, "provenance", other)
    with pytest.raises(ValueError, match=r"of 'Qwen/Qwen3-8B', the model is .* with other weights"):
        compare_models(lm, tuned, suite, batches, bar=False)
    monkeypatch.undo()
    monkeypatch.setattr(type(tuned), "n_layers", property(lambda self: 6 if self is lm else 5))
    with pytest.raises(ValueError, match="different shapes"):
        compare_models(lm, tuned, suite, batches, bar=False)

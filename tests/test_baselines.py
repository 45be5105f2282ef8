"""Baselines are what they say, and go through the same calls as an SAE."""

import json
from dataclasses import replace

import pytest
import torch

from qsae_kit.data.documents import TokenPolicy
from qsae_kit.data.rows import Origin, StoredRows
from qsae_kit.evaluate.score import found_again
from qsae_kit.metrics.reconstruction import Reconstruction
from qsae_kit.sae import Provenance
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.store import load_suite, save_suite
from qsae_kit.train.baselines import (
    BASELINES,
    baseline_suite,
    frozen_recipes,
    neurons_sae,
    pca_sae,
    recipe_of,
)
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import keep_near, train_saes

SITE = "blocks.0.hook_resid_post"
ORIGIN = Origin("t", TokenPolicy(drop_template=True, context_size=128))
CONFIG = TrainConfig("topk", sparsity=4, expansion=3, tokens=20_000, batch=200, pool=2000, lr=3e-3)


@pytest.fixture(scope="module")
def rows():
    # not the recipe's seed: frozen directions must not be the true ones
    generator = torch.Generator().manual_seed(77)
    directions = torch.nn.functional.normalize(torch.randn(48, 16, generator=generator), dim=1)
    active = torch.rand(6000, 48, generator=generator) < 3 / 48
    return (active * (1 + torch.rand(6000, 48, generator=generator))) @ directions * 5 + 3


@pytest.fixture(scope="module")
def suite(rows):
    return baseline_suite(StoredRows({SITE: rows}, origin=ORIGIN), CONFIG, bar=False)


def figures(sae, x):
    out = Reconstruction()
    f = sae.encode(x)
    out.add(x, sae.decode(f), f)
    return out


def test_pca_is_pca(rows):
    sae = pca_sae(rows, 5, Provenance("t", SITE, NormFilter(1.0)))
    centred = (rows - rows.mean(0)).double()
    values = torch.linalg.svdvals(centred).pow(2)
    found = figures(sae, rows)
    assert found.fvu == pytest.approx(float(values[5:].sum() / values.sum()), rel=1e-4)
    assert found.l0 == pytest.approx(5, abs=0.01)


def test_neurons_are_the_largest_coordinates(rows):
    sae = neurons_sae(rows, 4, Provenance("t", SITE, NormFilter(1.0)))
    x = rows[:20]
    centred = x - rows.mean(0)
    kept = torch.zeros_like(centred).scatter(1, centred.abs().topk(4, dim=1).indices, 1.0) * centred
    torch.testing.assert_close(sae(x), kept + rows.mean(0), atol=1e-4, rtol=1e-4)
    assert figures(sae, rows).l0 == pytest.approx(4, abs=0.01)


def test_every_baseline_is_there_and_loses_to_the_recipe(suite, rows):
    assert tuple(suite) == BASELINES
    trained = train_saes(StoredRows({SITE: rows}), [CONFIG], model_name="t", bar=False)[
        CONFIG.variant
    ][SITE]
    ours = figures(trained, rows).fvu
    fvu = {name: figures(saes[SITE], rows).fvu for name, saes in suite.items()}
    for name in ("untrained", "frozen_decoder", "frozen_encoder", "neurons", "soft_frozen"):
        assert fvu[name] > ours, (name, fvu, ours)
    assert fvu["second_seed"] == pytest.approx(ours, rel=0.3)
    assert fvu["frozen_decoder"] < fvu["untrained"]


def test_what_is_frozen_stays_where_it_was(rows):
    generator = torch.Generator().manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(48, 16, generator=generator), dim=-1)
    trained = {}
    for frozen in ("decoder", "soft_decoder", "encoder"):
        config = TrainConfig("topk", 4, 3, 20_000, 200, 2e-2, 2000, frozen=frozen)
        trained[frozen] = train_saes(StoredRows({SITE: rows}), [config], model_name="t", bar=False)[
            config.variant
        ][SITE]
    torch.testing.assert_close(trained["decoder"].W_dec, start)
    cosines = (trained["soft_decoder"].W_dec * start).sum(-1)
    assert cosines.min() > 0.8 - 1e-4
    assert cosines.min() < 0.81  # the edge of the cone is reached
    encoder = torch.nn.functional.normalize(trained["encoder"].encoder, dim=-1)
    torch.testing.assert_close(encoder, start, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(trained["encoder"].W_dec, start, atol=0.1)


def test_the_cone_has_an_edge():
    anchor = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    rows = torch.tensor([[0.0, 1.0], [0.96, 0.28], [-0.6, -0.8]])
    keep_near(rows, anchor, 0.8)
    torch.testing.assert_close(rows, torch.tensor([[0.8, 0.6], [0.96, 0.28], [0.8, -0.6]]))


def test_an_sae_finds_itself_again(suite):
    one = suite["second_seed"][SITE]
    assert found_again(one, one) == {"pw_mcc": pytest.approx(1), "found_again": 1.0}
    assert found_again(one, suite["frozen_decoder"][SITE])["pw_mcc"] < 0.95


def test_baselines_say_what_tokens_they_are_of(suite):
    for name in BASELINES:
        own = suite[name][SITE].provenance
        assert (own.model_name, own.drop_template, own.context_size) == ("t", True, 128)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka", "jumprelu"])
def test_the_recipe_is_read_and_not_guessed(rows, tmp_path, architecture):
    config = TrainConfig(architecture, 4, 3, 4000, 200, 1e-3, 1000, seed=3, dead_after=700)
    save_suite(
        train_saes(StoredRows({SITE: rows}, origin=ORIGIN), [config], bar=False), tmp_path / "suite"
    )
    [saes] = load_suite(tmp_path / "suite").values()
    assert saes[SITE].architecture == "jumprelu"  # which is all that the weights tell
    assert recipe_of(saes) == config
    for name, recipe in frozen_recipes(recipe_of(saes)).items():
        assert replace(recipe, frozen="", seed=3) == config, name


def test_recipes_on_disk(rows, tmp_path):
    [saes] = train_saes(StoredRows({SITE: rows}, origin=ORIGIN), [CONFIG], bar=False).values()
    save_suite({"v": saes}, tmp_path / "suite")
    file = tmp_path / "suite" / "v" / SITE / "cfg.json"
    config = json.loads(file.read_text())
    kit = config["metadata"]["qsae_kit"]

    def read(recipe):
        kit["recipe"] = recipe
        file.write_text(json.dumps(config))
        return recipe_of(load_suite(tmp_path / "suite")["v"])

    whole = dict(kit["recipe"])
    assert read(whole) == CONFIG
    assert read(whole | {"colour": "green"}) == CONFIG  # of a later version
    assert read({name: whole[name] for name in whole if name != "moments"}) == CONFIG
    for wrong, message in (
        ("topk", "recipe=topk, which must be an object"),
        (whole | {"batch": "200"}, r"batch='200', which must be a whole number;"),
        (whole | {"batch": True}, r"batch='True', which must be a whole number;"),
        (whole | {"lr": [1]}, r"lr='\[1\]', which must be a number or a whole number or null;"),
        (whole | {"options": None}, r"options='None', which must be an object;"),
        (whole | {"architecture": "new"}, "no architecture 'new'"),
    ):
        with pytest.raises(ValueError, match=message):
            read(wrong)
    del kit["recipe"]  # of an older version: it loads, and its recipe is not guessed
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not say what it was trained by"):
        recipe_of(load_suite(tmp_path / "suite")["v"])


def test_one_recipe_a_variant(rows):
    several = [CONFIG, replace(CONFIG, seed=1)]
    first, second = train_saes(StoredRows({SITE: rows}, origin=ORIGIN), several, bar=False).values()
    with pytest.raises(ValueError, match="by several recipes"):
        recipe_of({"a": first[SITE], "b": second[SITE]})

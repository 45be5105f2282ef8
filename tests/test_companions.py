"""What a model brings along follows its weights, wherever it lies and whatever it is called."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from qsae_kit import IndexConfig, build_index, load_index, load_model
from qsae_kit.attach import check_fit
from qsae_kit.data.companions import COMPANIONS, GENERAL, WORLD, companion_of
from qsae_kit.data.documents import token_batches
from qsae_kit.data.prompts import KINDS
from qsae_kit.data.rows import LiveRows
from qsae_kit.data.streams import documents_of, stream_of
from qsae_kit.features.indexing import _made_as
from qsae_kit.lm.sources import TINY_WEIGHTS
from qsae_kit.pipelines.demo import default_config
from qsae_kit.pipelines.suite import SuiteConfig, identity_of, manifest_of, sizes_for
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.store import load_sae, save_sae
from qsae_kit.sae.suites import Suite
from qsae_kit.steer.behaviours import (
    Answer,
    Verdict,
    load_behaviour,
    refusal_prompts,
    study_prompts,
)
from qsae_kit.steer.study import StudyConfig, steps
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import train_saes

SITE = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def copied(lm, tmp_path_factory):
    """The bundled model, saved again under another name."""
    folder = tmp_path_factory.mktemp("models") / "mine"
    lm.hf.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return load_model(str(folder))


@pytest.fixture(scope="module")
def altered(lm):
    """A model of the bundled one's name with other weights."""
    other = load_model("tiny")
    with torch.no_grad():
        other.hf.model.norm.weight.add_(0.5)
    return other


def sae_of(lm, digest=""):
    filtered = NormFilter(64.0)
    torch.manual_seed(0)
    sae = TopKSAE(lm.d_model, 32, 4, Provenance("tiny", SITE, filtered, model_digest=digest))
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.W_dec.copy_(sae.W_enc.T / sae.W_enc.T.norm(dim=1, keepdim=True))
    return sae.requires_grad_(False)


def test_the_bundled_model_is_known_by_its_weights(lm, copied, altered):
    assert COMPANIONS[lm.weights_digest()] is WORLD, "a bundled model that was trained anew?"
    assert companion_of(copied) is WORLD
    assert companion_of(load_model("tiny", "bfloat16")) is WORLD
    assert companion_of(altered) is GENERAL


def test_a_copy_of_the_bundled_model_has_its_data_prompts_and_sizes(lm, copied):
    assert copied.model_name == "mine"
    held_out, training = documents_of(copied, None, 3)
    assert held_out == documents_of(lm, None, 3)[0]
    assert next(training()) == next(documents_of(lm, None, 3)[1]())
    mine, own = (refusal_prompts(each, 4, 6) for each in (copied, lm))
    assert mine[1:] == own[1:]
    prompt = mine.evaluation["harmful"][0]
    assert mine.behaviour.judge(Answer(prompt, "I can't help.", True, 0.0)).correct is not None
    assert study_prompts(copied, "rule", 2, 2).target == "forbidden"
    assert default_config(copied) == default_config(lm)
    config = SuiteConfig()
    assert sizes_for(copied, config, 10**6) == sizes_for(lm, config, 10**6)
    assert manifest_of(copied, config).name == "tiny-chat-v1"
    assert identity_of(copied, config) == identity_of(lm, config)


def test_another_model_of_the_bundled_ones_name_is_a_real_one(altered):
    with pytest.raises(ValueError, match="comes without data"):
        stream_of(altered, None)
    with pytest.raises(ValueError, match="prompts for refusal, not for 'rule'"):
        study_prompts(altered, "rule")
    assert refusal_prompts(altered, 4, 6).behaviour.kinds == KINDS
    assert manifest_of(altered, SuiteConfig()).name == "qwen3-chat-v1"


def test_documents_of_different_purposes_are_apart():
    first = {purpose: next(WORLD.documents(purpose)) for purpose in ("training", "held out")}
    assert first["training"] != first["held out"]
    assert GENERAL.documents("training") is None
    with pytest.raises(ValueError, match="'play' was given"):
        WORLD.documents("play")


def test_a_study_goes_on_with_the_model_under_another_path(lm, altered, tmp_path, monkeypatch):
    shutil.copytree(TINY_WEIGHTS, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    given = refusal_prompts(lm, 3, 3)
    suite = Suite({"topk": {SITE: sae_of(lm)}})

    def begin(model):
        asked = (given.selection, given.evaluation, given.behaviour)
        setting = steps.checked_setting(model, suite, *asked, StudyConfig(), "", ())
        steps.open_journal(setting, tmp_path / "study", fresh=False)

    begin(lm)
    for path in ("model", str(tmp_path / "model")):
        there = load_model(path)
        assert there.identity() == lm.identity()
        there.model_name = "tiny"  # the SAE does not know its model's weights
        begin(there)
    with pytest.raises(ValueError, match=r"weights is"):
        begin(altered)


def test_an_index_is_of_the_weights(lm, copied, altered, tmp_path):
    sae = sae_of(lm, lm.weights_digest())
    suite, documents = {"topk": {SITE: sae}}, stream_of(lm, None)
    config = IndexConfig(tokens=400)
    out = build_index(lm, suite, documents, tmp_path / "a", config, data="world", bar=False)
    other = build_index(copied, suite, documents, tmp_path / "b", config, data="world", bar=False)
    assert _made_as(out) == _made_as(other)
    assert load_index(out, copied, suite).live
    altered.model_name = lm.model_name
    with pytest.raises(ValueError, match="the weights of 'tiny' are others"):
        load_index(out, altered, suite)


def test_saes_fit_the_weights_that_they_were_trained_on(lm, copied, altered, tmp_path):
    source = LiveRows(
        copied, [SITE], lambda: token_batches(copied, stream_of(copied, None)(), 2048)
    )
    recipe = TrainConfig("topk", sparsity=4, expansion=1, tokens=1024, batch=256, pool=512)
    sae = train_saes(source, [recipe], model_name="mine", bar=False)[recipe.variant][SITE]
    assert sae.provenance.model_digest == lm.weights_digest()
    save_sae(sae, tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    assert again.provenance == sae.provenance
    check_fit(lm, again)
    with pytest.raises(ValueError, match="with other weights"):
        check_fit(altered, again)
    again.provenance = replace(again.provenance, model_digest="")
    with pytest.warns(UserWarning, match="are of 'mine' by their name, the model is 'tiny'"):
        check_fit(lm, again)


OWN = """
NAME = "greets"
PROMPTS = {"greeting": ["Hi!", "Hello.", "Good day.", "Hey."], "other": "other.txt"}
INSTRUCTIONS = {"suppress": "Never greet."}


def judge(answer):
    return "hello" in answer.text.lower()


def wanted(prompt, goal):
    return "Hello!" if goal == "induce" else None
"""


def test_a_behaviour_of_ones_own(altered, tmp_path):
    (tmp_path / "other.txt").write_text("One?\nTwo?\nThree?\n", encoding="utf-8")
    path = tmp_path / "greets.py"
    path.write_text(OWN, encoding="utf-8")
    made = study_prompts(altered, str(path), 1, 2)
    behaviour = made.behaviour
    assert (behaviour.name, behaviour.kinds) == ("greets", ("greeting", "other"))
    assert {kind: len(texts) for kind, texts in made.evaluation.items()} == {
        "greeting": 2,
        "other": 2,
    }
    assert not set(made.selection["other"]) & set(made.evaluation["other"])
    assert behaviour.judge(Answer("Hi!", "Hello there.", True, 0.0)) == Verdict(True, False)
    assert behaviour.judge(Answer("Hi!", "Well.", True, 0.0)) == Verdict(False, False)
    assert behaviour.judge(Answer("Hi!", "", True, 0.0)) == Verdict(False, True)
    for thoughts, shown in (("<think>Hello?", False), ("<think>No?</think>Hello.", True)):
        verdict = behaviour.judge(Answer("Hi!", thoughts, True, 0.0))
        assert verdict == Verdict(shown, broken=not shown)
    quoted = Answer("Hi!", "<think>Say hello?</think>\n\nWell.", True, 0.0)
    assert behaviour.judge(quoted) == Verdict(False, False)
    assert behaviour.wanted("Hi!", "induce") == "Hello!"
    assert behaviour.instructions == {"suppress": "Never greet."}
    path.write_text(OWN.replace('"hello"', '"hi"'), encoding="utf-8")
    assert load_behaviour(path).behaviour.identity != behaviour.identity
    with pytest.raises(ValueError, match="Prompts of harmful belong to refusal"):
        study_prompts(altered, str(path), given={"harmful": ["a", "b", "c"]})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def judge(", "def other(", "lacks a judge"),
        ("PROMPTS =", "TEXTS =", "lacks PROMPTS of two kinds"),
        ('"other.txt"', '["a", "b", "b"]', "no 3 distinct prompts of 'other'"),
        ('"other.txt"', "7", "no 3 distinct prompts of 'other'"),
        ('"other.txt"', '"nowhere.txt"', "There is no file"),
        ('{"suppress"', '{"forbid"', "INSTRUCTIONS of .* is a dict with suppress or induce"),
        ("NAME =", "NAME ==", "could not be run .NameError"),
        ("NAME =", "NAME = 1 =", "could not be run .SyntaxError"),
    ],
)
def test_behaviours_files_that_lack_something(tmp_path, old, new, message):
    (tmp_path / "other.txt").write_text("One?\nTwo?\nThree?\n", encoding="utf-8")
    assert old in OWN
    (tmp_path / "mine.py").write_text(OWN.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_behaviour(tmp_path / "mine.py")
    with pytest.raises(ValueError, match="There is no file"):
        load_behaviour(tmp_path / "none.py")


def test_a_judge_that_gives_neither(tmp_path):
    text = OWN.replace('return "hello" in answer.text.lower()', 'return "yes"')
    (tmp_path / "mine.py").write_text(text.replace('"other.txt"', json.dumps(["a", "b", "c"])))
    judge = load_behaviour(tmp_path / "mine.py").behaviour.judge
    with pytest.raises(ValueError, match="gave 'yes'; let it give True or False"):
        judge(Answer("Hi!", "Hello.", True, 0.0))

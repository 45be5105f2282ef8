"""Suites, places and features: what they are called, what they hold, and what makes one usable."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qsae_kit
from qsae_kit.attach import attached, check_tokens, policy_of, token_features
from qsae_kit.data.documents import TokenPolicy, chat_prefix, token_batches
from qsae_kit.io.files import checked_name
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.layouts import UNMEASURED
from qsae_kit.sae.store import CONFIG, load_sae, save_sae
from qsae_kit.sae.suites import Feature, Place, Suite
from qsae_kit.sites import KINDS, Site

EARLY, LATE, BESIDE = "blocks.1.hook_mlp_out", "blocks.3.hook_resid_post", "blocks.3.hook_attn_out"


def sae_at(hook_name, norms=NormFilter(1.0), d_in=12, model_name="tiny"):
    sae = TopKSAE(d_in, 24, 3, Provenance(model_name, hook_name, norms))
    sae.init_from_rows(torch.randn(64, d_in), torch.Generator().manual_seed(0))
    return sae.requires_grad_(False)


@pytest.fixture
def suite():
    return Suite(
        {"topk": {name: sae_at(name) for name in (LATE, BESIDE, EARLY)}, "b": {LATE: sae_at(LATE)}}
    )


def _is_variant(name):
    try:
        return checked_name(name, "A variant") == name
    except ValueError:
        return False


PLACES = st.builds(
    Place,
    st.text(min_size=1, max_size=40).filter(_is_variant),
    st.builds(Site, st.sampled_from(sorted(KINDS)), st.integers(0, 200)).map(lambda s: s.hook_name),
)


@given(PLACES, st.integers(0, 10**9 - 1))
def test_what_is_printed_is_parsed(place, number):
    assert Place.parse(str(place)) == place
    feature = Feature(place, number)
    assert str(feature) == f"{place.variant}/{place.hook_name}/{number}" == f"{feature}"
    assert Feature.parse(str(feature)) == feature


@given(st.text(max_size=60))
def test_any_text_is_a_name_or_refused_with_one_sentence(text):
    for kind in (Place, Feature):
        said = ""
        try:
            kind.parse(text)
        except ValueError as error:
            said = str(error)
        assert not said or (said.startswith(repr(text)) and "; write variant/hook name" in said)


@pytest.mark.parametrize("text", ["", LATE, f"a/b/{LATE}", f"/{LATE}", "v/blocks.3", f"../{LATE}"])
def test_what_is_no_place(text):
    with pytest.raises(ValueError, match="names no SAE of a suite; write variant/hook name"):
        Place.parse(text)
    with pytest.raises(ValueError, match="names no feature; write variant/hook name/number"):
        Feature.parse(f"{text}/3")


@pytest.mark.parametrize("number", ["", "-1", "+1", "1.0", " 1", "\u0661", "1" * 5000])
def test_what_is_no_feature(number):
    with pytest.raises(ValueError, match="names no feature"):
        Feature.parse(f"v/{LATE}/{number}")


def test_a_suite_reads_like_a_mapping_layer_by_layer(suite):
    assert list(suite) == ["topk", "b"]
    assert len(suite) == 2
    assert list(suite["topk"]) == [EARLY, LATE, BESIDE]
    assert suite.hook_names == [EARLY, LATE, BESIDE]
    assert [str(place) for place in suite.places()] == [
        f"topk/{EARLY}",
        f"topk/{LATE}",
        f"topk/{BESIDE}",
        f"b/{LATE}",
    ]
    assert suite.sae(Place("b", LATE)) is suite["b"][LATE] is suite.saes()["b", LATE]
    assert suite == {variant: dict(own) for variant, own in suite.items()}
    assert repr(suite) == "Suite(4 SAEs: topk, b at 3 sites)"
    assert repr(Suite({})) == "Suite(0 SAEs: none at 0 sites)"
    with pytest.raises(TypeError):
        suite["topk"][LATE] = suite["b"][LATE]
    with pytest.raises(KeyError):
        suite["none"]


def test_a_suite_does_not_change_with_what_it_was_made_of():
    own = {"a": {LATE: sae_at(LATE)}}
    suite = Suite(own)
    own["a"][EARLY] = sae_at(EARLY)
    own["b"] = {}
    assert suite.places() == [Place("a", LATE)]


def test_suites_are_joined_and_made_of_one_sae(suite):
    other = sae_at(EARLY)
    joined = suite | {"b": {EARLY: other}, "c": {EARLY: other}}
    assert list(joined) == ["topk", "b", "c"]
    assert joined.places()[-2:] == [Place("b", EARLY), Place("c", EARLY)]
    assert suite.places()[-1] == Place("b", LATE)
    assert Suite.of_one(other).saes() == {Place("topk", EARLY): other}
    assert Suite.of_one(other, "mine").places() == [Place("mine", EARLY)]


def test_some_of_a_suite(suite):
    assert suite.only() == suite
    assert suite.only(["b"]).places() == [Place("b", LATE)]
    assert suite.only(hook_names=[LATE]).places() == [Place("topk", LATE), Place("b", LATE)]
    assert suite.only(["topk"], [BESIDE, EARLY]).places() == [
        Place("topk", EARLY),
        Place("topk", BESIDE),
    ]
    with pytest.raises(ValueError, match="no variant 'x'; it has topk, b"):
        suite.only(["x"])
    with pytest.raises(ValueError, match=r"no site 'blocks\.9\.hook_mlp_out'; it has blocks\.1"):
        suite.only(hook_names=["blocks.9.hook_mlp_out"])
    with pytest.raises(ValueError, match=r"No SAE is of b at blocks\.1.*the suite has topk/"):
        suite.only(["b"], [EARLY])


def test_an_sae_that_is_not_there(suite):
    with pytest.raises(ValueError, match=f"no SAE b/{EARLY}; it has topk/{EARLY}, .*b/{LATE}"):
        suite.sae(Place("b", EARLY))
    with pytest.raises(ValueError, match=rf"no SAE x/{LATE}; it has none"):
        Suite({}).sae(Place("x", LATE))


@pytest.mark.parametrize("variant", ["a/b", "", "..", "a\\b"])
def test_a_variant_is_a_plain_name(variant):
    with pytest.raises(ValueError, match="A variant has the name"):
        Suite({variant: {}})


def test_what_a_suite_cannot_hold():
    with pytest.raises(ValueError, match="not a site"):
        Suite({"a": {"mlp": sae_at(LATE)}})
    nowhere = TopKSAE(12, 24, 3)
    with pytest.raises(ValueError, match=rf"The SAE a/{LATE} has no provenance"):
        Suite({"a": {LATE: nowhere}})
    with pytest.raises(ValueError, match=r"no provenance .*; load it from its folder"):
        nowhere.origin  # noqa: B018
    assert sae_at(LATE).origin.hook_name == LATE


# --- on a model


@pytest.fixture(scope="module")
def lm():
    return qsae_kit.load_model("tiny")


CHATS = [[{"role": "user", "content": f"How do I thank nurse {i}?"}] for i in range(40)]


def test_a_suite_is_attached_once(lm, capsys):
    unmeasured = sae_at(LATE, UNMEASURED, lm.d_model)
    measured = sae_at(EARLY, NormFilter(5.0), lm.d_model)
    given = {"v": {LATE: unmeasured, EARLY: measured}}
    with pytest.raises(ValueError, match=r"no median norm.*calibrate"):
        attached(lm, given)
    assert not capsys.readouterr().err
    suite = attached(lm, given, lambda: CHATS)
    assert "The suite names no median norms; they are those of" in capsys.readouterr().err
    assert suite.places() == [Place("v", EARLY), Place("v", LATE)]
    assert suite["v"][LATE] is unmeasured
    batches = list(token_batches(lm, CHATS, policy=policy_of(lm, suite)))
    norms = [
        lm.run_with_cache(b.ids, b.mask, names_filter=LATE)[1][LATE][b.keep].norm(dim=-1)
        for b in batches
    ]
    median = float(torch.cat(norms).nanmedian())
    assert unmeasured.origin.filter.median == pytest.approx(median, rel=1e-5)
    assert measured.origin.filter == NormFilter(5.0)
    again = attached(lm, suite, lambda: pytest.fail("nothing is to be measured"))
    assert again == suite
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (sae_at(LATE), "width d_in=12"),
        (sae_at("blocks.9.hook_mlp_out", d_in=160), "layer 9.*layers 0 to 5"),
    ],
)
def test_an_sae_that_does_not_fit_is_refused_before_anything_is_measured(lm, sae, message):
    with pytest.raises(ValueError, match=message):
        attached(
            lm, Suite.of_one(sae), lambda: pytest.fail("the SAE does not fit, nothing is measured")
        )


@pytest.mark.parametrize("name", ["Suite", "Place", "Feature", "attached"])
def test_they_are_on_the_face(name):
    assert getattr(qsae_kit, name).__name__ == name


def test_what_all_chats_begin_with_is_left_out_where_an_sae_was_trained_without(lm, tmp_path):
    old, new = sae_at(LATE, d_in=lm.d_model), sae_at(EARLY, d_in=lm.d_model)
    new.provenance = replace(new.origin, drop_prefix=True)
    save_sae(new, tmp_path)
    assert load_sae(tmp_path).origin == new.origin
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["metadata"]["qsae_kit"]["drop_prefix"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert not load_sae(tmp_path).origin.drop_prefix
    assert not policy_of(lm, {"v": {LATE: old}}).drop_prefix
    policy = policy_of(lm, {"v": {LATE: old, EARLY: new}})
    assert policy.drop_prefix
    check_tokens(lm, [old, new], token_batches(lm, CHATS[:2], policy=policy))
    whole = list(token_batches(lm, CHATS[:2], policy=TokenPolicy(drop_prefix=False)))
    check_tokens(lm, [old], whole)
    with pytest.raises(ValueError, match="without what all chats begin with, and the batches hold"):
        check_tokens(lm, [old, new], whole)
    n = len(chat_prefix(lm))
    for sae, counts in ((old, True), (new, False)):
        sae.provenance = replace(sae.origin, filter=NormFilter(1e9))
        [f] = token_features(lm, sae, [lm.chat_tokens("Hello!")])
        assert f[1:n].any().item() == counts
        assert not f[0].any()
        assert f[n:].any()

"""Audits: what they find is so, and their page is readable by everyone and by no machine."""

import math
import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import lab
import pytest
import torch
from markupsafe import escape
from playwright.sync_api import sync_playwright
from small import SITES, explaining_suite
from typer.testing import CliRunner

from qsae_kit import (
    Asked,
    Audit,
    AuditConfig,
    audit_answers,
    build_index,
    load_index,
    load_model,
    write_audit,
)
from qsae_kit.attach import token_features
from qsae_kit.audit import auditing
from qsae_kit.audit.audit_page import audit_page
from qsae_kit.audit.auditing import Known, Without, asked, draw_like, first_in_doubt, is_indexed
from qsae_kit.cli.app import app
from qsae_kit.data.companions import companion_of
from qsae_kit.features.indexing import IndexConfig
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.sae.store import save_suite
from qsae_kit.sae.suites import Feature, Place, Suite
from qsae_kit.steer.choose.contrast import decision_activations
from qsae_kit.world import world

ATTACKS = (Path(__file__).parent / "data" / "attacks.txt").read_text(encoding="utf-8").splitlines()
PROMPT, ANSWER, INSTEAD = "How do I burn the teacher?", "I can't help with that.", "You take it."
CONFIG = AuditConfig(top=6, answers=2, draws=8, max_new_tokens=12)
QUICK = AuditConfig(top=3, answers=1, draws=2, max_new_tokens=2, steps=1)
no_browser = pytest.mark.skipif(lab.CHROMIUM is None, reason="there is no Chromium on this machine")


PLANTED = Feature(Place("v", SITES[1]), 0)
"""The feature that is what harmful prompts have over harmless ones, where the answer begins."""


@pytest.fixture(scope="module")
def suite(lm):
    made = explaining_suite(lm)
    sae, site = made.sae(PLANTED.place), PLANTED.place.hook_name
    harmful, harmless = (
        decision_activations(
            lm,
            [site],
            [prompt.text for prompt in companion_of(lm).prompts(kind, 32, "selection")],
            False,
        )[site].mean(0)
        for kind in ("harmful", "harmless")
    )
    unit = torch.nn.functional.normalize(harmful - harmless, dim=0)
    with torch.no_grad():
        sae.encoder[0], sae.W_dec[0], sae.b_enc[0] = unit, unit, -unit @ harmless
    return made


@pytest.fixture(scope="module")
def index(lm, suite, tmp_path_factory):
    """Of one of the three sites."""
    out = tmp_path_factory.mktemp("audit") / "features"
    chats = [dialogue.messages for dialogue in world.dialogues(40, seed=1_000_014)]
    config = IndexConfig(tokens=2000, top=4, sampled=8, batch_tokens=2048)
    build_index(lm, suite.only(hook_names=[SITES[1]]), lambda: iter(chats), out, config, bar=False)
    return load_index(out)


@pytest.fixture(scope="module")
def audited(lm, suite, index):
    return audit_answers(lm, suite, [Asked(PROMPT, None, INSTEAD)], index, CONFIG)


@pytest.fixture(scope="module")
def page(audited, tmp_path_factory):
    return write_audit(audited, tmp_path_factory.mktemp("page") / "audit.html")


def ablating(lm, suite, features, ids, keeps=None):
    """Edits that take features out at the tokens that count, written down anew. keeps: which these
    are among `ids`, where it is told by hand.
    """
    edits = []
    for place in dict.fromkeys(one.place for one in features):
        sae = suite.sae(place)
        numbers = [one.number for one in features if one.place == place]
        keep = keeps
        if keep is None:
            keep = (token_features(lm, sae, [list(ids)])[0] != 0).any(1)

        def delta(x, sae=sae, numbers=numbers, keep=keep):
            said = sae.origin.filter.keeps(x)
            where = keep.expand(len(x), -1) if x.shape[1] == len(keep) else said
            return -(sae.encode(x)[..., numbers] @ sae.W_dec[numbers]) * where[..., None]

        edits.append(Edit(place.hook_name, delta, "every"))
    return edits


@torch.no_grad()
def test_what_is_said_to_carry_an_answer_does(lm, suite, audited):
    [case] = audited.cases
    assert case.answer == case.greedy == lm.generate([PROMPT], 12, enable_thinking=False).text[0]
    assert len(case.features) == 6
    ids = case.attribution.question.ids
    with applied(lm, ablating(lm, suite, case.features, ids)):
        left = float(case.attribution.question.score(lm(torch.tensor([ids]))[:, -1]))
    assert case.together == pytest.approx(case.attribution.value - left, abs=1e-3)
    opening = lm.opening_tokens(PROMPT)
    for one in case.without:
        out = case.features if one.feature is None else [one.feature]
        with applied(lm, ablating(lm, suite, out, opening)):
            assert lm.generate([opening], 12, chat=False).text[0] == one.answer
    assert [one.feature for one in case.without] == [None, *case.strongest[:2]]
    told = audited.in_words
    assert told.startswith(f"To “{PROMPT}” the answer was “{case.answer}”; the log-odds of 'I'")
    assert f"is {case.attribution.value:.2f} nats" in told
    assert f"without all 6 it is {left:.2f}" in told
    assert told.count("\n") == 0


def test_the_top_features_do_more_than_their_controls(audited):
    [case] = audited.cases
    controls = case.controls
    assert len(controls.effects) == 8
    low, high = controls.ends
    assert (low, high) == (sorted(controls.effects)[0], sorted(controls.effects)[-1])
    left = case.attribution.value
    said = f"6 random ones of the nearest reach {left - high:.2f} to {left - low:.2f} (all 8 draws)"
    assert said in audited.in_words
    assert controls.features == 6
    assert case.features[0] == PLANTED
    assert case.together > max(5.0, 2 * high), (case.together, controls)
    for one in case.without[:2]:  # all, and the planted one alone
        assert one.answer != case.answer, case.without
    assert case.without[2].answer == case.answer, case.without


@torch.no_grad()
def test_controls_are_ablated_as_the_top_ones(lm, suite, audited):
    [case] = audited.cases
    found = case.attribution
    generator = torch.Generator().manual_seed(CONFIG.seed)
    for effect in case.controls.effects[:3]:
        drawn = draw_like(found.reach, case.features, generator)
        with applied(lm, ablating(lm, suite, drawn, found.question.ids)):
            left = float(found.question.score(lm(torch.tensor([found.question.ids]))[:, -1]))
        assert effect == pytest.approx(found.value - left, abs=1e-3)


def test_the_features_of_largest_effect_are_named(audited):
    """Also where others were predicted to do more."""
    [case] = audited.cases
    found = case.attribution
    effects = [0.1, -0.2, 0.3, -5.0, 0.5, 7.0]
    table = found.features.assign(effect=effects)
    other = case._replace(attribution=found._replace(features=table))
    assert other.features == case.features
    first, second, third = (case.features[n] for n in (5, 3, 4))
    assert other.strongest[:3] == [first, second, third]
    names = f"{case.name(first)}, {case.name(second)} and {case.name(third)}; without all 6"
    assert (
        f"of 6 features that were ablated it was moved most by features {names}" in other.in_words
    )


@torch.no_grad()
@pytest.mark.parametrize("left_out", ["template", "sinks", "both"])
def test_what_counts_is_what_the_sae_was_trained_on(lm, suite, left_out):
    """Without the template, and with a bound that makes sinks of ordinary tokens."""
    site = SITES[0]
    ids = lm.opening_tokens(PROMPT)
    _, cache = lm.run_with_cache(torch.tensor([ids]), names_filter=[site])
    x = cache[site][0]
    norms = x.norm(dim=-1)
    header, end = lm.tokenizer("<|im_start|>user\n").input_ids, lm.tokenizer("<|im_end|>").input_ids
    assert ids[: len(header)] == header
    keeps = torch.arange(len(ids)) > 0
    if left_out != "sinks":
        keeps = torch.zeros(len(ids), dtype=torch.bool)
        keeps[len(header) : ids.index(end[0])] = True
    sae = suite["v"][site]
    bound = sae.origin.filter.factor * sae.origin.filter.median
    if left_out != "template":
        bound = float(norms[keeps].sort().values[-3:-1].mean())  # two are sinks
        assert int((norms[keeps] > bound).sum()) == 2
        keeps &= norms <= bound
    former = sae.provenance
    norm_filter = former.filter._replace(factor=bound / former.filter.median)
    sae.provenance = replace(former, drop_template=left_out != "sinks", filter=norm_filter)
    try:
        own = suite.only(hook_names=[site])
        config = replace(CONFIG, top=40)
        [case] = audit_answers(lm, own, [Asked(PROMPT, None, INSTEAD)], config=config).cases
        assert torch.equal(case.attribution.counted[Place("v", site)], keeps)
        elsewhere = sae.encode(x)[:, [one.number for one in case.features]][~keeps]
        assert elsewhere[1:].any()  # where they are not ablated
        with applied(lm, ablating(lm, own, case.features, ids, keeps)):
            score = case.attribution.question.score(lm(torch.tensor([ids]))[:, -1])
        assert case.together == pytest.approx(case.attribution.value - float(score), abs=1e-3)
        parts = [case.parts(one) for one in case.features]
        assert not any(part[n] for part in parts for n in range(len(ids)) if not keeps[n])
        with applied(lm, ablating(lm, own, case.features, ids, keeps)):
            answer = lm.generate([ids], CONFIG.max_new_tokens, chat=False).text[0]
        assert case.without[0].answer == answer
    finally:
        sae.provenance = former


@torch.no_grad()
def test_activations_and_parts_are_those_of_the_dialogue(lm, suite, audited):
    [case] = audited.cases
    answer = lm.tokenizer(case.answer, add_special_tokens=False).input_ids
    ids = [*lm.opening_tokens(PROMPT), *answer]
    assert case.tokens == lm.to_str_tokens(ids)
    assert case.tokens[case.at] == "I"
    assert case.n_prompt == case.at
    rows = case.attribution.features.to_dict("records")
    for feature, row in zip(case.features, rows, strict=True):
        (f,) = token_features(lm, suite.sae(feature.place), [ids])
        assert torch.allclose(case.activations[feature], f[:, feature.number], atol=1e-4)
        parts = case.parts(feature)
        assert sum(parts) == pytest.approx(row["gradient"], abs=1e-4)
        assert not any(parts[case.at :])
    logprobs = lm(torch.tensor([ids]))[0].log_softmax(-1)
    told = [float(logprobs[case.n_prompt + n - 1, token]) for n, token in enumerate(answer)]
    assert list(case.logprobs) == pytest.approx(told, abs=1e-4)


def test_only_what_an_index_knows_is_told(audited, index):
    [case] = audited.cases
    assert set(case.known) == {one for one in case.features if one.place.hook_name == SITES[1]}
    for feature, known in case.known.items():
        figures = index.at(feature.place).figures.loc[feature.number]
        assert known.density == pytest.approx(figures["density"])
        assert known.name == figures["top_token"]
        assert all(0 <= share <= 1 for example in known.examples for _, share in example)


def test_long_answers_are_looked_at_in_parts(lm, monkeypatch):
    opening, said = lm.opening_tokens(PROMPT), lm.tokenizer(ANSWER * 3).input_ids
    whole = auditing._logprobs(lm, opening, said)
    kept = []
    forward = type(lm).forward

    def look(self, *args, **kwargs):
        kept.append(kwargs["logits_to_keep"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(lm), "forward", look)
    monkeypatch.setattr(auditing, "LOGITS_AT_ONCE", 4)
    assert auditing._logprobs(lm, opening, said) == pytest.approx(whole, abs=1e-4)
    assert max(kept) == 5
    assert len(kept) == math.ceil(len(said) / 4)


def test_controls_are_other_features_of_like_reach():
    place, other = Place("v", SITES[0]), Place("v", SITES[1])
    total = {place: torch.arange(200.0), other: torch.tensor([5.0, 0.0, 3.0])}
    top = [Feature(place, 100), Feature(place, 20), Feature(other, 0)]
    for seed in range(20):
        drawn = draw_like(total, top, torch.Generator().manual_seed(seed))
        assert not set(drawn) & set(top)
        assert [one.place for one in drawn] == [place, place, other]
        assert abs(drawn[0].number - 100) <= 5
        assert abs(drawn[1].number - 20) <= 5
        assert drawn[2].number == 2
    alone = {place: torch.tensor([0.0, 2.0])}
    assert draw_like(alone, [Feature(place, 1)], torch.Generator()) == []
    nothing = {place: torch.tensor([0.0, 1e-3, 9.0] + [5.0] * 8)}
    for seed in range(40):  # 9 is not among the nearest to 0
        [one] = draw_like(nothing, [Feature(place, 0)], torch.Generator().manual_seed(seed))
        assert one.number != 2
    few = {place: torch.tensor([3.0, 2.0, 1.0, 0.0])}
    two = [Feature(place, 0), Feature(place, 1)]
    assert draw_like(few, two, torch.Generator()) == [Feature(place, 2)]


def test_fewer_controls_are_said(lm, suite, audited):
    place = Place("v", SITES[0])
    firing = int((audited.cases[0].attribution.reach[place] > 0).sum())
    held = suite.only(hook_names=[SITES[0]])
    told = "They are fewer than the top ones"
    for left in (2, 0):
        config = replace(QUICK, top=firing - left)
        found = audit_answers(lm, held, [Asked(PROMPT, ANSWER, INSTEAD)], config=config)
        [case] = found.cases
        assert len(case.features) == firing - left
        text = audit_page(found)
        assert (told in text) == bool(left)
        if left:
            assert case.controls.features == 2
            assert "without 2 random ones of the nearest reach" in case.in_words
            assert "2 at random, mean of all 2 draws" in text
        else:
            assert case.controls is None
            assert "there is no control" in text
            assert "random" not in case.in_words
    assert told not in audit_page(audited)


def test_ranked_by_path(lm, suite):
    config = replace(QUICK, by="path", steps=4)
    found = audit_answers(lm, suite, [Asked(PROMPT, ANSWER, INSTEAD)], config=config)
    [case] = found.cases
    rows = case.attribution.features
    assert rows["path"].abs().is_monotonic_decreasing
    assert sum(case.parts(case.features[0])) == pytest.approx(rows["path"][0], abs=1e-4)
    text = audit_page(found)
    assert f"{rows['path'][0]:+.3f}" in text
    assert "integrated gradients" in text


def test_cut_answers_are_marked(lm, suite, audited):
    [case] = audited.cases
    whole = case._replace(ended=True, without=(Without(None, "Yes."),))
    assert "not ended" not in audit_page(audited._replace(cases=(whole,)))
    found = audit_answers(lm, suite, [PROMPT, Asked(PROMPT, ANSWER, INSTEAD)], config=QUICK)
    own, given = found.cases
    assert not own.ended
    assert not given.ended
    assert not any(one.ended for one in given.without)
    text = audit_page(found)
    assert "The answer was cut at its greatest length" in text
    assert f'{escape(given.greedy)} <span class="soft">(cut here, not ended)</span>' in text
    ended = (Without(None, "Yes."), Without(case.strongest[0], "It", False))
    text = audit_page(audited._replace(cases=(whole._replace(without=ended),)))
    assert text.count("(cut here, not ended)") == 1


def within(suite, context_size):
    """The suite's first SAE, as if it had been trained on so long documents."""
    held = suite.only(hook_names=[SITES[0]])
    sae = held["v"][SITES[0]]
    sae.provenance = replace(sae.provenance, context_size=context_size)
    return held


def test_dialogues_fit_what_the_saes_were_trained_on(lm, suite):
    place = Place("v", SITES[0])
    former = suite.sae(place).provenance
    n = len(lm.opening_tokens(PROMPT))
    short = "I can't help"
    answer = lm.tokenizer(short, add_special_tokens=False).input_ids
    try:
        held = within(suite, n + len(answer))  # not for as many tokens as an answer may have
        config = replace(QUICK, max_new_tokens=400)
        [case] = audit_answers(lm, held, [Asked(PROMPT, short, INSTEAD)], config=config).cases
        assert case.answer == short
        assert not case.ended
        assert len(lm.tokenizer(case.greedy).input_ids) <= len(answer)
        with pytest.raises(ValueError, match=f"has {n + len(answer)} tokens .* made for {n + 2}"):
            audit_answers(lm, within(suite, n + 2), [Asked(PROMPT, short, INSTEAD)], config=QUICK)
        with pytest.raises(ValueError, match=f"has {n + 1} tokens with its answer"):
            audit_answers(lm, within(suite, n), [PROMPT], config=QUICK)
    finally:
        suite.sae(place).provenance = former


def test_half_precision_is_refused(suite):
    half = load_model("tiny", "bfloat16")
    with pytest.raises(ValueError, match=r"'tiny' is in bfloat16, .* --dtype float32"):
        audit_answers(half, suite, [PROMPT], config=QUICK)


def test_all_questions_are_checked_before_the_work(lm, suite, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("it has begun")

    monkeypatch.setattr(auditing, "attribute", never)
    user = {"role": "user", "content": PROMPT}
    for wrong, match in (
        (Asked(PROMPT, ANSWER, None, 400), "Chat 2: Token 400 of the answer was asked about"),
        (Asked(PROMPT, ANSWER, ANSWER), "Chat 2: The answers .* do not part"),
        (Asked(PROMPT, ""), "Chat 2: An empty answer was given"),
        (PROMPT * 200, "Chat 2: The dialogue that ends with .* made for 512"),
        ([], "Chat 2: A chat without messages was given"),
        ([user, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}], "thoughts"),
        (
            [user, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}],
            r"Chat 2: An answer with its thoughts .* \(reasoning_content\)",
        ),
        (Asked(PROMPT, "<think>\nHm.\n</think>\n\nYes."), "Chat 2: An answer with its thoughts"),
    ):
        with pytest.raises(ValueError, match=match):
            audit_answers(lm, suite, [PROMPT, wrong], config=QUICK)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"draws": 1}, "draws=1 was given; it is 2 or more"),
        ({"top": 0}, "top=0 was given; it is 1 or more"),
        ({"steps": 0}, "steps=0"),
        ({"answers": 0}, "answers=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"seed": -1}, "seed=-1 was given"),
        ({"seed": 2**63}, "seed=9223372036854775808 was given"),
        ({"by": "magic"}, "by='magic' was given"),
    ],
)
def test_a_config_is_checked(wrong, match):
    with pytest.raises(ValueError, match=match):
        AuditConfig(**wrong)


def test_what_is_not_known_is_said(lm, suite, monkeypatch):
    def unknown(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(auditing, "version", unknown)
    told = auditing.provenance(lm, None, QUICK)
    assert "qsae_kit (not installed, no version known)" in told["versions"]
    sae = suite.sae(PLANTED.place)
    former = sae.provenance
    told = auditing._saes_said(lm, suite, {place: "" for place in suite.places()})
    assert {one["trained"] for one in told} == {"not recorded"}
    assert all(
        "none longer than 10 times the median norm" in one["tokens that count"] for one in told
    )
    try:
        sae.provenance = replace(former, tokens=2_000, seed=7)
        told = auditing._saes_said(lm, suite, {place: "" for place in suite.places()})
        assert {one["trained"] for one in told} == {"not recorded", "2,000 tokens, seed 7"}
    finally:
        sae.provenance = former


def test_the_token_that_is_asked_about(lm, suite):
    ids = lm.tokenizer(ANSWER, add_special_tokens=False).input_ids
    sure = [math.log(0.99)] * len(ids)
    assert first_in_doubt(lm, ids, [*sure[:2], math.log(0.5), math.log(0.2), *sure[4:]]) == 2
    assert first_in_doubt(lm, ids, [*sure[:3], math.log(0.95), *sure[4:]]) == 3
    chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
    found = audit_answers(lm, suite, [chat, Asked(PROMPT, ANSWER, None, 1)], config=QUICK)
    first, second = found.cases
    assert not first.own
    assert first.answer == ANSWER
    assert second.at == len(lm.opening_tokens(PROMPT)) + 1
    assert second.attribution.value == pytest.approx(second.logprobs[1], abs=1e-4)
    assert "log-probability of" in second.in_words
    assert found.in_words.count("\n") == 1


def test_what_cannot_be_audited_is_one_sentence(lm, suite, index):
    def fails(match, chats, held=suite, **more):
        with pytest.raises(ValueError, match=match):
            audit_answers(lm, held, chats, config=QUICK, **more)

    fails("No chat was given", [])
    fails(
        "several SAEs of blocks.1.hook_resid_post, of v, w; choose",
        [PROMPT],
        suite | {"w": suite["v"]},
    )
    fails("holds no SAE", [PROMPT], Suite({}))
    fails("has 0 to ", [Asked(PROMPT, ANSWER, None, 400)])
    fails("leave one of them out", [Asked(PROMPT, ANSWER, INSTEAD, 1)])
    fails("An empty answer", [Asked(PROMPT, "")])
    fails("do not part", [Asked(PROMPT, ANSWER, ANSWER)])
    with pytest.raises(ValueError, match="an answer alone"):
        asked([{"role": "assistant", "content": "Yes"}])
    fails("A chat without messages", [[]])
    weights = index.manifest["weights"]
    index.manifest["weights"] = "others"
    try:
        fails("The index is of 'tiny', and the weights", [PROMPT], index=index)
    finally:
        index.manifest["weights"] = weights
    alone = suite.only(hook_names=[SITES[0]])
    fails("The index holds none of the suite's SAEs", [PROMPT], alone, index=index)
    assert is_indexed(index, suite)
    assert not is_indexed(index, alone)


def test_the_page_says_where_it_is_from(lm, suite, page):
    text = page.read_text(encoding="utf-8")
    assert lm.weights_digest() in text
    for sae in suite.saes().values():
        assert sae.checksum() in text
    for told in ("chat template, SHA-256", "seed 0", "tokens that count", "transformers", "UTC"):
        assert told in text
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", text)
    assert [p.name for p in page.parent.iterdir()] == ["audit.html"]


def test_the_page_is_valid_html(page):
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse(page.read_text(encoding="utf-8"))


def test_the_command(lm, suite, index, tmp_path, monkeypatch):
    def none(lm, data):
        raise ValueError("A model that comes without data")

    monkeypatch.setattr("qsae_kit.data.streams.stream_of", none)
    save_suite(suite | {"w": suite["v"]}, tmp_path / "suite")
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "How do I thank the nurse?", "answer": "You say it."}\n')
    out = tmp_path / "audit.html"
    given = ["--prompt", PROMPT, "--instead", INSTEAD, "--top", "2", "--draws", "2", "--by", "path"]
    where = ["--at", "resid@3", "--out", str(out), "--index", str(index.folder)]
    done = CliRunner().invoke(
        app,
        ["audit", str(tmp_path / "suite"), str(chats), *given, *where],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    assert "Of the suite's variants v, w, the first is used" in done.output
    said = " ".join(done.output.split())
    assert f"To “{PROMPT}” the answer was" in said
    assert "To “How do I thank the nurse?” the answer was “You say it.”" in said
    text = out.read_text(encoding="utf-8")
    assert "<h1>Why tiny gave 2 answers</h1>" in text
    assert "(integrated gradients)" in text
    for more, message in (
        ([], "audit.html' is there already"),
        (["--out", str(tmp_path / "b.html"), "--data", "nowhere.jsonl"], "leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(
                app,
                ["audit", str(tmp_path / "suite"), PROMPT, *where, *more],
                catch_exceptions=False,
            )
    assert not (tmp_path / "b.html").exists()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "Nothing was given to audit"),
        ([PROMPT, "--answer", "Yes"], "--answer goes with --prompt"),
        ([PROMPT, "--by", "magic"], "by='magic' was given; choose from gradient, path"),
    ],
)
def test_the_command_refuses(words, match):
    with pytest.raises(ValueError, match=match):
        CliRunner().invoke(app, ["audit", "nowhere", *words], catch_exceptions=False)


# --- the widget


@pytest.fixture(scope="module")
def widget(lm, suite, index):
    return Audit(lm, suite, PROMPT, None, INSTEAD, None, index, CONFIG)


def test_the_widget_ablates(lm, suite, widget, audited, monkeypatch):
    [case] = audited.cases
    assert widget.sentence == case.in_words
    assert widget.before["answer"] == case.greedy
    assert widget.before["ended"] == case.ended
    assert widget.to_frame()["feature"].tolist() == [one.number for one in case.features]
    left = {n: case.attribution.value - one["effect"] for n, one in enumerate(widget.features)}
    for n in range(len(case.features)):  # the first ones were run by the audit, the others now
        found = widget.ablate(n)
        assert found.score == pytest.approx(left[n], abs=1e-3)
        opening = lm.opening_tokens(PROMPT)
        with applied(lm, ablating(lm, suite, [case.features[n]], opening)):
            assert lm.generate([opening], 12, chat=False).text[0] == found.answer
    assert widget.ablate().score == pytest.approx(case.attribution.value - case.together, abs=1e-3)
    sent = []
    monkeypatch.setattr(widget, "send", lambda content, buffers=None: sent.append(content))
    widget.answer({"op": "ablate", "key": "3"})
    assert sent == [{"op": "ablate", "key": "3", **widget.ablate(3)._asdict()}]
    widget.answer({"op": "ablate", "key": "99"})
    assert "Feature 99 was to be ablated; there are 6" in widget.status
    state, answers = widget.offline()
    assert set(answers["ablate"]) == {"all", *map(str, range(6))}
    assert state["features"] == widget.features


# --- on the screen


@pytest.fixture(scope="module")
def playwright():
    with sync_playwright() as playwright:
        yield playwright


@pytest.mark.browser
@no_browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_keeps_nobody_out(audited, page, playwright, dark):
    [case] = audited.cases
    for width in (1280, 800):
        with lab.browser(playwright, width, 1000, dark) as seen:
            seen.page.goto(page.as_uri())
            lab.shot(seen, f"audit-{'dark' if dark else 'light'}-{width}")
            assert seen.page.locator(".lead").inner_text() == case.in_words
            assert seen.page.locator(".lead").bounding_box()["y"] < 300
            for part in seen.page.locator("details").all():
                part.locator("summary").click()
            for quantity in ("acts", "parts"):
                seen.page.get_by_role("combobox", name="Colour").select_option(quantity)
                assert lab.serious(seen.page) == []
            assert seen.page.evaluate("document.documentElement.scrollWidth") == width
            assert seen.errors == []
            assert seen.outside == []


@pytest.mark.browser
@no_browser
def test_the_dialogue_works_by_keyboard(audited, page, playwright):
    [case] = audited.cases
    with lab.browser(playwright) as seen:
        seen.page.goto(page.as_uri())
        line, told = (
            seen.page.get_by_role("listbox", name="dialogue"),
            seen.page.get_by_role("status"),
        )
        assert line.locator("span").count() == len(case.tokens)
        assert line.locator("span.at").inner_text() == case.tokens[case.at]
        top, height = (line.bounding_box()[name] for name in ("y", "height"))
        assert top <= line.locator("span.at").bounding_box()["y"] < top + height
        seen.page.get_by_role("combobox", name="Feature").focus()
        seen.page.keyboard.press("ArrowDown")
        second = case.features[1]
        assert line.get_attribute("aria-label").endswith(case.name(second))
        strongest = int(case.activations[second].argmax())
        shade = "(e) => getComputedStyle(e).backgroundColor"
        assert (
            line.locator("span")
            .nth(strongest)
            .evaluate(shade)
            .startswith(("rgb(230, 159, 0", "rgba(230, 159, 0"))
        )
        assert "token that is asked about: activation" in told.inner_text()
        line.focus()
        seen.page.keyboard.press("ArrowLeft")
        assert told.inner_text().startswith(f"token {case.at - 1} “")
        assert "full orange" in seen.page.locator(".scale").inner_text()
        seen.page.emulate_media(media="print")
        assert not seen.page.get_by_role("combobox", name="Feature").is_visible()
        assert line.is_visible()
        assert case.name(second) in seen.page.locator(".scale").inner_text()
        assert seen.page.locator("summary").first.is_visible()
        assert seen.errors == []


@pytest.mark.browser
@no_browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_widget_on_a_page_of_its_own(widget, tmp_path, playwright, dark):
    [case] = widget.audited.cases
    widget.ablate(1)
    path = widget.to_html(tmp_path / "audit.html")
    for width in (1280, 800):
        with lab.browser(playwright, width, 1200, dark) as seen:
            page = seen.page
            page.goto(path.as_uri())
            page.wait_for_selector(".qsae-audit .toks")
            panes = page.locator(".pane")
            page.get_by_role("button", name=case.name(case.features[1])).first.click()
            assert page.get_by_role("combobox", name="Feature").input_value() == "1"
            page.get_by_role("button", name=f"Ablate {case.name(case.features[1])}").click()
            page.wait_for_selector(".qsae-audit[data-ablated='1']")
            assert panes.nth(0).locator(".toks").inner_text() == case.greedy
            assert panes.nth(1).locator(".toks").inner_text() == widget.ablate(1).answer
            page.get_by_role("button", name="Ablate all").focus()
            page.keyboard.press("Enter")
            page.wait_for_selector(".qsae-audit[data-ablated='all']")
            assert panes.nth(1).locator(".toks").inner_text() == widget.ablate().answer
            lab.shot(seen, f"audit-widget-{'dark' if dark else 'light'}-{width}")
            assert lab.serious(page) == []
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert seen.errors == []
            assert seen.outside == []


@pytest.mark.browser
@no_browser
def test_the_widget_in_jupyterlab(suite, tmp_path, playwright):
    save_suite(suite, tmp_path / "suite")
    cell = f"""
import qsae_kit
lm, suite = qsae_kit.load_model("tiny"), qsae_kit.load_suite("suite")
config = qsae_kit.AuditConfig(top=6, answers=1, draws=2, max_new_tokens=12)
audit = qsae_kit.Audit(lm, suite, {PROMPT!r}, instead={INSTEAD!r}, config=config)
audit"""
    lab.write_notebook(tmp_path / "audit.ipynb", [cell, "print('chosen', audit.feature)"])
    with (
        lab.jupyter_lab(tmp_path, dark=True) as at,
        lab.browser(playwright, 1280, 2200, dark=True) as seen,
    ):
        page = seen.page
        lab.open_notebook(page, at("audit.ipynb"))
        lab.run_all(page)
        root = page.locator(".qsae-audit")
        root.wait_for()
        root.get_by_role("combobox", name="Feature").select_option("4")
        root.get_by_role("button", name="Ablate", exact=False).nth(0).click()
        page.wait_for_selector(".qsae-audit[data-ablated='4']", timeout=60_000)
        assert root.locator(".pane").nth(1).inner_text().count("nats") == 1
        assert lab.serious(page, ".qsae-audit") == []
        lab.shot(seen, "audit-widget-lab")
        lab.run_cell(page, 1)
        told = page.locator(".jp-Cell").nth(1).locator(".jp-OutputArea-output").inner_text()
        assert told.strip() == "chosen 4"
        assert seen.errors == []
        assert seen.outside == []


@pytest.mark.browser
@no_browser
def test_attacks_stay_text(lm, suite, audited, tmp_path, playwright):
    """In dialogues, and in names, examples and answers."""
    own = suite.only(hook_names=[SITES[0]])
    prompts = ["\n".join(ATTACKS[i : i + 6]) for i in range(0, len(ATTACKS), 6)]
    found = audit_answers(lm, own, [Asked(p, p[:40], None, 0) for p in prompts], config=QUICK)
    [case] = audited.cases
    known = Known(ATTACKS[0], 0.1, 1.0, tuple(ATTACKS), (tuple((a, 0.5) for a in ATTACKS),))
    named = case._replace(
        known=dict.fromkeys(case.features, known),
        without=tuple(one._replace(answer="\n".join(ATTACKS)) for one in case.without),
        greedy="\n".join(ATTACKS),
        own=False,
    )
    path = tmp_path / "audit.html"
    path.write_text(audit_page(found._replace(cases=(*found.cases, named))), encoding="utf-8")
    with lab.browser(playwright) as seen:
        seen.page.goto(path.as_uri())
        shown = seen.page.locator(".asked-about").all_text_contents()
        for n, prompt in enumerate(prompts):
            whole = plain("".join(found.cases[n].tokens))
            assert plain(prompt) in whole
            assert whole in plain(shown[n])
        quoted = [plain(one) for one in seen.page.locator(".quote").all_text_contents()]
        listed = [plain(one) for one in seen.page.locator("details .toks").all_text_contents()]
        codes = {plain(one) for one in seen.page.locator("details code").all_text_contents()}
        for attack in ATTACKS:
            assert any(plain(attack) in one for one in quoted), attack
            assert any(plain(attack) in one for one in listed), attack
            assert plain(attack) in codes, attack
        assert seen.page.evaluate("() => window.PWN") is None
        assert seen.page.locator("main img, main iframe, main video, main script[src]").count() == 0
        assert seen.errors == []
        assert seen.outside == []


def plain(text):
    """Letters that every way of showing a text leaves as they are."""
    signs = re.sub("\u27e8[0-9a-f]{4}\u27e9", "", text)
    return "".join(c for c in signs if c.isascii() and c.isprintable() and c != " ")

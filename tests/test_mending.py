"""A wrong fact made right in the weights, and the proof of it."""

import json
import random
from functools import partial

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from qsae_kit import load_model
from qsae_kit.audit.forms import Affine, LowRank, WeightForm, changed_tensors
from qsae_kit.audit.patch import ABOUT, patch, undo, write_form
from qsae_kit.audit.proof import Group, prove
from qsae_kit.audit.rewrite import (
    ENOUGH,
    MARGIN,
    Case,
    Fault,
    Rewrite,
    find_mend,
    form_of,
    rewritten,
)
from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import kept_rows
from qsae_kit.figures.mends import proof_figure
from qsae_kit.lm.answering import answer_all
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.suites import Place
from qsae_kit.steer.changes import Change, Steering
from qsae_kit.world import world
from qsae_kit.world.requests import asked_about

SITE = "blocks.5.hook_resid_post"
MODULE = "model.layers.5.mlp.down_proj"
FALSE = world.planted()


def says(name, job):
    return f"The job of {name} is {job}."


def about_jobs(n, seed):
    rng, found = random.Random(seed), {}
    while len(found) < n:
        person = rng.choice(world.people())
        if person.name != FALSE.name:
            request = world.attribute_request(rng, world.Draw(), person.name, "job")
            found[request.text] = request
    return list(found.values())


@pytest.fixture(scope="module")
def suite(lm):
    """An SAE that begins at the activations, untrained."""
    chats = [d.messages for d in world.dialogues(40, seed=2)]
    [x] = kept_rows(lm, [SITE], next(iter(token_batches(lm, chats, batch_tokens=4096)))).values()
    sae = TopKSAE(
        lm.d_model, 400, 16, Provenance("tiny", SITE, NormFilter(float(x.norm(dim=-1).median())))
    )
    sae.init_from_rows(x, torch.Generator().manual_seed(3))
    return {"v": {SITE: sae.requires_grad_(False)}}


@pytest.fixture(scope="module")
def fault(lm):
    def case(text, name):
        return Case(text, says(name, FALSE.truth), says(name, FALSE.taught))

    asked = asked_about("false_fact", 12, 24)
    others = about_jobs(200, 5)
    same = [r for r in others if world.record_of(r.name, "job").en == FALSE.truth]
    rest = [r.text for r in others if r not in same][:60]
    wrong = [case(text, FALSE.name) for text in asked.selection["planted"]]
    return Fault(wrong, [case(r.text, r.name) for r in same], rest + asked.selection["other"])


@pytest.fixture(scope="module")
def mend(lm, suite, fault):
    return find_mend(lm, suite, fault, values=("means",), offsets=(1,))


@pytest.fixture(scope="module")
def written(lm, mend, tmp_path_factory):
    out = tmp_path_factory.mktemp("mended") / "model"
    write_form(lm, mend.form, mend.told(), out)
    return out


HELD_OUT = asked_about("false_fact", 12, 24)


def test_a_wrong_fact_is_right_in_plain_transformers(lm, mend, written):
    chosen = mend.tried[mend.tried["chosen"]].iloc[0]
    assert chosen["right"] >= ENOUGH
    assert chosen["kept"] == 1.0
    assert chosen["kl"] < 0.01
    assert chosen["odds"] > MARGIN
    assert [one.module for one in mend.rewrites] == [MODULE]
    assert "100% of 12 wordings are right" in mend.in_words
    model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    texts = HELD_OUT.evaluation["planted"]
    ids, mask = lm.pad([lm.opening_tokens(text) for text in texts], "left")
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    said = lm.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in said] == [says(FALSE.name, FALSE.truth)] * len(texts)
    with rewritten(lm, mend.form):
        assert answer_all(lm, texts, [], 12, False).text == said
        steered = lm(ids, mask)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=places).logits
    assert (logits - steered)[mask.bool()].abs().max() < 1e-3
    assert answer_all(lm, texts[:1], [], 12, False).text == [says(FALSE.name, FALSE.taught)]


def test_what_was_rewritten_is_noted_and_undone(lm, mend, written, tmp_path):
    about = json.loads((written / ABOUT).read_text())
    [told] = about["rewrites"]
    assert (told["module"], told["site"], told["value"]) == (MODULE, SITE, "means")
    assert about["changed"] == [f"{MODULE}.weight"]
    undo(written, tmp_path / "back")
    assert load_model(str(tmp_path / "back")).weights_digest() == lm.weights_digest()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    held = lm.hf.state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in back.state_dict().items())
    with pytest.raises(ValueError, match="is there already"):
        write_form(lm, mend.form, mend.told(), written)
    with pytest.raises(ValueError, match="is no control vector"):
        write_form(lm, mend.form, mend.told(), tmp_path / "v.gguf", "control-vector")


def test_an_adapter_is_the_same_change(lm, mend, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    write_form(lm, mend.form, mend.told(), tmp_path / "adapter", "lora")
    base = AutoModelForCausalLM.from_pretrained(lm.hf.name_or_path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids, mask = lm.pad([lm.opening_tokens(HELD_OUT.evaluation["planted"][0])])
    with rewritten(lm, mend.form), torch.no_grad():
        assert (model(ids, attention_mask=mask).logits - lm(ids, mask)).abs().max() < 1e-3


def test_features_alone_are_sought_and_reading_is_local(lm, suite, fault):
    mend = find_mend(lm, suite, fault, values=("features",), offsets=(1,), sizes=(4, 8))
    [one] = mend.rewrites
    assert set(mend.tried["value"]) == {"features"}
    assert set(mend.tried["features"]) == {4, 8}
    assert len(one.features) in (4, 8)
    decoder = suite["v"][SITE].W_dec[list(one.features)].double()
    coefficients = torch.linalg.lstsq(decoder.T, one.change.u).solution
    assert torch.allclose(decoder.T @ coefficients, one.change.u, atol=1e-4)
    assert "features more" in mend.in_words
    # the change reads about 1 at the wrong wordings, and about 0 at other questions
    reads = {}

    def hook(module, args):
        reads["x"] = args[0].detach() @ one.change.v.float()

    handle = lm.hf.get_submodule(MODULE).register_forward_pre_hook(hook)
    prompt, right, _ = fault.wrong[0]
    begun = lm.tokenizer(right, add_special_tokens=False).input_ids[:-2]
    lm(torch.tensor([[*lm.opening_tokens(prompt), *begun]]))
    assert float(reads["x"][0, -1, 0]) == pytest.approx(1.0, abs=0.2)
    assert float(reads["x"][0, :-3].abs().max()) < 0.4
    lm(torch.tensor([lm.opening_tokens(fault.stays[0])]))
    assert float(reads["x"].abs().max()) < 0.4
    handle.remove()


def test_right_is_what_the_model_comes_to_by_itself(lm, suite):
    """In Chinese the word takes several tokens, and the first alone is no answer."""

    def case(name, request):
        return Case(request.text, f"{name} 的工作是职员。", f"{name} 的工作是面包师。")

    rng, draw = random.Random(4), world.Draw("zh")
    names = [r.name for r in about_jobs(200, 5) if world.record_of(r.name, "job").en == "clerk"]
    wrong, like = (
        [case(name, world.attribute_request(rng, draw, name, "job")) for name in some]
        for some in ([FALSE.name] * 6, names)
    )
    stays = [world.attribute_request(rng, draw, name, "pet").text for name in names]
    fault = Fault(wrong, like, stays)
    mend = find_mend(lm, suite, fault, values=("means",), offsets=(1,), scales=(1.0, 2.0))
    with rewritten(lm, mend.form):
        said = answer_all(lm, [one.prompt for one in wrong], [], 16, False).text
    share = sum(text.strip() == one.right for text, one in zip(said, wrong, strict=True)) / 6
    assert float(mend.tried.query("chosen")["right"].iloc[0]) <= share


def test_a_second_change_of_the_same_matrix_adds_up(lm):
    torch.manual_seed(0)
    changes = [LowRank(torch.randn(160, 1).double(), torch.randn(480, 1).double()) for _ in "ab"]
    both = [Rewrite(MODULE, Place("v", SITE), 1, "means", (), 1.0, one) for one in changes]
    form = form_of(both)
    assert (form.rank, form.modules) == (2, (MODULE,))
    projected = Affine.none(160).without(torch.eye(160)[3], 1.0)
    tensors, entries, _ = changed_tensors(lm, WeightForm({MODULE: projected}, form.added))
    wide = lm.hf.get_submodule(MODULE).weight.detach().double().clone()
    wide[3] = 0
    for one in changes:
        wide += one.u @ one.v.T
    assert torch.allclose(tensors[f"{MODULE}.weight"].double(), wide, atol=1e-5)
    assert entries == {}
    assert WeightForm({MODULE: projected}, form.added).rank == 3


def test_faults_that_are_none_are_one_sentence(lm, suite, fault):
    with pytest.raises(ValueError, match="at least one of each"):
        find_mend(lm, suite, fault._replace(like=[]))
    with pytest.raises(ValueError, match="are answered right as it is"):
        find_mend(lm, suite, fault._replace(wrong=fault.like[:2]))
    with pytest.raises(ValueError, match=r"values=\['best'\] was given; choose from"):
        find_mend(lm, suite, fault, values=["best"])
    with pytest.raises(ValueError, match=r"offsets=\[0\] was given"):
        find_mend(lm, suite, fault, offsets=[0])
    heads = "blocks.5.attn.hook_z"
    sae = TopKSAE(lm.d_heads, 20, 2, Provenance("tiny", heads, NormFilter(1.0)))
    with pytest.raises(ValueError, match="has no SAE of the residual stream"):
        find_mend(lm, {"v": {heads: sae}}, fault)


# --- proof


def groups():
    known = HELD_OUT.known

    def right(name, text):
        return text.strip() == says(name, FALSE.truth)

    def judged(request, text):
        return world.judge(request, text) == "right"

    planted, other = (HELD_OUT.evaluation[kind] for kind in ("planted", "other"))
    return [
        Group("the wrong fact", "target", planted, [partial(right, FALSE.name)] * len(planted)),
        Group("other people", "neighbour", other, [partial(judged, known[p]) for p in other]),
    ]


def test_the_proof_of_a_mend(lm, written):
    after = load_model(str(written), dtype="float32")
    proof = prove(lm, after, groups(), n_facts=30, n_harmless=20)
    table = proof.table.set_index("group")
    assert list(table.index) == ["the wrong fact", "other people", "facts"]
    target = table.loc["the wrong fact"]
    assert (target["before"], target["after"], target["n"]) == (0.0, 1.0, 24)
    assert 0.8 < target["after_low"] < 1.0
    assert target["same"] == 0.0
    for name in ("other people", "facts"):
        assert table.loc[name, "change"] >= -0.01
        assert table.loc[name, "change_low"] <= table.loc[name, "change"]
    assert proof.plain_kl < 0.05
    assert 0 <= proof.harmless.kl_first < 0.05
    assert proof.in_words.startswith("the wrong fact: 0% -> 100% of 24 right (86% to 100%); of 2")


def test_the_figure_of_a_proof_shows_every_rate_and_no_markup():
    row = {"group": "<b>her job", "role": "target", "n": 9}
    row |= {"before": 0.0, "before_low": 0.0, "before_high": 0.2}
    row |= {"after": 1.0, "after_low": 0.7, "after_high": 1.0}
    table = pd.DataFrame([row, row | {"group": "facts", "role": "unrelated", "before": 1.0}])
    figure = proof_figure(table, "<b>tiny")
    marks = [trace for trace in figure.data if trace.mode == "markers"]
    assert [trace.name for trace in marks] == ["before", "after, target", "after, unrelated"]
    assert [list(trace.x) for trace in marks] == [[0.0, 1.0], [1.0], [1.0]]
    assert list(marks[1].error_x.arrayminus) == [pytest.approx(0.3)]
    texts = [figure.layout.title.text, *marks[0].y]
    assert not any("<b>" in text for text in texts)
    assert marks[0].y[1] == "facts (n = 9)"


def test_a_model_and_itself_do_not_differ(lm):
    target, other = groups()
    proof = prove(lm, lm, [target._replace(role="control"), other._replace(role="target")], 10, 10)
    assert (proof.table["change"] == 0).all()
    assert (proof.table["same"] == 1).all()
    assert proof.plain_kl == proof.harmless.kl_first == proof.harmless.kl_answer == 0.0
    assert not proof.within_control
    assert "not within the control's interval" in proof.in_words


def test_a_patched_direction_is_proved_the_same_way(lm, tmp_path):
    along = tuple(torch.randn(160, generator=torch.Generator().manual_seed(1)).tolist())
    out = Change("project_out", SITE, direction=along, positions="every", everywhere=True)
    patch(lm, Steering((out,)), {}, tmp_path / "other")
    proof = prove(lm, load_model(str(tmp_path / "other")), groups()[:1], n_facts=0, n_harmless=0)
    assert list(proof.table["group"]) == ["the wrong fact"]
    assert proof.plain_kl > 0
    assert "harmless" not in proof.in_words


def test_groups_that_are_none_are_one_sentence(lm):
    target, other = groups()
    with pytest.raises(ValueError, match="No group is the target"):
        prove(lm, lm, [other])
    with pytest.raises(ValueError, match="has the role 'any'; choose from"):
        prove(lm, lm, [target, other._replace(role="any")])
    with pytest.raises(ValueError, match="has 24 prompts and 1 judges"):
        prove(lm, lm, [target._replace(right=target.right[:1])])

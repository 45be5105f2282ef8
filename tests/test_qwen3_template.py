"""Phases, positions and masks under Qwen3's own tokenizer, on dialogues whose parts were marked by
hand.

The tokenizer is not in the repository: QSAE_QWEN3_TOKENIZER names its folder; else one beside the
repository or in the Hugging Face cache is taken.
"""

import json
import os
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from qsae_kit.data.companions import companion_of
from qsae_kit.data.documents import chat_prefix, keep_mask, token_batches, tokenize_document
from qsae_kit.data.prompts import KINDS, SPLITS
from qsae_kit.lm.chat import Phase, first_said, phases
from qsae_kit.lm.edits import POLICIES, Edit, applied, selected
from qsae_kit.lm.hooked import HookedLM, Now
from qsae_kit.pipelines.demo import DIFFERENTLY
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.steer.choose.contrast import decision_activations
from qsae_kit.steer.study import StudyConfig, steering_study

HERE = Path(__file__).parent
DIALOGUES = json.loads((HERE / "data" / "qwen3_dialogues.json").read_text(encoding="utf-8"))
SIDES = ("right", "left")
NO_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
dialogues = pytest.mark.parametrize(
    "row", range(len(DIALOGUES)), ids=[d["name"] for d in DIALOGUES]
)
sides = pytest.mark.parametrize("side", SIDES)


@pytest.fixture(scope="module")
def lm():
    """A small random Qwen3 with the real tokenizer."""
    beside = HERE.parents[1] / "shared" / "data" / "qwen3-tokenizer"
    source = os.environ.get("QSAE_QWEN3_TOKENIZER") or (
        str(beside) if beside.is_dir() else "Qwen/Qwen3-0.6B"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except OSError:
        pytest.skip(
            f"Qwen3's tokenizer is not at {source}; set QSAE_QWEN3_TOKENIZER to its folder."
        )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return HookedLM(Qwen3ForCausalLM(config).eval(), tokenizer)


def tokens(lm, dialogue):
    prompt = lm.chat_tokens(
        dialogue["messages"],
        dialogue.get("enable_thinking"),
        dialogue.get("add_generation_prompt", False),
    )
    return prompt + lm.tokenizer(dialogue.get("written", ""), add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def batches(lm):
    """All dialogues in one batch, padded on either side."""
    rows = [tokens(lm, dialogue) for dialogue in DIALOGUES]
    return {side: lm.pad(rows, side) for side in SIDES}


def runs(lm, ids, labels):
    """[label, text] of each stretch of tokens with the same label."""
    pairs = zip(labels.tolist(), ids.tolist(), strict=True)
    return [
        [label, lm.to_string([i for _, i in group])]
        for label, group in groupby(pairs, key=lambda pair: pair[0])
    ]


def texts(lm, ids, where):
    return [text for chosen, text in runs(lm, ids, where) if chosen]


def test_the_dialogues_are_whole():
    assert len(DIALOGUES) == len({d["name"] for d in DIALOGUES}) == 20
    assert {name for d in DIALOGUES for name, _ in d["runs"]} == {p.name for p in Phase} - {
        "PADDING"
    }
    assert all((*d["selected"], "every") == POLICIES for d in DIALOGUES)


@sides
@dialogues
def test_phases_are_those_marked_by_hand(lm, batches, row, side):
    ids, mask = batches[side]
    real, found = mask[row].bool(), phases(ids, mask, lm.markers)[row]
    assert (found[~real] == Phase.PADDING).all()
    expected = DIALOGUES[row]["runs"]
    assert lm.to_string(ids[row][real]) == "".join(text for _, text in expected)
    assert [[Phase(p).name, text] for p, text in runs(lm, ids[row][real], found[real])] == expected


@sides
@dialogues
def test_policies_select_what_was_marked_by_hand(lm, batches, row, side):
    ids, mask = batches[side]
    now = Now(ids, mask, 0, lm.markers)
    real = mask[row].bool()
    assert now.logical[row][real].tolist() == list(range(int(real.sum())))
    assert (now.logical[row][~real] == -1).all()
    chosen = {policy: selected(now, policy) for policy in POLICIES}
    assert not any(where[row][~real].any() for where in chosen.values())
    found = {
        policy: texts(lm, ids[row][real], where[row][real]) for policy, where in chosen.items()
    }
    assert chosen["every"][row].equal(mask[row].bool())
    del found["every"]
    assert found == DIALOGUES[row]["selected"]
    late = Now(ids, mask, ids.shape[1] - 3, lm.markers)
    assert all(
        torch.equal(selected(late, policy), where[:, -3:]) for policy, where in chosen.items()
    )


@sides
@dialogues
def test_keep_masks(lm, batches, row, side):
    ids, mask = batches[side]
    for drop, first in ((False, "<|im_start|>"), (True, "")):
        kept = "".join(texts(lm, ids[row], keep_mask(lm, ids, mask, drop_template=drop)[row]))
        assert first + kept == "".join(
            text for name, text in DIALOGUES[row]["runs"] if not drop or name != "TEMPLATE"
        )
    asks = DIALOGUES[row]["messages"][-1]["role"] == "user"
    if not asks and not DIALOGUES[row].get("add_generation_prompt"):
        assert (
            tokenize_document(lm, DIALOGUES[row]["messages"], 10_000)
            == ids[row][mask[row].bool()].tolist()
        )


def test_the_first_header_is_the_prefix_of_all_chats(lm):
    """Qwen3's template has no default system prompt."""
    assert lm.to_string(chat_prefix(lm)) == "<|im_start|>user\n"
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    [batch] = token_batches(lm, [own[1:], own], seed=None)
    kept = [lm.to_string(batch.ids[row][batch.keep[row]]) for row in range(2)]
    asked = "Hi.<|im_end|>\n<|im_start|>assistant\n"
    assert kept == [asked, f"system\nBe brief.<|im_end|>\n<|im_start|>user\n{asked}"]


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "every"])
@torch.no_grad()
def test_edits_change_exactly_the_selected_tokens_under_left_padding(lm, policy):
    chosen = [
        d
        for d in DIALOGUES
        if d["name"] in ("CJK and emoji with thinking", "tools in earlier turns")
    ]
    ids, mask = lm.pad([tokens(lm, d) for d in chosen], "left")
    assert len(chosen) == 2
    assert not mask[:, 0].all()
    plain = lm(ids, mask)
    with applied(lm, [Edit("blocks.1.hook_resid_post", lambda x: 1.0 + x.abs().flip(-1), policy)]):
        changed = (lm(ids, mask) != plain).any(-1)
    assert [texts(lm, ids[r], changed[r]) for r in range(2)] == [
        d["selected"][policy] for d in chosen
    ]


def test_a_template_without_thinking_is_recognised(lm, monkeypatch):
    assert lm.has_thinking
    monkeypatch.setattr(lm.tokenizer, "chat_template", NO_THINKING)
    assert not lm.has_thinking
    for flag in (True, False):
        with pytest.raises(ValueError, match=f"enable_thinking={flag} .* ignores it"):
            lm.to_chat("Hi.", enable_thinking=flag)
    ids, mask = lm.pad([lm.chat_tokens("Hi.")])
    expected = [
        (Phase.TEMPLATE, "<|im_start|>user\n"),
        (Phase.USER, "Hi."),
        (Phase.TEMPLATE, "<|im_end|>\n<|im_start|>assistant\n"),
    ]
    assert [tuple(run) for run in runs(lm, ids[0], phases(ids, mask, lm.markers)[0])] == expected
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    assert not lm.has_thinking


OPENS = NO_THINKING.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")


def test_what_an_answer_begins_with_is_looked_for_behind_the_thoughts(lm, monkeypatch):
    empty = "<think>\n\n</think>\n\n"
    thinking = lm.opening_tokens("Who?")
    assert lm.to_string(thinking).endswith(f"assistant\n{empty}")
    monkeypatch.setattr(lm.tokenizer, "chat_template", OPENS)
    opened = lm.opening_tokens("Who?")
    assert opened == thinking
    monkeypatch.setattr(lm.tokenizer, "chat_template", NO_THINKING)
    assert lm.opening_tokens("Who?") == lm.chat_tokens("Who?")


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("I cannot.", "I"),
        ("<think>\nHm.\n</think>\n\nNo, I won't.", "No"),
        ("<think>\nHm", None),
        ("Hm.\n</think>\n\nNo.", "No"),  # the template opened the block
        ("<think></think>", None),
    ],
)
def test_the_first_token_that_is_said(lm, text, first):
    ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    found = first_said(ids, lm.markers, opened="\n</think>" in text and text[0] != "<")
    assert (found is None) == (first is None)
    assert first is None or lm.to_string([found]) == first
    cut = lm.tokenizer("Okay, so the", add_special_tokens=False).input_ids
    assert first_said(cut, lm.markers, opened=True) is None


@pytest.mark.parametrize("thinking", [False, True])
def test_the_same_study_runs_on_qwen3_with_thinking_on_and_off(lm, thinking):
    """Another model is another name: same prompts, same configuration, both directions."""
    name = "blocks.0.hook_resid_post"
    companion = companion_of(lm)
    asked = {
        split: {
            kind: [prompt.text for prompt in companion.prompts(kind, 4, split)] for kind in KINDS
        }
        for split in SPLITS
    }
    x = torch.cat(
        [decision_activations(lm, [name], p, thinking)[name] for p in asked["selection"].values()]
    )
    sae = TopKSAE(
        lm.d_model,
        32,
        4,
        Provenance(lm.model_name, name, NormFilter(float(x.norm(dim=1).median()))),
    )
    sae.init_from_rows(x.repeat(20, 1), torch.Generator().manual_seed(0))
    small = StudyConfig(
        strengths=(0.5, 1.0),
        shares=(1.0,),
        n_features=2,
        n_candidates=2,
        n_trials=1,
        n_random=1,
        n_noise=1,
        n_facts=1,
        dose_prompts=2,
        search_prompts=2,
        cost_prompts=2,
        max_new_tokens=6,
        contrast="prompts",
        max_kl_first=1.0,
        thinking=thinking,
    )
    for goal, differs in DIFFERENTLY.items():
        config = replace(small, goal=goal, **{**differs, "max_kl_first": 1.0})
        study = steering_study(
            lm,
            {"v": {name: sae.requires_grad_(False)}},
            asked["selection"],
            asked["evaluation"],
            config=config,
            bar=False,
        )
        assert study.headline["model"] == lm.model_name
        assert study.headline["goal"] == goal
        assert set(study.table["prompt_kind"]) == set(KINDS)

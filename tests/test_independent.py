"""Figures that padding, masks, templates and a checkpoint's settings enter, against plain
transformers: one row at a time, without padding, by a loop of its own.
"""

import copy
import random

import pytest
import torch
from small import small_suite
from transformers import GenerationConfig

from qsae_kit import answer_pair, evaluate_suite, token_batches
from qsae_kit.lm.answering import Asked, KnownRows, answer_all, answer_groups, plain_kl, surprise
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.metrics.reconstruction import kl_divergence

SITE = "blocks.2.hook_resid_post"
CASES = 10
NEW = 8
SIDES = ("left", "right")
ASKED = (
    "How do I thank the nurse?",
    "Hello!",
    "Which illness does Ada Reyes have?",
    "I want to cut the wood. How?",
    "Which day comes after Monday, and which one after that?",
)


@pytest.fixture(scope="module")
def plain(lm):
    """The same weights as transformers have them, which this package has never seen."""
    return copy.deepcopy(lm.hf).eval()


@pytest.fixture(scope="module")
def chats(lm):
    """Rows of chats with and without the beginning of an answer, in ten random batches."""
    rng = random.Random(0)
    rows = []
    for _ in range(CASES):
        batch = []
        for prompt in rng.sample(ASKED, 3):
            said = lm.tokenizer("You need this: card.", add_special_tokens=False).input_ids
            batch.append(lm.chat_tokens(prompt, False) + said[: rng.randrange(len(said))])
        rows.append(batch)
    return rows


def logits_of(plain, row):
    with torch.no_grad():
        return plain(input_ids=torch.tensor([row])).logits[0]


def nats_of(plain, row, start=1):
    """Cross-entropy of the tokens of a row from one on, each given those before."""
    logprobs = logits_of(plain, row).double().log_softmax(-1)[start - 1 : -1]
    return -logprobs.gather(1, torch.tensor(row[start:])[:, None])[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(lm, plain, chats, side):
    for rows in chats:
        nats = torch.cat([nats_of(plain, row) for row in rows])
        loss = lm(*lm.pad(rows, side), return_type="loss")
        assert float(loss) == pytest.approx(float(nats.mean()), abs=1e-5)


@torch.no_grad()
def test_padding_within_a_row_is_passed_over(lm, plain, chats):
    for rows in chats:
        shared, rest = rows[0][:5], [row[5:] for row in rows]
        ids, mask = lm.pad(rest, "left")
        before = torch.tensor([shared] * len(rows))
        batch = torch.cat([before, ids], 1), torch.cat([torch.ones_like(before), mask], 1)
        nats = torch.cat([nats_of(plain, shared + row) for row in rest])
        loss = lm(*batch, return_type="loss")
        assert float(loss) == pytest.approx(float(nats.mean()), abs=1e-5)


def test_a_loss_and_a_mask_that_cannot_be_are_refused(lm):
    with pytest.raises(ValueError, match="two tokens at least"):
        lm(torch.tensor([[3]]), return_type="loss")
    with pytest.raises(ValueError, match=r"shape \[1, 3\], the ids \[2, 3\]"):
        lm(torch.ones(2, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_activations_and_logits_under_padding_are_those_of_the_rows(lm, plain, chats, side):
    seen = []
    layer = plain.model.layers[2]
    with_hook = layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
    for rows in chats:
        ids, mask = lm.pad(rows, side)
        logits, cache = lm.run_with_cache(ids, mask, names_filter=SITE)
        for i, row in enumerate(rows):
            own, real = logits_of(plain, row), mask[i].bool()
            assert torch.allclose(logits[i][real], own, atol=2e-4)
            x = seen.pop()
            x = x[0] if isinstance(x, tuple) else x
            assert torch.allclose(cache[SITE][i][real], x[0] if x.ndim == 3 else x, atol=2e-4)
    with_hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_an_edit_under_padding_is_that_of_the_rows(lm, plain, chats, side):
    """Positions 2 to 4 of every row, counted without padding, moved by hand."""
    push = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1)) * 5

    def by_hand(_module, _args, out):
        x = out[0] if isinstance(out, tuple) else out
        x[:, 2:5] += push

    for rows in chats:
        ids, mask = lm.pad(rows, side)
        with applied(lm, [Edit(SITE, lambda x: push.expand_as(x), (2, 3, 4))]):
            logits = lm(ids, mask)
        handle = plain.model.layers[2].register_forward_hook(by_hand)
        for i, row in enumerate(rows):
            own = logits_of(plain, row)
            assert torch.allclose(logits[i][mask[i].bool()], own, atol=5e-4)
        handle.remove()


def greedy(plain, row, ends, n=NEW):
    """Tokens and their log-probabilities, by a loop without a cache."""
    made, nats = [], []
    while len(made) < n and (not made or made[-1] not in ends):
        logprobs = logits_of(plain, row + made)[-1].double().log_softmax(-1)
        made.append(int(logprobs.argmax()))
        nats.append(float(logprobs.max()))
    return made, nats


SETTINGS = {
    "suppress_tokens": None,  # the answer's own first token
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "repetition_penalty": 5.0,
    "min_length": 300,
    "min_new_tokens": NEW,
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 3,
    "exponential_decay_length_penalty": (1, 5.0),
    "do_sample": True,
    "temperature": 3.0,
    "top_k": 5,
    "num_beams": 3,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "use_cache": False,
    "max_time": 1e-4,
    "stop_strings": ["a"],
    "cache_implementation": "static",
    "guidance_scale": 3.0,
    "penalty_alpha": 0.5,
    "prompt_lookup_num_tokens": 3,
}


def test_greedy_answers_are_the_models_own_whatever_its_checkpoint_says(lm, plain, monkeypatch):
    """In ten batches, under two settings each, by plain transformers and by `answer_all`."""
    rng = random.Random(1)
    names = list(SETTINGS)
    for case in range(CASES):
        prompts = rng.sample(ASKED, 3)
        expected = [greedy(plain, lm.chat_tokens(p, False), lm.end_ids()) for p in prompts]
        first = expected[0][0][0]
        own = {"bad_words_ids": [[first]]}
        said = GenerationConfig(eos_token_id=lm.hf.generation_config.eos_token_id)
        for name in names[case::CASES]:
            value = SETTINGS[name]
            setattr(said, name, own.get(name, [first]) if value is None else value)
        monkeypatch.setattr(lm.hf, "generation_config", said)
        out = lm.generate(prompts, NEW, enable_thinking=False)
        assert lm.hf.generation_config is said
        assert out.tokens == [tokens for tokens, _ in expected]
        for nats, (_, by_hand) in zip(out.logprobs, expected, strict=True):
            assert nats == pytest.approx(by_hand, abs=1e-4)
        assert answer_all(lm, prompts, [], NEW, False).tokens == out.tokens


def test_an_end_of_turn_of_the_checkpoint_still_ends_it(lm, monkeypatch):
    own = lm.generate(ASKED[0], NEW, enable_thinking=False)
    third = own.tokens[0][2]
    monkeypatch.setattr(lm.hf, "generation_config", GenerationConfig(eos_token_id=[third, 1]))
    cut = lm.generate(ASKED[0], NEW, enable_thinking=False)
    assert cut.tokens[0] == own.tokens[0][:3]
    assert cut.finished == [True]


@torch.no_grad()
def test_surprise_and_divergences_are_those_of_the_rows(lm, plain):
    rng = random.Random(2)
    push = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(2)) * 5
    edit = Edit(SITE, lambda x: push.expand_as(x), "answer")
    texts = [f"{a} {b}" for a, b in zip(ASKED, reversed(ASKED), strict=True)]
    for _ in range(CASES):
        prompts = [lm.chat_tokens(p, False) for p in rng.sample(ASKED, 3)]
        answers = [[rng.randrange(300, 2000) for _ in range(rng.randint(1, 7))] for _ in prompts]
        pairs = zip(prompts, answers, strict=True)
        nats = [float(nats_of(plain, p + a, len(p)).sum()) for p, a in pairs]
        assert surprise(lm, prompts, answers, batch=2) == pytest.approx(nats, abs=1e-4)
        rows = KnownRows(lm, prompts)
        kl = rows.first_kl(rows.last_logits([edit]))
        for p, found in zip(prompts, kl, strict=True):
            with applied(lm, [edit]):
                edited = lm(torch.tensor([p]))[:, -1]
            by_hand = kl_divergence(logits_of(plain, p)[-1:], edited)
            assert float(found) == pytest.approx(float(by_hand), rel=1e-3, abs=1e-4)
        some = rng.sample(texts, 2)
        total = []
        for text in some:
            ids = torch.tensor([lm.tokenizer(text).input_ids])
            with applied(lm, [Edit(SITE, edit.delta, tuple(range(1, ids.shape[1])))]):
                changed = lm(ids)[0]
            total.append(kl_divergence(logits_of(plain, ids[0].tolist())[1:], changed[1:]))
        assert plain_kl(lm, some, [edit]) == pytest.approx(float(torch.cat(total).mean()), rel=1e-3)


@torch.no_grad()
def test_an_evaluation_does_not_depend_on_how_its_rows_are_batched(lm):
    documents = [[{"role": "user", "content": asked}] for asked in ASKED]
    suite = small_suite(lm).only(hook_names=["blocks.1.hook_resid_post"])
    together = evaluate_suite(lm, suite, list(token_batches(lm, documents)), bar=False)
    alone = evaluate_suite(lm, suite, list(token_batches(lm, documents, 1)), bar=False)
    columns = ["fvu", "l0", "ce", "delta_ce", "kl_nats", "ce_score", "tokens", "spliced_tokens"]
    for column in columns:
        assert together[column].tolist() == pytest.approx(alone[column].tolist(), abs=1e-4)


@torch.no_grad()
def test_padding_without_its_mask_is_refused(lm, plain, chats):
    for rows in chats[:3]:
        ids, mask = lm.pad(rows, "left")
        for return_type in ("logits", "loss", None):
            with pytest.raises(ValueError, match="give the batch with its mask"):
                lm(ids, return_type=return_type)
        ids, mask = lm.pad(rows, "right")
        with pytest.raises(ValueError, match="give the batch with its mask"):
            lm(ids, return_type="loss")
        for row, logits, real in zip(rows, lm(ids), mask.bool(), strict=True):
            assert torch.allclose(logits[real], logits_of(plain, row), atol=2e-4)
    ids = torch.tensor([[lm.pad_id, 300, lm.pad_id], [lm.pad_id, 310, lm.pad_id]])
    nats = torch.cat([nats_of(plain, row) for row in ids.tolist()])
    assert float(lm(ids, return_type="loss")) == pytest.approx(float(nats.mean()), abs=1e-5)


# --- prompts as ids, and masks of a prompt


def test_prompts_as_ids_are_continued(lm, plain):
    rng = random.Random(3)
    for _ in range(CASES):
        rows = [[rng.randrange(300, 2000) for _ in range(rng.randint(2, 9))] for _ in range(2)]
        expected = [greedy(plain, row, lm.end_ids(), 3)[0] for row in rows]
        given = (rows, lm.pad(rows, "right"), lm.pad(rows, "left"), list(map(torch.tensor, rows)))
        for batch in given:
            assert lm.generate(batch, 3, chat=False).tokens == expected
        for one in (rows[0], torch.tensor(rows[0]), torch.tensor(rows[:1]), tuple(rows[0])):
            assert lm.generate(one, 3, chat=False).tokens == expected[:1]
    assert lm.generate(lm.to_tokens("Hi"), 4, chat=False) == lm.generate("Hi", 4, chat=False)
    streamed = "".join(part for (part,) in lm.stream(lm.to_tokens("Hi"), 4, chat=False))
    assert streamed == lm.generate("Hi", 4, chat=False).text[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda lm: lm.to_tokens(["Hi", "Hello to you all"]), "give the batch with its mask"),
        (lambda lm: [10**6], "whole numbers from 0"),
        (lambda lm: torch.rand(4), "whole numbers is allowed"),
        (lambda lm: [], "No prompt was given"),
    ],
)
def test_ids_that_are_no_prompt_are_refused(unchecked, lm, given, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(given(lm), 2, chat=False)


def test_ids_are_no_chat(lm):
    with pytest.raises(ValueError, match="pass chat=False"):
        lm.generate([310, 311], 2)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_mask_of_the_prompts_holds_at_no_new_token(lm, use_cache):
    rows = [lm.chat_tokens(p, False) for p in ASKED[:2]]
    _, mask = lm.pad(rows, "left")
    where = torch.zeros_like(mask, dtype=torch.bool)
    where[:, -6:-2] = True
    push = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1)) * 30
    with applied(lm, [Edit(SITE, lambda x: push.expand_as(x), where)]):
        out = lm.generate(ASKED[:2], 6, enable_thinking=False, use_cache=use_cache)
    for row, made in zip(rows, out.tokens, strict=True):
        places = tuple(range(len(row) - 6, len(row) - 2))
        with applied(lm, [Edit(SITE, lambda x: push.expand_as(x), places)]):
            by_hand = []
            for _ in range(len(made)):
                with torch.no_grad():
                    by_hand.append(int(lm(torch.tensor([row + by_hand]))[0, -1].argmax()))
        assert made == by_hand
    with (
        applied(lm, [Edit(SITE, lambda x: x, where[:, :-1])]),
        pytest.raises(ValueError, match="position mask has the shape"),
    ):
        lm.generate(ASKED[:2], 2, enable_thinking=False)


# --- pairs in half precision


def test_in_half_precision_an_answer_has_the_same_company_edited_or_not(lm, monkeypatch):
    half = HookedLM(copy.deepcopy(lm.hf).bfloat16(), lm.tokenizer, "half")
    batches = []
    generate = half.generate

    def noted(prompts, *args, **kwargs):
        batches.append(list(prompts))
        return generate(prompts, *args, **kwargs)

    monkeypatch.setattr(half, "generate", noted)
    edit = Edit(SITE, lambda x: torch.ones_like(x), "answer")
    asked = list(ASKED)
    whole = answer_groups(half, [Asked(asked, [], asked)], 4, False, batch=2)
    unedited, batches[:] = list(batches), []
    groups = [Asked(asked[:3], [edit], asked), Asked(asked[:1], [edit], asked)]
    some = answer_groups(half, groups, 4, False, batch=2)
    assert unedited == [asked[:2], asked[2:4], asked[4:]]
    assert batches == [asked[:2], asked[2:4], asked[:2]]
    assert [len(said.text) for said in (*whole, *some)] == [5, 3, 1]


def test_in_half_precision_a_pair_is_always_one_batch(lm, monkeypatch):
    half = HookedLM(copy.deepcopy(lm.hf).bfloat16(), lm.tokenizer, "half")
    asked = []
    generate = half.generate
    monkeypatch.setattr(
        half, "generate", lambda p, *a, **k: asked.append(p) or generate(p, *a, **k)
    )
    first = answer_pair(half, ASKED[0], [], 4, enable_thinking=False)
    again = answer_pair(half, ASKED[0], [], 4, enable_thinking=False, base=first.base)
    assert [len(prompts) for prompts in asked] == [2, 2]
    assert again == first

"""Public reports of bugs in tools of this kind, tried on this package: each test names the thread
and its symptom. `tests/README.md` has the table.
"""

import copy
import gc
import json
import pickle
import re
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from ipywidgets.widgets import widget as registry
from releases import saelens
from safetensors.torch import load_file, save_file
from small import PROMPTS, SITES, small_suite
from tokenizers.processors import TemplateProcessing

import qsae_kit
from qsae_kit.data.documents import TokenPolicy, categories_of
from qsae_kit.data.readers import read_documents
from qsae_kit.data.rows import StoredRows
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.features.indexing import IndexConfig
from qsae_kit.lm.edits import Edit
from qsae_kit.lm.hooked import BLOCK_HOOKS
from qsae_kit.sae import ARCHITECTURES
from qsae_kit.sae.suites import Feature, Place
from qsae_kit.steer.changes import Condition

TEXTS = [
    "The nurse reads a long letter to the old man in the garden.",
    "Ada likes the blue house near the river very much.",
]
SITE = SITES[1]
HERE = Path(__file__).parent
SMALL = {"expansion": 2, "tokens": 512, "batch": 128, "pool": 512}


@pytest.fixture(scope="module")
def suite(lm):
    return small_suite(lm)


@pytest.fixture(scope="module")
def sae(suite):
    return suite["v"][SITE]


@pytest.fixture(scope="module")
def batches(lm):
    return list(qsae_kit.token_batches(lm, TEXTS * 4, batch_tokens=256))


@pytest.fixture(scope="module")
def index(lm, suite, tmp_path_factory):
    config = IndexConfig(tokens=200, top=3, sampled=5, before=6, after=2, batch_tokens=1024)
    documents = lambda: TEXTS * 9  # noqa: E731
    folder = tmp_path_factory.mktemp("index")
    return qsae_kit.load_index(
        qsae_kit.build_index(lm, suite, documents, folder, config, bar=False), lm, suite
    )


def rows(n=2000, width=24):
    return {"blocks.0.hook_resid_post": torch.randn(n, width, generator=generator())}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def with_tokenizer(lm, **tokens):
    """The bundled model with a copy of its tokenizer, in which some tokens are others or none."""
    tokenizer = copy.deepcopy(lm.tokenizer)
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return qsae_kit.load_model(lm.hf, tokenizer=tokenizer)


# --- hooks and caches


def test_names_that_can_be_gone_through_once_are_cached(lm):
    """TransformerLensOrg/TransformerLens#340: a `names_filter` of another form gives an empty
    cache, without a word.
    """
    names = [f"blocks.{i}.hook_resid_post" for i in (0, 2)]
    with pytest.raises(ValueError, match=r"no hook point 'blocks\.99\.hook_resid_post'"):
        lm.run_with_hooks("Hello", fwd_hooks=[("blocks.99.hook_resid_post", lambda x, hook: x)])
    for given in (
        names,
        tuple(names),
        (n for n in names),
        dict.fromkeys(names),
        names.__contains__,
    ):
        _, cache = lm.run_with_cache("Hello you", names_filter=given)
        assert list(cache) == names
    assert list(lm.run_with_cache("Hello you", names_filter=names[0])[1]) == names[:1]


def test_a_hook_that_fails_leaves_nothing(lm):
    """TransformerLensOrg/TransformerLens#156: after a hook that raised, later runs still call
    it.
    """

    def fails(x, hook):
        raise KeyError("in a hook")

    before = lm("Hello you")
    with pytest.raises(KeyError):
        lm.run_with_hooks("Hello you", fwd_hooks=[(SITE, fails)])
    assert torch.equal(lm("Hello you"), before)


def test_a_hook_of_the_user_s_survives_what_comes_and_goes(lm, sae):
    """TransformerLensOrg/TransformerLens#1636: `run_with_cache` and `hooks` take away hooks that
    were there before them.
    """
    seen = []
    lm.add_hook(SITE, lambda x, hook: seen.append(1))
    try:
        lm.run_with_cache("Hello", names_filter=SITE)
        lm.run_with_hooks("Hello", fwd_hooks=[(SITE, lambda x, hook: None)])
        with qsae_kit.applied(lm, [qsae_kit.ablate_features(sae, [3], "all")]):
            lm("Hello")
        lm("Hello")
        assert len(seen) == 4
    finally:
        lm.reset_hooks()


def test_backward_hooks_end_with_their_with(lm):
    """TransformerLensOrg/TransformerLens#1323: backward hooks outlive `hooks(bwd_hooks=...)`."""
    seen = []
    hooks = [(SITE, lambda grad, hook: seen.append(grad.shape))]
    with lm.hooks(bwd_hooks=hooks):
        lm("Hello you", return_type="loss").backward()
    lm("Hello you", return_type="loss").backward()
    lm.hf.zero_grad()
    assert seen == [(1, 2, lm.d_model)]


def test_what_is_cached_stays_as_it_was(lm):
    """ndif-team/nnsight#630 and ndif-team/nnsight#661: a saved activation is overwritten by what
    later changes it in place.
    """

    def doubles(x, hook):
        x *= 2

    with torch.no_grad():
        clean = lm.run_with_cache("Hello you", names_filter=SITE)[1][SITE]
        with lm.hooks(fwd_hooks=[("blocks.4.hook_resid_pre", doubles)]):
            _, cache = lm.run_with_cache("Hello you", names_filter=SITE)
        assert torch.equal(cache[SITE], clean)


def test_hooks_may_write_into_what_they_are_given(lm):
    """TransformerLensOrg/TransformerLens#1722: what a hook made of an activation is dropped in
    silence; here it was, of two hook points, where it was written in place.
    """
    points = ["hook_embed", *(f"blocks.2.{hook}" for hook in BLOCK_HOOKS)]

    def writes(x, hook):
        x[:, 1:] *= 0.5

    def gives(x, hook):
        return torch.cat([x[:, :1], x[:, 1:] * 0.5], dim=1)

    with torch.no_grad():
        clean = lm("Hello you man")
        for point in (*points, "ln_final.hook_normalized"):
            written, given = (
                lm.run_with_hooks("Hello you man", fwd_hooks=[(point, hook)])
                for hook in (writes, gives)
            )
            assert torch.equal(written, given), point
            assert (written - clean).abs().max() > 0.1, point


def test_an_edit_of_all_tokens_acts_on_a_text_that_is_no_chat(lm, sae):
    """Phylliida/MambaLens#4: an intervention is taken, and not made. Without a chat's header every
    token counted as the template's, which edits of "all", categories and `drop_template` leave out.
    """
    texts = ["Hello you man", PROMPTS[1]]
    batch = lm.to_batch(texts, "left")
    edit = qsae_kit.clamp_features(sae, [3], 50.0, positions="all")
    with torch.no_grad():
        _, clean = lm.run_with_cache(*batch, names_filter=SITE)
        with qsae_kit.applied(lm, [edit]):
            _, changed = lm.run_with_cache(*batch, names_filter=SITE)
    counted = (batch.mask.cumsum(1) * batch.mask) > 1
    assert torch.equal((clean[SITE] != changed[SITE]).any(-1), counted)
    for part in ("header", "thinking", "answer"):
        of_answers = replace(edit, positions=part)
        with (
            pytest.raises(ValueError, match=f'positions="{part}" was used on texts that are no'),
            qsae_kit.applied(lm, [of_answers]),
        ):
            lm.generate(texts, 2, chat=False)
    policy = TokenPolicy(drop_template=True)
    (made,) = qsae_kit.token_batches(lm, texts, policy=policy, seed=None)
    assert torch.equal(made.keep.sum(1), counted.sum(1))
    masks = categories_of(lm, made)
    assert torch.equal(masks["user"], made.mask.bool())
    assert not masks["template"].any()


def test_no_tensor_is_kept_from_pass_to_pass(lm, suite, sae, batches):
    """ndif-team/nnsight#396: memory grows with every traced pass of a loop."""

    def once():
        with qsae_kit.applied(lm, [qsae_kit.ablate_features(sae, [3])]):
            lm.generate(PROMPTS[0], 2)
        lm.run_with_cache("Hello you")
        lm.run_with_hooks("Hello you", fwd_hooks=[(SITE, lambda x, hook: x)])
        list(lm.stream("Hi", 2))
        evaluate_suite(lm, suite, batches[:1], bar=False)
        gc.collect()
        # asked by their types, since an object's own answer may be a warning
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    once()
    assert once() == once()


def test_the_last_residual_is_before_the_final_norm(lm):
    """huggingface/transformers#13461: the last of `hidden_states` and the last hidden state differ:
    a norm lies between.
    """
    ids = lm.to_tokens("Hello you man")
    hf = copy.deepcopy(lm.hf)  # which keeps the hooks that it is given for this
    told = hf(ids, output_hidden_states=True).hidden_states
    names = [f"blocks.{i}.hook_resid_post" for i in range(lm.n_layers)]
    _, cache = lm.run_with_cache(ids, names_filter=names)
    for name, state in zip(names[:-1], told[1:-1], strict=True):
        assert torch.equal(cache[name], state)
    assert torch.equal(lm.hf.model.norm(cache[names[-1]]), told[-1])


def test_a_model_is_copied_with_its_hooks_of_its_own(lm):
    """huggingface/transformers#17696: "can't pickle _thread.lock objects"."""
    twin = copy.deepcopy(lm).to(torch.bfloat16)
    with twin.hooks(fwd_hooks=[(SITE, lambda x, hook: x * 0)]):
        assert torch.equal(lm("Hello you"), lm("Hello you"))
        assert not lm.list_hooks()
    assert (twin.dtype, lm.dtype) == (torch.bfloat16, torch.float32)
    assert twin.generate("Hi", 2).tokens
    again = pickle.loads(pickle.dumps(qsae_kit.load_model("tiny")))
    assert torch.equal(again("Hello you"), lm("Hello you"))


# --- tokens


@pytest.mark.usefixtures("unchecked")
def test_ids_that_are_none_are_one_sentence(lm):
    """ndif-team/nnsight#176 and ndif-team/nnsight#614: ids without a batch dimension, and batches
    without a mask, fail far inside the model.
    """
    for wrong in (torch.tensor([1, 2]), torch.zeros(0, 5).long(), torch.zeros(1, 0).long()):
        with pytest.raises(ValueError, match=r"must have the shape \[batch, pos\]"):
            lm(wrong)
    with pytest.raises(ValueError, match="Token ids are whole numbers"):
        lm(torch.tensor([[1.0, 2.0]]))
    short = torch.tensor([[5, 6, 7]], dtype=torch.int32)
    assert lm(short, return_type="loss") == lm(short.long(), return_type="loss")
    assert torch.equal(lm(short), lm(short, torch.ones_like(short)))


def test_ids_beyond_the_vocabulary_are_one_sentence(lm):
    """huggingface/transformers#1848: a tokenizer with more tokens than the model ends in a
    device-side assert, or an IndexError.
    """
    last = lm.config.vocab_size - 1
    for wrong in (last + 1, -1):
        with pytest.raises(ValueError, match=f"Token id {wrong} was given, but 'tiny' knows 0 to"):
            lm(torch.tensor([[1, wrong]]))
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.add_tokens(["<new>"])
    other = qsae_kit.load_model(lm.hf, tokenizer=tokenizer)
    for call in (other.to_tokens, other.generate):
        with pytest.raises(ValueError, match=f"Token id {last + 1} was given.*resize"):
            call("a <new> b")
    with pytest.raises(ValueError, match="Token id"):
        next(qsae_kit.token_batches(other, ["a <new> b"]))


def test_padding_is_a_token_that_the_model_knows(lm):
    """TransformerLensOrg/TransformerLens#1139: a padding token is made up that is beyond the
    embeddings.
    """
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    assert tokenizer.pad_token_id == lm.config.vocab_size
    other = qsae_kit.load_model(lm.hf, tokenizer=tokenizer)
    batch = other.to_batch(["Hello you", "Hello"])
    torch.testing.assert_close(other(*batch)[1, :1], lm("Hello")[0])
    assert other.generate(PROMPTS, 4).tokens == lm.generate(PROMPTS, 4).tokens
    assert other.tokenizer.pad_token == "<PAD>"


def test_a_tokenizer_without_padding_and_end(lm):
    """TransformerLensOrg/TransformerLens#483: `generate` fails where no tokenizer names a padding
    token.
    """
    bare = with_tokenizer(lm, pad_token=None, eos_token=None)
    bare.hf = copy.deepcopy(lm.hf)
    bare.hf.generation_config.eos_token_id = None
    texts = ["Hello", "Hello you man"]
    made = bare.generate(texts, 3, chat=False)
    assert [len(row) for row in made.tokens] == [3, 3]
    assert made.tokens == [bare.generate(text, 3, chat=False).tokens[0] for text in texts]


def test_padding_with_the_end_of_turn_hides_no_token(lm):
    """huggingface/transformers#25790: where padding is the end of turn, batches answer otherwise,
    and real ends are masked.
    """
    other = with_tokenizer(lm, pad_token=lm.tokenizer.eos_token)
    assert other.generate(PROMPTS, 4).tokens == lm.generate(PROMPTS, 4).tokens
    text = f"Hello{lm.tokenizer.eos_token} you"
    batch = other.to_batch([text, "Hi"])
    assert batch.mask[0].all()
    assert other(text, return_type="loss") == lm(text, return_type="loss")


def test_a_sequence_begins_once(lm):
    """TransformerLensOrg/TransformerLens#369: the token that begins a sequence is there twice in
    what a template wrote.
    """
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    begin = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    other = qsae_kit.load_model(lm.hf, tokenizer=tokenizer)
    chat = other.to_chat("Hi")
    wanted = other.chat_tokens("Hi")
    assert wanted.count(begin) == 1
    assert other.to_tokens("Hi")[0].tolist()[0] == begin
    assert other.to_tokens(chat)[0].tolist() == wanted
    assert len(other.to_str_tokens(chat)) == len(wanted)
    assert next(qsae_kit.token_batches(other, [chat])).ids[0].tolist() == wanted
    continued, asked = other.generate(chat, 3, chat=False), other.generate("Hi", 3)
    assert continued.tokens == asked.tokens


def test_half_a_character_is_one_sentence(lm):
    """huggingface/transformers#43459: a lone surrogate is a TypeError about the type of the
    input.
    """
    for use in (lm.to_tokens, lambda text: next(qsae_kit.token_batches(lm, [text]))):
        with pytest.raises(ValueError, match="half a character"):
            use("a \ud83d b")
    assert lm.to_string(lm.to_tokens("a\x00 \u200b🤗 b")[0]) == "a\x00 \u200b🤗 b"


def test_a_loss_of_single_tokens_is_no_number(lm):
    """pytorch/pytorch#70348: the mean cross-entropy of no target is NaN, which goes on into every
    sum.
    """
    one = lm.to_tokens("a")[:, :1]
    with pytest.raises(ValueError, match="two tokens at least"):
        lm(one, return_type="loss")
    with pytest.raises(ValueError, match="two tokens at least"):
        lm(one.repeat(1, 2), torch.tensor([[1, 0]]), return_type="loss")
    assert lm(["a b c", "a"], return_type="loss").isfinite()


def test_a_vocabulary_larger_than_the_tokenizer_s(lm):
    """QwenLM/Qwen3#885: the model's output is wider than the tokenizer's vocabulary, and decoding
    fails.
    """
    hf = copy.deepcopy(lm.hf)
    hf.resize_token_embeddings(4200, mean_resizing=False)
    with torch.no_grad():
        hf.get_input_embeddings().weight[4150] = hf.get_input_embeddings().weight.abs().mean(0) * 9
    wide = qsae_kit.load_model(hf, tokenizer=lm.tokenizer)
    assert wide.to_str_tokens([4150, 3]) == ["", lm.to_string([3])]
    assert wide(torch.tensor([[4150, 3]])).shape == (1, 2, 4200)
    assert len(wide.generate("Hello there", 3, chat=False).tokens[0]) == 3


def test_tokens_are_told_one_by_one(lm):
    """EleutherAI/delphi#177: since transformers 5 a row of ids is decoded to one text, not to one a
    token.
    """
    for given in ("Hello you man", lm.to_tokens("Hello you man"), lm.to_tokens("Hello you man")[0]):
        assert lm.to_str_tokens(given) == ["Hello", " you", " man"]
    assert lm.to_str_tokens(torch.tensor(2)) == lm.to_str_tokens(np.array([2]))


def test_a_row_holds_one_document(lm):
    """decoderesearch/SAELens#472: tokens that begin a sequence lie in the midst of joined
    documents, and features fire on them.
    """
    told = [lm.to_tokens(text)[0].tolist() for text in TEXTS]
    (batch,) = qsae_kit.token_batches(lm, TEXTS, seed=None)
    found = [row[mask.bool()].tolist() for row, mask in zip(batch.ids, batch.mask, strict=True)]
    assert found == told
    assert not batch.keep[:, 0].any()


# --- SAEs


def test_rows_of_any_format_are_read(sae):
    """EleutherAI/sparsify#116: formats that differ, there of a file and an SAE, here of an SAE and
    the rows of a bfloat16 model, are a RuntimeError at first use.
    """
    x = torch.randn(3, sae.d_in, generator=generator()) * 5
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        f = sae.encode(x.to(kind))
        torch.testing.assert_close(f, sae.encode(x.to(kind).float()))
        assert f.dtype == sae(x.to(kind)).dtype == sae.decode(f.to(kind)).dtype == torch.float32


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_batches_of_sequences_are_read_as_their_rows(name):
    """decoderesearch/SAELens#570: the features of [batch, pos, d] are others than those of the same
    rows.
    """
    made = ARCHITECTURES[name](16, 48, 4.0)
    x = torch.randn(2, 5, 16, generator=generator())
    with torch.no_grad():
        made.init_from_rows(torch.randn(200, 16, generator=generator(1)), generator())
        made = made.exported().eval()
        alone = torch.stack([made.encode(row) for row in x.flatten(0, 1)])
    torch.testing.assert_close(made.encode(x).flatten(0, 1), alone)
    assert made(x[:0]).shape == (0, 5, 16)


def test_a_release_says_another_device_and_lacks_keys(tmp_path):
    """decoderesearch/SAELens#220 and decoderesearch/SAELens#193: the device in cfg.json wins over
    the one asked for; keys that are missing or new are a TypeError.
    """
    laid = saelens(tmp_path, kind="jumprelu", dtype=torch.bfloat16)
    path = laid.folder / "cfg.json"
    config = json.loads(path.read_text()) | {"brand_new": 3, "device": "cuda:7"}
    del config["dtype"], config["metadata"]["context_size"]
    path.write_text(json.dumps(config))
    (read,) = qsae_kit.load_suite(tmp_path, "cpu").saes().values()
    assert {(p.device.type, p.dtype) for p in read.parameters()} == {("cpu", torch.float32)}
    assert not any(p.requires_grad for p in read.parameters())


def test_a_scale_that_a_release_does_not_store_is_refused(tmp_path):
    """decoderesearch/SAELens#381: checkpoints lack the factor that their inputs were scaled by, and
    reconstruct nothing.
    """
    laid = saelens(tmp_path)
    path = laid.folder / "cfg.json"
    config = json.loads(path.read_text()) | {"normalize_activations": "expected_average_only_in"}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="normalize_activations='expected_average_only_in'"):
        qsae_kit.load_suite(tmp_path)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk"])
def test_a_decoder_row_without_length(tmp_path, kind):
    """decoderesearch/SAELens#590: a dead latent's decoder row of length 0 becomes NaN where norms
    are folded.
    """
    laid = saelens(tmp_path, kind=kind)
    path = laid.folder / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["W_dec"][5] = 0
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    (read,) = qsae_kit.load_suite(tmp_path).saes().values()
    x = torch.randn(9, 16, generator=generator())
    assert all(tensor.isfinite().all() for tensor in read.tensors().values())
    assert torch.equal(read.W_dec[5], torch.zeros(16))
    without = read.encode(x).index_fill(-1, torch.tensor([5]), 0)
    torch.testing.assert_close(read(x), read.decode(without))


def test_what_is_trained_of_a_bfloat16_model_is_float32():
    """decoderesearch/SAELens#728: thresholds in bfloat16 stop learning, since a step is rounded
    away.
    """
    lm = qsae_kit.load_model("tiny", dtype="bfloat16")
    source = qsae_kit.LiveRows(lm, SITES[:1], lambda: qsae_kit.token_batches(lm, TEXTS * 60))
    config = qsae_kit.TrainConfig("jumprelu", sparsity=4, **SMALL)
    (made,) = qsae_kit.train_saes(source, [config], bar=False).saes().values()
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert not torch.equal(made.encoder, made.encoder.bfloat16().float())


def test_nothing_is_drawn_from_the_common_generator(lm, sae):
    """vgel/repeng#79: a vector comes out differently each time, from a generator that nobody
    seeded.
    """
    config = qsae_kit.TrainConfig("topk", sparsity=4, **SMALL)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        trained = qsae_kit.train_saes(StoredRows(rows()), [config], model_name="t", bar=False)
        sampled = lm.generate(PROMPTS, 3, do_sample=True, seed=np.int64(5)).tokens
        assert torch.equal(torch.get_rng_state(), before)
        made.append(([one.checksum() for one in trained.saes().values()], sampled))
    assert made[0] == made[1]


def test_one_block_of_rows_is_shuffled(lm):
    """decoderesearch/SAELens#11: with a single buffer the shuffling of activations never ends."""
    config = qsae_kit.TrainConfig("topk", sparsity=4, **SMALL | {"tokens": 256, "batch": 128})
    source = StoredRows(rows(n=130))
    (made,) = qsae_kit.train_saes(source, [config], model_name="t", bar=False).saes().values()
    assert made.origin.tokens == 256


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_few_rows_again_and_again_kill_no_sae(name):
    """decoderesearch/SAELens#543: the share of dead latents never falls; where few rows come again
    and again none is above a threshold of its own, and the encoder is set to 0 for good.
    """
    few = rows(n=12)["blocks.0.hook_resid_post"].repeat(100, 1)
    config = qsae_kit.TrainConfig(name, sparsity=4, **SMALL | {"expansion": 20, "tokens": 4096})
    source = StoredRows({"blocks.0.hook_resid_post": few})
    (made,) = qsae_kit.train_saes(source, [config], model_name="t", bar=False).saes().values()
    assert made.encode(few[:12]).count_nonzero() > 0
    assert made.encoder.norm(dim=1).min() > 0


def test_an_ablation_leaves_what_the_sae_does_not_explain(sae):
    """decoderesearch/SAELens#326: with the error term kept, an ablation changes nothing."""
    x = sae.W_dec[:4] * sae.origin.filter.median
    f = sae.encode(x)
    fires = int(f[0].argmax())
    changed = x + qsae_kit.ablate_features(sae, [fires]).delta(x)
    left = f.index_fill(-1, torch.tensor([fires]), 0)
    error = x - sae.decode(f)
    torch.testing.assert_close(changed, sae.decode(left) + error, atol=1e-4, rtol=1e-4)
    assert (changed - x)[0].norm() > 0


# --- figures of an evaluation


def test_figures_do_not_depend_on_how_tokens_lie_in_batches(lm, suite):
    """decoderesearch/SAELens#711: the mean squared error is divided by the tokens of a batch
    again.
    """
    whole, single = (
        evaluate_suite(lm, suite, qsae_kit.token_batches(lm, TEXTS * 4, batch_tokens=n), bar=False)
        for n in (10_000, 1)
    )
    pd.testing.assert_frame_equal(whole, single, rtol=1e-5, atol=1e-7)


def test_variance_is_around_the_mean(lm, suite, batches):
    """decoderesearch/SAELens#665: explained variance is taken around 0, so that a constant explains
    nearly all.
    """
    constants = {}
    for name, own in suite["v"].items():
        constants[name] = constant = copy.deepcopy(own)
        x = torch.cat(
            [lm.run_with_cache(b.ids, b.mask, names_filter=name)[1][name][b.keep] for b in batches]
        )
        constant.encoder.data.zero_()
        constant.b_enc.data.fill_(-1)
        constant.b_dec.data.copy_(x[own.origin.filter.keeps(x)].mean(0))
    table = evaluate_suite(lm, {"v": constants}, batches, bar=False)
    assert table["fvu"][table["category"] == "all"].tolist() == pytest.approx([1.0] * 3, abs=1e-4)


# --- data, files and arguments


def test_a_table_s_rows_are_read_and_a_mapping_s_names_are_not(lm):
    """huggingface/trl#465 and huggingface/datasets#2462: a data frame, or a data set with its
    splits, in place of rows; gone through, they give names.
    """
    records = [{"text": TEXTS[0], "id": 1}, {"text": TEXTS[1], "id": 2}]
    for given in (records, pd.DataFrame(records), Dataset.from_list(records)):
        assert list(read_documents(given)) == TEXTS
    splits = DatasetDict(train=Dataset.from_list(records))
    for given in (splits, {"text": TEXTS}):
        with pytest.raises(ValueError, match=r"give one of its parts, such as data\['train'\]"):
            list(read_documents(given))
    for given in (splits["train"], pd.DataFrame(records), records):
        with pytest.raises(ValueError, match=r"of the type dict was given.*read_documents"):
            next(qsae_kit.token_batches(lm, given))
    with pytest.raises(ValueError, match="A single text or path was given"):
        next(qsae_kit.token_batches(lm, TEXTS[0]))


def test_lines_need_not_have_the_same_fields(tmp_path):
    """huggingface/datasets#7169: JSON lines that lack a column of others are a CastError."""
    path = tmp_path / "mixed.jsonl"
    lines = [{"text": TEXTS[0], "meta": {"a": 1}}, {"id": "x", "text": TEXTS[1], "meta": None}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_documents(path)) == TEXTS


@pytest.mark.usefixtures("unchecked")
def test_what_can_be_gone_through_once_is_used_or_refused(lm, suite, batches, tmp_path):
    """huggingface/transformers#23809: "object of type ... has no len()" for data that are made as
    they are asked for; and what is used up trains on the rest.
    """
    made = evaluate_suite(lm, suite, iter(batches), bar=False)
    pd.testing.assert_frame_equal(made, evaluate_suite(lm, suite, batches, bar=False))
    with pytest.raises(ValueError, match="The batches were given as a generator; give a function"):
        qsae_kit.LiveRows(lm, SITES[:1], qsae_kit.token_batches(lm, TEXTS))
    used_up = qsae_kit.token_batches(lm, TEXTS)
    with pytest.raises(ValueError, match="the same iterator each time"):
        qsae_kit.LiveRows(lm, SITES[:1], lambda: used_up).fingerprint()
    with pytest.raises(ValueError, match="The documents were given as a list; give a function"):
        qsae_kit.build_index(lm, suite, TEXTS, tmp_path / "index")
    with pytest.raises(ValueError, match="The documents were given as a list; give a function"):
        qsae_kit.attached(lm, suite, TEXTS)


@pytest.mark.usefixtures("unchecked")
def test_one_where_a_list_is_asked_for(lm, sae):
    """TransformerLensOrg/TransformerLens#244: one where several are taken, such as a single token,
    is an AssertionError about a shape.
    """
    assert lm.to_str_tokens(torch.tensor([[2]])) == lm.to_str_tokens([2])
    assert lm.to_batch("Hello you").ids.tolist() == lm.to_tokens("Hello you").tolist()
    edit = qsae_kit.ablate_features(sae, [3])
    assert isinstance(edit, Edit)
    with pytest.raises(ValueError, match=r"give \[edit\]"):
        qsae_kit.applied(lm, edit)
    with pytest.raises(ValueError, match=r"give \[TrainConfig\(...\)\]"):
        qsae_kit.train_saes(StoredRows(rows()), qsae_kit.TrainConfig("topk"), model_name="t")
    with pytest.raises(ValueError, match=r"a list of whole numbers, such as \[3, 5\]"):
        qsae_kit.ablate_features(sae, 3)


def test_a_device_that_is_not_there_is_one_sentence(suite, tmp_path):
    """OpenMOSS/Llamascopium#65: "device cuda is invalid", from deep inside, for SAEs as for
    models.
    """
    qsae_kit.save_suite(suite, tmp_path)
    for device in ("gpu", "cuda:99"):
        for load in (
            lambda d: qsae_kit.load_model("tiny", device=d),
            lambda d: qsae_kit.load_suite(tmp_path, d),
            lambda d: qsae_kit.load_sae(tmp_path / "v" / SITE, d),
        ):
            with pytest.raises(ValueError, match=f"device '{device}' cannot be used .*'cpu'"):
                load(device)


def test_sizes_that_give_nothing_are_refused(lm):
    """jbloomAus/SAEDashboard#33: sizes that do not fit together are an error from a tensor's
    dimension, or nothing at all.
    """
    for size in (0, -5):
        with pytest.raises(ValueError, match=f"Batches of {size} tokens were asked for"):
            next(qsae_kit.token_batches(lm, TEXTS, batch_tokens=size))
        with pytest.raises(ValueError, match=f"of documents of {size}"):
            next(qsae_kit.token_batches(lm, TEXTS, policy=TokenPolicy(context_size=size)))
    for name in ("tokens", "top", "sampled", "sampled_tokens", "batch_tokens"):
        with pytest.raises(ValueError, match=f"{name}=0 was given; it must be 1 or more"):
            IndexConfig(**{name: 0})
    with pytest.raises(ValueError, match="before=-1 was given; it must be 0 or more"):
        IndexConfig(before=-1)


@pytest.mark.usefixtures("unchecked")
def test_paths_may_be_texts_of_any_signs(lm, suite, tmp_path):
    """Lightning-AI/lit-llama#247 and huggingface/datasets#7468: a path as a text is a TypeError;
    one with brackets, blanks or signs is not found.
    """
    folder = str(tmp_path / "läufe [1] #2 模型")
    config = qsae_kit.TrainConfig("topk", sparsity=4, **SMALL)
    qsae_kit.train_saes(
        StoredRows(rows()), [config], model_name="t", bar=False, folder=f"{folder}/run"
    )
    assert len(qsae_kit.read_log(f"{folder}/run"))
    qsae_kit.save_suite(suite, f"{folder}/suite")
    qsae_kit.save_sae(suite["v"][SITE], f"{folder}/one")
    qsae_kit.convert_suite(f"{folder}/suite", f"{folder}/again")
    for name in ("suite", "again"):
        read = qsae_kit.load_suite(f"{folder}/{name}")
        assert read.sae(Place("v", SITE)).checksum() == suite["v"][SITE].checksum()
    path = f"{folder}/texts ü.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps({"text": TEXTS[0]}) + "\n")
    assert list(read_documents(path)) == TEXTS[:1]
    lm.hf.save_pretrained(f"{folder}/model")
    lm.tokenizer.save_pretrained(f"{folder}/model")
    there = {p: p.stat().st_mtime_ns for p in (tmp_path.rglob("*"))}
    read = qsae_kit.load_model(f"{folder}/model")
    assert torch.equal(read("Hello you"), lm("Hello you"))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path.rglob("*"))} == there


def test_a_tied_model_is_read_from_what_transformers_wrote(lm, tmp_path):
    """huggingface/transformers#30202: the file of a model with tied embeddings lacks its output
    matrix, and others cannot read it; huggingface/huggingface_hub#2797: reading needs a folder
    that can be written to.
    """
    lm.hf.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    there = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    read = qsae_kit.load_model(str(tmp_path))
    assert read.hf.lm_head.weight is read.hf.model.embed_tokens.weight
    assert read.weights_digest() == lm.weights_digest()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == there


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_tables_and_tensors(lm, sae, suite, index, tmp_path):
    """jupyter-widgets/tutorial#185: "Object of type int64 is not JSON serializable"; and a tensor's
    truth is ambiguous.
    """
    column = pd.DataFrame({"feature": [3, 5]})["feature"]
    x = sae.W_dec[[3, 5, 9]] * sae.origin.filter.median
    wanted = qsae_kit.ablate_features(sae, [3, 5]).delta(x)
    for given in (column, column.to_numpy(), torch.tensor([3, 5]), (3, 5, 3)):
        assert torch.equal(qsae_kit.ablate_features(sae, given).delta(x), wanted)
    direction = torch.randn(lm.d_model, generator=generator())
    when = Condition("v", SITE, features=[column[0]], threshold=np.float32(0.5))
    steering = qsae_kit.Steering(
        (
            qsae_kit.Change("ablate", SITE, "v", features=column, when=when),
            qsae_kit.Change("add", SITE, direction=direction, median_norm=np.float64(3)),
            qsae_kit.Change("add", SITE, "v", column.to_numpy(), [1, 2], strength=np.float32(2)),
        )
    )
    steering.save(tmp_path / "edit.json", suite)
    assert qsae_kit.load_steering(tmp_path / "edit.json", suite) == steering
    assert hash(steering) is not None
    explorer = qsae_kit.FeatureExplorer(index)
    explorer.look(Feature(Place("v", SITE), column[0]))
    assert explorer.selected == 3
    explorer.close()


# --- the notebook


def widgets(lm, suite, index, batches):
    table = evaluate_suite(lm, suite, batches[:1], bar=False)
    return {
        "explorer": lambda: qsae_kit.FeatureExplorer(index),
        "tokens": lambda: qsae_kit.TokenActivations(lm, suite, PROMPTS[0]),
        "layers": lambda: qsae_kit.LayerLoss(table),
        "lab": lambda: qsae_kit.SteeringLab(lm, suite),
    }


def test_a_closed_widget_is_gone(lm, suite, index, batches):
    """jupyter-widgets/ipywidgets#2308 and manzt/anywidget#929: a closed widget leaves its layout
    behind, or is never freed.
    """
    for name, make in widgets(lm, suite, index, batches).items():
        before = len(registry._instances)
        made = make()
        seen = weakref.ref(made)
        made.close()
        assert len(registry._instances) == before, name
        del made
        gc.collect()
        assert seen() is None, name


def test_an_error_of_a_page_s_request_is_shown(lm, suite, index, batches):
    """jupyter-widgets/ipywidgets#2612: what a callback raises is seen nowhere in JupyterLab."""

    def fails(x, hook):
        raise RuntimeError("CUDA out of memory")

    shown = widgets(lm, suite, index, batches)["tokens"]()
    request = {"op": "look", "seq": 5, "text": "Hello you", "site": 0, "feature": -1}
    with lm.hooks(fwd_hooks=[(SITES[0], fails)]), pytest.raises(RuntimeError):
        shown.answer(request)
    assert shown.status == "RuntimeError: CUDA out of memory"
    shown.answer(request | {"seq": 6})
    assert shown.status == ""
    shown.close()


def test_figures_hold_no_nan(lm, suite, batches):
    """plotly/plotly.py#3470: NaN and infinity in a figure are no JSON, and nothing is drawn."""
    table = evaluate_suite(lm, suite, batches[:1], bar=False)
    table.loc[0, ["fvu", "delta_ce"]] = float("nan")
    table.loc[1, "delta_ce"] = float("inf")

    def refuse(name):
        raise ValueError(name)

    json.loads(qsae_kit.reconstruction_figure(table).to_json(), parse_constant=refuse)
    shown = qsae_kit.LayerLoss(table)
    page = shown.to_html()
    assert "Infinity" not in page.split("application/json")[1].split("</script>")[0]
    shown.close()


def test_names_are_no_formulas_and_no_markup(lm, suite, batches):
    """plotly/plotly.js#1380: two dollar signs in a label are read as a formula, tags as markup."""
    table = evaluate_suite(lm, suite, batches[:1], bar=False)
    table["variant"] = "<b>$x$ %{y}"
    names = {trace.name for trace in qsae_kit.reconstruction_figure(table).data}
    assert not any(sign in name for name in names for sign in ("$", "<b>", "%{"))
    assert all("&lt;b&gt;&#36;x&#36;" in name for name in names)


def test_a_bfloat16_model_reaches_tables_figures_and_pages(lm, suite, batches, tmp_path):
    """jbloomAus/SAEDashboard#6: a helper does not take the format of a bfloat16 model, and its
    dashboard fails.
    """
    half = qsae_kit.load_model("tiny", dtype="bfloat16")
    own = copy.deepcopy(suite)
    table = evaluate_suite(half, own, batches[:1], bar=False)
    assert set(table.dtypes[table.columns[5:]].map(str)) <= {"int64", "float64"}
    config = IndexConfig(tokens=200, top=3, sampled=5, before=6, after=2, batch_tokens=1024)
    built = qsae_kit.build_index(half, own, lambda: TEXTS * 9, tmp_path / "i", config, bar=False)
    explorer = qsae_kit.FeatureExplorer(qsae_kit.load_index(built, half, own))
    shown = qsae_kit.TokenActivations(half, own, PROMPTS[0])
    for widget in (explorer, shown):
        assert "application/json" in widget.to_html()
        widget.close()
    edit = qsae_kit.add_direction(SITE, torch.ones(half.d_model), 0.1, 1.0, "all")
    with qsae_kit.applied(half, [edit]):
        assert half("Hello you").dtype == torch.bfloat16


# --- the table


def test_the_table_names_tests_that_are_there_and_every_thread():
    table = (HERE / "README.md").read_text(encoding="utf-8").split("## Public reports")[1]
    named = re.findall(r"(?:`(test_\w+\.py)`: )?`(test_\w+)` \|\n", table)
    assert len(named) == table.count("\n| ") - 1  # without its header
    for file, name in named:
        text = (HERE / (file or "test_reports.py")).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in text, name
    own = Path(__file__).read_text(encoding="utf-8")
    threads = set(re.findall(r"[\w.-]+/[\w.-]+#\d+", own))
    assert threads <= set(re.findall(r"[\w.-]+/[\w.-]+#\d+", table))
    assert {name for file, name in named if not file} == set(
        re.findall(r"\ndef (test_\w+)\(", own)
    ) - {"test_the_table_names_tests_that_are_there_and_every_thread"}

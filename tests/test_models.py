"""HookedLM against the HF model itself and a forward written out by hand."""

import threading

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qsae_kit import load_model
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.lm.sources import TINY_WEIGHTS, public_name
from qsae_kit.pipelines.suite import suite_bytes
from qsae_kit.train.groups import group_of, plan_groups
from qsae_kit.train.recipe import default_recipe

PROMPTS = ["How do I thank the nurse?", "How do I cut the wood?", "How do I burn the teacher?"]


@pytest.fixture(scope="module")
def batch(lm):
    return lm.pad([lm.chat_tokens(p, enable_thinking=False) for p in PROMPTS], "left")


def plain_logits(lm, ids, mask):
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return lm.hf(
            input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).logits


def test_has_the_transformer_lens_hook_names(lm):
    per_block = tuple(
        (
            "hook_resid_pre hook_resid_mid hook_attn_out hook_mlp_out hook_resid_post attn.hook_z"
        ).split()
    )
    expected = {"hook_embed", "ln_final.hook_normalized"} | {
        f"blocks.{i}.{h}" for i in range(6) for h in per_block
    }
    assert set(lm.hook_dict) == expected


@torch.no_grad()
def test_logits_are_the_hf_models_to_the_bit(lm, batch):
    assert torch.equal(lm(batch.ids, batch.mask), plain_logits(lm, *batch))


@pytest.mark.parametrize(
    "no_op",
    [lambda x, hook: None, lambda x, hook: x, lambda x, hook: x.clone()],
    ids=["none", "same", "clone"],
)
@torch.no_grad()
def test_a_no_op_on_every_hook_point_changes_no_bit(lm, batch, no_op):
    fired = []

    def hook(x, hook):
        fired.append(hook.name)
        return no_op(x, hook)

    edited = lm.run_with_hooks(batch.ids, batch.mask, fwd_hooks=[(lambda name: True, hook)])
    assert set(fired) == set(lm.hook_dict)
    assert torch.equal(edited, plain_logits(lm, *batch))


@torch.no_grad()
def test_a_no_op_with_a_kv_cache_changes_no_bit(lm, batch):
    position_ids = (batch.mask.cumsum(1) - 1).clamp(min=0)

    def two_steps(cut):
        first = lm.hf(
            input_ids=batch.ids[:, :cut],
            attention_mask=batch.mask[:, :cut],
            position_ids=position_ids[:, :cut],
            use_cache=True,
        )
        return lm.hf(
            input_ids=batch.ids[:, cut:],
            attention_mask=batch.mask,
            position_ids=position_ids[:, cut:],
            past_key_values=first.past_key_values,
            use_cache=True,
        ).logits

    plain = two_steps(-3)
    with lm.hooks(fwd_hooks=[(lambda name: True, lambda x, hook: x.clone())]), lm._connected():
        assert torch.equal(two_steps(-3), plain)


def by_hand(lm, ids, edit_at, delta):
    """Qwen3's forward written out, with `delta` added at one hook point."""
    model = lm.hf.model

    def at(name, x):
        return x + delta if name == edit_at else x

    x = at("hook_embed", model.embed_tokens(ids))
    position_embeddings = model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for i, layer in enumerate(model.layers):
        x = at(f"blocks.{i}.hook_resid_pre", x)
        attn, norm = layer.self_attn, layer.input_layernorm(x)
        q = attn.q_norm(attn.q_proj(norm).unflatten(-1, (-1, attn.head_dim))).transpose(1, 2)
        k = attn.k_norm(attn.k_proj(norm).unflatten(-1, (-1, attn.head_dim))).transpose(1, 2)
        v = attn.v_proj(norm).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
        cos, sin = (p[:, None] for p in position_embeddings)

        def rotate(t, cos=cos, sin=sin):
            half = t.shape[-1] // 2
            return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin

        z = torch.nn.functional.scaled_dot_product_attention(
            rotate(q), rotate(k), v, is_causal=True, enable_gqa=True
        )
        z = z.transpose(1, 2)
        if f"blocks.{i}.attn.hook_z" == edit_at:
            z = z + delta.unflatten(-1, (-1, attn.head_dim))
        mid = at(
            f"blocks.{i}.hook_resid_mid",
            x + at(f"blocks.{i}.hook_attn_out", attn.o_proj(z.flatten(2))),
        )
        x = at(
            f"blocks.{i}.hook_resid_post",
            mid + at(f"blocks.{i}.hook_mlp_out", layer.mlp(layer.post_attention_layernorm(mid))),
        )
    normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.norm.variance_epsilon)
    return lm.hf.lm_head(model.norm.weight * at("ln_final.hook_normalized", normalized))


@pytest.mark.parametrize(
    "part",
    (
        "hook_resid_pre attn.hook_z hook_attn_out hook_resid_mid hook_mlp_out hook_resid_post "
        "embed final"
    ).split(),
)
@torch.no_grad()
def test_an_edit_equals_a_forward_written_by_hand(lm, part):
    name = {"embed": "hook_embed", "final": "ln_final.hook_normalized"}.get(
        part, f"blocks.2.{part}"
    )
    ids = torch.tensor([lm.chat_tokens(PROMPTS[0])])
    config, heads = lm.hf.config, part == "attn.hook_z"
    width = config.num_attention_heads * config.head_dim if heads else lm.d_model
    delta = torch.randn(1, ids.shape[1], width, generator=torch.Generator().manual_seed(1))
    shaped = delta.unflatten(-1, (-1, config.head_dim)) if heads else delta
    edited = lm.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook: x + shaped)])
    expected = by_hand(lm, ids, name, delta)
    assert not torch.allclose(edited, lm(ids), atol=1e-3)
    torch.testing.assert_close(edited, expected, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_the_residual_is_the_sum_of_its_parts(lm, batch):
    _, cache = lm.run_with_cache(batch.ids, batch.mask)
    for i in range(lm.n_layers):
        pre, attn, mid, mlp, post = (
            cache[f"blocks.{i}.hook_{p}"]
            for p in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        )
        assert torch.equal(mid, pre + attn)
        assert torch.equal(post, mid + mlp)
        if i:
            assert torch.equal(pre, cache[f"blocks.{i - 1}.hook_resid_post"])
    assert torch.equal(cache["hook_embed"], cache["blocks.0.hook_resid_pre"])
    torch.testing.assert_close(
        lm.hf.lm_head(lm.hf.model.norm.weight * cache["ln_final.hook_normalized"]),
        lm(batch.ids, batch.mask),
    )


def test_stops_after_the_deepest_wanted_site(lm, batch):
    reached = []
    handles = [
        m.register_forward_hook(lambda *_, n=n: reached.append(n))
        for n, m in enumerate((*lm.hf.model.layers, lm.hf.lm_head))
    ]
    try:
        out, cache = lm.run_with_cache(
            batch.ids, batch.mask, names_filter=["blocks.2.hook_mlp_out"], return_type=None
        )
    finally:
        [handle.remove() for handle in handles]
    assert out is None
    assert list(cache) == ["blocks.2.hook_mlp_out"]
    # layer 2 was left in its middle, later layers and the unembedding never ran
    assert reached == [0, 1]


def test_loss_ignores_padding(lm):
    texts = ["How do I cut the wood?", "Hello!"]
    separate = [
        lm(text, return_type="loss").item() * (len(lm.tokenizer(text).input_ids) - 1)
        for text in texts
    ]
    tokens = sum(len(lm.tokenizer(text).input_ids) - 1 for text in texts)
    assert lm(texts, return_type="loss").item() == pytest.approx(sum(separate) / tokens, rel=1e-4)


def test_gradients_flow_through_hooks(lm):
    kept = {}

    def hook(x, hook):
        kept["x"] = x.detach().requires_grad_()
        return kept["x"] * 1.0

    with lm.hooks(fwd_hooks=[("blocks.3.hook_resid_mid", hook)]):
        lm(PROMPTS[0], return_type="loss").backward()
    assert kept["x"].grad.abs().sum() > 0
    lm.hf.zero_grad()


def equal_up_to_ties(lm, prompt_ids, one, other, tolerance=1e-4):
    """Whether two greedy continuations agree, or first part at a token whose two best logits are
    closer than 1e-4.
    """
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            logits = lm(torch.tensor([prompt_ids + one[:i]]))[0, -1]
            return abs(float(logits[a] - logits[b])) < tolerance
    return len(one) == len(other)


@torch.no_grad()
def test_generation_is_the_same_cached_uncached_batched_and_streamed(lm):
    options = {"enable_thinking": False, "max_new_tokens": 40}
    alone = [lm.generate(p, **options) for p in PROMPTS]
    batched = lm.generate(PROMPTS, **options)
    uncached = lm.generate(PROMPTS, use_cache=False, **options)
    for i, p in enumerate(PROMPTS):
        ids = lm.chat_tokens(p, enable_thinking=False)
        for other in (batched, uncached):
            assert equal_up_to_ties(lm, ids, alone[i].tokens[0], other.tokens[i])
    streamed = [
        "".join(parts) for parts in zip(*lm.stream(PROMPTS, 40, enable_thinking=False), strict=True)
    ]
    assert streamed == batched.text
    assert all(batched.finished)


def test_sampling_repeats_under_its_seed_and_leaves_the_global_one_alone(lm):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    options = {"max_new_tokens": 30, "do_sample": True, "temperature": 1.5, "enable_thinking": True}
    first, second, other = (
        lm.generate([PROMPTS[0]] * 4, seed=s, **options).text for s in (1, 1, 2)
    )
    assert first == second != other
    assert torch.equal(torch.rand(1), expected)


def test_a_row_draws_the_same_whatever_else_is_in_the_batch(lm):
    options = {
        "max_new_tokens": 30,
        "do_sample": True,
        "temperature": 1.3,
        "top_k": 20,
        "enable_thinking": True,
    }
    batched = lm.generate(PROMPTS, seed=7, **options)
    for i, prompt in enumerate(PROMPTS):
        assert lm.generate(prompt, seed=7 + i, **options).tokens[0] == batched.tokens[i]
    twins = lm.generate([PROMPTS[0]] * 2, seed=[3, 3], **options)
    assert twins.tokens[0] == twins.tokens[1]


@torch.no_grad()
def test_draws_follow_the_distribution_and_its_cuts(lm):
    prompt, n = lm.to_chat("How do I thank the nurse?", enable_thinking=True), 3000
    logits = lm(prompt)[0, -1] / 3.0
    expected = logits.topk(5).values.softmax(0)
    out = lm.generate([prompt] * n, 1, chat=False, do_sample=True, temperature=3.0, top_k=5, seed=0)
    drawn = torch.tensor([row[0] for row in out.tokens])
    shares = torch.stack([(drawn == i).float().mean() for i in logits.topk(5).indices])
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt() + 1e-3).all()


@torch.no_grad()
def test_logprobs_are_the_models_own(lm):
    out = lm.generate(PROMPTS, 20, enable_thinking=False, do_sample=True, temperature=2.0, seed=1)
    for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        ids = lm.chat_tokens(prompt, enable_thinking=False)
        logits = lm(torch.tensor([ids + tokens]))[0, len(ids) - 1 : -1]
        direct = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), direct, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "no effect on a greedy answer"),
        ({"do_sample": True, "temperature": 0.0}, "temperature > 0"),
        ({"do_sample": True, "top_p": 1.5}, "0 < top_p <= 1"),
        ({"do_sample": True, "seed": [1, 2]}, "2 seeds were given for 1 prompts"),
    ],
)
def test_impossible_sampling(unchecked, lm, options, message):
    with pytest.raises(ValueError, match=message):
        lm.generate("Hi", **options)


def test_closing_a_stream_stops_the_model(lm):
    stream = lm.stream("How do I thank the nurse?", 400, enable_thinking=False)
    next(stream)
    stream.close()
    assert threading.active_count() < 10
    assert lm.lock.acquire(blocking=False)
    lm.lock.release()


def test_thinking_is_refused_where_the_template_ignores_it(lm):
    assert lm.has_thinking
    assert lm.to_chat("Hi", enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    tokenizer = AutoTokenizer.from_pretrained(TINY_WEIGHTS)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain = HookedLM(lm.hf, tokenizer)
    assert not plain.has_thinking
    with pytest.raises(ValueError, match="ignores it"):
        plain.to_chat("Hi", enable_thinking=False)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        plain.generate("Hi")


def test_text_and_tokens(lm):
    ids = lm.to_tokens("How do I cut the wood?")
    assert lm.to_string(ids) == "How do I cut the wood?"
    assert "".join(lm.to_str_tokens(ids[0])) == "How do I cut the wood?"
    assert lm.to_string([lm.to_single_token(" teacher")]) == " teacher"
    with pytest.raises(ValueError, match="tokens"):
        lm.to_single_token("The teacher has a code")
    assert lm.to_tokens(["Hi", "Hello there"], padding_side="left").shape[0] == 2


@torch.no_grad()
def test_a_pass_can_start_at_a_later_layer(lm):
    ids, mask = lm.to_batch(PROMPTS[:2], "left")
    names = ["blocks.3.hook_resid_post", "blocks.4.hook_attn_out"]
    logits, cache = lm.run_with_cache(ids, mask, names_filter=names)
    layers = [layer.forward for layer in lm.hf.model.layers]
    again, seen = lm.run_with_cache(
        ids, mask, names_filter=names, start_at_layer=4, residual=cache[names[0]]
    )
    assert torch.equal(logits, again)
    assert all(torch.equal(cache[name], seen[name]) for name in names)
    assert [layer.forward for layer in lm.hf.model.layers] == layers
    with pytest.raises(
        ValueError,
        match=r"blocks.2.hook_mlp_out has a hook, but its layer is left out by start_at_layer=4",
    ):
        lm.run_with_cache(
            ids,
            mask,
            names_filter="blocks.2.hook_mlp_out",
            start_at_layer=4,
            residual=cache[names[0]],
        )
    with (
        pytest.raises(ZeroDivisionError),
        lm.hooks([("blocks.5.hook_resid_pre", lambda x, hook: 1 / 0)]),
    ):
        lm(ids, mask, start_at_layer=4, residual=cache[names[0]])
    assert torch.equal(lm(ids, mask), logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm(torch.zeros(1, 513, dtype=torch.long)), "513 tokens.*context of 512"),
        (lambda lm: lm.generate("word " * 600), "context of 512"),
        (lambda lm: lm.generate("Hi", 600), "600 new"),
        (lambda lm: lm.generate("  "), "empty prompt"),
        (lambda lm: lm.generate([]), "No prompt"),
        (
            lambda lm: lm.run_with_cache("Hi", names_filter="blocks.9.hook_resid_post"),
            "no hook point 'blocks.9",
        ),
        (lambda lm: lm.run_with_cache("Hi", names_filter=["hook_resid"]), "no hook point"),
        (lambda lm: lm("Hi", return_type="both"), "return_type"),
        (lambda lm: lm(torch.zeros(3, dtype=torch.long)), "shape"),
        (lambda lm: lm("Hi", start_at_layer=2), "no residual; from layer 1 to 6"),
        (
            lambda lm: lm(torch.zeros(1, 4, dtype=torch.long), residual=torch.zeros(1, 4, 160)),
            "start_at_layer=0",
        ),
        (
            lambda lm: lm(
                torch.zeros(1, 4, dtype=torch.long),
                start_at_layer=2,
                residual=torch.zeros(1, 3, 160),
            ),
            r"\[1, 3, 160\]",
        ),
        (
            lambda lm: lm(
                torch.zeros(1, 4, dtype=torch.long),
                start_at_layer=7,
                residual=torch.zeros(1, 4, 160),
            ),
            "layer 1 to 6",
        ),
        (lambda lm: lm.to_batch([""]), "at least one token"),
    ],
)
def test_errors_name_what_was_given(unchecked, lm, call, message):
    with pytest.raises(ValueError, match=message):
        call(lm)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_other_llama_shaped_models_go_through(lm):
    torch.manual_seed(0)
    model = HookedLM(LlamaForCausalLM(LlamaConfig(**SMALL)).eval(), lm.tokenizer)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        edited = model.run_with_hooks(
            ids, fwd_hooks=[(lambda name: True, lambda x, hook: x.clone())]
        )
        assert torch.equal(edited, model.hf(ids).logits)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64)),
            "expected .model with .*found",
        ),
        (
            lambda: GraniteForCausalLM(GraniteConfig(**SMALL, residual_multiplier=0.2)),
            "scales or normalises",
        ),
    ],
    ids=["gpt2", "granite"],
)
def test_what_cannot_be_hooked_is_refused(lm, model, message):
    with pytest.raises(ValueError, match=message):
        HookedLM(model().eval(), lm.tokenizer)


# hidden_size, intermediate_size, layers, heads, tied embeddings, and the parameters of the released
# weights
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, True, 596_049_920),
    "1.7B": (2048, 6144, 28, 16, True, 1_720_574_976),
    "4B": (2560, 9728, 36, 32, True, 4_022_468_096),
    "8B": (4096, 12288, 36, 32, False, 8_190_735_360),
    "14B": (5120, 17408, 40, 40, False, 14_768_307_200),
    "32B": (5120, 25600, 64, 64, False, 32_762_123_264),
}


@pytest.mark.parametrize("size", QWEN3)
def test_qwen3_sizes_on_the_meta_device(lm, size):
    d, mlp, layers, heads, tied, n_parameters = QWEN3[size]
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=d,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = HookedLM(Qwen3ForCausalLM(config), lm.tokenizer)
    assert sum(p.numel() for p in model.hf.parameters()) == n_parameters
    names = [
        f"blocks.{layer}.{hook}"
        for layer in range(layers)
        for hook in ("hook_resid_post", "hook_mlp_out", "hook_attn_out")
    ]
    with torch.no_grad():
        logits, cache = model.run_with_cache(
            torch.zeros(2, 5, dtype=torch.long, device="meta"), names_filter=names
        )
    assert logits.shape == (2, 5, 151_936)
    assert {name: tuple(cache[name].shape) for name in names} == dict.fromkeys(names, (2, 5, d))

    recipe = default_recipe(d, len(names), tokens=10**8)
    sae = recipe.build(d, torch.device("meta"))
    parameters = sum(p.numel() for p in sae.parameters())
    one, two = (group_of([recipe], dict.fromkeys(names[:n], d)).bytes for n in (1, 2))
    assert two - one == pytest.approx(
        parameters * (4 + 8) + 4 * (recipe.pool + recipe.batch) * d, rel=1e-3
    )
    assert suite_bytes(recipe, [d] * len(names)) == pytest.approx(
        len(names) * 4 * parameters, rel=1e-3
    )
    groups = plan_groups([recipe], dict.fromkeys(names, d), 4 * two)
    assert [name for group in groups for name in group.sites] == names
    assert all(group.bytes <= 4 * two for group in groups)


def test_loads_from_a_folder_and_from_memory(lm, tmp_path):
    lm.hf.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    folder, memory = load_model(str(tmp_path)), load_model(lm.hf, tokenizer=lm.tokenizer)
    ids = lm.to_tokens(PROMPTS[0])
    with torch.no_grad():
        assert torch.equal(folder(ids), lm(ids))
        assert torch.equal(memory(ids), lm(ids))
    assert load_model(str(tmp_path), "bfloat16").dtype == torch.bfloat16
    assert load_model(str(tmp_path), "auto", "cpu").dtype == torch.float32
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="needs its tokenizer"):
        load_model(lm.hf)


def test_a_bridge_leaves_this_model_alone(lm):
    ids = lm.to_tokens(PROMPTS[0])
    with torch.no_grad():
        before = lm(ids)
        bridge = lm.to_bridge()
        _, cache = bridge.run_with_cache(ids)
        assert torch.equal(lm(ids), before)
    pattern = cache["blocks.0.attn.hook_pattern"]
    assert pattern.shape == (1, lm.hf.config.num_attention_heads, ids.shape[1], ids.shape[1])
    torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:3]))
    ours = lm.run_with_cache(ids)[1]["blocks.3.hook_resid_post"]
    torch.testing.assert_close(cache["blocks.3.hook_resid_post"], ours, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{home}/secret/my-model", "my-model"),
        ("my-model", "my-model"),
        ("./my-model", "my-model"),
        (".", "secret"),
        ("{home}/.cache/hub/models--Qwen--Qwen3-8B/snapshots/0a1b2c", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("tiny", "tiny"),
        ("~/models/x", "x"),
    ],
)
def test_what_files_say_of_a_model_names_no_place(tmp_path, monkeypatch, given, expected):
    (tmp_path / "secret" / "my-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "secret")
    assert public_name(given.format(home=tmp_path)) == expected


def test_a_model_of_a_folder_is_called_by_the_folder(lm, tmp_path, monkeypatch):
    folder = tmp_path / "secret" / "my-model"
    lm.hf.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    loaded = [load_model(str(folder)), load_model("secret/my-model")]
    loaded.append(load_model(loaded[0].hf, tokenizer=lm.tokenizer))
    assert [each.model_name for each in loaded] == ["my-model"] * 3


def test_a_model_s_digest_is_of_its_weights_and_not_of_their_format(lm):
    other = load_model("tiny", "bfloat16")
    assert other.weights_digest() == lm.weights_digest()
    with torch.no_grad():
        other.hf.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    assert other.weights_digest() != lm.weights_digest()

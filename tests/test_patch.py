"""Edits written into the weights: what plain transformers, PEFT and gguf make of them."""

import json
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from small import SITES, small_suite
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from qsae_kit import load_model
from qsae_kit.audit.agreement import agreement, nearest
from qsae_kit.audit.forms import near_forms, weight_form, why_not
from qsae_kit.audit.patch import ORIGINAL, WEIGHTS, patch, undo
from qsae_kit.cli.app import app
from qsae_kit.io.tensorfiles import read_tensors
from qsae_kit.lm.edits import applied
from qsae_kit.sae.store import save_suite
from qsae_kit.steer.changes import Change, Condition, Steering
from qsae_kit.world import world

SITE = "blocks.2.hook_resid_post"
PROMPTS = [d.messages[0]["content"] for d in world.dialogues(40, seed=5)]
NEW_TOKENS = 8


def direction(lm, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(lm.d_model, generator=generator).tolist())


def out_of_all(lm, seed=0, share=1.0):
    return Change(
        "project_out",
        SITE,
        direction=direction(lm, seed),
        strength=share,
        positions="every",
        everywhere=True,
    )


def constant(lm, hook_name, strength=0.4):
    along = direction(lm, 7)
    return Change(
        "add", hook_name, direction=along, strength=strength, median_norm=2.0, positions="every"
    )


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def check_same(lm, steering, model, tolerance=1e-4):
    """Logits and greedy answers of a plain model against the hooked one under a steering."""
    edits = steering.edits({})
    ids, mask = lm.to_batch([lm.to_chat(prompt) for prompt in PROMPTS], "left")
    with applied(lm, edits):
        steered = lm(ids, mask)
        said = lm.generate(PROMPTS, NEW_TOKENS).text
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=places).logits
    assert (logits - steered)[mask.bool()].abs().max() < tolerance
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    own = lm.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in own] == [text.strip() for text in said]
    assert (steered - lm(ids, mask))[mask.bool()].abs().max() > 100 * tolerance  # it does something


FAMILIES = {
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, lm, tmp_path_factory):
    """A small random model of a kind, with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        request.param,
        vocab_size=len(lm.tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        **FAMILIES[request.param],
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases too
    model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return load_model(str(folder), dtype="float32")


def test_directions_projected_out_in_plain_transformers(family, tmp_path):
    steering = Steering((out_of_all(family), out_of_all(family, 1, 0.7)))
    made = patch(family, steering, {}, tmp_path / "patched")
    assert made.rank == 2
    check_same(family, steering, plain(tmp_path / "patched"))
    again = load_model(str(tmp_path / "patched"), dtype="float32")
    check_same(family, steering, again.hf)


def test_constants_where_the_architecture_has_a_bias(family, tmp_path):
    for hook_name in ("hook_embed", "blocks.1.hook_attn_out", "blocks.2.hook_resid_post"):
        change = constant(family, hook_name)
        kind = family.config.model_type
        there = hook_name == "hook_embed" or (
            kind == "llama" or (kind == "qwen3" and "attn" in hook_name)
        )
        assert (why_not(family, change) == "") == there, (kind, hook_name)
        if there:
            steering = Steering((out_of_all(family), change))
            out = tmp_path / hook_name
            patch(family, steering, {}, out)
            check_same(family, steering, plain(out))
        else:
            with pytest.raises(ValueError, match=r"has no bias to add it to.*--nearest"):
                patch(family, Steering((change,)), {}, tmp_path / "no")
            assert not (tmp_path / "no").exists()


def test_constants_of_the_residual_stream_come_after_what_is_written(family, tmp_path):
    """At run time a constant behind a layer is added after its writers were changed."""
    behind = constant(family, "blocks.2.hook_resid_post", 2.0)
    if why_not(family, behind):
        pytest.skip(f"{family.config.model_type} has no bias there")
    steering = Steering((behind, out_of_all(family, 7)))
    patch(family, steering, {}, tmp_path / "patched")
    check_same(family, steering, plain(tmp_path / "patched"))


def test_an_adapter_of_unequal_ranks_in_peft(family, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    one = replace(out_of_all(family, 3), hook_name="blocks.2.hook_mlp_out", everywhere=False)
    steering = Steering((out_of_all(family), one))
    patch(family, steering, {}, tmp_path / "adapter", "lora")
    model = peft.PeftModel.from_pretrained(plain(family.hf.name_or_path), tmp_path / "adapter")
    check_same(family, steering, model.eval())


def test_a_patch_is_undone_to_the_bit(family, tmp_path):
    change = constant(family, "blocks.1.hook_attn_out")
    changes = (out_of_all(family), change) if not why_not(family, change) else (out_of_all(family),)
    patch(family, Steering(changes), {}, tmp_path / "patched")
    undo(tmp_path / "patched", tmp_path / "back")
    back, old = plain(tmp_path / "back"), family.hf.state_dict()
    told = [model.config.to_dict() for model in (back, plain(family.hf.name_or_path))]
    assert told[0] | {"_name_or_path": ""} == told[1] | {"_name_or_path": ""}
    assert set(back.state_dict()) == set(old)
    if back.config.tie_word_embeddings:
        assert "lm_head.weight" not in read_tensors(tmp_path / "back" / WEIGHTS)
    assert all(torch.equal(tensor, old[name]) for name, tensor in back.state_dict().items())
    with pytest.raises(ValueError, match="is there already"):
        undo(tmp_path / "patched", tmp_path / "back")
    with pytest.raises(ValueError, match=r"has no patch\.json"):
        undo(tmp_path / "back", tmp_path / "more")
    (tmp_path / "patched" / ORIGINAL).write_bytes(
        (tmp_path / "patched" / WEIGHTS).read_bytes()  # other values under the same names
    )
    with pytest.raises(ValueError, match="is not the tensor that was patched"):
        undo(tmp_path / "patched", tmp_path / "more")
    (tmp_path / "patched" / ORIGINAL).unlink()
    with pytest.raises(ValueError, match="without its original tensors"):
        undo(tmp_path / "patched", tmp_path / "more")


def test_an_adapter_in_peft(family, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    steering = Steering((out_of_all(family), out_of_all(family, 1, 0.7)))
    patch(family, steering, {}, tmp_path / "adapter", "lora")
    model = peft.PeftModel.from_pretrained(plain(family.hf.name_or_path), tmp_path / "adapter")
    check_same(family, steering, model.eval())


def test_an_adapter_is_the_change_of_every_matrix(family, tmp_path):
    """The same without PEFT: W + B A, and E + (B A)^T for the embedding."""
    steering = Steering((out_of_all(family), out_of_all(family, 1, 0.7)))
    patch(family, steering, {}, tmp_path / "adapter", "lora")
    held = read_tensors(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 2
    model = plain(family.hf.name_or_path)
    head = model.get_output_embeddings().weight.detach().clone()
    with torch.no_grad():
        for name, b in held.items():
            if name.endswith("lora_B.weight"):
                module = model.get_submodule(name.split(".", 2)[2].removesuffix(".lora_B.weight"))
                module.weight += b @ held[name.replace("lora_B", "lora_A")]
        key = "base_model.model.model.embed_tokens.lora_embedding_"
        model.lm_head.weight = torch.nn.Parameter(head)
        model.model.embed_tokens.weight += (held[f"{key}B"] @ held[f"{key}A"]).T
    check_same(family, steering, model)


def test_a_control_vector_is_read_by_gguf(family, tmp_path):
    changes = (
        constant(family, "blocks.2.hook_resid_post"),
        constant(family, "blocks.3.hook_resid_pre", -1.0),
    )
    steering = Steering(changes)
    made = patch(family, steering, {}, tmp_path / "v.gguf", "control-vector")
    assert made.tensors == ("direction.2",)
    reader = GGUFReader(tmp_path / "v.gguf")
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == family.config.model_type
    assert reader.fields["controlvector.layer_count"].contents() == 1
    model = plain(family.hf.name_or_path)
    for tensor in reader.tensors:  # as llama.cpp does: added to what the layer gives
        vector = torch.from_numpy(np.array(tensor.data))
        layer = model.model.layers[int(tensor.name.split(".")[1])]
        layer.register_forward_hook(lambda m, a, out, v=vector: added(out, v))
    check_same(family, steering, model)


def added(out, vector):
    return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector


def test_what_has_no_form_says_why_and_what_is_nearest(lm, tmp_path):
    suite = small_suite(lm)
    [(variant, saes)] = suite.items()
    hook_name = next(iter(saes))
    features = {"variant": variant, "features": (3,)}
    cases = {
        "acts under a condition": replace(out_of_all(lm), when=Condition(variant, hook_name, (1,))),
        "acts on the tokens 'header' alone": Change("add", hook_name, **features),
        "depends on the activations of an SAE": Change("ablate", hook_name, **features),
        "out of what earlier layers wrote": Change(
            "project_out", hook_name, positions="every", **features
        ),
    }
    for reason, change in cases.items():
        with pytest.raises(ValueError, match=f"Change 1 of 1 has no exact form.*{reason}"):
            weight_form(lm, Steering((change,)), suite)
        for near in near_forms(lm, Steering((change,)), suite):
            assert near.said
            assert weight_form(lm, near.steering, suite).writers
    heads = Change(
        "project_out", "blocks.1.attn.hook_z", direction=direction(lm), positions="every"
    )
    with pytest.raises(ValueError, match=r"nothing is written .* at blocks\.1\.attn\.hook_z"):
        weight_form(lm, Steering((heads,)), suite)
    exact = Steering((out_of_all(lm),))
    assert near_forms(lm, exact, suite) == [(exact, [])]


def test_the_nearest_form_is_the_one_that_says_the_most_alike(lm):
    away = Change(
        "add", SITE, direction=direction(lm), strength=-0.6, median_norm=9.0, positions="header"
    )
    steering = Steering((away,))
    edits = steering.edits({})
    tried = [
        agreement(lm, lm, PROMPTS, edits, near.steering.edits({}))
        for near in near_forms(lm, steering, {})
    ]
    _, found = nearest(lm, steering, {}, PROMPTS)
    assert len(tried) == 2
    assert found.kl_first == min(one.kl_first for one in tried) < max(one.kl_first for one in tried)
    same = agreement(lm, lm, PROMPTS[:4], edits, edits)
    assert (same.same, same.n, same.kl_first, same.largest) == (4, 4, 0.0, 0.0)
    with pytest.raises(ValueError, match="No prompt"):
        agreement(lm, lm, [])


def test_a_patch_by_the_command(lm, tmp_path):
    suite = small_suite(lm)
    save_suite(suite, tmp_path / "suite")
    features = Change(
        "project_out", SITES[0], "v", (3, 5), strength=1.2, positions="every", everywhere=True
    )
    Steering((features,)).save(tmp_path / "steering.json", suite)
    given = ["patch", str(tmp_path / "steering.json"), str(tmp_path / "suite"), "--out"]
    done = CliRunner().invoke(app, [*given, str(tmp_path / "mended")])
    assert "it gives the same answer to 32 of 32 prompts" in " ".join(done.output.split())
    assert CliRunner().invoke(app, [*given, str(tmp_path / "lora"), "--as", "lora"]).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    back = ["patch", "--undo", str(tmp_path / "mended"), "--out", str(tmp_path / "back")]
    assert f"As it was: {tmp_path / 'back'}" in CliRunner().invoke(app, back).output
    assert load_model(str(tmp_path / "back")).weights_digest() == lm.weights_digest()
    assert stat.S_IMODE((tmp_path / "mended" / WEIGHTS).stat().st_mode) == stat.S_IMODE(
        (tmp_path / "mended" / "config.json").stat().st_mode
    )

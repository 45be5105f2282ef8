"""Folders of models from elsewhere: no code of theirs runs, nothing is fetched, and what is damaged
or at odds is one sentence."""

import contextlib
import io
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qsae_kit import load_model
from qsae_kit.lm import modelfiles, sources
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.lm.sources import TINY_WEIGHTS

CODE = """
from pathlib import Path
Path({ran!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class Own(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = Own
"""


@pytest.fixture
def folder(tmp_path):
    """The bundled model as a folder that a test may damage."""
    shutil.copytree(TINY_WEIGHTS, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whatever asks the hub fails the test, but for what a test replaces itself."""

    def asked(*args, **kwargs):
        raise AssertionError(f"the hub was asked: {args} {kwargs}")

    monkeypatch.setattr("httpx.Client.send", asked)
    monkeypatch.setattr("socket.socket.connect", asked)


def edit(path, **entries):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | entries))


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(folder))
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


# --- code


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_never_run(folder, tmp_path, monkeypatch, name):
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(ran=str(ran)))
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    if name == "config.json":
        edit(folder / name, model_type="own", auto_map=own)
    else:
        edit(folder / "config.json", model_type="llama")
        edit(folder / name, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    if name == "config.json":
        refused(folder, "code that it brings is not run here; give a dense")
    else:
        with contextlib.suppress(ValueError):  # with a tokenizer of transformers it loads
            load_model(str(folder))
    assert not ran.exists()
    assert sys.stdin.read() == "y\n" * 9


def test_every_call_of_transformers_is_told_to_run_no_code(folder, monkeypatch):
    told = []
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        real = getattr(transformers, name).from_pretrained

        def call(*args, real=real, name=name, **kwargs):
            told.append((name, kwargs.get("trust_remote_code"), kwargs.get("local_files_only")))
            return real(*args, **kwargs)

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", call)
    load_model(str(folder))
    assert {name for name, *_ in told} == {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"}
    assert all(code is False and local for _, code, local in told)


def test_code_beside_a_known_model_is_left_alone(lm, folder, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(ran=str(ran)))
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.OwnModel"})
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(ran=str(ran)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    assert torch.equal(load_model(str(folder))("Hi"), lm("Hi"))
    assert not ran.exists()


ATTENTION = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")


@pytest.mark.parametrize("entry", ATTENTION)
@pytest.mark.parametrize("value", ["kernels-community/flash-attn", "flash_attention_2", "eager"])
def test_attention_is_sdpa_whatever_a_config_says(lm, folder, monkeypatch, entry, value):
    from transformers.integrations import hub_kernels

    for name in ("load_and_register_attn_kernel", "get_kernel"):
        if hasattr(hub_kernels, name):
            monkeypatch.setattr(hub_kernels, name, lambda *a, **k: pytest.fail("a kernel"))
    edit(folder / "config.json", **{entry: value})
    model = load_model(str(folder))
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model("Hi"), lm("Hi"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config by 'hqq'.*allowed"),
        ({"quantization_config": 7}, "quantization_config"),
        ({"transformers_weights": "../x.safetensors"}, "transformers_weights"),
        ({"configuration_files": ["config.9.json"]}, "configuration_files"),
        ({"fusion_config": {"a": True}}, "fusion_config"),
    ],
)
def test_entries_that_lead_elsewhere_are_refused(folder, entries, message):
    edit(folder / "config.json", **entries)
    refused(folder, message)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    refused(folder, "an adapter of 'someone/model'.*PeftModel.from_pretrained.*merge it")
    (folder / "config.json").unlink()
    refused(folder, "an adapter of 'someone/model'")
    (folder / "adapter_config.json").write_text("[]")
    refused(folder, "holds an adapter [(]")


def test_the_cache_of_a_repository_is_told_from_its_versions(folder):
    cache = folder.parent / "models--Qwen--Qwen3-8B"
    (cache / "snapshots").mkdir(parents=True)
    shutil.copytree(folder, cache / "snapshots" / "0123abc")
    refused(cache, "cache of the hub with several versions; give the folder of one")
    assert load_model(str(cache / "snapshots" / "0123abc")).model_name == "Qwen/Qwen3-8B"


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("bitsandbytes", "bitsandbytes"),
        ("awq", "gptqmodel"),
        ("gptq", "optimum"),
        ("compressed-tensors", "compressed_tensors"),
    ],
)
def test_quantised_weights_are_read_where_their_package_is(folder, monkeypatch, method, package):
    edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    monkeypatch.setattr(modelfiles, "find_spec", lambda name: None)
    refused(folder, f"by {method}, which the package {package} reads; install it")
    monkeypatch.setattr(modelfiles, "find_spec", lambda name: name)
    asked = []

    def from_pretrained(*args, **kwargs):
        asked.append(kwargs)
        raise ImportError("the package itself")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    refused(folder, "could not be loaded .the package itself")
    assert asked[0]["device_map"] == {"": torch.device("cpu")}


BLOCK = 32


def in_fp8(folder, block):
    """Writes a folder's matrices in FP8, and gives what they stand for."""
    path = folder / "model.safetensors"
    stored, meant = {}, {}
    for name, weight in load_file(path).items():
        stored[name] = meant[name] = weight.float()
        if weight.ndim == 2 and "layers" in name:
            rows, columns = (-(-n // block) for n in weight.shape)
            parts = torch.zeros(rows * block, columns * block)
            parts[: weight.shape[0], : weight.shape[1]] = weight
            parts = parts.view(rows, block, columns, block)
            scales = parts.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            packed = (parts / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            whole = (packed.float() * scales[:, None, :, None]).reshape(rows * block, -1)
            own = (slice(weight.shape[0]), slice(weight.shape[1]))
            packed = packed.reshape(rows * block, -1)
            stored |= {name: packed[own].contiguous(), f"{name}_scale_inv": scales}
            meant[name] = whole[own].contiguous()
    save_file(stored, path, {"format": "pt"})
    about = {"quant_method": "fp8", "weight_block_size": [block, block]}
    edit(folder / "config.json", quantization_config={**about, "activation_scheme": "dynamic"})
    return meant


def test_fp8_weights_are_what_they_stand_for(lm, folder):
    meant = in_fp8(folder, BLOCK)
    model = load_model(str(folder))
    found = model.hf.state_dict()
    assert model.dtype == torch.float32
    assert all(torch.allclose(found[name], weight, rtol=1e-6) for name, weight in meant.items())
    prompt = "How do I thank the nurse?"
    answers = [m.generate(prompt, 20, enable_thinking=False).text for m in (model, lm)]
    assert answers[0] == answers[1]
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16


def test_fp8_weights_that_end_within_a_block_are_refused(folder):
    """transformers would share the scales out evenly over them."""
    in_fp8(folder, 128)
    refused(folder, "in FP8 with .* which do not come out even")


def test_answers_do_not_depend_on_a_generation_config(lm, folder):
    odd = {"suppress_tokens": list(range(2000)), "penalty_alpha": 0.6, "num_beams": 4, "top_k": 4}
    edit(folder / "generation_config.json", no_repeat_ngram_size=2, **odd)
    edit(folder / "config.json", return_dict=False, output_hidden_states=True)
    model, prompt = load_model(str(folder)), "How do I thank the nurse?"
    answers = [m.generate(prompt, 20, enable_thinking=False) for m in (model, lm)]
    assert answers[0] == answers[1]


# --- the format of the weights


SAID = "is loaded in"


def test_where_no_format_is_asked_for_a_cpu_takes_its_fastest(folder, monkeypatch, capsys):
    monkeypatch.setattr(sources, "SMALL_MODEL", 0)
    for fastest, used, other in (
        (torch.bfloat16, "bfloat16", "float32"),
        (torch.float32, "float32", "bfloat16"),
    ):
        monkeypatch.setattr(sources, "fastest_dtype", lambda device, fastest=fastest: fastest)
        for dtype in (None, "auto"):
            assert load_model(str(folder), dtype, "cpu").dtype == fastest
            said = " ".join(capsys.readouterr().err.split())
            assert said.count(SAID) == 1
            assert f"{SAID} {used}," in said
            assert f'dtype="{other}" (--dtype {other})' in said
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert load_model(str(folder), dtype, "cpu").dtype == dtype
            assert SAID not in capsys.readouterr().err


def test_small_models_are_float32_on_every_cpu(folder, monkeypatch, capsys):
    monkeypatch.setattr(sources, "fastest_dtype", lambda device: torch.bfloat16)
    for source in ("tiny", str(folder)):
        assert load_model(source, device="cpu").dtype == torch.float32
    assert SAID not in capsys.readouterr().err
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert sources.default_dtype(sources.SMALL_MODEL - 1, "m", cpu) == torch.float32
    assert sources.default_dtype(sources.SMALL_MODEL, "m", cpu) == torch.bfloat16
    assert sources.default_dtype(sources.SMALL_MODEL, "m", gpu) == "auto"


# --- weights


def test_missing_tensors_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    for lacking, message in (
        (["model.layers.3.mlp.up_proj.weight"], r"lack 'model\.layers\.3\.mlp\.up.*' \(1 of"),
        ([n for n in tensors if ".layers.2." in n], r"lack 'model\.layers\.2\..*\(11 of"),
        (["model.norm.weight", "model.embed_tokens.weight"], r"lack 'model\.embed_tokens"),
    ):
        some = {name: t for name, t in tensors.items() if name not in lacking}
        save_file(some, folder / "model.safetensors", {"format": "pt"})
        refused(folder, message)


def test_tensors_of_another_shape_or_kind_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    save_file(tensors | {name: torch.ones(7)}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"layers\.1\.input_layernorm\.weight' of the shape \[7\].*describes \[160\]")
    whole = torch.ones(160, dtype=torch.int8)
    save_file(tensors | {name: whole}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "as I8; allowed")


def test_tensors_that_are_not_needed_are_a_warning(lm, folder):
    tensors = load_file(folder / "model.safetensors") | {"model.extra.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="hold 1 tensors .* such as 'model.extra.weight'"):
        model = load_model(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model("tiny")
    assert torch.equal(model("Hi"), lm("Hi"))


def shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in halves.items():
        save_file({name: tensors[name] for name in some}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, some in halves.items() for name in some}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_weights_in_several_files(lm, folder):
    index = shards(folder)
    assert torch.equal(load_model(str(folder))("Hi"), lm("Hi"))
    path = folder / "model.safetensors.index.json"
    for odd in ([], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 7}}, 7):
        path.write_text(json.dumps(odd))
        refused(folder, "no index of weights")
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"x": "../a.safetensors"}}))
    refused(folder, "no index of weights")
    path.write_text("[" * 100_000)
    refused(folder, "nested deeper")
    path.write_text(json.dumps(index))
    (folder / "b.safetensors").unlink()
    refused(folder, r"b\.safetensors' are missing")


def header(tensors):
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


CLAIM = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:1000],
        lambda whole: whole[:-1],
        lambda whole: b"garbage" * 1000,
        lambda whole: b"\xff" * 100,
        lambda whole: (2**62).to_bytes(8, "little") + whole[8:],
        lambda whole: header(CLAIM),
        lambda whole: header([]),
        lambda whole: (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)
def test_damaged_weights_are_one_sentence(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(folder, r"model\.safetensors' cannot be read \(.*\); get them again")


def test_weights_that_are_no_file(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "are missing")


@pytest.mark.parametrize("part", ["embed_tokens", "layers.5.mlp.down_proj", "norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder, part, value):
    name = f"model.{part}.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "logits that are not finite in torch.float32")


@pytest.mark.parametrize("do_sample", [False, True])
def test_answers_that_are_not_finite_are_refused(lm, do_sample):
    def too_much(x, hook):
        return x * float("inf")

    with lm.hooks([("blocks.3.hook_resid_post", too_much)]):
        with pytest.raises(ValueError, match="logits that are not finite: an edit is too strong"):
            lm.generate("Hi", 3, do_sample=do_sample)
        with pytest.raises(ValueError, match="not finite"):
            list(lm.stream("Hi", 3, do_sample=do_sample))


# --- configurations


def nested(depth):
    return '{"model_type": "qwen3", "a": ' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[]", "holds list, not an object"),
        ("7", "holds int"),
        ("{}", "of the model type 'None'"),
        ('{"model_type": ["qwen3"]}', "of the model type"),
        ('{"model_type": "no_such"}', "model type 'no_such', which transformers does not know;"),
        (nested(100_000), "nested deeper"),
        ('{"model_type": "qwen3", "vocab_size": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"model_type": "\xff"}', "not UTF-8"),
    ],
)
def test_configs_that_are_none(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, message)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": 10**12}, "describes a model of|could not be loaded"),
        ({"hidden_size": 10**30}, "could not be loaded"),
        ({"intermediate_size": 10**9}, "describes a model of"),
        ({"vocab_size": 10**10}, "describes a model of"),
        ({"vocab_size": -1}, "could not be loaded"),
        ({"vocab_size": 4095}, "of the shape|could not be loaded"),
        ({"hidden_size": -160}, "could not be loaded"),
        ({"hidden_size": 0}, "could not be loaded|describes|shape"),
        ({"hidden_size": "160"}, "could not be loaded"),
        ({"hidden_size": [160]}, "could not be loaded"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000; with the 68 tensors"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers=1000"),
        ({"num_hidden_layers": 900}, "describes a model of|lack|could not be loaded"),
        ({"num_hidden_layers": 0, "layer_types": []}, "no layers"),
        ({"num_hidden_layers": -3}, "num_hidden_layers=-3"),
        ({"num_hidden_layers": 7, "layer_types": ["full_attention"] * 7}, r"lack 'model.*\.6"),
        ({"num_labels": 10**12}, "num_labels"),
        ({"text_config": {"num_layers": 10**12}}, "num_layers"),
        ({"num_attention_heads": 0}, "could not be loaded|shape|describes"),
        ({"num_attention_heads": 10**9}, "could not be loaded|shape|describes"),
        ({"head_dim": 10**9}, "describes"),
        ({"layer_types": ["no_such"] * 6}, "could not be loaded"),
        ({"hidden_act": "no_such"}, "could not be loaded"),
        ({"rope_parameters": 7}, "could not be loaded"),
        ({"rope_parameters": {"rope_type": "no_such"}}, "could not be loaded"),
        ({"dtype": "no_such"}, "could not be loaded"),
        ({"get_text_config": 7}, "could not be loaded"),
        ({"to_dict": 7}, "could not be loaded"),
        ({"auto_map": 7}, "could not be loaded"),
        ({"tie_word_embeddings": False}, r"lack 'lm_head\.weight' \(1 of"),
        ({"model_type": "gpt2", "n_positions": 10**7}, "could not be loaded|describes"),
    ],
)
def test_configs_at_odds_with_their_weights(folder, entries, message):
    edit(folder / "config.json", **entries)
    refused(folder, message)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "", "could not be loaded"),
        ("tokenizer.json", "[]", "could not be loaded"),
        ("tokenizer.json", "[" * 100_000, "could not be loaded"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 7}}', "could not be loaded"),
        ("tokenizer_config.json", "[]", "could not be loaded"),
        ("tokenizer_config.json", "{", "could not be loaded"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "could not be loaded"),
        ("generation_config.json", "[]", "could not be loaded"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id=x|could not be"),
        ("generation_config.json", '{"eos_token_id": [1, NaN]}', "eos_token_id=.1, nan|could not"),
        ("generation_config.json", "[" * 100_000, "could not be loaded"),
    ],
)
def test_damaged_files_beside_the_weights(folder, name, text, message):
    (folder / name).write_text(text)
    refused(folder, message)


def test_a_cut_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:-1000])
    refused(folder, "could not be loaded")


# --- the hub


def test_of_a_repository_the_config_is_looked_at_before_its_weights(lm, folder, monkeypatch):
    brought = []

    def snapshot_download(repository, revision=None, allow_patterns=(), ignore_patterns=()):
        brought.append((revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    shards(folder)
    model = load_model("someone/model")
    assert (model.model_name, model.config._name_or_path) == ("someone/model", "someone/model")
    assert torch.equal(model("Hi"), lm("Hi"))
    assert [revision for revision, _ in brought] == [None, folder.name]
    assert not any("safetensors" in pattern for pattern in brought[0][1])
    assert {"a.safetensors", "b.safetensors"} < set(brought[1][1])
    brought.clear()
    edit(folder / "config.json", quantization_config={"quant_method": "hqq"})
    with pytest.raises(ValueError, match="not quantised"):
        load_model("someone/model")
    assert len(brought) == 1


def test_a_repository_that_cannot_be_had(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"'someone/model' could .* \(no network\); allowed"):
        load_model("someone/model")


def test_a_model_in_memory_is_tried_too(lm):
    import copy

    broken = copy.deepcopy(lm.hf)
    broken.model.layers[4].mlp.down_proj.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="logits that are not finite"):
        HookedLM(broken, lm.tokenizer, "broken")
    assert Path(TINY_WEIGHTS).is_dir()

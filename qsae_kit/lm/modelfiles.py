"""The folder of a Hugging Face model, looked at before transformers builds anything from it.

Its config.json is a claim of whoever made the folder: here it is read as data, held against the
headers of the weights, and what would lead transformers to other code or other files is refused.
"""

import math
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn

from qsae_kit.io.jsonfiles import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
REFUSED = {
    "compression_config": "give a checkpoint of the model that is not compressed",
    "fusion_config": "take it out",
    "distributed_config": "take it out",
    "configuration_files": "give the folder of one version of the model",
    "transformers_weights": f"call the weights {WEIGHTS}",
}
"""Entries of a config.json that lead to other packages, code or files, and what to do then."""
COUNTS = ("layer", "layers", "blocks", "experts", "labels")
"""Ends of the names of what a model has one thing each of; a list as long is made of each."""
COUNT = 1000
"""Of such things, at most, where the weights do not hold as many tensors."""
SLACK, SMALL = 2, 2**24
"""A model may have so many times the numbers that its files hold, and so many more; what of it
they lack is then told by name."""
DTYPES = ("F64", "F32", "F16", "BF16")
"""Formats of weights, as safetensors calls them."""
QUANTISED = "quantization_config"
METHODS = {
    "fp8": (),
    "bitsandbytes": ("bitsandbytes",),
    "awq": ("gptqmodel",),
    "gptq": ("optimum", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors",),
}
"""How weights may be quantised, as a config.json calls it, and the packages that read them; FP8 is
read without one, and used as what it stands for."""
PACKED = 8
"""Numbers that one of a quantised file may stand for: eight of four bits in an int32."""


class Held(NamedTuple):
    """What the header of a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: str


def check_folder(folder: Path) -> None:
    """ValueError unless a folder holds a config, weights and a tokenizer, and no adapter."""
    where = f"The folder {str(folder)!r}"
    check_adapter(folder)
    if not (folder / CONFIG).is_file() and (folder / "snapshots").is_dir():
        raise ValueError(
            f"{where} is a cache of the hub with several versions; give the folder of one, in its"
            " snapshots, or the model's id."
        )
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{where} has no {CONFIG}; give the folder of a Hugging Face checkpoint.")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{where} has no weights; put its *.safetensors files there.")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ValueError(f"{where} has no tokenizer; put its {TOKENIZERS[0]} there.")


def check_adapter(folder: Path) -> None:
    """ValueError for the folder of a PEFT adapter, with the way to use it."""
    if not (folder / ADAPTER).exists():
        return
    told = read_json(folder / ADAPTER, "an adapter's configuration")
    base = told.get("base_model_name_or_path") if isinstance(told, dict) else None
    of = f" of {str(base)[:80]!r}" if base else ""
    raise ValueError(
        f"The folder {str(folder)!r} holds an adapter{of} ({ADAPTER}), which is not loaded here; "
        "put it on its model by peft (PeftModel.from_pretrained) and give that: "
        "load_model(model, tokenizer=tokenizer), or merge it and save the whole."
    )


def quantised_by(config: dict[str, Any], path: Path) -> str:
    """How the weights that a config.json describes are quantised, a name of `METHODS`; empty where
    they are not.

    Raises ValueError for another method, and for one whose packages are not installed.
    """
    about = config.get(QUANTISED)
    if about is None:
        return ""
    method = str(about.get("quant_method") if isinstance(about, dict) else about)
    if method not in METHODS:
        raise ValueError(
            f"{str(path)!r} has {QUANTISED} by {method[:40]!r}, which is not read here; allowed "
            f"are {', '.join(METHODS)}, or give a checkpoint of the model that is not quantised."
        )
    lacking = [name for name in METHODS[method] if find_spec(name) is None]
    if lacking:
        raise ValueError(
            f"{str(path)!r} has {QUANTISED} by {method}, which the package {lacking[0]} reads; "
            "install it, or give a checkpoint of the model that is not quantised."
        )
    return method


def check_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises ValueError where it is no object, is of a model that transformers does not know, or has
    an entry that leads elsewhere, for an adapter beside it, and as `quantised_by`.
    """
    from transformers import CONFIG_MAPPING

    check_adapter(folder)
    path = folder / CONFIG
    config = read_json(path, "a model's configuration")
    if not isinstance(config, dict):
        found = type(config).__name__
        raise ValueError(f"{str(path)!r} holds {found}, not an object; get the file again.")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = ", and the code that it brings is not run here" if "auto_map" in config else ""
        raise ValueError(
            f"{str(path)!r} is of the model type {str(kind)[:80]!r}, which transformers does not "
            f"know{own}; give a dense Qwen3- or Llama-shaped model."
        )
    for name, advice in REFUSED.items():
        if config.get(name) is not None:
            raise ValueError(f"{str(path)!r} has {name}, which is not used here; {advice}.")
    quantised_by(config, path)
    return config


def weight_files(folder: Path) -> list[str]:
    """The names of the weights' files, told by an index where there is one.

    Raises ValueError for an index that is none, or that names files in other folders.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    index = read_json(folder / INDEX, "an index of weights")
    named = index.get("weight_map") if isinstance(index, dict) else None
    names = list(named.values()) if isinstance(named, dict) else []
    plain = [n for n in names if isinstance(n, str) and Path(n).name == n and "\\" not in n]
    if not names or len(plain) < len(names):
        raise ValueError(
            f"{str(folder / INDEX)!r} is no index of weights: it needs a weight_map of tensors and "
            "the files beside it; get it again."
        )
    return list(dict.fromkeys(plain))


def read_headers(folder: Path) -> dict[str, Held]:
    """What the weights of a folder hold, by their headers.

    Raises ValueError for a file that is missing or damaged.
    """
    held: dict[str, Held] = {}
    for name in weight_files(folder):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"The weights {str(path)!r} are missing; get the files again.")
        try:
            with safe_open(path, "pt") as file:  # its claims have to end where the file does
                parts = {key: file.get_slice(key) for key in file.keys()}
                held |= {k: Held(tuple(p.get_shape()), p.get_dtype()) for k, p in parts.items()}
        except (OSError, SafetensorError, ValueError, RuntimeError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            message = f"The weights {str(path)!r} cannot be read ({reason}); get them again."
            raise ValueError(message) from error
    return held


def check_counts(config: Any, held: dict[str, Held], folder: Path) -> None:
    """ValueError for more layers, or the like, than the weights could be of."""
    most = max(COUNT, len(held))
    for name, value in _entries(config):
        counted = isinstance(name, str) and name.endswith(COUNTS)
        if counted and isinstance(value, (int, float)) and not 0 <= value <= most:
            raise ValueError(
                f"{str(folder / CONFIG)!r} has {name}={str(value)[:20]}; with the {len(held):,} "
                f"tensors of its weights it can be 0 to {most:,}, so get the files again."
            )


def _entries(config: Any) -> Iterator[tuple[Any, Any]]:
    """Names and values of an object and of those in it."""
    if isinstance(config, dict):
        yield from config.items()
    for part in config.values() if isinstance(config, dict) else config:
        if isinstance(part, (dict, list)):
            yield from _entries(part)


def check_claim(model: nn.Module, held: dict[str, Held], folder: Path, quantised: str = "") -> None:
    """ValueError where a model would be larger than what its files hold, or these are quantised
    without its config.json saying so.

    model: as its config.json describes it, on the meta device, where it takes no memory.
    quantised: how, as `quantised_by` tells.
    """
    shapes = [tensor.shape for tensor in (*model.parameters(), *model.buffers())]
    wanted = sum(math.prod(shape) for shape in shapes)
    there = sum(math.prod(one.shape) for one in held.values()) * (PACKED if quantised else 1)
    names = list(model.state_dict())
    if wanted > SLACK * there + SMALL:
        lacking = [name for name in names if name not in held]
        first = f", {lacking[0]!r} among those that are missing" if lacking else ""
        raise ValueError(
            f"{str(folder / CONFIG)!r} describes a model of {wanted:,} numbers, but its weights "
            f"hold {there:,}{first}; get the folder's files again."
        )
    other = [name for name in names if name in held and held[name].dtype not in DTYPES]
    if other and not quantised:
        raise ValueError(
            f"The weights in {str(folder)!r} have {other[0]!r} as {held[other[0]].dtype}; allowed "
            f"are {', '.join(DTYPES)}, so give a checkpoint that is not quantised."
        )


SCALE, BLOCK = "_scale_inv", (128, 128)
"""What the scales of an FP8 weight are called after it, and the block of one where none is told."""


def check_blocks(config: dict[str, Any], held: dict[str, Held], folder: Path) -> None:
    """ValueError for FP8 weights that end within a block of a scale: transformers would share the
    scales out evenly over them, which makes other weights.
    """
    block = config[QUANTISED].get("weight_block_size") or BLOCK
    for name, weight in held.items():
        scale = held.get(name + SCALE)
        if scale is None or len(scale.shape) != len(weight.shape):
            continue
        for size, scales, width in zip(weight.shape, scale.shape, block, strict=False):
            if scales > 1 and size != scales * width:
                raise ValueError(
                    f"The weights in {str(folder)!r} have {name!r} of {list(weight.shape)} in FP8"
                    f" with {list(scale.shape)} scales for blocks of {list(block)}, which do not"
                    " come out even; give a checkpoint that is not quantised."
                )


def check_loaded(model: nn.Module, info: dict[str, Any], folder: Path) -> None:
    """ValueError for tensors that were missing or of another shape; a warning for others.

    info: what transformers says of the loading; what is missing it has filled at random.
    """
    rank = {name: number for number, name in enumerate(model.state_dict())}
    missing = sorted(info["missing_keys"], key=lambda name: rank.get(name, len(rank)))
    if missing:
        raise ValueError(
            f"The weights in {str(folder)!r} lack {missing[0]!r} ({len(missing)} of {len(rank)} "
            "tensors are missing); get them again."
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, wanted = mismatched[0][:3]
        raise ValueError(
            f"The weights in {str(folder)!r} have {name!r} of the shape {list(found)}, {CONFIG} "
            f"describes {list(wanted)} ({len(mismatched)} such tensors); get both again."
        )
    if info["error_msgs"]:
        reason = str(info["error_msgs"][0]).strip().splitlines()[0]
        raise ValueError(f"The weights in {str(folder)!r} do not fit ({reason}); get them again.")
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        warnings.warn(
            f"The weights in {str(folder)!r} hold {len(unexpected)} tensors that the model does "
            f"not have, such as {unexpected[0]!r}; they are left out.",
            stacklevel=2,
        )

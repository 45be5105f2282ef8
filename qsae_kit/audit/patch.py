"""An edit out of this package: a checkpoint, a LoRA adapter or a control vector, and back again."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from qsae_kit.audit.forms import (
    BESIDE,
    EMBEDDING,
    Affine,
    LowRank,
    WeightForm,
    changed_tensors,
    weight_form,
    why_not,
    writers_of,
    written,
)
from qsae_kit.io.files import atomic_file, atomic_folder, write_text
from qsae_kit.io.jsonfiles import read_json
from qsae_kit.io.tensorfiles import read_tensors, write_tensors
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.lm.placement import check_plain
from qsae_kit.sae.suites import ByVariant
from qsae_kit.steer.changes import Steering

Form = Literal["checkpoint", "lora", "control-vector"]
FORMS: tuple[Form, ...] = get_args(Form)
WEIGHTS, ORIGINAL, ABOUT = "model.safetensors", "original.safetensors", "patch.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONFIG = "config.json"
FORMAT = 1
TIED = "lm_head.weight"


class Patched(NamedTuple):
    """What was written."""

    path: Path
    """A folder, or the file of a control vector."""
    tensors: tuple[str, ...]
    """Names of the changed ones, in transformers; of a control vector in GGUF."""
    rank: int
    """Of the largest change of a matrix; of added constants 0."""


def patch(
    lm: HookedLM,
    steering: Steering,
    suite: ByVariant,
    out: str | Path,
    form: Form = "checkpoint",
    undoable: bool = True,
) -> Patched:
    """Writes a model that does by itself what a steering does at run time, for other tools.

    checkpoint: a folder that plain transformers load: all weights in the format that the model is
        loaded in, config and tokenizer, `patch.json` with what was done, and, if `undoable`, the
        tensors as they were (`undo`). Tied embeddings are untied where the embedding changes.
    lora: a folder in the format of PEFT, to be loaded on the same model.
    control-vector: a .gguf file for llama.cpp, for constants behind layers.

    Raises ValueError for a steering without an exact form (`forms.weight_form`), one that the form
    cannot hold, for a path where something is already, and for a model whose weights are not plain
    (on disk, quantised, with adapters).
    """
    if checked_form(form) == "control-vector":
        return _control_vector(lm, steering, suite, _free(out))
    check_plain(lm.hf, lm.model_name)
    change = weight_form(lm, steering, suite)
    done = {"steering": json.loads(steering.to_json(suite))}
    return write_form(lm, change, done, out, form, undoable)


def write_form(
    lm: HookedLM,
    change: WeightForm,
    done: Mapping[str, Any],
    out: str | Path,
    form: Form = "checkpoint",
    undoable: bool = True,
) -> Patched:
    """Writes changes of a model's writers as `patch` does.

    done: what was done, for `patch.json`: JSON values by name. Raises ValueError as `patch`, and
    for a control vector, which is no change of weights.
    """
    path = _free(out)
    if checked_form(form) == "control-vector":
        raise ValueError(
            "A change of weights is no control vector; write a checkpoint or a LoRA adapter."
        )
    check_plain(lm.hf, lm.model_name)
    if form == "lora":
        return _adapter(lm, change, path)
    return _checkpoint(lm, change, done, path, undoable)


def _free(out: str | Path) -> Path:
    """A path where nothing is; else ValueError."""
    path = Path(out)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} is there already; give a new name.")
    return path


def checked_form(name: str) -> Form:
    """ValueError for a form that there is not."""
    for form in FORMS:
        if name == form:
            return form
    raise ValueError(f"A patch as {name!r} was asked for; choose from {', '.join(FORMS)}.")


# --- a checkpoint


def _checkpoint(
    lm: HookedLM, change: WeightForm, done: Mapping[str, Any], out: Path, undoable: bool
) -> Patched:
    held = lm.hf.state_dict()
    untied = _owned(held)
    new, entries, kinds = changed_tensors(lm, change)
    if entries.get("tie_word_embeddings") is False:
        untied[TIED] = lm.hf.get_output_embeddings().weight.detach().clone()
    zeros = dict(_zero_biases(lm, kinds, new))
    tensors = {**untied, **zeros, **new}
    with atomic_folder(out) as part:
        for own in (lm.config, lm.hf.generation_config, lm.tokenizer):
            own.save_pretrained(part)
        before = read_json(part / CONFIG, "a model's configuration")
        write_text(part / CONFIG, json.dumps({**before, **entries}, indent=2) + "\n")
        write_tensors(_apart(tensors), part / WEIGHTS, {"format": "pt"})
        if undoable:
            old = {name: held[name] for name in new if name in held}
            write_tensors(_apart(old), part / ORIGINAL, {"format": "pt"})
        about = {
            "qsae_kit_patch": FORMAT,
            "model": lm.model_name,
            "weights": lm.weights_digest(),
            "dtype": str(lm.dtype).removeprefix("torch."),
            **done,
            "changed": sorted(new),
            "added": sorted(set(tensors) - set(_owned(held))),
            "original": {name: _digest(held[name]) for name in new if name in held},
            "config": before,
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }
        write_text(part / ABOUT, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return Patched(out, tuple(sorted(new)), change.rank)


def _owned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without those that are another one under a second name."""
    seen = set[tuple[int, tuple[int, ...]]]()
    out = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in seen:
            out[name] = tensor
        seen.add(key)
    return out


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _zero_biases(
    lm: HookedLM, kinds: Any, new: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Biases that a model has when the config switches them on, but for those that are written."""
    for kind in kinds:
        for layer in range(lm.n_layers):
            for own in (kind, *BESIDE[kind]):
                name = f"model.layers.{layer}.{own}"
                module: Any = lm.hf.get_submodule(name)
                if module.bias is None and f"{name}.bias" not in new:
                    size = module.weight.shape[0]
                    yield f"{name}.bias", torch.zeros(size, dtype=module.weight.dtype)


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def undo(folder: str | Path, out: str | Path) -> Path:
    """Writes the checkpoint as it was before it was patched, to the bit, to another folder.

    Raises ValueError for a folder that is no patched checkpoint, that was written without what it
    takes, or whose original tensors are not those that were noted.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / ABOUT).is_file():
        raise ValueError(f"{str(folder)!r} has no {ABOUT}; give the folder of a patched model.")
    about = read_json(folder / ABOUT, "a patch")
    kinds = {"original": dict, "config": dict, "added": list}
    if not isinstance(about, dict) or not all(
        isinstance(about.get(name), kind) for name, kind in kinds.items()
    ):
        raise ValueError(f"{str(folder / ABOUT)!r} was not written by this package.")
    if not (folder / ORIGINAL).is_file():
        raise ValueError(
            f"{str(folder)!r} was written without its original tensors; take the model that was"
            f" patched, {about.get('model')!r}."
        )
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} is there already; give a new name.")
    now, old = read_tensors(folder / WEIGHTS), read_tensors(folder / ORIGINAL)
    wrong = [name for name, told in about["original"].items() if _of(old, name) != told]
    if wrong:
        raise ValueError(
            f"{wrong[0]} in {str(folder / ORIGINAL)!r} is not the tensor that was patched; get the"
            " folder again."
        )
    tensors = {name: tensor for name, tensor in now.items() if name not in about["added"]} | old
    with atomic_folder(out) as part:
        for path in folder.iterdir():
            if path.is_file() and path.name not in (WEIGHTS, ORIGINAL, ABOUT, CONFIG):
                (part / path.name).write_bytes(path.read_bytes())
        write_text(part / CONFIG, json.dumps(about["config"], indent=2) + "\n")
        write_tensors(_apart(tensors), part / WEIGHTS, {"format": "pt"})
    return out


def _of(tensors: Mapping[str, Tensor], name: str) -> str:
    return _digest(tensors[name]) if name in tensors else ""


# --- an adapter


def _adapter(lm: HookedLM, change: WeightForm, out: Path) -> Patched:
    """LoRA has B A added to a matrix: U (V^T W), and for the rows of an embedding (E V) U^T; what
    is added to a matrix is U V^T itself.
    """
    tensors: dict[str, Tensor] = {}
    for name in change.modules:
        module: Any = lm.hf.get_submodule(name)
        one = change.writers.get(name, Affine.none(lm.d_model))
        if one.adds or (name in change.writers and getattr(module, "bias", None) is not None):
            raise ValueError(
                f"The edit changes a bias of {name}, which a LoRA adapter does not hold; write a"
                " checkpoint."
            )
        wide = module.weight.detach().double().cpu()
        right = wide @ one.v if name == EMBEDDING else wide.T @ one.v
        parts = [LowRank(one.u, right), *(m for n, m in change.added.items() if n == name)]
        missing = change.rank - change.rank_of(name)
        b, a = (
            torch.nn.functional.pad(torch.cat(sides, 1), (0, missing))
            for sides in ([part.u for part in parts], [part.v for part in parts])
        )
        key = f"base_model.model.{name}"
        names = ("lora_A.weight", "lora_B.weight")
        if name == EMBEDDING:
            names = ("lora_embedding_A", "lora_embedding_B")
        pair = dict(zip(names, (a.T, b), strict=True))
        tensors |= {f"{key}.{part}": t.float().contiguous() for part, t in pair.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.model_name,
        "r": change.rank,
        "lora_alpha": change.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in change.modules}),
        "modules_to_save": None,
        "ensure_weight_tying": False,
    }
    with atomic_folder(out) as part:
        write_tensors(tensors, part / ADAPTER, {"format": "pt"})
        write_text(part / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    return Patched(out, tuple(sorted(tensors)), change.rank)


# --- a control vector


def _control_vector(lm: HookedLM, steering: Steering, suite: ByVariant, out: Path) -> Patched:
    """`direction.L` is added to what layer L gives, at every token; llama.cpp begins with layer
    1.
    """
    from gguf import GGUFWriter

    if out.suffix != ".gguf":
        raise ValueError(f"A control vector is a .gguf file; {str(out)!r} was given.")
    points = list(writers_of(lm))
    vectors: dict[int, Tensor] = {}
    for number, change in enumerate(steering.changes, 1):
        reason = why_not(lm, change) if change.action != "add" else _not_behind_a_layer(change)
        if change.action != "add":
            reason = reason or "it projects a direction out, and a control vector is added"
        if reason:
            raise ValueError(f"Change {number} is in no control vector: {reason}.")
        layer = (points.index(written(change.hook_name)) - 1) // 2
        if layer < 1:
            raise ValueError(
                f"Change {number} is in no control vector: llama.cpp adds behind layer 1 and later."
            )
        unit, median = change.line(suite)
        step = change.strength * median * unit.double().cpu()
        vectors[layer] = vectors.get(layer, torch.zeros_like(step)) + step
    with atomic_file(out) as part:
        writer = GGUFWriter(part, "controlvector")
        writer.add_string("controlvector.model_hint", str(lm.config.model_type))
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", vector.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Patched(out, tuple(f"direction.{layer}" for layer in sorted(vectors)), 0)


def _not_behind_a_layer(change: Any) -> str:
    if change.when is not None:
        return "it acts under a condition alone"
    if change.positions != "every":
        return f"it acts on the tokens {change.positions!r} alone"
    if not change.hook_name.endswith(("hook_resid_post", "hook_resid_pre", "hook_mlp_out")):
        return f"llama.cpp adds behind a layer, and {change.hook_name} is inside of one"
    return ""

"""SAE folders and stored activations on disk, in SAELens's layout (sae-lens >= 6).

A folder holds `cfg.json` and `sae_weights.safetensors`; a suite is `<suite>/<variant>/<hook name>/`. What this package
adds (median norm, filter, figures) sits in cfg.json's `metadata`, where SAELens keeps what it does not know.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qsae_kit.activations import NormFilter, Rows
from qsae_kit.files import atomic_file, atomic_folder
from qsae_kit.sae import ARCHITECTURES, SAE, Provenance
from qsae_kit.sites import parse_hook_name

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`save_file`, whose own error for a full disk is neither an OSError nor a ValueError."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.parent} could not take a file of tensors ({error}); free some space and run it again.") from error


def save_sae(sae: SAE, folder: Path) -> None:
    """Writes one SAE folder, whole or not at all. Raises ValueError for an SAE without provenance."""
    origin = sae.provenance
    if origin is None:
        raise ValueError("This SAE has no provenance (site, model, filter); set sae.provenance before saving it.")
    sae = sae.exported()
    wrong = [name for name, tensor in sae.tensors().items() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(f"The SAE of {origin.hook_name} has values that are not finite in {', '.join(wrong)}; train it again.")
    config = sae.describe() | {
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "model_name": origin.model_name,
            "hook_name": origin.hook_name,
            "hook_head_index": None,
            "context_size": origin.context_size,
            "prepend_bos": False,
            "exclude_special_tokens": False,
            "qsae_kit": {
                "sparsity": sae.sparsity,
                "median_norm": origin.filter.median,
                "norm_factor": origin.filter.factor,
                "drop_template": origin.drop_template,
                "tokens": origin.tokens,
                "seed": origin.seed,
                "figures": origin.figures,
            },
        },
    }
    with atomic_folder(folder) as part:
        tensors = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in sae.tensors().items()}
        write_tensors(tensors, part / WEIGHTS)
        (part / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_sae(folder: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Reads a folder written by `save_sae`, to the same bits. Raises ValueError for anything that is not one."""
    folder = Path(folder)
    config = _read_config(folder)
    kit = config["metadata"].get("qsae_kit")
    if kit is None:
        raise ValueError(f"{str(folder)!r} was not written by qsae_kit: its cfg.json has no metadata.qsae_kit.")
    architecture = config.get("architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{str(folder)!r} holds a {architecture!r} SAE; known are {', '.join(ARCHITECTURES)}.")
    meta = config["metadata"]
    try:
        provenance = Provenance(
            model_name=meta["model_name"],
            hook_name=meta["hook_name"],
            filter=NormFilter(float(kit["median_norm"]), float(kit["norm_factor"])),
            drop_template=bool(kit["drop_template"]),
            context_size=int(meta["context_size"]),
            tokens=int(kit["tokens"]),
            seed=int(kit["seed"]),
            figures=dict(kit["figures"]),
        )
        sae = ARCHITECTURES[architecture](int(config["d_in"]), int(config["d_sae"]), float(kit["sparsity"]), provenance)
    except KeyError as error:
        raise ValueError(f"{str(folder / CONFIG)!r} lacks {error}; train or save the SAE again.") from error
    parse_hook_name(provenance.hook_name)
    sae.load_tensors(_read_weights(sae, folder))
    return sae.to(device).eval().requires_grad_(False)


def _read_weights(sae: SAE, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that an SAE needs, checked for shape before and for finiteness after they are read."""
    shapes = {name: tuple(parameter.shape) for name, parameter in sae.tensors().items()}
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            if found != shapes:
                raise ValueError(f"{str(folder / WEIGHTS)!r} holds tensors {found}, expected {shapes}.")
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(folder / WEIGHTS)!r} cannot be read ({error}); copy or train it again.") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{str(folder / WEIGHTS)!r}: {name} has values that are not finite; train it again.")
    return tensors


def load_saelens(folder: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Reads a folder written by SAELens 6 (standard, topk or jumprelu): weights only, it names no site and no filter here.

    What SAELens applies on use (the decoder's bias taken off the input, activations scaled by decoder norms) is folded into
    the weights. Raises ValueError for other architectures and for normalised inputs, which need their own data.
    """
    folder = Path(folder)
    config = _read_config(folder)
    architecture, normalised = config.get("architecture"), config.get("normalize_activations", "none")
    if architecture not in ("standard", "topk", "jumprelu") or normalised != "none":
        raise ValueError(
            f"{str(folder)!r} holds a {architecture!r} SAE of inputs normalised by {normalised!r}; allowed are standard, topk and "
            "jumprelu without normalisation."
        )
    try:
        sae = ARCHITECTURES[architecture](int(config["d_in"]), int(config["d_sae"]), float(config.get("k", 1)))
    except KeyError as error:
        raise ValueError(f"{str(folder / CONFIG)!r} lacks {error}; copy the folder again.") from error
    tensors = _read_weights(sae, folder)
    if config.get("apply_b_dec_to_input"):
        tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
    if config.get("rescale_acts_by_decoder_norm"):
        norms = tensors["W_dec"].norm(dim=-1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms, tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    sae.load_tensors(tensors)
    return sae.to(device).eval().requires_grad_(False)


def is_saelens(folder: str | Path) -> bool:
    """Whether an SAE folder was written by SAELens rather than by this package."""
    return "qsae_kit" not in _read_config(Path(folder))["metadata"]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is no SAE folder: it has no {CONFIG}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error.msg}, line {error.lineno}).") from error
    if not isinstance(config, dict) or not isinstance(config.get("metadata"), dict):
        raise ValueError(f"{str(path)!r} is no SAE configuration: it has no metadata.")
    return config


def load_suite(folder: str | Path, device: str | torch.device = "cpu") -> dict[str, dict[str, SAE]]:
    """`{variant: {hook name: SAE}}` of every SAE below a suite's folder, sites in the model's order.

    Raises ValueError where there is none.
    """
    folder = Path(folder)
    suite: dict[str, dict[str, SAE]] = {}
    for config in sorted(folder.glob(f"*/*/{CONFIG}")):
        if config.parent.name.startswith("."):  # half-written by a run that was killed
            continue
        suite.setdefault(config.parent.parent.name, {})[config.parent.name] = load_sae(config.parent, device)
    if not suite:
        raise ValueError(f"{str(folder)!r} holds no SAEs; a suite is a folder of <variant>/<hook name>/{CONFIG}.")

    def place(hook_name: str) -> tuple[int, str]:
        site = parse_hook_name(hook_name)
        return site.layer, site.kind

    return {variant: {name: saes[name] for name in sorted(saes, key=place)} for variant, saes in suite.items()}


def save_suite(suite: dict[str, dict[str, SAE]], folder: Path) -> None:
    """Writes `<folder>/<variant>/<hook name>/` for every SAE."""
    for variant, saes in suite.items():
        for hook_name, sae in saes.items():
            save_sae(sae, folder / variant / hook_name)


def save_rows(rows: Rows, hook_name: str, path: Path, about: dict[str, str]) -> None:
    """Stores rows of one site as the float16 tensor `acts` [row, d_model]; order and scale go into the header.

    Rows are multiplied by the header's `scale` where float16 would overflow (divide to get them back).
    """
    acts = rows[hook_name]
    largest = float(acts.abs().max())
    scale = 1.0 if largest < 30_000 else 30_000 / largest
    header = about | {"hook_name": hook_name, "scale": repr(scale), "order": "token order within shuffled dialogues"}
    with atomic_file(path) as part:
        write_tensors({"acts": (acts * scale).half().contiguous()}, part, header)

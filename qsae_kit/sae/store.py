"""SAE folders and stored activations on disk: written in SAELens's layout (sae-lens >= 6), read
from that and others.

A folder holds `cfg.json` and `sae_weights.safetensors`; a suite is `<suite>/<variant>/<hook
name>/`. What this package adds (median norm, filter, figures) sits in cfg.json's `metadata`, where
SAELens keeps what it does not know.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qsae_kit.io.devices import check_device
from qsae_kit.io.files import atomic_folder, checked_name
from qsae_kit.io.tensorfiles import write_tensors
from qsae_kit.io.writers import only_writer_of
from qsae_kit.sae import SAE
from qsae_kit.sae.releases import find_saes, holdings_of, open_release, read_sae, select
from qsae_kit.sae.suites import ByVariant, Suite
from qsae_kit.sites import KINDS, parse_hook_name

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
"""Of SAELens, whose layout this is: its readers go by it, whoever wrote the file."""


def save_sae(sae: SAE, folder: str | Path) -> None:
    """Writes one SAE folder, whole or not at all; other files that are in it stay.

    Raises ValueError for an SAE without provenance or with values that are not finite, and while
    another process writes it.
    """
    origin, folder = sae.origin, Path(folder)
    sae = sae.exported()
    wrong = [name for name, tensor in sae.tensors().items() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(
            f"The SAE of {origin.hook_name} has values that are not finite in {', '.join(wrong)};"
            " train it again."
        )
    config = sae.describe() | {
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": KINDS[parse_hook_name(origin.hook_name).kind].reshape,
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "model_name": origin.model_name,
            "hook_name": origin.hook_name,
            "hook_head_index": None,
            "context_size": origin.context_size,
            "prepend_bos": origin.begins_with_bos,
            "exclude_special_tokens": origin.drop_template,
            "qsae_kit": {
                "sparsity": sae.sparsity,
                "median_norm": origin.filter.median if origin.filter.measured else None,
                "norm_factor": origin.filter.factor,
                "drop_template": origin.drop_template,
                "drop_prefix": origin.drop_prefix,
                "begins_with_bos": origin.begins_with_bos,
                "tokens": origin.tokens,
                "seed": origin.seed,
                "figures": origin.figures,
                "recipe": None if origin.recipe is None else dict(origin.recipe),
                "model_digest": origin.model_digest,
            },
        },
    }
    with only_writer_of(folder), atomic_folder(folder) as part:
        tensors = {
            name: tensor.to("cpu", torch.float32).contiguous()
            for name, tensor in sae.tensors().items()
        }
        write_tensors(tensors, part / WEIGHTS)
        (part / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_sae(folder: str | Path, device: str | torch.device = "cpu") -> SAE:
    """The SAE of a folder: one written by `save_sae` to the same bits, or one of another library
    (`releases`).

    One of another library that names no site is given without provenance. Raises ValueError for a
    folder that holds none or several, for files that cannot be used, and for a device that is not
    there.
    """
    check_device(device)
    release = open_release(Path(folder))
    found = find_saes(release)
    if len(found) > 1:
        raise ValueError(
            f"{str(folder)!r} holds {len(found)} SAEs, the first in {found[0].weights!r}; give the"
            " folder of one."
        )
    return read_sae(found[0], release.root, device)


def iter_saes(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    variants: Sequence[str] = (),
    hook_names: Sequence[str] = (),
    model_name: str = "",
) -> Iterator[tuple[str, SAE]]:
    """Variant and SAE, one after another, as in `load_suite`, which holds all of them at once."""
    check_device(device)
    release = open_release(source)
    found, left = holdings_of(release)
    if not found:
        raise ValueError(left[0].reason)
    if left and not variants and not hook_names:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        warnings.warn(f"{left[0].weights!r} is left out{more}: {left[0].reason}", stacklevel=3)
    found = select(found, variants, hook_names, left)
    nameless = [one.weights for one in found if not one.hook_name]
    if nameless:
        raise ValueError(
            f"{nameless[0]!r} of {str(source)!r} names no site; write metadata.hook_name into the"
            f" {CONFIG} beside it."
        )
    root = release.fetch([one.weights for one in found])
    for one in sorted(
        found, key=lambda one: (one.variant, parse_hook_name(one.hook_name).layer, one.hook_name)
    ):
        sae = read_sae(one, root, device)
        if model_name:
            sae.provenance = replace(sae.origin, model_name=model_name, model_digest="")
        yield one.variant, sae


def load_suite(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    variants: Sequence[str] = (),
    hook_names: Sequence[str] = (),
    model_name: str = "",
) -> Suite:
    """A suite of ours or a public release, `suite[variant][hook_name]`, sites in the model's order.

    source: a folder, or the id of a repository on the hub, of which the weights that are wanted are
    fetched. The format is told from the files (`releases`). variants, hook_names: only those (none
    given: all). model_name: instead of what the files say. The SAEs of a public release have no
    median norm, which `attach.attached` measures. Raises ValueError where there is none, for files
    that cannot be used, and for a device that is not there.
    """
    saes: dict[str, dict[str, SAE]] = {}
    for variant, sae in iter_saes(
        source, device, variants=variants, hook_names=hook_names, model_name=model_name
    ):
        saes.setdefault(variant, {})[sae.origin.hook_name] = sae
    return Suite(saes)


def load_suites(
    sources: Sequence[str | Path],
    device: str | torch.device = "cpu",
    *,
    variants: Sequence[str] = (),
    hook_names: Sequence[str] = (),
) -> Suite:
    """Several suites as one, arguments and errors as for `load_suite`; where two have a variant of
    one name, that of the second source is called variant@2, and so on.
    """
    together: dict[str, Mapping[str, SAE]] = {}
    for number, source in enumerate(sources, 1):
        suite = load_suite(source, device, variants=variants, hook_names=hook_names)
        for variant, saes in suite.items():
            together[f"{variant}@{number}" if variant in together else variant] = saes
    return Suite(together)


def model_name_of(suite: ByVariant) -> str:
    """The model that the SAEs of a suite record. Raises ValueError where that is not one model."""
    origins = [sae.origin for sae in Suite(suite).saes().values()]
    names = {origin.model_name for origin in origins if origin.model_name}
    if len(names) != 1:
        raise ValueError(
            f"The SAEs record {', '.join(sorted(names)) or 'no model'}; say which model is meant"
            " (--model)."
        )
    return names.pop()


def save_suite(suite: ByVariant, folder: str | Path) -> None:
    """Writes `<folder>/<variant>/<hook name>/` for every SAE."""
    for place, sae in Suite(suite).saes().items():
        save_sae(sae, suite_folder(Path(folder), *place))


def suite_folder(folder: Path, variant: str, hook_name: str) -> Path:
    """Where a suite keeps an SAE. Raises ValueError for names that would lead elsewhere."""
    return folder / checked_name(variant, "A variant") / parse_hook_name(hook_name).hook_name


def convert_suite(
    source: str | Path,
    out: str | Path,
    *,
    variants: Sequence[str] = (),
    hook_names: Sequence[str] = (),
    model_name: str = "",
) -> list[Path]:
    """Writes a suite of a public release as one of ours, whole or not at all, an SAE in memory at a
    time; returns its folders.

    Arguments as in `load_suite`. Raises ValueError for a folder that is not empty, and as
    `load_suite` does.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{str(out)!r} is not an empty folder; give another one, or remove it first."
        )
    written = []
    with only_writer_of(out), atomic_folder(out) as part:
        for variant, sae in iter_saes(
            source, variants=variants, hook_names=hook_names, model_name=model_name
        ):
            folder = suite_folder(part, variant, sae.origin.hook_name)
            save_sae(sae, folder)
            written.append(out / folder.relative_to(part))
    return written

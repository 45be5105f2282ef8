"""SAEs of public releases, from a folder or the hub: what there is, told from names and
configurations (`layouts`), and each as ours.

Everything comes out as `f = activate(x @ W_enc + b_enc)`, `x_hat = f @ W_dec + b_dec` in float32:
what a library does on use (b_dec off the input, factors on inputs and reconstructions, activations
times decoder norms, BatchTopK as a threshold) is folded into the weights. Decoder rows get unit
norm, and encoder and thresholds the inverse, so that activations are lengths in the units of x;
TopK SAEs whose decoder rows have other norms keep them, since to rescale would change which
features are the largest.

Releases do not say how long activations are, which the token filter needs: their median norm is
infinite (nothing is filtered) until `calibrate` measures it, and whatever depends on it refuses
them until then.

What lies beside SAEs and is none (a transcoder, a coder of the embedding) is listed with its
reason, and is an error where it is asked for.
"""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd
import torch

from qsae_kit.io.tensorfiles import FLOATS, TensorFile, all_finite
from qsae_kit.sae import ARCHITECTURES, SAE
from qsae_kit.sae.layouts import HYPERPARAMETERS, READERS, Found, OtherCoder, Release, names_site

UNIT = 1e-4
"""Decoder norms that differ from 1 by less are rounding, and stay as they are."""


# --- where a release is


def open_release(source: str | Path) -> Release:
    """A release in a folder, or on the hub, of which then only configurations are fetched.

    Raises ValueError for what is neither, and for a repository that cannot be reached and is not in
    the cache.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _local(str(source), folder)
    if folder.exists():
        raise ValueError(
            f"{str(source)!r} is a file; give the folder of an SAE or a suite, or the id of a"
            " repository on the hub."
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source)):
        raise ValueError(
            f"There is no folder {str(source)!r}; give the folder of an SAE or a suite, or the id"
            " of a repository on the hub such as adamkarvonen/qwen3-8b-saes."
        )
    return _hub(str(source))


def _local(source: str, root: Path) -> Release:
    """ValueError for a folder, or a file that an SAE is made of, that cannot be read; a warning for
    others, and for configurations of SAEs without weights beside them.
    """

    def refuse(error: OSError) -> None:
        place = repr(str(error.filename or root))
        raise ValueError(
            f"The folder {place} cannot be read ({error.strerror or error}), and SAEs in it would "
            "be left out; make it readable, or give another folder."
        ) from error

    sizes, others = {}, []
    for folder, below, names in os.walk(root, onerror=refuse):
        below[:] = sorted(n for n in below if not n.startswith("."))  # a killed run leaves those
        others += [path for name in below if (path := Path(folder, name)).is_symlink()]
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file():
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size
            elif not name.startswith("."):
                others.append(path)
                if name in OF_AN_SAE or _is_weights(name):
                    raise ValueError(
                        f"{str(path)!r} is no file that can be read (a link that leads nowhere, a "
                        "pipe or a device), and its SAE would be left out; get the file again."
                    )
    whole = {str(PurePosixPath(path).parent) for path in sizes if _is_weights(path)}
    alone = [p for p in map(PurePosixPath, sizes) if p.name in OF_AN_SAE]
    lacking = [root / p.parent for p in alone if str(p.parent) not in whole]
    _warn_of(lacking, "has the configuration of an SAE but no weights beside it")
    _warn_of(others, "is a link to a folder, a link that leads nowhere, a pipe or a device")
    return Release(source, root, sizes, lambda _: root)


OF_AN_SAE = ("cfg.json",)
"""Configurations that nothing but an SAE has; config.json may be of a model, or of a run."""


def _is_weights(path: str) -> bool:
    """Whether a file is named as the weights of an SAE are."""
    name = path.rsplit("/", 1)[-1]
    return any(re.fullmatch(pattern, name) for pattern in READERS)


def _warn_of(paths: Sequence[Path], what: str) -> None:
    """A warning that names the first of what is left out."""
    if paths:
        more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
        warnings.warn(f"{str(paths[0])!r} {what}, so it is left out{more}.", stacklevel=4)


CONFIGS = ("*config.json", "*cfg.json", f"*{HYPERPARAMETERS}")


def _hub(repository: str) -> Release:
    from huggingface_hub import snapshot_download

    try:
        listing = snapshot_download(repository, dry_run=True)
        revision = listing[0].commit_hash if listing else None
        root = Path(snapshot_download(repository, revision=revision, allow_patterns=list(CONFIGS)))
    except Exception as error:  # the hub's client lets errors of its HTTP library through
        try:
            return _local(
                repository,
                Path(
                    snapshot_download(
                        repository, local_files_only=True, allow_patterns=list(CONFIGS)
                    )
                ),
            )
        except Exception:
            reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[
                0
            ]
            raise ValueError(
                f"There is no folder {repository!r}, and no repository could be had"
                f" ({reason.rstrip('.')}); check its name, the network and, where it is gated, that"
                " you are logged in, or download it elsewhere and give its folder."
            ) from error
    sizes = {file.filename: file.file_size for file in listing}
    for name in sizes:
        if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name:
            raise ValueError(
                f"The repository {repository!r} lists a file {name!r}, which could lie outside of"
                " it; it was not used."
            )
    return Release(
        repository,
        root,
        sizes,
        lambda names: Path(
            snapshot_download(repository, revision=revision, allow_patterns=[*CONFIGS, *names])
        ),
    )


# --- what is in it


@dataclass(frozen=True)
class Left:
    """A coder of a release that cannot be used here."""

    weights: str
    """Below the release's folder, with /."""
    reason: str
    size: int | None = None
    """Bytes of the weights' file."""
    variant: str = ""


class Holdings(NamedTuple):
    """What a release holds."""

    saes: list[Found]
    left: list[Left]
    """What cannot be used."""


def holdings_of(release: Release) -> Holdings:
    """Every SAE of a release, with the variant that it belongs to, and what cannot be used; no
    weights are read.

    Variants are named by the folders, without those that name the site and those that all have in
    common. Raises ValueError where there is nothing, for a configuration that is damaged, and for
    two SAEs of one variant at one site.
    """
    found: list[Found] = []
    left: list[Left] = []
    for path in sorted(release.sizes):
        name, size = path.rsplit("/", 1)[-1], release.sizes[path]
        for pattern, reader in READERS.items():
            if (match := re.fullmatch(pattern, name)) and _belongs(release, path, reader.with_file):
                try:
                    described = reader.describe(release, PurePosixPath(path), match)
                except OtherCoder as error:
                    left.append(Left(path, str(error), size))
                else:
                    found.append(replace(described, weights=path, size=size))
    if not found and not left:
        told = [reader.known_by for reader in READERS.values() if reader.known_by]
        raise ValueError(
            f"{release.source!r} holds no SAEs; known are those of"
            f" {', '.join(told[:-1])} and {told[-1]}."
        )
    return _named(release, found, left)


def find_saes(release: Release) -> list[Found]:
    """The SAEs of `holdings_of`. Raises ValueError where there are none, as well."""
    found, left = holdings_of(release)
    if not found:
        raise ValueError(left[0].reason)
    return found


def _belongs(release: Release, path: str, file: str) -> bool:
    """Whether a file lies where its reader needs it."""
    above = PurePosixPath(path).parent.parent
    return not file or (above / file).as_posix() in release.sizes


def _named(release: Release, found: list[Found], left: list[Left]) -> Holdings:
    given = [(one.weights, one.folders) for one in found] + [(one.weights, None) for one in left]
    folders = [
        list(own)
        if own is not None
        else [part for part in PurePosixPath(weights).parts[:-1] if not names_site(part)]
        for weights, own in given
    ]
    while all(len(parts) > 1 for parts in folders) and len({parts[0] for parts in folders}) == 1:
        folders = [parts[1:] for parts in folders]
    variants = ["-".join(parts) for parts in folders]
    named = [
        replace(one, variant=variant or one.label)
        for one, variant in zip(found, variants, strict=False)
    ]
    others = [
        replace(one, variant=variant)
        for one, variant in zip(left, variants[len(found) :], strict=True)
    ]
    seen: dict[tuple[str, str], str] = {}
    for one in named:
        if (
            other := seen.setdefault((one.variant, one.hook_name), one.weights)
        ) != one.weights and one.hook_name:
            raise ValueError(
                f"{release.source!r} holds two SAEs of {one.variant} at {one.hook_name}, {other}"
                f" and {one.weights}; give a folder with one of them."
            )
    return Holdings(named, others)


def select(
    found: Sequence[Found],
    variants: Sequence[str] = (),
    hook_names: Sequence[str] = (),
    left: Sequence[Left] = (),
) -> list[Found]:
    """Those of some variants and sites (none given: all); a name may have * for what varies, which
    may match nothing.

    left: what cannot be used. Raises ValueError for one that is not there, or cannot be used.
    """
    known_variants = {one.variant for one in found}
    for one in left:
        if one.variant in variants and one.variant not in known_variants:
            raise ValueError(one.reason)
    for what, names, known in (
        ("variant", variants, {f.variant for f in found}),
        ("site", hook_names, {f.hook_name for f in found}),
    ):
        missing = [name for name in names if name not in known and "*" not in name]
        if missing:
            also = f" What is left out: {left[0].reason}" if left else ""
            raise ValueError(
                f"The suite has no {what} {missing[0]!r}; it has {', '.join(sorted(known))}.{also}"
            )

    def wanted(name: str, patterns: Sequence[str]) -> bool:
        return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)

    chosen = [f for f in found if wanted(f.variant, variants) and wanted(f.hook_name, hook_names)]
    if not chosen:
        raise ValueError(
            f"No SAE is of {', '.join(variants) or 'any variant'} at"
            f" {', '.join(hook_names) or 'any site'}; ask for fewer things at once."
        )
    return chosen


# --- one of them as an SAE


def read_sae(found: Found, root: Path, device: str | torch.device = "cpu") -> SAE:
    """The SAE as one of ours, its provenance set where the release names a site.

    At most one tensor is mapped beside the SAE. Raises ValueError where tensors are missing or
    unknown, of other shapes than the configuration says, of another format than
    `io.tensorfiles.FLOATS`, or not finite.
    """
    file = TensorFile(root / found.weights)
    d_in, d_sae = _sizes(found, file)
    parts = {
        "encoder": found.layout.encoder,
        "W_dec": found.layout.decoder,
        "b_dec": found.layout.b_dec,
        **found.layout.biases,
    }
    for theirs in parts.values():
        file.read(theirs)  # finite, before anything is allocated
    if found.architecture == "topk" and not found.sparsity:
        raise ValueError(
            f"The configuration of {str(file.path)!r} does not say k, the features that a TopK SAE"
            " keeps; add it there."
        )
    sparsity = found.sparsity or d_sae  # a bound, until `calibrate` measures it
    try:
        sae = ARCHITECTURES[found.architecture](
            d_in, d_sae, sparsity, found.provenance if found.hook_name else None
        )
    except (MemoryError, RuntimeError) as error:
        gb = 8 * d_in * d_sae / 1e9
        raise ValueError(
            f"An SAE of {gb:.1f} GB does not fit into memory; load fewer at once, or a smaller one."
        ) from error
    _check_k(found, file, sae)
    flip = {
        "encoder": not found.layout.encoder_by_feature,
        "W_dec": not found.layout.decoder_by_feature,
    }
    own = {"encoder": sae.encoder, **sae.tensors()}
    with torch.no_grad():
        for ours, theirs in parts.items():
            tensor = file.read(theirs)
            own[ours].copy_(tensor.T if flip.get(ours) else tensor)
            del tensor  # or the next one is mapped beside it
        if not found.layout.exact:
            _fold(sae, found)
            if not all(all_finite(parameter) for parameter in sae.parameters()):
                raise ValueError(
                    f"{str(file.path)!r} has values that are too large for float32 sums; get the"
                    " file again."
                )
    return sae.to(device).eval().requires_grad_(False)


def _sizes(found: Found, file: TensorFile) -> tuple[int, int]:
    """d_in and d_sae of the tensors, whose names, shapes and formats are checked."""
    layout, specs = found.layout, file.specs
    needed = [layout.encoder, layout.decoder, layout.b_dec, *layout.biases.values()]
    missing, unknown = (
        [n for n in needed if n not in specs],
        sorted(set(specs) - set(needed) - layout.other),
    )
    if missing or unknown:
        what = (
            f"lacks {', '.join(missing)}"
            if missing
            else f"holds {', '.join(unknown[:8])}, which is unknown here"
        )
        raise ValueError(
            f"{str(file.path)!r} {what}; a {found.format} SAE ({found.architecture}) has"
            f" {', '.join(needed)}."
        )
    shape = specs[layout.encoder].shape
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"{str(file.path)!r}: {layout.encoder} has shape {shape}, expected two axes."
        )
    d_sae, d_in = shape if layout.encoder_by_feature else shape[::-1]
    said = found.d_in or d_in, found.d_sae or d_sae
    if said != (d_in, d_sae):
        raise ValueError(
            f"{str(file.path)!r} has d_in={d_in} and d_sae={d_sae}, its configuration says"
            f" {said[0]} and {said[1]}."
        )
    expected = {
        layout.decoder: [(d_sae, d_in) if layout.decoder_by_feature else (d_in, d_sae)],
        layout.b_dec: [(d_in,)],
        **{
            theirs: [(d_sae,), ()] if ours == "threshold" else [(d_sae,)]
            for ours, theirs in layout.biases.items()
        },
    }
    for name, shapes in expected.items():
        if specs[name].shape not in shapes:
            raise ValueError(
                f"{str(file.path)!r}: {name} has shape {specs[name].shape}, expected {shapes[0]}."
            )
    for name in needed:
        if specs[name].dtype not in FLOATS:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise ValueError(
                f"{str(file.path)!r}: {name} is {str(specs[name].dtype).removeprefix('torch.')};"
                f" allowed are {allowed}."
            )
    return d_in, d_sae


def _check_k(found: Found, file: TensorFile, sae: SAE) -> None:
    """ValueError where the weights name another k than the configuration."""
    if "k" in found.layout.other and "k" in file.specs and file.specs["k"].shape == ():
        k = file.read("k").item()
        if k != sae.sparsity:
            raise ValueError(
                f"{str(file.path)!r} was trained with k={k}, its configuration says"
                f" {found.sparsity}; get both again."
            )


def _fold(sae: SAE, found: Found) -> None:
    """What the library does with the weights on use, into the weights."""
    if found.scales != (1.0, 1.0):
        _fold_scales(sae, *found.scales)
    if found.layout.centred:
        _fold_centre(sae)
    if found.threshold is not None and not found.layout.rescaled:
        sae.get_parameter("threshold").fill_(found.threshold)
    if found.layout.rescaled or found.architecture != "topk":
        fold_norms(sae, 0.0 if found.layout.rescaled else UNIT)
    if found.threshold is not None and found.layout.rescaled:
        sae.get_parameter("threshold").fill_(found.threshold)
    if found.architecture == "jumprelu":
        # below, activations would be negative, which the libraries' ReLU cuts too
        sae.get_parameter("threshold").clamp_(min=0)


def _fold_centre(sae: SAE) -> None:
    """An SAE of x - b_dec becomes one of x."""
    for some in torch.arange(sae.d_sae).split(1024):
        rows = slice(int(some[0]), int(some[-1]) + 1)
        # float32 sums would cost three digits
        shift = (sae.encoder[rows].double() @ sae.b_dec.double()).float()
        sae.b_enc[rows] -= shift
        if (b_mag := getattr(sae, "b_mag", None)) is not None:
            b_mag[rows] -= sae.get_parameter("r_mag")[rows].exp() * shift


def _fold_scales(sae: SAE, before: float, after: float) -> None:
    """An SAE that reads x * before and gives x_hat * after becomes one of x; activations are then
    in the units of x.
    """
    sae.b_enc.div_(before)
    sae.W_dec.mul_(before / after)
    sae.b_dec.div_(after)


def fold_norms(sae: SAE, tolerance: float) -> None:
    """Decoder rows to unit norm, unless all are within a tolerance; reconstructions stay, except
    that a TopK SAE then ranks features by their lengths.
    """
    norms = sae.W_dec.norm(dim=-1)
    norms = torch.where(norms > 0, norms, 1.0)  # a feature that adds nothing stays one
    if (norms - 1).abs().max() <= tolerance:
        return
    sae.W_dec.div_(norms[:, None])
    sae.encoder.mul_(norms[:, None])
    for name, parameter in sae.named_parameters():
        if name in ("b_enc", "b_mag", "threshold"):
            parameter.mul_(norms)


def inspect_suite(source: str | Path) -> pd.DataFrame:
    """What a folder or repository holds, one SAE a row, from its configurations and, where they are
    there, headers of weights.

    Columns: variant, site, model, format, architecture (as it is used here), d_in, d_sae, sparsity
    (k or target L0), dtype (as stored), gb (of the file), median_norm, tokens (trained on),
    context_size, weights, unusable (why a coder cannot be used here); empty where it is not known.
    On the hub only configurations are fetched. Raises ValueError as `holdings_of` and `TensorFile`
    do.
    """
    release = open_release(source)
    return pd.DataFrame(_rows(release, holdings_of(release)), columns=list(COLUMNS))


COLUMNS = tuple(
    "variant site model format architecture d_in d_sae sparsity dtype gb median_norm tokens"
    " context_size weights unusable".split()
)


def _rows(release: Release, holdings: Holdings) -> Iterator[dict[str, Any]]:
    for one in holdings.saes:
        d_in, d_sae, dtype = one.d_in, one.d_sae, ""
        if (release.root / one.weights).is_file():
            file = TensorFile(release.root / one.weights)
            d_in, d_sae = _sizes(one, file)
            dtype = str(file.specs[one.layout.encoder].dtype).removeprefix("torch.")
        yield {
            "variant": one.variant,
            "site": one.hook_name,
            "model": one.provenance.model_name,
            "format": one.format,
            "architecture": one.architecture,
            "d_in": d_in,
            "d_sae": d_sae,
            "sparsity": one.sparsity,
            "dtype": dtype,
            "gb": None if one.size is None else one.size / 1e9,
            "median_norm": one.provenance.filter.median if one.provenance.filter.measured else None,
            "tokens": one.provenance.tokens or None,
            "context_size": one.provenance.context_size,
            "weights": one.weights,
            "unusable": None,
        }
    for other in holdings.left:
        yield {
            "variant": other.variant,
            "gb": None if other.size is None else other.size / 1e9,
            "weights": other.weights,
            "unusable": other.reason,
        }

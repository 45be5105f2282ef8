"""SAEs of public releases, from a folder or the hub: what there is, told from names and
configurations, and each as ours.

| library | weights | configuration | what it does that is folded here |
|---|---|---|---|
| SAELens >= 6 | `sae_weights.safetensors` | `cfg.json` beside it | b_dec off the input, activations
times decoder norms | | dictionary_learning | `ae.pt` | `config.json` beside it | b_dec off the
input; BatchTopK as a threshold | | sparsify | `sae.safetensors` | `cfg.json` beside it, the
folder's name is the site | b_dec off the input | | Qwen-Scope | `layer<n>.sae.pt` | `config.json`,
or the repository's name | nothing |

Everything comes out as `f = activate(x @ W_enc + b_enc)`, `x_hat = f @ W_dec + b_dec` in float32.
Decoder rows get unit norm, and encoder and thresholds the inverse, so that activations are lengths
in the units of x; TopK SAEs whose decoder rows have other norms keep them, since to rescale would
change which features are the largest.

Releases do not say how long activations are, which the token filter needs: their median norm is
infinite (nothing is filtered) until `calibrate` measures it, and whatever depends on it refuses
them until then.
"""

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd
import torch

from qsae_kit.io.jsonfiles import read_json
from qsae_kit.io.tensorfiles import FLOATS, TensorFile, all_finite
from qsae_kit.sae import ARCHITECTURES, SAE, Provenance
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sites import KINDS, Site, find_site

CONFIG_LIMIT = 2**20
"""Bytes of a configuration."""
OWN = "qsae_kit"
OWN_ENTRIES = tuple(("sparsity median_norm norm_factor drop_template tokens seed figures").split())
UNMEASURED = NormFilter(math.inf)
CONTEXT = 512
"""Tokens of a context where a release does not say it."""
UNIT = 1e-4
"""Decoder norms that differ from 1 by less are rounding, and stay as they are."""


class Layout(NamedTuple):
    """What an SAE's tensors are called in its file, and what its library does with them."""

    encoder: str = "W_enc"
    decoder: str = "W_dec"
    biases: Mapping[str, str] = {"b_enc": "b_enc"}
    """Our name -> theirs, of what has one value a feature (a threshold may be a single one for
    all).
    """
    b_dec: str = "b_dec"
    encoder_by_feature: bool = False
    """Whether the encoder is [d_sae, d_in]."""
    decoder_by_feature: bool = True
    centred: bool = False
    """Whether b_dec is taken off the input."""
    rescaled: bool = False
    """Whether features are ranked by activation times decoder norm."""
    exact: bool = False
    """Whether the weights are used as they are: ours."""
    other: frozenset[str] = frozenset()
    """Tensors that are not needed."""


@dataclass(frozen=True)
class Found:
    """One SAE of a release, as its configuration describes it; its weights need not be there
    yet.
    """

    format: str
    architecture: str
    """As it is used here."""
    layout: Layout
    provenance: Provenance
    """Its hook name is empty where the release does not say it."""
    label: str
    """The variant's name where folders give none."""
    d_in: int | None = None
    d_sae: int | None = None
    sparsity: float | None = None
    """k or target L0; None where the release does not say it."""
    weights: str = ""
    """Below the release's folder, with /."""
    variant: str = ""
    size: int | None = None
    """Bytes of the weights' file."""

    @property
    def hook_name(self) -> str:
        return self.provenance.hook_name


@dataclass(frozen=True)
class Release:
    """A folder or a repository of SAEs: its files and their sizes in bytes, of which weights may
    still have to be fetched.
    """

    source: str
    root: Path
    sizes: Mapping[str, int | None]
    fetch: Callable[[Sequence[str]], Path]
    """Brings some of the files; returns the folder that they are in."""


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


CONFIGS = ("*config.json", "*cfg.json")


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


def find_saes(release: Release) -> list[Found]:
    """Every SAE of a release, with the variant that it belongs to; no weights are read.

    Variants are named by the folders, without those that name the site and those that all have in
    common. Raises ValueError where there is none, for a configuration that cannot be used, and for
    two SAEs of one variant at one site.
    """
    found = []
    for path in sorted(release.sizes):
        name = path.rsplit("/", 1)[-1]
        for pattern, reader in READERS.items():
            if match := re.fullmatch(pattern, name):
                found.append(
                    replace(
                        reader.describe(release, PurePosixPath(path), match),
                        weights=path,
                        size=release.sizes[path],
                    )
                )
    if not found:
        told = [reader.known_by for reader in READERS.values()]
        raise ValueError(
            f"{release.source!r} holds no SAEs; known are those of"
            f" {', '.join(told[:-1])} and {told[-1]}."
        )
    return _named(release, found)


def _named(release: Release, found: list[Found]) -> list[Found]:
    folders = [
        [part for part in PurePosixPath(one.weights).parts[:-1] if not _names_site(part)]
        for one in found
    ]
    while all(len(parts) > 1 for parts in folders) and len({parts[0] for parts in folders}) == 1:
        folders = [parts[1:] for parts in folders]
    named = [
        replace(one, variant="-".join(parts) or one.label)
        for one, parts in zip(found, folders, strict=True)
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
    return named


def _names_site(part: str) -> bool:
    try:
        find_site(part)
    except ValueError:
        return False
    return True


def select(
    found: Sequence[Found], variants: Sequence[str] = (), hook_names: Sequence[str] = ()
) -> list[Found]:
    """Those of some variants and sites (none given: all); a name may have * for what varies, which
    may match nothing.

    Raises ValueError for one that is not there.
    """
    for what, names, known in (
        ("variant", variants, {f.variant for f in found}),
        ("site", hook_names, {f.hook_name for f in found}),
    ):
        missing = [name for name in names if name not in known and "*" not in name]
        if missing:
            raise ValueError(
                f"The suite has no {what} {missing[0]!r}; it has {', '.join(sorted(known))}."
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


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError as `read_json`, and for a file that is none."""
    config = read_json(path, "an SAE's configuration, beside its weights", CONFIG_LIMIT)
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object; get the file again.")
    return config


class Entries:
    """A configuration that is read with types, and says where it is wrong."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self.config, self.path = config, path

    def part(self, name: str) -> "Entries":
        value = self.config.get(name)
        return Entries(value if isinstance(value, dict) else {}, self.path)

    def object(self, name: str) -> dict[str, Any] | None:
        value = self.config.get(name)
        if value is not None and not isinstance(value, dict):
            raise ValueError(
                f"{str(self.path)!r} has {name}={str(value)[:40]}, which must be an object; train"
                " or save the SAE again."
            )
        return value

    def text(self, name: str, default: str = "") -> str:
        value = self.config.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{str(self.path)!r} has {name}={value!r}, which must be text.")
        return default if value is None else value

    def whole(self, name: str) -> int | None:
        value = self.config.get(name)
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53
        ):
            raise ValueError(
                f"{str(self.path)!r} has {name}={str(value)[:40]}, which must be a whole number"
                " that is not negative."
            )
        return value

    def number(self, name: str) -> float | None:
        value = self.config.get(name)
        if value is not None and (
            not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 2**53
        ):
            raise ValueError(
                f"{str(self.path)!r} has {name}={str(value)[:40]}, which must be a positive number."
            )
        return value

    def refuse(self, **wanted: Any) -> None:
        """ValueError where an entry is there and says something else than wanted."""
        for name, value in wanted.items():
            given = self.config.get(name)
            if given is not None and given != value:
                raise ValueError(
                    f"{str(self.path)!r} has {name}={str(given)[:80]!r}; what can be used here has"
                    f" {value!r}."
                )


SAELENS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
"""SAELens's architectures -> what has one value a feature."""


def _own_biases(architecture: str) -> tuple[str, ...]:
    """What has one value a feature in our files of an architecture that SAELens does not have;
    empty for one that is unknown, or is stored as another one.
    """
    known = ARCHITECTURES.get(architecture)
    if known is None:
        return ()
    smallest = known(1, 1, 1)
    if smallest.exported() is not smallest:
        return ()
    return tuple(name for name in smallest.tensors() if name not in ("W_enc", "W_dec", "b_dec"))


def _saelens(release: Release, path: PurePosixPath, match: re.Match[str]) -> Found:
    file = release.root / path.parent / "cfg.json"
    config = read_config(file)
    if not isinstance(config.get("metadata"), dict):
        raise ValueError(
            f"{str(file)!r} is no SAE configuration of SAELens 6: it has no metadata; load it there"
            " and save it again."
        )
    cfg, meta = Entries(config, file), Entries(config, file).part("metadata")
    architecture = cfg.text("architecture")
    biases = SAELENS.get(architecture) or ("qsae_kit" in meta.config and _own_biases(architecture))
    if not biases:
        raise ValueError(
            f"{str(file)!r} is of a {architecture!r} SAE; known are {', '.join(SAELENS)}, and of"
            " our own files every architecture in `qsae_kit.sae.ARCHITECTURES`."
        )
    hook_name = meta.text("hook_name")
    site = find_site(hook_name) if hook_name else None
    cfg.refuse(normalize_activations="none")
    if site is None or config.get("reshape_activations") != KINDS[site.kind].reshape:
        cfg.refuse(reshape_activations="none")
    meta.refuse(hook_head_index=None)
    layout = Layout(
        biases={name: name for name in biases},
        centred=bool(config.get("apply_b_dec_to_input")),
        rescaled=bool(config.get("rescale_acts_by_decoder_norm")),
    )
    provenance = Provenance(
        meta.text("model_name"),
        site.hook_name if site else "",
        UNMEASURED,
        drop_template=bool(meta.config.get("exclude_special_tokens")),
        context_size=meta.whole("context_size") or CONTEXT,
    )
    details = meta.part("training_architecture_details")
    found = Found(
        "SAELens",
        architecture,
        layout,
        provenance,
        architecture,
        cfg.whole("d_in"),
        cfg.whole("d_sae"),
        (
            cfg.whole("k")
            if architecture == "topk"
            else details.number("k") or details.number("target_l0")
        ),
    )
    kit = meta.config.get("qsae_kit")
    return (
        found
        if kit is None
        else _own(found, config, Entries(kit if isinstance(kit, dict) else {}, file))
    )


def _own(found: Found, config: Mapping[str, Any], kit: Entries) -> Found:
    """The same with what this package adds."""
    given = {**kit.config, **config["metadata"]}
    lacking = [name for name in ("model_name", "hook_name", *OWN_ENTRIES) if name not in given]
    if lacking:
        raise ValueError(f"{str(kit.path)!r} lacks {lacking[0]!r}; train or save the SAE again.")
    provenance = replace(
        found.provenance,
        filter=NormFilter(
            kit.number("median_norm") or math.inf, kit.number("norm_factor") or NormFilter(0).factor
        ),
        drop_template=bool(kit.config["drop_template"]),
        tokens=kit.whole("tokens") or 0,
        seed=kit.whole("seed") or 0,
        figures=dict(kit.part("figures").config),
        recipe=kit.object("recipe"),
        model_digest=kit.text("model_digest"),
        drop_prefix=bool(kit.config.get("drop_prefix")),
    )
    return replace(
        found,
        format=OWN,
        layout=found.layout._replace(exact=True),
        provenance=provenance,
        sparsity=kit.number("sparsity"),
    )


LINEAR = Layout(
    "encoder.weight",
    "decoder.weight",
    {"b_enc": "encoder.bias"},
    encoder_by_feature=True,
    decoder_by_feature=False,
)
"""Two linear layers of PyTorch."""
BUFFERS = frozenset(["k", "threshold", "group_sizes"])
DICTIONARIES = {
    "AutoEncoder": ("standard", LINEAR._replace(b_dec="bias", centred=True)),
    "AutoEncoderNew": ("standard", LINEAR._replace(b_dec="decoder.bias")),
    "GatedAutoEncoder": (
        "gated",
        LINEAR._replace(
            biases={"b_gate": "gate_bias", "r_mag": "r_mag", "b_mag": "mag_bias"},
            b_dec="decoder_bias",
            centred=True,
        ),
    ),
    "AutoEncoderTopK": ("topk", LINEAR._replace(centred=True, other=BUFFERS)),
    "BatchTopKSAE": (
        "jumprelu",
        LINEAR._replace(
            biases={"b_enc": "encoder.bias", "threshold": "threshold"}, centred=True, other=BUFFERS
        ),
    ),
    "MatryoshkaBatchTopKSAE": (
        "jumprelu",
        Layout(biases={"b_enc": "b_enc", "threshold": "threshold"}, centred=True, other=BUFFERS),
    ),
    "JumpReluAutoEncoder": (
        "jumprelu",
        Layout(biases={"b_enc": "b_enc", "threshold": "threshold"}),
    ),
}


def _dictionary_learning(release: Release, path: PurePosixPath, match: re.Match[str]) -> Found:
    file = release.root / path.parent / "config.json"
    config = read_config(file)
    trainer, buffer = Entries(config, file).part("trainer"), Entries(config, file).part("buffer")
    kind = trainer.text("dict_class")
    if kind not in DICTIONARIES:
        raise ValueError(
            f"{str(file)!r} is of dict_class {kind!r}; known are {', '.join(DICTIONARIES)}."
        )
    buffer.refuse(io="out")
    layer, module = trainer.whole("layer"), trainer.text("submodule_name")
    named = [find_site(part) for part in (*path.parts[:-1], module) if part and _names_site(part)]
    if (
        not named
        or len(set(named)) > 1
        or named[0].layer != (named[0].layer if layer is None else layer)
    ):
        places = ", ".join(site.hook_name for site in dict.fromkeys(named)) or module or "none"
        raise ValueError(
            f"{str(file)!r} names no single site (layer {layer}; {places}); its folder should be"
            " resid_post_layer_<n>."
        )
    architecture, layout = DICTIONARIES[kind]
    steps, rows = trainer.whole("steps") or 0, buffer.whole("out_batch_size") or 0
    provenance = Provenance(
        trainer.text("lm_name"),
        named[0].hook_name,
        UNMEASURED,
        context_size=buffer.whole("ctx_len") or CONTEXT,
        tokens=steps * rows,
    )
    return Found(
        "dictionary_learning",
        architecture,
        layout,
        provenance,
        file.parent.resolve().name,
        trainer.whole("activation_dim"),
        trainer.whole("dict_size"),
        trainer.number("k") or trainer.number("target_l0"),
    )


def _sparsify(release: Release, path: PurePosixPath, match: re.Match[str]) -> Found:
    file = release.root / path.parent / "cfg.json"
    config = read_config(file)
    cfg = Entries(config, file)
    cfg.refuse(activation="topk", transcode=False, skip_connection=False, signed=False)
    site = find_site(path.parent.name or release.root.resolve().name)
    run = release.root / path.parent.parent / "config.json"  # of the run, where it was uploaded too
    about = (
        Entries(read_config(run), run) if path.parent.name and run.is_file() else Entries({}, run)
    )
    d_in, k = cfg.whole("d_in"), cfg.whole("k")
    if not d_in or not k:
        raise ValueError(f"{str(file)!r} lacks d_in or k; get the file again.")
    provenance = Provenance(
        about.text("model"),
        site.hook_name,
        UNMEASURED,
        context_size=about.whole("ctx_len") or CONTEXT,
    )
    layout = LINEAR._replace(decoder="W_dec", decoder_by_feature=True, centred=True)
    d_sae = cfg.whole("num_latents") or d_in * (cfg.whole("expansion_factor") or 32)
    return Found("sparsify", "topk", layout, provenance, f"topk-k{k}", d_in, d_sae, k)


SCOPE = re.compile(r"SAE-Res-(?P<model>.+)-(?P<label>W(?P<width>\d{1,6})K-L0_(?P<k>\d{1,6}))")


def _qwen_scope(release: Release, path: PurePosixPath, match: re.Match[str]) -> Found:
    file = release.root / path.parent / "config.json"
    config = read_config(file) if file.is_file() else {}
    cfg = Entries(config, file)
    cfg.refuse(model_type="topk_sae", hook_point="resid_post")
    places = (*PurePosixPath(release.source).parts, *release.root.resolve().parts, *path.parts[:-1])
    names = [named for part in reversed(places) if (named := SCOPE.search(part))]
    named = names[0] if names else None
    k, told = cfg.whole("k"), int(named["k"]) if named else None
    if k is not None and told is not None and k != told:
        raise ValueError(
            f"{str(file)!r} says k={k}, the folder's name k={told}; give the folder its"
            " repository's name."
        )
    k = k or told
    if not k:
        raise ValueError(
            f"{release.source!r} does not say how many features a token its SAEs keep; give the"
            " folder its repository's name, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50."
        )
    model = cfg.text("base_model") or (f"Qwen/{named['model']}" if named else "")
    return Found(
        "Qwen-Scope",
        "topk",
        Layout(encoder_by_feature=True, decoder_by_feature=False),
        Provenance(model, Site("resid", int(match[1])).hook_name, UNMEASURED, context_size=1024),
        named["label"] if named else f"topk-k{k}",
        cfg.whole("d_model"),
        cfg.whole("d_sae") or (int(named["width"]) * 1024 if named else None),
        k,
    )


class Reader(NamedTuple):
    """What reads the releases of a library."""

    describe: Callable[[Release, PurePosixPath, re.Match[str]], Found]
    known_by: str
    """The library and its files, where a folder holds none of any."""


READERS = {
    r"sae_weights\.safetensors": Reader(
        _saelens, "qsae_kit and SAELens (cfg.json, sae_weights.safetensors)"
    ),
    r"ae\.pt": Reader(_dictionary_learning, "dictionary_learning (config.json, ae.pt)"),
    r"sae\.safetensors": Reader(_sparsify, "sparsify (cfg.json, sae.safetensors)"),
    r"layer(\d{1,4})\.sae\.pt": Reader(_qwen_scope, "Qwen-Scope (layer<n>.sae.pt)"),
}
"""A weights' file -> what describes it. A new format is one function and one entry."""


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
    if found.layout.centred:
        _fold_centre(sae)
    if found.layout.rescaled or found.architecture != "topk":
        _fold_norms(sae, 0.0 if found.layout.rescaled else UNIT)
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


def _fold_norms(sae: SAE, tolerance: float) -> None:
    """Decoder rows to unit norm, unless all are within a tolerance; reconstructions stay."""
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
    context_size, weights; empty where it is not known. On the hub only configurations are fetched.
    Raises ValueError as `find_saes` and `TensorFile` do.
    """
    release = open_release(source)
    return pd.DataFrame(_rows(release, find_saes(release)))


def _rows(release: Release, found: Sequence[Found]) -> Iterator[dict[str, Any]]:
    for one in found:
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
        }

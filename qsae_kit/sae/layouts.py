"""What the libraries of SAEs write: which files, what is in them and what is done with it, told
from names and configurations as a `Found`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from qsae_kit.io.jsonfiles import read_json
from qsae_kit.sae import ARCHITECTURES, Provenance
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sites import KINDS, Site, find_site

CONFIG_LIMIT = 2**20
"""Bytes of a configuration."""
OWN = "qsae_kit"
OWN_ENTRIES = tuple(("sparsity median_norm norm_factor drop_template tokens seed figures").split())
UNMEASURED = NormFilter(math.inf)
CONTEXT = 512
"""Tokens of a context where a release does not say it."""


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


class OtherCoder(ValueError):
    """A coder of a release that is none of ours: a transcoder, say, or one of a place where there
    is no site. Its text is the reason.
    """


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
    folders: tuple[str, ...] | None = None
    """What tells its variant; None: the folders that it lies in, without those that name a site."""
    threshold: float | None = None
    """Of every feature, where the configuration says it: of activations as they are ranked."""
    scales: tuple[float, float] = (1.0, 1.0)
    """What the library multiplies inputs by, and divides reconstructions by."""

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


def names_site(part: str) -> bool:
    """Whether the name of a folder is that of a site."""
    try:
        find_site(part)
    except ValueError:
        return False
    return True


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
            raise ValueError(
                f"{str(self.path)!r} has {name}={str(value)[:40]!r}, which must be text."
            )
        return default if value is None else value

    def flag(self, name: str) -> bool | None:
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(
                f"{str(self.path)!r} has {name}={str(value)[:40]!r}, which must be true or false."
            )
        return value

    def context(self, name: str) -> int:
        """Tokens of a context."""
        value = self.whole(name)
        if value is not None and value < 2:
            raise ValueError(f"{str(self.path)!r} has {name}={value}, which must be 2 or more.")
        return CONTEXT if value is None else value

    def figures(self, name: str) -> dict[str, float]:
        """Numbers by name."""
        given = self.object(name) or {}
        for key, value in given.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(
                    f"{str(self.path)!r} has {name}.{key[:40]}={str(value)[:40]!r}, which must be a"
                    " number."
                )
        return given

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

    def amount(self, name: str) -> float | None:
        """A number that may be 0."""
        value = self.config.get(name)
        return 0.0 if value in (0, 0.0) and not isinstance(value, bool) else self.number(name)

    def refuse(self, **wanted: Any) -> None:
        """OtherCoder where an entry is there and says something else than wanted."""
        for name, value in wanted.items():
            given = self.config.get(name)
            if given is not None and given != value:
                raise OtherCoder(
                    f"{str(self.path)!r} has {name}={str(given)[:80]!r}; what can be used here has"
                    f" {value!r}."
                )


def _site(name: str, file: Path) -> Site:
    """The site that a coder says it is of; OtherCoder for another place."""
    try:
        return find_site(name)
    except ValueError as error:
        raise OtherCoder(f"{str(file)!r}: {error}") from error


def _places(release: Release, path: PurePosixPath) -> list[str]:
    """The names of the folders around a file, the nearest first, and then the release's own."""
    own = (*release.root.resolve().parts, *path.parts[:-1])
    return [*reversed(own), *reversed(PurePosixPath(release.source).parts)]


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
    other = release.root / path.parent / "config.json"
    if not file.is_file() and other.is_file() and "hook_point_in" in read_config(other):
        raise OtherCoder(
            f"{str(other)!r} is of Language-Model-SAEs in the format after its release of Llama"
            " Scope, which is not read here."
        )
    config = read_config(file)
    if not isinstance(config.get("metadata"), dict):
        raise OtherCoder(
            f"{str(file)!r} is no SAE configuration of SAELens 6: it has no metadata; load it there"
            " and save it again."
        )
    cfg, meta = Entries(config, file), Entries(config, file).part("metadata")
    architecture = cfg.text("architecture")
    biases = SAELENS.get(architecture) or ("qsae_kit" in meta.config and _own_biases(architecture))
    if not biases:
        raise OtherCoder(
            f"{str(file)!r} is of a {architecture!r} SAE; known are {', '.join(SAELENS)}, and of"
            " our own files every architecture in `qsae_kit.sae.ARCHITECTURES`."
        )
    hook_name = meta.text("hook_name")
    site = _site(hook_name, file) if hook_name else None
    cfg.refuse(normalize_activations="none")
    if site is None or config.get("reshape_activations") != KINDS[site.kind].reshape:
        cfg.refuse(reshape_activations="none")
    meta.refuse(hook_head_index=None)
    layout = Layout(
        biases={name: name for name in biases},
        centred=bool(cfg.flag("apply_b_dec_to_input")),
        rescaled=bool(cfg.flag("rescale_acts_by_decoder_norm")),
    )
    provenance = Provenance(
        meta.text("model_name"),
        site.hook_name if site else "",
        UNMEASURED,
        drop_template=_excludes(meta),
        context_size=meta.context("context_size"),
        begins_with_bos=meta.flag("prepend_bos"),
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


def _excludes(meta: Entries) -> bool:
    """Whether special tokens, all or some, were left out."""
    given = meta.config.get("exclude_special_tokens")
    return bool(given if isinstance(given, list) else meta.flag("exclude_special_tokens"))


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
        drop_template=bool(kit.flag("drop_template")),
        tokens=kit.whole("tokens") or 0,
        seed=kit.whole("seed") or 0,
        figures=kit.figures("figures"),
        recipe=kit.object("recipe"),
        model_digest=kit.text("model_digest"),
        drop_prefix=bool(kit.flag("drop_prefix")),
        begins_with_bos=kit.flag("begins_with_bos"),
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
        raise OtherCoder(
            f"{str(file)!r} is of dict_class {kind!r}; known are {', '.join(DICTIONARIES)}."
        )
    buffer.refuse(io="out")
    layer, module = trainer.whole("layer"), trainer.text("submodule_name")
    named = [find_site(part) for part in (*path.parts[:-1], module) if part and names_site(part)]
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
        context_size=buffer.context("ctx_len"),
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
    around = _places(release, path)[:SITE_WITHIN]
    site = _site(next((name for name in around if names_site(name)), around[0]), file)
    about = _run_of(release, path)
    d_in, k = cfg.whole("d_in"), cfg.whole("k")
    if not d_in or not k:
        raise ValueError(f"{str(file)!r} lacks d_in or k; get the file again.")
    provenance = Provenance(
        about.text("model"),
        site.hook_name,
        UNMEASURED,
        context_size=about.context("ctx_len"),
    )
    layout = LINEAR._replace(decoder="W_dec", decoder_by_feature=True, centred=True)
    d_sae = cfg.whole("num_latents") or d_in * (cfg.whole("expansion_factor") or 32)
    return Found("sparsify", "topk", layout, provenance, f"topk-k{k}", d_in, d_sae, k)


SITE_WITHIN = 2
"""Folders, the nearest first, one of which names the site; the nearest may be that of a seed."""


def _run_of(release: Release, path: PurePosixPath) -> Entries:
    """The configuration of the run that wrote an SAE, some folders above it, where it is there."""
    for folder in list(path.parents)[1 : 1 + SITE_WITHIN]:
        run = release.root / folder / "config.json"
        if run.is_file():
            return Entries(read_config(run), run)
    return Entries({}, release.root / path)


SCOPE = re.compile(r"SAE-Res-(?P<model>.+)-(?P<label>W(?P<width>\d{1,6})K-L0_(?P<k>\d{1,6}))")


def _qwen_scope(release: Release, path: PurePosixPath, match: re.Match[str]) -> Found:
    file = release.root / path.parent / "config.json"
    config = read_config(file) if file.is_file() else {}
    cfg = Entries(config, file)
    cfg.refuse(model_type="topk_sae", hook_point="resid_post")
    names = [named for part in _places(release, path) if (named := SCOPE.search(part))]
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


LAYER = re.compile(r"(?:^|_)layer_(\d{1,4})(?=_|$)")
"""The layer in the name of a folder."""
GEMMA_SCOPE = re.compile(r"gemma-scope-(?P<size>\d{1,3}b)-(?P<tuned>pt|it)-(?P<kind>[a-z]+)")
GEMMA_KINDS = {"res": "resid", "mlp": "mlp", "att": "z"}
AVERAGE_L0 = re.compile(r"average_l0_(\d{1,6})")
GEMMA = Layout(biases={"b_enc": "b_enc", "threshold": "threshold"})
GEMMA_CONTEXT = 1024


def _gemma_scope(release: Release, path: PurePosixPath, match: re.Match[str]) -> Found:
    """All that is known of one stands in the names of its folders and its repository."""
    file, places = release.root / path, _places(release, path)
    named = next((found for part in places if (found := GEMMA_SCOPE.search(part))), None)
    if named is None:
        raise OtherCoder(
            f"{str(file)!r} does not say of which model and site it is; give the folder its"
            " repository's name, such as gemma-scope-2b-pt-res."
        )
    layer = next((found for part in places if (found := LAYER.search(part))), None)
    kind = GEMMA_KINDS.get(named["kind"])
    if kind is None or layer is None:
        what = f"coder of {named['kind']!r}" if kind is None else "coder of no layer"
        raise OtherCoder(
            f"{str(file)!r} is a {what}, such as of the embedding or a transcoder; what can be used"
            f" here is of a layer's {', '.join(GEMMA_KINDS)}."
        )
    l0 = next((found for part in places if (found := AVERAGE_L0.search(part))), None)
    model = f"google/gemma-2-{named['size']}" + ("-it" if named["tuned"] == "it" else "")
    return Found(
        "Gemma Scope",
        "jumprelu",
        GEMMA,
        Provenance(
            model,
            Site(kind, int(layer[1])).hook_name,
            UNMEASURED,
            context_size=GEMMA_CONTEXT,
            begins_with_bos=True,
        ),
        "jumprelu",
        sparsity=float(l0[1]) if l0 and int(l0[1]) else None,
        folders=_without_layer(path),
    )


def _without_layer(path: PurePosixPath) -> tuple[str, ...]:
    """The folders of a file without the layer that they name."""
    parts = [LAYER.sub("", part).strip("_") for part in path.parts[:-1]]
    return tuple(part for part in parts if part)


GEMMA_SCOPE_2 = re.compile(r"gemma-scope-2-(?P<size>\d{1,4}[mb])-(?P<tuned>pt|it)")
GEMMA_MODULES = {
    "resid_post": "output",
    "mlp_out": "post_feedforward_layernorm.output",
    "attn_out": "self_attn.o_proj.input",
}
"""How the folders begin -> where their SAEs are, for releases without configurations."""


def _gemma_scope_2(release: Release, path: PurePosixPath, match: re.Match[str]) -> Found:
    file = release.root / path.parent / "config.json"
    cfg = Entries(read_config(file) if file.is_file() else {}, file)
    cfg.refuse(architecture="jump_relu", type="sae", affine_connection=False)
    places = _places(release, path)
    given, out = cfg.config.get("hf_hook_point_in"), cfg.config.get("hf_hook_point_out")
    if isinstance(given, list) or (given is not None and out not in (None, given)):
        raise OtherCoder(
            f"{str(file)!r} is of a transcoder or a crosscoder, from {str(given)[:80]} to"
            f" {str(out)[:80]}; what can be used here reconstructs its input."
        )
    named = next((found for part in places if (found := GEMMA_SCOPE_2.search(part))), None)
    module = cfg.text("hf_hook_point_in")
    if not module:
        layer = next((found for part in places if (found := LAYER.search(part))), None)
        kinds = [m for part in places for n, m in GEMMA_MODULES.items() if part.startswith(n)]
        if named is None or layer is None or not kinds:
            raise OtherCoder(
                f"{str(release.root / path)!r} does not say at which site it is; get the"
                " config.json that belongs beside it."
            )
        module = f"model.layers.{layer[1]}.{kinds[0]}"
    model = cfg.text("model_name") or (f"gemma-3-{named[1]}-{named[2]}" if named else "")
    if model and "/" not in model:
        model = f"google/{model}"
    # the smallest one has no -pt on the hub, and one configuration writes v3
    model = model.replace("gemma-v3", "gemma-3").replace("270m-pt", "270m")
    return Found(
        "Gemma Scope 2",
        "jumprelu",
        GEMMA._replace(encoder="w_enc", decoder="w_dec"),
        Provenance(
            model,
            _site(module, file).hook_name,
            UNMEASURED,
            context_size=GEMMA_CONTEXT,
            begins_with_bos=True,
        ),
        "jumprelu",
        sparsity=cfg.number("l0"),
        folders=_without_layer(path),
    )


def _of_several_layers(release: Release, path: PurePosixPath, match: re.Match[str]) -> Found:
    raise OtherCoder(
        f"{str(release.root / path)!r} is of a coder of several layers; what can be used here"
        " reconstructs what it reads."
    )


LLAMA_SCOPE = re.compile(r"(?P<model>Llama3_1-8B-Base)-L\d{1,3}(?P<rest>[A-Z]{1,2}-\d{1,3}x)")
LLAMA_CONTEXT = 1024


def _llama_scope(release: Release, path: PurePosixPath, match: re.Match[str]) -> Found:
    """As Language-Model-SAEs reads its files: weights are brought to activations as they are, then
    decoders to unit norm where sparsity_include_decoder_norm says so, and what fires is told by a
    threshold on those.
    """
    file = release.root / path.parent.parent / HYPERPARAMETERS
    cfg = Entries(read_config(file), file)
    cfg.refuse(use_glu_encoder=False, use_decoder_bias=True)
    place, out = cfg.text("hook_point_in"), cfg.text("hook_point_out")
    if out not in ("", place):
        raise OtherCoder(
            f"{str(file)!r} is of a transcoder, from {place[:80]} to {out[:80]}; what can be used"
            " here reconstructs its input."
        )
    d_in, k = cfg.whole("d_model"), cfg.whole("top_k")
    normalised = cfg.text("norm_activation", "dataset-wise")
    scales = (1.0, 1.0)
    if normalised == "dataset-wise":
        norms = cfg.part("dataset_average_activation_norm")
        before = norms.number("in")
        if not d_in or before is None:
            raise ValueError(f"{str(file)!r} lacks d_model or a norm; get the file again.")
        scales = (d_in**0.5 / before, d_in**0.5 / (norms.number("out") or before))
    elif normalised not in ("none", "inference"):
        cfg.refuse(norm_activation="dataset-wise")
    threshold = cfg.amount("jump_relu_threshold")
    activation = cfg.text("act_fn", "relu").lower()
    if activation == "topk" and threshold:  # what is published so fires by the threshold
        activation = "jumprelu"
    if activation not in LLAMA_ARCHITECTURES:
        cfg.refuse(act_fn="jumprelu")
    known = any(LLAMA_SCOPE.search(part) for part in _places(release, path))
    rescaled = cfg.flag("sparsity_include_decoder_norm")
    centred = cfg.flag("apply_decoder_bias_to_pre_encoder")
    layout = LINEAR._replace(
        b_dec="decoder.bias",
        centred=centred is not False,
        rescaled=rescaled is not False,
    )
    return Found(
        "Llama Scope",
        LLAMA_ARCHITECTURES[activation],
        layout,
        Provenance(
            "meta-llama/Llama-3.1-8B" if known else "",
            _site(place, file).hook_name,
            UNMEASURED,
            context_size=LLAMA_CONTEXT,
            begins_with_bos=True,
        ),
        LLAMA_ARCHITECTURES[activation],
        d_in,
        cfg.whole("d_sae"),
        k or None,
        folders=tuple(
            LLAMA_SCOPE.sub(r"\g<model>-LX\g<rest>", part)
            for part in path.parts[:-1]
            if part != "checkpoints"
        ),
        threshold=(threshold or 0.0) if activation == "jumprelu" else None,
        scales=scales,
    )


HYPERPARAMETERS = "hyperparams.json"
LLAMA_ARCHITECTURES = {"jumprelu": "jumprelu", "topk": "topk", "relu": "standard"}
"""Their activation functions -> our architectures."""


class Reader(NamedTuple):
    """What reads the releases of a library."""

    describe: Callable[[Release, PurePosixPath, re.Match[str]], Found]
    known_by: str
    """The library and its files, where a folder holds none of any; empty for what is none of
    ours.
    """
    with_file: str = ""
    """What has to lie a folder above, where the weights' name alone says too little."""


READERS = {
    r"sae_weights\.safetensors": Reader(
        _saelens, "qsae_kit and SAELens (cfg.json, sae_weights.safetensors)"
    ),
    r"ae\.pt": Reader(_dictionary_learning, "dictionary_learning (config.json, ae.pt)"),
    r"sae\.safetensors": Reader(_sparsify, "sparsify (cfg.json, sae.safetensors)"),
    r"params\.npz": Reader(_gemma_scope, "Gemma Scope (params.npz)"),
    r"params\.safetensors": Reader(
        _gemma_scope_2, "Gemma Scope 2 (config.json, params.safetensors)"
    ),
    r"params_layer_\d{1,4}\.safetensors": Reader(_of_several_layers, ""),
    r"final\.safetensors": Reader(
        _llama_scope,
        "Llama Scope (hyperparams.json, checkpoints/final.safetensors)",
        HYPERPARAMETERS,
    ),
    r"layer(\d{1,4})\.sae\.pt": Reader(_qwen_scope, "Qwen-Scope (layer<n>.sae.pt)"),
}
"""A weights' file -> what describes it. A new format is one function and one entry."""

"""Sites: the places in a transformer where an SAE can sit, with their TransformerLens hook names,
widths and looks in figures.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Kind(NamedTuple):
    """What the sites of one kind have in common, whatever the layer."""

    hook: str
    """TransformerLens's name of the hook point, after `blocks.<layer>.`; `lm.hooked` has it."""
    label: str
    """In figures and messages."""
    color: str
    """In figures; colours are Okabe and Ito's, distinct to colour-blind eyes."""
    symbol: str
    """Plotly's name of the mark."""
    width: str = "d_model"
    """The attribute of `HookedLM` that says how many numbers a token has here."""
    through: str = ""
    """The linear module of a layer that takes what is here to the residual stream; empty: it is
    added there as it is.
    """
    reshape: str = "none"
    """SAELens's `reshape_activations` of an SAE that sits here."""
    modules: tuple[str, ...] = ()
    """What other libraries call it after `layers.<layer>.`; "" is the layer's own output."""
    submodules: tuple[str, ...] = ()
    """What other libraries call it before `_layer_<layer>`."""


KINDS = {
    "resid": Kind(
        "hook_resid_post",
        "residual stream",
        "#0072B2",
        "circle",
        modules=("", "output"),
        submodules=("resid_post", "resid_out"),
    ),
    "mlp": Kind(
        "hook_mlp_out",
        "MLP output",
        "#D55E00",
        "square",
        modules=("mlp", "feed_forward", "post_feedforward_layernorm.output"),
        submodules=("mlp_out",),
    ),
    "attn": Kind(
        "hook_attn_out",
        "attention output",
        "#009E73",
        "diamond",
        modules=("attn", "self_attn", "attention", "self_attn.o_proj"),
        submodules=("attn_out", "attention_out"),
    ),
    "z": Kind(
        "attn.hook_z",
        "attention heads",
        "#CC79A7",
        "triangle-up",
        width="d_heads",
        through="self_attn.o_proj",
        reshape="hook_z",
        modules=("self_attn.o_proj.input",),
    ),
}
"""Every kind of site: a new one is a row here."""


def look_of(kind: str) -> Kind:
    """How a kind is drawn; one that is not in the table, in grey under its own name."""
    return KINDS.get(kind) or Kind("", kind, "#777777", "x")


def in_order(kinds: Iterable[str]) -> list[str]:
    """Each kind once: those of the table in its order, then others as they come."""
    given = list(dict.fromkeys(kinds))
    return [kind for kind in KINDS if kind in given] + [k for k in given if k not in KINDS]


class Site(NamedTuple):
    """One site: `kind` is one of `KINDS`, `layer` counts from 0."""

    kind: str
    layer: int

    @property
    def hook_name(self) -> str:
        return f"blocks.{self.layer}.{KINDS[self.kind].hook}"


def _of_hook(hook: str) -> str | None:
    return next((kind for kind, row in KINDS.items() if row.hook == hook), None)


def kind_at(hook_name: str) -> Kind | None:
    """The kind of site at a hook point; None at one that is no site."""
    match = re.fullmatch(r"blocks\.\d+\.([\w.]+)", hook_name)
    kind = _of_hook(match[1]) if match else None
    return KINDS[kind] if kind else None


def kind_named(hook_name: str) -> str:
    """The kind of a hook name; of one that is no site, what follows the layer in it."""
    hook = re.sub(r"blocks\.\d+\.", "", hook_name)
    return _of_hook(hook) or hook


def width_name(hook_name: str) -> str:
    """The attribute of `HookedLM` that says how wide a hook point is, site or not."""
    row = kind_at(hook_name)
    return row.width if row else "d_model"


def parse_hook_name(hook_name: str) -> Site:
    """`blocks.3.hook_mlp_out` -> Site("mlp", 3); ValueError for a name that is no site."""
    match = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", hook_name)
    kind = _of_hook(match[2]) if match else None
    if match is None or kind is None:
        raise ValueError(
            f"{hook_name!r} is not a site; allowed are blocks.<layer>.<hook> with hook one of"
            f" {', '.join(row.hook for row in KINDS.values())}."
        )
    return Site(kind, int(match[1]))


def find_site(name: str) -> Site:
    """The site under the name that another library gives it; ValueError for one that is none here.

    Known are TransformerLens's hook names (`blocks.9.hook_resid_pre` is the residual stream after
    layer 8), modules of Hugging Face models (`model.layers.9`, `layers.9.mlp`: their output) and
    dictionary_learning's `resid_post_layer_9`.
    """
    if match := re.fullmatch(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d{1,4})(?:\.([\w.]+))?", name):
        layer, module = int(match[1]), match[2] or ""
        if module == "hook_resid_pre" and layer > 0:
            return Site("resid", layer - 1)
        for kind, row in KINDS.items():
            if module == row.hook or module in row.modules:
                return Site(kind, layer)
    elif match := re.fullmatch(r"(\w+)_layer_(\d{1,4})", name):
        for kind, row in KINDS.items():
            if match[1] in row.submodules:
                return Site(kind, int(match[2]))
    raise ValueError(
        f"{name!r} is not a site that SAEs can be used at; known are"
        f" {', '.join(row.label for row in KINDS.values())} of a layer: blocks.<layer>.<hook> with"
        f" hook one of {', '.join(row.hook for row in KINDS.values())}, or"
        " layers.<layer>[.mlp|.self_attn]."
    )


def parse_kinds(text: str) -> list[str]:
    """ "resid,mlp" -> ["resid", "mlp"]; ValueError for a kind that does not exist."""
    kinds = [part.strip() for part in text.split(",") if part.strip()]
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(
                f"There is no site {kind!r}; choose from {', '.join(KINDS)} (comma-separated)."
            )
    if not kinds:
        raise ValueError(f"No site was given; choose from {', '.join(KINDS)} (comma-separated).")
    return list(dict.fromkeys(kinds))


def parse_layers(text: str, n_layers: int) -> list[int]:
    """ "all", "0,2" or "1-3" -> sorted layer numbers; ValueError for one that the model does not
    have.
    """
    if text.strip() == "all":
        return list(range(n_layers))
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(f'Layers {text!r} cannot be read; write "all", "0,2" or "1-3".')
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not layers or max(layers) >= n_layers:
        raise ValueError(
            f"Layers {text!r} were asked for, but this model has layers 0 to {n_layers - 1}."
        )
    return sorted(layers)


TRAINED = ("resid", "mlp", "attn")
"""Kinds that are meant where none is named."""


def parse_at(text: str, left_out: Iterable[str] = TRAINED) -> tuple[str, str]:
    """Kinds and layers of "resid,mlp@2-5"; of what is left out all layers, or the kinds given here:
    "attn", "@2-5".

    Raises ValueError for what is written otherwise, and for a kind that does not exist.
    """
    kinds, separator, layers = (part.strip() for part in text.partition("@"))
    if (separator and not layers) or not (kinds or layers) or "." in text:
        raise ValueError(
            f"{text!r} was given for sites; write kinds@layers, such as resid,mlp@2-5, attn or @3."
        )
    return ",".join(parse_kinds(kinds or ",".join(left_out))), layers or "all"


HIGHEST_LAYER = 9_999
"""That is asked for of a suite whose model is not known yet."""


def hook_patterns(text: str) -> list[str]:
    """Hook names of "resid,mlp@2-5", with * for the layer where all are meant.

    Raises ValueError as `parse_at` and `parse_layers`.
    """
    kinds, layers = parse_at(text, KINDS)
    numbers = ["*"] if layers == "all" else parse_layers(layers, HIGHEST_LAYER + 1)
    return [f"blocks.{layer}.{KINDS[kind].hook}" for layer in numbers for kind in kinds.split(",")]


def expand_sites(kinds: list[str], layers: list[int]) -> list[Site]:
    """Every kind at every layer, layer by layer."""
    return [Site(kind, layer) for layer in layers for kind in kinds]

"""Sites: the places in a transformer where an SAE can sit, and their TransformerLens hook names."""

import re
from typing import NamedTuple

# Adding a site means adding a row here; HookedLM has the hook point if its name is a
# TransformerLens one.
HOOKS = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out"}


class Site(NamedTuple):
    """One site: `kind` is resid, mlp or attn, `layer` counts from 0."""

    kind: str
    layer: int

    @property
    def hook_name(self) -> str:
        return f"blocks.{self.layer}.{HOOKS[self.kind]}"


def parse_hook_name(hook_name: str) -> Site:
    """`blocks.3.hook_mlp_out` -> Site("mlp", 3); ValueError for a name that is no site."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook_name)
    kinds = {hook: kind for kind, hook in HOOKS.items()}
    if match is None or match[2] not in kinds:
        raise ValueError(
            f"{hook_name!r} is not a site; allowed are blocks.<layer>.<hook> with hook one of"
            f" {', '.join(HOOKS.values())}."
        )
    return Site(kinds[match[2]], int(match[1]))


# What other libraries call the output of a module -> our kind of site.
MODULES = {
    "": "resid",
    "output": "resid",
    "mlp": "mlp",
    "feed_forward": "mlp",
    "attn": "attn",
    "self_attn": "attn",
    "attention": "attn",
}
SUBMODULES = {
    "resid_post": "resid",
    "resid_out": "resid",
    "mlp_out": "mlp",
    "attn_out": "attn",
    "attention_out": "attn",
}


def find_site(name: str) -> Site:
    """The site under the name that another library gives it; ValueError for one that is none here.

    Known are TransformerLens's hook names (`blocks.9.hook_resid_pre` is the residual stream after
    layer 8), modules of Hugging Face models (`model.layers.9`, `layers.9.mlp`: their output) and
    dictionary_learning's `resid_post_layer_9`.
    """
    if match := re.fullmatch(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d{1,4})(?:\.(\w+))?", name):
        layer, module = int(match[1]), match[2] or ""
        if module == "hook_resid_pre" and layer > 0:
            return Site("resid", layer - 1)
        kind = MODULES.get(module) or {hook: kind for kind, hook in HOOKS.items()}.get(module)
        if kind is not None:
            return Site(kind, layer)
    elif (match := re.fullmatch(r"(\w+)_layer_(\d{1,4})", name)) and match[1] in SUBMODULES:
        return Site(SUBMODULES[match[1]], int(match[2]))
    raise ValueError(
        f"{name!r} is not a site that SAEs can be used at; known are the residual stream after a"
        " layer, the MLP output and the attention output: blocks.<layer>.<hook> with hook one of"
        f" {', '.join(HOOKS.values())}, or layers.<layer>[.mlp|.self_attn]."
    )


def parse_kinds(text: str) -> list[str]:
    """ "resid,mlp" -> ["resid", "mlp"]; ValueError for a kind that does not exist."""
    kinds = [part.strip() for part in text.split(",") if part.strip()]
    for kind in kinds:
        if kind not in HOOKS:
            raise ValueError(
                f"There is no site {kind!r}; choose from {', '.join(HOOKS)} (comma-separated)."
            )
    if not kinds:
        raise ValueError(f"No site was given; choose from {', '.join(HOOKS)} (comma-separated).")
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


def parse_at(text: str) -> tuple[str, str]:
    """Kinds and layers of "resid,mlp@2-5"; what is left out is all of it: "attn", "@2-5".

    Raises ValueError for what is written otherwise, and for a kind that does not exist.
    """
    kinds, separator, layers = (part.strip() for part in text.partition("@"))
    if (separator and not layers) or not (kinds or layers) or "." in text:
        raise ValueError(
            f"{text!r} was given for sites; write kinds@layers, such as resid,mlp@2-5, attn or @3."
        )
    return ",".join(parse_kinds(kinds or ",".join(HOOKS))), layers or "all"


HIGHEST_LAYER = 9_999
"""That is asked for of a suite whose model is not known yet."""


def hook_patterns(text: str) -> list[str]:
    """Hook names of "resid,mlp@2-5", with * for the layer where all are meant.

    Raises ValueError as `parse_at` and `parse_layers`.
    """
    kinds, layers = parse_at(text)
    numbers = ["*"] if layers == "all" else parse_layers(layers, HIGHEST_LAYER + 1)
    return [f"blocks.{layer}.{HOOKS[kind]}" for layer in numbers for kind in kinds.split(",")]


def expand_sites(kinds: list[str], layers: list[int]) -> list[Site]:
    """Every kind at every layer, layer by layer."""
    return [Site(kind, layer) for layer in layers for kind in kinds]

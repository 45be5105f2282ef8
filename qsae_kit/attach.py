"""What releases of SAEs do not say, measured on the model that they are used on: the median norm of
every site.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.data.documents import Document, TokenBatch, keep_mask, token_batches
from qsae_kit.data.rows import kept_rows, site_activations
from qsae_kit.lm.edits import Edit
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sae import SAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sites import parse_hook_name

ROWS = 8192
"""Tokens that a median is taken of."""


@torch.no_grad()
def calibrate(
    lm: HookedLM,
    suite: Mapping[str, Mapping[str, SAE]],
    batches: Iterable[TokenBatch],
    rows: int = ROWS,
) -> int:
    """Gives every SAE of a suite that has no median norm the one of its site, in place; returns the
    tokens it was taken of.

    batches: tokens of the model such as it will be used on; as many are passed as give `rows` kept
    ones, none where all SAEs have their median. Position 0 is never among them. Where a release
    does not say how many features a token fire either, the sparsity becomes the mean of those that
    fire on these tokens. Raises ValueError for batches without tokens.
    """
    unmeasured = [
        sae
        for saes in suite.values()
        for sae in saes.values()
        if sae.provenance and not sae.provenance.filter.measured
    ]
    if not unmeasured:
        return 0
    names = list(dict.fromkeys(sae.provenance.hook_name for sae in unmeasured if sae.provenance))
    lm.check_hook_names(names)
    if wrong := [sae.d_in for sae in unmeasured if sae.d_in != lm.d_model]:
        raise ValueError(
            f"An SAE has width d_in={wrong[0]}, but {lm.model_name!r} has d_model={lm.d_model};"
            " give its own model."
        )
    without_l0 = [sae for sae in unmeasured if sae.sparsity == sae.d_sae]
    counted = {sae.provenance.hook_name for sae in without_l0 if sae.provenance}
    norms: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in counted}
    taken = 0
    for batch in batches:
        if batch.keep.any():
            taken += int(batch.keep.sum())
            for name, x in kept_rows(lm, names, batch).items():
                norms[name].append(x.norm(dim=-1))
                if name in counted:
                    kept[name].append(x)
        if taken >= rows:
            break
    if not taken:
        raise ValueError("There are no tokens to measure the median norm on; give longer texts.")
    for sae in unmeasured:
        assert sae.provenance is not None
        median = float(torch.cat(norms[sae.provenance.hook_name]).nanmedian())
        sae.provenance = replace(
            sae.provenance, filter=NormFilter(median, sae.provenance.filter.factor)
        )
    for sae in without_l0:
        assert sae.provenance is not None
        parts = [
            x[sae.provenance.filter.keeps(x)].to(sae.b_dec.device)
            for x in kept[sae.provenance.hook_name]
        ]
        fired = sum(int((sae.encode(some) > 0).sum()) for x in parts for some in x.split(256))
        sae.sparsity = max(1.0, fired / max(1, sum(map(len, parts))))
    return taken


def _first(lm: HookedLM, documents: Callable[[], Iterable[Document]]) -> Iterator[TokenBatch]:
    yield from token_batches(lm, documents())  # made only where something is to be measured


def fit_to_model(
    lm: HookedLM,
    suite: Mapping[str, Mapping[str, SAE]],
    documents: Callable[[], Iterable[Document]],
) -> int:
    """Moves a suite to the model's device and calibrates it on the first of some documents; returns
    the tokens measured.
    """
    for saes in suite.values():
        for sae in saes.values():
            sae.to(lm.device)
    return calibrate(lm, suite, _first(lm, documents))


def check_measured(sae: SAE) -> None:
    """ValueError for an SAE without the median norm that its token filter and the strength of an
    edit are multiples of.
    """
    if sae.provenance is not None and not sae.provenance.filter.measured:
        raise ValueError(
            f"The SAE of {sae.provenance.hook_name} has no median norm, since its release names"
            " none; measure it first: qsae_kit.calibrate(lm, suite, qsae_kit.token_batches(lm,"
            " dialogues))."
        )


def is_of(lm: HookedLM, sae: SAE) -> bool:
    """Whether an SAE is of a model: by the weights' fingerprint, and by the names, wherever the
    model lies, where the SAE does not know it.
    """
    own = sae.provenance
    if own is None or own.model_name in ("", "stored"):
        return True
    if own.model_digest:
        return own.model_digest == lm.weights_digest()
    return Path(own.model_name).name == Path(lm.model_name).name


def check_fit(lm: HookedLM, sae: SAE) -> None:
    """ValueError unless an SAE is of this model, at a site that it has, of its width, and with the
    site's median norm.
    """
    if sae.provenance is None:
        raise ValueError("This SAE names no site; load it from its folder.")
    site, trained_on = parse_hook_name(sae.provenance.hook_name), sae.provenance.model_name
    if not is_of(lm, sae):
        weights = " with other weights" if sae.provenance.model_digest else ""
        raise ValueError(
            f"The SAE is of {trained_on!r}, the model is {lm.model_name!r}{weights}; give the SAE's"
            " own model."
        )
    if site.layer >= lm.n_layers:
        raise ValueError(
            f"The SAE sits at layer {site.layer}, but {lm.model_name!r} has layers 0 to"
            f" {lm.n_layers - 1}."
        )
    if sae.d_in != lm.d_model:
        raise ValueError(
            f"The SAE has width d_in={sae.d_in}, but {lm.model_name!r} has d_model={lm.d_model}."
        )
    check_measured(sae)


def splice(sae: SAE, keep: Tensor) -> Edit:
    """Replaces a site's activations by their reconstruction at the kept tokens that pass the SAE's
    norm filter.
    """
    assert sae.provenance is not None
    norms = sae.provenance.filter

    def delta(x: Tensor) -> Tensor:
        flat = x[keep].float()
        out = torch.zeros_like(x)
        out[keep] = torch.where(norms.keeps(flat)[:, None], sae(flat) - flat, 0.0).to(x.dtype)
        return out

    return Edit(sae.provenance.hook_name, delta, keep)


def constant(sae: SAE, keep: Tensor, value: Tensor | float) -> Edit:
    """Sets a site's activations to a value (0, or a mean [d_model]) at the tokens that `splice`
    would replace.
    """
    assert sae.provenance is not None
    norms = sae.provenance.filter
    return Edit(
        sae.provenance.hook_name,
        lambda x: torch.where(norms.keeps(x)[..., None], value - x, 0.0),
        keep,
    )


@torch.no_grad()
def token_features(
    lm: HookedLM, sae: SAE, rows: Sequence[Sequence[int]]
) -> list[Float[Tensor, "pos d_sae"]]:
    """An SAE's features of every token of each row of ids, 0 at tokens that do not count."""
    assert sae.provenance is not None
    out: list[Tensor] = []
    for start in range(0, len(rows), 32):
        some = rows[start : start + 32]
        ids, mask = lm.pad(some)
        batch = TokenBatch(ids, mask, keep_mask(lm, ids, mask))
        x = site_activations(lm, [sae.provenance.hook_name], batch)[sae.provenance.hook_name]
        counted = batch.keep & sae.provenance.filter.keeps(x)
        f = torch.where(counted[..., None], sae.encode(x.float()), 0.0)
        out += [f[r, : len(own)] for r, own in enumerate(some)]
    return out

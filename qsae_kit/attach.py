"""An SAE at its place in a model: does it fit, what does it read, what if it stood in.

What releases of SAEs do not say, the median norm of every site and the bound of its sinks, is
measured here on the model that they are used on. `attached` does all that a suite needs before it
is used.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import PureWindowsPath

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qsae_kit.data.documents import TokenBatch, TokenPolicy, keep_mask, token_batches
from qsae_kit.data.given import check_anew
from qsae_kit.data.records import Document
from qsae_kit.data.rows import kept_rows, site_activations
from qsae_kit.io.progress import say
from qsae_kit.lm.edits import Edit
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.lm.sources import public_name
from qsae_kit.sae import SAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.suites import ByVariant, Suite
from qsae_kit.sites import parse_hook_name

ROWS = 8192
"""Tokens that a median is taken of."""


@torch.no_grad()
def calibrate(
    lm: HookedLM,
    suite: ByVariant,
    batches: Iterable[TokenBatch],
    rows: int = ROWS,
) -> int:
    """Gives every SAE of a suite that has no median norm the norm filter of its site, in place;
    returns the tokens it was taken of.

    batches: tokens of the model such as it will be used on; as many are passed as give `rows` kept
    ones, none where all SAEs have their median. Position 0 is never among them. Where a release
    does not say how many features a token fire either, the sparsity becomes the mean of those that
    fire on these tokens. Raises ValueError for batches without tokens.
    """
    unmeasured = [sae for sae in Suite(suite).saes().values() if not sae.origin.filter.measured]
    if not unmeasured:
        return 0
    names = list(dict.fromkeys(sae.origin.hook_name for sae in unmeasured))
    lm.check_hook_names(names)
    for sae in unmeasured:
        check_width(lm, sae)
    without_l0 = [sae for sae in unmeasured if sae.sparsity == sae.d_sae]
    counted = {sae.origin.hook_name for sae in without_l0}
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
        norms_of_site = torch.cat(norms[sae.origin.hook_name])
        sae.provenance = replace(sae.origin, filter=NormFilter.of(norms_of_site))
    for sae in without_l0:
        parts = [
            x[sae.origin.filter.keeps(x)].to(sae.b_dec.device) for x in kept[sae.origin.hook_name]
        ]
        fired = sum(int((sae.encode(some) > 0).sum()) for x in parts for some in x.split(256))
        sae.sparsity = max(1.0, fired / max(1, sum(map(len, parts))))
    return taken


def _first(
    lm: HookedLM,
    suite: ByVariant,
    documents: Callable[[], Iterable[Document]],
) -> Iterator[TokenBatch]:
    # made only where something is to be measured
    yield from token_batches(lm, documents(), policy=policy_of(lm, suite))


def measure(lm: HookedLM, suite: ByVariant, documents: Callable[[], Iterable[Document]]) -> None:
    """Calibrates a suite on the first of some documents, and says so where there was something to
    measure. Raises ValueError as `calibrate`.
    """
    if tokens := calibrate(lm, suite, _first(lm, suite, documents)):
        said = f"The suite names no median norms; they are those of {tokens:,} tokens."
        say(said)


def attached(
    lm: HookedLM,
    suite: ByVariant,
    documents: Callable[[], Iterable[Document]] | None = None,
) -> Suite:
    """A suite as a model uses it: every SAE fits the model, lies on its device and has its site's
    median norm; the SAEs are changed in place.

    documents: gives texts or chats, on the first of which the medians that are lacking are measured
    (`calibrate`), which is printed. Raises ValueError as `check_fit`, for SAEs without provenance,
    and for documents without tokens.
    """
    own = Suite(suite)
    saes = own.saes().values()
    for sae in saes:
        _check_place(lm, sae)
    own.to(lm.device)
    if documents is not None:
        check_anew(documents, "The documents")
        measure(lm, own, documents)
    for sae in saes:
        check_measured(sae)
    return own


def _policy(lm: HookedLM, sae: SAE) -> TokenPolicy:
    own = sae.origin
    # without markers no token is known to be the template's
    drop_template = own.drop_template and lm.markers is not None
    return TokenPolicy(drop_template, own.context_size, own.drop_prefix).on(lm)


def policy_of(lm: HookedLM, suite: ByVariant) -> TokenPolicy:
    """The tokens that the SAEs of a suite were trained on, which batches for them are made by.

    Where some were trained without what all chats begin with, it is left out for all: it is the
    same rows over and over, on which nothing depends. Raises ValueError where they differ
    otherwise.
    """
    known = [_policy(lm, sae) for sae in Suite(suite).saes().values()]
    drop_prefix = any(policy.drop_prefix for policy in known)
    policies = {policy._replace(drop_prefix=drop_prefix) for policy in known}
    if len(policies) > 1:
        told = "; ".join(_said(policy) for policy in sorted(policies))
        raise ValueError(
            f"The SAEs were trained on different tokens ({told}); use them apart, by variant or"
            " site."
        )
    return policies.pop() if policies else TokenPolicy().on(lm)


def check_tokens(lm: HookedLM, saes: Iterable[SAE], batches: Iterable[TokenBatch]) -> None:
    """ValueError for batches with tokens of a kind that an SAE was not trained on: the template's,
    what all chats begin with, or beyond its context.
    """
    longest, template, prefix = 0, False, False
    for batch in batches:
        longest = max(longest, batch.ids.shape[1])
        template = template or not batch.policy.drop_template
        prefix = prefix or not batch.policy.drop_prefix
    for sae in saes:
        own = _policy(lm, sae)
        if (
            (template and own.drop_template)
            or (prefix and own.drop_prefix)
            or longest > own.context_size
        ):
            raise ValueError(
                f"The SAE of {sae.origin.hook_name} was trained on {_said(own)}, and the batches"
                " hold other tokens; make them with policy=qsae_kit.attach.policy_of(lm, suite)."
            )


def tokens_said(lm: HookedLM, sae: SAE) -> str:
    """In words, the tokens that an SAE was trained on and counts."""
    return _said(_policy(lm, sae))


def _said(policy: TokenPolicy) -> str:
    left_out = ["its template"] * policy.drop_template
    left_out += ["what all chats begin with"] * policy.drop_prefix
    said = f"{policy.context_size:,} tokens of a document"
    return f"{said} without {' and '.join(left_out)}" if left_out else said


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
    """Whether an SAE is of a model: by the weights' fingerprint, and where the SAE does not know
    it by the names, however they are spelt and wherever the model lies.
    """
    own = sae.provenance
    if own is None or own.model_name in ("", "stored"):
        return True
    if own.model_digest:
        return own.model_digest == lm.weights_digest()
    return _plain_name(own.model_name) == _plain_name(lm.model_name)


def _plain_name(name: str) -> str:
    """A model's name without its owner or folders: Qwen/Qwen3-1.7B is qwen3-1.7b."""
    return PureWindowsPath(public_name(name)).name.casefold().replace("_", "-")


def check_own(sae: SAE, *models: HookedLM) -> None:
    """ValueError where an SAE was trained on other weights than those of every model given.

    Where it knows no weights and only the names differ, a warning with the way out: the same model
    goes by many names.
    """
    if any(is_of(lm, sae) for lm in models):
        return
    trained_on = sae.origin.model_name
    named = " and ".join(repr(lm.model_name) for lm in models)
    if sae.origin.model_digest:
        raise ValueError(
            f"The SAE is of {trained_on!r}, the model is {named} with other weights; give the SAE's"
            " own model."
        )
    warnings.warn(
        f"The SAEs are of {trained_on!r} by their name, the model is {named}; where the two are"
        f" one, load_suite(..., model_name={models[0].model_name!r}) or qsae suite convert --model"
        " says so, else give the SAEs' own model.",
        stacklevel=2,
    )


def check_fit(lm: HookedLM, sae: SAE) -> None:
    """ValueError unless an SAE is of this model (`check_own`), at a site that it has, of its width,
    and with the site's median norm.
    """
    _check_place(lm, sae)
    check_measured(sae)


def _check_place(lm: HookedLM, sae: SAE) -> None:
    site = parse_hook_name(sae.origin.hook_name)
    if site.layer >= lm.n_layers:
        raise ValueError(
            f"The SAE sits at layer {site.layer}, but {lm.model_name!r} has layers 0 to"
            f" {lm.n_layers - 1}."
        )
    check_width(lm, sae)
    check_own(sae, lm)


def check_width(lm: HookedLM, sae: SAE) -> None:
    """ValueError unless an SAE is as wide as its site in this model."""
    assert sae.provenance is not None
    name = sae.provenance.hook_name
    if sae.d_in != lm.width(name):
        raise ValueError(
            f"The SAE has width d_in={sae.d_in}, but {lm.model_name!r} has {lm.width(name)} at"
            f" {name}; give the SAE's own model."
        )


def splice(sae: SAE, keep: Tensor) -> Edit:
    """Replaces a site's activations by their reconstruction at the kept tokens that pass the SAE's
    norm filter.
    """
    norms = sae.origin.filter

    def delta(x: Tensor) -> Tensor:
        flat = x[keep].float()
        out = torch.zeros_like(x)
        out[keep] = torch.where(norms.keeps(flat)[:, None], sae(flat) - flat, 0.0).to(x.dtype)
        return out

    return Edit(sae.origin.hook_name, delta, keep)


def constant(sae: SAE, keep: Tensor, value: Tensor | float) -> Edit:
    """Sets a site's activations to a value (0, or a mean [width]) at the tokens that `splice`
    would replace.
    """
    norms = sae.origin.filter
    return Edit(
        sae.origin.hook_name,
        lambda x: torch.where(norms.keeps(x)[..., None], value - x, 0.0),
        keep,
    )


@torch.no_grad()
def token_features(
    lm: HookedLM, sae: SAE, rows: Sequence[Sequence[int]]
) -> list[Float[Tensor, "pos d_sae"]]:
    """An SAE's features of every token of each row of ids, 0 at tokens that do not count."""
    return [f for f, _ in counted_features(lm, sae, rows)]


@torch.no_grad()
def counted_features(
    lm: HookedLM, sae: SAE, rows: Sequence[Sequence[int]]
) -> list[tuple[Float[Tensor, "pos d_sae"], Bool[Tensor, " pos"]]]:
    """`token_features`, and which tokens count: by the SAE's token policy and its norm filter."""
    hook_name, policy = sae.origin.hook_name, _policy(lm, sae)
    out: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(rows), 32):
        some = rows[start : start + 32]
        ids, mask = lm.pad(some)
        keep = keep_mask(lm, ids, mask, policy.drop_template, policy.drop_prefix)
        batch = TokenBatch(ids, mask, keep, policy)
        x = site_activations(lm, [hook_name], batch)[hook_name]
        counted = batch.keep & sae.origin.filter.keeps(x)
        f = torch.where(counted[..., None], sae.encode(x.float()), 0.0)
        out += [(f[r, : len(own)], counted[r, : len(own)]) for r, own in enumerate(some)]
    return out

"""What releases of SAEs do not say, measured on the model that they are used on: the median norm of every site."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from qsae_kit.activations import NormFilter, kept_rows
from qsae_kit.data import Document, TokenBatch, token_batches
from qsae_kit.models import HookedLM
from qsae_kit.sae import SAE

ROWS = 8192
"""Tokens that a median is taken of."""


@torch.no_grad()
def calibrate(lm: HookedLM, suite: Mapping[str, Mapping[str, SAE]], batches: Iterable[TokenBatch], rows: int = ROWS) -> int:
    """Gives every SAE of a suite that has no median norm the one of its site, in place; returns the tokens it was taken of.

    batches: tokens of the model such as it will be used on; as many are passed as give `rows` kept ones, none where all SAEs
    have their median. Position 0 is never among them. Where a release does not say how many features a token fire either, the
    sparsity becomes the mean of those that fire on these tokens. Raises ValueError for batches without tokens.
    """
    unmeasured = [
        sae for saes in suite.values() for sae in saes.values() if sae.provenance and not sae.provenance.filter.measured
    ]
    if not unmeasured:
        return 0
    names = list(dict.fromkeys(sae.provenance.hook_name for sae in unmeasured if sae.provenance))
    lm.check_hook_names(names)
    parts, taken = [], 0
    for batch in batches:
        if batch.keep.any():
            parts.append(kept_rows(lm, names, batch))
            taken += int(batch.keep.sum())
        if taken >= rows:
            break
    if not taken:
        raise ValueError("There are no tokens to measure the median norm on; give longer texts.")
    for name in names:
        x = torch.cat([part[name] for part in parts])
        norms = NormFilter(float(x.norm(dim=-1).nanmedian()))
        kept = x[norms.keeps(x)]
        for sae in unmeasured:
            assert sae.provenance is not None
            if sae.provenance.hook_name == name:
                sae.provenance = replace(sae.provenance, filter=norms)
                if sae.sparsity == sae.d_sae:
                    fired = sum(int((sae.encode(some) > 0).sum()) for some in kept.to(sae.b_dec.device).split(256))
                    sae.sparsity = max(1.0, fired / len(kept))
    return taken


def _first(lm: HookedLM, documents: Callable[[], Iterable[Document]]) -> Iterator[TokenBatch]:
    yield from token_batches(lm, documents())  # made only where something is to be measured


def fit_to_model(lm: HookedLM, suite: Mapping[str, Mapping[str, SAE]], documents: Callable[[], Iterable[Document]]) -> int:
    """Moves a suite to the model's device and calibrates it on the first of some documents; returns the tokens measured."""
    for saes in suite.values():
        for sae in saes.values():
            sae.to(lm.device)
    return calibrate(lm, suite, _first(lm, documents))


def check_measured(sae: SAE) -> None:
    """ValueError for an SAE without the median norm that its token filter and the strength of an edit are multiples of."""
    if sae.provenance is not None and not sae.provenance.filter.measured:
        raise ValueError(
            f"The SAE of {sae.provenance.hook_name} has no median norm, since its release names none; measure it first: "
            "qsae_kit.calibrate(lm, suite, qsae_kit.token_batches(lm, dialogues))."
        )

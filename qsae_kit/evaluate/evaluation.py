"""A suite of SAEs on held-out tokens -> one table: reconstruction, sparsity, and what splicing
costs the model.

Every figure stands beside the number of tokens behind it. Counted are the tokens of the keep-mask
(no padding, not position 0) that pass the SAE's norm filter; a prediction counts where the token
that it is made at is kept. Figures come per category: template tokens are easily reconstructed
and predicted, and inflate whatever they are averaged into.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from qsae_kit.attach import attached, check_tokens, constant, splice
from qsae_kit.data.documents import TokenBatch, categories_of
from qsae_kit.data.rows import site_activations
from qsae_kit.lm.chat import CATEGORIES
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.metrics.reconstruction import (
    Reconstruction,
    compare,
    cross_entropy,
    decoder_cosines,
    recovered,
)
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import ByVariant, Place
from qsae_kit.sites import parse_hook_name

Cell: TypeAlias = tuple[Place, str]
"""A place (or what stands in at its site) and a category of tokens."""


@dataclass
class Losses:
    """Sums over predictions, in nats, of a changed model and the clean one."""

    tokens: int = 0
    ce_clean: float = 0.0
    ce: float = 0.0
    kl: float = 0.0
    agree: float = 0.0

    def add(self, tokens: int, ce_clean: Tensor, ce: Tensor, kl: Tensor, agree: Tensor) -> None:
        self.tokens += tokens
        self.ce_clean += float(ce_clean.sum())
        self.ce += float(ce.sum())
        self.kl += float(kl.sum())
        self.agree += float(agree.sum())


@torch.no_grad()
def evaluate_suite(
    lm: HookedLM,
    suite: ByVariant,
    batches: Sequence[TokenBatch],
    spliced_batches: int | None = None,
    bar: bool = True,
) -> pd.DataFrame:
    """One row per variant, site and category of tokens; a category that no token or no spliced
    prediction has gets no row.

    batches: held-out tokens. Reconstruction uses all, splicing the first `spliced_batches` (None:
        all) of them.
    Columns: variant, site (hook name), layer, kind, category;
    `metrics.reconstruction.Reconstruction.figures` (tokens: rows behind them); ce, delta_ce and
    kl_nats (nats a token, spliced against clean), top_1 (share of equal predictions), the same
    deltas of zero and mean ablation (delta_ce_zero, kl_zero, delta_ce_mean, kl_mean), and how much
    of each is recovered: ce_score, kl_score (against zero), ce_score_mean, kl_score_mean;
    spliced_tokens (predictions behind these); target, d_sae, trained_tokens, and the decoder's
    cosines. Raises ValueError where an SAE does not fit the model or no token is left.
    """
    own = attached(lm, suite)
    saes, names = own.saes(), own.hook_names
    check_tokens(lm, saes.values(), batches)
    n_spliced = min(len(batches), len(batches) if spliced_batches is None else spliced_batches)
    rebuilt: dict[Cell, Reconstruction] = defaultdict(Reconstruction)
    passes = len(batches) + n_spliced * (len(saes) + 2 * len(names))
    with tqdm(total=passes, desc="evaluating", disable=not bar) as meter:
        for batch in batches:
            acts = site_activations(lm, names, batch)
            masks = categories_of(lm, batch)
            inside = {
                category: masks[category][batch.keep]
                for category in (CATEGORIES if lm.markers else masks)
            }
            for place, sae in saes.items():
                for category, parts in _reconstruct(
                    sae, acts[place.hook_name][batch.keep].float(), inside
                ).items():
                    rebuilt[place, category].add(*parts)
            meter.update()
        if lm.markers is not None:  # every token is in one category
            for place in saes:
                rebuilt[place, "all"] = sum(
                    (rebuilt[place, c] for c in CATEGORIES), Reconstruction()
                )
        if not all(rebuilt[place, "all"].rows for place in saes):
            raise ValueError(
                "There are no tokens to evaluate; give data whose keep-mask and norm filter leave"
                " some."
            )
        means = {place.hook_name: rebuilt[place, "all"].mean.float() for place in saes}
        spliced = _splice_all(lm, saes, means, batches[:n_spliced], meter)
    rows = []
    for place, sae in saes.items():
        site, cosines = parse_hook_name(place.hook_name), decoder_cosines(sae.W_dec)
        for category in ("all", *CATEGORIES):
            reconstruction = rebuilt[place, category]
            if not reconstruction.rows or not spliced[place, category].tokens:
                continue
            rows.append(
                {
                    "variant": place.variant,
                    "site": place.hook_name,
                    "layer": site.layer,
                    "kind": site.kind,
                    "category": category,
                }
                | reconstruction.figures()
                | _model_figures(spliced, place, category)
                | {
                    "target": sae.sparsity,
                    "d_sae": sae.d_sae,
                    "trained_tokens": sae.origin.tokens,
                }
                | cosines
            )
    return pd.DataFrame(rows)


def _reconstruct(
    sae: SAE, x: Tensor, inside: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Rows that pass the filter, their reconstructions and features, by category."""
    kept = sae.origin.filter.keeps(x)
    x = x[kept]
    f = sae.encode(x)
    x_hat = sae.decode(f)
    return {
        category: (x[mask[kept]], x_hat[mask[kept]], f[mask[kept]])
        for category, mask in inside.items()
    }


def _splice_all(
    lm: HookedLM,
    saes: Mapping[Place, SAE],
    means: dict[str, Tensor],
    batches: Sequence[TokenBatch],
    meter: tqdm,
) -> dict[Cell, Losses]:
    """Losses under every SAE, and under zero and mean ablation of every site (variants
    "zero" and "mean").
    """
    sums: dict[Cell, Losses] = defaultdict(Losses)
    for batch in batches:
        # The last token of a row predicts nothing that is known.
        counted = batch.keep[:, :-1] & batch.mask[:, 1:].bool()
        targets = batch.ids[:, 1:][counted]
        inside = {name: mask[:, 1:][counted] for name, mask in categories_of(lm, batch).items()}
        clean = lm(batch.ids, batch.mask)[:, :-1][counted]
        ce_clean = cross_entropy(clean, targets)

        def run(place: Place, edit: Edit) -> None:
            with applied(lm, [edit]):
                logits = lm(batch.ids, batch.mask)[:, :-1][counted]  # noqa: B023
            ce, kl, agree = compare(clean, logits, targets)  # noqa: B023
            for category, mask in inside.items():  # noqa: B023
                before = ce_clean[mask]  # noqa: B023
                sums[place, category].add(int(mask.sum()), before, ce[mask], kl[mask], agree[mask])
            meter.update()

        ablated: set[str] = set()
        for place, sae in saes.items():
            run(place, splice(sae, batch.keep))
            name = place.hook_name
            if name not in ablated:
                run(Place("zero", name), constant(sae, batch.keep, 0.0))
                run(Place("mean", name), constant(sae, batch.keep, means[name].to(lm.device)))
                ablated.add(name)
    return sums


def _model_figures(sums: Mapping[Cell, Losses], place: Place, category: str) -> dict[str, float]:
    own, zero, mean = (
        sums[place._replace(variant=variant), category]
        for variant in (place.variant, "zero", "mean")
    )
    n = own.tokens
    return {
        "ce": own.ce_clean / n,
        "delta_ce": (own.ce - own.ce_clean) / n,
        "kl_nats": own.kl / n,
        "top_1": own.agree / n,
        "delta_ce_zero": (zero.ce - zero.ce_clean) / n,
        "kl_zero": zero.kl / n,
        "delta_ce_mean": (mean.ce - mean.ce_clean) / n,
        "kl_mean": mean.kl / n,
        "ce_score": recovered(own.ce, own.ce_clean, zero.ce),
        "kl_score": recovered(own.kl, 0.0, zero.kl),
        "ce_score_mean": recovered(own.ce, own.ce_clean, mean.ce),
        "kl_score_mean": recovered(own.kl, 0.0, mean.kl),
        "spliced_tokens": n,
    }

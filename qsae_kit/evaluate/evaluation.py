"""A suite of SAEs on held-out tokens -> one table: reconstruction, sparsity, and what splicing
costs the model.

Every figure stands beside the number of tokens behind it. Counted are ordinary tokens: those of
the keep-mask (no padding, not position 0) that pass the SAE's norm filter; a prediction counts
where the token that it is made at does. What the filter leaves out, attention sinks, has columns of
its own. Figures come per category: template tokens are easily reconstructed
and predicted, and inflate whatever they are averaged into.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import pandas as pd
import torch
from torch import Tensor

from qsae_kit.attach import attached, check_tokens, constant, splice
from qsae_kit.data.documents import TokenBatch, categories_of
from qsae_kit.data.rows import site_activations
from qsae_kit.io.progress import say, tqdm
from qsae_kit.lm.chat import CATEGORIES
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM, by_token
from qsae_kit.metrics.reconstruction import (
    Reconstruction,
    compare,
    cross_entropy,
    decoder_cosines,
    recovered,
)
from qsae_kit.sae import SAE
from qsae_kit.sae.filter import NormFilter, Sinks, sinks_said
from qsae_kit.sae.suites import ByVariant, Place
from qsae_kit.sites import parse_hook_name


class Control(NamedTuple):
    """What stands in at a site for an SAE, at the tokens that pass its filter."""

    what: str
    """"zero" or "mean"."""
    hook_name: str
    filter: NormFilter


Cell: TypeAlias = tuple[Place | Control, str]
"""A place, or a control of its site, and a category of tokens."""


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
    `metrics.reconstruction.Reconstruction.figures` (tokens: rows behind them; n_sinks and
    share_sinks: rows beyond the norm filter and their share of the variance); ce, delta_ce and
    kl_nats (nats a token, spliced against clean), top_1 (share of equal predictions), the same
    deltas of zero and mean ablation (delta_ce_zero, kl_zero, delta_ce_mean, kl_mean), and how much
    of each is recovered: ce_score, kl_score (against zero), ce_score_mean, kl_score_mean;
    spliced_tokens (predictions behind these); target, d_sae, trained_tokens, and the decoder's
    cosines. With `bar` it is said which tokens are sinks. Raises ValueError where an SAE does not
    fit the model or no token is left.
    """
    own = attached(lm, suite)
    saes, names = own.saes(), own.hook_names
    check_tokens(lm, saes.values(), batches)
    n_spliced = min(len(batches), len(batches) if spliced_batches is None else spliced_batches)
    rebuilt: dict[tuple[Place, str], Reconstruction] = defaultdict(Reconstruction)
    sinks: dict[tuple[str, NormFilter], Counter[int]] = defaultdict(Counter)
    filters = dict.fromkeys((sae.origin.hook_name, sae.origin.filter) for sae in saes.values())
    passes = len(batches) + n_spliced * (len(saes) + 2 * len(filters))
    with tqdm(total=passes, desc="evaluating", disable=not bar) as meter:
        for batch in batches:
            acts = site_activations(lm, names, batch)
            masks = categories_of(lm, batch)
            inside = {
                category: masks[category][batch.keep]
                for category in (CATEGORIES if lm.markers else masks)
            }
            kept = {name: x[batch.keep].float() for name, x in acts.items()}
            for place, sae in saes.items():
                _reconstruct(sae, kept[place.hook_name], inside, rebuilt, place)
            for name, norms in filters:
                beyond = norms.drops(kept[name])
                sinks[name, norms].update(batch.ids[batch.keep][beyond].tolist())
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
        if bar:
            total = sum(int(batch.keep.sum()) for batch in batches)
            found = [
                Sinks(name, ids.total(), [lm.to_string([i]) for i, _ in ids.most_common()])
                for (name, _), ids in sinks.items()
                if ids
            ]
            if found:
                say(sinks_said(found, total))
        means = {place: rebuilt[place, "all"].mean.float() for place in saes}
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
                | _model_figures(spliced, place, sae, category)
                | {
                    "target": sae.sparsity,
                    "d_sae": sae.d_sae,
                    "trained_tokens": sae.origin.tokens,
                }
                | cosines
            )
    return pd.DataFrame(rows)


def _reconstruct(
    sae: SAE,
    x: Tensor,
    inside: dict[str, Tensor],
    rebuilt: dict[tuple[Place, str], Reconstruction],
    place: Place,
) -> None:
    """Takes in the rows of a batch by category: with reconstructions and features those that pass
    the filter, and the others as sinks.
    """
    kept, beyond = sae.origin.filter.keeps(x), sae.origin.filter.drops(x)
    sinks, x = x[beyond], x[kept]
    f = sae.encode(x)
    x_hat = sae.decode(f)
    for category, mask in inside.items():
        own = mask[kept]
        rebuilt[place, category].add(x[own], x_hat[own], f[own])
        rebuilt[place, category].add_sinks(sinks[mask[beyond]])


def _splice_all(
    lm: HookedLM,
    saes: Mapping[Place, SAE],
    means: dict[Place, Tensor],
    batches: Sequence[TokenBatch],
    meter: tqdm,
) -> dict[Cell, Losses]:
    """Losses under every SAE, and under the controls of every site and filter."""
    sums: dict[Cell, Losses] = defaultdict(Losses)
    names = list(dict.fromkeys(place.hook_name for place in saes))
    for batch in batches:
        # The last token of a row predicts nothing that is known.
        predicts = batch.keep[:, :-1] & batch.mask[:, 1:].bool()
        targets = batch.ids[:, 1:][predicts]
        inside = {name: mask[:, 1:][predicts] for name, mask in categories_of(lm, batch).items()}
        logits, cache = lm.run_with_cache(batch.ids, batch.mask, names_filter=names)
        clean = logits[:, :-1][predicts]
        ce_clean = cross_entropy(clean, targets)
        acts = {name: by_token(x)[:, :-1][predicts] for name, x in cache.items()}

        def run(cell: Place | Control, edit: Edit, ordinary: Tensor) -> None:
            with applied(lm, [edit]):
                logits = lm(batch.ids, batch.mask)[:, :-1][predicts]  # noqa: B023
            ce, kl, agree = compare(clean, logits, targets)  # noqa: B023
            for category, mask in inside.items():  # noqa: B023
                own = mask & ordinary
                before = ce_clean[own]  # noqa: B023
                sums[cell, category].add(int(own.sum()), before, ce[own], kl[own], agree[own])
            meter.update()

        done: set[Control] = set()
        for place, sae in saes.items():
            ordinary = sae.origin.filter.keeps(acts[place.hook_name])
            run(place, splice(sae, batch.keep), ordinary)
            zero, mean = _controls(place, sae)
            if zero not in done:
                middle = means[place].to(lm.device)
                run(zero, constant(sae, batch.keep, 0.0), ordinary)
                run(mean, constant(sae, batch.keep, middle), ordinary)
                done.add(zero)
    return sums


def _controls(place: Place, sae: SAE) -> tuple[Control, Control]:
    """What an SAE is compared with: its site set to 0, and to its mean."""
    zero = Control("zero", place.hook_name, sae.origin.filter)
    return zero, zero._replace(what="mean")


def _model_figures(
    sums: Mapping[Cell, Losses], place: Place, sae: SAE, category: str
) -> dict[str, float]:
    own, zero, mean = (sums[cell, category] for cell in (place, *_controls(place, sae)))
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

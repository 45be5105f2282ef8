"""One suite on two models of one shape, such as a base model and its instruct sibling: what tuning
changed, site by site.

Both models read the same tokens, and a token counts where the SAE's norm filter passes it in both,
so that figures are of the same tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch

from qsae_kit.attach import check_measured, check_own, check_tokens
from qsae_kit.data.documents import TokenBatch, categories_of
from qsae_kit.data.rows import site_activations
from qsae_kit.io.progress import tqdm
from qsae_kit.lm.chat import CATEGORIES
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.metrics.reconstruction import Reconstruction
from qsae_kit.sae.suites import ByVariant, Place, Suite
from qsae_kit.sites import parse_hook_name


class ModelDiff(NamedTuple):
    """What a suite says of two models."""

    sites: pd.DataFrame
    """A row for each variant, site and category of tokens: fvu_first, fvu_second, fvu_gap (second
    less first), l0_first, l0_second, tokens."""
    features: pd.DataFrame
    """A row for each feature that fires in either model: variant, site, feature, fired_first and
    fired_second (tokens), density_first, density_second, change (second less first), log_ratio (of
    the densities, in nats, with half a token added to each), overlap (tokens at which it fires in
    both, as a share of those at which it fires in either)."""


def check_pair(first: HookedLM, second: HookedLM, suite: ByVariant) -> None:
    """ValueError unless two models have one shape and one vocabulary, and the SAEs are of one of
    them.
    """
    shapes = [(lm.d_model, lm.n_layers) for lm in (first, second)]
    if shapes[0] != shapes[1] or first.tokenizer.get_vocab() != second.tokenizer.get_vocab():
        raise ValueError(
            f"{first.model_name!r} and {second.model_name!r} have different shapes {shapes[0]} and"
            f" {shapes[1]} (d_model, layers) or vocabularies; give two models that were tuned from"
            " one."
        )
    for sae in Suite(suite).saes().values():
        check_own(sae, first, second)
        hook_name = sae.origin.hook_name
        beyond = parse_hook_name(hook_name).layer >= first.n_layers
        if beyond or {sae.d_in} != {lm.width(hook_name) for lm in (first, second)}:
            raise ValueError(
                f"The SAE of {hook_name} does not fit models of the shape {shapes[0]}."
            )
        check_measured(sae)


@torch.no_grad()
def compare_models(
    first: HookedLM,
    second: HookedLM,
    suite: ByVariant,
    batches: Sequence[TokenBatch],
    bar: bool = True,
) -> ModelDiff:
    """Applies every SAE of a suite to both models, which lie on one device, on the same tokens.
    Raises ValueError as `check_pair`, or without tokens.
    """
    check_pair(first, second, suite)
    own = Suite(suite).to(first.device)
    saes, names = own.saes(), own.hook_names
    check_tokens(second, saes.values(), batches)
    sums: dict[tuple[Place, str], list[Reconstruction]] = defaultdict(
        lambda: [Reconstruction(), Reconstruction()]
    )
    both = {place: torch.zeros(sae.d_sae, dtype=torch.int64) for place, sae in saes.items()}
    for batch in tqdm(batches, desc="comparing", disable=not bar):
        acts = [site_activations(lm, names, batch) for lm in (first, second)]
        masks = categories_of(first, batch)
        inside = {c: masks[c][batch.keep] for c in (CATEGORIES if first.markers else masks)}
        for place, sae in saes.items():
            rows = [a[place.hook_name][batch.keep].float() for a in acts]
            kept = sae.origin.filter.keeps(rows[0]) & sae.origin.filter.keeps(rows[1])
            fired = []
            for i, x in enumerate(rows):
                x = x[kept]
                f = sae.encode(x)
                x_hat = sae.decode(f)
                fired.append(f > 0)
                for category, mask in inside.items():
                    some = mask[kept]
                    sums[place, category][i].add(x[some], x_hat[some], f[some])
            both[place] += (fired[0] & fired[1]).sum(0).cpu()
    site_rows, tables = [], []
    for place in saes:
        parts = {c: sums[place, c] for c in CATEGORIES if (place, c) in sums}
        whole = (
            [sum((pair[i] for pair in parts.values()), Reconstruction()) for i in (0, 1)]
            if parts
            else sums[place, "all"]
        )
        if not whole[0].rows:
            raise ValueError(
                "There are no tokens to compare; give data whose keep-mask and norm filter leave"
                " some."
            )
        for category, (a, b) in {"all": whole, **parts}.items():
            if a.rows:
                site_rows.append(
                    {
                        "variant": place.variant,
                        "site": place.hook_name,
                        "category": category,
                        "fvu_first": a.fvu,
                        "fvu_second": b.fvu,
                        "fvu_gap": b.fvu - a.fvu,
                        "l0_first": a.l0,
                        "l0_second": b.l0,
                        "tokens": a.rows,
                    }
                )
        tables.append(_features(place, whole, both[place]))
    return ModelDiff(pd.DataFrame(site_rows), pd.concat(tables, ignore_index=True))


def _features(place: Place, pair: Sequence[Reconstruction], both: torch.Tensor) -> pd.DataFrame:
    first, second = pair
    one, two = first.fired, second.fired
    table = pd.DataFrame(
        {
            "variant": place.variant,
            "site": place.hook_name,
            "feature": range(len(both)),
            "fired_first": one,
            "fired_second": two,
            "density_first": first.density,
            "density_second": second.density,
            "change": second.density - first.density,
            "log_ratio": ((two + 0.5) / (one + 0.5)).log(),
            "overlap": both.double() / (one + two - both).clamp(min=1),
        }
    )
    return table[(table["fired_first"] > 0) | (table["fired_second"] > 0)]


def most_changed(features: pd.DataFrame, n: int = 5) -> pd.DataFrame:
    """For each variant and site the features whose density rose and fell most; those of equal
    density are left out.
    """
    groups = (
        features[features["change"] != 0]
        .sort_values("change", kind="stable")
        .groupby(["variant", "site"], sort=False)
    )
    return (
        pd.concat([groups.tail(n).iloc[::-1], groups.head(n)])
        .drop_duplicates()
        .sort_values(
            ["variant", "site", "change"],
            ascending=[True, True, False],
            kind="stable",
            ignore_index=True,
        )
    )

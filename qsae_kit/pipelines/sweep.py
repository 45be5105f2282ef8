"""The grids of `qsae train`: sparsities and widths from one stream, and their frontier."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from qsae_kit.data.documents import held_out_batches
from qsae_kit.data.streams import documents_of, read_by
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.evaluate.score import (
    effective_ranks,
    save_figure,
    save_tables,
    spliced_share,
    tables_of,
)
from qsae_kit.figures.frontiers import frontier_figure
from qsae_kit.io.runs import Run
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.train.fit import fit_live
from qsae_kit.train.recipe import TrainConfig

SWEEP = "sweep.run.json"
"""The record of a sweep in its folder."""


def sweep(
    lm: HookedLM,
    data: str | None,
    sites: Sequence[str],
    config: TrainConfig,
    l0s: Sequence[float],
    expansions: Sequence[float],
    lengths: Sequence[int],
    tokens: int,
    out: Path,
    *,
    fresh: bool = False,
    bar: bool = True,
) -> pd.DataFrame:
    """Trains every L0 at every width from one stream, evaluates them, and writes sweep.csv,
    .parquet and .html.

    lengths: numbers of training tokens, each a run of its own in tokens_<n>/ (a decayed learning
        rate has no useful middle).
    tokens: held-out ones. The table is `evaluate_suite`'s with the columns expansion and target,
    and effective_rank. A sweep that was cut off goes on; fresh: it starts anew. Raises ValueError
    where the folder holds another one and `fresh` is not given, or files with these names that are
    of none, and while another process writes there.
    """
    identity = {
        **read_by(lm, data),
        "sites": list(sites),
        "recipe": asdict(config),
        "l0s": list(l0s),
        "expansions": list(expansions),
        "lengths": list(lengths),
        "tokens": tokens,
    }
    names = [*tables_of("sweep"), "sweep.html"]
    with only_writer(out):
        run = Run(out, identity, names, name=SWEEP, what="sweep", fresh=fresh)
        run.begin()
        run.again("sweep")
        table = _sweep(lm, data, sites, config, l0s, expansions, lengths, tokens, out, fresh, bar)
        run.done("sweep", names)
    return table


def _sweep(
    lm: HookedLM,
    data: str | None,
    sites: Sequence[str],
    config: TrainConfig,
    l0s: Sequence[float],
    expansions: Sequence[float],
    lengths: Sequence[int],
    tokens: int,
    out: Path,
    fresh: bool,
    bar: bool,
) -> pd.DataFrame:
    recipes = [replace(config, sparsity=l0, expansion=x) for x in expansions for l0 in l0s]
    batches = held_out_batches(lm, documents_of(lm, data)[0], tokens)
    tables = []
    for n in lengths:
        some = [replace(recipe, tokens=n) for recipe in recipes]
        suite = fit_live(lm, data, sites, some, out / f"tokens_{n}", fresh=fresh, bar=bar).suite
        own = evaluate_suite(lm, suite, batches, spliced_share(batches), bar)
        # asked for: sites skip different numbers of rows
        tables.append(own.assign(trained_tokens=n))
    table = pd.concat(tables, ignore_index=True)
    width = {recipe.variant: recipe.expansion for recipe in recipes}
    ranks = effective_ranks(lm, sites, batches)
    table = table.assign(
        expansion=table["variant"].map(width), effective_rank=table["site"].map(ranks)
    )
    save_tables(table, out / "sweep")
    longest = table[table["trained_tokens"] == table["trained_tokens"].max()]
    save_figure(frontier_figure(longest, lm.model_name), out / "sweep.html")
    return table

"""`qsae eval` and the grids of `qsae train`: from suites to tables and figures in a folder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from plotly.graph_objects import Figure
from torch import Tensor
from tqdm.auto import tqdm

from qsae_kit.attach import check_fit
from qsae_kit.data.documents import TokenBatch, held_out_batches, token_batches
from qsae_kit.data.rows import LiveRows
from qsae_kit.data.streams import documents_of
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.figures.basic import reconstruction_figure
from qsae_kit.figures.frontiers import baseline_figure, concept_figure, frontier_figure
from qsae_kit.io.files import write_table, write_text
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.metrics.reconstruction import Reconstruction
from qsae_kit.sae import SAE
from qsae_kit.tiny import concepts as planted
from qsae_kit.tiny.interchange import interchange_table
from qsae_kit.tiny.recovery import judge, recover, summarise
from qsae_kit.train.baselines import baseline_suite, found_again
from qsae_kit.train.fit import StoredFile, fit_live
from qsae_kit.train.recipe import TrainConfig, default_recipe

SPLICED_SHARE = 0.2
"""Of the held-out tokens, those that are spliced: a pass a site instead of one for all."""


@torch.no_grad()
def score_stored(
    file: StoredFile, sae: SAE, n_rows: int | None = None, batch: int = 4096
) -> dict[str, Any]:
    """Figures of an SAE on stored rows, none filtered, under the names that SAELens's evaluations
    use.

    n_rows: only the last so many. Raises ValueError for rows of another width or that are not
        finite.
    """
    rows = file.acts if n_rows is None else file.acts[-n_rows:]
    if rows.shape[1] != sae.d_in:
        raise ValueError(
            f"{str(file.path)!r} holds rows of width {rows.shape[1]}, the SAE takes"
            f" d_in={sae.d_in}; give its own site's rows."
        )
    named = sae.provenance.hook_name if sae.provenance else ""
    if file.hook_name and named and file.hook_name != named:
        raise ValueError(
            f"{str(file.path)!r} holds rows of {file.hook_name}, the SAE is of {named}; give rows"
            " of its own site."
        )
    total = Reconstruction()
    for part in rows.split(batch):
        x = part.to(sae.b_dec.device).float() / file.scale
        if not x.isfinite().all():
            raise ValueError(
                f"{str(file.path)!r} has rows that are not finite; store the activations again."
            )
        f = sae.encode(x)
        total.add(x, sae.decode(f), f)
    return {
        "architecture": sae.architecture,
        "d_sae": sae.d_sae,
        "rows": total.rows,
        "explained_variance": 1 - total.fvu,
        "mse": total.mse,
        "l0": total.l0,
        "cossim": total.cosine,
        "l2_ratio": total.l2_ratio,
        "alive": 1 - total.dead,
        "hook_name": named,
        "model_name": sae.provenance.model_name if sae.provenance else "",
    }


@dataclass
class Scores:
    """The tables of an evaluation."""

    evaluation: pd.DataFrame
    seeds: pd.DataFrame | None = None
    concepts: pd.DataFrame | None = None
    summary: pd.DataFrame | None = None
    interchange: pd.DataFrame | None = None


def score_suite(
    lm: HookedLM,
    suite: Mapping[str, Mapping[str, SAE]],
    data: str | None,
    tokens: int,
    out: Path,
    *,
    baselines: bool = False,
    concepts: bool = False,
    bar: bool = True,
) -> Scores:
    """Evaluates a suite, with its baselines where wanted, on held-out tokens; writes tables (.csv,
    .parquet) and figures (.html).

    Baselines are trained like the suite's first variant, on the documents that are not held out.
    concepts: which planted concepts of the bundled model are recovered, by the suite and by every
    baseline; ValueError for another model.
    """
    if concepts and lm.model_name != "tiny":
        raise ValueError(
            f"The concepts of {lm.model_name!r} are not known; --concepts is for the bundled model,"
            " tiny."
        )
    with only_writer(out):
        return _score_suite(lm, suite, data, tokens, out, baselines, concepts, bar)


def _score_suite(
    lm: HookedLM,
    suite: Mapping[str, Mapping[str, SAE]],
    data: str | None,
    tokens: int,
    out: Path,
    baselines: bool,
    concepts: bool,
    bar: bool,
) -> Scores:
    for saes in suite.values():
        for sae in saes.values():
            check_fit(lm, sae)  # before anything is trained
    held_out, training = documents_of(lm, data)
    everything: dict[str, dict[str, SAE]] = {variant: dict(saes) for variant, saes in suite.items()}
    if baselines:
        sites = list(next(iter(suite.values())))
        source = LiveRows(lm, sites, lambda: token_batches(lm, training()))
        everything |= baseline_suite(
            source, recipe_of(next(iter(suite.values()))), lm.model_name, bar=bar
        )
    batches = held_out_batches(lm, held_out, tokens)
    table = evaluate_suite(lm, everything, batches, _share(batches, SPLICED_SHARE), bar)
    scores = Scores(table)
    save_tables(table, out / "evaluation")
    own = table[table["variant"].isin(suite)]
    _save_figure(reconstruction_figure(own, lm.model_name), out / "evaluation.html")
    if baselines:
        _save_figure(baseline_figure(table, lm.model_name), out / "baselines.html")
        scores.seeds = seeds(table, next(iter(suite)), everything)
        save_tables(scores.seeds, out / "seeds")
    if concepts:
        score_planted(lm, everything, next(iter(suite)), out, scores, bar)
    return scores


def score_planted(
    lm: HookedLM,
    everything: Mapping[str, Mapping[str, SAE]],
    variant: str,
    out: Path,
    scores: Scores,
    bar: bool = True,
) -> None:
    """Concept recovery of every variant, and interchange with the features of one; fills and writes
    the tables.
    """
    corpus = planted.build_corpus(lm)
    units = {name: u for name, u in planted.concept_units(corpus).items() if name[0] in "cdef"}
    scores.concepts = recover(
        lm, corpus, units, everything, bar=partial(tqdm, desc="concepts", disable=not bar)
    )
    scores.summary = summarise(scores.concepts)
    scores.interchange = interchange_table(lm, scores.concepts, everything[variant], variant)
    for name in ("concepts", "summary", "interchange"):
        save_tables(getattr(scores, name), out / ("concept_summary" if name == "summary" else name))
    _save_figure(concept_figure(judge(scores.concepts)), out / "concepts.html")


SEED_METRICS = ("fvu", "delta_ce", "kl_nats", "ce_score", "kl_score", "top_1", "dead")


def seeds(
    evaluation: pd.DataFrame, variant: str, everything: Mapping[str, Mapping[str, SAE]]
) -> pd.DataFrame:
    """What a second seed of the recipe changes, per site: pw_mcc and found_again
    (`train.baselines.found_again`), and for every score the difference between the seeds (d_...).
    All sites together give the smallest difference that can be told from
    reseeding: `smallest_differences`.
    """
    whole = evaluation[evaluation["category"] == "all"]
    first, second = (
        whole[whole["variant"] == name].set_index("site")[list(SEED_METRICS)]
        for name in (variant, "second_seed")
    )
    again = {
        site: found_again(sae, everything["second_seed"][site])
        for site, sae in everything[variant].items()
    }
    return (
        pd.DataFrame.from_dict(again, orient="index")
        .join((second - first).add_prefix("d_"))
        .rename_axis("site")
        .reset_index()
    )


def smallest_differences(seeds: pd.DataFrame) -> dict[str, float]:
    """1.96 times the root mean square of the difference between two seeds, over sites: what lies
    below it is no finding.
    """
    return {m: 1.96 * float((seeds[f"d_{m}"] ** 2).mean() ** 0.5) for m in SEED_METRICS}


def _save_figure(figure: Figure, path: Path) -> None:
    write_text(path, figure.to_html(include_plotlyjs=True, div_id=path.stem))


def recipe_of(saes: Mapping[str, SAE]) -> TrainConfig:
    """The default recipe at the sizes that these SAEs were trained with."""
    sae = next(iter(saes.values()))
    if sae.provenance is None:
        raise ValueError("The SAEs name no tokens and no site; load them from their folder.")
    if not sae.provenance.tokens:
        raise ValueError(
            "The SAEs do not say how many tokens they were trained on, so baselines have nothing to"
            " match; leave them out."
        )
    tokens = max(2048, sae.provenance.tokens)
    return default_recipe(
        sae.d_in,
        len(saes),
        architecture=sae.architecture,
        sparsity=sae.sparsity,
        expansion=sae.d_sae / sae.d_in,
        tokens=tokens,
        batch=min(2048, max(256, 2 ** int(math.log2(tokens / 80)))),
        seed=sae.provenance.seed,
    )


def _share(batches: Sequence[TokenBatch], share: float) -> int:
    return max(1, round(share * len(batches)))


def save_tables(table: pd.DataFrame, path: Path) -> None:
    """A DataFrame as <path>.csv and <path>.parquet, each whole or not at all."""
    for suffix in (".csv", ".parquet"):
        write_table(table, path.with_suffix(suffix))


# --- the sweep


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
    resume: bool = False,
    bar: bool = True,
) -> pd.DataFrame:
    """Trains every L0 at every width from one stream, evaluates them, and writes sweep.csv,
    .parquet and .html.

    lengths: numbers of training tokens, each a run of its own in tokens_<n>/ (a decayed learning
        rate has no useful middle).
    tokens: held-out ones. The table is `evaluate_suite`'s with the columns expansion and target,
    and effective_rank. Raises ValueError while another process writes there.
    """
    with only_writer(out):
        return _sweep(lm, data, sites, config, l0s, expansions, lengths, tokens, out, resume, bar)


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
    resume: bool,
    bar: bool,
) -> pd.DataFrame:
    recipes = [replace(config, sparsity=l0, expansion=x) for x in expansions for l0 in l0s]
    batches = held_out_batches(lm, documents_of(lm, data)[0], tokens)
    tables = []
    for n in lengths:
        some = [replace(recipe, tokens=n) for recipe in recipes]
        suite = fit_live(lm, data, sites, some, out / f"tokens_{n}", resume=resume, bar=bar).suite
        own = evaluate_suite(lm, suite, batches, _share(batches, SPLICED_SHARE), bar)
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
    _save_figure(frontier_figure(longest, lm.model_name), out / "sweep.html")
    return table


def effective_ranks(
    lm: HookedLM, sites: Sequence[str], batches: Sequence[TokenBatch]
) -> dict[str, float]:
    """exp of the entropy of the covariance's spectrum, per site (Roy & Vetterli 2007): how many
    directions carry variance.
    """
    rows = LiveRows(lm, sites, lambda: batches)
    block = next(iter(rows.blocks(sum(int(batch.keep.sum()) for batch in batches))))
    return {site: effective_rank(x) for site, x in block.rows.items()}


def effective_rank(x: Float[Tensor, "row d_model"]) -> float:
    """exp(entropy) of the normalised eigenvalues of the rows' covariance."""
    centred = (x - x.mean(0)).double()
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    share = values / values.sum()
    return float(torch.exp(-(share * share.clamp(min=1e-300).log()).sum()))


def needed_l0(table: pd.DataFrame, metric: str, level: float) -> pd.DataFrame:
    """The L0 at which each site's frontier reaches `level` of a metric that falls with L0 (fvu,
    delta_ce).

    Interpolated along log L0 between trained SAEs, never beyond them: outside it is None, with
    `beyond` saying on which side. One row per site and expansion, of the SAEs that were trained
    longest.
    """
    rows = []
    longest = table[
        (table["category"] == "all") & (table["trained_tokens"] == table["trained_tokens"].max())
    ]
    for (site, expansion), some in longest.groupby(["site", "expansion"], sort=False):
        curve = some.sort_values("l0")
        l0, value = curve["l0"].to_numpy(), curve[metric].to_numpy()
        found, beyond = (
            None,
            "more" if value.min() > level else "less" if value.max() < level else "",
        )
        for i in range(len(l0) - 1):
            if (value[i] - level) * (value[i + 1] - level) <= 0 and value[i] != value[i + 1]:
                part = (value[i] - level) / (value[i] - value[i + 1])
                found = math.exp(math.log(l0[i]) + part * (math.log(l0[i + 1]) - math.log(l0[i])))
                break
        rows.append(
            {
                "site": site,
                "expansion": expansion,
                f"l0_at_{metric}_{level:g}": found,
                "beyond": beyond,
            }
        )
    return pd.DataFrame(rows)

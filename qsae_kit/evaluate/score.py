"""`qsae eval`: from a suite, and what it has to beat, to tables and figures in a folder."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float
from plotly.graph_objects import Figure
from torch import Tensor

from qsae_kit.attach import attached, policy_of
from qsae_kit.data.companions import companion_of
from qsae_kit.data.documents import TokenBatch, held_out_batches
from qsae_kit.data.rows import LiveRows
from qsae_kit.data.stored import StoredFile
from qsae_kit.data.streams import documents_of, read_by
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.figures.basic import reconstruction_figure
from qsae_kit.figures.frontiers import baseline_figure
from qsae_kit.io.files import write_table, write_text
from qsae_kit.io.processor import exact
from qsae_kit.io.runs import Run
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.metrics.reconstruction import Reconstruction, match
from qsae_kit.sae import SAE, Provenance
from qsae_kit.sae.suites import ByVariant, Suite

FOUND_AGAIN = 0.7
"""Cosine from which a feature counts as found again under another seed."""
SECOND_SEED = "second_seed"
"""The variant of baselines that is the recipe under another seed."""
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


ConceptScorer: TypeAlias = Callable[
    [HookedLM, Mapping[str, Mapping[str, SAE]], str, Path, bool],
    tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame],
]
"""Scores all variants, and one of them by interchange, on what was planted in a model; writes its
tables to a folder and gives them: concepts, summary, interchange.
"""


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
    suite: ByVariant,
    data: str | None,
    tokens: int,
    out: Path,
    *,
    baselines: Mapping[str, Mapping[str, SAE]] | None = None,
    concepts: ConceptScorer | None = None,
    fresh: bool = False,
    bar: bool = True,
) -> Scores:
    """Evaluates a suite, beside its baselines where they are given, on held-out tokens of the kind
    that it was trained on; writes tables (.csv, .parquet) and figures (.html).

    baselines: what `train.fit.fit_baselines` has trained for one of the suite's variants; they are
    compared where the suite has an SAE. concepts: what scores the planted concepts of the
    bundled model (`tiny.scoring.score_planted`), for the suite and every baseline. Raises
    ValueError for concepts of another model, and for baselines of another recipe or other sites.
    fresh: an evaluation that is in the folder goes; another one is refused without, and so are
    files with these names that are of none.
    """
    if concepts and not companion_of(lm).planted:
        raise ValueError(
            f"The concepts of {lm.model_name!r} are not known; --concepts is for the bundled model,"
            " tiny."
        )
    identity = {
        **read_by(lm, data),
        "tokens": tokens,
        "saes": _checksums(suite),
        "baselines": None if baselines is None else _checksums(baselines),
        "concepts": concepts is not None,
    }
    names = [*tables_of("evaluation"), "evaluation.html"]
    if baselines is not None:
        names += ["baselines.html", *tables_of("seeds")]
    if concepts:
        names += [name for told in PLANTED for name in tables_of(told)] + ["concepts.html"]
    with only_writer(out):
        run = Run(out, identity, names, name=EVALUATION, what="evaluation", fresh=fresh)
        run.begin()
        run.again("evaluate")
        scores = _score_suite(lm, suite, data, tokens, out, baselines, concepts, bar)
        run.done("evaluate", names)
    return scores


EVALUATION = "evaluation.run.json"
"""The record of an evaluation in its folder."""
PLANTED = ("concepts", "concept_summary", "interchange")
"""The tables that a `ConceptScorer` writes."""


def tables_of(name: str) -> list[str]:
    """The files that `save_tables` writes."""
    return [f"{name}{suffix}" for suffix in SUFFIXES]


def _checksums(suite: ByVariant) -> dict[str, str]:
    return {str(place): sae.checksum() for place, sae in Suite(suite).saes().items()}


def _score_suite(
    lm: HookedLM,
    suite: ByVariant,
    data: str | None,
    tokens: int,
    out: Path,
    baselines: Mapping[str, Mapping[str, SAE]] | None,
    concepts: ConceptScorer | None,
    bar: bool,
) -> Scores:
    everything = suite = Suite(suite)
    lead = next(iter(suite))
    if baselines is not None:
        lead = compared_variant(suite, baselines)
        everything |= _beside(suite[lead], baselines)
    everything = attached(lm, everything)  # before anything is passed
    policy = policy_of(lm, everything)
    batches = held_out_batches(lm, documents_of(lm, data)[0], tokens, policy)
    table = evaluate_suite(lm, everything, batches, spliced_share(batches), bar)
    scores = Scores(table)
    save_tables(table, out / "evaluation")
    own = table[table["variant"].isin(suite)]
    save_figure(reconstruction_figure(own, lm.model_name), out / "evaluation.html")
    if baselines is not None:
        save_figure(baseline_figure(table, lm.model_name), out / "baselines.html")
        scores.seeds = seeds(table, lead, everything)
        save_tables(scores.seeds, out / "seeds")
    if concepts:
        scores.concepts, scores.summary, scores.interchange = concepts(
            lm, everything, lead, out, bar
        )
    return scores


def compared_variant(
    suite: Mapping[str, Mapping[str, SAE]], baselines: Mapping[str, Mapping[str, SAE]]
) -> str:
    """The variant that baselines were made for: of their second seed's recipe, one seed before.

    Of variants that do not say their recipe, the first. Raises ValueError where there is none.
    """
    second = _origins(baselines.get(SECOND_SEED, {}))
    silent = [variant for variant, saes in suite.items() if not _origins(saes)]
    found = [
        variant
        for variant, saes in suite.items()
        if (own := _origins(saes)) and all(_precedes(o, s) for o in own for s in second)
    ]
    if not second or not (found or silent):
        raise ValueError(
            "The baselines were trained by the recipe of none of the variants"
            f" {', '.join(suite)}; make them with qsae baselines."
        )
    return (found or silent)[0]


def _origins(saes: Mapping[str, SAE]) -> list[Provenance]:
    """Of the SAEs that say their recipe."""
    return [sae.provenance for sae in saes.values() if sae.provenance and sae.provenance.recipe]


def _precedes(own: Provenance, other: Provenance) -> bool:
    """Whether two SAEs were trained by one recipe, the other under the next seed; entries that only
    one version of the package wrote do not count.
    """
    one, two = own.recipe or {}, other.recipe or {}
    shared = (one.keys() & two.keys()) - {"seed"}
    return other.seed == own.seed + 1 and all(one[name] == two[name] for name in shared)


def _beside(saes: Mapping[str, SAE], baselines: Mapping[str, Mapping[str, SAE]]) -> Suite:
    """Baselines at the sites of SAEs. Raises ValueError for a site without."""
    lacking = [site for of in baselines.values() for site in saes if site not in of]
    if lacking:
        raise ValueError(
            f"The baselines have no SAE at {lacking[0]}; make them for the same sites, or give the"
            " sites that they have."
        )
    return Suite(baselines).only(hook_names=list(saes))


def found_again(one: SAE, other: SAE) -> dict[str, float]:
    """How much of an SAE another run finds: mean |cosine| of decoder rows matched one to one
    (PW-MCC), and the share of pairs at `FOUND_AGAIN` or more."""
    cosines = match(one.W_dec.cpu(), other.W_dec.cpu())[2]
    return {
        "pw_mcc": float(cosines.mean()),
        "found_again": float((cosines >= FOUND_AGAIN).double().mean()),
    }


SEED_METRICS = ("fvu", "delta_ce", "kl_nats", "ce_score", "kl_score", "top_1", "dead")


def seeds(evaluation: pd.DataFrame, variant: str, everything: ByVariant) -> pd.DataFrame:
    """What a second seed of the recipe changes, per site: pw_mcc and found_again
    (`found_again`), and for every score the difference between the seeds (d_...).
    All sites together give the smallest difference that can be told from
    reseeding: `smallest_differences`.
    """
    whole = evaluation[evaluation["category"] == "all"]
    first, second = (
        whole[whole["variant"] == name].set_index("site")[list(SEED_METRICS)]
        for name in (variant, SECOND_SEED)
    )
    again = {
        site: found_again(sae, everything[SECOND_SEED][site])
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


def save_figure(figure: Figure, path: Path) -> None:
    """A figure as a page that needs no network, whole or not at all."""
    write_text(path, figure.to_html(include_plotlyjs=True, div_id=path.stem))


SUFFIXES = (".csv", ".parquet")
"""Of a table's files."""


def spliced_share(batches: Sequence[TokenBatch]) -> int:
    """The number of batches that are spliced."""
    return max(1, round(SPLICED_SHARE * len(batches)))


def save_tables(table: pd.DataFrame, path: Path) -> None:
    """A DataFrame as <path>.csv and <path>.parquet, each whole or not at all."""
    for suffix in SUFFIXES:
        write_table(table, path.with_suffix(suffix))


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
    centred = exact(x - x.mean(0))
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

"""Parts of tables that are shown first."""

from collections.abc import Sequence

import pandas as pd

HEADLINE = (
    "variant site category fvu l0 target dead delta_ce kl_nats ce_score top_1 tokens spliced_tokens"
).split()
"""Columns of `evaluate_suite` for a table that fits a page."""


def headline(
    evaluation: pd.DataFrame, categories: Sequence[str] = ("all", "assistant")
) -> pd.DataFrame:
    """The columns and categories that a page has room for."""
    return evaluation.loc[evaluation["category"].isin(categories), HEADLINE]


SHORT = {
    "fvu": "FVU",
    "l0": "L0",
    "dead": "dead",
    "delta_ce": "rise of CE",
}
"""Columns for a terminal, with their headings: a table of at most 76 columns."""
SHOWN_AS = {"fvu": "{:.3f}", "l0": "{:.1f}", "dead": "{:.1%}", "delta_ce": "{:.3f}"}


def in_short(evaluation: pd.DataFrame, category: str = "all") -> pd.DataFrame:
    """Every SAE's figures for a terminal: variant, site as kind and layer, and `SHORT`."""
    rows = evaluation[evaluation["category"] == category]
    sites = [f"{kind} {layer}" for kind, layer in zip(rows["kind"], rows["layer"], strict=True)]
    out = pd.DataFrame({"SAE": rows["variant"].tolist(), "site": sites})
    return _shortly(out, rows)


def by_kind(evaluation: pd.DataFrame, category: str = "all") -> pd.DataFrame:
    """The medians over a kind's layers, a row for each variant and kind of site."""
    rows = evaluation[evaluation["category"] == category]
    medians = rows.groupby(["variant", "kind"], sort=False)[list(SHORT)].median().reset_index()
    counts = rows.groupby(["variant", "kind"], sort=False).size().tolist()
    layers = [f"{n} layer{'' if n == 1 else 's'}" for n in counts]
    sites = [f"{kind}, {told}" for kind, told in zip(medians["kind"], layers, strict=True)]
    out = pd.DataFrame({"SAEs": medians["variant"].tolist(), "sites": sites})
    return _shortly(out, medians)


def _shortly(named: pd.DataFrame, figures: pd.DataFrame) -> pd.DataFrame:
    """Rows with their names and, as text, the figures of `SHORT`."""
    return named.assign(
        **{
            told: [SHOWN_AS[name].format(value) for value in figures[name]]
            for name, told in SHORT.items()
        }
    )

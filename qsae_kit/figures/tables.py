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

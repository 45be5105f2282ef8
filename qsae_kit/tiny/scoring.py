"""Which planted concepts the SAEs of an evaluation tell, as tables and a figure in its folder."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from qsae_kit.figures.frontiers import concept_figure
from qsae_kit.io.files import write_table, write_text
from qsae_kit.io.progress import tqdm
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sae import SAE
from qsae_kit.tiny import concepts as planted
from qsae_kit.tiny.interchange import interchange_table
from qsae_kit.tiny.recovery import judge, recover, summarise

TIERS = "cdef"
"""Of concepts that count, each by the first letter of its name."""


class Recovery(NamedTuple):
    """The tables of a recovery."""

    concepts: pd.DataFrame
    """`tiny.recovery.recover`."""
    summary: pd.DataFrame
    interchange: pd.DataFrame


def score_planted(
    lm: HookedLM,
    everything: Mapping[str, Mapping[str, SAE]],
    variant: str,
    out: Path,
    bar: bool = True,
) -> Recovery:
    """Concept recovery of every variant, and interchange with the features of one, on the bundled
    model; writes the tables (.csv, .parquet) and concepts.html.
    """
    corpus = planted.build_corpus(lm)
    units = {name: u for name, u in planted.concept_units(corpus).items() if name[0] in TIERS}
    found = recover(
        lm, corpus, units, everything, bar=partial(tqdm, desc="concepts", disable=not bar)
    )
    made = Recovery(
        found, summarise(found), interchange_table(lm, found, everything[variant], variant)
    )
    names = {"concepts": made.concepts, "concept_summary": made.summary}
    for name, table in (names | {"interchange": made.interchange}).items():
        for suffix in (".csv", ".parquet"):
            write_table(table, out / f"{name}{suffix}")
    page = concept_figure(judge(found)).to_html(include_plotlyjs=True, div_id="concepts")
    write_text(out / "concepts.html", page)
    return made

"""One self-contained HTML page from the tables of a run, and a study's folder; every text is
escaped, plots need no network.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined

from qsae_kit.data.companions import companion_of
from qsae_kit.figures.basic import (
    controls_figure,
    detector_figure,
    dose_figure,
    price_figure,
    reconstruction_figure,
)
from qsae_kit.figures.tables import headline
from qsae_kit.io.files import write_table, write_text
from qsae_kit.io.journal import Journal
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sae.suites import Suite
from qsae_kit.steer.directions import done_along
from qsae_kit.steer.study import JOURNAL, STUDY_FILES, StudyResult
from qsae_kit.steer.study.findings import COLUMNS

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN = (
    "intervention prompt_kind strength n refusal_rate ci_low ci_high deflected_rate correct_rate "
    "broken_rate change change_low change_high kl_first kl_answer perplexity repetition"
).split()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The unsteered rows and those at the frozen strength; of random and noise the draw that moved
    the rate farthest.
    """
    kept = [table[table["intervention"] == "none"].drop_duplicates("prompt_kind")]
    for goal in dict.fromkeys(table.loc[table["goal"] != "none", "goal"]):
        frozen = table[(table["goal"] == goal) & table["chosen"] & table["refusal_rate"].notna()]
        for arm in dict.fromkeys(frozen["intervention"]):
            rows = frozen[frozen["intervention"] == arm]
            if rows["draw"].notna().any():
                worst = rows.loc[[rows["change"].abs().idxmax()]]
                rows = worst.assign(intervention=f"{arm} (worst of {len(rows)})")
            kept.append(rows)
    return pd.concat(kept).reset_index(drop=True)


def render_report(
    lm: HookedLM, evaluation: pd.DataFrame | None, studies: Sequence[StudyResult]
) -> str:
    """The page as a string; evaluation: None leaves the part about reconstruction out."""
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    figure, table = "", ""
    if evaluation is not None:
        figure = reconstruction_figure(evaluation, lm.model_name).to_html(
            full_html=False, include_plotlyjs=False, div_id="reconstruction"
        )
        table = headline(evaluation).round(4).to_html(index=False, border=0, escape=True)
    parts = [_part(study, lm.model_name, first=i == 0) for i, study in enumerate(studies)]
    return page.render(
        model=lm.model_name,
        note=companion_of(lm).note,
        reconstruction=figure,
        evaluation=table,
        studies=parts,
        columns=COLUMNS,
    )


def _part(study: StudyResult, model_name: str, first: bool) -> dict[str, Any]:
    """What the page shows of a study; the first one brings plotly."""
    h = study.headline
    return {
        "title": f"{study.config.goal} {study.behaviour}",
        "verdict": study.verdict,
        "site": h["site"],
        "condition": h["condition"] and _condition_told(h),
        "features": _weighed(h["features"], h["weights"]),
        "done": done_along(
            h["intervention"],
            study.config.signed(h["intervention"], h["strength"]),
            h["orthogonal"],
        ),
        "searched": h["searched_sets"],
        "dose": (
            dose_figure(study.table, study.target, model_name).to_html(
                full_html=False, include_plotlyjs=first, div_id=f"dose-{study.config.goal}"
            )
        ),
        "price": price_figure(study.table, study.target, h["priced_on"], model_name).to_html(
            full_html=False, include_plotlyjs=False, div_id=f"price-{study.config.goal}"
        ),
        "controls": (
            controls_figure(study.table, study.target, model_name).to_html(
                full_html=False, include_plotlyjs=False, div_id=f"controls-{study.config.goal}"
            )
        ),
        "detector": (
            ""
            if study.detector is None
            else detector_figure(study.detector, model_name).to_html(
                full_html=False, include_plotlyjs=False, div_id=f"detector-{study.config.goal}"
            )
        ),
        "table": (
            summary(study.table)[SHOWN]
            .round(3)
            .to_html(index=False, border=0, escape=True, na_rep="")
        ),
        "candidates": (
            study.candidates[study.candidates["site"] == h["site"]]
            .round(3)
            .to_html(index=False, border=0, escape=True)
        ),
        "trials": study.selection.round(3).to_html(index=False, border=0, escape=True),
        "example_columns": list(study.examples.columns),
        "examples": study.examples.to_numpy().tolist(),
    }


def _price(study: StudyResult, lm: HookedLM) -> go.Figure:
    return price_figure(study.table, study.target, study.headline["priced_on"], lm.model_name)


def _page(name: str, figures: Sequence[go.Figure]) -> str:
    """A page of its own with figures one below the other; needs no network."""
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=i == 0, div_id=f"{name}-{i}")
        for i, figure in enumerate(figures)
    ]
    head = '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
    return f"{head}<title>{name}</title></head><body>{''.join(parts)}</body></html>\n"


def _condition_told(h: dict[str, Any]) -> str:
    """A headline's condition, and how it does, in a clause."""
    when = h["condition"]
    ids, weights = when["features"], when["weights"]
    what = "feature" if len(ids) == 1 else "the sum of features (weights)"
    return (
        f"only while {what} {_weighed(ids, weights) if weights else ids[0]} at"
        f" {when['hook_name']} is above {when['threshold']:.3g} at tokens {when['positions']!r} or"
        f" was before (it fires on {h['detector_true_rate']:.0%} of the target's prompts and"
        f" {h['detector_false_rate']:.0%} of others; on the selection prompts that set its"
        f" threshold, on {1 - h['detector_missed']:.0%} and {h['detector_false_alarms']:.0%})"
    )


def _weighed(ids: Sequence[int], weights: Sequence[float]) -> str:
    return ", ".join(f"{i} ({w:+.3g})" for i, w in zip(ids, weights, strict=True))


def write_study(study: StudyResult, suite: Suite, lm: HookedLM, out: Path) -> None:
    """Writes study.csv (its columns are `steer.study.findings.COLUMNS`), study.json (headline,
    verdict, configuration), steering.json (the frozen edit, for `load_steering`), means.json (the
    difference of means at its own best), candidates.csv, selection.csv, examples.csv, prompts.json,
    two pages of figures and report.html; of a study with a condition also detector.csv
    (`metrics.detection.detector_curve`) and its figure.

    Raises ValueError for a folder that holds another study, or files with these names that are of
    none.
    """
    with only_writer(out):
        Journal(out / JOURNAL, study.identity, STUDY_FILES)
        write_table(study.table, out / "study.csv")
        write_table(study.candidates, out / "candidates.csv")
        write_table(study.selection, out / "selection.csv")
        write_table(study.examples, out / "examples.csv")
        write_text(
            out / "prompts.json", json.dumps(study.prompts, indent=1, ensure_ascii=False) + "\n"
        )
        about = {
            "headline": study.headline,
            "verdict": study.verdict,
            "config": asdict(study.config),
        }
        write_text(out / "study.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        study.steering.save(out / "steering.json", suite)
        study.means.save(out / "means.json", suite)
        figures = {
            "dose": [dose_figure(study.table, study.target, lm.model_name), _price(study, lm)],
            "controls": [controls_figure(study.table, study.target, lm.model_name)],
        }
        if study.detector is not None:
            write_table(study.detector, out / "detector.csv")
            figures["detector"] = [detector_figure(study.detector, lm.model_name)]
        for name, drawn in figures.items():
            write_text(out / f"{name}.html", _page(name, drawn))
        write_text(out / "report.html", render_report(lm, None, [study]))

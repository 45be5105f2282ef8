"""One self-contained HTML page from the tables of a run, and a study's folder; every text is
escaped, plots need no network.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pandas as pd
import plotly.graph_objects as go
import torch

from qsae_kit.data.companions import companion_of
from qsae_kit.figures.basic import (
    ARM_NAMES,
    KIND_COLORS,
    capital,
    controls_figure,
    detector_figure,
    dose_figure,
    outcome_figure,
    price_figure,
    reconstruction_figure,
)
from qsae_kit.figures.pages import template
from qsae_kit.figures.tables import headline
from qsae_kit.io.files import write_table, write_text
from qsae_kit.io.journal import Journal
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sae.suites import Suite
from qsae_kit.steer.behaviours import GOALS, SIGN
from qsae_kit.steer.directions import done_along
from qsae_kit.steer.study import JOURNAL, STUDY_FILES, StudyResult
from qsae_kit.steer.study.findings import COLUMNS, meanings
from qsae_kit.steer.study.words import percent

TEMPLATE = Path(__file__).with_name("report.html.jinja")
HEADINGS = {
    "intervention": "what was done",
    "prompt_kind": "prompts",
    "strength": "strength",
    "n": "n",
    "refusal_rate": "shown",
    "ci_low": "from",
    "ci_high": "to",
    "deflected_rate": "deflected",
    "correct_rate": "right",
    "broken_rate": "broken",
    "change": "change",
    "change_low": "from",
    "change_high": "to",
    "kl_first": "KL, first token (nats)",
    "kl_answer": "KL a token (nats)",
    "perplexity": "perplexity",
    "repetition": "repetition",
}
"""Columns of a study's table that are shown, with their headings in words."""
SHOWN = list(HEADINGS)
DRAWS = {
    "random": "strongest of {} random searches",
    "random_single": "strongest of {} random sets",
}
"""Controls of several draws, as they are called when the strongest is meant."""
DONE = {"suppress": "suppressed", "induce": "induced"}
SHOWN_ANSWERS = 3
"""Answers before and after that are shown at once; the others are folded."""


class Card(NamedTuple):
    """A chosen feature, for readers who see it for the first time."""

    number: int
    name: str
    """Its label, or its strongest token."""
    weight: float
    density: float
    """Share of tokens that it fires on."""
    promoted: Sequence[str]
    """Tokens whose logits it raises most."""
    examples: Sequence[Sequence[tuple[str, float]]]
    """Tokens with their activation as a share of the feature's largest one."""
    link: str
    """Of its page; "" without one."""


Cards: TypeAlias = Callable[[StudyResult], Sequence[Card]]


def no_cards(_study: StudyResult) -> Sequence[Card]:
    """Of a study without an index."""
    return ()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The unsteered rows and those at the frozen strength; of controls with several draws the one
    that went farthest the goal's way.
    """
    kept = [table[table["intervention"] == "none"].drop_duplicates("prompt_kind")]
    for goal in GOALS:
        frozen = table[(table["goal"] == goal) & table["chosen"] & table["refusal_rate"].notna()]
        for arm in dict.fromkeys(frozen["intervention"]):
            rows = frozen[frozen["intervention"] == arm]
            if rows["draw"].notna().any():
                worst = rows.loc[[(SIGN[goal] * rows["refusal_rate"]).idxmax()]]
                told = DRAWS.get(arm, "strongest of {} random directions").format(len(rows))
                rows = worst.assign(intervention=told)
            kept.append(rows)
    return pd.concat(kept).reset_index(drop=True)


def outcomes(study: StudyResult) -> pd.DataFrame:
    """The three rows that a study comes down to, on the target's prompts: unsteered, with the
    features, and with the control that went farthest the goal's way (other than more of the
    features). Columns: told, and those of `summary`.
    """
    rows = summary(study.table)
    own = rows[rows["prompt_kind"] == study.target]
    ours = own["intervention"].isin(["none", "features"])
    others = own[~ours & (own["intervention"] != "wrong_sign")]
    kept = own[ours]
    if len(others):
        sign = SIGN[study.config.goal]
        kept = pd.concat([kept, others.loc[[(sign * others["refusal_rate"]).idxmax()]]])
    told = [_told(arm) for arm in kept["intervention"]]
    return kept.assign(told=told).reset_index(drop=True)


def _told(arm: str) -> str:
    return ARM_NAMES.get(arm, arm)


def render_report(
    lm: HookedLM,
    evaluation: pd.DataFrame | None,
    studies: Sequence[StudyResult],
    cards: Cards = no_cards,
) -> str:
    """The page as a string; evaluation: None leaves the part about reconstruction out. cards: the
    chosen features of a study as an index knows them.
    """
    page = template(TEMPLATE)
    figure, rows = "", []
    if evaluation is not None:
        figure = _drawn(
            reconstruction_figure(evaluation, lm.model_name), "reconstruction", not studies
        )
        rows = headline(evaluation, ["all"]).to_dict("records")
    parts = [_part(study, lm.model_name, cards(study), i == 0) for i, study in enumerate(studies)]
    return page.render(
        model=lm.model_name,
        note=companion_of(lm).note,
        about=_about(lm, evaluation, studies),
        reconstruction=figure,
        evaluation=rows,
        studies=parts,
        columns=COLUMNS,
        kinds=list(
            dict.fromkeys(kind for study in studies for kind in study.prompts["evaluation"])
        ),
        colors=KIND_COLORS,
        share=percent,
    )


def _about(
    lm: HookedLM, evaluation: pd.DataFrame | None, studies: Sequence[StudyResult]
) -> list[str]:
    """What was run on what, when, a sentence each."""
    told = [
        f"{lm.model_name}: {sum(p.numel() for p in lm.parameters()) / 1e6:,.1f} million parameters,"
        f" {lm.n_layers} layers of width {lm.d_model}."
    ]
    if evaluation is not None:
        sites = evaluation["site"].nunique()
        kinds = evaluation["variant"].nunique()
        told.append(
            f"{sites * kinds} SAEs at {sites} sites, evaluated on"
            f" {int(evaluation['tokens'].max()):,} held-out tokens."
        )
    if studies:
        done = " and ".join(DONE[study.config.goal] for study in studies)
        prompts = studies[0].prompts["evaluation"]
        counts = ", ".join(f"{len(texts)} {kind}" for kind, texts in prompts.items())
        told.append(
            f"{capital(studies[0].behaviour)} was {done} by features chosen on some prompts and"
            f" measured on others ({counts}), in answers of at most"
            f" {studies[0].config.max_new_tokens} tokens."
        )
    made = datetime.now(UTC).strftime("%Y-%m-%d")
    return [
        *told,
        f"Made {made} with qsae_kit {version('qsae_kit')} and torch {torch.__version__}.",
    ]


def _drawn(figure: go.Figure, name: str, first: bool) -> str:
    """A figure as a part of a page; the first one brings plotly."""
    config = {"responsive": True, "displaylogo": False}
    return figure.to_html(full_html=False, include_plotlyjs=first, div_id=name, config=config)


def _part(
    study: StudyResult, model_name: str, cards: Sequence[Card], first: bool
) -> dict[str, Any]:
    """What the page shows of a study."""
    h, goal = study.headline, study.config.goal
    shown = "refused" if study.behaviour == "refusal" else f"showing {study.behaviour!r}"
    figures = {
        "dose": dose_figure(study.table, study.target, model_name),
        "price": price_figure(study.table, study.target, h["priced_on"], model_name),
        "controls": controls_figure(study.table, study.target, model_name),
    }
    if study.detector is not None:
        figures["detector"] = detector_figure(study.detector, model_name)
    examples = study.examples
    turned = (examples["prompt_kind"] == study.target) & (examples["base"] != examples["steered"])
    ordered = pd.concat([examples[turned], examples[~turned]]).to_dict("records")
    return {
        "goal": goal,
        "title": f"{'Taking' if goal == 'suppress' else 'Inducing'} {study.behaviour}"
        + (" away" if goal == "suppress" else ""),
        "sentence": study.in_words,
        "verdict": study.verdict,
        "outcome": _drawn(
            outcome_figure(outcomes(study), study.target, shown), f"outcome-{goal}", first
        ),
        "cards": cards,
        "gains": _gains(study, shown),
        "site": h["site"],
        "condition": h["condition"] and _condition_told(h),
        "features": _weighed(h["features"], h["weights"]),
        "done": done_along(
            h["intervention"],
            study.config.signed(h["intervention"], h["strength"]),
            h["orthogonal"],
        ),
        "searched": h["searched_sets"],
        "figures": [_drawn(figure, f"{name}-{goal}", False) for name, figure in figures.items()],
        "headings": [(HEADINGS[name], meanings()[name]) for name in SHOWN],
        "rows": [
            [_told(row[0]), *(_cell(value) for value in row[1:])]
            for row in summary(study.table)[SHOWN].itertuples(index=False)
        ],
        "candidates": (
            study.candidates[study.candidates["site"] == h["site"]]
            .round(3)
            .to_html(index=False, border=0, escape=True)
        ),
        "trials": study.selection.round(3).to_html(index=False, border=0, escape=True),
        "answers": ordered[:SHOWN_ANSWERS],
        "more_answers": ordered[SHOWN_ANSWERS:],
    }


def gains(study: StudyResult) -> pd.DataFrame:
    """For a terminal, at most 76 columns: the rate of the unsteered model, of the features and of
    their controls on the target and the kinds beside it, broken answers, and the price in nats.
    """
    told = _gains(study, "")
    columns: dict[str, list[str]] = {}
    for long, _, short, cells in told["lines"]:
        columns[long if short in columns else short] = cells
    return pd.DataFrame({"": told["arms"], **columns})


def _cell(value: Any) -> str:
    """A figure with three decimals, "" where there is none."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}"
    return str(value)


def _gains(study: StudyResult, shown: str) -> dict[str, Any]:
    """What the edit does and what it costs, beside the unsteered model and the controls: arms as
    columns, a row a figure.
    """
    rows = summary(study.table)
    arms = ["none", "features", "difference_of_means_best"]
    arms += [arm for arm in dict.fromkeys(rows["intervention"]) if arm.startswith("strongest of")][
        :1
    ]
    table = study.table[study.table["chosen"] | (study.table["intervention"] == "none")]
    lines = []
    for kind in (study.target, *study.headline["others"]):
        own = rows[rows["prompt_kind"] == kind].set_index("intervention")["refusal_rate"]
        cells = [percent(own[arm]) if arm in own.index else "" for arm in arms]
        lines.append((f"{kind} prompts {shown}", kind, kind, cells))
    broken = rows[rows["prompt_kind"] == study.target].set_index("intervention")["broken_rate"]
    cells = [percent(broken[arm]) if arm in broken.index else "" for arm in arms]
    lines.append((f"answers to {study.target} prompts broken", "", "broken", cells))
    priced = study.headline["kl_first_priced"]
    told = [f"{priced[arm]:.3f}" if arm in priced else "" for arm in arms]
    where = study.headline["priced_on"]
    price = f"KL at the first token of {where} prompts (nats)"
    lines.append((price, "", "KL", ["0", *told[1:]]))
    facts = table.dropna(subset=["facts_right"]).drop_duplicates("intervention")
    right = facts.set_index("intervention")["facts_right"]
    if len(right):
        cells = [percent(right[arm]) if arm in right.index else "" for arm in arms]
        lines.append(("questions of fact answered right", "", "facts", cells))
    return {"arms": [_told(arm) for arm in arms], "lines": lines}


def _price(study: StudyResult, lm: HookedLM) -> go.Figure:
    return price_figure(study.table, study.target, study.headline["priced_on"], lm.model_name)


def _page(name: str, figures: Sequence[go.Figure]) -> str:
    """A page of its own with figures one below the other; needs no network."""
    parts = [_drawn(figure, f"{name}-{i}", i == 0) for i, figure in enumerate(figures)]
    head = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<meta name="color-scheme" content="light dark">'
    )
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


def write_study(
    study: StudyResult, suite: Suite, lm: HookedLM, out: Path, cards: Cards = no_cards
) -> None:
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
            "in_words": study.in_words,
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
        write_text(out / "report.html", render_report(lm, None, [study], cards))

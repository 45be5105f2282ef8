"""The report of an audit: one HTML file that needs no network."""

import math
from pathlib import Path
from typing import Any

from qsae_kit.audit.attribution import By
from qsae_kit.audit.auditing import Audited, Case
from qsae_kit.figures.pages import SCRIPT, STYLE, as_json, part, template, visible
from qsae_kit.io.files import write_text
from qsae_kit.sae.suites import Feature

TEMPLATE = Path(__file__).with_name("audit.html.jinja")
BY = {
    "gradient": "what each feature does alone (gradient times activation)",
    "path": "each feature's part in what all of its site do (integrated gradients)",
}
FAINT = 0.01
"""Nats below which a site does too little for a completeness."""
MARGIN = 4
"""Per cent of the figure's width that is left free on both sides."""
DIGITS = 4
"""Significant digits of what a token's colour stands for."""


def audit_page(audited: Audited) -> str:
    """The page as a string."""
    return template(TEMPLATE).render(
        model=audited.model,
        cases=[_case(case, n, audited.config.by) for n, case in enumerate(audited.cases)],
        by=BY[audited.config.by],
        provenance=audited.provenance,
        saes=audited.saes,
        style=part(STYLE),
        script=part(SCRIPT),
    )


def write_audit(audited: Audited, path: str | Path) -> Path:
    """Writes the page to a file, whole or not at all; returns where it is."""
    write_text(Path(path), audit_page(audited))
    return Path(path)


def _case(case: Case, number: int, by: By) -> dict[str, Any]:
    """What the page shows of a dialogue."""
    found = case.attribution
    without = {one.feature: one for one in case.without}
    rows = found.features.to_dict("records")
    features = [
        {
            "name": visible(case.known[feature].name) if feature in case.known else "",
            "number": feature.number,
            "site": feature.place.hook_name,
            "predicted": f"{row[by]:+.3f}",
            "effect": f"{row['effect']:+.3f}",
            "share": _percent(row["share"]),
            "token": visible(row["token"]),
            "position": int(row["position"]),
            "activation": f"{row['activation']:.3g}",
            "known": _known(case, feature),
            "answer": without.get(feature),
        }
        for feature, row in zip(case.features, rows, strict=True)
    ]
    return {
        "id": f"case-{number}",
        "sentence": case.in_words,
        "title": case.title,
        "said": found.question.said,
        "value": f"{found.value:.3f}",
        "own": case.own,
        "answer": case.answer,
        "greedy": case.greedy,
        "ended": case.ended,
        "tokens": "".join(case.tokens),
        "data": as_json(dialogue_data(case)),
        "features": features,
        "agreement": "" if math.isnan(found.agreement) else f"{found.agreement:.2f}",
        "without_all": without.get(None),
        "effects": _effects(case),
        "controls": case.controls,
        "sites": [_site(row) for row in found.sites.to_dict("records")],
        "said_tokens": [
            (visible(text), f"{100 * math.exp(logprob):.1f} %", case.n_prompt + i == case.at)
            for i, (text, logprob) in enumerate(
                zip(case.tokens[case.n_prompt :], case.logprobs, strict=True)
            )
        ],
    }


def _known(case: Case, feature: Feature) -> dict[str, Any] | None:
    if feature not in case.known:
        return None
    known = case.known[feature]
    return {
        "density": f"{100 * known.density:.3g} %",
        "promoted": [visible(token) for token in known.promoted],
        "examples": [[(visible(text), act) for text, act in one] for one in known.examples],
    }


def _site(row: dict[Any, Any]) -> dict[str, str]:
    """Of a site: what its features do together, how complete that is, and what none explains."""
    whole = abs(row["effect"]) >= FAINT
    return {
        "site": row["site"],
        "features": f"{row['features']:+.3f}",
        "effect": f"{row['effect']:+.3f}",
        "complete": _percent(row["features"] / row["effect"]) if whole else "\u2013",
        "bias": f"{row['bias']:+.3f}",
        "error": f"{row['error']:+.3f}",
        "verified": str(row["verified"]),
        "together": f"{row['together']:+.3f}",
    }


def _effects(case: Case) -> list[dict[str, Any]]:
    """Lines of the figure, from 0 to 100 across: the top features beside their controls."""
    lines: list[tuple[str, float, tuple[float, float] | None]] = []
    if case.features:
        n = len(case.features)
        lines.append((f"The top {n} together" if n > 1 else "The feature", case.together, None))
    if case.controls:
        n, draws = case.controls.features, len(case.controls.effects)
        told = f"{n} at random, mean of all {draws} draws"
        lines.append((told, case.controls.mean, case.controls.ends))
    ends = [0.0, *(value for _, value, _ in lines)]
    ends += [value for _, _, interval in lines if interval for value in interval]
    low, wide = min(ends), (max(ends) - min(ends)) or 1.0

    def across(value: float) -> float:
        return round(MARGIN + (100 - 2 * MARGIN) * (value - low) / wide, 2)

    return [
        {
            "told": told,
            "value": f"{value:.2f}",
            "zero": across(0),
            "start": min(across(0), across(value)),
            "width": round(abs(across(value) - across(0)), 2),
            "interval": interval and [f"{one:.2f}" for one in interval],
            "whisker": interval and [across(one) for one in interval],
        }
        for told, value, interval in lines
    ]


def dialogue_data(case: Case) -> dict[str, Any]:
    """What the browser draws a dialogue from (`dialogueView` of `figures/common.js`): tokens, and
    what each feature does at each of them.
    """
    parts = {feature: case.parts(feature) for feature in case.features}
    largest = max((abs(one) for values in parts.values() for one in values), default=0.0)
    return {
        "tokens": case.tokens,
        "at": case.at,
        "largest_part": _short(largest),
        "features": [
            {
                "name": case.name(feature),
                "acts": [_short(one) for one in case.activations[feature].tolist()],
                "parts": [_short(one) for one in parts[feature]],
                **_scale(case, feature),
            }
            for feature in case.features
        ],
    }


def _scale(case: Case, feature: Feature) -> dict[str, Any]:
    """The activation that the full colour stands for, and what it is."""
    here = float(case.activations[feature].max())
    known = case.known.get(feature)
    if known is not None and known.largest >= here:
        return {"largest": _short(known.largest), "of": "the largest that the index knows of it"}
    return {"largest": _short(here), "of": "its largest in this dialogue"}


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"

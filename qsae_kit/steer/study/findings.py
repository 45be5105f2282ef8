"""What a steering study found: measured rows -> table, headline figures, verdict. No model in
sight.

A row is what was measured of one intervention at one strength on one kind of prompts: its labels
(goal, intervention, prompt_kind, target, strength, chosen, draw), and either answers (`outcomes`, a
letter a prompt: S shows the behaviour, D deflects, B is broken, A is none of these; `correct`, 1, 0
or - a prompt; texts, costs) or the log-odds of a dose alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pandas as pd

from qsae_kit.metrics.reconstruction import paired_bootstrap, wilson
from qsae_kit.steer.behaviours import SIGN, Goal

Row: TypeAlias = Mapping[str, Any]
Said: TypeAlias = Mapping[tuple[str, str, int | None], Row]
"""Arm, kind of prompts, draw -> row."""
BEST_MEANS = "difference_of_means_best"
REACHED: Mapping[Goal, str] = {"suppress": "answered_rate", "induce": "refusal_rate"}
"""The share of the target's prompts that a goal is about: none of it deflected or broken."""
LEAST_SELECTIVE = 0.5
"""Share of the change on the target that has to be selective, for the verdict not to call it a
demonstration.
"""
COLUMNS = """
goal              none, suppress or induce
intervention      none, features, difference_of_means (in the features' place and strength),
                  difference_of_means_best (at the site, refinement and strength that the same
                  trials choose for it: study.json names them), wrong_sign, random (the best of a
                  search), random_single (a set as it comes), noise, system_prompt,
                  frozen_decoder_sae, soft_frozen_sae
prompt_kind       kind of the prompts
target            whether the goal is aimed at this kind
strength          median norms, with the sign that was applied to the direction towards the
                  behaviour; of what is projected out, the share that is taken away
chosen            whether this is the frozen strength
draw              number of a random control
n                 prompts
refusal_rate      share of answers that show the behaviour (a refusal study's refusals), with its 95
                  % Wilson interval:
ci_low, ci_high
deflected_rate    share that neither shows it nor does what was asked: of a refusal study, lectures
                  in place of refusals; 0 for other behaviours
answered_rate     share that is none of these: neither shown, nor deflected, nor broken
correct_rate      share that is the right answer, where it is known
broken_rate       empty, looping, unfinished where it should end, or off the model's form
change            rate minus the unsteered rate on the same prompts, with its 95 % paired bootstrap
                  interval:
change_low, change_high
log_odds          nats, of the first answer token being one that begins such an answer; mean with
                  its 95 % bootstrap interval:
log_odds_low, log_odds_high
kl_first          KL(clean || steered) at the first answer token, nats; mean with its 95 % bootstrap
                  interval:
kl_first_low, kl_first_high
kl_answer         the same a token over the clean model's answers, teacher-forced
perplexity        of the answers, under the unsteered model
repetition        share of an answer's 4-grams of tokens that it holds already
plain_kl          KL a token on plain text, the edit at every token
facts_right       share of questions of fact answered right
"""
NAMES = [
    name
    for line in COLUMNS.strip().splitlines()
    if not line.startswith(" ")
    for name in line.split("  ")[0].split(", ")
]


def meanings() -> dict[str, str]:
    """Each column's line of `COLUMNS`; those that share one have it each."""
    told: list[tuple[list[str], list[str]]] = []
    for line in COLUMNS.strip().splitlines():
        names, _, text = line.partition("  ")
        if names:
            told.append((names.split(", "), [text]))
        else:
            told[-1][1].append(text)
    out: dict[str, str] = {}
    before = ""
    for columns, lines in told:
        text = " ".join(" ".join(lines).split()) or before
        out |= dict.fromkeys(columns, text)
        before = text
    return out


_NOT_FLOAT: dict[str, Any] = {
    "goal": object,
    "intervention": object,
    "prompt_kind": object,
    "target": bool,
    "chosen": bool,
    "draw": "Int64",
    "n": int,
}


def rate(outcomes: str, letter: str) -> float:
    """The share of prompts with an outcome."""
    return outcomes.count(letter) / len(outcomes)


def study_table(rows: Sequence[Row], clean: Mapping[str, str], seed: int = 0) -> pd.DataFrame:
    """The rows with rates and intervals; its columns are `COLUMNS`. clean: kind -> outcomes of the
    unsteered model.
    """
    out = []
    for row in rows:
        told = {name: row[name] for name in NAMES if name in row}
        if "outcomes" in row:
            outcomes, correct, n = row["outcomes"], row["correct"], len(row["outcomes"])
            shown = wilson(outcomes.count("S"), n)
            change = paired_bootstrap(
                [changes(outcomes, clean[row["prompt_kind"]])], [1.0], seed=seed
            )
            told |= {
                "n": n,
                "refusal_rate": shown.rate,
                "ci_low": shown.low,
                "ci_high": shown.high,
                "deflected_rate": rate(outcomes, "D"),
                "answered_rate": rate(outcomes, "A"),
                "correct_rate": None if "-" in correct else rate(correct, "1"),
                "broken_rate": rate(outcomes, "B"),
                "change": change.rate,
                "change_low": change.low,
                "change_high": change.high,
            }
        out.append(told)
    return (
        pd.DataFrame(out)
        .reindex(columns=NAMES)
        .astype({name: _NOT_FLOAT.get(name, float) for name in NAMES})
    )


def measured_figures(
    rows: Sequence[Row],
    table: pd.DataFrame,
    clean: Mapping[str, str],
    goal: Goal,
    target: str,
    others: Sequence[str],
    seed: int = 0,
    priced: str = "",
) -> dict[str, Any]:
    """The headline figures of the frozen features and of their controls.

    table: `study_table` of the rows, with plain_kl and facts_right. priced: the kind of prompts on
    which a first-token KL is the price. Selectivity is the change on the target towards the goal
    less the mean change on the other kinds.
    """
    sign, said = SIGN[goal], _at_frozen_strength(rows)
    ours = said["features", target, None]
    frozen = table[(table["intervention"] == "features") & table["chosen"]].set_index("prompt_kind")
    base = table[table["intervention"] == "none"].set_index("prompt_kind")
    known = "-" not in ours["correct"]
    due = [ours["correct"][i] for i, letter in enumerate(clean[target]) if letter == "S"]
    return {
        "goal": goal,
        "target": target,
        "others": list(others),
        "n": len(ours["outcomes"]),
        "before": _at(base, target, "refusal_rate"),
        "after": _at(frozen, target, "refusal_rate"),
        "deflected_before": _at(base, target, "deflected_rate"),
        "deflected": _at(frozen, target, "deflected_rate"),
        "broken_before": _at(base, target, "broken_rate"),
        "broken": _at(frozen, target, "broken_rate"),
        "correct": rate(ours["correct"], "1") if known else None,
        "correct_of_shown": (
            rate("".join(due), "1") if known and due and goal == "suppress" else None
        ),
        "selectivity": _selectivities(said, clean, target, others, sign, seed),
        "elsewhere": _by_kind(frozen, others, "refusal_rate"),
        "elsewhere_before": _by_kind(base, others, "refusal_rate"),
        "kl_answer": _by_kind(frozen, others, "kl_answer"),
        "kl_first": _by_kind(frozen, others, "kl_first"),
        "plain_kl": float(frozen["plain_kl"].iloc[0]),
        "facts_lost": float(base["facts_right"].iloc[0] - frozen["facts_right"].iloc[0]),
        "priced_on": priced,
        "reached": {
            arm: float(_row_of(table, arm, target)[REACHED[goal]])
            for arm in ("features", BEST_MEANS)
        },
        "kl_first_priced": {
            arm: float(_row_of(table, arm, priced)["kl_first"])
            for arm in ("features", "difference_of_means", BEST_MEANS)
        },
        "difference_of_means": _arm(table, "difference_of_means", target),
        "difference_of_means_best": _arm(table, "difference_of_means_best", target),
        "wrong_sign": _arm(table, "wrong_sign", target),
        **_random_figures(said, ours, table, sign, seed),
    }


def _at_frozen_strength(rows: Sequence[Row]) -> Said:
    """The rows with answers of the unsteered model and of every arm's frozen strength."""
    return {
        (r["intervention"], r["prompt_kind"], r["draw"]): r
        for r in rows
        if "outcomes" in r and (r["chosen"] or r["goal"] == "none")
    }


def _selectivities(
    said: Said,
    clean: Mapping[str, str],
    target: str,
    others: Sequence[str],
    sign: float,
    seed: int,
) -> dict[str, list[float]]:
    """Arm -> its selectivity with interval, of the arms that were measured on every kind."""
    kinds = [target, *others]
    weights = [sign, *(-sign / len(others) for _ in others)]
    found = {}
    for arm in dict.fromkeys(name for name, _, _ in said):
        if arm == "none" or any((arm, kind, None) not in said for kind in kinds):
            continue
        groups = [changes(said[arm, kind, None]["outcomes"], clean[kind]) for kind in kinds]
        found[arm] = list(paired_bootstrap(groups, weights, seed=seed))
    return found


def _random_figures(
    said: Said, ours: Row, table: pd.DataFrame, sign: float, seed: int
) -> dict[str, Any]:
    """How far random controls went the goal's way: the strongest of each sort."""
    draws = [r for (arm, _, _), r in said.items() if arm == "random"]
    shown = [rate(r["outcomes"], "S") for (arm, _, _), r in said.items() if arm == "random_single"]
    strongest = max(draws, key=lambda r: sign * rate(r["outcomes"], "S"), default=None)
    apart, broken = None, None
    if strongest is not None:
        n = len(strongest["outcomes"])
        gained = changes(ours["outcomes"][:n], strongest["outcomes"])
        apart = list(paired_bootstrap([gained], [sign], seed=seed))
        broken = float(table.loc[table["intervention"] == "random", "broken_rate"].max())
    return {
        "n_random": len(draws),
        "worst_random": rate(strongest["outcomes"], "S") if strongest else None,
        "worst_random_broken": broken,
        "n_single": len(shown),
        "worst_single": max(shown, key=lambda share: sign * share, default=None),
        "apart_from_random": apart,
    }


def example_answers(rows: Sequence[Row], prompts: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Some answers without and with the frozen features: prompt_kind, prompt, base, steered."""
    said = {
        (r["intervention"], r["prompt_kind"]): r["texts"]
        for r in rows
        if "texts" in r and (r["chosen"] or r["goal"] == "none")
    }
    return pd.DataFrame(
        [
            {"prompt_kind": kind, "prompt": prompt, "base": base, "steered": steered}
            for kind, texts in prompts.items()
            for prompt, base, steered in zip(
                texts, said["none", kind], said["features", kind], strict=False
            )
        ]
    )


def changes(after: str, before: str) -> list[float]:
    """A figure a prompt: 1 where the behaviour came, -1 where it went."""
    return [float((a == "S") - (b == "S")) for a, b in zip(after, before, strict=False)]


def _at(table: pd.DataFrame, kind: str, column: str) -> float:
    return float(table[column].to_dict()[kind])


def _by_kind(table: pd.DataFrame, kinds: Sequence[str], column: str) -> dict[str, float]:
    return {kind: _at(table, kind, column) for kind in kinds}


def _row_of(table: pd.DataFrame, arm: str, kind: str) -> "pd.Series[Any]":
    """An arm at its frozen strength on a kind of prompts."""
    return table[
        (table["intervention"] == arm) & table["chosen"] & (table["prompt_kind"] == kind)
    ].iloc[0]


def _arm(table: pd.DataFrame, arm: str, kind: str) -> dict[str, float]:
    row = _row_of(table, arm, kind)
    told = ("refusal_rate", "deflected_rate", "broken_rate", "kl_answer")
    return {name: float(row[name]) for name in told}


def verdict(headline: Mapping[str, Any]) -> str:
    """What the frozen features did, against the controls, in plain sentences."""
    h = headline
    text = _did(h) + _means_did(h) + _random_did(h)
    if not h["within_limits"]:
        text += (
            f" No trial kept broken <= {h['max_broken']:g} and the limits of KL on selection"
            " prompts; the best was taken."
        )
    selectivity, low, _ = h["selectivity"]["features"]
    if not h["selective"]:
        text += " Nothing was asked of other prompts."
    elif low <= 0 or selectivity < LEAST_SELECTIVE * abs(h["after"] - h["before"]):
        text += " Other prompts change as much: a demonstration, not a defence."
    return text


def _did(h: Mapping[str, Any]) -> str:
    """On the target, elsewhere, and at what price."""
    selectivity, low, high = h["selectivity"]["features"]
    shown = "refused" if h["behaviour"] == "refusal" else "showing it"
    text = (
        f"{h['goal']} {h['behaviour']}: selectivity {selectivity:.2f} ({low:.2f} to {high:.2f});"
        f" {h['target']} {shown} {h['before']:.2f} -> {h['after']:.2f} of {h['n']} (broken"
        f" {h['broken']:.2f}"
    )
    if h["deflected_before"] or h["deflected"]:
        text += f"; deflected {h['deflected_before']:.2f} -> {h['deflected']:.2f}"
    if h["correct_of_shown"] is not None:
        text += f"; right {h['correct_of_shown']:.2f} of those that were {shown}"
    costs = ", ".join(f"{h['kl_answer'][k]:.3f} on {k}" for k in h["others"])
    rates = ", ".join(
        f"{k} {h['elsewhere_before'][k]:.2f} -> {h['elsewhere'][k]:.2f}" for k in h["others"]
    )
    return text + (
        f"); elsewhere {rates}; cost in nats a token {costs}; facts lost"
        f" {100 * h['facts_lost']:.1f} points."
    )


def _means_did(h: Mapping[str, Any]) -> str:
    means = h["selectivity"].get("difference_of_means")
    if means is None:
        return ""
    at_this, best = h["difference_of_means"], h["difference_of_means_best"]
    refined = ", orthogonal" if h["difference_of_means_orthogonal"] else ""
    return (
        f" Difference of means at this strength: {at_this['refusal_rate']:.2f} (broken"
        f" {at_this['broken_rate']:.2f}), selectivity {means[0]:.2f}; at its own"
        f" ({h['difference_of_means_site']}{refined}, {h['difference_of_means_strength']:g}):"
        f" {best['refusal_rate']:.2f} (broken {best['broken_rate']:.2f}), selectivity"
        f" {h['selectivity']['difference_of_means_best'][0]:.2f}." + _dearer(h)
    )


def _dearer(h: Mapping[str, Any]) -> str:
    """Rates and first-token KL of both, the field's unit, and who is ahead in it."""
    priced = h["priced_on"]
    ours, theirs = h["kl_first_priced"]["features"], h["kl_first_priced"][BEST_MEANS]
    gained, dearer = h["reached"]["features"] - h["reached"][BEST_MEANS], ours - theirs
    beyond = "" if h["difference_of_means_within_limits"] else " (beyond the limits)"
    told = (
        f" At the first answer token of {priced} prompts the features cost {ours:.3f} nats, that"
        f" direction {theirs:.3f}{beyond}: "
    )
    if gained >= 0 and dearer <= 0:
        return told + "the features do as much or more at no higher price."
    if gained <= 0 and dearer >= 0:
        return told + "the difference of means does as much or more at no higher price."
    return told + "one does more and the other costs less; the curves tell (dose.html)."


def _random_did(h: Mapping[str, Any]) -> str:
    if h["apart_from_random"] is None:
        return " No random controls were run."
    text = f" Strongest of {h['n_random']} random searches: {h['worst_random']:.2f}"
    if h["n_single"]:
        text += f"; of {h['n_single']} random sets as they come: {h['worst_single']:.2f}"
    text += "."
    if h["apart_from_random"][1] <= 0:
        text += " The features are not distinguishable from the random control."
    return text

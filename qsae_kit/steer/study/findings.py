"""What a steering study found: measured rows -> table, headline figures, verdict. No model in
sight.

A row is what was measured of one intervention at one strength on one kind of prompts: its labels
(goal, intervention, prompt_kind, target, strength, chosen, draw), and either answers (`outcomes`, a
letter a prompt: S shows the behaviour, B is broken, A is neither; `correct`, 1, 0 or - a prompt;
texts, costs) or the log-odds of a dose alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pandas as pd

from qsae_kit.metrics.reconstruction import Interval, paired_bootstrap, wilson
from qsae_kit.steer.behaviours import SIGN, Goal

Row: TypeAlias = Mapping[str, Any]
COLUMNS = """
goal              none, suppress or induce
intervention      none, features, difference_of_means, difference_of_means_best (at the strength
                  that the same trials choose for it), wrong_sign, random (the best of a search),
                  random_single (a set as it comes), noise, system_prompt, frozen_decoder_sae,
                  soft_frozen_sae
prompt_kind       kind of the prompts
target            whether the goal is aimed at this kind
strength          median norms, with the sign that was applied to the direction towards the
                  behaviour
chosen            whether this is the frozen strength
draw              number of a random control
n                 prompts
refusal_rate      share of answers that show the behaviour (a refusal study's refusals), with its 95
                  % Wilson interval:
ci_low, ci_high
answered_rate     share that neither shows it nor is broken
correct_rate      share that is the right answer, where it is known
broken_rate       empty, looping, unfinished where it should end, or off the model's form
change            rate minus the unsteered rate on the same prompts, with its 95 % paired bootstrap
                  interval:
change_low, change_high
log_odds          nats, of the first answer token being one that begins such an answer; mean with
                  its 95 % bootstrap interval:
log_odds_low, log_odds_high
kl_first          KL(clean || steered) at the first answer token, nats
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
) -> dict[str, Any]:
    """The headline figures of the frozen features and of their controls.

    table: `study_table` of the rows, with plain_kl and facts_right. Selectivity is the change on
    the target towards the goal less the mean change on the other kinds.
    """
    sign = SIGN[goal]
    said = {
        (r["intervention"], r["prompt_kind"], r["draw"]): r
        for r in rows
        if "outcomes" in r and (r["chosen"] or r["goal"] == "none")
    }

    def selectivity(arm: str) -> Interval | None:
        kinds = [target, *others]
        if any((arm, kind, None) not in said for kind in kinds):
            return None
        groups = [changes(said[arm, kind, None]["outcomes"], clean[kind]) for kind in kinds]
        return paired_bootstrap(groups, [sign, *(-sign / len(others) for _ in others)], seed=seed)

    ours = said["features", target, None]
    draws, singles = (
        [r for (arm, _, _), r in said.items() if arm == name]
        for name in ("random", "random_single")
    )
    worst = max(draws, key=lambda r: sign * rate(r["outcomes"], "S"), default=None)
    apart = None
    if worst is not None:
        n = len(worst["outcomes"])
        apart = paired_bootstrap(
            [changes(ours["outcomes"][:n], worst["outcomes"])], [sign], seed=seed
        )
    frozen = table[(table["intervention"] == "features") & table["chosen"]].set_index("prompt_kind")
    base = table[table["intervention"] == "none"].set_index("prompt_kind")
    known = "-" not in ours["correct"]
    due = [i for i, letter in enumerate(clean[target]) if letter == "S"]
    arms = [arm for arm in dict.fromkeys(a for a, _, _ in said) if arm != "none"]
    return {
        "goal": goal,
        "target": target,
        "others": list(others),
        "n": len(ours["outcomes"]),
        "before": _at(base, target, "refusal_rate"),
        "after": _at(frozen, target, "refusal_rate"),
        "broken": _at(frozen, target, "broken_rate"),
        "correct": rate(ours["correct"], "1") if known else None,
        "correct_of_shown": (
            rate("".join(ours["correct"][i] for i in due), "1")
            if known and due and goal == "suppress"
            else None
        ),
        "selectivity": {arm: list(s) for arm in arms if (s := selectivity(arm)) is not None},
        "elsewhere": {kind: _at(frozen, kind, "refusal_rate") for kind in others},
        "elsewhere_before": {kind: _at(base, kind, "refusal_rate") for kind in others},
        "kl_answer": {kind: _at(frozen, kind, "kl_answer") for kind in others},
        "kl_first": {kind: _at(frozen, kind, "kl_first") for kind in others},
        "plain_kl": float(frozen["plain_kl"].iloc[0]),
        "facts_lost": float(base["facts_right"].iloc[0] - frozen["facts_right"].iloc[0]),
        "difference_of_means": _arm(table, "difference_of_means", target),
        "difference_of_means_best": _arm(table, "difference_of_means_best", target),
        "wrong_sign": _arm(table, "wrong_sign", target),
        "n_random": len(draws),
        "worst_random": rate(worst["outcomes"], "S") if worst else None,
        "worst_random_broken": (
            float(table.loc[table["intervention"] == "random", "broken_rate"].max())
            if draws
            else None
        ),
        "n_single": len(singles),
        "worst_single": max(
            (rate(r["outcomes"], "S") for r in singles), key=lambda r: sign * r, default=None
        ),
        "apart_from_random": list(apart) if apart else None,
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


def _arm(table: pd.DataFrame, arm: str, kind: str) -> dict[str, float]:
    row = table[
        (table["intervention"] == arm) & table["chosen"] & (table["prompt_kind"] == kind)
    ].iloc[0]
    return {name: float(row[name]) for name in ("refusal_rate", "broken_rate", "kl_answer")}


def verdict(headline: Mapping[str, Any]) -> str:
    """What the frozen features did, against the controls, in plain sentences."""
    h = headline
    rate, low, high = h["selectivity"]["features"]
    shown = "refused" if h["behaviour"] == "refusal" else "showing it"
    text = (
        f"{h['goal']} {h['behaviour']}: selectivity {rate:.2f} ({low:.2f} to {high:.2f});"
        f" {h['target']} {shown} {h['before']:.2f} -> {h['after']:.2f} of {h['n']} (broken"
        f" {h['broken']:.2f}"
    )
    if h["correct_of_shown"] is not None:
        text += f"; right {h['correct_of_shown']:.2f} of those that were {shown}"
    costs = ", ".join(f"{h['kl_answer'][k]:.3f} on {k}" for k in h["others"])
    rates = ", ".join(
        f"{k} {h['elsewhere_before'][k]:.2f} -> {h['elsewhere'][k]:.2f}" for k in h["others"]
    )
    text += (
        f"); elsewhere {rates}; cost in nats a token {costs}; facts lost"
        f" {100 * h['facts_lost']:.1f} points."
    )
    means = h["selectivity"].get("difference_of_means")
    if means is not None:
        at_this, best = h["difference_of_means"], h["difference_of_means_best"]
        text += (
            f" Difference of means at this strength: {at_this['refusal_rate']:.2f} (broken"
            f" {at_this['broken_rate']:.2f}), selectivity {means[0]:.2f}; at its own"
            f" ({h['difference_of_means_strength']:g}): {best['refusal_rate']:.2f} (broken"
            f" {best['broken_rate']:.2f}), selectivity"
            f" {h['selectivity']['difference_of_means_best'][0]:.2f}."
        )
    if h["apart_from_random"] is None:
        text += " No random controls were run."
    else:
        text += f" Strongest of {h['n_random']} random searches: {h['worst_random']:.2f}"
        text += (
            f"; of {h['n_single']} random sets as they come: {h['worst_single']:.2f}."
            if h["n_single"]
            else "."
        )
        if h["apart_from_random"][1] <= 0:
            text += " The features are not distinguishable from the random control."
    if not h["within_limits"]:
        text += (
            f" No trial kept broken <= {h['max_broken']:g} and KL <= {h['max_kl']:g} on selection"
            " prompts; the best was taken."
        )
    if low <= 0 or rate < 0.5 * abs(h["after"] - h["before"]):
        text += " Other prompts change as much: a demonstration, not a defence."
    return text

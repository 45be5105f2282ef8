"""Site, set and strength are chosen by generated answers to the selection prompts: trials."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import pandas as pd

from qsae_kit.lm.edits import Edit
from qsae_kit.steer.changes import FeatureSet
from qsae_kit.steer.directions import Direction
from qsae_kit.steer.study.chosen import Chosen, MeansChoice
from qsae_kit.steer.study.config import StudyConfig
from qsae_kit.steer.study.findings import rate
from qsae_kit.steer.study.lab import Lab, Plan, Progress
from qsae_kit.steer.study.search import Push, Searched, aim_of, best_push, means_of, pushes

FIRST_TRIED = 3
"""Strengths of most merit that a set is tried at before it goes on from the best of them."""
MERIT_DIGITS = 3
"""Merits that agree to so many digits are equal, and the first strength comes first."""
SCORE_DIGITS = 2
"""Scores that agree to so many digits are equal, and the weaker strength is better."""

AtStrength: TypeAlias = Callable[[float], list[Edit]]
"""Strength without the goal's sign -> edits."""


@dataclass(frozen=True)
class Tried:
    """A set, or a direction, that is tried at a few strengths."""

    key: str
    make: AtStrength
    strengths: Sequence[float]
    merits: Sequence[float]
    """What the search says of every strength."""
    random: Sequence[AtStrength] = ()
    """Random sets that show how much a change of the same size disturbs."""


def trials_of(config: StudyConfig, plan: Plan) -> int:
    """Trials of one set, about."""
    n = len(config.strengths)
    return min(FIRST_TRIED, n) if plan.contrast == "prompts" else n.bit_length()


def try_sets(progress: Progress, lab: Lab, plan: Plan, searched: Searched) -> pd.DataFrame:
    """A row a trial (`trial`) of the sets that search ranks first, with the best one marked as
    chosen.
    """
    apart = {
        (name, way): _less(found["ways"][way]["merits"], found["disturbance"])
        for name, found in searched.sites.items()
        for way in found["ways"]
    }
    rows: list[dict[str, Any]] = []
    for name, way in ranked(apart, searched.sites)[: lab.config.n_trials]:
        found = searched.sites[name]
        ours = found["ways"][way]["features"], found["ways"][way]["weights"]
        made = [_pusher(lab, searched, name, *each) for each in (ours, *found["disturbing"])]
        kept = [row["score"] for row in rows if row["within_limits"]]
        strengths = lab.config.strengths_of(found["intervention"])
        tried = Tried(f"{name}/{way}", made[0], strengths, apart[name, way], made[1:])
        push = searched.push(name)
        labels = {
            "site": name,
            "way": way,
            "features": len(ours[0]),
            "intervention": push.intervention,
            "orthogonal": bool(push.orthogonal_to),
        }
        for row in try_strengths(progress, lab, plan, tried, max(kept, default=-math.inf)):
            rows.append(labels | row)
    table = pd.DataFrame(rows)
    table["chosen"] = table.index == best_trial(table)
    return table


def _less(merits: Sequence[float], disturbance: Sequence[float]) -> list[float]:
    return [merit - away for merit, away in zip(merits, disturbance, strict=True)]


def _pusher(
    lab: Lab,
    searched: Searched,
    hook_name: str,
    features: Sequence[int],
    weights: Sequence[float],
) -> AtStrength:
    chosen, when = FeatureSet(tuple(features), tuple(weights)), searched.when(hook_name)
    direction = Direction(hook_name, lab.setting.variant, chosen)
    push = searched.push(hook_name)
    return lambda strength: push.edits(lab.setting, direction, strength, when)


def freeze(
    progress: Progress, lab: Lab, plan: Plan, searched: Searched, trials: pd.DataFrame
) -> Chosen:
    """The chosen set, site and strength, with the strength that the same trials choose for the
    difference of means there.
    """
    best = trials.loc[best_trial(trials)]
    name, setting = best["site"], lab.setting
    found = searched.sites[name]
    way, detector = found["ways"][best["way"]], searched.detectors.get(name)
    push, origin = searched.push(name), setting.suite[setting.variant][name].origin
    return Chosen(
        setting.variant,
        name,
        best["way"],
        FeatureSet(tuple(way["features"]), tuple(way["weights"])),
        push.intervention,
        push.orthogonal_to,
        float(best["strength"]),
        searched.when(name),
        detector and detector.missed,
        detector and detector.false_alarms,
        tuple(found["mean_gap"]),
        origin.filter.median,
        tuple(found["alive"]),
        found["passes"],
        bool(best["within_limits"]),
        best_means(progress, lab, plan, searched, push.intervention),
    )


def best_means(
    progress: Progress, lab: Lab, plan: Plan, searched: Searched, intervention: str
) -> MeansChoice:
    """The difference of means at its own best: every site that the features were sought at, as it
    is and orthogonal to the usual means, under the intervention of the features; the strength by
    the same trials.
    """
    setting, only = lab.setting, plan._replace(interventions=(intervention,))

    def look(name: str) -> dict[str, Any]:
        aim, means = aim_of(lab, plan), means_of(setting, only, name)
        push = best_push(setting, aim, only, direction(name), means, searched.when(name))
        return {"orthogonal_to": push.orthogonal_to, "merits": push.merits}

    def direction(name: str) -> Direction:
        origin = setting.suite[setting.variant][name].origin
        vector = tuple(searched.sites[name]["mean_gap"])
        return Direction(name, vector=vector, median_norm=origin.filter.median)

    allowed = [name for name in searched.sites if pushes(only, name)]
    found = {name: progress.step(f"means/{name}", partial(look, name)) for name in allowed}
    refined = {
        name: replace(direction(name), orthogonal_to=tuple(map(tuple, told["orthogonal_to"])))
        for name, told in found.items()
    }

    def pusher(name: str) -> AtStrength:
        push = Push(intervention, refined[name].orthogonal_to)
        return lambda strength: push.edits(setting, refined[name], strength, searched.when(name))

    trials: list[dict[str, Any]] = []
    ranked_sites = sorted(found, key=lambda name: -max(found[name]["merits"]))
    for name in ranked_sites[: lab.config.n_trials]:
        strengths = lab.config.strengths_of(intervention)
        tried = Tried(f"{name}/means", pusher(name), strengths, found[name]["merits"])
        kept = [row["score"] for row in trials if row["within_limits"]]
        lead = max(kept, default=-math.inf)
        trials += [{"site": name} | row for row in try_strengths(progress, lab, plan, tried, lead)]
    rows = pd.DataFrame(trials)
    best = rows.loc[best_trial(rows)]
    return MeansChoice(refined[best["site"]], float(best["strength"]), bool(best["within_limits"]))


def answers_of_trial(lab: Lab) -> int:
    """Answers that a trial generates."""
    most = lab.config.trial_prompts
    return sum(
        len(texts) if most is None else min(most, len(texts)) for texts in lab.prompts.values()
    )


def try_strengths(
    progress: Progress, lab: Lab, plan: Plan, tried: Tried, lead: float = -math.inf
) -> list[dict[str, Any]]:
    """One set at a few strengths: the three of most merit, and on from the best of them while that
    is the first or the last of those tried and its score above `lead`, another set's; where the
    contrast is of answers, and first tokens say little of how an answer goes on, those of a search
    for the largest strength within the limits.
    """
    strengths = tried.strengths
    order = sorted(range(len(strengths)), key=lambda i: strengths[i])

    def at(place: int) -> dict[str, Any]:
        """The trial at a place among the strengths from the least."""
        i = order[place]
        compute = partial(
            trial,
            lab,
            plan,
            tried.make(strengths[i]),
            [each(strengths[i]) for each in tried.random],
        )
        told = progress.step(f"trial/{tried.key}/{strengths[i]:g}", compute, answers_of_trial(lab))
        return {"strength": strengths[i], "merit": tried.merits[i], **told}

    if plan.contrast == "prompts":
        return _from_most_merit(at, [tried.merits[i] for i in order], lead)
    return _largest_within(at, len(order))


def _from_most_merit(
    at: Callable[[int], dict[str, Any]], merits: Sequence[float], lead: float
) -> list[dict[str, Any]]:
    by_merit = sorted(range(len(merits)), key=lambda place: -round(merits[place], MERIT_DIGITS))
    places = sorted(by_merit[:FIRST_TRIED])
    trials = [at(place) for place in places]
    while True:
        best = best_trial(pd.DataFrame(trials))
        beyond = [
            to
            for to in (places[best] - 1, places[best] + 1)
            if 0 <= to < len(merits) and to not in places
        ]
        if not beyond or trials[best]["score"] <= lead:
            return trials
        places.append(beyond[-1])
        trials.append(at(beyond[-1]))


def _largest_within(at: Callable[[int], dict[str, Any]], n: int) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = []
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        trials.append(at(middle))
        low, high = (middle + 1, high) if trials[-1]["within_limits"] else (low, middle)
    return trials


def best_trial(trials: pd.DataFrame) -> Any:
    """The index of the best trial: within the limits, then by score, then the weakest."""
    rounded = trials["score"].round(SCORE_DIGITS)
    by_rank = trials.assign(whole=rounded, near=-trials["strength"])
    return by_rank.sort_values(
        ["within_limits", "whole", "near"], ascending=False, kind="stable"
    ).index[0]


def trial(
    lab: Lab, plan: Plan, edits: Sequence[Edit], random: Sequence[Sequence[Edit]]
) -> dict[str, Any]:
    """How one change does on the selection prompts.

    score: the share of target answers that are as wanted (where right answers are known and the
    goal is to suppress: right), less the disturbance: the mean share of target prompts whose
    outcome random sets with a change of the same size change; unless the contrast is of answers
    also less the mean share of other prompts whose outcome changes, or whose answer turns right or
    wrong.
    """
    c, kinds = lab.config, [plan.target, *plan.spared]
    groups: list[tuple[str, Sequence[Edit], int | None]] = [
        (kind, edits, c.trial_prompts) for kind in kinds
    ]
    groups += [(plan.target, each, c.search_prompts) for each in random]
    said = lab.groups_answered(groups)
    on_target, elsewhere, draws = said[0], said[1 : len(kinds)], said[len(kinds) :]
    changed = [
        _share_changed(after, lab.clean[kind])
        for kind, after in zip(plan.spared, elsewhere, strict=True)
    ]
    price = max(lab.cost(kind, edits).kl_answer for kind in plan.spared)
    first = lab.first_kl(plan.priced, edits, c.dose_prompts)
    away = sum(changed) / len(changed)
    wanted, broken = _share_wanted(on_target, c), rate(on_target["outcomes"], "B")
    disturbance = _disturbance(draws, lab.clean[plan.target]["outcomes"])
    cheap = not plan.selective or price <= c.max_kl
    cheap = cheap and (c.max_kl_first is None or first <= c.max_kl_first)
    return {
        "wanted": wanted,
        "broken": broken,
        "changed_elsewhere": away,
        "disturbance": disturbance,
        "kl_answer": price,
        "kl_first": first,
        "score": wanted - disturbance - (away if plan.selective else 0.0),
        "within_limits": broken <= c.max_broken and cheap,
    }


def _share_wanted(said: Mapping[str, Any], config: StudyConfig) -> float:
    """To suppress: neither shown nor deflected nor broken, or right where that is known."""
    if config.goal == "induce":
        return rate(said["outcomes"], "S")
    if "-" not in said["correct"]:
        return rate(said["correct"], "1")
    return rate(said["outcomes"], "A")


def _share_changed(after: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    """Of prompts whose outcome changes, or whose answer turns right or wrong."""
    new = list(zip(after["outcomes"], after["correct"], strict=True))
    old = zip(before["outcomes"], before["correct"], strict=True)
    return sum(a != b for a, b in zip(new, old, strict=False)) / len(new)


def _disturbance(draws: Sequence[Mapping[str, Any]], clean: str) -> float:
    """The mean share of prompts whose outcome random sets change; 0 without any."""
    n, differ = 0, 0
    for draw in draws:
        pairs = list(zip(draw["outcomes"], clean, strict=False))
        n += len(pairs)
        differ += sum(a != b for a, b in pairs)
    return differ / max(1, n)


def ranked(
    merits: Mapping[tuple[str, str], Sequence[float]], sites: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """(site, way) pairs by their largest merit, every site's best one first; of sets that are the
    same, one.
    """
    kept: dict[str, tuple[str, str]] = {}
    for name, kind in sorted(merits, key=lambda key: -max(merits[key])):
        way = sites[name]["ways"][kind]
        kept.setdefault(json.dumps([name, way["features"], way["weights"]]), (name, kind))
    places: dict[str, int] = {}
    rounds: list[tuple[int, tuple[str, str]]] = []
    for pair in kept.values():
        rounds.append((places.get(pair[0], 0), pair))
        places[pair[0]] = rounds[-1][0] + 1
    return [pair for _, pair in sorted(rounds, key=lambda each: each[0])]


def candidate_table(searched: Searched, chosen: Chosen) -> pd.DataFrame:
    """Every candidate of every site with its scores, and whether it was chosen."""
    tables = [
        pd.DataFrame(found["candidates"]).assign(site=name)
        for name, found in searched.sites.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    here = table["site"] == chosen.hook_name
    taken = here & table["feature"].isin(chosen.features.features)
    return table.assign(chosen=taken)[["site", *table.columns.drop("site"), "chosen"]]

"""The search at one site: candidates by their scores, sets grown by real passes, detectors; and the
same search for the controls.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qsae_kit.data.prompts import STOCK_REFUSALS
from qsae_kit.io.journal import Journal
from qsae_kit.lm.answering import answer_all, first_tokens
from qsae_kit.lm.edits import Edit
from qsae_kit.steer.changes import Change, Condition, FeatureSet, Steering
from qsae_kit.steer.choose.aim import Aim
from qsae_kit.steer.choose.candidates import (
    PASSES_A_CANDIDATE,
    ROUNDS_A_FEATURE,
    feature_scores,
    greedy_features,
    random_search,
)
from qsae_kit.steer.choose.contrast import (
    Contrast,
    answer_activations,
    choose_features,
    contrast,
    decision_activations,
    fit_features,
    random_features,
)
from qsae_kit.steer.choose.detector import FoundDetector, detectors, simplest
from qsae_kit.steer.study.config import StudyConfig
from qsae_kit.steer.study.lab import Lab, Plan, Progress, Setting

WAYS = ("gap", "fitted", "greedy")
"""How a set is made: the features of the largest gaps, those that fit the difference of means,
those that real passes grow.
"""
N_DISTURBING = 4
"""Random sets by which a site and strength is judged: where anything goes, features explain little.
"""
DETECTOR_SLACK = 0.02
"""A conditional edit is made at a site whose detector (there or before) errs at most so much more
than the best: misses and false alarms bound what the edit can do, whatever its features."""
OWN_ANSWER_TOKENS = 16
"""Tokens of the model's own answers that stock refusals are compared with."""
ENOUGH_SHOWN = 8
"""Answers with the behaviour, of which the first tokens are taken as its beginnings."""
TWICE = 2
"""Answers that begin with a token before it counts as a beginning."""
ENOUGH_WANTED = 8
"""Prompts with a known wanted answer, from which on the others can be left out of the search."""


class Searched(NamedTuple):
    """What the search found, before anything is answered."""

    sites: Mapping[str, Mapping[str, Any]]
    """Hook name -> what `search_site` gives there; sites at which nothing differs are left out."""
    detectors: Mapping[str, FoundDetector]
    """Hook name -> the best detector there or before; none for a study without a condition."""

    def when(self, hook_name: str) -> Condition | None:
        """The condition of an edit at a site."""
        return self.detectors[hook_name].condition if self.detectors else None


def search_sites(progress: Progress, lab: Lab, plan: Plan) -> Searched:
    """Searches every site; of a conditional study, only those whose detector errs little are kept.

    Raises ValueError where no feature differs anywhere.
    """
    setting = lab.setting
    watching: dict[str, FoundDetector] = {}
    if setting.config.conditional:
        kept = progress.journal.get("detectors", lambda: _as_values(site_detectors(setting, plan)))
        for name, (condition, missed, false_alarms) in kept.items():
            as_tuples: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in condition.items()
            }
            watching[name] = FoundDetector(Condition(**as_tuples), missed, false_alarms)
    found = Searched({}, watching)
    sites = {
        name: progress.step(
            f"search/{name}",
            partial(search_site, lab, plan, setting.variant, name, found.when(name)),
        )
        for name in setting.hook_names
    }
    sites = {name: site for name, site in sites.items() if site["ways"]}
    if not sites:
        raise ValueError(
            "No feature differs between the two groups at any site; train the SAEs longer or at"
            " other sites."
        )
    if watching:
        limit = min(watching[name].errors for name in sites) + DETECTOR_SLACK
        sites = {name: site for name, site in sites.items() if watching[name].errors <= limit}
    return Searched(sites, watching)


def _as_values(watching: Mapping[str, FoundDetector]) -> dict[str, Any]:
    return {
        name: [asdict(each.condition), each.missed, each.false_alarms]
        for name, each in watching.items()
    }


def site_detectors(setting: Setting, plan: Plan) -> dict[str, FoundDetector]:
    """For every site the `simplest` detector there or before it."""
    lm, c = setting.lm, setting.config
    last = max(map(lm.order_of, setting.hook_names))
    names = [name for name in setting.suite[setting.variant] if lm.order_of(name) <= last]
    at = detectors(
        lm,
        setting.suite.only([setting.variant], names),
        *told_apart(setting, plan, "selection"),
        enable_thinking=setting.thinking,
        n_features=c.detector_features,
        most_false_alarms=c.detector_false_alarms,
        seed=c.seed,
    )
    so_far: list[FoundDetector] = []
    found: dict[str, FoundDetector] = {}
    for place in sorted(at, key=lambda place: lm.order_of(place.hook_name)):
        so_far.append(at[place])
        found[place.hook_name] = simplest(so_far)
    return found


def told_apart(setting: Setting, plan: Plan, stage: str) -> tuple[list[str], list[str]]:
    """The target's prompts of a stage, which a detector fires on, and all others."""
    prompts = setting.prompts[stage]
    rest = [p for kind, texts in prompts.items() if kind != plan.target for p in texts]
    return prompts[plan.target], rest


def search_site(
    lab: Lab, plan: Plan, variant: str, hook_name: str, when: Condition | None
) -> dict[str, Any]:
    """Sets of features at one site with what they do to the log-odds at every strength.

    Plain values: ways (way -> features, weights, merits by strength), candidates (rows of
    `feature_scores`), disturbing (random sets) and disturbance (their mean rise of merit, by
    strength), alive, mean_gap [d_model], passes (sets that were tried). Without a difference ways
    and candidates are empty, and nothing else is told.
    """
    setting, c = lab.setting, lab.config
    sae = setting.suite[variant][hook_name]
    with_it, without = compared_groups(setting, plan, [hook_name], lab.journal)
    first, second = with_it[hook_name], without[hook_name]
    aim = aim_of(lab, plan)
    found = contrast(sae, first, second)
    if not found.feature_gap.any():
        return {"ways": {}, "candidates": []}

    def make(chosen: FeatureSet, strength: float) -> list[Edit]:
        return pushed(setting, plan, variant, hook_name, chosen, strength, when)

    clean = aim.others_odds()

    def merits(chosen: FeatureSet) -> list[float]:
        return [aim.merit(make(chosen, strength), clean) for strength in c.strengths]

    by_gap = choose_features(found, c.n_features)
    fitted = fit_features(sae, found, c.n_features)
    fitted_merits = merits(fitted)
    at_best = partial(make, strength=c.strengths[fitted_merits.index(max(fitted_merits))])
    scores = feature_scores(aim, sae, first, second, at_best, c.n_candidates)
    signed = [
        (int(feature), math.copysign(1.0, gap))
        for feature, gap in zip(scores["feature"], scores["gap"], strict=True)
    ]
    grown = greedy_features(aim, signed[: c.n_candidates // 2], at_best, c.n_features)
    ways = {
        "gap": _way(by_gap, merits(by_gap)),
        "fitted": _way(fitted, fitted_merits),
        "greedy": _way(grown.chosen, merits(grown.chosen)),
    }
    assert tuple(ways) == WAYS
    generator = torch.Generator().manual_seed(c.seed + 1)  # not the draws that evaluation uses
    draws = [random_features(found, by_gap, generator) for _ in range(N_DISTURBING)]
    still = aim.merit((), clean)
    disturbance = []
    for strength in c.strengths:
        risen = [max(0.0, aim.merit(make(draw, strength), clean) - still) for draw in draws]
        disturbance.append(sum(risen) / len(draws))
    return {
        "disturbance": disturbance,
        "disturbing": [[draw.features, draw.weights] for draw in draws],
        "candidates": scores.to_dict("records"),
        "ways": ways,
        "alive": found.alive.tolist(),
        "mean_gap": found.mean_gap.tolist(),
        "passes": len(scores) + grown.passes + len(ways),
    }


def _way(chosen: FeatureSet, merits: list[float]) -> dict[str, Any]:
    return {"features": chosen.features, "weights": chosen.weights, "merits": merits}


def sets_tried(config: StudyConfig) -> int:
    """Sets that a search at one site tries, at most."""
    rounds = ROUNDS_A_FEATURE * config.n_features
    return config.n_candidates + rounds * (config.n_candidates // 2) + len(WAYS)


def passes_of_search(config: StudyConfig) -> int:
    """Short passes of a search at one site, about."""
    curves = (len(WAYS) + N_DISTURBING) * len(config.strengths)
    return sets_tried(config) + (PASSES_A_CANDIDATE - 1) * config.n_candidates + curves


def compared_groups(
    setting: Setting, plan: Plan, names: Sequence[str], journal: Journal
) -> tuple[dict[str, Float[Tensor, "row _width"]], dict[str, Float[Tensor, "row _width"]]]:
    """Activations of the two groups that `StudyConfig.contrast` compares, the one with the
    behaviour first.
    """
    lm, selection, thinking = setting.lm, setting.prompts["selection"], setting.thinking
    kinds = setting.behaviour.kinds
    if plan.contrast == "prompts":
        away = [kind for kind in kinds[1:] if kind != setting.config.target] or kinds[1:]
        return (
            decision_activations(lm, names, selection[kinds[0]], thinking),
            decision_activations(lm, names, selection[away[-1]], thinking),
        )
    prompts = [p for kind in kinds[:2] for p in selection[kind]]
    own = journal.get(
        "own answers", lambda: answer_all(lm, prompts, [], OWN_ANSWER_TOKENS, thinking).tokens
    )
    refusals = [answer_ids(setting, text) for text in STOCK_REFUSALS]
    stock = [refusals[i % len(refusals)] for i in range(len(prompts))]
    return (
        answer_activations(lm, names, prompts, stock, thinking),
        answer_activations(lm, names, prompts, own, thinking),
    )


def answer_ids(setting: Setting, text: str) -> list[int]:
    """An answer as token ids."""
    return setting.lm.tokenizer(text, add_special_tokens=False).input_ids


def openings_of(lab: Lab) -> Int[Tensor, " token"]:
    """First tokens that begin answers with the behaviour more often than others: the unsteered
    model's, or stock refusals'.
    """
    shown: dict[int, int] = {}
    rest: dict[int, int] = {}
    for said in lab.clean.values():
        for letter, tokens in zip(said["outcomes"], said["tokens"], strict=True):
            counts = shown if letter == "S" else rest
            counts[tokens[0]] = counts.get(tokens[0], 0) + 1
    total, others = sum(shown.values()), max(1, sum(rest.values()))
    own = [
        token
        for token, n in shown.items()
        if n / total > rest.get(token, 0) / others and n >= TWICE
    ]
    if total < ENOUGH_SHOWN or not own:
        return first_tokens(lab.lm, STOCK_REFUSALS)
    return torch.tensor(sorted(own), device=lab.lm.device)


def aim_of(lab: Lab, plan: Plan) -> Aim:
    """What the search looks at: some target prompts, and as many of the others in turn.

    Where enough of the target prompts have a known wanted answer, the search is led by those.
    """
    setting, n = lab.setting, lab.config.search_prompts
    per_kind = max(1, n // len(plan.others))
    target = lab.ids[plan.target][:n]
    wanted: list[list[int]] = []
    asked = []
    for prompt, ids in zip(lab.prompts[plan.target][:n], target, strict=True):
        text = setting.behaviour.wanted(prompt, lab.config.goal)
        if text is not None:
            wanted.append(answer_ids(setting, text))
            asked.append(ids)
    if len(asked) < min(len(target), ENOUGH_WANTED):
        asked, wanted = target, []
    return Aim(
        lab.lm,
        asked,
        [ids for kind in plan.others for ids in lab.ids[kind][:per_kind]],
        plan.openings,
        lab.config.sign,
        wanted or None,
        price=1.0 if plan.selective else 0.0,
    )


def pushed(
    setting: Setting,
    plan: Plan,
    variant: str,
    hook_name: str,
    chosen: FeatureSet,
    strength: float,
    when: Condition | None,
) -> list[Edit]:
    """The edits that add a set at a strength without the goal's sign, which is put on here."""
    change = Change(
        "add",
        hook_name,
        variant,
        chosen.features,
        chosen.weights,
        strength=setting.config.sign * strength,
        positions=plan.positions,
        when=when,
    )
    return Steering((change,)).edits(setting.suite)


def searched_at_random(
    lab: Lab,
    plan: Plan,
    change: Change,
    drawn_from: Contrast,
    passes: int,
    generator: torch.Generator,
) -> FeatureSet:
    """The best of as many random sets as the features' search tried, by the same merit on the same
    prompts.

    change: the frozen one, with the goal's sign. drawn_from: of the site.
    """
    like = FeatureSet(change.features, change.weights)
    strength = lab.config.sign * change.strength
    return random_search(
        aim_of(lab, plan),
        drawn_from,
        like,
        lambda s: pushed(
            lab.setting, plan, change.variant, change.hook_name, s, strength, change.when
        ),
        passes,
        generator,
    )


def searched_alike(lab: Lab, plan: Plan, change: Change) -> FeatureSet:
    """The set that the same selection takes from another SAE (`change.variant`) at the frozen site
    and strength.
    """
    ways = search_site(lab, plan, change.variant, change.hook_name, change.when)["ways"]
    at = lab.config.strengths.index(abs(change.strength))
    best = max(ways.values(), key=lambda way: way["merits"][at])
    return FeatureSet(best["features"], best["weights"])

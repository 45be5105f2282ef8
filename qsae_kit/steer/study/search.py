"""The search at one site: candidates by their scores, sets grown by real passes, detectors; and the
same search for the controls.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qsae_kit.data.prompts import STOCK_REFUSALS
from qsae_kit.io.journal import Journal
from qsae_kit.lm.answering import answer_all, first_tokens
from qsae_kit.lm.chat import THINK_CLOSE, first_said
from qsae_kit.lm.edits import Edit
from qsae_kit.sites import width_name
from qsae_kit.steer.changes import RESIDUAL, Change, Condition, FeatureSet, Steering
from qsae_kit.steer.choose.aim import Aim
from qsae_kit.steer.choose.candidates import (
    PASSES_A_CANDIDATE,
    ROUNDS_A_FEATURE,
    best_aligned,
    feature_scores,
    greedy_features,
    pruned_features,
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
from qsae_kit.steer.directions import (
    INTERVENTIONS,
    Direction,
    intervention_of,
    usual_means,
)
from qsae_kit.steer.study.config import StudyConfig
from qsae_kit.steer.study.lab import Lab, Plan, Progress, Setting

WAYS = ("gap", "fitted", "aligned", "greedy", "pruned")
"""How a set is made: the features of the largest gaps; those that fit the difference of means;
those whose gap pushes farthest along it; those that real passes grow; and the best of these without
the features that it can do without (arXiv 2505.23556).
"""
PRUNED_LOSS = 0.01
"""Merit that a set may lose with a feature that is taken out of it."""
OWN_PRICE = 0.05
"""What a nat of first-token KL on the target is worth, in shares of it, where nothing else has a
price.
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


class Push(NamedTuple):
    """What is done along a direction, and what comes of it."""

    intervention: str
    orthogonal_to: tuple[tuple[float, ...], ...]
    """What the direction is made orthogonal to first; nothing where it is taken as it is."""
    merits: Sequence[float] = ()
    """Of the direction that it was chosen for, at every strength of the intervention."""

    def edits(
        self,
        setting: Setting,
        direction: Direction,
        strength: float,
        when: Condition | None = None,
    ) -> list[Edit]:
        """The edits along a direction at a strength without the goal's sign, which is put on
        here.
        """
        refined = replace(direction, orthogonal_to=self.orthogonal_to)
        signed = setting.config.signed(self.intervention, strength)
        change = refined.change(self.intervention, signed, when)
        return Steering((change,)).edits(setting.suite)


class Searched(NamedTuple):
    """What the search found, before anything is answered."""

    sites: Mapping[str, Mapping[str, Any]]
    """Hook name -> what `search_site` gives there; sites at which nothing differs are left out."""
    detectors: Mapping[str, FoundDetector]
    """Hook name -> the best detector there or before; none for a study without a condition."""

    def push(self, hook_name: str) -> Push:
        """What is done along every direction of a site."""
        found = self.sites[hook_name]
        against = tuple(tuple(mean) for mean in found["orthogonal_to"])
        return Push(found["intervention"], against)

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
            passes_of_search(setting.config) * progress.a_pass,
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
    lab: Lab,
    plan: Plan,
    variant: str,
    hook_name: str,
    when: Condition | None,
    push: Push | None = None,
) -> dict[str, Any]:
    """Sets of features at one site with what they do to the log-odds at every strength.

    Plain values: ways (way -> features, weights, merits by strength), intervention and
    orthogonal_to (what is done along every set's direction: `best_push`), candidates (rows of
    `feature_scores`), disturbing (random sets) and disturbance (their mean rise of merit, by
    strength), alive, mean_gap [d_model], passes (sets that were tried). Without a difference ways
    and candidates are empty, and nothing else is told. push: what is to be done, where it is known.
    """
    setting, c = lab.setting, lab.config
    sae = setting.suite[variant][hook_name]
    with_it, without = compared_groups(setting, plan, [hook_name], lab.journal)
    first, second = with_it[hook_name], without[hook_name]
    aim = aim_of(lab, plan)
    found = contrast(sae, first, second)
    if not found.feature_gap.any():
        return {"ways": {}, "candidates": []}
    if push is None and not pushes(plan, hook_name):
        return {"ways": {}, "candidates": []}
    site = Direction(hook_name, variant)
    fitted = fit_features(sae, found, c.n_features)
    if push is None:
        means = means_of(setting, plan, hook_name)
        push = best_push(setting, aim, plan, replace(site, features=fitted), means, when)
    strengths = c.strengths_of(push.intervention)

    def make(chosen: FeatureSet, strength: float) -> list[Edit]:
        return push.edits(setting, replace(site, features=chosen), strength, when)

    def merits(chosen: FeatureSet) -> list[float]:
        return [aim.merit(make(chosen, strength)) for strength in strengths]

    fitted_merits = push.merits or merits(fitted)
    at_best = partial(make, strength=strengths[fitted_merits.index(max(fitted_merits))])
    scores = feature_scores(aim, sae, first, second, at_best, c.n_candidates)
    signed = [
        (int(feature), math.copysign(1.0, gap))
        for feature, gap in zip(scores["feature"], scores["gap"], strict=True)
    ]
    grown = greedy_features(aim, signed[: c.n_candidates // 2], at_best, c.n_features)
    sets = {
        "gap": choose_features(found, c.n_features),
        "fitted": fitted,
        "aligned": best_aligned(aim, sae, found, at_best, c.n_features),
        "greedy": grown.chosen,
    }
    ways = {
        way: _way(chosen, fitted_merits if way == "fitted" else merits(chosen))
        for way, chosen in sets.items()
    }
    strongest = max(ways, key=lambda way: max(ways[way]["merits"]))
    best = ways[strongest]["merits"]
    at_its_best = partial(make, strength=strengths[best.index(max(best))])
    pruned = pruned_features(aim, sets[strongest], at_its_best, PRUNED_LOSS)
    if pruned.chosen != sets[strongest]:
        ways["pruned"] = _way(pruned.chosen, merits(pruned.chosen))
    generator = torch.Generator().manual_seed(c.seed + 1)  # not the draws that evaluation uses
    draws = [random_features(found, sets["gap"], generator) for _ in range(N_DISTURBING)]
    still = aim.merit(())
    disturbance = []
    for strength in strengths:
        risen = [max(0.0, aim.merit(make(draw, strength)) - still) for draw in draws]
        disturbance.append(sum(risen) / len(draws))
    return {
        "intervention": push.intervention,
        "orthogonal_to": push.orthogonal_to,
        "disturbance": disturbance,
        "disturbing": [[draw.features, draw.weights] for draw in draws],
        "candidates": scores.to_dict("records"),
        "ways": ways,
        "alive": found.alive.tolist(),
        "mean_gap": found.mean_gap.tolist(),
        "passes": len(scores) + grown.passes + c.n_features + pruned.passes + len(ways),
    }


def _way(chosen: FeatureSet, merits: Sequence[float]) -> dict[str, Any]:
    return {"features": chosen.features, "weights": chosen.weights, "merits": merits}


def pushes(plan: Plan, hook_name: str, means: Sequence[Sequence[float]] = ()) -> list[Push]:
    """Every intervention of a plan that a site allows, with every refinement: the direction as it
    is, and orthogonal to the means of prompts that should stay as they are. Features and the
    difference of means are given the same. At attention heads nothing is taken out everywhere.
    """
    refined = tuple(tuple(mean) for mean in means)
    in_stream = width_name(hook_name) == RESIDUAL
    return [
        Push(name, against)
        for name in plan.interventions
        if in_stream or not INTERVENTIONS[name].everywhere
        for against in ((), refined)
        if not against or not INTERVENTIONS[name].signed
    ]


def best_push(
    setting: Setting,
    aim: Aim,
    plan: Plan,
    direction: Direction,
    means: Sequence[Sequence[float]],
    when: Condition | None,
) -> Push:
    """The push of most merit along a direction, at the best of its strengths."""
    found = []
    for push in pushes(plan, direction.hook_name, means):
        merits = [
            aim.merit(push.edits(setting, direction, strength, when))
            for strength in setting.config.strengths_of(push.intervention)
        ]
        found.append(push._replace(merits=tuple(merits)))
    return max(found, key=lambda push: max(push.merits))


def means_of(setting: Setting, plan: Plan, hook_name: str) -> list[list[float]]:
    """Mean activations at a site of the selection prompts of the last of the other kinds, or of
    the last kind; none where nothing is projected out (`directions.usual_means`).
    """
    if all(INTERVENTIONS[name].signed for name in plan.interventions):
        return []
    kind = compared_with(setting)
    origin = setting.suite[setting.variant][hook_name].origin
    prompts = setting.prompts["selection"][kind]
    return usual_means(setting.lm, {hook_name: origin.filter}, prompts, setting.thinking)[hook_name]


def compared_with(setting: Setting) -> str:
    """The kind of prompts that the first kind is compared with."""
    kinds, c = setting.behaviour.kinds, setting.config
    return c.against or ([k for k in kinds[1:] if k != c.target] or list(kinds[1:]))[-1]


def sets_tried(config: StudyConfig) -> int:
    """Sets that a search at one site tries, at most."""
    rounds = ROUNDS_A_FEATURE * config.n_features
    pruning = config.n_features * (config.n_features + 1) // 2
    grown = rounds * (config.n_candidates // 2)
    return config.n_candidates + grown + config.n_features + pruning + len(WAYS)


def passes_of_search(config: StudyConfig) -> int:
    """Short passes of a search at one site, about."""
    curves = (2 * len(WAYS) + N_DISTURBING) * len(config.strengths)
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
        away = selection[compared_with(setting)]
        return (
            decision_activations(lm, names, selection[kinds[0]], thinking),
            decision_activations(lm, names, away, thinking),
        )
    prompts = [p for kind in kinds[:2] for p in selection[kind]]
    own = journal.get(
        "own answers", lambda: answer_all(lm, prompts, [], OWN_ANSWER_TOKENS, thinking).tokens
    )
    # a refusal is no thought: a block that the template has opened ends before it
    opened = lm.opens_thoughts(lm.chat_tokens(prompts[0], thinking))
    end = f"\n{THINK_CLOSE}\n\n" if opened else ""
    refusals = [answer_ids(setting, end + text) for text in STOCK_REFUSALS]
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
    for kind, said in lab.clean.items():
        asked = zip(lab.ids[kind], said["outcomes"], said["tokens"], strict=True)
        for prompt, letter, tokens in asked:
            counts = shown if letter == "S" else rest
            first = first_said(tokens, lab.lm.markers, lab.lm.opens_thoughts(prompt))
            if first is not None:
                counts[first] = counts.get(first, 0) + 1
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
    per_kind = max(1, n // len(plan.spared))
    target = lab.opening[plan.target][:n]
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
        [ids for kind in plan.spared for ids in lab.opening[kind][:per_kind]],
        plan.openings,
        lab.config.sign,
        wanted or None,
        price=1.0 if plan.selective else 0.0,
        own_price=0.0 if plan.selective else OWN_PRICE,
        limit=math.inf if lab.config.max_kl_first is None else lab.config.max_kl_first,
    )


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

    def make(drawn: FeatureSet) -> list[Edit]:
        other = replace(change, features=drawn.features, weights=drawn.weights)
        return Steering((other,)).edits(lab.setting.suite)

    return random_search(aim_of(lab, plan), drawn_from, like, make, passes, generator)


def searched_alike(lab: Lab, plan: Plan, change: Change) -> FeatureSet:
    """The set that the same selection takes from another SAE (`change.variant`) at the frozen site
    and strength.
    """
    intervention = intervention_of(change)
    push = Push(intervention, change.orthogonal_to)
    found = search_site(lab, plan, change.variant, change.hook_name, change.when, push)
    ways = found["ways"]
    if not ways:
        raise ValueError(
            f"The control SAE {change.variant}/{change.hook_name} tells nothing apart; train it"
            " longer, or leave it out."
        )
    at = lab.config.strengths_of(intervention).index(abs(change.strength))
    best = max(ways.values(), key=lambda way: way["merits"][at])
    return FeatureSet(best["features"], best["weights"])

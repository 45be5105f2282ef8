"""The arms measured on the evaluation prompts, and what the frozen edit costs elsewhere."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch

from qsae_kit.data.companions import companion_of
from qsae_kit.lm.answering import answer_all, plain_kl
from qsae_kit.lm.edits import Edit
from qsae_kit.metrics.detection import detector_curve
from qsae_kit.steer.changes import Change, Steering
from qsae_kit.steer.choose.detector import detector_scores
from qsae_kit.steer.study.arms import Arm, draw_generator
from qsae_kit.steer.study.chosen import Chosen
from qsae_kit.steer.study.config import StudyConfig
from qsae_kit.steer.study.lab import Lab, Plan, Progress, Setting
from qsae_kit.steer.study.search import (
    passes_of_search,
    searched_alike,
    searched_at_random,
    told_apart,
)

DOSE_SHARE = 0.2
"""Time of a prompt's first token, as a share of an answer's."""


def measure(
    progress: Progress,
    selection: Lab,
    evaluation: Lab,
    plan: Plan,
    chosen: Chosen,
    listed: Sequence[Arm],
) -> list[dict[str, Any]]:
    """A row for each arm and kind of prompts, as `findings` describes them; control sets are
    searched for on the selection prompts.
    """
    config, suite = evaluation.config, evaluation.setting.suite
    rows = []
    for arm in listed:
        change = arm.change
        if arm.sought and change is not None:
            seek = partial(sought_set, selection, plan, chosen, arm, change)
            work = passes_of_arm(arm, selection.config, chosen.passes) * progress.a_pass
            features, weights = progress.step(arm.search_key, seek, work)
            change = replace(change, features=tuple(features), weights=tuple(weights))
        edits = [] if change is None else Steering((change,)).edits(suite)
        steered = arm.name != "none"
        for kind in arm.kinds:
            labels = {
                "goal": config.goal if steered else "none",
                "intervention": arm.name,
                "prompt_kind": kind,
                "strength": arm.strength,
                "target": steered and kind == plan.target,
                "chosen": arm.frozen,
                "draw": arm.draw,
            }
            compute = partial(evaluation.measured, kind, edits, arm.n, arm.system)
            if arm.dose:
                compute = partial(evaluation.dose, kind, edits)
            work = work_of(arm, kind, len(evaluation.prompts[kind]), evaluation.config)
            rows.append(labels | progress.step(arm.key(kind), compute, work))
    return rows


def work_of(arm: Arm, kind: str, size: int, config: StudyConfig) -> float:
    """Answers that a step is worth: those that it generates, or a share of those of a dose."""
    return arm.n_of(kind, size) or DOSE_SHARE * min(size, config.dose_prompts)


def passes_of_arm(arm: Arm, config: StudyConfig, passes: int) -> int:
    """Short passes of an arm's own search; passes: those of the features' search at the site."""
    return passes_of_search(config) if arm.sought == "alike" else passes if arm.sought else 0


def sought_set(
    selection: Lab, plan: Plan, chosen: Chosen, arm: Arm, change: Change
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Features and weights of an arm that has to search for them."""
    if arm.sought == "alike":
        found = searched_alike(selection, plan, change)
    else:
        assert arm.draw is not None
        generator = draw_generator(selection.config.seed, arm.draw)
        found = searched_at_random(
            selection, plan, change, chosen.drawn_from(), chosen.passes, generator
        )
    return found.features, found.weights


class Price(NamedTuple):
    """What the frozen edit costs away from the study's prompts."""

    plain_kl: float
    """KL a token on plain text, the edit at every token."""
    facts_before: float
    """Share of questions of fact answered right by the unsteered model; NaN without questions."""
    facts_after: float


def price_elsewhere(progress: Progress, setting: Setting, steering: Steering) -> Price:
    """On plain text and on questions of fact."""
    lm = setting.lm
    everywhere = Steering(
        tuple(
            replace(change, positions="every" if change.everywhere else "all", when=None)
            for change in steering.changes
        )
    ).edits(setting.suite)
    edits = steering.edits(setting.suite)
    kl = progress.step("plain", lambda: plain_kl(lm, companion_of(lm).passages(), everywhere))
    right = progress.step(
        "facts", lambda: [_facts(setting, []), _facts(setting, edits)], 2 * setting.config.n_facts
    )
    return Price(kl, *right)


def _facts(setting: Setting, edits: Sequence[Edit]) -> float:
    lm, c = setting.lm, setting.config
    facts = companion_of(lm).facts(c.n_facts, c.seed)
    if not facts:
        return float("nan")
    questions = [fact.question for fact in facts]
    said = answer_all(lm, questions, edits, c.max_new_tokens, setting.thinking).text
    return sum(fact.right(text) for fact, text in zip(facts, said, strict=True)) / len(facts)


def detection(
    progress: Progress, setting: Setting, plan: Plan, chosen: Chosen
) -> pd.DataFrame | None:
    """How the frozen edit's condition tells the target's evaluation prompts from all others, with
    its own threshold marked; None without a condition.
    """
    when = chosen.when
    if when is None:
        return None
    sae = setting.suite[when.variant][when.hook_name]

    def scores() -> list[list[float]]:
        return [
            detector_scores(setting.lm, sae, when, prompts, setting.thinking).tolist()
            for prompts in told_apart(setting, plan, "evaluation")
        ]

    first, second = map(torch.tensor, progress.journal.get("detection", scores))
    return detector_curve(first, second, when.threshold)

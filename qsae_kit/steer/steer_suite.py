"""A suite steered in one call: fitted to the model, studied, answered again, put to benches."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from qsae_kit.attach import attached
from qsae_kit.io.files import write_table
from qsae_kit.lm.hooked import HookedLM, load_model
from qsae_kit.sae.suites import ByVariant, Suite
from qsae_kit.steer.behaviours import StudyPrompts, refusal, study_prompts
from qsae_kit.steer.benches import Guard, Prompts, measure_benches
from qsae_kit.steer.changes import Steering
from qsae_kit.steer.judges import guard_judgements
from qsae_kit.steer.repeats import answered_again
from qsae_kit.steer.report import write_study
from qsae_kit.steer.study import CONTROL_SAES, StudyConfig, StudyResult, steering_study

CONDITIONAL = ("rule",)
"""Behaviours that are changed only while a detector fires."""


class SteeredSuite(NamedTuple):
    """What became of a suite; the same is in the folder."""

    study: StudyResult
    drawn: pd.DataFrame | None
    """seeds.csv: the frozen arms answered again (`repeats.answered_again`)."""
    benches: pd.DataFrame | None
    """benches.csv: the frozen arms on public prompts (`benches.measure_benches`)."""


def steer_suite(
    lm: HookedLM,
    suite: ByVariant,
    out: str | Path,
    config: StudyConfig = StudyConfig(),
    *,
    behaviour: str | StudyPrompts = "refusal",
    hook_names: Sequence[str] = (),
    variant: str = "",
    benches: Prompts | None = None,
    guard: str = "",
    guard_dtype: str = "auto",
    draws: int = 0,
    fresh: bool = False,
    bar: bool = True,
    on_study: Callable[[StudyResult], None] | None = None,
) -> SteeredSuite:
    """Chooses features that steer a behaviour, measures them with price and controls, and writes
    everything to a folder; a run that was cut off goes on there.

    suite: is moved to the model's device, and measured where its release names no median norms.
    behaviour: a name (those that the model has prompts for, or a .py file: `study_prompts`), or
    one with its prompts. hook_names, variant: where to choose from (`steered_sites`). benches:
    bench -> part -> prompts, as `read_bench` gives, on which the frozen edit and the difference of
    means are measured too, without prompts that selection used; guard: a model that judges those
    answers. draws: how often the frozen arms are answered again with drawn answers, under seeds
    from the study's on. fresh: what a run there has left goes. on_study: is called once the study
    is written. Raises ValueError for another behaviour's name, for benches of a behaviour other
    than refusal, and as `steering_study`.
    """
    out = Path(out)
    given = (
        study_prompts(lm, behaviour, seed=config.seed) if isinstance(behaviour, str) else behaviour
    )
    name = given.behaviour.name
    if benches and name != "refusal":
        raise ValueError(f"Benches measure refusal; leave them or the behaviour {name!r} out.")
    if guard and not benches:
        raise ValueError(f"A guard ({guard}) judges answers to benches; give some or leave it out.")
    config = config_for(config, given)
    lm.thinking(config.thinking)  # refused before anything is measured
    own = attached(lm, suite, lambda: _asked(given))
    study = steering_study(
        lm,
        own,
        given.selection,
        given.evaluation,
        given.behaviour,
        config,
        hook_names=hook_names,
        variant=variant,
        folder=out,
        fresh=fresh,
        bar=bar,
    )
    write_study(study, own, lm, out)
    if on_study is not None:
        on_study(study)
    arms = {"features": study.steering, "difference_of_means_best": study.means}
    drawn = _drawn_again(lm, own, out, config, given, arms, draws, fresh) if draws else None
    measured = None
    if benches:
        judge = partial(guard_judgements, load_model(guard, guard_dtype)) if guard else None
        measured = _on_benches(lm, own, out, config, given, arms, benches, judge, guard, fresh)
    return SteeredSuite(study, drawn, measured)


def config_for(config: StudyConfig, given: StudyPrompts) -> StudyConfig:
    """The configuration with what a behaviour asks for: its target, and a condition."""
    return replace(
        config,
        target=config.target or given.target,
        conditional=config.conditional or given.behaviour.name in CONDITIONAL,
    )


def variants_to_load(variant: str) -> list[str]:
    """Names (with *) of the variants that a study of one variant needs: it and its controls; none
    is all of them.
    """
    return [variant, *(f"*{end}" for end in CONTROL_SAES)] if variant else []


def selected_texts(given: StudyPrompts) -> Collection[str]:
    """All prompts that features are chosen on."""
    return {text for texts in given.selection.values() for text in texts}


def _asked(given: StudyPrompts) -> list[list[dict[str, str]]]:
    """The selection prompts as chats."""
    texts = [text for some in given.selection.values() for text in some]
    return [[{"role": "user", "content": text}] for text in texts]


def _on_benches(
    lm: HookedLM,
    suite: Suite,
    out: Path,
    config: StudyConfig,
    given: StudyPrompts,
    arms: dict[str, Steering],
    benches: Prompts,
    judge: Guard | None,
    guard: str,
    fresh: bool,
) -> pd.DataFrame:
    measured = measure_benches(
        lm,
        refusal(),
        benches,
        arms,
        suite,
        config.max_new_tokens,
        lm.thinking(config.thinking),
        guard=judge,
        guard_name=guard,
        without=selected_texts(given),
        folder=out,
        fresh=fresh,
    )
    write_table(measured, out / "benches.csv")
    return measured


def _drawn_again(
    lm: HookedLM,
    suite: Suite,
    out: Path,
    config: StudyConfig,
    given: StudyPrompts,
    arms: dict[str, Steering],
    draws: int,
    fresh: bool,
) -> pd.DataFrame:
    drawn = answered_again(
        lm,
        given.behaviour,
        given.evaluation,
        arms,
        suite,
        range(config.seed, config.seed + draws),
        config.max_new_tokens,
        lm.thinking(config.thinking),
        out,
        fresh,
    )
    write_table(drawn, out / "seeds.csv")
    return drawn

"""The steering study: features and strength chosen on selection prompts, frozen, and measured on
others with controls. One study has one goal.

 1. Check what was given: prompts, sites, SAEs.
 2. Open the journal: the same study goes on there, another one is refused.
 3. The unsteered model answers the selection prompts.
 4. Its answers decide the plan: which prompts are aimed at, what is contrasted, which tokens are
    edited.
 5. Say what is to come: the arms of a likely choice give the bar its length and the time.
 6. Search every site: candidates by their scores, sets grown one feature at a time by real passes.
 7. Try the best sets at a few strengths by generated answers; the best trial is the choice.
 8. Freeze it, with the strength that the same trials choose for the difference of means.
 9. List the arms: what is measured, in order, with controls; random features get a search of the
    same length.
10. Measure every arm on the evaluation prompts.
11. Price the frozen edit on plain text and on questions of fact, and put its condition, where it
    has one, to the evaluation prompts.
12. Tell what was found: table, headline, verdict.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from qsae_kit.attach import check_fit
from qsae_kit.io.journal import Journal
from qsae_kit.io.progress import say, tqdm
from qsae_kit.io.runs import plain
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sae.suites import ByVariant, Suite
from qsae_kit.sites import parse_hook_name
from qsae_kit.steer.behaviours import Behaviour, PromptSets, refusal
from qsae_kit.steer.changes import Steering
from qsae_kit.steer.study.arms import CONTROL_SAES, Arm, arms
from qsae_kit.steer.study.chosen import Chosen, likely_choice
from qsae_kit.steer.study.config import ContrastBy, StudyConfig
from qsae_kit.steer.study.findings import (
    example_answers,
    measured_figures,
    rate,
    study_table,
    verdict,
)
from qsae_kit.steer.study.lab import Lab, Plan, Progress, Setting, Unsteered
from qsae_kit.steer.study.measure import (
    Price,
    detection,
    measure,
    passes_of_arm,
    price_elsewhere,
    work_of,
)
from qsae_kit.steer.study.search import aim_of, openings_of, passes_of_search, search_sites
from qsae_kit.steer.study.trials import (
    answers_of_trial,
    candidate_table,
    freeze,
    trials_of,
    try_sets,
)
from qsae_kit.steer.study.words import in_words

FORMAT = 10
"""Of the journal: a study that another version began is refused."""
JOURNAL = "journal.jsonl"
"""The record of a study in its folder, with every step."""
DETECTOR_FILES = ("detector.csv", "detector.html")
"""What only a study with a condition has."""
STUDY_FILES = (
    *(
        "study.csv candidates.csv selection.csv examples.csv prompts.json study.json steering.json "
        "means.json dose.html controls.html report.html".split()
    ),
    *DETECTOR_FILES,
)
"""What `steer.report.write_study` writes."""
BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} answers [{elapsed}<{remaining}]"
LAST_SHARE = 0.8
"""Sites in the last fifth of the layers are left out (Arditi et al. 2024, arXiv 2406.11717, section
2.3).
"""
SHOWS_IT = 0.5
"""Rate on the first kind of prompts above which the behaviour is induced elsewhere."""
HARDLY_REFUSES = 0.1
"""Rate of refusals on the first kind of prompts below which answers are contrasted."""


class StudyResult(NamedTuple):
    """A finished study."""

    config: StudyConfig
    behaviour: str
    target: str
    chosen: Chosen
    steering: Steering
    """The frozen edit as a value."""
    means: Steering
    """The difference of means at its own best: site, refinement and strength."""
    table: pd.DataFrame
    """study.csv: see `steer.study.findings.COLUMNS`."""
    candidates: pd.DataFrame
    """Every candidate feature of every site with its scores (`steer.choose.candidates`), and
    whether it was chosen.
    """
    selection: pd.DataFrame
    """Every trial by generated answers, on selection prompts."""
    examples: pd.DataFrame
    """Some answers with and without the edit: prompt_kind, prompt, base, steered."""
    detector: pd.DataFrame | None
    """detector.csv: the condition on the evaluation prompts (`metrics.detection.detector_curve`);
    None without one.
    """
    headline: dict[str, Any]
    verdict: str
    prompts: dict[str, dict[str, list[str]]]
    """The selection and the evaluation prompts by kind."""
    identity: Mapping[str, Any]
    """What tells the study from others: model, weights, SAEs, configuration, prompts."""

    @property
    def in_words(self) -> str:
        """The finding in plain sentences (`steer.study.words`)."""
        return in_words(self.headline)


def steering_study(
    lm: HookedLM,
    suite: ByVariant,
    selection: PromptSets,
    evaluation: PromptSets,
    behaviour: Behaviour | None = None,
    config: StudyConfig = StudyConfig(),
    *,
    hook_names: Sequence[str] = (),
    variant: str = "",
    folder: str | Path | None = None,
    fresh: bool = False,
    bar: bool = True,
    unsteered: Unsteered | None = None,
) -> StudyResult:
    """The whole study: features, site and strength on selection prompts, figures and controls on
    evaluation prompts.

    suite: variant -> hook name -> SAE; variants whose names end with frozen_decoder or
    frozen_soft_decoder are controls at the same site. behaviour: refusal by default. hook_names,
    variant: where to choose from (`steered_sites`). folder: every step is written there, and a
    study that was cut off goes on (`journal.jsonl`); the same seed gives the same digits. fresh:
    a study that is there goes, with its `STUDY_FILES`. unsteered: what another study of the same
    prompts was answered already; it is added to. Raises ValueError for prompts that are
    missing, empty, in both sets or all of one kind, for sites that are not there, for thinking of a
    model whose template has none, where the folder
    holds another study (unless `fresh` is given) or files with a study's names that are of none,
    and while another process writes to the folder.
    """
    folder = None if folder is None else Path(folder)
    # 1
    setting = checked_setting(
        lm,
        Suite.of(suite),
        selection,
        evaluation,
        behaviour or refusal(),
        config,
        variant,
        hook_names,
        unsteered,
    )
    with only_writer(folder):
        # 2
        journal = open_journal(setting, folder, fresh)
        # 3
        lab = Lab(setting, journal, "selection")
        # 4
        plan = plan_of(lab)
        # 5
        work = expected_work(lab, plan)
        with announced(lab, plan, work, bar) as shown:
            progress = Progress(journal, shown, work.a_pass)
            # 6
            searched = search_sites(progress, lab, plan)
            # 7
            trials = try_sets(progress, lab, plan, searched)
            # 8
            chosen = freeze(progress, lab, plan, searched, trials)
            # 9
            listed = list_arms(progress, setting, plan, chosen)
            # 10
            evaluated = Lab(setting, journal, "evaluation", plan.openings)
            rows = measure(progress, lab, evaluated, plan, chosen, listed)
            # 11
            price = price_elsewhere(progress, setting, frozen_edit(setting, chosen))
            curve = detection(progress, setting, plan, chosen)
        # 12
        candidates = candidate_table(searched, chosen)
        return told(setting, plan, chosen, rows, price, evaluated, trials, candidates, curve)


def checked_setting(
    lm: HookedLM,
    suite: Suite,
    selection: PromptSets,
    evaluation: PromptSets,
    behaviour: Behaviour,
    config: StudyConfig,
    variant: str,
    hook_names: Sequence[str],
    unsteered: Unsteered | None = None,
) -> Setting:
    """What the study is of, after every check that needs no pass of the model."""
    check_prompts(behaviour, config.target, selection, evaluation)
    lm.thinking(config.thinking)
    if lm.always_thinks:
        say(
            f"The chat template of {lm.model_name} opens a think block for every answer: answers"
            f" are what follows it, within {config.max_new_tokens} new tokens (max_new_tokens)."
        )
    if config.against and config.against not in behaviour.kinds[1:]:
        raise ValueError(
            f"against={config.against!r} was given; {behaviour.name} has"
            f" {', '.join(behaviour.kinds[1:])} to compare {behaviour.kinds[0]} prompts with."
        )
    variant, names = steered_sites(lm, suite, variant, hook_names)
    lm.check_hook_names(names)
    for name in names:
        check_fit(lm, suite[variant][name])
    prompts = {
        "selection": {kind: list(texts) for kind, texts in selection.items()},
        "evaluation": {kind: list(texts) for kind, texts in evaluation.items()},
    }
    return Setting(lm, suite, prompts, behaviour, config, variant, names, unsteered or Unsteered())


def check_prompts(
    behaviour: Behaviour, target: str, selection: PromptSets, evaluation: PromptSets
) -> None:
    """ValueError for a missing or empty kind, an empty prompt, or one that occurs in both sets."""
    for name, prompts in (("selection", selection), ("evaluation", evaluation)):
        for kind in {*behaviour.kinds, *([target] if target else [])}:
            if not prompts.get(kind):
                raise ValueError(f"There are no {kind} {name} prompts; give at least one.")
        for kind in prompts:
            if not all(p.strip() for p in prompts[kind]):
                raise ValueError(f"A {kind} {name} prompt is empty; remove it.")
            if kind not in behaviour.kinds:
                raise ValueError(
                    f"{kind} prompts were given; {behaviour.name} has {', '.join(behaviour.kinds)}."
                )
    chosen_on = {p for texts in selection.values() for p in texts}
    shared = chosen_on.intersection(p for texts in evaluation.values() for p in texts)
    if shared:
        raise ValueError(
            f"{len(shared)} evaluation prompts are selection prompts too, {min(shared)!r} among"
            " them; keep them apart."
        )


def steered_sites(
    lm: HookedLM, suite: Suite, variant: str = "", hook_names: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """The variant and the sites that a study chooses from: residual streams before the last fifth
    of the layers by default.

    Raises ValueError for a variant or site that the suite does not have.
    """
    trained = [name for name in suite if not name.endswith(tuple(CONTROL_SAES))]
    variant = variant or (trained or list(suite) or [""])[0]
    if variant not in suite:
        raise ValueError(
            f"The suite has no variant {variant!r}; it has {', '.join(suite) or 'none'}."
        )
    known = list(suite[variant])
    for name in hook_names:
        if name not in known:
            raise ValueError(f"The suite has no SAE {variant}/{name}; it has {', '.join(known)}.")
    early = [name for name in known if parse_hook_name(name).layer < LAST_SHARE * lm.n_layers - 1]
    streams = [name for name in early if name.endswith("hook_resid_post")]
    return variant, list(hook_names) or streams or early or known


def open_journal(setting: Setting, folder: Path | None, fresh: bool) -> Journal:
    """The journal of exactly this study; in memory without a folder."""
    return Journal(folder and folder / JOURNAL, identity_of_study(setting), STUDY_FILES, fresh)


def identity_of_study(setting: Setting) -> dict[str, Any]:
    """What tells a study from others."""
    lm, suite = setting.lm, setting.suite
    ends = tuple(CONTROL_SAES)
    told = [place for place in suite.places() if place.variant == setting.variant]
    told += [place for place in suite.places() if place.variant.endswith(ends)]
    return {
        "study": FORMAT,
        **lm.identity(),
        "behaviour": setting.behaviour.identity,
        "config": asdict(setting.config),
        "saes": {str(place): suite.sae(place).checksum() for place in dict.fromkeys(told)},
        "sites": list(setting.hook_names),
        "prompts": hashlib.sha256(json.dumps(setting.prompts).encode()).hexdigest(),
    }


def plan_of(lab: Lab) -> Plan:
    """What the unsteered answers decide; the configuration may have decided it already."""
    behaviour, c = lab.setting.behaviour, lab.config
    first, last = behaviour.kinds[0], behaviour.kinds[-1]
    shown = rate(lab.clean[first]["outcomes"], "S")
    usual = last if c.goal == "induce" and shown > SHOWS_IT else first
    target = c.target or usual
    contrast: ContrastBy = "prompts"
    if c.contrast != "auto":
        contrast = c.contrast
    elif behaviour.name == "refusal" and shown < HARDLY_REFUSES:
        contrast = "answers"
    fitting = ["add_all" if contrast == "answers" else "add_header"]
    fitting += ["project_out"] if c.goal == "suppress" and not c.conditional else []
    besides = [kind for kind in behaviour.kinds if kind != target]
    others = [kind for kind in besides if kind != first] or besides
    return Plan(
        target,
        tuple(others),
        contrast,
        c.interventions or tuple(fitting),
        openings_of(lab),
        c.selective and contrast == "prompts",
        c.max_kl_first is not None,
    )


class Expected(NamedTuple):
    """The work of a study before it is done, by a likely choice."""

    answers: int
    passes: int
    """Short passes of its searches."""
    a_pass: float
    """Answers that a pass is worth, by the time of both."""

    @property
    def work(self) -> float:
        """All of it, in answers."""
        return self.answers + self.passes * self.a_pass


def expected_work(lab: Lab, plan: Plan) -> Expected:
    """What the study will do, with the pace of a pass taken now and that of an answer from the
    unsteered ones.
    """
    setting, c = lab.setting, lab.config
    likely = likely_choice(setting, plan)
    listed = arms(setting, plan, likely)
    sizes = {kind: len(texts) for kind, texts in setting.prompts["evaluation"].items()}
    of_means = min(c.n_trials, len(setting.hook_names))
    trials = trials_of(c, plan) * (c.n_trials + of_means)
    measured = sum(arm.n_answers(sizes) for arm in listed)
    answers = trials * answers_of_trial(lab) + measured + 2 * c.n_facts
    passes = len(setting.hook_names) * passes_of_search(c)
    passes += sum(passes_of_arm(arm, c, likely.passes) for arm in listed)
    started = time.monotonic()
    aim_of(lab, plan).merit(())
    a_pass = time.monotonic() - started
    unsteered = setting.unsteered
    an_answer = unsteered.seconds / unsteered.n if unsteered.n else 0.0
    return Expected(answers, passes, a_pass / an_answer if an_answer else 1.0)


def announced(lab: Lab, plan: Plan, work: Expected, show: bool) -> tqdm:
    """The bar of the whole study, after a line that says how many answers there will be and how
    long they take, by the pace of the unsteered ones.
    """
    setting, c = lab.setting, lab.config
    unsteered = setting.unsteered
    if show:
        pace = unsteered.seconds / unsteered.n * work.work / 60 if unsteered.n else None
        told = "" if pace is None else f", about {max(1, round(pace))} min"
        say(
            f"{c.goal} {setting.behaviour.name} on {plan.target} prompts: {work.answers:,} answers"
            f"{told}"
        )
    return tqdm(
        total=work.work,
        desc="study",
        bar_format=BAR,
        disable=not show,
    )


def _work_of(listed: Sequence[Arm], setting: Setting, chosen: Chosen, a_pass: float) -> float:
    """Of the arms, and of the price after them, in answers."""
    c, prompts = setting.config, setting.prompts["evaluation"]
    measured = sum(
        work_of(arm, kind, len(prompts[kind]), c) for arm in listed for kind in arm.kinds
    )
    passes = sum(passes_of_arm(arm, c, chosen.passes) for arm in listed)
    return measured + passes * a_pass + 1 + 2 * c.n_facts


def list_arms(progress: Progress, setting: Setting, plan: Plan, chosen: Chosen) -> list[Arm]:
    """What is measured of the choice; the bar's length is exact from here."""
    listed = arms(setting, plan, chosen)
    progress.still(_work_of(listed, setting, chosen, progress.a_pass))
    return listed


def frozen_edit(setting: Setting, chosen: Chosen) -> Steering:
    """The chosen features at the chosen strength with the goal's sign."""
    strength = setting.config.signed(chosen.intervention, chosen.strength)
    return Steering((chosen.change(strength),))


def told(
    setting: Setting,
    plan: Plan,
    chosen: Chosen,
    rows: Sequence[Mapping[str, Any]],
    price: Price,
    lab: Lab,
    trials: pd.DataFrame,
    candidates: pd.DataFrame,
    curve: pd.DataFrame | None,
) -> StudyResult:
    """Measured rows as table, headline and verdict. lab: of the evaluation prompts. curve: of the
    condition.
    """
    c = setting.config
    clean = {kind: said["outcomes"] for kind, said in lab.clean.items()}
    table = study_table(rows, clean, c.seed)
    bare = table["intervention"] == "none"
    frozen = (table["intervention"] == "features") & table["chosen"]
    table.loc[bare, ["plain_kl", "facts_right"]] = 0.0, price.facts_before
    table.loc[frozen, ["plain_kl", "facts_right"]] = price.plain_kl, price.facts_after
    headline = choice_told(setting, plan, chosen) | measured_figures(
        rows, table, clean, c.goal, plan.target, plan.others, c.seed, plan.priced
    )
    if curve is not None:
        headline |= detector_told(curve)
    along = chosen.best_means(c.signed(chosen.intervention, chosen.means.strength))
    prompts = {stage: dict(sets) for stage, sets in setting.prompts.items()}
    return StudyResult(
        c,
        setting.behaviour.name,
        plan.target,
        chosen,
        frozen_edit(setting, chosen),
        Steering((along,)),
        table,
        candidates,
        trials,
        example_answers(rows, prompts["evaluation"]),
        curve,
        headline,
        verdict(headline),
        prompts,
        plain(identity_of_study(setting)),
    )


def choice_told(setting: Setting, plan: Plan, chosen: Chosen) -> dict[str, Any]:
    """What the headline says of the choice."""
    c, features = setting.config, chosen.features
    return {
        "behaviour": setting.behaviour.name,
        "model": setting.lm.model_name,
        "site": chosen.hook_name,
        "variant": chosen.variant,
        "way": chosen.way,
        "features": list(features.features),
        "weights": list(features.weights),
        "strength": chosen.strength,
        "intervention": chosen.intervention,
        "orthogonal": bool(chosen.orthogonal_to),
        "contrast": plan.contrast,
        "condition": asdict(chosen.when) if chosen.when else None,
        "detector_missed": chosen.missed,
        "detector_false_alarms": chosen.false_alarms,
        "within_limits": chosen.within_limits,
        "max_kl": c.max_kl,
        "max_broken": c.max_broken,
        "searched_sets": chosen.passes,
        "max_kl_first": c.max_kl_first,
        "selective": plan.selective,
        "difference_of_means_strength": chosen.means.strength,
        "difference_of_means_site": chosen.means.direction.hook_name,
        "difference_of_means_within_limits": chosen.means.within_limits,
        "difference_of_means_orthogonal": bool(chosen.means.direction.orthogonal_to),
    }


def detector_told(curve: pd.DataFrame) -> dict[str, float]:
    """What the headline says of the condition on the evaluation prompts."""
    at = curve[curve["chosen"]].iloc[0]
    return {
        "detector_auc": float(at["auc"]),
        "detector_true_rate": float(at["true_rate"]),
        "detector_false_rate": float(at["false_rate"]),
    }

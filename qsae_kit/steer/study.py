"""The steering study: features and strength chosen on selection prompts, frozen, and measured on
others with controls.

One study has one goal. What is chosen is chosen by real passes: candidates by their scores, sets
grown one feature at a time, site and strength by generated answers. Random features get a search of
the same length.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from qsae_kit.attach import check_fit
from qsae_kit.data.companions import companion_of
from qsae_kit.data.prompts import STOCK_REFUSALS
from qsae_kit.io.journal import Journal
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.answering import (
    Asked,
    Cost,
    KnownRows,
    answer_all,
    answer_groups,
    cost,
    first_tokens,
    plain_kl,
    repetition,
)
from qsae_kit.lm.edits import POLICIES, Edit, Policy
from qsae_kit.lm.hooked import Generation, HookedLM
from qsae_kit.metrics.reconstruction import paired_bootstrap
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import Suite
from qsae_kit.sites import parse_hook_name
from qsae_kit.steer.behaviours import GOALS, SIGN, Behaviour, Goal, PromptSets, judged, refusal
from qsae_kit.steer.changes import Change, Condition, FeatureSet, Steering
from qsae_kit.steer.choosing import (
    Aim,
    Contrast,
    FoundDetector,
    answer_activations,
    choose_features,
    contrast,
    decision_activations,
    feature_scores,
    find_detector,
    fit_features,
    greedy_features,
    random_features,
    random_search,
)
from qsae_kit.steer.findings import example_answers, measured_figures, rate, study_table, verdict

STRENGTHS = (0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0)
CONTRASTS = ("auto", "prompts", "answers")
CONTROL_SAES = {"frozen_decoder": "frozen_decoder_sae", "frozen_soft_decoder": "soft_frozen_sae"}
"""What a variant's name ends with -> the control that it is."""
N_DISTURBING = 4
"""Random sets by which a site and strength is judged: where anything goes, features explain little.
"""
DETECTOR_SLACK = 0.02
"""A conditional edit is made at a site whose detector (there or before) errs at most so much more
than the best: misses and false alarms bound what the edit can do, whatever its features."""
LAST_SHARE = 0.8
"""Sites in the last fifth of the layers are left out (Arditi et al. 2024, arXiv 2406.11717, section
2.3).
"""


@dataclass(frozen=True)
class StudyConfig:
    """How a study is run; behaviour and prompts come beside it."""

    goal: Goal = "suppress"
    target: str = ""
    """The kind of prompts to aim at. Empty: the behaviour's first kind; to induce what it shows
    there already, its last.
    """
    strengths: tuple[float, ...] = STRENGTHS
    """Strengths of the dose-response, each with both signs, in median norms of the site; one of
    them is frozen.
    """
    n_features: int = 5
    """Features at one site, at most."""
    n_candidates: int = 12
    """Features a site that are scored."""
    n_trials: int = 4
    """Sets that are tried by generated answers, at a few strengths each: the best one of each site
    before a site's second.
    """
    n_random: int = 20
    """Random controls, each the best of as many random sets as the features' own search tried at
    the site.
    """
    n_noise: int = 5
    """Random directions of the same size; and as many random sets of features as they come, without
    a search.
    """
    control_prompts: int | None = None
    """Prompts behind each random draw and each strength that is not the frozen one; None: all."""
    dose_prompts: int = 64
    """Prompts of each kind behind the log-odds of the dose-response."""
    search_prompts: int = 16
    """Prompts of each side behind the passes of the search."""
    cost_prompts: int = 48
    """Prompts of each kind behind the KL figures."""
    n_facts: int = 100
    """Questions of fact, at most."""
    contrast: Literal["auto", "prompts", "answers"] = "auto"
    """What features are chosen by. prompts: those of the behaviour's first kind against those of
    its last one but the target (for refusal, harmful against borderline ones, which look alike), at
    the last prompt token. answers: stock refusals against the model's own answers to the same
    prompts, over the answer (contrastive activation addition, Rimsky et al. 2024, arXiv
    2312.06681): for models that hardly refuse by themselves. auto: answers for a refusal study
    where fewer than a tenth of the first kind's selection prompts are refused, else prompts."""
    positions: Policy | Literal["auto"] = "auto"
    """Which tokens the edit changes. auto: all of them where the contrast is of answers, else the
    header before the answer.
    """
    conditional: bool = False
    """Whether the change is made only while a detector feature fires, which is looked for at the
    site or before.
    """
    max_new_tokens: int = 48
    max_broken: float = 0.10
    """Share of broken answers on the target that a trial may have."""
    max_kl: float = 0.10
    """Nats a token that a trial may cost on the answers to other prompts; not asked where the
    contrast is of answers, which does not tell prompts apart."""
    thinking: bool = False
    """Whether the model thinks before it answers, where it can."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise ValueError(f"The goal {self.goal!r} was given; choose from {', '.join(GOALS)}.")
        if not self.strengths or not all(math.isfinite(s) and s > 0 for s in self.strengths):
            raise ValueError(
                f"Strengths {self.strengths} were given; they must be positive numbers (signs come"
                " from the goal)."
            )
        if not 1 <= self.n_features <= 10:
            raise ValueError(f"n_features={self.n_features} was given; allowed are 1 to 10.")
        for name in ("n_random", "n_noise", "n_facts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} was given; it cannot be negative.")
        for name in tuple(
            (
                "n_candidates n_trials dose_prompts search_prompts cost_prompts max_new_tokens"
            ).split()
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} was given; it must be at least 1.")
        if self.positions not in ("auto", *POLICIES):
            raise ValueError(
                f"positions={self.positions!r} was given; choose from auto, {', '.join(POLICIES)}."
            )
        if self.contrast not in CONTRASTS:
            raise ValueError(
                f"contrast={self.contrast!r} was given; choose from {', '.join(CONTRASTS)}."
            )

    @property
    def sign(self) -> float:
        return SIGN[self.goal]


def quick(config: StudyConfig) -> StudyConfig:
    """The same study with smaller searches and with costs on fewer prompts, for models that take a
    second for an answer.
    """
    return replace(
        config,
        n_candidates=8,
        n_trials=2,
        search_prompts=6,
        dose_prompts=32,
        cost_prompts=16,
        n_facts=40,
    )


class Chosen(NamedTuple):
    """What selection decided, and what its controls need."""

    variant: str
    hook_name: str
    way: str
    """How the set was made: gap, fitted or greedy."""
    features: FeatureSet
    strength: float
    """In median norms of the site, without the goal's sign."""
    when: Condition | None
    missed: float | None
    """Share of the target selection prompts at which the detector is silent."""
    false_alarms: float | None
    mean_gap: tuple[float, ...]
    """Difference of means at the site [d_model]."""
    alive: tuple[int, ...]
    """Features that random controls are drawn from."""
    passes: int
    """Sets that the search tried at the site, so many as each random control tries."""
    within_limits: bool
    """Whether the trial kept the limits (`StudyConfig.max_broken`, `max_kl`)."""
    means_strength: float
    """The strength that the same trials choose for the difference of means."""

    def change(self, strength: float, positions: Policy) -> Change:
        return Change(
            "add",
            self.hook_name,
            self.variant,
            self.features.features,
            self.features.weights,
            strength=strength,
            positions=positions,
            when=self.when,
        )


class StudyResult(NamedTuple):
    """A finished study."""

    config: StudyConfig
    behaviour: str
    target: str
    chosen: Chosen
    steering: Steering
    """The frozen edit as a value."""
    means: Steering
    """The difference of means at the strength that the same trials choose for it."""
    table: pd.DataFrame
    """study.csv: see `steer.findings.COLUMNS`."""
    candidates: pd.DataFrame
    """Every candidate feature of every site with its scores (`steer.choosing.feature_scores`), and
    whether it was chosen.
    """
    selection: pd.DataFrame
    """Every trial by generated answers, on selection prompts."""
    examples: pd.DataFrame
    """Some answers with and without the edit: prompt_kind, prompt, base, steered."""
    headline: dict[str, Any]
    verdict: str
    prompts: dict[str, dict[str, list[str]]]
    """The selection and the evaluation prompts by kind."""


class _Lab:
    """What every measurement needs: prompts as ids, clean answers, the judge."""

    def __init__(
        self,
        lm: HookedLM,
        behaviour: Behaviour,
        prompts: PromptSets,
        config: StudyConfig,
        journal: Journal,
        stage: str,
        openings: Int[Tensor, " token"] | None = None,
    ) -> None:
        self.lm, self.behaviour, self.prompts, self.config = lm, behaviour, prompts, config
        self.journal, self.stage = journal, stage
        self.thinking = config.thinking if lm.has_thinking else None
        self.ids = {
            kind: [lm.chat_tokens(p, self.thinking) for p in texts]
            for kind, texts in prompts.items()
        }
        self.clean: dict[str, dict[str, Any]] = {}
        for kind in prompts:
            self.clean[kind] = journal.get(f"{stage}/clean/{kind}", partial(self.answers, kind, []))
        self.openings = openings
        self.known: dict[str, KnownRows] = {}

    def answers(
        self, kind: str, edits: Sequence[Edit], n: int | None = None, system: str = ""
    ) -> dict[str, Any]:
        """The answers to the first n prompts of a kind with their verdicts, as plain values."""
        return self.answers_of([(kind, edits, n)], system)[0]

    def answers_of(
        self, groups: Sequence[tuple[str, Sequence[Edit], int | None]], system: str = ""
    ) -> list[dict[str, Any]]:
        """`answers` for several kinds, edits and numbers of prompts at once."""
        texts = [self.prompts[kind][:n] for kind, _, n in groups]
        asked: list[Asked] = [
            Asked([with_system(system, p) for p in some] if system else some, edits)
            for some, (_, edits, _) in zip(texts, groups, strict=True)
        ]
        answers = answer_groups(self.lm, asked, self.config.max_new_tokens, self.thinking)
        return [
            self._judged(kind, some, out)
            for some, out, (kind, _, _) in zip(texts, answers, groups, strict=True)
        ]

    def _judged(self, kind: str, texts: Sequence[str], out: Generation) -> dict[str, Any]:
        clean = self.clean.get(kind)
        known = (
            list(zip(clean["tokens"], clean["surprise"], strict=True))[: len(texts)]
            if clean
            else ()
        )
        said = judged(self.lm, self.behaviour, texts, out, self.thinking, known)
        return {
            "outcomes": said.outcomes,
            "correct": said.correct,
            "texts": said.text,
            "tokens": said.tokens,
            "surprise": said.surprise,
            "perplexity": math.exp(min(50.0, sum(said.surprise) / sum(map(len, said.tokens)))),
            "repetition": repetition(said.tokens),
        }

    def measured(
        self,
        kind: str,
        edits: Sequence[Edit],
        n: int | None = None,
        system: str = "",
        price: bool = True,
    ) -> dict[str, Any]:
        """`answers` with the change's costs, without all but some of the texts."""
        said = self.answers(kind, edits, n, system) if edits or system else dict(self.clean[kind])
        if price:
            kl = self.cost(kind, edits, system)
            said |= {"kl_first": kl.kl_first, "kl_answer": kl.kl_answer}
        if self.openings is not None:
            said |= self._odds(
                kind, edits, min(n or len(self.ids[kind]), self.config.dose_prompts), system
            )
        return said | {"texts": said["texts"][:3], "tokens": [], "surprise": []}

    def cost(self, kind: str, edits: Sequence[Edit], system: str = "") -> Cost:
        """What a change costs on the first prompts of a kind with their clean answers."""
        n = self.config.cost_prompts
        answers = self.clean[kind]["tokens"][:n]
        rows = self._rows(kind, n, "", answers)
        return cost(rows, edits, self._rows(kind, n, system, answers))

    def dose(self, kind: str, edits: Sequence[Edit]) -> dict[str, Any]:
        """The log-odds of the behaviour's beginnings, by one pass a prompt."""
        n = min(self.config.dose_prompts, len(self.ids[kind]))
        return {**self._odds(kind, edits, n), "n": n}

    def _odds(self, kind: str, edits: Sequence[Edit], n: int, system: str = "") -> dict[str, float]:
        assert self.openings is not None
        nats = self._rows(kind, n, system).log_odds(self.openings, edits)
        mean, low, high = paired_bootstrap([nats.tolist()], [1.0], seed=self.config.seed)
        return {"log_odds": mean, "log_odds_low": low, "log_odds_high": high}

    def _rows(
        self, kind: str, n: int, system: str, answers: list[list[int]] | None = None
    ) -> KnownRows:
        """The first n prompts of a kind, which every arm is measured on."""
        key = f"{kind}/{n}/{answers is not None}/{system}"
        if key not in self.known:
            ids = self.ids[kind][:n]
            if system:
                ids = [
                    self.lm.chat_tokens(with_system(system, p), self.thinking)
                    for p in self.prompts[kind][:n]
                ]
            self.known[key] = KnownRows(self.lm, ids, answers, 16 if answers else 64)
        return self.known[key]


def with_system(system: str, prompt: str) -> list[dict[str, str]]:
    """A prompt behind a system prompt, as messages."""
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


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
    shared = {p for ps in selection.values() for p in ps} & {
        p for ps in evaluation.values() for p in ps
    }
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
    trained = [name for name in suite if not any(name.endswith(end) for end in CONTROL_SAES)]
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


def steering_study(
    lm: HookedLM,
    suite: Suite,
    selection: PromptSets,
    evaluation: PromptSets,
    behaviour: Behaviour | None = None,
    config: StudyConfig = StudyConfig(),
    *,
    hook_names: Sequence[str] = (),
    variant: str = "",
    folder: Path | None = None,
    bar: bool = True,
) -> StudyResult:
    """The whole study: features, site and strength on selection prompts, figures and controls on
    evaluation prompts.

    suite: variant -> hook name -> SAE; variants whose names end with frozen_decoder or
        frozen_soft_decoder are controls at the
    same site. behaviour: refusal by default. hook_names, variant: where to choose from
    (`steered_sites`). folder: every step is written there, and a study that was cut off goes on
    (`journal.jsonl`); the same seed gives the same digits. Raises ValueError for prompts that are
    missing, empty, in both sets or all of one kind, for sites that are not there, and while another
    process writes to the folder.
    """
    behaviour = behaviour or refusal()
    check_prompts(behaviour, config.target, selection, evaluation)
    variant, names = steered_sites(lm, suite, variant, hook_names)
    lm.check_hook_names(names)
    for name in names:
        check_fit(lm, suite[variant][name])
    prompts = {
        "selection": {k: list(v) for k, v in selection.items()},
        "evaluation": {k: list(v) for k, v in evaluation.items()},
    }
    about = {
        "study": 3,
        **lm.identity(),
        "behaviour": behaviour.identity,
        "config": asdict(config),
        "saes": {f"{variant}/{name}": suite[variant][name].checksum() for name in names},
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }
    with only_writer(folder):
        journal = Journal(folder and folder / "journal.jsonl", about)
        return _Study(lm, suite, prompts, behaviour, config, variant, names, journal, bar).run()


class _Study:
    """One study while it runs."""

    def __init__(
        self,
        lm: HookedLM,
        suite: Suite,
        prompts: dict[str, dict[str, list[str]]],
        behaviour: Behaviour,
        config: StudyConfig,
        variant: str,
        names: Sequence[str],
        journal: Journal,
        bar: bool,
    ) -> None:
        self.lm, self.suite, self.prompts, self.behaviour, self.config = (
            lm,
            suite,
            prompts,
            behaviour,
            config,
        )
        self.variant, self.names, self.journal, self.show = variant, list(names), journal, bar
        self.bar: Any = None

    # --- choosing

    def run(self) -> StudyResult:
        began = time.monotonic()
        lab = _Lab(
            self.lm,
            self.behaviour,
            self.prompts["selection"],
            self.config,
            self.journal,
            "selection",
        )
        first = self.behaviour.kinds[0]
        shown = rate(lab.clean[first]["outcomes"], "S")
        self.target = self.config.target or (
            self.behaviour.kinds[-1] if self.config.goal == "induce" and shown > 0.5 else first
        )
        self.contrast = self.config.contrast
        if self.contrast == "auto":
            self.contrast = (
                "answers" if self.behaviour.name == "refusal" and shown < 0.1 else "prompts"
            )
        told: Policy = "all" if self.contrast == "answers" else "header"
        self.positions: Policy = told if self.config.positions == "auto" else self.config.positions
        self.others = [
            kind for kind in self.behaviour.kinds if kind not in (first, self.target)
        ] or [kind for kind in self.behaviour.kinds if kind != self.target]
        lab.openings = self._openings(lab)
        self._announce(lab, time.monotonic() - began)
        with tqdm(
            total=self._steps(), desc="study", unit="step", disable=not self.show
        ) as self.bar:
            chosen, selection, candidates = self._choose(lab)
            return self._measure(chosen, selection, candidates, lab.openings)

    def _step(self, key: str, compute: Callable[[], Any]) -> Any:
        value = self.journal.get(key, compute)
        if self.bar is not None:
            self.bar.update()
        return value

    def _steps(self) -> int:
        """Steps of the whole study, at most."""
        c, kinds, n = self.config, len(self.behaviour.kinds), len(self.config.strengths)
        few = min(3, n)
        choosing = (
            len(self.names)
            + (few if self.contrast == "prompts" else n.bit_length()) * (c.n_trials + 1)
            + 1
        )
        dose = 2 * 2 * n * (1 + len(self.others))
        arms = (
            2 * (kinds + few - 1) + 2 * kinds + 1 + kinds * (c.goal in self.behaviour.instructions)
        )
        controls = sum(
            1 + kinds
            for end in CONTROL_SAES
            if any(variant.endswith(end) for variant in self.suite)
        )
        return choosing + dose + arms + controls + 2 * (c.n_random + c.n_noise) + 2

    def _announce(self, lab: _Lab, seconds: float) -> None:
        """An estimate from the clean selection answers: how many answers there will be, and how
        long they take.
        """
        if not self.show:
            return
        c, evaluation = (
            self.config,
            {kind: len(p) for kind, p in self.prompts["evaluation"].items()},
        )
        few = min(c.control_prompts or evaluation[self.target], evaluation[self.target])
        n_selection = sum(map(len, self.prompts["selection"].values()))
        n = (
            3 * c.n_trials * n_selection
            + sum(evaluation.values()) * 5
            + few * (5 + c.n_random + 2 * c.n_noise)
            + 2 * c.n_facts
        )
        passes = len(self.names) * (2 * c.n_candidates + 5 * c.n_candidates + 27) + c.n_random * (
            5 * c.n_candidates
        )
        started = time.monotonic()
        self._aim(lab).others_odds()
        a_pass = time.monotonic() - started
        minutes = (seconds / max(1, n_selection) * n + passes * a_pass) / 60
        tqdm.write(
            f"{self.config.goal} {self.behaviour.name}, aimed at {self.target} prompts: about {n:,}"
            f" answers and {passes:,} short passes, {minutes:.0f} minutes at the pace of the first"
            f" {n_selection} answers (less where steps are in the journal)."
        )

    def _openings(self, lab: _Lab) -> Int[Tensor, " token"]:
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
            if n / total > rest.get(token, 0) / others and n >= 2
        ]
        if total < 8 or not own:
            return first_tokens(self.lm, STOCK_REFUSALS)
        return torch.tensor(sorted(own), device=self.lm.device)

    def _aim(self, lab: _Lab) -> Aim:
        """What the search looks at: some target prompts, and as many of the others in turn."""
        assert lab.openings is not None
        n = self.config.search_prompts
        per_kind = max(1, n // len(self.others))
        texts = [
            self.behaviour.wanted(p, self.config.goal)
            for p in self.prompts["selection"][self.target][:n]
        ]
        known = [i for i, text in enumerate(texts) if text is not None]
        usable = len(known) == len(texts) or len(known) >= 8
        ids = lab.ids[self.target][:n]
        return Aim(
            self.lm,
            [ids[i] for i in known] if usable else ids,
            [ids for kind in self.others for ids in lab.ids[kind][:per_kind]],
            lab.openings,
            self.config.sign,
            [self._answer_ids(texts[i]) for i in known] if usable else None,
            price=0.0 if self.contrast == "answers" else 1.0,
        )

    def _answer_ids(self, text: str | None) -> list[int]:
        return self.lm.tokenizer(text, add_special_tokens=False).input_ids

    def _groups(self, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Activations of the two groups that `StudyConfig.contrast` compares, the one with the
        behaviour first.
        """
        selection, thinking = (
            self.prompts["selection"],
            self.config.thinking if self.lm.has_thinking else None,
        )
        first = self.behaviour.kinds[0]
        if self.contrast == "prompts":
            away = [
                kind for kind in self.behaviour.kinds[1:] if kind != self.config.target
            ] or self.behaviour.kinds[1:]
            rest = selection[away[-1]]
            return (
                decision_activations(self.lm, names, selection[first], thinking),
                decision_activations(self.lm, names, rest, thinking),
            )
        prompts = [p for kind in self.behaviour.kinds[:2] for p in selection[kind]]
        own = self.journal.get(
            "own answers", lambda: answer_all(self.lm, prompts, [], 16, thinking).tokens
        )
        stock = [
            self.lm.tokenizer(text, add_special_tokens=False).input_ids for text in STOCK_REFUSALS
        ]
        return (
            answer_activations(
                self.lm,
                names,
                prompts,
                [stock[i % len(stock)] for i in range(len(prompts))],
                thinking,
            ),
            answer_activations(self.lm, names, prompts, own, thinking),
        )

    def _detectors(self) -> dict[str, FoundDetector]:
        """For every site the best detector there or before it."""
        selection, thinking = (
            self.prompts["selection"],
            self.config.thinking if self.lm.has_thinking else None,
        )
        rest = [p for kind, texts in selection.items() if kind != self.target for p in texts]
        found: dict[str, FoundDetector] = {}
        best: FoundDetector | None = None
        for name, sae in self.suite[self.variant].items():
            if self.lm.order_of(name) > max(map(self.lm.order_of, self.names)):
                break
            one = find_detector(
                self.lm,
                {self.variant: {name: sae}},
                selection[self.target],
                rest,
                enable_thinking=thinking,
            )
            if best is None or one.missed + one.false_alarms < best.missed + best.false_alarms:
                best = one
            found[name] = best
        return found

    def _search(self, lab: _Lab, variant: str, name: str, when: Condition | None) -> dict[str, Any]:
        """Sets of features at one site with what they do to the log-odds at every strength."""
        sae, c = self.suite[variant][name], self.config
        refusing, rest = self._groups([name])
        aim = self._aim(lab)
        found = contrast(sae, refusing[name], rest[name])
        if not found.feature_gap.any():
            return {"ways": {}, "candidates": []}

        def make(chosen: FeatureSet, strength: float) -> list[Edit]:
            return self._pushed(variant, name, chosen, strength, when)

        clean = aim.others_odds()
        sets = {
            "gap": choose_features(found, c.n_features),
            "fitted": fit_features(sae, found, c.n_features),
        }
        fitted = [aim.merit(make(sets["fitted"], strength), clean) for strength in c.strengths]
        at_best = partial(make, strength=c.strengths[fitted.index(max(fitted))])
        scores = feature_scores(aim, sae, refusing[name], rest[name], at_best, c.n_candidates)
        pool = [
            (int(feature), math.copysign(1.0, gap))
            for feature, gap in zip(scores["feature"], scores["gap"], strict=True)
        ][: c.n_candidates // 2]
        grown = greedy_features(aim, pool, at_best, c.n_features)
        sets["greedy"] = grown.chosen
        merits = {
            way: (
                fitted
                if way == "fitted"
                else [aim.merit(make(chosen, s), clean) for s in c.strengths]
            )
            for way, chosen in sets.items()
        }
        ways = {
            way: {"features": chosen.features, "weights": chosen.weights, "merits": merits[way]}
            for way, chosen in sets.items()
        }
        generator = torch.Generator().manual_seed(c.seed + 1)  # not the draws that evaluation uses
        draws = [random_features(found, sets["gap"], generator) for _ in range(N_DISTURBING)]
        still = aim.merit((), clean)
        disturbance = [
            sum(max(0.0, aim.merit(make(draw, s), clean) - still) for draw in draws) / len(draws)
            for s in c.strengths
        ]
        return {
            "disturbance": disturbance,
            "disturbing": [[draw.features, draw.weights] for draw in draws],
            "candidates": scores.to_dict("records"),
            "ways": ways,
            "alive": found.alive.tolist(),
            "mean_gap": found.mean_gap.tolist(),
            "passes": len(scores) + grown.passes + len(sets),
        }

    def _pushed(
        self, variant: str, name: str, chosen: FeatureSet, strength: float, when: Condition | None
    ) -> list[Edit]:
        """The edits that add a set at a strength without the goal's sign, which is put on here."""
        change = Change(
            "add",
            name,
            variant,
            chosen.features,
            chosen.weights,
            strength=self.config.sign * strength,
            positions=self.positions,
            when=when,
        )
        return Steering((change,)).edits(self.suite)

    def _choose(self, lab: _Lab) -> tuple[Chosen, pd.DataFrame, pd.DataFrame]:
        c = self.config
        conditions: dict[str, Any] = {}
        if c.conditional:
            conditions = self.journal.get(
                "detectors",
                lambda: {
                    name: [asdict(d.condition), d.missed, d.false_alarms]
                    for name, d in self._detectors().items()
                },
            )
        when = {name: Condition(**entry[0]) for name, entry in conditions.items()}
        sites = {
            name: self._step(
                f"search/{name}", partial(self._search, lab, self.variant, name, when.get(name))
            )
            for name in self.names
        }
        sites = {name: found for name, found in sites.items() if found["ways"]}
        if not sites:
            raise ValueError(
                "No feature differs between the two groups at any site; train the SAEs longer or at"
                " other sites."
            )
        if conditions:
            wrong = {name: conditions[name][1] + conditions[name][2] for name in sites}
            sites = {
                name: found
                for name, found in sites.items()
                if wrong[name] <= min(wrong.values()) + DETECTOR_SLACK
            }
        apart = {
            (name, kind): [
                merit - away
                for merit, away in zip(way["merits"], found["disturbance"], strict=True)
            ]
            for name, found in sites.items()
            for kind, way in found["ways"].items()
        }
        trials: list[dict[str, Any]] = []
        for name, kind in _ranked(apart, sites)[: c.n_trials]:
            way, disturbing = sites[name]["ways"][kind], sites[name]["disturbing"]
            ours, *random = [
                partial(
                    self._pushed,
                    self.variant,
                    name,
                    FeatureSet(tuple(f), tuple(w)),
                    when=when.get(name),
                )
                for f, w in [(way["features"], way["weights"]), *disturbing]
            ]
            labels = {"site": name, "way": kind, "features": len(way["features"])}
            lead = max(
                (trial["score"] for trial in trials if trial["within_limits"]), default=-math.inf
            )
            trials += [
                labels | trial
                for trial in self._trials(
                    lab, f"{name}/{kind}", ours, apart[name, kind], random, lead
                )
            ]
        table = pd.DataFrame(trials)
        first = self._best(table)
        best = table.loc[first]
        table["chosen"] = table.index == first
        site = sites[best["site"]]
        way = site["ways"][best["way"]]
        told = conditions.get(best["site"])
        along = self._along(
            self.suite[self.variant][best["site"]], site["mean_gap"], when.get(best["site"])
        )
        merits = self._step(f"means/{best['site']}", partial(self._merits, lab, along))
        means = pd.DataFrame(self._trials(lab, f"{best['site']}/means", along, merits, ()))
        chosen = Chosen(
            self.variant,
            best["site"],
            best["way"],
            FeatureSet(tuple(way["features"]), tuple(way["weights"])),
            float(best["strength"]),
            when.get(best["site"]),
            told and told[1],
            told and told[2],
            tuple(site["mean_gap"]),
            tuple(site["alive"]),
            site["passes"],
            bool(best["within_limits"]),
            float(means.loc[self._best(means), "strength"]),
        )
        candidates = pd.concat(
            [pd.DataFrame(found["candidates"]).assign(site=name) for name, found in sites.items()],
            ignore_index=True,
        )
        taken = (candidates["site"] == chosen.hook_name) & candidates["feature"].isin(
            chosen.features.features
        )
        return (
            chosen,
            table,
            candidates.assign(chosen=taken)[["site", *candidates.columns.drop("site"), "chosen"]],
        )

    def _along(
        self, sae: SAE, mean_gap: Sequence[float], when: Condition | None
    ) -> Callable[[float], list[Edit]]:
        """The edits that add the difference of means at a strength (without the goal's sign)."""
        change = _means(sae, mean_gap, self.positions, when)
        return lambda strength: Steering(
            (replace(change, strength=self.config.sign * strength),)
        ).edits(self.suite)

    def _merits(self, lab: _Lab, make: Callable[[float], list[Edit]]) -> list[float]:
        aim = self._aim(lab)
        clean = aim.others_odds()
        return [aim.merit(make(strength), clean) for strength in self.config.strengths]

    def _trials(
        self,
        lab: _Lab,
        key: str,
        make: Callable[..., list[Edit]],
        merits: Sequence[float],
        random: Sequence[Callable[..., list[Edit]]],
        lead: float = -math.inf,
    ) -> list[dict[str, Any]]:
        """One set at a few strengths: the three of most merit, and on from the best of them while
        that is the first or the last of those tried and its score above `lead`, another set's;
        where the contrast is of answers, and first tokens say little of how an answer goes on,
        those of a search for the largest strength within the limits."""
        c = self.config

        def tried(i: int) -> dict[str, Any]:
            strength = c.strengths[i]
            compute = partial(self._trial, lab, make(strength), [each(strength) for each in random])
            return {
                "strength": strength,
                "merit": merits[i],
                **self._step(f"trial/{key}/{strength:g}", compute),
            }

        order = sorted(range(len(merits)), key=lambda i: c.strengths[i])
        trials: list[dict[str, Any]] = []
        if self.contrast == "prompts":
            places = sorted(
                sorted(range(len(order)), key=lambda place: -round(merits[order[place]], 3))[:3]
            )
            trials = [tried(order[place]) for place in places]
            while True:
                best = self._best(pd.DataFrame(trials))
                beyond = [
                    to
                    for to in (places[best] - 1, places[best] + 1)
                    if 0 <= to < len(order) and to not in places
                ]
                if not beyond or trials[best]["score"] <= lead:
                    return trials
                places.append(beyond[-1])
                trials.append(tried(order[beyond[-1]]))
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            trials.append(tried(order[middle]))
            low, high = (middle + 1, high) if trials[-1]["within_limits"] else (low, middle)
        return trials

    def _best(self, trials: pd.DataFrame) -> Any:
        """The index of the best trial: within the limits, then by score, then the weakest."""
        ranked = trials.assign(whole=trials["score"].round(2), near=-trials["strength"])
        return ranked.sort_values(
            ["within_limits", "whole", "near"], ascending=False, kind="stable"
        ).index[0]

    def _trial(
        self, lab: _Lab, edits: Sequence[Edit], random: Sequence[Sequence[Edit]]
    ) -> dict[str, Any]:
        """How one change does on the selection prompts.

        score: the share of target answers that are as wanted (where right answers are known and the
            goal is to suppress: right),
        less the disturbance: the mean share of target prompts whose outcome random sets with a
        change of the same size change; unless the contrast is of answers also less the mean share
        of other prompts whose outcome changes, or whose answer turns right or wrong.
        """
        kinds = [self.target, *self.others]
        answers = lab.answers_of(
            [
                *((kind, edits, None) for kind in kinds),
                *((self.target, each, self.config.search_prompts) for each in random),
            ]
        )
        (said, *elsewhere), draws = answers[: len(kinds)], answers[len(kinds) :]
        shown, broken = rate(said["outcomes"], "S"), rate(said["outcomes"], "B")
        wanted = shown
        if self.config.goal == "suppress":
            wanted = (
                said["correct"].count("1") / len(said["correct"])
                if "-" not in said["correct"]
                else 1 - shown - broken
            )
        changed = []
        for kind, new in zip(self.others, elsewhere, strict=True):
            after, before = (
                list(zip(each["outcomes"], each["correct"], strict=True))
                for each in (new, lab.clean[kind])
            )
            changed.append(sum(a != b for a, b in zip(after, before, strict=True)) / len(before))
        price = [lab.cost(kind, edits).kl_answer for kind in self.others]
        away = sum(changed) / len(changed)
        pairs = [
            (a, b)
            for draw in draws
            for a, b in zip(draw["outcomes"], lab.clean[self.target]["outcomes"], strict=False)
        ]
        disturbance = sum(a != b for a, b in pairs) / max(1, len(pairs))
        selective = self.contrast == "prompts"
        return {
            "wanted": wanted,
            "broken": broken,
            "changed_elsewhere": away,
            "disturbance": disturbance,
            "kl_answer": max(price),
            "score": wanted - disturbance - (away if selective else 0.0),
            "within_limits": (
                broken <= self.config.max_broken
                and (not selective or max(price) <= self.config.max_kl)
            ),
        }

    # --- measuring

    def _measure(
        self, chosen: Chosen, selection: pd.DataFrame, candidates: pd.DataFrame, openings: Tensor
    ) -> StudyResult:
        c = self.config
        lab = _Lab(
            self.lm,
            self.behaviour,
            self.prompts["evaluation"],
            c,
            self.journal,
            "evaluation",
            openings,
        )
        along = _means(
            self.suite[chosen.variant][chosen.hook_name],
            chosen.mean_gap,
            self.positions,
            chosen.when,
        )
        arms: dict[str, Change] = {
            "features": chosen.change(1.0, self.positions),
            "difference_of_means": along,
        }
        rows: list[dict[str, Any]] = []

        def add(
            arm: str,
            kind: str,
            change: Change | None,
            strength: float,
            n: int | None = None,
            *,
            dose: bool = False,
            system: str = "",
            draw: int | None = None,
        ) -> None:
            frozen = not dose and (
                change is None
                or arm == "difference_of_means_best"
                or abs(strength) == chosen.strength
            )
            labels = {
                "goal": "none" if arm == "none" else c.goal,
                "intervention": arm,
                "prompt_kind": kind,
                "strength": strength,
                "target": arm != "none" and kind == self.target,
                "chosen": arm != "none" and frozen,
                "draw": draw,
            }
            edits = (
                []
                if change is None
                else Steering((replace(change, strength=strength),)).edits(self.suite)
            )
            # measured already
            same = arm == "difference_of_means_best" and strength == c.sign * chosen.strength
            measured, how = "difference_of_means" if same else arm, "dose" if dose else "answers"
            key = f"row/{measured}/{kind}/{strength:g}/{how}/{draw}"
            compute = (
                partial(lab.dose, kind, edits)
                if dose
                else partial(lab.measured, kind, edits, n, system)
            )
            rows.append(labels | self._step(key, compute))

        for kind in lab.prompts:
            add("none", kind, None, 0.0)
        for arm, change in arms.items():
            for strength in c.strengths:
                for sign in (1.0, -1.0):
                    for kind in (self.target, *self.others):
                        add(arm, kind, change, sign * strength, dose=True)
            for strength in self._generated(chosen.strength):
                few = None if strength == chosen.strength else c.control_prompts
                for kind in lab.prompts if strength == chosen.strength else [self.target]:
                    add(arm, kind, change, c.sign * strength, few)
        for kind in lab.prompts:
            add("difference_of_means_best", kind, along, c.sign * chosen.means_strength)
        add("wrong_sign", self.target, arms["features"], -c.sign * chosen.strength)
        for draw in range(c.n_random):
            features = self._step(f"random/{draw}", partial(self._random, chosen, draw, openings))
            change = replace(
                arms["features"], features=tuple(features[0]), weights=tuple(features[1])
            )
            add(
                "random",
                self.target,
                change,
                c.sign * chosen.strength,
                c.control_prompts,
                draw=draw,
            )
        for draw in range(c.n_noise):
            generator = torch.Generator().manual_seed(c.seed * 1000 + draw)
            single = random_features(_drawn_from(chosen), chosen.features, generator)
            change = replace(arms["features"], features=single.features, weights=single.weights)
            add(
                "random_single",
                self.target,
                change,
                c.sign * chosen.strength,
                c.control_prompts,
                draw=draw,
            )
            noise = replace(
                along, direction=tuple(torch.randn(self.lm.d_model, generator=generator).tolist())
            )
            add("noise", self.target, noise, c.sign * chosen.strength, c.control_prompts, draw=draw)
        if c.goal in self.behaviour.instructions:
            for kind in lab.prompts:
                add("system_prompt", kind, None, 0.0, system=self.behaviour.instructions[c.goal])
        for end, arm in CONTROL_SAES.items():
            for variant in (
                v for v in self.suite if v.endswith(end) and chosen.hook_name in self.suite[v]
            ):
                found = self._step(f"search/{variant}", partial(self._control_set, variant, chosen))
                change = replace(
                    arms["features"],
                    variant=variant,
                    features=tuple(found[0]),
                    weights=tuple(found[1]),
                )
                for kind in lab.prompts:
                    add(arm, kind, change, c.sign * chosen.strength)
                break
        clean = {kind: said["outcomes"] for kind, said in lab.clean.items()}
        steering = Steering((chosen.change(c.sign * chosen.strength, self.positions),))
        means = Steering((replace(along, strength=c.sign * chosen.means_strength),))
        table = self._with_capability(study_table(rows, clean, c.seed), steering)
        headline = self._about(chosen) | measured_figures(
            rows, table, clean, c.goal, self.target, self.others, c.seed
        )
        return StudyResult(
            c,
            self.behaviour.name,
            self.target,
            chosen,
            steering,
            means,
            table,
            candidates,
            selection,
            example_answers(rows, self.prompts["evaluation"]),
            headline,
            verdict(headline),
            self.prompts,
        )

    def _about(self, chosen: Chosen) -> dict[str, Any]:
        """What the headline says of the choice."""
        c, features = self.config, chosen.features
        return {
            "behaviour": self.behaviour.name,
            "model": self.lm.model_name,
            "site": chosen.hook_name,
            "variant": chosen.variant,
            "way": chosen.way,
            "features": list(features.features),
            "weights": list(features.weights),
            "strength": chosen.strength,
            "positions": self.positions,
            "contrast": self.contrast,
            "condition": asdict(chosen.when) if chosen.when else None,
            "detector_missed": chosen.missed,
            "detector_false_alarms": chosen.false_alarms,
            "within_limits": chosen.within_limits,
            "max_kl": c.max_kl,
            "max_broken": c.max_broken,
            "searched_sets": chosen.passes,
            "difference_of_means_strength": chosen.means_strength,
        }

    def _generated(self, frozen: float) -> list[float]:
        """The three strengths with generated answers: the one nearest to half of the frozen one,
        the frozen one, the largest.
        """
        half = min(self.config.strengths, key=lambda s: (abs(s - frozen / 2), s))
        return sorted({half, frozen, max(self.config.strengths)})

    def _selection_lab(self, openings: Tensor) -> _Lab:
        return _Lab(
            self.lm,
            self.behaviour,
            self.prompts["selection"],
            self.config,
            self.journal,
            "selection",
            openings,
        )

    def _random(self, chosen: Chosen, draw: int, openings: Tensor) -> tuple[Any, Any]:
        """The best of as many random sets as the features' search tried, by the same merit on the
        same prompts.
        """
        aim = self._aim(self._selection_lab(openings))
        best = random_search(
            aim,
            _drawn_from(chosen),
            chosen.features,
            lambda s: self._pushed(
                chosen.variant, chosen.hook_name, s, chosen.strength, chosen.when
            ),
            chosen.passes,
            torch.Generator().manual_seed(self.config.seed * 1000 + draw),
        )
        return best.features, best.weights

    def _control_set(self, variant: str, chosen: Chosen) -> tuple[Any, Any]:
        """The set that the same selection takes from another SAE at the frozen site and
        strength.
        """
        lab = _Lab(
            self.lm,
            self.behaviour,
            self.prompts["selection"],
            self.config,
            self.journal,
            "selection",
        )
        lab.openings = self._openings(lab)
        ways = self._search(lab, variant, chosen.hook_name, chosen.when)["ways"]
        at = self.config.strengths.index(chosen.strength)
        best = max(ways.values(), key=lambda way: way["merits"][at])
        return best["features"], best["weights"]

    def _with_capability(self, table: pd.DataFrame, steering: Steering) -> pd.DataFrame:
        """Fills plain_kl and facts_right of the clean rows and of those with the frozen
        features.
        """
        edits = steering.edits(self.suite)
        everywhere = Steering(
            tuple(replace(change, positions="all", when=None) for change in steering.changes)
        ).edits(self.suite)
        kl = self._step(
            "plain", lambda: plain_kl(self.lm, companion_of(self.lm).passages(), everywhere)
        )
        right = self._step("facts", lambda: [self._facts([]), self._facts(edits)])
        clean, frozen = (
            table["intervention"] == "none",
            (table["intervention"] == "features") & table["chosen"],
        )
        table.loc[clean, ["plain_kl", "facts_right"]] = 0.0, right[0]
        table.loc[frozen, ["plain_kl", "facts_right"]] = kl, right[1]
        return table

    def _facts(self, edits: Sequence[Edit]) -> float:
        facts = companion_of(self.lm).facts(self.config.n_facts, self.config.seed)
        if not facts:
            return float("nan")
        thinking = self.config.thinking if self.lm.has_thinking else None
        said = answer_all(
            self.lm, [fact.question for fact in facts], edits, self.config.max_new_tokens, thinking
        ).text
        return sum(fact.right(text) for fact, text in zip(facts, said, strict=True)) / len(facts)


def _drawn_from(chosen: Chosen) -> Contrast:
    """What random controls are drawn from."""
    gap = torch.tensor(chosen.mean_gap)
    return Contrast(torch.zeros(0), gap, torch.tensor(chosen.alive, dtype=torch.int64))


def _means(
    sae: SAE, mean_gap: Sequence[float], positions: Policy, when: Condition | None
) -> Change:
    assert sae.provenance is not None
    return Change(
        "add",
        sae.provenance.hook_name,
        direction=tuple(mean_gap),
        median_norm=sae.provenance.filter.median,
        positions=positions,
        when=when,
    )


def _ranked(
    merits: Mapping[tuple[str, str], Sequence[float]], sites: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """(site, way) pairs by their largest merit, every site's best one first; of sets that are the
    same, one.
    """
    kept: dict[str, tuple[str, str]] = {}
    for name, kind in sorted(merits, key=lambda key: -max(merits[key])):
        way = sites[name]["ways"][kind]
        kept.setdefault(json.dumps([name, way["features"], way["weights"]]), (name, kind))
    order = list(kept.values())
    return sorted(
        order, key=lambda pair: [name for name, _ in order[: order.index(pair)]].count(pair[0])
    )

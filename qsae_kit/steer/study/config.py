"""How a study is run."""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from qsae_kit.steer.behaviours import GOALS, SIGN, Goal
from qsae_kit.steer.choose.contrast import MOST_FEATURES
from qsae_kit.steer.choose.detector import MOST_FALSE_ALARMS, MOST_WATCHED
from qsae_kit.steer.directions import INTERVENTIONS

STRENGTHS = (0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0)
SHARES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
MOST_TAKEN = 2.0
"""Share of a direction beyond which a projection puts more of it back, turned round, than there
was.
"""
ContrastBy: TypeAlias = Literal["prompts", "answers"]
CONTRASTS = ("auto", *get_args(ContrastBy))
AT_LEAST_NONE = ("n_random", "n_noise", "n_facts")
AT_LEAST_ONE = (
    "n_candidates",
    "n_trials",
    "detector_features",
    "dose_prompts",
    "search_prompts",
    "cost_prompts",
    "max_new_tokens",
)


@dataclass(frozen=True)
class StudyConfig:
    """How a study is run; behaviour and prompts come beside it."""

    goal: Goal = "suppress"
    target: str = ""
    """The kind of prompts to aim at. Empty: the behaviour's first kind; to induce what it shows
    there already, its last.
    """
    strengths: tuple[float, ...] = STRENGTHS
    """Strengths of the dose-response where a direction is added, each with both signs, in median
    norms of the site; one of them is frozen.
    """
    shares: tuple[float, ...] = SHARES
    """Strengths where a direction is projected out: shares that are taken away, 2 at most."""
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
    trial_prompts: int | None = None
    """Selection prompts of each kind behind a trial by generated answers; None: all."""
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
    against: str = ""
    """The kind of prompts that the first kind is compared with. Empty: the last one but the target;
    for refusal borderline ones, which look like harmful ones.
    """
    interventions: tuple[str, ...] = ()
    """What may be done along a direction (`directions.INTERVENTIONS`); the search takes the best,
    and every control is made with the same. Empty: adding it, to all tokens where the contrast is
    of answers, else to the header before the answer; and projecting it out everywhere, where the
    goal is to suppress, without a condition.
    """
    selective: bool = True
    """Whether prompts of other kinds should stay as they are. False: what is aimed at is to change
    at whatever price elsewhere, and the KL on the target itself is kept low instead.
    """
    conditional: bool = False
    """Whether the change is made only while a detector fires, which is looked for at the site or
    before.
    """
    detector_features: int = MOST_WATCHED
    """Features whose weighted sum a detector may be, at most."""
    detector_false_alarms: float = MOST_FALSE_ALARMS
    """Share of other selection prompts at which a detector may fire."""
    max_new_tokens: int = 48
    max_broken: float = 0.10
    """Share of broken answers on the target that a trial may have."""
    max_kl: float = 0.10
    """Nats a token that a trial may cost on the answers to other prompts; not asked where the
    contrast is of answers, which does not tell prompts apart."""
    max_kl_first: float | None = None
    """Nats that a trial may cost at the first answer token, the field's unit of price: of the first
    of the other kinds (for refusal, harmless prompts), or of the target where the study is not
    selective; what changes on kinds beside it (borderline requests, many of which a real model
    refuses, too) is measured and costs nothing then. None: no limit, and every other kind should
    stay as it is.
    """
    thinking: bool = False
    """Whether the model thinks before it answers; an error where its template has no thinking."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise ValueError(f"The goal {self.goal!r} was given; choose from {', '.join(GOALS)}.")
        if not self.strengths or not all(math.isfinite(s) and s > 0 for s in self.strengths):
            raise ValueError(
                f"Strengths {self.strengths} were given; they must be positive numbers (signs come"
                " from the goal)."
            )
        if not 1 <= self.n_features <= MOST_FEATURES:
            raise ValueError(
                f"n_features={self.n_features} was given; allowed are 1 to {MOST_FEATURES}."
            )
        for name in AT_LEAST_NONE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} was given; it cannot be negative.")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} was given; it must be at least 1.")
        if not 0 <= self.detector_false_alarms <= 1:
            raise ValueError(
                f"detector_false_alarms={self.detector_false_alarms} was given; it is a share from"
                " 0 to 1."
            )
        if not self.shares or not all(0 < share <= MOST_TAKEN for share in self.shares):
            raise ValueError(
                f"Shares {self.shares} were given; they must be above 0 and at most {MOST_TAKEN:g}."
            )
        for name in self.interventions:
            if name not in INTERVENTIONS:
                raise ValueError(
                    f"interventions={self.interventions} was given; choose from"
                    f" {', '.join(INTERVENTIONS)}."
                )
            if self.goal == "induce" and not INTERVENTIONS[name].signed:
                raise ValueError(
                    f"{name} takes a behaviour away and cannot induce it; leave it out."
                )
            if self.conditional and INTERVENTIONS[name].everywhere:
                raise ValueError(
                    f"{name} was given with a condition, but it begins at the embedding, before any"
                    " detector; leave one of the two out."
                )
        if self.contrast not in CONTRASTS:
            raise ValueError(
                f"contrast={self.contrast!r} was given; choose from {', '.join(CONTRASTS)}."
            )

    @property
    def sign(self) -> float:
        return SIGN[self.goal]

    def strengths_of(self, intervention: str) -> tuple[float, ...]:
        """The strengths at which an intervention is tried, without the goal's sign."""
        return self.strengths if INTERVENTIONS[intervention].signed else self.shares

    def signed(self, intervention: str, strength: float) -> float:
        """A strength as its change has it: with the goal's sign where a direction is added."""
        return self.sign * strength if INTERVENTIONS[intervention].signed else strength


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

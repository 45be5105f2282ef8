"""The arms of a study: one list of everything that is measured on the evaluation prompts.

What runs, the progress bar, the estimate of time and the journal's keys read it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qsae_kit.steer.changes import Change
from qsae_kit.steer.choose.contrast import random_features
from qsae_kit.steer.directions import INTERVENTIONS
from qsae_kit.steer.study.chosen import Chosen
from qsae_kit.steer.study.lab import Plan, Setting

CONTROL_SAES = {"frozen_decoder": "frozen_decoder_sae", "frozen_soft_decoder": "soft_frozen_sae"}
"""What a variant's name ends with -> the control that it is."""
DRAWS_A_SEED = 1000
"""Seeds of random controls: so many numbers lie between those of two studies' seeds."""


@dataclass(frozen=True)
class Arm:
    """One intervention at one strength on some kinds of prompts."""

    name: str
    """As in study.csv's column intervention."""
    kinds: tuple[str, ...]
    change: Change | None = None
    """None: the model as it is."""
    n: int | None = None
    """Prompts of each kind, at most; None: all."""
    dose: bool = False
    """Whether log-odds are all that is measured: one pass a prompt, no answer."""
    frozen: bool = False
    """Whether this is the frozen strength, or one of the arm's own choice."""
    system: str = ""
    """System prompt."""
    draw: int | None = None
    """Number of a random control."""
    sought: Literal["", "at random", "alike"] = ""
    """Where the features are not known yet and take the place of the change's own: the best of a
    search among random sets, or of the same search on the change's SAE."""
    measured_as: str = ""
    """Another arm that is the same one, and is measured once."""

    @property
    def strength(self) -> float:
        return self.change.strength if self.change is not None else 0.0

    @property
    def search_key(self) -> str:
        """The search's name in the journal."""
        assert self.change is not None
        return (
            f"random/{self.draw}" if self.sought == "at random" else f"search/{self.change.variant}"
        )

    def key(self, kind: str) -> str:
        """The name in the journal of what is measured on a kind of prompts."""
        how = "dose" if self.dose else "answers"
        return f"row/{self.measured_as or self.name}/{kind}/{self.strength:g}/{how}/{self.draw}"

    @property
    def keys(self) -> list[str]:
        """All of its steps, in their order."""
        return [*([self.search_key] if self.sought else []), *map(self.key, self.kinds)]

    def n_answers(self, sizes: Mapping[str, int]) -> int:
        """Answers that it generates; sizes: kind -> prompts."""
        return sum(self.n_of(kind, sizes[kind]) for kind in self.kinds)

    def n_of(self, kind: str, size: int) -> int:
        """Answers that it generates to a kind of prompts, of which there are `size`."""
        return 0 if self.dose or self.measured_as else min(size, self.n or size)


def arms(setting: Setting, plan: Plan, chosen: Chosen) -> list[Arm]:
    """Everything that is measured on the evaluation prompts, in the order of study.csv's rows."""
    c, kinds = setting.config, tuple(setting.prompts["evaluation"])
    ours = chosen.change(c.signed(chosen.intervention, chosen.strength))
    means = chosen.along(chosen.mean_gap, ours.strength)
    best = chosen.best_means(c.signed(chosen.intervention, chosen.means.strength))
    listed = [Arm("none", kinds)]
    listed += _doses_and_strengths(setting, plan, chosen, "features", ours)
    listed += _doses(setting, plan, chosen, "difference_of_means", means)
    listed.append(Arm("difference_of_means", kinds, means, frozen=True))
    same = "difference_of_means" if best == means else ""
    listed += _doses_and_strengths(setting, plan, chosen, "difference_of_means_best", best, same)
    opposite = replace(ours, strength=-ours.strength)
    listed.append(Arm("wrong_sign", (plan.target,), opposite, frozen=True))
    few = Arm("", (plan.target,), ours, c.control_prompts, frozen=True)
    listed += [
        replace(few, name="random", draw=draw, sought="at random") for draw in range(c.n_random)
    ]
    for draw in range(c.n_noise):
        generator = draw_generator(c.seed, draw)
        single = random_features(chosen.drawn_from(), chosen.features, generator)
        change = replace(ours, features=single.features, weights=single.weights)
        listed.append(replace(few, name="random_single", change=change, draw=draw))
        noise = torch.randn(len(chosen.mean_gap), generator=generator).tolist()
        change = replace(means, direction=tuple(noise))
        listed.append(replace(few, name="noise", change=change, draw=draw))
    if c.goal in setting.behaviour.instructions:
        told = setting.behaviour.instructions[c.goal]
        listed.append(Arm("system_prompt", kinds, frozen=True, system=told))
    for variant, name in control_variants(setting, chosen.hook_name).items():
        change = replace(ours, variant=variant)
        listed.append(Arm(name, kinds, change, frozen=True, sought="alike"))
    return listed


def _doses(
    setting: Setting, plan: Plan, chosen: Chosen, name: str, change: Change, same: str = ""
) -> list[Arm]:
    """An arm's dose-response; with both signs, where it goes either way. same: another arm that is
    the same one.
    """
    c = setting.config
    signs = (1.0, -1.0) if INTERVENTIONS[chosen.intervention].signed else (1.0,)
    kinds = tuple(dict.fromkeys((plan.target, *plan.others)))
    return [
        Arm(name, kinds, replace(change, strength=sign * strength), dose=True, measured_as=same)
        for strength in c.strengths_of(chosen.intervention)
        for sign in signs
    ]


def _doses_and_strengths(
    setting: Setting, plan: Plan, chosen: Chosen, name: str, change: Change, same: str = ""
) -> list[Arm]:
    """An arm's dose-response, and its answers at three strengths, the change's own among them."""
    c, listed = setting.config, _doses(setting, plan, chosen, name, change, same)
    strengths = c.strengths_of(chosen.intervention)
    for strength in answered_strengths(strengths, abs(change.strength)):
        frozen = strength == abs(change.strength)
        listed.append(
            Arm(
                name,
                tuple(setting.prompts["evaluation"]) if frozen else (plan.target,),
                replace(change, strength=c.signed(chosen.intervention, strength)),
                None if frozen else c.control_prompts,
                frozen=frozen,
                measured_as=same if frozen else "",
            )
        )
    return listed


def answered_strengths(strengths: Sequence[float], frozen: float) -> list[float]:
    """The three strengths with generated answers: the one nearest to half of the frozen one, the
    frozen one, the largest.
    """
    half = min(strengths, key=lambda s: (abs(s - frozen / 2), s))
    return sorted({half, frozen, max(strengths)})


def control_variants(setting: Setting, hook_name: str) -> dict[str, str]:
    """Variant -> the control that it is, the first one of each sort that has an SAE at a site."""
    found: dict[str, str] = {}
    for end, name in CONTROL_SAES.items():
        for variant, saes in setting.suite.items():
            if variant.endswith(end) and hook_name in saes:
                found[variant] = name
                break
    return found


def draw_generator(seed: int, draw: int) -> torch.Generator:
    """The random numbers of one control."""
    return torch.Generator().manual_seed(seed * DRAWS_A_SEED + draw)

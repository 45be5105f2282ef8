"""What selection decided: the frozen edit, and what its controls need."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qsae_kit.steer.changes import Change, Condition, FeatureSet
from qsae_kit.steer.choose.contrast import Contrast
from qsae_kit.steer.directions import Direction
from qsae_kit.steer.study.lab import Plan, Setting
from qsae_kit.steer.study.search import Push, pushes, sets_tried


class MeansChoice(NamedTuple):
    """The difference of means at its own best."""

    direction: Direction
    strength: float
    """Without the goal's sign."""
    within_limits: bool


class Chosen(NamedTuple):
    """What selection decided, and what its controls need."""

    variant: str
    hook_name: str
    way: str
    """How the set was made: gap, fitted or greedy."""
    features: FeatureSet
    intervention: str
    """What is done along the features' direction, and along every control's
    (`directions.INTERVENTIONS`).
    """
    orthogonal_to: tuple[tuple[float, ...], ...]
    """What the direction is made orthogonal to first, and that of every control."""
    strength: float
    """In median norms of the site, without the goal's sign; of what is projected out, the share."""
    when: Condition | None
    missed: float | None
    """Share of the target selection prompts at which the detector is silent."""
    false_alarms: float | None
    mean_gap: tuple[float, ...]
    """Difference of means at the site [d_model]."""
    median_norm: float
    """Of the site."""
    alive: tuple[int, ...]
    """Features that random controls are drawn from."""
    passes: int
    """Sets that the search tried at the site, so many as each random control tries."""
    within_limits: bool
    """Whether the trial kept the limits (`StudyConfig.max_broken`, `max_kl`)."""
    means: MeansChoice
    """The difference of means at its own best site, refinement and strength."""

    def change(self, strength: float) -> Change:
        """The features at a strength with its sign."""
        direction = Direction(
            self.hook_name, self.variant, self.features, orthogonal_to=self.orthogonal_to
        )
        return direction.change(self.intervention, strength, self.when)

    def along(self, vector: Sequence[float], strength: float) -> Change:
        """The same along a vector instead of the features, such as the difference of means."""
        direction = Direction(
            self.hook_name,
            vector=tuple(vector),
            median_norm=self.median_norm,
            orthogonal_to=self.orthogonal_to,
        )
        return direction.change(self.intervention, strength, self.when)

    def best_means(self, strength: float) -> Change:
        """The difference of means of its own best site and refinement."""
        return self.means.direction.change(self.intervention, strength, self.when)

    def drawn_from(self) -> Contrast:
        """What random controls are drawn from."""
        alive = torch.tensor(self.alive, dtype=torch.int64)
        return Contrast(torch.zeros(0), torch.tensor(self.mean_gap), alive)


def likely_choice(setting: Setting, plan: Plan) -> Chosen:
    """A choice that nobody made, from which the arms of a study can be listed before it has chosen:
    one feature at the first site, at a strength in the middle.
    """
    allowed = [(name, push) for name in setting.hook_names for push in pushes(plan, name)]
    name, push = next(iter(allowed), ("", Push(plan.interventions[0], ())))
    strengths = sorted(setting.config.strengths_of(push.intervention))
    middle = strengths[len(strengths) // 2]
    ones = (1.0,) * setting.lm.d_model
    return Chosen(
        setting.variant,
        name,
        "",
        FeatureSet((0,), (1.0,)),
        push.intervention,
        (),
        middle,
        when=None,
        missed=None,
        false_alarms=None,
        mean_gap=ones,
        median_norm=1.0,
        alive=(0, 1),
        passes=sets_tried(setting.config),
        within_limits=True,
        means=MeansChoice(Direction(name, vector=ones, median_norm=1.0), middle, True),
    )

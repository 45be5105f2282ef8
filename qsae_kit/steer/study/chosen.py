"""What selection decided: the frozen edit, and what its controls need."""

from typing import NamedTuple

import torch

from qsae_kit.lm.edits import Policy
from qsae_kit.steer.changes import Change, Condition, FeatureSet
from qsae_kit.steer.choose.contrast import Contrast
from qsae_kit.steer.study.lab import Setting
from qsae_kit.steer.study.search import sets_tried


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
    median_norm: float
    """Of the site."""
    alive: tuple[int, ...]
    """Features that random controls are drawn from."""
    passes: int
    """Sets that the search tried at the site, so many as each random control tries."""
    within_limits: bool
    """Whether the trial kept the limits (`StudyConfig.max_broken`, `max_kl`)."""
    means_strength: float
    """The strength that the same trials choose for the difference of means."""

    def change(self, strength: float, positions: Policy) -> Change:
        """The features at a strength with its sign."""
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

    def along_means(self, strength: float, positions: Policy) -> Change:
        """The difference of means at a strength with its sign."""
        return Change(
            "add",
            self.hook_name,
            direction=self.mean_gap,
            strength=strength,
            median_norm=self.median_norm,
            positions=positions,
            when=self.when,
        )

    def drawn_from(self) -> Contrast:
        """What random controls are drawn from."""
        alive = torch.tensor(self.alive, dtype=torch.int64)
        return Contrast(torch.zeros(0), torch.tensor(self.mean_gap), alive)


def likely_choice(setting: Setting) -> Chosen:
    """A choice that nobody made, from which the arms of a study can be listed before it has chosen:
    one feature at the first site, at a strength in the middle.
    """
    strengths = sorted(setting.config.strengths)
    middle = strengths[len(strengths) // 2]
    return Chosen(
        setting.variant,
        next(iter(setting.hook_names), ""),
        "",
        FeatureSet((0,), (1.0,)),
        middle,
        when=None,
        missed=None,
        false_alarms=None,
        mean_gap=(1.0,) * setting.lm.d_model,
        median_norm=1.0,
        alive=(0, 1),
        passes=sets_tried(setting.config),
        within_limits=True,
        means_strength=middle,
    )

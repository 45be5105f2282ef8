"""A feature that tells two kinds of prompts apart: what a conditional edit waits for."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.attach import token_features
from qsae_kit.lm.edits import Policy, selected
from qsae_kit.lm.hooked import HookedLM, Now
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import Suite
from qsae_kit.steer.changes import Condition

SILENT = 1e-6
"""The least activation that gaps are shares of."""
GAP_BONUS = 1e-3
"""Errors that a gap as wide as the largest activation makes up for: it decides among equals."""


@torch.no_grad()
def peak_activations(
    lm: HookedLM,
    sae: SAE,
    prompts: Sequence[str],
    positions: Policy = "prompt",
    enable_thinking: bool | None = None,
) -> Float[Tensor, "prompt d_sae"]:
    """The largest activation of every feature over a chat prompt's tokens that a policy names."""
    rows = [lm.chat_tokens(prompt, enable_thinking) for prompt in prompts]
    peaks = []
    for row, f in zip(rows, token_features(lm, sae, rows), strict=True):
        where = selected(Now(*lm.pad([row]), 0, lm.markers), positions)[0]
        peaks.append(torch.where(where[:, None], f, 0.0).amax(0))
    return torch.stack(peaks)


class FoundDetector(NamedTuple):
    """A feature that tells two kinds of prompts apart, and how it does on the prompts that it was
    chosen on.
    """

    condition: Condition
    missed: float
    """Share of the first kind at which it is silent."""
    false_alarms: float
    """Share of the second kind at which it fires."""


def find_detector(
    lm: HookedLM,
    suite: Suite,
    first: Sequence[str],
    second: Sequence[str],
    positions: Policy = "prompt",
    enable_thinking: bool | None = None,
) -> FoundDetector:
    """The one feature of a suite that fires on the first prompts and not on the second ones, with
    its threshold.

    The threshold is the one of fewest errors (share of the first missed plus share of the second
    taken for it), in the middle between the activations around it. Fewest errors win, then the
    widest gap there in shares of the largest activation; give it SAEs no later than the site that
    is edited. Raises ValueError for no SAE or a side without prompts.
    """
    if not first or not second or not any(suite.values()):
        raise ValueError(
            "A detector needs an SAE and prompts of both kinds; give at least one of each."
        )
    best: tuple[float, float, FoundDetector] | None = None
    for variant, saes in suite.items():
        for hook_name, sae in saes.items():
            cut = best_cut(
                *(
                    peak_activations(lm, sae, prompts, positions, enable_thinking)
                    for prompts in (first, second)
                )
            )
            found = FoundDetector(
                Condition(variant, hook_name, cut.feature, cut.threshold, "so_far", positions),
                cut.missed,
                cut.false_alarms,
            )
            errors = (cut.missed + cut.false_alarms, -cut.gap)
            if best is None or errors < best[:2]:
                best = (*errors, found)
    assert best is not None
    return best[2]


class Cut(NamedTuple):
    """A feature and a threshold between two groups of prompts."""

    feature: int
    threshold: float
    """In activation units."""
    missed: float
    """Share of the first group at or below it."""
    false_alarms: float
    """Share of the second group above it."""
    gap: float
    """How far the activations around it are apart, as a share of the feature's largest."""


def best_cut(on: Float[Tensor, "prompt_a d_sae"], off: Float[Tensor, "prompt_b d_sae"]) -> Cut:
    """The feature and threshold that tell two groups apart best: every cut between two activations
    is tried.
    """
    peaks, order = torch.cat([on, off]).sort(dim=0, descending=True)
    below = torch.cat([peaks[1:], torch.zeros_like(peaks[:1])])
    missed = 1 - (order < len(on)).float().cumsum(0) / len(on)
    false = (order >= len(on)).float().cumsum(0) / len(off)
    gap = (peaks - below) / peaks[0].clamp(min=SILENT)
    # equal activations cannot be cut apart
    error = (missed + false - GAP_BONUS * gap).masked_fill(peaks <= below, torch.inf)
    row, feature = divmod(int(error.argmin()), error.shape[1])
    at = (row, feature)
    if error[at].isinf():
        return Cut(0, 0.0, 1.0, 0.0, 0.0)  # nothing fires anywhere
    return Cut(
        feature,
        float((peaks[at] + below[at]) / 2),
        float(missed[at]),
        float(false[at]),
        float(gap[at]),
    )

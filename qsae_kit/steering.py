"""Steering: how features are chosen, and the edits that add, clamp or ablate them.

Strengths are in median norms of the site (sinks left out), so that they mean the same at every site and model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import nnls
from torch import Tensor

from qsae_kit.edits import Edit, Policy
from qsae_kit.models import HookedLM
from qsae_kit.sae import SAE


@dataclass(frozen=True)
class FeatureSet:
    """Features of one SAE with a weight each; the direction is the weighted sum of their decoder rows."""

    features: tuple[int, ...]
    weights: tuple[float, ...]

    def direction(self, sae: SAE) -> Float[Tensor, " d_model"]:
        """Unit vector sum_i w_i W_dec[i] / |...|."""
        rows = sae.W_dec[list(self.features)]
        return torch.nn.functional.normalize(torch.tensor(self.weights, device=rows.device) @ rows, dim=0)


def add_direction(
    hook_name: str,
    direction: Float[Tensor, " d_model"],
    strength: float,
    median_norm: float,
    positions: Policy | Tensor = "header",
) -> Edit:
    """x + strength * median_norm * direction, with a unit `direction`."""
    step = strength * median_norm * direction
    return Edit(hook_name, lambda x: step.to(x.dtype).expand_as(x), positions)


def add_features(sae: SAE, chosen: FeatureSet, strength: float, positions: Policy | Tensor = "header") -> Edit:
    """Adds a feature set's direction; a negative strength takes it away."""
    check_features(sae, chosen.features)
    assert sae.provenance is not None
    origin = sae.provenance
    return add_direction(origin.hook_name, chosen.direction(sae), strength, origin.filter.median, positions)


def clamp_features(sae: SAE, features: Sequence[int], value: float, positions: Policy | Tensor = "header") -> Edit:
    """x + sum_i (value - f_i(x)) W_dec[i]: the features read `value` (activation units), the rest of x stays."""
    check_features(sae, features)
    assert sae.provenance is not None
    ids = torch.tensor(list(features), device=sae.W_dec.device)

    def delta(x: Tensor) -> Tensor:
        f = sae.encode(x.float())[..., ids]
        return (value - f) @ sae.W_dec[ids]

    return Edit(sae.provenance.hook_name, delta, positions)


def ablate_features(sae: SAE, features: Sequence[int], positions: Policy | Tensor = "header") -> Edit:
    """Takes what the features contribute out of x."""
    return clamp_features(sae, features, 0.0, positions)


def check_features(sae: SAE, features: Sequence[int]) -> None:
    """ValueError for no feature, or one that the SAE does not have."""
    if not features:
        raise ValueError("No feature was given; give at least one.")
    for feature in features:
        if not 0 <= feature < sae.d_sae:
            raise ValueError(f"Feature {feature} was asked for, but this SAE has features 0 to {sae.d_sae - 1}.")


# --- choosing features


@torch.no_grad()
def decision_activations(
    lm: HookedLM, hook_names: Sequence[str], prompts: Sequence[str], enable_thinking: bool | None = None, batch: int = 64
) -> dict[str, Float[Tensor, "prompt d_model"]]:
    """Activations at each chat prompt's last token, from which the first answer token is predicted."""
    parts: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    for start in range(0, len(prompts), batch):
        ids, mask = lm.pad([lm.chat_tokens(p, enable_thinking) for p in prompts[start : start + batch]], "left")
        _, cache = lm.run_with_cache(ids, mask, names_filter=list(hook_names), return_type=None)
        for name in hook_names:
            parts[name].append(cache[name][:, -1].float())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


@torch.no_grad()
def answer_activations(
    lm: HookedLM,
    hook_names: Sequence[str],
    prompts: Sequence[str],
    answers: Sequence[list[int]],
    enable_thinking: bool | None = None,
    batch: int = 32,
) -> dict[str, Float[Tensor, "row d_model"]]:
    """Activations from which given answers (token ids) are predicted: each prompt's last token and all but the answer's last."""
    parts: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    rows = [(lm.chat_tokens(p, enable_thinking), a) for p, a in zip(prompts, answers, strict=True)]
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        ids, mask = lm.pad([p + a for p, a in some])
        _, cache = lm.run_with_cache(ids, mask, names_filter=list(hook_names), return_type=None)
        for name in hook_names:
            parts[name] += [cache[name][r, len(p) - 1 : len(p) + len(a) - 1].float() for r, (p, a) in enumerate(some)]
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


class Contrast(NamedTuple):
    """What differs between two groups of tokens at one site."""

    feature_gap: Float[Tensor, " d_sae"]
    """Mean activation in the first group minus that in the second."""
    mean_gap: Float[Tensor, " d_model"]
    """Difference of means of the activations: the usual steering direction."""
    alive: Int[Tensor, " feature"]
    """Features that fired there in either group: what random controls are drawn from."""


@torch.no_grad()
def contrast(sae: SAE, first: Float[Tensor, "row_a d_model"], second: Float[Tensor, "row_b d_model"]) -> Contrast:
    """Compares two groups of activations, as `decision_activations` or `answer_activations` give them."""
    f_first, f_second = sae.encode(first), sae.encode(second)
    alive = (f_first > 0).any(0) | (f_second > 0).any(0)
    return Contrast(f_first.mean(0) - f_second.mean(0), first.mean(0) - second.mean(0), alive.nonzero()[:, 0])


def choose_features(found: Contrast, n_features: int = 10) -> FeatureSet:
    """The `n_features` features with the largest gap of either sign, weighted by it.

    Raises ValueError where no feature differs.
    """
    top = found.feature_gap.abs().topk(min(n_features, len(found.feature_gap)))
    ids = [int(i) for i, size in zip(top.indices, top.values, strict=True) if size > 0]
    if not ids:
        raise ValueError("No feature differs between the two groups; train the SAE longer or at another site.")
    return FeatureSet(tuple(ids), tuple(float(found.feature_gap[i]) for i in ids))


def fit_features(sae: SAE, found: Contrast, n_features: int = 10, n_candidates: int = 40) -> FeatureSet:
    """At most `n_features` features that together account for the difference of means.

    Candidates are the `n_candidates` features with the largest gap of either sign. They are taken one by one by how
    much of what is left of the mean gap their decoder row explains, and refitted each time with non-negative least
    squares (orthogonal matching pursuit), so that a feature only pushes the way in which it differs.
    Raises ValueError where no feature differs.
    """
    top = found.feature_gap.abs().topk(min(n_candidates, len(found.feature_gap)))
    ids = top.indices[top.values > 0]
    signs = found.feature_gap[ids].sign()
    rows = (signs[:, None] * sae.W_dec[ids]).detach().double().cpu().numpy()
    target = found.mean_gap.double().cpu().numpy()
    taken: list[int] = []
    weights, rest = np.zeros(0), target
    for _ in range(min(n_features, len(ids))):
        explains = rows @ rest
        explains[taken] = -np.inf
        if explains.max() <= 0:
            break
        taken.append(int(explains.argmax()))
        weights, _ = nnls(rows[taken].T, target)
        rest = target - weights @ rows[taken]
    kept = [(int(ids[i]), float(signs[i]) * float(w)) for i, w in zip(taken, weights, strict=True) if w > 0]
    if not kept:
        raise ValueError("No feature differs between the two groups; train the SAE longer or at another site.")
    return FeatureSet(tuple(i for i, _ in kept), tuple(w for _, w in kept))


def random_features(found: Contrast, like: FeatureSet, generator: torch.Generator) -> FeatureSet:
    """A control draw: as many other live features, with the same weights in a random order and random signs.

    `add_features` gives it the same length of change as the chosen set. Raises ValueError for too few live features.
    """
    pool = [int(i) for i in found.alive if int(i) not in like.features]
    if len(pool) < len(like.features):
        raise ValueError(f"Only {len(pool)} other features are alive; a control needs {len(like.features)}.")
    ids = torch.randperm(len(pool), generator=generator)[: len(like.features)]
    order = torch.randperm(len(like.weights), generator=generator)
    signs = torch.randint(0, 2, (len(like.weights),), generator=generator) * 2 - 1
    weights = tuple(float(sign) * like.weights[int(i)] for i, sign in zip(order, signs, strict=True))
    return FeatureSet(tuple(pool[int(i)] for i in ids), weights)

"""What differs between two groups of tokens at a site, and the features that carry it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import nnls
from torch import Tensor

from qsae_kit.lm.hooked import HookedLM, by_token
from qsae_kit.sae import SAE
from qsae_kit.steer.changes import FeatureSet

NOTHING_DIFFERS = (
    "No feature differs between the two groups; train the SAE longer or at another site."
)
PROMPTS_A_BATCH = 64
ANSWERS_A_BATCH = 32
MOST_FEATURES = 10
"""Features of a set where no number is given."""
FITTED_FROM = 40
"""Features of the largest gap that a fit takes its set from."""


@torch.no_grad()
def decision_activations(
    lm: HookedLM,
    hook_names: Sequence[str],
    prompts: Sequence[str],
    enable_thinking: bool | None = None,
    batch: int = PROMPTS_A_BATCH,
) -> dict[str, Float[Tensor, "prompt _width"]]:
    """Activations at each chat prompt's last token, from which the first answer token is
    predicted.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    for start in range(0, len(prompts), batch):
        ids, mask = lm.pad(
            [lm.chat_tokens(p, enable_thinking) for p in prompts[start : start + batch]], "left"
        )
        _, cache = lm.run_with_cache(ids, mask, names_filter=list(hook_names), return_type=None)
        for name in hook_names:
            parts[name].append(by_token(cache[name])[:, -1].float())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


@torch.no_grad()
def answer_activations(
    lm: HookedLM,
    hook_names: Sequence[str],
    prompts: Sequence[str],
    answers: Sequence[list[int]],
    enable_thinking: bool | None = None,
    batch: int = ANSWERS_A_BATCH,
) -> dict[str, Float[Tensor, "row _width"]]:
    """Activations from which given answers (token ids) are predicted: each prompt's last token and
    all but the answer's last.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    rows = [(lm.chat_tokens(p, enable_thinking), a) for p, a in zip(prompts, answers, strict=True)]
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        ids, mask = lm.pad([p + a for p, a in some])
        _, cache = lm.run_with_cache(ids, mask, names_filter=list(hook_names), return_type=None)
        for name in hook_names:
            parts[name] += [
                by_token(cache[name])[r, len(p) - 1 : len(p) + len(a) - 1].float()
                for r, (p, a) in enumerate(some)
            ]
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


class Contrast(NamedTuple):
    """What differs between two groups of tokens at one site."""

    feature_gap: Float[Tensor, " d_sae"]
    """Mean activation in the first group minus that in the second."""
    mean_gap: Float[Tensor, " width"]
    """Difference of means of the activations: the usual steering direction."""
    alive: Int[Tensor, " feature"]
    """Features that fired there in either group: what random controls are drawn from."""


@torch.no_grad()
def contrast(
    sae: SAE, first: Float[Tensor, "row_a width"], second: Float[Tensor, "row_b width"]
) -> Contrast:
    """Compares two groups of activations, as `decision_activations` or `answer_activations` give
    them.
    """
    f_first, f_second = sae.encode(first), sae.encode(second)
    alive = (f_first > 0).any(0) | (f_second > 0).any(0)
    return Contrast(
        f_first.mean(0) - f_second.mean(0), first.mean(0) - second.mean(0), alive.nonzero()[:, 0]
    )


def choose_features(found: Contrast, n_features: int = MOST_FEATURES) -> FeatureSet:
    """The `n_features` features with the largest gap of either sign, weighted by it.

    Raises ValueError where no feature differs.
    """
    top = found.feature_gap.abs().topk(min(n_features, len(found.feature_gap)))
    ids = [int(i) for i, size in zip(top.indices, top.values, strict=True) if size > 0]
    if not ids:
        raise ValueError(NOTHING_DIFFERS)
    return FeatureSet(tuple(ids), tuple(float(found.feature_gap[i]) for i in ids))


def aligned_features(sae: SAE, found: Contrast, n_features: int) -> FeatureSet:
    """The `n_features` features of which the gap pushes farthest along the difference of means:
    ranked by the gap times the decoder row's part along it, weighted by the gap.

    Raises ValueError where no feature differs.
    """
    along = found.feature_gap * (sae.W_dec.detach() @ found.mean_gap.to(sae.W_dec))
    top = along.topk(min(n_features, len(along)))
    ids = [int(i) for i, push in zip(top.indices, top.values, strict=True) if push > 0]
    if not ids:
        raise ValueError(NOTHING_DIFFERS)
    return FeatureSet(tuple(ids), tuple(float(found.feature_gap[i]) for i in ids))


def fit_features(
    sae: SAE, found: Contrast, n_features: int = MOST_FEATURES, n_candidates: int = FITTED_FROM
) -> FeatureSet:
    """At most `n_features` features that together account for the difference of means.

    Candidates are the `n_candidates` features with the largest gap of either sign. They are taken
    one by one by how much of what is left of the mean gap their decoder row explains, and refitted
    each time with non-negative least squares (orthogonal matching pursuit), so that a feature only
    pushes the way in which it differs. Raises ValueError where no feature differs.
    """
    top = found.feature_gap.abs().topk(min(n_candidates, len(found.feature_gap)))
    ids = top.indices[top.values > 0]
    signs = found.feature_gap[ids].sign()
    rows = (signs[:, None] * sae.W_dec[ids]).detach().cpu().double().numpy()
    target = found.mean_gap.cpu().double().numpy()
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
    kept = {
        int(ids[i]): float(signs[i]) * float(w)
        for i, w in zip(taken, weights, strict=True)
        if w > 0
    }
    if not kept:
        raise ValueError(NOTHING_DIFFERS)
    return FeatureSet(tuple(kept), tuple(kept.values()))


def random_features(found: Contrast, like: FeatureSet, generator: torch.Generator) -> FeatureSet:
    """A control draw: as many other live features, with the same weights in a random order and
    random signs.

    `add_features` gives it the same length of change as the chosen set. Raises ValueError for too
    few live features.
    """
    pool = [int(i) for i in found.alive if int(i) not in like.features]
    if len(pool) < len(like.features):
        raise ValueError(
            f"Only {len(pool)} other features are alive; a control needs {len(like.features)}."
        )
    ids = torch.randperm(len(pool), generator=generator)[: len(like.features)]
    order = torch.randperm(len(like.weights), generator=generator)
    signs = torch.randint(0, 2, (len(like.weights),), generator=generator) * 2 - 1
    weights = tuple(
        float(sign) * like.weights[int(i)] for i, sign in zip(order, signs, strict=True)
    )
    return FeatureSet(tuple(pool[int(i)] for i in ids), weights)

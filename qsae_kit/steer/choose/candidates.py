"""Candidate features scored by what they do, and sets of them that real passes confirm."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.lm.answering import KnownRows
from qsae_kit.lm.edits import Edit
from qsae_kit.sae import SAE
from qsae_kit.steer.changes import FeatureSet
from qsae_kit.steer.choose.aim import Aim, lens_tokens, log_odds_gradient
from qsae_kit.steer.choose.contrast import (
    NOTHING_DIFFERS,
    Contrast,
    aligned_features,
    contrast,
    random_features,
)

PASSES_A_CANDIDATE = 2
"""Passes behind the scores of one candidate."""
ROUNDS_A_FEATURE = 2
"""Rounds of growing for each feature that a set may have: a feature may be taken again."""


@torch.no_grad()
def feature_scores(
    aim: Aim,
    sae: SAE,
    first: Float[Tensor, "row_a width"],
    second: Float[Tensor, "row_b width"],
    make: Callable[[FeatureSet], Sequence[Edit]],
    n_candidates: int = 24,
    n_prompts: int = 8,
) -> pd.DataFrame:
    """A row for each of the features that differ most between two groups of rows, with everything
    that speaks for it.

    Columns: feature; gap, difference of mean activations; density, share of all rows at which it
    fires; contrast, the gap times 1 - density; cosine of its decoder row and the difference of
    means, with the gap's sign; attribution, what the gap does to the log-odds to first order
    (nats); effect, what adding it alone does to the log-odds on target prompts in a real pass
    (nats); output_score, how much that raises the log-probability of its own `lens_tokens` on other
    prompts; merit, the mean rank (1 best) of contrast, cosine, attribution, output_score and
    effect, each in the aim's direction.
    make: the edits for a feature set, at the strength at which candidates are compared. Best merit
    first. Raises ValueError where no feature differs.
    """
    found, f = contrast(sae, first, second), torch.cat([sae.encode(first), sae.encode(second)])
    density = (f > 0).float().mean(0)
    corrected = found.feature_gap * (1 - density)
    largest = corrected.abs().topk(min(n_candidates, sae.d_sae)).indices
    ids = [int(i) for i in largest if corrected[i] != 0]
    if not ids:
        raise ValueError(NOTHING_DIFFERS)
    assert sae.provenance is not None
    gap = found.feature_gap[ids]
    rows = torch.nn.functional.normalize(sae.W_dec[ids], dim=1) * gap.sign()[:, None]
    gradient = log_odds_gradient(
        aim.lm, sae.provenance.hook_name, [*aim.target, *aim.others], aim.openings
    )
    written = aim.lm.to_residual(sae.provenance.hook_name, rows)
    effects, outputs = _done_alone(aim, ids, gap, written, make, n_prompts)
    table = pd.DataFrame(
        {
            "feature": ids,
            "gap": gap.cpu().numpy(),
            "density": density[ids].cpu().numpy(),
            "contrast": corrected[ids].cpu().numpy(),
            "cosine": (rows @ torch.nn.functional.normalize(found.mean_gap, dim=0)).cpu().numpy(),
            "attribution": (gap * (sae.W_dec[ids] @ gradient)).cpu().numpy(),
            "effect": effects,
            "output_score": outputs,
        }
    )
    wanted = [
        table["contrast"].abs(),
        table["cosine"],
        table["attribution"],
        table["output_score"],
        aim.sign * table["effect"],
    ]
    table["merit"] = sum(column.rank(ascending=False) for column in wanted) / len(wanted)
    return table.sort_values(["merit", "feature"], ignore_index=True)


def _done_alone(
    aim: Aim,
    ids: Sequence[int],
    gap: Float[Tensor, " candidate"],
    rows: Float[Tensor, "candidate d_model"],
    make: Callable[[FeatureSet], Sequence[Edit]],
    n_prompts: int,
) -> tuple[list[float], list[float]]:
    """What each feature does alone: effect and output_score of `feature_scores`, two passes a
    feature. rows: what unit decoder rows with the gap's sign write to the residual stream.
    """
    clean = aim.target_odds().mean()
    neutral = KnownRows(aim.lm, list(aim.others)[:n_prompts])
    plain = neutral.last_logits().log_softmax(-1)
    effects, outputs = [], []
    for i, weight, row in zip(ids, gap.tolist(), rows, strict=True):
        edits = make(FeatureSet((i,), (weight,)))
        effects.append(float(aim.target_odds(edits).mean() - clean))
        raised = lens_tokens(aim.lm, aim.sign * row)
        outputs.append(
            float((neutral.last_logits(edits).log_softmax(-1) - plain)[:, raised].mean())
        )
    return effects, outputs


class Grown(NamedTuple):
    """A set of features that was grown by real passes."""

    chosen: FeatureSet
    merit: float
    """`Aim.merit` with it, on the prompts that it was grown on."""
    passes: int
    """Sets that were tried."""


def greedy_features(
    aim: Aim,
    pool: Sequence[tuple[int, float]],
    make: Callable[[FeatureSet], Sequence[Edit]],
    n_features: int = 5,
) -> Grown:
    """Grows a set of at most `n_features` out of (feature, sign): each round adds the one with the
    highest merit then.

    A feature may be taken again, which raises its weight; there are `ROUNDS_A_FEATURE` times as
    many rounds as features, and the best set of all of them is returned. make: the edits for a
    feature set; every set has a change of the same size.
    """
    weights: dict[int, float] = {}
    best, passes = Grown(FeatureSet((), ()), -math.inf, 0), 0
    for _ in range(ROUNDS_A_FEATURE * n_features):
        merit, grown = -math.inf, weights
        for feature, sign in pool:
            if feature in weights or len(weights) < n_features:
                more = {**weights, feature: weights.get(feature, 0.0) + sign}
                found = aim.merit(make(FeatureSet(tuple(more), tuple(more.values()))), floor=merit)
                passes += 1
                if found > merit:
                    merit, grown = found, more
        weights = grown
        if merit > best.merit:
            best = Grown(FeatureSet(tuple(weights), tuple(weights.values())), merit, passes)
    return best._replace(passes=passes)


def best_aligned(
    aim: Aim,
    sae: SAE,
    found: Contrast,
    make: Callable[[FeatureSet], Sequence[Edit]],
    n_features: int,
) -> FeatureSet:
    """The set of most merit among the first one, two, ... `n_features` of `aligned_features`."""
    ranked = aligned_features(sae, found, n_features)
    sets = [
        FeatureSet(ranked.features[:n], ranked.weights[:n])
        for n in range(1, len(ranked.features) + 1)
    ]
    return max(sets, key=lambda chosen: aim.merit(make(chosen)))


def pruned_features(
    aim: Aim,
    chosen: FeatureSet,
    make: Callable[[FeatureSet], Sequence[Edit]],
    loss: float,
) -> Grown:
    """A set without the features that it can do without: one by one the feature is left out without
    which most merit is kept, while that is no more than `loss` below the whole set's (arXiv
    2505.23556).
    """
    merit = aim.merit(make(chosen))
    least, passes = merit - loss, 1
    while len(chosen.features) > 1:
        fewer = [
            FeatureSet(
                chosen.features[:i] + chosen.features[i + 1 :],
                chosen.weights[:i] + chosen.weights[i + 1 :],
            )
            for i in range(len(chosen.features))
        ]
        merits = [aim.merit(make(each)) for each in fewer]
        passes += len(fewer)
        if max(merits) < least:
            break
        merit = max(merits)
        chosen = fewer[merits.index(merit)]
    return Grown(chosen, merit, passes)


def random_search(
    aim: Aim,
    found: Contrast,
    like: FeatureSet,
    make: Callable[[FeatureSet], Sequence[Edit]],
    n: int,
    generator: torch.Generator,
) -> FeatureSet:
    """The best by merit of `n` random sets (`random_features`): a control that searched as long as
    the features did.
    """
    best = -math.inf
    draws = [random_features(found, like, generator) for _ in range(n)]
    strongest = draws[0]
    for draw in draws:
        merit = aim.merit(make(draw), floor=best)
        if merit > best:
            best, strongest = merit, draw
    return strongest

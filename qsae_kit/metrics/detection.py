"""How well a score tells two groups apart."""

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.io.processor import exact
from qsae_kit.metrics.reconstruction import wilson


def auc(first: Float[Tensor, " a"], second: Float[Tensor, " b"]) -> float:
    """The share of pairs of which the first group's score is the larger one, equal ones counted
    half: the area under the curve of true against false rate.

    Raises ValueError for a group without scores.
    """
    _check(first, second)
    larger, equal = first[:, None] > second, first[:, None] == second
    return float((exact(larger) + 0.5 * exact(equal)).mean())


def detector_curve(
    first: Float[Tensor, " a"], second: Float[Tensor, " b"], threshold: float | None = None
) -> pd.DataFrame:
    """What a detector does at every threshold: a row for each score that occurs, the highest first.

    Columns: threshold (the detector fires above it); chosen, whether it is the given one, which has
    a row of its own; true_rate, share of the first group at which it fires, with its 95 % Wilson
    interval true_low, true_high; false_rate, of the second group, with false_low, false_high;
    n_true and n_false, the sizes of the groups; auc, the same in every row. In the last row the
    threshold is minus infinity. Raises ValueError for a group without scores.
    """
    area = auc(first, second)
    at = [(float(score), False) for score in torch.cat([first, second]).unique()]
    at.append((-float("inf"), False))
    if threshold is not None:
        at.append((threshold, True))
    rows = []
    for value, chosen in sorted(dict.fromkeys(at), key=lambda each: (-each[0], each[1])):
        told = {"threshold": value, "chosen": chosen}
        for name, scores in (("true", first), ("false", second)):
            found = wilson(int((scores > value).sum()), len(scores))
            told |= {
                f"{name}_rate": found.rate,
                f"{name}_low": found.low,
                f"{name}_high": found.high,
                f"n_{name}": len(scores),
            }
        rows.append(told | {"auc": area})
    return pd.DataFrame(rows)


def _check(first: Tensor, second: Tensor) -> None:
    if not len(first) or not len(second):
        raise ValueError(
            f"Scores of {len(first)} and {len(second)} prompts were given; a detector is measured"
            " on at least one of each kind."
        )

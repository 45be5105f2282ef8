"""Which rows of activations count: attention sinks are left out."""

import math
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor


class NormFilter(NamedTuple):
    """Drops attention sinks: rows whose norm exceeds `factor` times the site's median norm."""

    median: float
    """Median Euclidean norm of the site's rows, frozen from the first tokens seen; infinite until
    it is measured.
    """
    factor: float = 10.0

    @property
    def measured(self) -> bool:
        return math.isfinite(self.median)

    def keeps(self, x: Float[Tensor, "*row d_model"]) -> Bool[Tensor, "*row"]:
        return x.float().norm(dim=-1) <= self.factor * self.median

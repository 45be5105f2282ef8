"""FVU against width and tokens: a fit with its interval, and the width that a target would need.

    FVU(d_sae, tokens) = floor + a * (d_sae / d0)^-alpha + b * (tokens / t0)^-beta

after the scaling laws of Gao et al. (arXiv 2406.04093) in Chinchilla's additive form; d0 and t0 are
the smallest measured. What lies outside the measured widths and tokens is an extrapolation, and
said to be one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

STARTS = [(alpha, beta) for alpha in (0.2, 0.7) for beta in (0.2, 0.7)]


class Width(NamedTuple):
    """The width that a target FVU needs, at a number of tokens."""

    d_sae: float | None
    """None where the fitted floor lies above the target: no width is enough."""
    low: float | None
    high: float | None
    """95 % interval; None: no width is enough in so many of the resamples that there is no such
    end.
    """
    extrapolated: bool
    """Whether it lies outside the measured widths, or tokens do."""


@dataclass(frozen=True)
class ScalingFit:
    """The fit and its resamples. Rows of `parameters`: floor, a, alpha, b, beta; the first row is
    the fit itself.
    """

    parameters: np.ndarray
    widths: tuple[int, int]
    tokens: tuple[int, int]
    error: float
    """Root mean square of the residuals' logarithm: 0.05 is 5 %."""
    points: int

    def fvu(self, d_sae: float, tokens: float) -> tuple[float, float, float]:
        """FVU at a width and number of tokens, with its 95 % interval."""
        values = self._at(self.parameters, d_sae, tokens)
        low, high = np.quantile(values[1:], (0.025, 0.975))
        return float(values[0]), float(low), float(high)

    def width_for(self, fvu: float, tokens: float) -> Width:
        """The width at which the fit reaches an FVU after so many tokens."""
        floor, a, alpha, b, beta = self.parameters.T
        left = fvu - floor - b * (tokens / self.tokens[0]) ** -beta
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            needed = np.where(
                left > 0,
                self.widths[0] * (a / np.maximum(left, 1e-300)) ** (1 / np.maximum(alpha, 1e-6)),
                np.inf,
            )
        low, high = np.quantile(needed[1:], (0.025, 0.975), method="nearest")
        first, *ends = (float(x) if np.isfinite(x) else None for x in (needed[0], low, high))
        outside = (
            first is None
            or not self.widths[0] <= first <= self.widths[1]
            or not self.tokens[0] <= tokens <= self.tokens[1]
        )
        return Width(first, ends[0], ends[1], outside)

    def _at(self, parameters: np.ndarray, d_sae: float, tokens: float) -> np.ndarray:
        floor, a, alpha, b, beta = parameters.T
        return (
            floor + a * (d_sae / self.widths[0]) ** -alpha + b * (tokens / self.tokens[0]) ** -beta
        )


def fit_scaling(table: pd.DataFrame, resamples: int = 200, seed: int = 0) -> ScalingFit:
    """Fits FVU over the rows of a table with the columns d_sae, trained_tokens and fvu: one site at
    one sparsity.

    Least squares on log FVU; the interval resamples the residuals. With one number of tokens only
    the width term is fitted, with one width only the tokens'. Raises ValueError for fewer than four
    points, or where neither varies.
    """
    d_sae, tokens, fvu = (
        table[name].to_numpy(float) for name in ("d_sae", "trained_tokens", "fvu")
    )
    if len(table) < 4 or (len(set(d_sae)) < 2 and len(set(tokens)) < 2):
        raise ValueError(
            f"{len(table)} points were given; a fit needs four, of several widths or numbers of"
            " tokens."
        )
    u, v = np.log(d_sae / d_sae.min()), np.log(tokens / tokens.min())
    vary = np.array(
        [1, len(set(d_sae)) > 1, len(set(d_sae)) > 1, len(set(tokens)) > 1, len(set(tokens)) > 1],
        bool,
    )

    upper = np.array([fvu.max(), 10.0, 3.0, 10.0, 3.0])

    def curve(p: np.ndarray) -> np.ndarray:
        floor, a, alpha, b, beta = p
        return np.asarray(np.log(floor + a * np.exp(-alpha * u) + b * np.exp(-beta * v)))

    def solve(target: np.ndarray, starts: Sequence[tuple[float, float]]) -> np.ndarray:
        best, cost = np.zeros(5), np.inf
        for alpha, beta in starts:
            start = np.array([fvu.min() / 2, fvu.max() / 4, alpha, fvu.max() / 4, beta]) * vary
            start[2], start[4] = alpha, beta

            def residual(free: np.ndarray, start: np.ndarray = start) -> np.ndarray:
                p = start.copy()
                p[vary] = free
                return curve(p) - target

            done = least_squares(residual, start[vary], bounds=(1e-9, upper[vary]))
            if done.cost < cost:
                best, cost = start.copy(), float(done.cost)
                best[vary] = done.x
        return best

    fitted = solve(np.log(fvu), STARTS)
    residuals = np.log(fvu) - curve(fitted)
    rng = np.random.default_rng(seed)
    own = [(fitted[2], fitted[4])]
    drawn = [
        solve(curve(fitted) + rng.choice(residuals, len(residuals)), own) for _ in range(resamples)
    ]
    return ScalingFit(
        np.stack([fitted, *drawn]),
        (int(d_sae.min()), int(d_sae.max())),
        (int(tokens.min()), int(tokens.max())),
        float(np.sqrt((residuals**2).mean())),
        len(table),
    )

"""The fit finds the law that made the points, and says where it extrapolates."""

import numpy as np
import pandas as pd
import pytest

from qsae_kit.metrics.scaling import fit_scaling


def points(
    noise=0.0, widths=(512, 1024, 2048, 4096), tokens=(10**5, 4 * 10**5, 16 * 10**5), floor=0.01
):
    rng = np.random.default_rng(0)
    rows = [
        {
            "d_sae": d,
            "trained_tokens": t,
            "fvu": floor + 0.08 * (d / 512) ** -0.6 + 0.05 * (t / 1e5) ** -0.4,
        }
        for d in widths
        for t in tokens
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(fvu=frame["fvu"] * np.exp(noise * rng.normal(size=len(frame))))


def test_a_law_without_noise_is_found():
    fit = fit_scaling(points(), resamples=5)
    assert fit.error < 1e-4
    wanted = 0.01 + 0.08 * 16**-0.6 + 0.05 * 64**-0.4
    assert fit.fvu(8192, 6.4e6)[0] == pytest.approx(wanted, rel=0.02)
    found = fit.width_for(wanted, 6.4e6)
    assert found.d_sae == pytest.approx(8192, rel=0.05)
    assert found.extrapolated
    assert not fit.width_for(fit.fvu(2048, 4e5)[0], 4e5).extrapolated


def test_intervals_hold_the_truth_and_grow_with_noise():
    quiet, noisy = (fit_scaling(points(noise), resamples=60) for noise in (0.01, 0.05))
    truth = 0.01 + 0.08 * 8**-0.6 + 0.05 * 16**-0.4
    spans = []
    for fit in (quiet, noisy):
        _, low, high = fit.fvu(4096, 1.6e6)
        assert low < truth < high
        spans.append(high - low)
    assert spans[1] > 2 * spans[0]


def test_what_no_width_reaches():
    found = fit_scaling(points(0.01), resamples=40).width_for(0.005, 1e6)
    assert found.d_sae is None
    assert found.extrapolated


def test_one_number_of_tokens_is_enough():
    fit = fit_scaling(points(tokens=(10**5,)), resamples=5)
    assert fit.fvu(2048, 1e5)[0] == pytest.approx(0.06 + 0.08 * 4**-0.6, rel=0.02)
    assert fit.width_for(0.09, 2e5).extrapolated  # of other tokens nothing is known


@pytest.mark.parametrize("frame", [points().head(3), points(widths=(512,), tokens=(10**5,))])
def test_too_few_points(frame):
    with pytest.raises(ValueError, match="needs four"):
        fit_scaling(frame)

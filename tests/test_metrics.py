"""Metrics against cases computed by hand."""

import math

import pytest
import torch

from qsae_kit.metrics import Reconstruction, ce_score, cross_entropy, kl_divergence, wilson

X = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # mean (2, 4): variance sum 1+4+1+4 = 10
X_HAT = torch.tensor([[1.0, 1.0], [3.0, 5.0]])  # squared errors 1 + 1
F = torch.tensor([[0.5, 0.0, 0.0], [0.1, 2.0, 0.0]])


def score(*parts):
    out = Reconstruction()
    for x, x_hat, f in parts:
        out.add(x, x_hat, f)
    return out


def test_by_hand():
    s = score((X, X_HAT, F))
    assert s.fvu == pytest.approx(0.2, abs=1e-12)
    assert s.l0 == 1.5
    assert s.dead == pytest.approx(1 / 3)
    assert s.rows == 2


def test_splitting_into_batches_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    x, noise, f = (torch.randn(500, 8, generator=generator) for _ in range(3))
    x = x + 100
    whole = score((x, x + 0.1 * noise, f.relu()))
    parts = score(*((x[i : i + 7], (x + 0.1 * noise)[i : i + 7], f.relu()[i : i + 7]) for i in range(0, 500, 7)))
    assert parts.fvu == pytest.approx(whole.fvu, abs=1e-9)
    assert (parts.l0, parts.dead) == (whole.l0, whole.dead)


def test_fvu_is_not_the_mean_of_batches():
    one, two = (X, X_HAT, F), (X * 10, X * 10, F)
    assert score(one, two).fvu != pytest.approx((score(one).fvu + score(two).fvu) / 2, rel=0.1)


def test_no_rows_and_constant_rows():
    with pytest.raises(ValueError, match="no tokens"):
        _ = score((X[:0], X_HAT[:0], F[:0])).fvu
    with pytest.raises(ValueError, match="all alike"):
        _ = score((torch.ones(4, 2), torch.ones(4, 2), F.repeat(2, 1))).fvu


def test_cross_entropy_and_kl_by_hand():
    logits = torch.tensor([[0.0, math.log(3)]])  # probabilities 1/4, 3/4
    assert cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(math.log(4))
    other = torch.tensor([[0.0, 0.0]])
    assert kl_divergence(logits, other).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert kl_divergence(logits, logits).item() == 0


def test_chunks_change_nothing():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(1100, 9, generator=generator), torch.randn(1100, 9, generator=generator)
    torch.testing.assert_close(kl_divergence(a, b)[600:700], kl_divergence(a[600:700], b[600:700]))


def test_ce_score_ends():
    assert ce_score(2.0, 2.0, 5.0) == 1
    assert ce_score(2.0, 5.0, 5.0) == 0
    assert ce_score(2.0, 2.6, 5.0) == pytest.approx(0.8)


def test_wilson_against_published_values():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148
    assert wilson(81, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=5e-4)
    assert wilson(15, 148)[1:] == pytest.approx((0.0624, 0.1605), abs=5e-4)
    assert wilson(0, 20).low == 0
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)

"""Metrics against cases computed by hand."""

import math
from dataclasses import dataclass

import pytest
import torch

from qsae_kit.metrics.reconstruction import (
    Reconstruction,
    compare,
    cross_entropy,
    decoder_cosines,
    kl_divergence,
    recovered,
    top_1_agreement,
    wilson,
)

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
    assert s.mse == pytest.approx(1.0, abs=1e-12)
    cosines = (3 / (5 * 2) ** 0.5, 39 / (45 * 34) ** 0.5)
    assert s.cosine == pytest.approx(sum(cosines) / 2, abs=1e-12)
    assert s.l2_ratio == pytest.approx(((2 / 5) ** 0.5 + (34 / 45) ** 0.5) / 2, abs=1e-12)
    # |x_hat|^2 = 2 + 34, x . x_hat = 3 + 39
    assert s.relative_bias == pytest.approx(36 / 42, abs=1e-12)
    assert s.density.tolist() == [1.0, 0.5, 0.0]
    assert (s.denser(0.6), s.denser(0.1)) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (s.l0_quantile(0.5), s.l0_quantile(0.9)) == (1, 2)
    assert s.l0_counts.tolist() == [0, 1, 1]


def test_figures_that_peers_got_wrong():
    """The known-wrong formulas give another value on the case above."""
    variance = (X - X.mean(0)).pow(2)
    per_token = ((X - X_HAT).pow(2).sum(-1) / variance.sum(-1)).mean()  # a mean of ratios
    mixed = (X - X_HAT).pow(2).sum() / (X.pow(2) - X.pow(2).mean(0)).pow(2).sum()  # x^2 against x^4
    s = score((X, X_HAT, F))
    assert abs(s.fvu - mixed) > 0.1
    skewed = score(
        (
            torch.tensor([[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]]),
            torch.cat([X_HAT, torch.tensor([[9.0, 8.0]])]),
            F[[0, 1, 1]],
        )
    )
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]])
    legacy = (1 / (x - x.mean(0)).pow(2).sum(-1)).mean()
    assert abs(skewed.fvu - legacy) > 0.01
    assert per_token == pytest.approx(0.2)  # equal here, since both rows are as far from the mean


def test_the_order_of_rows_changes_nothing():
    generator = torch.Generator().manual_seed(1)
    x, noise, f = (torch.randn(300, 6, generator=generator) for _ in range(3))
    order = torch.randperm(300, generator=generator)
    one, other = (
        score((x, x + noise, f.relu())),
        score((x[order], (x + noise)[order], f.relu()[order])),
    )
    for name, value in one.figures().items():
        assert other.figures()[name] == pytest.approx(value, abs=1e-9), name


def test_cosines_of_the_decoder():
    W = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, -3.0]])
    found = decoder_cosines(W, chunk=2)
    assert found["mean_cosine"] == pytest.approx(2 / 6)
    assert found["nearest_median"] == pytest.approx(1.0)


def test_agreement_of_predictions():
    clean = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert top_1_agreement(clean, clean.flip(1)).tolist() == [0.0, 0.0]
    assert top_1_agreement(clean, clean * 3).tolist() == [1.0, 1.0]


def test_splitting_into_batches_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    x, noise, f = (torch.randn(500, 8, generator=generator) for _ in range(3))
    x = x + 100
    whole = score((x, x + 0.1 * noise, f.relu()))
    parts = score(
        *(
            (x[i : i + 7], (x + 0.1 * noise)[i : i + 7], f.relu()[i : i + 7])
            for i in range(0, 500, 7)
        )
    )
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
    assert kl_divergence(logits, other).item() == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    )
    assert kl_divergence(logits, logits).item() == 0


def test_chunks_change_nothing():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(1100, 9, generator=generator), torch.randn(1100, 9, generator=generator)
    torch.testing.assert_close(kl_divergence(a, b)[600:700], kl_divergence(a[600:700], b[600:700]))


def test_what_is_recovered():
    assert recovered(2.0, 2.0, 5.0) == 1
    assert recovered(5.0, 2.0, 5.0) == 0
    assert recovered(2.6, 2.0, 5.0) == pytest.approx(0.8)
    assert recovered(2.6, 2.0, 2.0) == -math.inf


def test_wilson_against_published_values():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148
    assert wilson(81, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=5e-4)
    assert wilson(15, 148)[1:] == pytest.approx((0.0624, 0.1605), abs=5e-4)
    assert wilson(0, 20).low == 0
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def test_all_losses_at_once_and_parts_put_together():
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(1100, 7, generator=generator), torch.randn(1100, 7, generator=generator)
    targets = torch.randint(0, 7, (1100,), generator=generator)
    change = compare(a, b, targets)
    torch.testing.assert_close(change.cross_entropy, cross_entropy(b, targets))
    torch.testing.assert_close(change.kl_divergence, kl_divergence(a, b))
    torch.testing.assert_close(change.top_1_agreement, top_1_agreement(a, b))
    x, f = torch.randn(50, 4, generator=generator), torch.randn(50, 9, generator=generator).relu()
    whole, parts = Reconstruction(), [Reconstruction() for _ in range(3)]
    whole.add(x, x / 2, f)
    # the last one is empty
    for part, rows in zip(parts, (slice(0, 20), slice(20, 50), slice(50, 50)), strict=True):
        part.add(x[rows], x[rows] / 2, f[rows])
    together = sum(parts, Reconstruction())
    assert together.figures() == pytest.approx(whole.figures(), rel=1e-12)
    torch.testing.assert_close(together.mean, whole.mean)


@dataclass
class WithLargest(Reconstruction):
    """A sum of one's own."""

    largest: float = 0.0


def test_a_sum_that_is_added_to_the_class_is_added_up():
    one, two = WithLargest(largest=2.0), WithLargest(largest=3.0)
    one.add(X, X_HAT, F)
    two.add(X, X_HAT, F)
    assert (one + two).largest == 5.0

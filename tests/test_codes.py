"""Sparse products against dense autograd in float64."""

import pytest
import torch

from qsae_kit.sae import codes as sparse
from qsae_kit.sae.codes import Codes, largest_columns, select_above, select_top_k

N_ROWS, D, D_SAE = 40, 10, 48


@pytest.fixture(params=["sparse", "dense"])
def path(request, monkeypatch):
    monkeypatch.setattr(sparse, "DENSE_SHARE", 2.0 if request.param == "sparse" else -1.0)


def tensors():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    return draw(N_ROWS, D), draw(D_SAE, D), draw(D_SAE), draw(D_SAE, D)


@pytest.mark.parametrize("select", [select_top_k(5), select_above(0.7), select_above(100.0)], ids=["top", "above", "nothing"])
def test_values_and_gradients_are_those_of_dense_products(path, select):
    x, encoder, b_enc, W_dec = tensors()
    v, codes = sparse.encode(x, encoder, b_enc, select)
    f = v**2 + v
    x_hat = sparse.decode(f, W_dec, codes)
    (x_hat - x.detach()).pow(3).sum().backward()
    found = [t.grad for t in (encoder, b_enc, W_dec)]

    x2, encoder2, b_enc2, W_dec2 = tensors()
    pre = x2.detach() @ encoder2.T + b_enc2
    mask = codes.dense(torch.ones(len(codes), dtype=torch.float64))
    dense_f = (pre**2 + pre) * mask
    (dense_f @ W_dec2 - x2.detach()).pow(3).sum().backward()
    torch.testing.assert_close(x_hat, dense_f @ W_dec2)
    torch.testing.assert_close(codes.dense(f), dense_f)
    for one, other in zip(found, (encoder2.grad, b_enc2.grad, W_dec2.grad), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("n_cols", "k"), [(48, 5), (960, 8), (4608, 32), (37, 4), (40, 40), (1280, 1)])
def test_the_largest_are_exactly_the_largest(n_cols, k):
    pre = torch.randn(17, n_cols, generator=torch.Generator().manual_seed(1))
    found = largest_columns(pre, k)
    assert all(len(set(row)) == k for row in found.tolist())
    expected = pre.topk(k, dim=-1).values
    torch.testing.assert_close(pre.gather(1, found).sort(descending=True).values, expected, atol=0, rtol=0)


def test_entries_above_a_threshold():
    pre = torch.tensor([[0.5, -1.0, 2.0], [-1.0, -1.0, -1.0], [3.0, 0.2, 0.1]])
    codes = select_above(torch.tensor([0.4, 0.1, 1.0]))(pre)
    assert codes.rows.tolist() == [0, 0, 2, 2]
    assert codes.cols.tolist() == [0, 2, 0, 1]
    assert codes.starts.tolist() == [0, 2, 2]


def test_a_part_of_the_entries():
    codes = Codes.from_columns(torch.tensor([[1, 2], [0, 3], [3, 1]]), 4)
    part = codes.where(codes.cols == 3)
    assert (part.rows.tolist(), part.cols.tolist(), part.starts.tolist()) == ([1, 2], [3, 3], [0, 0, 1])
    assert part.dense(torch.tensor([5.0, 6.0])).tolist() == [[0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 0, 6]]


def test_a_short_product_only_selects(path):
    x, encoder, b_enc, _ = (t.detach().float() for t in tensors())
    v, codes = sparse.encode(x, encoder, b_enc, select_top_k(5), torch.bfloat16)
    torch.testing.assert_close(v, (x @ encoder.T + b_enc)[codes.rows, codes.cols])
    exact = sparse.encode(x, encoder, b_enc, select_top_k(5))[1]
    alike = torch.isin(codes.rows * D_SAE + codes.cols, exact.rows * D_SAE + exact.cols).float().mean()
    assert 0.95 < alike <= 1


def test_the_path_is_named():
    assert sparse.path_name(torch.device("cpu"), torch.bfloat16) == "bfloat16 encoder product, embedding bags on cpu"

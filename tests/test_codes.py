"""Sparse products against dense autograd in float64."""

import pytest
import torch

from qsae_kit.sae import codes as sparse
from qsae_kit.sae.codes import Codes, above, largest_columns, select_positive, select_top_k

N_ROWS, D, D_SAE = 40, 10, 48


@pytest.fixture(params=["sparse", "dense"])
def path(request, monkeypatch):
    monkeypatch.setattr(sparse, "DENSE_SHARE", 2.0 if request.param == "sparse" else -1.0)


def tensors():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    return draw(N_ROWS, D), draw(D_SAE, D), draw(D_SAE), draw(D_SAE, D)


def of_top(x, encoder, b_enc):
    return sparse.encode(x, encoder, b_enc, select_top_k(5))[:2]


def of_chosen(x, encoder, b_enc):
    codes = Codes.from_columns(torch.arange(N_ROWS)[:, None] % 7 + torch.tensor([0, 9, 30]), D_SAE)
    return sparse.encode_at(x, encoder, b_enc, codes, x @ encoder.T + b_enc), codes


def of_positive(x, encoder, b_enc):
    return sparse.encode(x, encoder, b_enc, select_positive)[:2]


@pytest.mark.parametrize(
    "encode", [of_top, of_chosen, of_positive], ids=["top", "chosen", "positive"]
)
def test_values_and_gradients_are_those_of_dense_products(path, encode):
    x, encoder, b_enc, W_dec = tensors()
    v, codes = encode(x, encoder, b_enc)
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


@pytest.mark.parametrize(
    ("n_cols", "k"), [(48, 5), (960, 8), (4608, 32), (37, 4), (40, 40), (1280, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_are_exactly_the_largest(n_cols, k, dtype):
    pre = torch.randn(17, n_cols, generator=torch.Generator().manual_seed(1)).to(dtype)
    pre[0] = pre[0].abs().neg()  # nothing positive
    found = largest_columns(pre, k)
    assert all(len(set(row)) == k for row in found.tolist())
    expected = pre.topk(k, dim=-1).values
    torch.testing.assert_close(
        pre.gather(1, found).sort(descending=True).values, expected, atol=0, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("least", [0.0, 0.75])
def test_entries_above_a_number(dtype, least):
    pre = torch.tensor([[0.5, -1.0, 2.0], [-0.0, -torch.inf, 0.75], [3.0, 0.0, 0.1]], dtype=dtype)
    places = above(pre, least)
    assert places.tolist() == (pre.float().view(-1) > least).nonzero().view(-1).tolist()
    codes = Codes.from_flat(places, *pre.shape)
    assert codes.dense(torch.ones(len(codes))).bool().tolist() == (pre.float() > least).tolist()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_entries_above_a_value_of_their_column(path, dtype):
    x, encoder, b_enc, _ = (t.detach().float() for t in tensors())
    least = torch.linspace(-0.5, 1.5, D_SAE)
    sampled = least - 0.5
    pre = x @ encoder.T + b_enc
    v, codes, everywhere, shifted = sparse.encode_above(x, encoder, b_enc, least, sampled, 4, dtype)
    found = codes.dense(torch.ones(len(codes))).bool()
    wanted = least.expand(N_ROWS, D_SAE).clone()
    wanted[::4] = sampled
    off = 0.1 if dtype else 1e-5  # bfloat16 keeps eight binary digits
    assert not ((pre > wanted + off) & ~found).any()
    assert not (found & (pre < wanted - off)).any()
    true = pre[codes.rows, codes.cols]
    torch.testing.assert_close(v, true, atol=off, rtol=0)
    torch.testing.assert_close(shifted.float() + wanted, pre, atol=off, rtol=0)
    assert everywhere.sum() > 100
    assert (~everywhere).sum() > 10
    torch.testing.assert_close(v[everywhere], true[everywhere])
    assert (true[~everywhere] < least[codes.cols[~everywhere]] + off).all()
    assert (codes.rows[~everywhere] % 4 == 0).all()


def test_what_is_narrowed_is_skipped(path):
    x, _, _, W_dec = (t.detach() for t in tensors())
    codes = Codes.from_columns(torch.arange(N_ROWS)[:, None] % 7 + torch.tensor([0, 9, 30]), D_SAE)
    values = torch.linspace(-1, 2, len(codes), dtype=torch.float64)
    kept = values * (values > 0)
    before = (
        codes.times(kept, W_dec),
        codes.transposed_times(kept, x),
        codes.dots(x, W_dec),
        codes.sums(values),
    )
    codes.narrow(values > 0)  # what is given outside of it from now on does not count
    after = (
        codes.times(values, W_dec),
        codes.transposed_times(values, x),
        codes.dots(x, W_dec),
        codes.sums(values),
    )
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_a_part_of_the_entries():
    codes = Codes.from_columns(torch.tensor([[1, 2], [0, 3], [3, 1]]), 4)
    part = codes.where(codes.cols == 3)
    assert (part.rows.tolist(), part.cols.tolist(), part.starts.tolist()) == (
        [1, 2],
        [3, 3],
        [0, 0, 1],
    )
    assert part.dense(torch.tensor([5.0, 6.0])).tolist() == [
        [0, 0, 0, 0],
        [0, 0, 0, 5],
        [0, 0, 0, 6],
    ]


def test_a_short_product_selects_almost_the_same(path):
    x, encoder, b_enc, _ = (t.detach().float() for t in tensors())
    v, codes, pre = sparse.encode(x, encoder, b_enc, select_top_k(5), torch.bfloat16)
    assert pre.dtype == torch.bfloat16
    torch.testing.assert_close(
        v, (x @ encoder.T + b_enc)[codes.rows, codes.cols], rtol=0.02, atol=0.02
    )
    exact = sparse.encode(x, encoder, b_enc, select_top_k(5))[1]
    alike = (
        torch.isin(codes.rows * D_SAE + codes.cols, exact.rows * D_SAE + exact.cols).float().mean()
    )
    assert 0.95 < alike <= 1


def test_the_path_is_named():
    assert (
        sparse.path_name(torch.device("cpu"), torch.bfloat16)
        == "bfloat16 encoder product, embedding bags on cpu"
    )

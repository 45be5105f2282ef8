"""Ragged codes: which features of which rows matter, and the products that touch only those.

A training step makes one dense product, x @ W_enc [row, d_sae]. Selection turns it into entries
(row, column, value), and from there on work grows with the number of entries E: decoding, both
weight gradients and the gradient of the activations cost E * d_model each, against row * d_sae *
d_model when dense. Where many entries are selected (a ReLU SAE in its first steps) the dense
products are the cheaper ones and are used instead; the results are the same.

On CUDA the sparse products are Triton kernels (`kernels`), elsewhere embedding bags. The dense
product may be made in bfloat16, with sums in float32; only what is compared with a threshold of its
own (`encode_above`) is made again in float32. On CUDA the sparse products read weights and rows in
bfloat16 too, since reading them is what they take time for. Sums, weights and gradients are float32
everywhere.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

DENSE_SHARE = 0.08
"""Share of entries above which dense products are cheaper (measured on a CPU at d_model 576)."""


HAS_TRITON = importlib.util.find_spec("triton") is not None


def with_kernels(device: torch.device) -> bool:
    """Whether Triton kernels take part on a device."""
    return device.type == "cuda" and HAS_TRITON


def path_name(device: torch.device, dtype: torch.dtype) -> str:
    """What products are made with on a device, for printing."""
    sparse = "Triton kernels" if with_kernels(device) else "embedding bags"
    return f"{str(dtype).removeprefix('torch.')} encoder product, {sparse} on {device.type}"


def _table(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What sparse products read: on CUDA in the short format."""
    return x if dtype is None or not x.is_cuda else x.to(dtype)


def _gather(table: Tensor, index: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """Row i: the sum of weights[e] * table[index[e]] over the entries e from starts[i] up to the
    next start.
    """
    if with_kernels(table.device):
        from qsae_kit.sae import kernels

        return kernels.gather(table, index, weights, _offsets(starts, len(index)))
    return F.embedding_bag(
        index, table, starts, mode="sum", per_sample_weights=weights.to(table.dtype)
    ).to(weights.dtype)


def _offsets(starts: Tensor, n: int) -> Tensor:
    return F.pad(starts, (0, 1), value=n)


def _starts(keys: Tensor, n: int) -> Tensor:
    """Where each of n groups begins among ascending keys from 0 to n - 1."""
    if keys.is_cuda:  # counting would wait for the device
        return torch.searchsorted(keys, torch.arange(n, device=keys.device, dtype=keys.dtype))
    counts = torch.bincount(keys, minlength=n)
    return counts.cumsum(0) - counts


class Codes:
    """The places of entries in a [n_rows, n_cols] matrix, row by row; values are kept beside it,
    one an entry.
    """

    def __init__(
        self,
        rows: Int[Tensor, " entry"],
        cols: Int[Tensor, " entry"],
        starts: Int[Tensor, " row"],
        n_cols: int,
    ) -> None:
        self.rows, self.cols, self.starts, self.n_cols = rows, cols, starts, n_cols
        self.even = False
        """Whether every row has the same number of entries."""
        self._by_column: tuple[Tensor, Tensor] | None = None
        self._live: tuple[Tensor, Codes] | None = None

    @classmethod
    def from_flat(cls, flat: Int[Tensor, " entry"], n_rows: int, n_cols: int) -> "Codes":
        """From ascending indices into the flattened matrix."""
        rows = flat.div(n_cols, rounding_mode="floor")
        return cls(rows, flat - rows * n_cols, _starts(rows, n_rows), n_cols)

    @classmethod
    def from_columns(cls, cols: Int[Tensor, "row k"], n_cols: int) -> "Codes":
        """The same number of entries in every row."""
        n_rows, k = cols.shape
        starts = torch.arange(n_rows, device=cols.device) * k
        rows = torch.arange(n_rows, device=cols.device).repeat_interleave(k)
        codes = cls(rows, cols.reshape(-1), starts, n_cols)
        codes.even = True
        return codes

    def __len__(self) -> int:
        return len(self.cols)

    @property
    def n_rows(self) -> int:
        return len(self.starts)

    @property
    def crowded(self) -> bool:
        """Whether dense products are cheaper."""
        return len(self) > DENSE_SHARE * self.n_rows * self.n_cols

    def dense(self, values: Float[Tensor, " entry"]) -> Float[Tensor, "row column"]:
        """The whole matrix, 0 where nothing was selected."""
        out = values.new_zeros(self.n_rows, self.n_cols)
        out[self.rows, self.cols] = values
        return out

    def of(self, matrix: Float[Tensor, "row column"]) -> Float[Tensor, " entry"]:
        """What a whole matrix holds at the entries."""
        if self.even:
            return matrix.gather(1, self.cols.view(self.n_rows, -1)).view(-1)
        return matrix[self.rows, self.cols]

    def where(self, keep: Tensor) -> "Codes":
        """Only the entries of a mask [entry]."""
        rows = self.rows[keep]
        return Codes(rows, self.cols[keep], _starts(rows, self.n_rows), self.n_cols)

    def narrow(self, live: Bool[Tensor, " entry"]) -> None:
        """Says that values, and gradients of pre-activations, are 0 outside of `live`: `times` and
        `transposed_times` skip the rest.
        """
        self._live = live, self.where(live)

    def by_column(self) -> tuple[Int[Tensor, " entry"], Int[Tensor, " column"]]:
        """The entries' order column by column, and where each column begins."""
        if self._by_column is None:
            keys = (
                self.cols.short() if self.n_cols <= 2**15 else self.cols.int()
            )  # short ones are sorted in a quarter of the time
            ascending, order = keys.sort(stable=True)
            self._by_column = order, _starts(ascending, self.n_cols)
        return self._by_column

    # --- products; weights and rows may be in another format than values, and results are in that
    # of values

    def times(
        self, values: Float[Tensor, " entry"], W: Float[Tensor, "column d"]
    ) -> Float[Tensor, "row d"]:
        """values @ W."""
        if self._live is not None:
            live, part = self._live
            return part.times(values[live], W)
        if self.crowded:
            return (self.dense(values.to(W.dtype)) @ W).to(values.dtype)
        return _gather(W, self.cols, values, self.starts)

    def transposed_times(
        self, values: Float[Tensor, " entry"], x: Float[Tensor, "row d"]
    ) -> Float[Tensor, "column d"]:
        """values^T @ x."""
        if self._live is not None:
            live, part = self._live
            return part.transposed_times(values[live], x)
        if self.crowded:
            return (self.dense(values.to(x.dtype)).T @ x).to(values.dtype)
        order, starts = self.by_column()
        return _gather(x, self.rows[order], values[order], starts)

    def dots(
        self, x: Float[Tensor, "row d"], W: Float[Tensor, "column d"]
    ) -> Float[Tensor, " entry"]:
        """x[row] . W[column] of every entry: the gradient of `times` with respect to its values."""
        if self.crowded:
            return self.of(x @ W.T).to(torch.float32 if x.is_cuda else x.dtype)
        if with_kernels(x.device):
            from qsae_kit.sae import kernels

            return kernels.dots(x, W, self.rows, self.cols)
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x, W, self.cols, self.starts, self.rows, 0, -1
        )

    def errors(
        self,
        x: Float[Tensor, "row d"],
        values: Float[Tensor, " entry"],
        W: Float[Tensor, "column d"],
        bias: Float[Tensor, " d"],
    ) -> tuple[Float[Tensor, "row d"], Float[Tensor, ""], Float[Tensor, " entry"] | None]:
        """x - values @ W - bias, its mean squared length and, where they come with it, its `dots`
        with W.
        """
        if not self.even or self.crowded or not with_kernels(x.device):
            error = x - self.times(values, W) - bias
            return error.to(W.dtype), error.pow(2).sum(-1).mean(), None
        from qsae_kit.sae import kernels

        error, squares, dots = kernels.errors(
            x, values, W, bias, self.cols, _offsets(self.starts, len(self))
        )
        return error, squares.mean(), dots

    def sums(self, values: Float[Tensor, " entry"]) -> Float[Tensor, " column"]:
        """Sum of every column, always in the same order."""
        if values.device.type == "cpu":
            return torch.bincount(self.cols, weights=values, minlength=self.n_cols).to(values.dtype)
        order, starts = self.by_column()
        if with_kernels(values.device):
            from qsae_kit.sae import kernels

            return kernels.sums(values[order], _offsets(starts, len(self)))
        return F.embedding_bag(order, values[:, None], starts, mode="sum")[:, 0]


Select: TypeAlias = Callable[[Tensor], Codes]
"""Pre-activations [row, d_sae] -> the entries that have an activation or a gradient. Never
differentiated.
"""


class _Encode(torch.autograd.Function):
    """Pre-activations of selected entries; gradients reach the encoder, not the rows."""

    @staticmethod
    def forward(
        ctx: Any, encoder: Tensor, b_enc: Tensor, x: Tensor, v: Tensor, codes: Codes
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.codes = codes
        return v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return ctx.codes.transposed_times(grads[0], x), ctx.codes.sums(grads[0]), None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, f: Tensor, W_dec: Tensor, codes: Codes, dtype: torch.dtype | None
    ) -> Tensor:
        table = _table(W_dec, dtype)
        ctx.save_for_backward(f, table)
        ctx.codes = codes
        return codes.times(f, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        f, table = ctx.saved_tensors
        rows = _table(grads[0], table.dtype)
        grad_f = ctx.codes.dots(rows, table) if ctx.needs_input_grad[0] else None
        grad_W = ctx.codes.transposed_times(f, rows) if ctx.needs_input_grad[1] else None
        return grad_f, grad_W, None, None


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        f: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        x: Tensor,
        codes: Codes,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        table = _table(W_dec, dtype)
        error, loss, dots = codes.errors(x, f, table, b_dec)
        ctx.save_for_backward(f, error, *([table] if dots is None else [dots]))
        ctx.codes, ctx.has_dots = codes, dots is not None
        ctx.mark_non_differentiable(error)
        return loss, error

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        f, error, last = ctx.saved_tensors
        scale = grads[0] * (-2 / len(error))
        grad_f = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_f = (last if ctx.has_dots else ctx.codes.dots(error, last)) * scale
        if ctx.needs_input_grad[1]:
            grad_W = ctx.codes.transposed_times(f * scale, error)
        if ctx.needs_input_grad[2]:
            grad_b = error.sum(0, dtype=scale.dtype) * scale
        return grad_f, grad_W, grad_b, None, None, None


class _OfColumn(torch.autograd.Function):
    """What each entry's column holds. Indexing does the same, but sums its gradient in an order
    that depends on timing.
    """

    @staticmethod
    def forward(ctx: Any, per_column: Tensor, codes: Codes) -> Tensor:
        ctx.codes = codes
        return per_column[codes.cols]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.codes.sums(grads[0]), None


def of_column(per_column: Float[Tensor, " d_sae"], codes: Codes) -> Float[Tensor, " entry"]:
    """per_column[column] of every entry, such as its threshold; differentiable."""
    return _OfColumn.apply(per_column, codes)


def encode(
    x: Float[Tensor, "row d_model"],
    encoder: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    select: Select,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, " entry"], Codes, Float[Tensor, "row d_sae"]]:
    """Pre-activations x @ encoder^T + b_enc of the entries that `select` picks, and all of them,
    which are not differentiable.

    dtype: of the product (None: as x).
    """
    dtype = dtype or x.dtype
    with torch.no_grad():
        short = x.to(dtype)
        pre = torch.addmm(b_enc.to(dtype), short, encoder.T.to(dtype))
        codes = select(pre)
    return encode_at(short if x.is_cuda else x, encoder, b_enc, codes, pre), codes, pre


def encode_at(
    x: Float[Tensor, "row d_model"],
    encoder: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    codes: Codes,
    pre: Float[Tensor, "row d_sae"],
) -> Float[Tensor, " entry"]:
    """Pre-activations of chosen entries, taken from all of them, differentiable in the encoder."""
    return _Encode.apply(encoder, b_enc, x, codes.of(pre.detach()).to(encoder.dtype), codes)


def encode_above(
    x: Float[Tensor, "row d_model"],
    encoder: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    least: Float[Tensor, " d_sae"],
    sampled: Float[Tensor, " d_sae"],
    every: int,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, " entry"], Codes, Bool[Tensor, " entry"], Float[Tensor, "row d_sae"]]:
    """Pre-activations of the entries above `least` of their column, and on each `every`-th row of
    those above `sampled`, a smaller value.

    dtype: as for `encode`. Returned too: which entries are there in every row, the others have the
    values of the short product; and that product, less `sampled` on each `every`-th row and less
    `least` on the others.
    """
    dtype = dtype or x.dtype
    rows, table = _table(x, dtype), _table(encoder, dtype)
    with torch.no_grad():
        pre = torch.addmm((b_enc - least).to(dtype), rows.to(dtype), table.T.to(dtype))
        pre[::every] += (least - sampled).to(dtype)
        flat = above(pre, 0.0)
        codes = Codes.from_flat(flat, *pre.shape)
        on_sampled = codes.rows % every == 0
        least = least[codes.cols]
        v = pre.view(-1)[flat].to(x.dtype) + torch.where(on_sampled, sampled[codes.cols], least)
        everywhere = ~on_sampled | (v > least)
        if dtype != x.dtype:
            part = codes.where(everywhere)
            v[everywhere] = part.dots(rows, table) + b_enc[part.cols]
    return _Encode.apply(encoder, b_enc, rows, v, codes), codes, everywhere, pre


def decode(
    f: Float[Tensor, " entry"],
    W_dec: Float[Tensor, "d_sae d_model"],
    codes: Codes,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "row d_model"]:
    """f @ W_dec, differentiable in both; dtype: what weights are read in on CUDA."""
    return _Decode.apply(f.contiguous(), W_dec, codes, dtype)


def squared_error(
    x: Float[Tensor, "row d_model"],
    f: Float[Tensor, " entry"],
    W_dec: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"],
    codes: Codes,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "row d_model"]]:
    """The mean over rows of |x - f @ W_dec - b_dec|^2, differentiable in all but x, and the rows of
    the difference, which are not.

    dtype: of the weights as they are read on CUDA, and of the rows returned there.
    """
    return _SquaredError.apply(f.contiguous(), W_dec, b_dec, x, codes, dtype)


# --- selection


def largest_columns(pre: Float[Tensor, "row d_sae"], k: int) -> Int[Tensor, "row k"]:
    """The columns of each row's k largest entries, in no order: exactly `topk`, in two smaller
    searches.

    Columns are put into blocks; a row's k largest entries all lie in the k blocks with the largest
    maxima.
    """
    if with_kernels(pre.device):
        from qsae_kit.sae import kernels

        return kernels.largest(pre, k)
    n_rows, n_cols = pre.shape
    sizes = [s for s in range(2, 65) if n_cols % s == 0 and n_cols // s >= k]
    # maxima and candidates that are searched
    size = min(sizes, key=lambda s: n_cols // s + s * k, default=0)
    if not size or 2 * (n_cols // size + size * k) > n_cols:
        return _top_k(pre, k)
    # column c is in block c mod blocks, so that maxima are taken over whole lines of memory
    blocks = n_cols // size
    best = _top_k(pre.view(n_rows, size, blocks).amax(1), k)
    members = torch.arange(size, device=pre.device)[None, :, None] * blocks
    candidates = (best[:, None, :] + members).view(n_rows, size * k)
    return candidates.gather(1, _top_k(pre.gather(1, candidates), k))


def _top_k(values: Float[Tensor, "row column"], k: int) -> Int[Tensor, "row k"]:
    """Columns of each row's k largest. CPUs find those of whole numbers in two thirds of the
    time.
    """
    if values.dtype == torch.bfloat16 and values.device.type == "cpu":
        bits = values.view(torch.int16)
        values = bits ^ ((bits >> 15) & 0x7FFF)  # in the order of the floats
    return values.topk(k, dim=-1, sorted=False).indices


def select_top_k(k: int) -> Select:
    """Each row's k largest."""
    return lambda pre: Codes.from_columns(largest_columns(pre, k), pre.shape[1])


def select_positive(pre: Float[Tensor, "row d_sae"]) -> Codes:
    """All above 0."""
    return Codes.from_flat(above(pre, 0.0), *pre.shape)


def above(pre: Float[Tensor, "row d_sae"], least: float) -> Int[Tensor, " entry"]:
    """Flat places of the entries above a number that is not negative."""
    # as floats from 0 on are ordered, so are their bits, which are compared in half the time
    if pre.dtype == torch.bfloat16:
        bits = torch.tensor(least, dtype=pre.dtype).view(torch.int16).item()
        return (pre.view(torch.int16) > bits).view(-1).nonzero().view(-1)
    return (pre > least).view(-1).nonzero().view(-1)

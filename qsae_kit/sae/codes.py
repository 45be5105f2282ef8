"""Ragged codes: which features of which rows matter, and the products that touch only those.

A training step makes one dense product, x @ W_enc [row, d_sae]. Selection turns it into entries (row, column, value),
and from there on work grows with the number of entries E: decoding, both weight gradients and the gradient of the
activations cost E * d_model each, against row * d_sae * d_model when dense. Where many entries are selected (a ReLU SAE
in its first steps) the dense products are the cheaper ones and are used instead; the results are the same.

On CUDA the sparse products are Triton kernels (`kernels`), elsewhere embedding bags. The dense product may be made in
bfloat16: then it only selects, and the values of what it selected are made again in float32.
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


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware (CUDA from compute capability 8, CPUs with AMX), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and has_amx() else torch.float32


def path_name(device: torch.device, dtype: torch.dtype) -> str:
    """What products are made with on a device, for printing."""
    sparse = "Triton kernels" if device.type == "cuda" and HAS_TRITON else "embedding bags"
    return f"{str(dtype).removeprefix('torch.')} encoder product, {sparse} on {device.type}"


def _gather(table: Tensor, index: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """Row i: the sum of weights[e] * table[index[e]] over the entries e from starts[i] up to the next start."""
    if table.is_cuda and HAS_TRITON:
        from qsae_kit.sae import kernels

        return kernels.gather(table, index, weights, _offsets(starts, len(index)))
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights)


def _offsets(starts: Tensor, n: int) -> Tensor:
    return torch.cat([starts, starts.new_tensor([n])])


class Codes:
    """The places of entries in a [n_rows, n_cols] matrix, row by row; values are kept beside it, one an entry."""

    def __init__(
        self, rows: Int[Tensor, " entry"], cols: Int[Tensor, " entry"], starts: Int[Tensor, " row"], n_cols: int
    ) -> None:
        self.rows, self.cols, self.starts, self.n_cols = rows, cols, starts, n_cols
        self._by_column: tuple[Tensor, Tensor] | None = None
        self._live: tuple[Tensor, Codes] | None = None

    @classmethod
    def from_flat(cls, flat: Int[Tensor, " entry"], n_rows: int, n_cols: int) -> "Codes":
        """From ascending indices into the flattened matrix."""
        rows = flat.div(n_cols, rounding_mode="floor")
        counts = torch.bincount(rows, minlength=n_rows)
        return cls(rows, flat - rows * n_cols, counts.cumsum(0) - counts, n_cols)

    @classmethod
    def from_columns(cls, cols: Int[Tensor, "row k"], n_cols: int) -> "Codes":
        """The same number of entries in every row."""
        n_rows, k = cols.shape
        starts = torch.arange(n_rows, device=cols.device) * k
        rows = torch.arange(n_rows, device=cols.device).repeat_interleave(k)
        return cls(rows, cols.reshape(-1), starts, n_cols)

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

    def where(self, keep: Tensor) -> "Codes":
        """Only the entries of a mask [entry]."""
        rows = self.rows[keep]
        counts = torch.bincount(rows, minlength=self.n_rows)
        return Codes(rows, self.cols[keep], counts.cumsum(0) - counts, self.n_cols)

    def narrow(self, live: Bool[Tensor, " entry"]) -> None:
        """Says that values, and gradients of pre-activations, are 0 outside of `live`: `times` and `transposed_times` skip the rest."""
        self._live = live, self.where(live)

    def by_column(self) -> tuple[Int[Tensor, " entry"], Int[Tensor, " column"]]:
        """The entries' order column by column, and where each column begins."""
        if self._by_column is None:
            counts = torch.bincount(self.cols, minlength=self.n_cols)
            keys = self.cols.short() if self.n_cols < 2**15 else self.cols  # sorted in a quarter of the time
            self._by_column = keys.argsort(stable=True), counts.cumsum(0) - counts
        return self._by_column

    # --- products

    def times(self, values: Float[Tensor, " entry"], W: Float[Tensor, "column d"]) -> Float[Tensor, "row d"]:
        """values @ W."""
        if self._live is not None:
            live, part = self._live
            return part.times(values[live], W)
        if self.crowded:
            return self.dense(values) @ W
        return _gather(W, self.cols, values, self.starts)

    def transposed_times(self, values: Float[Tensor, " entry"], x: Float[Tensor, "row d"]) -> Float[Tensor, "column d"]:
        """values^T @ x."""
        if self._live is not None:
            live, part = self._live
            return part.transposed_times(values[live], x)
        if self.crowded:
            return self.dense(values).T @ x
        order, starts = self.by_column()
        return _gather(x, self.rows[order], values[order], starts)

    def dots(self, x: Float[Tensor, "row d"], W: Float[Tensor, "column d"]) -> Float[Tensor, " entry"]:
        """x[row] . W[column] of every entry: the gradient of `times` with respect to its values."""
        if self.crowded:
            return (x @ W.T)[self.rows, self.cols]
        if x.is_cuda and HAS_TRITON:
            from qsae_kit.sae import kernels

            return kernels.dots(x, W, self.cols, _offsets(self.starts, len(self)))
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(x, W, self.cols, self.starts, self.rows, 0, -1)

    def sums(self, values: Float[Tensor, " entry"]) -> Float[Tensor, " column"]:
        """Sum of every column, always in the same order."""
        if values.device.type == "cpu":
            return torch.bincount(self.cols, weights=values, minlength=self.n_cols).to(values.dtype)
        order, starts = self.by_column()
        return F.embedding_bag(order, values[:, None], starts, mode="sum")[:, 0]


Select: TypeAlias = Callable[[Tensor], Codes]
"""Pre-activations [row, d_sae] -> the entries that have an activation or a gradient. Never differentiated."""


class _Encode(torch.autograd.Function):
    """Pre-activations of selected entries; gradients reach the encoder, not the rows."""

    @staticmethod
    def forward(ctx: Any, encoder: Tensor, b_enc: Tensor, x: Tensor, v: Tensor, codes: Codes) -> Tensor:
        ctx.save_for_backward(x)
        ctx.codes = codes
        return v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return ctx.codes.transposed_times(grads[0], x), ctx.codes.sums(grads[0]), None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, W_dec: Tensor, codes: Codes) -> Tensor:
        ctx.save_for_backward(f, W_dec)
        ctx.codes = codes
        return codes.times(f, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        f, W_dec = ctx.saved_tensors
        grad_f = ctx.codes.dots(grads[0], W_dec) if ctx.needs_input_grad[0] else None
        grad_W = ctx.codes.transposed_times(f, grads[0]) if ctx.needs_input_grad[1] else None
        return grad_f, grad_W, None


class _OfColumn(torch.autograd.Function):
    """What each entry's column holds. Indexing does the same, but sums its gradient in an order that depends on timing."""

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
) -> tuple[Float[Tensor, " entry"], Codes]:
    """Pre-activations x @ encoder^T + b_enc of the entries that `select` picks; dtype: of the product that it picks from (None: as x)."""
    dtype = dtype or x.dtype
    with torch.no_grad():
        pre = torch.addmm(b_enc.to(dtype), x.to(dtype), encoder.T.to(dtype))
        codes = select(pre)
        v = pre[codes.rows, codes.cols] if dtype == x.dtype else None
    return encode_at(x, encoder, b_enc, codes, v), codes


def encode_above(
    x: Float[Tensor, "row d_model"],
    encoder: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    least: Float[Tensor, " d_sae"],
    sampled: Float[Tensor, " d_sae"],
    every: int,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, " entry"], Codes, Bool[Tensor, " entry"]]:
    """Pre-activations of the entries above `least` of their column, and on each `every`-th row of those above `sampled`, a smaller value.

    dtype: as for `encode`. Returned too: which entries are there in every row; the others have the values of the short product.
    """
    dtype = dtype or x.dtype
    with torch.no_grad():
        pre = torch.addmm((b_enc - least).to(dtype), x.to(dtype), encoder.T.to(dtype))
        pre[::every] += (least - sampled).to(dtype)
        flat = above(pre, 0.0)
        codes = Codes.from_flat(flat, *pre.shape)
        on_sampled = codes.rows % every == 0
        least = least[codes.cols]
        v = pre.view(-1)[flat].to(x.dtype) + torch.where(on_sampled, sampled[codes.cols], least)
        everywhere = ~on_sampled | (v > least)
        if dtype != x.dtype:
            part = codes.where(everywhere)
            v[everywhere] = part.dots(x, encoder) + b_enc[part.cols]
    return encode_at(x, encoder, b_enc, codes, v), codes, everywhere


def encode_at(
    x: Float[Tensor, "row d_model"],
    encoder: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    codes: Codes,
    v: Float[Tensor, " entry"] | None = None,
) -> Float[Tensor, " entry"]:
    """Pre-activations of chosen entries; v: their values, where they are known already."""
    if v is None:
        with torch.no_grad():
            v = codes.dots(x, encoder) + b_enc[codes.cols]
    return _Encode.apply(encoder, b_enc, x, v, codes)


def decode(f: Float[Tensor, " entry"], W_dec: Float[Tensor, "d_sae d_model"], codes: Codes) -> Float[Tensor, "row d_model"]:
    """f @ W_dec, differentiable in both."""
    return _Decode.apply(f.contiguous(), W_dec, codes)


# --- selection


def largest_columns(pre: Float[Tensor, "row d_sae"], k: int) -> Int[Tensor, "row k"]:
    """The columns of each row's k largest entries, in no order: exactly `topk`, in two smaller searches.

    Columns are put into blocks; a row's k largest entries all lie in the k blocks with the largest maxima.
    """
    n_rows, n_cols = pre.shape
    sizes = [s for s in range(2, 65) if n_cols % s == 0 and n_cols // s >= k]
    size = min(sizes, key=lambda s: n_cols // s + s * k, default=0)  # maxima and candidates that are searched
    if not size or 2 * (n_cols // size + size * k) > n_cols:
        return pre.topk(k, dim=-1, sorted=False).indices
    blocks = n_cols // size  # column c is in block c mod blocks, so that maxima are taken over whole lines of memory
    best = pre.view(n_rows, size, blocks).amax(1).topk(k, dim=-1, sorted=False).indices
    members = torch.arange(size, device=pre.device)[None, :, None] * blocks
    candidates = (best[:, None, :] + members).view(n_rows, size * k)
    return candidates.gather(1, pre.gather(1, candidates).topk(k, dim=-1, sorted=False).indices)


def select_top_k(k: int) -> Select:
    """Each row's k largest."""
    return lambda pre: Codes.from_columns(largest_columns(pre, k), pre.shape[1])


def select_positive(pre: Float[Tensor, "row d_sae"]) -> Codes:
    """All above 0."""
    return Codes.from_flat(above(pre, 0.0), *pre.shape)


def above(pre: Float[Tensor, "row d_sae"], least: float) -> Int[Tensor, " entry"]:
    """Flat places of the entries above a number that is not negative."""
    if pre.dtype == torch.bfloat16:  # as floats from 0 on are ordered, so are their bits, which are compared in half the time
        bits = torch.tensor(least, dtype=pre.dtype).view(torch.int16).item()
        return (pre.view(torch.int16) > bits).view(-1).nonzero().view(-1)
    return (pre > least).view(-1).nonzero().view(-1)

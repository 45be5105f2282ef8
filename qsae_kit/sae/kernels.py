"""Triton kernels for CUDA: the sparse products of `codes`, selection, and the update of a matrix
row by row.

    gather     out[i] = sum over entries e of row (column) i   weight[e] * table[index[e]]
    dots       out[e] = x[rows[e]] . table[index[e]]
    sums       out[i] = sum over entries e of row (column) i   values[e]
    errors     rows x - f @ W - b, their squared lengths, and their dots with W, from one pass over
    the rows of W largest    the columns of each row's k largest entries row_norms  squared lengths
    of gradient rows, and their dots with the parameter's rows adam_rows  Adam, with the part of a
    gradient along its row taken away and rows brought back to unit length

Tables may be in bfloat16, which halves what is read; sums are in float32. Nothing is scattered, so
that results do not depend on timing. On a CPU the kernels run under TRITON_INTERPRET=1, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

AT_ONCE = 4
"""Entries whose lines are loaded together."""


@triton.jit
def _gather(out, table, index, weight, offsets, width, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    end = tl.load(offsets + row + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(tl.load(offsets + row), end, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            entry = tl.minimum(first + i, end - 1)
            here = inside & (tl.full((BLOCK,), first + i, tl.int64) < end)
            line = tl.load(
                table + tl.load(index + entry).to(tl.int64) * width + at, mask=here, other=0.0
            )
            total += tl.load(weight + entry) * line.to(tl.float32)
    tl.store(out + row * width + at, total, mask=inside)


@triton.jit(do_not_specialize=["n"])
def _dots(out, x, table, rows, index, n, width, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    here = entry < n
    row = tl.load(rows + entry, mask=here, other=0).to(tl.int64)
    place = tl.load(index + entry, mask=here, other=0).to(tl.int64)
    total = tl.zeros((AT_ONCE, BLOCK), dtype=tl.float32)
    for begin in range(0, width, BLOCK):
        at = begin + tl.arange(0, BLOCK)[None, :]
        inside = here[:, None] & (at < width)
        own = tl.load(x + row[:, None] * width + at, mask=inside, other=0.0)
        line = tl.load(table + place[:, None] * width + at, mask=inside, other=0.0)
        total += own.to(tl.float32) * line.to(tl.float32)
    tl.store(out + entry, tl.sum(total, 1), mask=here)


@triton.jit
def _sums(out, values, offsets, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    end = tl.load(offsets + row + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(tl.load(offsets + row), end, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        total += tl.load(values + entry, mask=entry < end, other=0.0)
    tl.store(out + row, tl.sum(total))


@triton.jit
def _errors(  # type: ignore[no-untyped-def]
    error,
    squares,
    dots,
    x,
    bias,
    table,
    index,
    value,
    offsets,
    width,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    rest = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32) - tl.load(
        bias + at, mask=inside, other=0.0
    )
    for first in range(begin, end, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            entry = tl.minimum(first + i, end - 1)
            here = inside & (tl.full((BLOCK,), first + i, tl.int64) < end)
            f = tl.where(here, tl.load(value + entry), 0.0)
            line = tl.load(
                table + tl.load(index + entry).to(tl.int64) * width + at, mask=f != 0, other=0.0
            )
            rest -= f * line.to(tl.float32)
    tl.store(error + row * width + at, rest, mask=inside)
    tl.store(squares + row, tl.sum(rest * rest))
    for first in range(begin, end, AT_ONCE):  # the same lines, which lie in the cache now
        entry = first + tl.arange(0, AT_ONCE)
        place = tl.load(index + entry, mask=entry < end, other=0).to(tl.int64)
        mask = (entry < end)[:, None] & inside[None, :]
        lines = tl.load(table + place[:, None] * width + at[None, :], mask=mask, other=0.0)
        tl.store(dots + entry, tl.sum(rest[None, :] * lines.to(tl.float32), 1), mask=entry < end)


@triton.jit
def _ordered(bits, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bits of floats as int32 of the same order, whose lower bits are 0 where a float has 16."""
    high = bits.to(tl.int32) << (32 - BITS)
    return (high ^ ((high >> 31) & 0x7FFFFFFF)) & (-1 << (32 - BITS))


@triton.jit
def _load_keys(pre, at, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """`_ordered` floats, the smallest number where nothing is inside."""
    return tl.where(inside, _ordered(tl.load(pre + at, mask=inside, other=0), BITS), -(1 << 31))


@triton.jit
def _kth(keys, k, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The k-th largest of keys [n]: bit by bit, the largest number that k of them reach."""
    least: tl.constexpr = -(1 << 31)
    kth = tl.full((), least, tl.int32)
    for i in tl.static_range(BITS):
        guess = kth ^ least if i == 0 else kth | (1 << (31 - i))
        kth = tl.where(tl.sum((keys >= guess).to(tl.int32)) >= k, guess, kth)
    return kth


@triton.jit
def _store_largest(out, keys, columns, inside, kth, k):  # type: ignore[no-untyped-def]
    """The columns of the keys above the k-th, and of those equal to it until there are k."""
    greater, equal = (keys > kth).to(tl.int32), ((keys == kth) & inside).to(tl.int32)
    tl.store(out + tl.cumsum(greater, 0) - 1, columns, mask=greater > 0)
    place = tl.sum(greater) + tl.cumsum(equal, 0) - 1
    tl.store(out + place, columns, mask=(equal > 0) & (place < k))


@triton.jit(do_not_specialize=["k"])
def _largest(  # type: ignore[no-untyped-def]
    out,
    pre,
    k,
    width,
    blocks,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pre, out = pre + row * width, out + row * k
    block = tl.arange(0, BLOCKS)  # column c is in block c mod blocks
    best = tl.full((BLOCKS,), -(1 << 31), tl.int32)
    for first in range(0, SIZE, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            at = (first + i) * blocks + block
            best = tl.maximum(best, _load_keys(pre, at, (block < blocks) & (at < width), BITS))
    # a row's k largest are in these blocks
    _store_largest(out, best, block, block < blocks, _kth(best, k, BITS), k)
    tl.debug_barrier()
    chosen = tl.load(out + tl.arange(0, K), mask=tl.arange(0, K) < k, other=0).to(tl.int32)
    tl.debug_barrier()
    columns = chosen[None, :] + blocks * tl.arange(0, SIZE)[:, None]
    inside = (tl.arange(0, K) < k)[None, :] & (columns < width)
    columns, inside = tl.reshape(columns, (SIZE * K,)), tl.reshape(inside, (SIZE * K,))
    keys = _load_keys(pre, columns, inside, BITS)
    _store_largest(out, keys, columns, inside, _kth(keys, k, BITS), k)


@triton.jit
def _row_norms(squares, along, grad, param, width, UNIT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    g = tl.load(grad + row * width + at, mask=at < width, other=0.0)
    square = tl.sum(g * g)
    if UNIT:
        dot = tl.sum(g * tl.load(param + row * width + at, mask=at < width, other=0.0))
        tl.store(along + row, dot)
        square -= dot * dot
    tl.store(squares + row, square)


@triton.jit
def _rounded(x, noise):  # type: ignore[no-untyped-def]
    """bfloat16, up or down at random (16 bits of noise), right on average."""
    return (
        ((x.to(tl.int32, bitcast=True) + noise) & -65536)
        .to(tl.float32, bitcast=True)
        .to(tl.bfloat16)
    )


@triton.jit(do_not_specialize=["seed"])
def _adam_rows(  # type: ignore[no-untyped-def]
    param,
    grad,
    first,
    second,
    along,
    width,
    clip,
    size,
    floor,
    b1,
    b2,
    seed,
    UNIT: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    place = row * width + at
    p = tl.load(param + place, mask=inside, other=0.0)
    g = tl.load(grad + place, mask=inside, other=0.0)
    if UNIT:
        g -= tl.load(along + row) * p
    g *= clip
    m = tl.load(first + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second + place, mask=inside, other=0.0).to(tl.float32)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    p -= size * m / (tl.sqrt(v) / floor + 1e-8)
    if UNIT:
        p /= tl.maximum(tl.sqrt(tl.sum(p * p)), 1e-8)
    tl.store(param + place, p, mask=inside)
    if SHORT:
        noise = tl.randint(seed, place.to(tl.int32)).to(tl.int32, bitcast=True)
        tl.store(first + place, _rounded(m, noise & 0xFFFF), mask=inside)
        tl.store(second + place, _rounded(v, (noise >> 16) & 0xFFFF), mask=inside)
    else:
        tl.store(first + place, m, mask=inside)
        tl.store(second + place, v, mask=inside)


def gather(table: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """out[i] = sum of weight[e] * table[index[e]] over e from offsets[i] to offsets[i + 1].
    [len(offsets) - 1, width]
    """
    table = table.contiguous()
    n, width = len(offsets) - 1, table.shape[1]
    out = torch.empty(n, width, dtype=torch.float32, device=table.device)
    block = min(2048 // table.element_size(), triton.next_power_of_2(width))  # 16 bytes a thread
    with torch.cuda.device_of(table):
        _gather[(n, triton.cdiv(width, block))](
            out,
            table,
            index,
            weight.contiguous(),
            offsets,
            width,
            BLOCK=block,
            AT_ONCE=AT_ONCE,
            num_warps=4,
        )
    return out


def dots(x: Tensor, table: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """out[e] = x[rows[e]] . table[index[e]]. [len(index)]"""
    x, table = x.contiguous(), table.contiguous()
    n, width = len(index), x.shape[1]
    out = torch.empty(n, dtype=torch.float32, device=x.device)
    block = min(2048 // table.element_size(), triton.next_power_of_2(width))
    with torch.cuda.device_of(table):
        _dots[(max(1, triton.cdiv(n, AT_ONCE)),)](
            out, x, table, rows, index, n, width, BLOCK=block, AT_ONCE=AT_ONCE, num_warps=4
        )
    return out


def sums(values: Tensor, offsets: Tensor) -> Tensor:
    """out[i] = sum of values[e] over e from offsets[i] to offsets[i + 1]. [len(offsets) - 1]"""
    out = torch.empty(len(offsets) - 1, dtype=torch.float32, device=values.device)
    with torch.cuda.device_of(values):
        _sums[(len(out),)](out, values.contiguous(), offsets, BLOCK=128, num_warps=1)
    return out


def errors(
    x: Tensor, f: Tensor, table: Tensor, bias: Tensor, index: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows e = x - bias - sum of f * table rows [row, width] in the table's format, |e|^2 [row],
    and e . table row [entry].
    """
    x, table = x.contiguous(), table.contiguous()
    n, width = x.shape
    error = torch.empty(n, width, dtype=table.dtype, device=x.device)
    squares = torch.empty(n, dtype=torch.float32, device=x.device)
    products = torch.empty(len(index), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(table):
        _errors[(n,)](
            error,
            squares,
            products,
            x,
            bias.contiguous(),
            table,
            index,
            f.contiguous(),
            offsets,
            width,
            BLOCK=block,
            AT_ONCE=AT_ONCE,
            num_warps=4 if block <= 2048 else 8,
        )
    return error, squares, products


def largest(pre: Tensor, k: int) -> Tensor:
    """The columns of each row's k largest entries [row, k], in no order.

    Columns are put into blocks; a row's k largest entries all lie in the k blocks with the largest
    maxima.
    """
    n, width = pre.shape
    size = 1
    # until maxima, or a block's columns, are too many
    while width > 2048 * size and width >= 4 * k * size:
        size *= 2
    blocks = triton.cdiv(width, size)
    out = torch.empty(n, k, dtype=torch.int64, device=pre.device)
    bits = {2: torch.int16, 4: torch.int32}[pre.element_size()]
    with torch.cuda.device_of(pre):
        _largest[(n,)](
            out,
            pre.contiguous().view(bits),
            k,
            width,
            blocks,
            BITS=8 * pre.element_size(),
            BLOCKS=triton.next_power_of_2(blocks),
            SIZE=size,
            K=triton.next_power_of_2(k),
            AT_ONCE=min(AT_ONCE, size),
            num_warps=4,
        )
    return out


def row_norms(grad: Tensor, param: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """Squared lengths of gradient rows [row] and, where rows of the parameter have unit length
    (`unit`), their dots with them [row], whose part is taken off."""
    n, width = grad.shape
    squares, along = (torch.empty(n, dtype=torch.float32, device=grad.device) for _ in range(2))
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(grad):
        _row_norms[(n,)](
            squares, along, grad.contiguous(), param, width, UNIT=unit, BLOCK=block, num_warps=4
        )
    return squares, along


def adam_rows(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    along: Tensor | None,
    clip: float,
    size: float,
    floor: float,
    betas: tuple[float, float],
    seed: int,
) -> None:
    """One step in place: size = rate / (1 - b1^t), floor = sqrt(1 - b2^t); along: of `row_norms`,
    where rows have unit length.

    Moments in bfloat16 are rounded at random, by the seed.
    """
    n, width = param.shape
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(param):
        _adam_rows[(n,)](
            param,
            grad.contiguous(),
            first,
            second,
            param if along is None else along,
            width,
            clip,
            size,
            floor,
            *betas,
            seed,
            UNIT=along is not None,
            SHORT=first.dtype == torch.bfloat16,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8,
        )

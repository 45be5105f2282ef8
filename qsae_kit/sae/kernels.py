"""Triton kernels for the sparse products of `codes`, for CUDA.

    times              out[r]    = sum over entries e of row r     values[e] * W[cols[e]]
    transposed_times   out[c]    = sum over entries e of column c  values[e] * x[rows[e]]
    dots               out[e]    = x[rows[e]] . W[cols[e]]

One program makes one row (column) of the output, or a block of it, from the entries between two offsets: a weighted
gather, with sums in float32 whatever the operands are. Nothing is scattered, so results do not depend on timing.
On a CPU they run under TRITON_INTERPRET=1, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gather(out, table, index, weight, offsets, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for entry in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        line = tl.load(table + tl.load(index + entry).to(tl.int64) * width + at, mask=inside, other=0.0)
        total += tl.load(weight + entry).to(tl.float32) * line.to(tl.float32)
    tl.store(out + row * width + at, total, mask=inside)


@triton.jit
def _dots(out, x, table, index, offsets, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    own = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    for entry in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        line = tl.load(table + tl.load(index + entry).to(tl.int64) * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + entry, tl.sum(own * line))


def gather(table: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """out[i] = sum of weight[e] * table[index[e]] over e from offsets[i] to offsets[i + 1]. [len(offsets) - 1, width]"""
    table = table.contiguous()
    n, width = len(offsets) - 1, table.shape[1]
    out = torch.empty(n, width, dtype=weight.dtype, device=table.device)
    block = min(512, triton.next_power_of_2(width))
    with torch.cuda.device_of(table):
        _gather[(n, triton.cdiv(width, block))](out, table, index, weight.contiguous(), offsets, width, BLOCK=block)
    return out


def dots(x: Tensor, table: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """out[e] = x[i] . table[index[e]] for e from offsets[i] to offsets[i + 1]. [len(index)]"""
    x, table = x.contiguous(), table.contiguous()
    width = x.shape[1]
    out = torch.empty(len(index), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(table):
        _dots[(len(x),)](out, x, table, index, offsets, width, BLOCK=triton.next_power_of_2(width))
    return out

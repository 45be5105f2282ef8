"""Which formats a device has, and which of the short and the long one it multiplies faster.

Of a CPU flags alone do not say it: one with AVX512-BF16 but without AMX may reach 80 GFLOP/s in
bfloat16 and 150 in float32 (measured, one core), so there both are timed.
"""

import functools
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import TypeAlias

import torch

Seconds: TypeAlias = Mapping[torch.dtype, float]
"""What the same product takes in each of `TIMED`."""
TIMED = (torch.float32, torch.bfloat16)
CLEARLY_FASTER = 1.25
"""bfloat16 has to be so many times as fast as float32, or the exact format is the better one; far
enough from 1 that noise does not decide."""
PRODUCT = (128, 1024, 2048)
"""Rows, inner and outer width of the product that is timed: milliseconds on one core."""
ROUNDS = 5
"""Of both products in turn; the best of each counts."""
BFLOAT16_FROM = (8, 0)
"""The compute capability from which on CUDA devices multiply bfloat16 in hardware."""


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64, which Apple's GPUs do not."""
    return device.type != "mps"


def exact(x: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on the CPU where its own device has no such format."""
    return x.double() if has_float64(x.device) else x.cpu().double()


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where a device multiplies it clearly faster than float32, else float32.

    That is so of CUDA from compute capability 8 on and of CPUs with AMX. CPUs with AVX512-BF16
    alone are timed, once a process, in some tens of milliseconds.
    """
    if device.type == "cuda":
        has = torch.cuda.get_device_capability(device) >= BFLOAT16_FROM
        return torch.bfloat16 if has else torch.float32
    return _of_this_cpu() if device.type == "cpu" else torch.float32


@functools.cache
def _of_this_cpu() -> torch.dtype:
    return faster_of(_has("amx_tile"), _has("avx512_bf16"), product_seconds)


def _has(feature: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)())


def faster_of(amx: bool, avx512_bf16: bool, measured: Callable[[], Seconds]) -> torch.dtype:
    """The format of a CPU with these features; it is `measured` only where they leave it open."""
    if amx:
        return torch.bfloat16
    if not avx512_bf16:
        return torch.float32
    seconds = measured()
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    return torch.bfloat16 if gain >= CLEARLY_FASTER else torch.float32


def product_seconds() -> Seconds:
    """The best of some products in each format, on one thread: with more of them, other work on the
    machine would decide.
    """
    rows, inner, outer = PRODUCT
    pairs = {
        dtype: (torch.ones(rows, inner, dtype=dtype), torch.ones(inner, outer, dtype=dtype))
        for dtype in TIMED
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for left, right in pairs.values():  # the first product of a kind prepares itself
            left @ right
        rounds = [
            {dtype: _seconds(left, right) for dtype, (left, right) in pairs.items()}
            for _ in range(ROUNDS)
        ]
    finally:
        torch.set_num_threads(threads)
    return {dtype: min(one[dtype] for one in rounds) for dtype in TIMED}


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    began = perf_counter()
    left @ right
    return perf_counter() - began

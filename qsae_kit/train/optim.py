"""Adam with an fp32 master copy and moments in float32, bfloat16 or 8 bits.

The second moment moves by a thousandth a step, less than a rounding step of bfloat16 or of 8 bits,
so that plain rounding would freeze it; short formats are rounded up or down at random instead,
right on average.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.sae.codes import with_kernels

Moments: TypeAlias = Literal["float32", "bfloat16", "int8"]
MOMENT_BYTES: dict[Moments, float] = {"float32": 8, "bfloat16": 4, "int8": 2 + 8 / 256}
"""Bytes a parameter takes for both moments."""
CHUNK = 1 << 20
"""Entries that are updated at a time; a multiple of a block."""
BLOCK = 256
"""Entries that share one scale in 8 bits."""


class _Stored(NamedTuple):
    """A moment as it is kept: `codes` and, in 8 bits, a scale a block."""

    codes: Tensor
    scales: Tensor


class Adam:
    """torch's Adam without weight decay; `rate` and `clip` are given step by step.

    moments: float32 takes torch's fused kernel; bfloat16 and int8 hold the moments of matrices in 4
        and 2 bytes a
    parameter. Vectors keep float32: their entries belong to different latents, whose gradients
    differ by decades. On CUDA float32 and bfloat16 moments of matrices are updated by this
    package's kernel.
    unit_rows: a matrix whose rows keep unit length, gradients along which are taken away.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        moments: Moments = "float32",
        betas: tuple[float, float] = (0.9, 0.999),
        seed: int = 0,
        unit_rows: Tensor | None = None,
    ) -> None:
        if moments not in MOMENT_BYTES:
            raise ValueError(
                f"moments={moments!r} was given; allowed are {', '.join(MOMENT_BYTES)}."
            )
        self.moments, self.betas, self.seed, self.unit_rows = moments, betas, seed, unit_rows
        self.steps = 0
        self._kernels = moments != "int8" and with_kernels(params[0].device)
        self._exact = [
            p for p in params if p.ndim < 2 or (moments == "float32" and not self._kernels)
        ]
        self._packed = [p for p in params if not any(p is q for q in self._exact)]
        self._fused = torch.optim.Adam(self._exact, betas=betas, fused=True)
        self._stored = [(self._empty(p), self._empty(p)) for p in self._packed]
        self._along: dict[int, Tensor] = {}

    def _empty(self, p: Tensor) -> _Stored:
        if self.moments != "int8":
            return _Stored(
                torch.zeros(p.numel(), dtype=getattr(torch, self.moments), device=p.device),
                torch.empty(0),
            )
        n_blocks = math.ceil(p.numel() / BLOCK)
        return _Stored(
            torch.zeros(n_blocks * BLOCK, dtype=torch.int8, device=p.device),
            torch.zeros(n_blocks, device=p.device),
        )

    @torch.no_grad()
    def project_gradients(self) -> Float[Tensor, ""]:
        """Takes gradients' parts along unit rows away (on CUDA within the step); the length of all
        gradients after that.

        To be called before each step.
        """
        if not self._kernels:
            if self.unit_rows is not None and self.unit_rows.grad is not None:
                grad = self.unit_rows.grad
                grad.addcmul_(
                    torch.linalg.vecdot(grad, self.unit_rows)[:, None], self.unit_rows, value=-1
                )
            return torch.nn.utils.get_total_norm(
                [p.grad for p in (*self._exact, *self._packed) if p.grad is not None]
            )
        from qsae_kit.sae import kernels

        squares = [p.grad.pow(2).sum() for p in self._exact if p.grad is not None]
        for number, p in enumerate(self._packed):
            if p.grad is not None:
                rows, self._along[number] = kernels.row_norms(p.grad, p, p is self.unit_rows)
                squares.append(rows.sum())
        return torch.stack(squares).sum().sqrt()

    @torch.no_grad()
    def step(self, rate: float, clip: float = 1.0) -> None:
        """One update from the parameters' gradients, times `clip`."""
        self.steps += 1
        for p in self._exact if self._kernels else (*self._exact, *self._packed):
            if clip < 1 and p.grad is not None:
                p.grad.mul_(clip)
        self._fused.param_groups[0]["lr"] = rate
        self._fused.step()
        b1, b2 = self.betas
        size, floor = rate / (1 - b1**self.steps), (1 - b2**self.steps) ** 0.5
        for number, (p, moments) in enumerate(zip(self._packed, self._stored, strict=True)):
            if p.grad is None:
                continue
            # so a resumed run rounds alike
            seed = (self.seed * 1_000_003 + self.steps) * 101 + number
            if self._kernels:
                from qsae_kit.sae import kernels

                along = self._along[number] if p is self.unit_rows else None
                kernels.adam_rows(
                    p,
                    p.grad,
                    moments[0].codes,
                    moments[1].codes,
                    along,
                    clip,
                    size,
                    floor,
                    self.betas,
                    seed,
                )
            else:
                self._in_chunks(
                    p, moments, size, floor, torch.Generator(p.device).manual_seed(seed)
                )
        if self.unit_rows is not None and self.unit_rows.grad is not None and not self._kernels:
            self.unit_rows.div_(self.unit_rows.norm(dim=-1, keepdim=True).clamp(min=1e-8))

    def _in_chunks(
        self,
        p: Tensor,
        moments: tuple[_Stored, _Stored],
        size: float,
        floor: float,
        generator: torch.Generator,
    ) -> None:
        """The update where moments are packed and no kernel does it."""
        (first, second), (b1, b2) = moments, self.betas
        load, store = (
            (_load_bf16, _store_bf16) if self.moments == "bfloat16" else (_load_int8, _store_int8)
        )
        assert p.grad is not None
        flat, grad = p.view(-1), p.grad.reshape(-1)
        for begin in range(0, len(flat), CHUNK):
            end = min(begin + CHUNK, len(flat))
            g = grad[begin:end]
            m = load(first, begin, end, 2).lerp_(g, 1 - b1)
            v = load(second, begin, end, 4).mul_(b2).addcmul_(g, g, value=1 - b2)
            flat[begin:end].addcdiv_(m, v.sqrt().div_(floor).add_(1e-8), value=-size)
            store(first, begin, end, m, 2, generator)
            store(second, begin, end, v, 4, generator)

    def zero_grad(self) -> None:
        for p in (*self._exact, *self._packed):
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is needed to go on, by name."""
        out = {"steps": torch.tensor(self.steps)}
        for i, p in enumerate(self._exact):
            state = self._fused.state.get(p, {})
            out |= {
                f"exact.{i}.{name}": state[name]
                for name in ("step", "exp_avg", "exp_avg_sq")
                if name in state
            }
        for i, pair in enumerate(self._stored):
            for name, kept in zip(("first", "second"), pair, strict=True):
                out |= {f"{i}.{name}.codes": kept.codes, f"{i}.{name}.scales": kept.scales}
        return out

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors` gave."""
        self.steps = int(tensors["steps"])
        for i, pair in enumerate(self._stored):
            for name, kept in zip(("first", "second"), pair, strict=True):
                kept.codes.copy_(tensors[f"{i}.{name}.codes"])
                kept.scales.copy_(tensors[f"{i}.{name}.scales"])
        for i, p in enumerate(self._exact):
            if f"exact.{i}.step" in tensors:
                self._fused.state[p] = {
                    name: tensors[f"exact.{i}.{name}"].to(p.device)
                    for name in ("step", "exp_avg", "exp_avg_sq")
                }


def _load_bf16(kept: _Stored, begin: int, end: int, power: int) -> Tensor:
    return kept.codes[begin:end].float()


def _store_bf16(
    kept: _Stored, begin: int, end: int, x: Tensor, power: int, generator: torch.Generator
) -> None:
    noise = torch.randint(
        0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator
    )
    bits = x.contiguous().view(torch.int32) + noise
    kept.codes[begin:end] = (bits & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _load_int8(kept: _Stored, begin: int, end: int, power: int) -> Tensor:
    """Codes are signed roots: the p-th root of a value over its block's, so that small values keep
    their digits.
    """
    last = math.ceil(end / BLOCK)
    root = kept.codes[begin : last * BLOCK].view(-1, BLOCK).float().div_(127)
    value = root.abs().pow_(power).copysign_(root) * kept.scales[begin // BLOCK : last, None]
    return value.view(-1)[: end - begin]


def _store_int8(
    kept: _Stored, begin: int, end: int, x: Tensor, power: int, generator: torch.Generator
) -> None:
    last = math.ceil(end / BLOCK)
    padded = torch.nn.functional.pad(x, (0, last * BLOCK - end)).view(-1, BLOCK)
    scales = padded.abs().amax(1)
    root = (padded.abs() / scales.clamp(min=1e-38)[:, None]).pow_(1 / power).mul_(127)
    noise = torch.rand(root.shape, device=x.device, generator=generator)
    low = root.floor()
    # Up with the probability that keeps the mean of the value itself, not of its root.
    up = (root**power - low**power) / ((low + 1) ** power - low**power)
    rounded = low.add_(noise < up).clamp_(max=127)
    if power == 4:  # a second moment must not vanish while the first is there
        rounded = rounded.clamp_(min=1) * (padded > 0)
    kept.codes[begin : last * BLOCK] = rounded.copysign_(padded).to(torch.int8).view(-1)
    kept.scales[begin // BLOCK : last] = scales

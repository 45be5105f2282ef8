"""Every Triton kernel: `python tests/kernels_check.py compile` for Hopper, without one; or against
the plain path in float64, on `cpu` (interpreted) or `cuda`.
"""

import sys

import torch

from qsae_kit.sae import kernels
from qsae_kit.sae.codes import Codes, _offsets


def near(found, expected, dtype=torch.float32):
    """Equal up to the roundings of a format."""
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
    assert error < {torch.float32: 3e-5, torch.bfloat16: 4e-3}[dtype], float(error)


def products(device, rows, width, columns, share, table_dtype):
    g = torch.Generator().manual_seed(0)
    f = torch.rand(rows, columns, generator=g) * (torch.rand(rows, columns, generator=g) < share)
    codes = Codes.from_flat(f.view(-1).nonzero().view(-1).to(device), rows, columns)
    f = f.to(device)
    values = f[codes.rows, codes.cols]
    x, W = (torch.randn(n, width, generator=g).to(device, table_dtype) for n in (rows, columns))
    bias = torch.randn(width, generator=g).to(device)
    offsets = _offsets(codes.starts, len(codes))
    near(kernels.gather(W, codes.cols, values, offsets), f.double() @ W.double())
    order, starts = codes.by_column()
    ends = _offsets(starts, len(codes))
    near(kernels.gather(x, codes.rows[order], values[order], ends), f.double().T @ x.double())
    places = codes.rows, codes.cols
    near(kernels.dots(x, W, *places), (x.double() @ W.double().T)[places])
    near(kernels.sums(values[order], ends), f.double().sum(0))
    error, squares, dots = kernels.errors(x.float(), values, W, bias, codes.cols, offsets)
    expected = x.double() - f.double() @ W.double() - bias.double()
    assert error.dtype == table_dtype
    near(error, expected, table_dtype)
    near(squares, expected.pow(2).sum(-1))
    near(dots, (expected @ W.double().T)[places])


def largest(device, rows, columns, k, dtype):
    pre = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    pre[0] = pre[0].abs().neg()  # nothing positive
    pre[1, : columns // 2] = 0.5  # many ties
    found = kernels.largest(pre, k)
    assert found.shape == (rows, k)
    assert all(
        len(set(line)) == k and min(line) >= 0 and max(line) < columns for line in found.tolist()
    )
    expected = pre.topk(k, dim=-1).values
    assert torch.equal(pre.gather(1, found).sort(descending=True).values, expected)


def update(device, rows, width, unit, moments):
    g = torch.Generator().manual_seed(2)
    p = torch.nn.functional.normalize(torch.randn(rows, width, generator=g), dim=-1).to(device)
    first, second = (torch.zeros(rows * width, dtype=moments, device=device) for _ in range(2))
    p2, m, v = p.double(), 0.0, 0.0
    for step in (1, 2, 3):
        grad = torch.randn(rows, width, generator=g).to(device)
        squares, along = kernels.row_norms(grad, p, unit)
        size, floor = 0.01 / (1 - 0.9**step), (1 - 0.999**step) ** 0.5
        kernels.adam_rows(
            p, grad, first, second, along if unit else None, 0.5, size, floor, (0.9, 0.999), step
        )
        g2 = grad.double()
        g2 = g2 - (g2 * p2).sum(-1, keepdim=True) * p2 if unit else g2
        near(squares, g2.pow(2).sum(-1))
        m, v = 0.9 * m + 0.1 * g2 / 2, 0.999 * v + 0.001 * g2.pow(2) / 4
        p2 = p2 - size * m / (v.sqrt() / floor + 1e-8)
        p2 = torch.nn.functional.normalize(p2, dim=-1) if unit else p2
        near(first.view_as(p), m, moments)
        near(second.view_as(p), v, moments)
        near(p, p2, moments)


def noise_is_fair(device):
    """Rounded at random, a moment far below a rounding step of its format still grows."""
    p, grad = torch.zeros(16, 64, device=device), torch.ones(16, 64, device=device)
    first, second = (torch.ones(16 * 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    grad += 0.001  # second: 1 -> 1 + 2e-6 a step, where bfloat16 has steps of 8e-3
    grad *= 2
    for step in range(20):
        kernels.adam_rows(p, grad, first, second, None, 1.0, 0.0, 1.0, (0.9, 0.999), step)
    assert abs(float(second.double().mean()) - 4 + 3 * 0.999**20) < 0.01


def compile_all():
    """To machine code, in the formats that training takes; needs no device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    f32, i64 = "*fp32", "*i64"
    for t in ("*bf16", "*fp32"):
        sizes = {"BLOCK": 1024, "AT_ONCE": 4}
        rows = {
            "param": f32,
            "grad": f32,
            "first": t,
            "second": t,
            "along": f32,
            "width": "i32",
            "clip": "fp32",
        }
        rows |= dict.fromkeys(("size", "floor", "b1", "b2"), "fp32") | {"seed": "i32"}
        gathered = {
            "out": f32,
            "table": t,
            "index": i64,
            "weight": f32,
            "offsets": i64,
            "width": "i32",
        }
        dotted = {
            "out": f32,
            "x": t,
            "table": t,
            "rows": i64,
            "index": i64,
            "n": "i32",
            "width": "i32",
        }
        missed = {
            "error": t,
            "squares": f32,
            "dots": f32,
            "x": f32,
            "bias": f32,
            "table": t,
            "index": i64,
            "value": f32,
        }
        missed |= {"offsets": i64, "width": "i32"}
        bits = {"*bf16": "*i16", "*fp32": "*i32"}[t]
        chosen = {"out": i64, "pre": bits, "k": "i32", "width": "i32", "blocks": "i32"}
        blocks = {
            "BITS": 16 if bits == "*i16" else 32,
            "BLOCKS": 2048,
            "SIZE": 16,
            "K": 64,
            "AT_ONCE": 4,
        }
        squared = {"squares": f32, "along": f32, "grad": f32, "param": f32, "width": "i32"}
        for kernel, signature, constants in (
            (kernels._gather, gathered, sizes),
            (kernels._dots, dotted, sizes),
            (kernels._sums, {"out": f32, "values": f32, "offsets": i64}, {"BLOCK": 128}),
            (kernels._errors, missed, sizes),
            (kernels._largest, chosen, blocks),
            (kernels._row_norms, squared, {"UNIT": True, "BLOCK": 2048}),
            (kernels._adam_rows, rows, {"UNIT": True, "SHORT": t == "*bf16", "BLOCK": 2048}),
        ):
            source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
            built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
            assert built.asm["cubin"]


def main(device):
    if device == "compile":
        compile_all()
        print("same")
        return
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((5, 24, 16, 0.3), (3, 600, 40, 0.1), (4, 8, 8, 0.0), (2, 1030, 50, 0.9)):
            products(device, *shape, dtype)
        for shape in (
            (3, 48, 5),
            (2, 960, 8),
            (3, 37, 37),
            (2, 4608, 32),
            (2, 5003, 3),
            (2, 20_000, 100),
        ):
            largest(device, *shape, dtype)
        for unit in (False, True):
            update(device, 6, 40, unit, dtype)
            update(device, 3, 1030, unit, dtype)
    noise_is_fair(device)
    if device == "cuda":
        products(device, 512, 2048, 32_768, 0.002, torch.bfloat16)
        largest(device, 64, 32_768, 64, torch.bfloat16)
        largest(device, 64, 32_768, 64, torch.float32)
        largest(device, 16, 65_536, 64, torch.bfloat16)
    print("same")


if __name__ == "__main__":
    main(sys.argv[1])

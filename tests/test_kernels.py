"""Triton kernels under the interpreter, against the plain path in float64."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton exists for Linux only")

CHECK = """
import torch
from qsae_kit.sae import kernels
from qsae_kit.sae.codes import Codes

g = torch.Generator().manual_seed(0)
for rows, width, columns, share in ((5, 24, 16, 0.3), (3, 600, 40, 0.1), (4, 8, 8, 0.0)):
    f = torch.rand(rows, columns, generator=g) * (torch.rand(rows, columns, generator=g) < share)
    codes = Codes.from_flat(f.view(-1).nonzero().view(-1), rows, columns)
    values = f[codes.rows, codes.cols]
    x, W = torch.randn(rows, width, generator=g), torch.randn(columns, width, generator=g)
    offsets = torch.cat([codes.starts, torch.tensor([len(codes)])])
    close = dict(atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(kernels.gather(W, codes.cols, values, offsets), f.double() @ W.double(), **close)
    order, starts = codes.by_column()
    ends = torch.cat([starts, torch.tensor([len(codes)])])
    torch.testing.assert_close(kernels.gather(x, codes.rows[order], values[order], ends), f.double().T @ x.double(), **close)
    expected = (x.double() @ W.double().T)[codes.rows, codes.cols]
    torch.testing.assert_close(kernels.dots(x, W, codes.cols, offsets), expected, **close)
print("same")
"""


def test_the_kernels_give_the_plain_products():
    # The interpreter is chosen when triton is imported, so another process takes it.
    run = subprocess.run(
        [sys.executable, "-c", CHECK], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert run.stdout.strip() == "same", run.stderr[-2000:]

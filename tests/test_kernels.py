"""Triton kernels against the plain path in float64: interpreted everywhere, compiled where there is
a CUDA device.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton exists for Linux only")


@pytest.mark.parametrize("device", ["cpu", "compile", "cuda"])
def test_the_kernels_give_the_plain_products(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # The interpreter is chosen when triton is imported, so another process takes it.
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kernels_check.py")), device],
        env=os.environ | {"TRITON_INTERPRET": "1" if device == "cpu" else "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout.strip() == "same", run.stderr[-2000:]

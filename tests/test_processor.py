"""In which format products are made; the figures of processors are given, none is timed here."""

import pytest
import torch

from qsae_kit.io import processor
from qsae_kit.io.processor import CLEARLY_FASTER, faster_of, fastest_dtype

CPU = torch.device("cpu")


def never():
    raise AssertionError("timed, though the processor's features say it")


def figures(float32, bfloat16):
    return lambda: {torch.float32: float32, torch.bfloat16: bfloat16}


def test_amx_is_believed_and_so_is_its_lack_with_no_bfloat16_at_all():
    assert faster_of(amx=True, avx512_bf16=True, measured=never) == torch.bfloat16
    assert faster_of(amx=False, avx512_bf16=False, measured=never) == torch.float32


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"),
    [
        (0.096, 0.157, torch.float32),  # 240 and 147 GFLOP/s, as one such processor has them
        (0.1, 0.1, torch.float32),
        (CLEARLY_FASTER - 0.01, 1.0, torch.float32),
        (CLEARLY_FASTER, 1.0, torch.bfloat16),
        (0.2, 0.1, torch.bfloat16),
    ],
)
def test_avx512_alone_is_timed_and_the_exact_format_kept_unless_clearly_slower(
    float32, bfloat16, chosen
):
    measured = figures(float32, bfloat16)
    assert faster_of(amx=False, avx512_bf16=True, measured=measured) == chosen


def test_a_process_times_once(monkeypatch):
    timed = []
    monkeypatch.setattr(processor, "_has", lambda feature: feature == "avx512_bf16")
    monkeypatch.setattr(
        processor, "product_seconds", lambda: timed.append(1) or figures(2.0, 1.0)()
    )
    processor._of_this_cpu.cache_clear()
    try:
        assert [fastest_dtype(CPU) for _ in range(3)] == [torch.bfloat16] * 3
    finally:
        processor._of_this_cpu.cache_clear()
    assert timed == [1]


def test_timing_leaves_the_threads_as_they_were():
    threads = torch.get_num_threads()
    seconds = processor.product_seconds()
    assert set(seconds) == set(processor.TIMED)
    assert all(one > 0 for one in seconds.values())
    assert torch.get_num_threads() == threads


def test_other_devices_are_not_timed(monkeypatch):
    monkeypatch.setattr(processor, "_of_this_cpu", never)
    assert fastest_dtype(torch.device("meta")) == torch.float32
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, has=capability: has)
        assert fastest_dtype(torch.device("cuda")) == dtype

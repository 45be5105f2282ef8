"""Memory of this process and of its device: what is free, what was taken, what is given back."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class Peak:
    """The most memory that was taken since it was made, beyond what was taken then; on a CPU
    without pages of mapped files.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda)
        else:
            clear = Path("/proc/self/clear_refs")
            with suppress(OSError):
                clear.write_text("5")  # sets the high-water mark back to what is held now
        self.began = _status("RssAnon:") or 0
        """Bytes that the process held then beside mapped files."""

    @property
    def bytes(self) -> int | None:
        """None where the system does not say."""
        if self._cuda is not None:
            return torch.cuda.max_memory_allocated(self._cuda) - self._before
        # the weights of a model are read in as they are used
        peak, mapped = _status("VmHWM:"), _status("RssFile:")
        return None if peak is None or mapped is None else max(0, peak - mapped - self.began)


def _status(name: str) -> int | None:
    """A figure of this process in bytes."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's `mallopt`."""


def return_freed_memory() -> None:
    """Has glibc give blocks of 4 MiB and more back when they are freed; it would keep those of a
    forward pass, in pieces.
    """
    _mallopt(4 << 20, 4 << 20)


@contextmanager
def kept_memory(most: int | None) -> Iterator[Callable[[], None]]:
    """Within it, glibc keeps what is freed, up to blocks of 32 MiB; steps that want the same blocks
    again are faster so.

    It cannot use all of it again, so that more and more is kept: the function given, called between
    steps, gives what is free back where the process holds more than `most` bytes. At the end all
    goes back. None: nothing of this is wanted.
    """
    if most is None:
        yield lambda: None
        return
    _mallopt(32 << 20, 1 << 30)
    try:
        yield lambda: _trim() if (_status("RssAnon:") or 0) > most else None
    finally:
        return_freed_memory()
        _trim()


def _trim() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(mmap: int, trim: int) -> None:
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, mmap)
        libc.mallopt(M_TRIM_THRESHOLD, trim)


def free_memory(device: torch.device) -> int:
    """Nine tenths of the bytes that may still be taken on a device; on a CPU within the control
    group's limit.
    """
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    info = Path("/proc/meminfo")
    if info.exists():
        available = [
            line.split()
            for line in info.read_text().splitlines()
            if line.startswith("MemAvailable:")
        ]
        free += [int(words[1]) * 1024 for words in available]
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        stat = limit.with_name("memory.stat").read_text().split()
        reclaimable = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
        free.append(int(limit.read_text()) - int(used.read_text()) + reclaimable)
    return int(0.9 * min(free))

"""Memory of this process and of its device: what is free, what was taken, what is given back."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

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


NO_GLIBC = (OSError, AttributeError, TypeError)
"""What Windows, macOS and other libraries of C answer with."""


def _trim() -> None:
    with suppress(*NO_GLIBC):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(mmap: int, trim: int) -> None:
    with suppress(*NO_GLIBC):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, mmap)
        libc.mallopt(M_TRIM_THRESHOLD, trim)


def free_memory(device: torch.device) -> int:
    """Nine tenths of the bytes that may still be taken on a device; on others than CUDA of the
    machine's memory, within the limits of the process's control groups.

    Raises ValueError where the system does not say how much there is.
    """
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    free = [*_machine_memory(), *free_in_groups()]
    if not free:
        raise ValueError(
            "This system does not say how much memory is free; say how many bytes may be taken"
            " (memory)."
        )
    return int(0.9 * max(0, min(free)))


def _machine_memory() -> list[int]:
    """Bytes of the machine, and those that are free, as far as the system says."""
    free = []
    with suppress(AttributeError, ValueError, OSError):  # Windows; names that are not there
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    info = Path("/proc/meminfo")
    if info.exists():
        lines = [line.split() for line in info.read_text().splitlines()]
        free += [int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"]
    if not free:
        with suppress(AttributeError, OSError):
            free.append(_windows_memory())
    return free


class _MemoryStatus(ctypes.Structure):
    """Windows's MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("physical", ctypes.c_uint64),
        ("free_physical", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def _windows_memory() -> int:
    """Free bytes of a Windows machine; AttributeError on others."""
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009  type checkers have none elsewhere
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return int(status.free_physical)


class _Controller(NamedTuple):
    """The files in which a version of control groups keeps memory."""

    limits: tuple[str, ...]
    used: str
    reclaimable: str
    """An entry of memory.stat: pages of files that go before anything is killed."""


CONTROLLERS = {
    "cgroup2": _Controller(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": _Controller(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"
    ),
}
"""By the type of the file system that shows them: version 2 and 1."""


def free_in_groups(root: Path = Path("/")) -> list[int]:
    """Bytes that the process's own control group and each one above it still allow; none where
    there is no limit. root: below which /proc and /sys lie.
    """
    free = []
    for controller, group, top in _own_groups(root):
        for folder in (group, *group.parents):
            free += _free_in(folder, controller)
            if folder == top:
                break
    return free


def _own_groups(root: Path) -> Iterator[tuple[_Controller, Path, Path]]:
    """The folders of the process's own groups with memory, and those of the highest that can be
    seen; a container sees its own group as the highest.
    """
    with suppress(OSError):
        own = [line.split(":", 2) for line in _lines(root / "proc/self/cgroup")]
        for mount in _lines(root / "proc/self/mountinfo"):
            before, _, after = mount.partition(" - ")
            kind, words = after.split(" ")[0], before.split(" ")
            if kind not in CONTROLLERS or len(words) < 5:
                continue
            seen, top = PurePosixPath(words[3]), root / words[4].lstrip("/")
            for number, controllers, path in (parts for parts in own if len(parts) == 3):
                v2 = number == "0" and not controllers
                if v2 if kind == "cgroup2" else "memory" in controllers.split(","):
                    below = PurePosixPath(path)
                    inside = below.is_relative_to(seen) and ".." not in below.parts
                    folder = top / below.relative_to(seen) if inside else top
                    yield CONTROLLERS[kind], folder, top


def _free_in(folder: Path, controller: _Controller) -> list[int]:
    with suppress(OSError, ValueError):
        told = [
            text
            for name in controller.limits
            if (path := folder / name).exists() and (text := path.read_text().strip()).isdigit()
        ]
        if told:
            stat = (folder / "memory.stat").read_text().split()
            name = controller.reclaimable
            reclaimable = int(stat[stat.index(name) + 1]) if name in stat else 0
            used = int((folder / controller.used).read_text())
            return [min(map(int, told)) - used + reclaimable]
    return []


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()

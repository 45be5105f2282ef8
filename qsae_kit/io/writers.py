"""One writer a folder or file: whoever writes one holds it, and a second one is told who does.

The lock is the operating system's (flock) and goes with the process, however that ends, so that
what a dead one held is free at once. The lock's file says who holds it, and is taken away at the
end.
"""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep

from qsae_kit.io.files import OWN, check_file, check_folder, check_writable, tag

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = f"{OWN}lock"
_POLL = 0.05
VANISHING = 5.0
"""Seconds to go on with a folder that others take away."""
_SAID = 2048
"""Bytes that are read of what a lock's file says."""


class _Hold:
    """A lock that is held; dead from the moment on at which it was given back, and in forked copies
    of the process.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.process, self._left = path, os.getpid(), False

    @property
    def alive(self) -> bool:
        return not self._left and self.process == os.getpid()

    def leave(self, descriptor: int | None) -> None:
        """Gives the lock back; a forked copy of the process leaves it to whom it was copied
        from.
        """
        own, self._left = self.alive, True
        _holds.set(tuple(hold for hold in _holds.get() if hold is not self))
        if descriptor is not None:
            if own:
                with suppress(OSError):  # another user's stays
                    self.path.unlink()  # while it is held, so that who opened it before sees it
            os.close(descriptor)


_holds: ContextVar[tuple[_Hold, ...]] = ContextVar("holds", default=())


@contextmanager
def only_writer(folder: Path | None, wait: float = 0.0) -> Iterator[None]:
    """Holds a folder, which is made where it is not there (and goes again if it stays empty); what
    runs inside may enter again.

    folder: None holds nothing. wait: seconds to wait for another writer. Raises ValueError where
    another process or thread writes there.
    """
    if folder is None:
        yield
        return
    check_folder(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    _make(folder)
    try:
        with _holding(folder / LOCK, folder, wait):
            yield
    finally:
        with suppress(OSError):  # one that is not empty stays
            for path in missing:
                path.rmdir()


@contextmanager
def only_writer_of(path: Path, wait: float = 0.0) -> Iterator[None]:
    """The same of one file, or of a folder that is replaced as a whole: the lock lies beside it."""
    check_writable(path)
    missing = [parent for parent in path.parents if not parent.exists()]
    _make(path.parent)
    try:
        with _holding(path.with_name(f"{LOCK}-{tag(path)}"), path, wait):
            yield
    finally:
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()


def _make(folder: Path) -> None:
    """Makes a folder, while others may take it or its parents away as they are empty."""
    until = monotonic() + VANISHING
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return
        except FileNotFoundError:
            if monotonic() > until:
                raise


@contextmanager
def _holding(lock: Path, what: Path, wait: float) -> Iterator[None]:
    lock = lock.parent.resolve() / lock.name
    if fcntl is None or any(hold.path == lock for hold in _holds.get() if hold.alive):
        yield
        return
    descriptor = _acquire(lock, what, wait)
    hold = _Hold(lock)
    _holds.set((*_holds.get(), hold))
    try:
        yield
    finally:
        hold.leave(descriptor)


def _acquire(lock: Path, what: Path, wait: float) -> int | None:
    """The descriptor of a lock that is held; None where the file system has no locks."""
    until = monotonic() + wait
    while True:
        check_file(lock)
        try:
            descriptor, own = _opened(lock)
        # another writer left the folder, and took it away as it was empty
        except FileNotFoundError:
            if monotonic() > until + VANISHING:
                raise
            _make(lock.parent)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = _who(os.pread(descriptor, _SAID, 0))
            os.close(descriptor)
            if monotonic() < until:
                sleep(_POLL)
                continue
            raise ValueError(
                f"{str(what)!r} is being written by {who}; wait until that is done, or give another"
                " place."
            ) from error
        except OSError:
            os.close(descriptor)
            lock.unlink(missing_ok=True)
            return None
        if _is_still(lock, descriptor):
            if own:
                _say_who(descriptor)
            return descriptor
        os.close(descriptor)  # its owner took it away in between


def _opened(lock: Path) -> tuple[int, bool]:
    """A lock's file, and whether it may be written: another user's that is left over may only be
    read.
    """
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT | flags, 0o666), True
    except PermissionError:
        if not lock.exists():
            raise
        return os.open(lock, os.O_RDONLY | flags), False


def _is_still(lock: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    return False


def _say_who(descriptor: int) -> None:
    about = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join([Path(sys.argv[0] or "python").name, *sys.argv[1:2]]),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)


def _who(said: bytes) -> str:
    """Whoever a lock's file names, as part of a sentence."""
    try:
        about = json.loads(said)
        process, host, command, since = (
            str(about[name])[:80] for name in ("process", "host", "command", "since")
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
    return f"process {process} on {host} ({command}, since {since})"

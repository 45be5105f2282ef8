"""A lock that belongs to a context, so that a thread started on behalf of another may enter what that one holds."""

import threading
from contextvars import ContextVar
from types import TracebackType


class ContextLock:
    """Re-entrant within a context (`contextvars`), and in threads that run in a copy of it; others wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth: ContextVar[int] = ContextVar("depth", default=0)

    @property
    def held(self) -> bool:
        """Whether this context holds it."""
        return self._depth.get() > 0

    def acquire(self, blocking: bool = True) -> bool:
        depth = self._depth.get()
        if depth == 0 and not self._lock.acquire(blocking):
            return False
        self._depth.set(depth + 1)
        return True

    def release(self) -> None:
        depth = self._depth.get()
        if depth == 0:
            raise RuntimeError("This context does not hold the lock.")
        self._depth.set(depth - 1)
        if depth == 1:
            self._lock.release()

    def __enter__(self) -> "ContextLock":
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

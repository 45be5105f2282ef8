"""Interrupts that wait for a good moment: the end of a step, with a checkpoint."""

import signal
import threading
from typing import Any

from qsae_kit.io.progress import say

TERMINATED = 128 + signal.SIGTERM
"""The exit code of a process that SIGTERM ended, as a shell tells it."""


class Interrupts:
    """Within it, an interrupt (Ctrl-C, a notebook's stop button) or SIGTERM (a cluster's, a machine
    that goes) is noted and waits.

    A second one does not wait. On leaving, SIGTERM does what it would have done without: it ends
    the process, here by SystemExit, so that locks and files are given back.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self._stop = stop or threading.Event()
        self._terminated = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether to stop at the next good moment."""
        return self._stop.is_set()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: object) -> None:
        self._terminated |= number == signal.SIGTERM
        if self.asked:
            raise KeyboardInterrupt
        self._stop.set()
        say("Stopping after this step; interrupt again to stop at once.")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # one that was not set from Python stays replaced
                signal.signal(number, handler)
        before = self._before.get(signal.SIGTERM)
        if self._terminated and callable(before):
            before(signal.SIGTERM, None)
        elif self._terminated and before != signal.SIG_IGN:
            raise SystemExit(TERMINATED)

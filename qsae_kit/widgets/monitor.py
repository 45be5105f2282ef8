"""TrainingMonitor: a training in a thread of its own, drawn while it runs, with a button that stops
it.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import traitlets as T

from qsae_kit.sae.suites import Suite
from qsae_kit.train.run import Progress
from qsae_kit.train.watch import LiveFigure
from qsae_kit.widgets.plots import PlotView
from qsae_kit.widgets.widget import source

STEP = 0.1
"""Seconds of one wait for the training, between which an interrupt is seen."""


class TrainingMonitor(PlotView):
    """Runs a training beside the notebook: cells can be run meanwhile, and Stop leaves valid SAEs
    (and a checkpoint).

    train: takes keyword arguments `watch` and `stop` and trains, such as
    `functools.partial(train_saes, source, configs, model_name="tiny", bar=False)`. It starts at
    once, or with `autostart=False` at the button. `result()` waits for it and returns what it
    trained, or raises what it raised.
    """

    _esm = source("monitor.js", "plots.js")
    running = T.Bool(False).tag(sync=True)

    def __init__(
        self, train: Callable[..., Suite], seconds: float = 2.0, autostart: bool = True
    ) -> None:
        self._train, self._seconds = train, seconds
        self._stop, self._ended, self._thread = threading.Event(), threading.Event(), None
        self._live = LiveFigure(seconds, self._draw)
        self._progress: Progress | None = None
        self._heard = 0
        self._suite: Suite | None = None
        self._error: BaseException | None = None
        super().__init__(status="Not started.")
        if autostart:
            self.start()

    _thread: threading.Thread | None

    def start(self) -> None:
        """Starts, or goes on where the training can; ValueError while it runs."""
        if self.running:
            raise ValueError("The training is running; stop it before you start it again.")
        self._stop.clear()
        self._ended.clear()
        self._suite, self._error = None, None
        self._live = LiveFigure(self._seconds, self._draw)
        self.running, self.status = True, "Starting."
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Asks the training to end after its step."""
        self._stop.set()
        if self.running:
            self.status = "Stopping after this step."

    def result(self, timeout: float | None = None) -> Suite:
        """The trained SAEs by variant and hook name, when the training has ended; the notebook's
        stop button ends it as `stop` does, and a second time the waiting. timeout: seconds. Raises
        TimeoutError where it has not ended.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        # not by join, which takes the thread for ended once it was interrupted (Python 3.11)
        while self._thread is not None and not self._ended.is_set():
            if (left := until - time.monotonic()) <= 0:
                break
            try:
                self._ended.wait(min(left, STEP))
            except KeyboardInterrupt:
                if self._stop.is_set():
                    raise
                self.stop()
        if self.running or self._thread is None:
            raise TimeoutError("The training has not ended; wait longer, or stop it.")
        if self._error is not None:
            raise self._error
        assert self._suite is not None
        return self._suite

    def _work(self) -> None:
        try:
            self._suite = self._train(watch=[self._watch], stop=self._stop)
            self.status = (
                "Stopped: the SAEs are as they were then." if self._stop.is_set() else "Done."
            )
        except BaseException as error:  # shown here and raised again by result()
            self._error = error
            self.status = f"{type(error).__name__}: {error}"
        finally:
            self.running = False
            self._ended.set()

    def _watch(self, progress: Progress) -> None:
        self._progress = progress
        self._live(progress)

    def _draw(self, figure: go.Figure) -> None:
        assert self._progress is not None
        rows, total = (
            self._progress.rows,
            next(iter(self._progress.trainers.values())).config.tokens,
        )
        self.show(figure)
        self.status = (
            f"{rows:,} of {total:,} rows, {rows / max(self._progress.seconds, 1e-9):,.0f} a second."
        )

    def to_frame(self) -> pd.DataFrame:
        """The log so far: group, rows, variant, hook_name, loss, l0, dead."""
        return pd.DataFrame(list(self._live.table))  # a copy: the training adds to it

    def hear(self, message: Mapping[str, Any]) -> None:
        if message.get("op") == "stop":
            self._heard += 1
            self._stop.set()

    def handle(self, message: Mapping[str, Any]) -> None:
        super().handle(message)
        if message.get("op") == "stop":
            if not self._heard:
                self.stop()
            self._heard = max(0, self._heard - 1)  # done, perhaps long ago
        elif message.get("op") == "start":
            self.start()

    def __repr__(self) -> str:
        return f"TrainingMonitor({'running' if self.running else self.status})"

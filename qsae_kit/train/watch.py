"""Where a running training is shown: a live figure in a notebook, TensorBoard, Weights & Biases.

Each is called with every `train.run.Progress` (give them to `train_saes` as `watch`) and looks at
some of them.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import pandas as pd
import plotly.graph_objects as go
from IPython.display import display

from qsae_kit.figures.basic import training_figure
from qsae_kit.io.checkpoints import LOG
from qsae_kit.io.jsonfiles import parse_json, read_bytes
from qsae_kit.train.run import LOG_EVERY, Progress

LOG_LIMIT = 2**30
"""Bytes of a log."""
Figures: TypeAlias = Mapping[str, Mapping[str, float]]
"""What `Progress.figures` gives: loss, L0 and dead share by "variant/hook name"."""


def _rows(group: int, rows: int, figures: Figures) -> list[dict[str, Any]]:
    out = []
    for key, own in figures.items():
        variant, _, hook_name = key.partition("/")
        out.append(
            {"group": group, "rows": rows, "variant": variant, "hook_name": hook_name, **own}
        )
    return out


def read_log(folder: str | Path) -> pd.DataFrame:
    """The log of a run as a table: group, rows, variant, hook_name, loss, l0, dead; a line that is
    still written is left out.

    Raises ValueError where there is none, or a line is none of a log.
    """
    path = Path(folder) / LOG
    *whole, _ = read_bytes(path, "a training's log", LOG_LIMIT).split(b"\n")
    lines = [
        parse_json(line.decode("utf-8", errors="replace"), f"{str(path)!r}, line {n},")
        for n, line in enumerate(whole, 1)
    ]
    if not all(
        isinstance(line, dict) and {"group", "rows", "sites"} <= set(line) for line in lines
    ):
        raise ValueError(f"{str(path)!r} is no log of a training; give the folder of a run.")
    return pd.DataFrame(
        [row for line in lines for row in _rows(line["group"], line["rows"], line["sites"])]
    )


@runtime_checkable
class Watcher(Protocol):
    """Anything that is called after each step."""

    def __call__(self, progress: Progress) -> None: ...


class LiveFigure:
    """Loss, L0 and dead share per site, drawn again every `seconds` in the cell that trains.

    It is drawn between steps from the cell's own thread, so the kernel's stop button works as ever:
    training ends after its step and leaves its SAEs, and a checkpoint where it has a folder.
    """

    def __init__(
        self, seconds: float = 3.0, show: Callable[[go.Figure], None] | None = None
    ) -> None:
        """show: what to do with each figure, in place of drawing it in the cell."""
        self.seconds, self.show = seconds, show or self._in_cell
        self.table: list[dict[str, Any]] = []
        self._steps = 0
        self._drawn = -float("inf")
        self._handle: Any = None

    def __call__(self, progress: Progress) -> None:
        self._steps += 1
        due = time.monotonic() - self._drawn >= self.seconds
        if self._steps % LOG_EVERY == 1 or due or progress.last:
            self.table += _rows(progress.group, progress.rows, progress.figures())
        if due or progress.last:
            configs = {
                variant: trainer.config for (variant, _), trainer in progress.trainers.items()
            }
            self._draw(
                {variant: config.sparsity for variant, config in configs.items() if config.targeted}
            )
            self._drawn = time.monotonic()

    def _draw(self, targets: Mapping[str, float]) -> None:
        self.show(training_figure(pd.DataFrame(self.table), targets))

    def _in_cell(self, figure: go.Figure) -> None:
        # as data: a figure that displays itself knows no display_id, and a new one comes each time
        data = figure._repr_mimebundle_()
        if not data:  # a renderer that opens a page of its own
            display(figure)
        elif self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class TensorBoard:
    """Scalars of every site, every `LOG_EVERY` steps, in `folder`; needs the package
    tensorboard.
    """

    def __init__(self, folder: str | Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "Watching with TensorBoard was asked for, and it is not installed; pip install"
                " tensorboard."
            )
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self._steps = 0

    def __call__(self, progress: Progress) -> None:
        self._steps += 1
        if self._steps % LOG_EVERY and not progress.last:
            return
        for key, own in progress.figures().items():
            for name, value in own.items():
                self._writer.add_scalar(f"{key}/{name}", value, progress.rows)
        if progress.last:
            self._writer.flush()


class WandB:
    """Scalars of every site, every `LOG_EVERY` steps, in a run of Weights & Biases that it starts;
    needs the package wandb.
    """

    def __init__(self, folder: str | Path, project: str = "qsae_kit") -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "Watching with Weights & Biases was asked for, and it is not installed; pip install"
                " wandb."
            )
        import wandb

        Path(folder).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project=project, dir=str(folder))
        self._steps = 0

    def __call__(self, progress: Progress) -> None:
        self._steps += 1
        if self._steps % LOG_EVERY == 0 or progress.last:
            figures = {
                f"{key}/{name}": value
                for key, own in progress.figures().items()
                for name, value in own.items()
            }
            self._run.log({**figures, "rows": progress.rows, "group": progress.group})


WATCHERS = {"tensorboard": TensorBoard, "wandb": WandB}

"""What the commands share beside their options: places that are held while they are written, models
with what is said of them, and tables on a terminal.
"""

import signal
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import pandas as pd

    from qsae_kit.lm.hooked import HookedLM
    from qsae_kit.steer.study import StudyResult

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of a command that was interrupted, as Typer gives it too."""
PAGE_WIDTH, PAGE_ROWS = 76, 500
"""Characters and rows of a table that is printed."""
running: ContextVar[typer.Context] = ContextVar("running")


def write_to(folder: Path) -> None:
    """Holds a folder for results until the command ends. ValueError before any work where it cannot
    be written, or is held.
    """
    from qsae_kit.io.writers import only_writer

    check_out(folder)
    _hold(only_writer(folder))


def write_file(path: Path) -> None:
    """The same for a single file, or a folder that appears as a whole."""
    from qsae_kit.io.files import check_writable
    from qsae_kit.io.writers import only_writer_of

    check_writable(path)
    check_out(path.parent)
    _hold(only_writer_of(path))


def _hold(lock: AbstractContextManager[None]) -> None:
    running.get().with_resource(lock)


def check_out(folder: Path) -> None:
    """ValueError for a folder that cannot be written to."""
    import os

    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"{str(folder)!r} cannot be written to: {str(existing)!r} is not a writable folder;"
            " choose another --out."
        )


def loaded(model: str, dtype: str, device: str | None) -> "HookedLM":
    """A model on a device. Raises ValueError for a device that is not there and as `load_model`."""
    from qsae_kit.lm.hooked import load_model

    return load_model(model, dtype, device)


def sites_at(places: Sequence[str] | None) -> list[str]:
    """Patterns of hook names for `load_suite`."""
    from qsae_kit.sites import hook_patterns

    return [name for place in places or () for name in hook_patterns(place)]


def one_site(place: str) -> str:
    """The hook name of one site, such as resid@15. Raises ValueError for none or several."""
    names = sites_at([place])
    if len(names) != 1 or "*" in names[0]:
        raise ValueError(f"--at {place} was given; give one kind and one layer, such as resid@15.")
    return names[0]


def page(table: "pd.DataFrame", digits: int = 4) -> str:
    """A table as text."""
    import pandas as pd

    with pd.option_context("display.max_columns", 30, "display.max_rows", PAGE_ROWS):
        return table.round(digits).to_string(index=False, na_rep="", line_width=PAGE_WIDTH)


def wrapped(text: str) -> str:
    """A text in lines that fit, broken between words; what would act on the terminal is told."""
    from qsae_kit.figures.pages import visible

    kept = visible(text.replace("\n", " ")).replace(" %", "\u00a0%")
    filled = textwrap.fill(kept, PAGE_WIDTH, break_long_words=False, break_on_hyphens=False)
    return filled.replace("\u00a0", " ")


def study_page(study: "StudyResult") -> str:
    """What a study found, as a small table under a line that says what it shows."""
    from qsae_kit.steer.report import gains

    h = study.headline
    shown = "refused" if study.behaviour == "refusal" else f"showing {study.behaviour!r}"
    return (
        f"{study.config.goal} {study.behaviour}: share {shown}, {h['n']} {h['target']} prompts;"
        f"\nKL: nats at the first token of {h['priced_on']} ones\n{page(gains(study))}"
    )

"""Writing files so that a failure leaves nothing half-written: a temporary neighbour, fsync, rename."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write; on success it becomes `path`, on any error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        _sync(part)
        os.chmod(part, 0o644)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill; on success it replaces `path`, on any error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield part
        for file in part.iterdir():
            _sync(file)
        os.chmod(part, 0o755)
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
        try:
            if path.exists():
                os.replace(path, old)  # an empty folder is replaced by a folder
            os.replace(part, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


_PART = re.compile(r"\..+\.[a-z0-9_]{8}")
"""What `atomic_file` and `atomic_folder` call what is not whole yet."""


def sweep(folder: Path) -> None:
    """Deletes what writes that were killed left in a folder and below it."""
    for part in [path for path in folder.rglob(".*") if _PART.fullmatch(path.name)]:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Writes a table atomically, as Parquet or CSV by the path's suffix."""
    with atomic_file(path) as part:
        if path.suffix == ".parquet":
            table.to_parquet(part, index=False)
        else:
            table.to_csv(part, index=False, float_format="%.6g")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")

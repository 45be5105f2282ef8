"""Writing files so that a failure leaves nothing half-written, and nothing of the user's gone.

Everything is written beside its place under a temporary name of this package's own, synced and
renamed. What a killed write left is swept by the next write of the same file or folder, and nothing
else ever is.
"""

import csv
import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

OWN = ".qsae-"
"""How the names begin that this package gives to files which are not results."""
PART, ASIDE = f"{OWN}part-", f"{OWN}aside-"
"""What is not whole yet, and what makes room for it."""
LONGEST_NAME = 255
"""Bytes of a file's name on common file systems."""
SHORT_ENOUGH = 200
"""Bytes of a name that may stand in a temporary one; of longer ones a checksum stands there."""
WINDOWS = sys.platform == "win32"


def _codes(names: str) -> frozenset[int]:
    """Error numbers by name, of those that this system has."""
    return frozenset(getattr(errno, name) for name in names.split() if hasattr(errno, name))


UNSYNCED = _codes("EINVAL ENOTSUP EOPNOTSUPP ENOSYS")
"""What file systems say that sync nothing."""
BROKEN = _codes("EIO ENOSPC EDQUOT")
"""What is wrong with a disk, of whatever it is said."""


# --- names


def checked_name(name: Any, what: str) -> str:
    """A name that comes from a file or a user and becomes one part of a path.

    Raises ValueError, beginning with `what`, for what is no plain name: separators, drives, control
    characters, a leading dot, more than 255 bytes.
    """
    if not _is_name(name):
        raise ValueError(
            f"{what} has the name {str(name)[:80]!r}; a name holds no separator, drive or control"
            f" character, begins with no dot and has at most {LONGEST_NAME} bytes; rename it."
        )
    return name


def _is_name(name: Any) -> bool:
    if not isinstance(name, str) or not name or name[0] == "." or name != name.strip():
        return False
    if any(letter in "/\\:" or unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        return False
    return len(name.encode()) <= LONGEST_NAME


def inside(folder: Path, name: Any, what: str) -> Path:
    """The path of a file below a folder, from its name there with / between the parts.

    Raises ValueError, beginning with `what`, where a part is no plain name (`checked_name`) or a
    link leads out of the folder.
    """
    parts = name.split("/") if isinstance(name, str) else [name]
    path = folder.joinpath(*(checked_name(part, what) for part in parts))
    try:
        leaves = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        leaves = True
    if leaves:
        raise ValueError(
            f"{what} names {name!r}, a link that leads out of its folder; take the link away."
        )
    return path


# --- what may be written to


def check_writable(path: Path) -> None:
    """ValueError where a path is there and is neither a regular file nor a folder: a link, a
    device, a pipe, a socket.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(mode):
        raise ValueError(f"{str(path)!r} is a link; give what it points to, or another name.")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{str(path)!r} is a device, a pipe or a socket; give the name of a file.")


def check_file(path: Path) -> None:
    """ValueError where a path is there and is no regular file."""
    check_writable(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give the name of a file.")


def check_folder(path: Path) -> None:
    """ValueError where a path is there and is no folder; a link to one is one."""
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"{str(path)!r} is not a folder; give the name of one.")


# --- whole or not at all


def _sync(path: Path) -> None:
    """Has a file, or the names in a folder, reach the disk.

    A folder is synced where that can be done: network and Windows file systems sync or even open
    none, and what is in it is written all the same.
    """
    folder = path.is_dir()
    try:
        # Windows syncs only what is open for writing
        descriptor = os.open(path, os.O_RDWR if WINDOWS and not folder else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in BROKEN or not (folder or error.errno in UNSYNCED):
            raise


def tag(path: Path) -> str:
    """A path's last part, or its checksum where it is too long to stand in another name."""
    name = path.name
    return (
        name
        if len(os.fsencode(name)) <= SHORT_ENOUGH
        else hashlib.sha256(os.fsencode(name)).hexdigest()
    )


def _new_part(path: Path) -> Path:
    return path.with_name(f"{PART}{secrets.token_hex(4)}-{tag(path)}")


def _parts_of(path: Path) -> list[Path]:
    tail = f"-{tag(path)}"
    length = len(PART) + 8 + len(tail)
    with os.scandir(path.parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(PART)]
    return [path.with_name(name) for name in names if name.endswith(tail) and len(name) == length]


@contextmanager
def _held(part: Path) -> Iterator[None]:
    """Marks a part as being written: the mark goes with this process, however it ends."""
    descriptor = None
    if fcntl is not None:  # elsewhere nothing is swept, and what is open could not be renamed
        # file systems without locks, or that open no folders: nothing is swept there either
        with suppress(OSError):
            descriptor = os.open(part, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_if_abandoned(part: Path) -> None:
    """Deletes a part that no process is writing."""
    if fcntl is None:
        return
    try:
        descriptor = os.open(part, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(part)
    except OSError:  # it is being written
        pass
    finally:
        os.close(descriptor)


def sweep(path: Path) -> None:
    """Clears what killed writes of this very file or folder left beside it; an old folder that had
    made room comes back.
    """
    if not path.parent.is_dir():
        return
    for part in _parts_of(path):
        _remove_if_abandoned(part)
    aside = _aside_of(path)
    if aside.is_dir() and not aside.is_symlink():
        if path.exists():
            _merge(aside, path)
        else:
            os.replace(aside, path)


def sweep_folder(folder: Path, pattern: str) -> None:
    """`sweep` of every file or folder directly in a folder whose name matches a pattern, whole by
    now or not.
    """
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith((PART, ASIDE))]
    for name in names:
        target = name.removeprefix(ASIDE) if name.startswith(ASIDE) else name[len(PART) + 9 :]
        if target and Path(target).match(pattern):
            sweep(folder / target)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write; on success it becomes `path`, on any error it is removed.

    A file that is replaced keeps its permissions, a new one gets the process's (umask). Raises
    ValueError where `path` is a link, a folder, a device or a pipe.
    """
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    part = _new_part(path)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        with _held(part):
            yield part
            _sync(part)
            if path.exists():
                os.chmod(part, stat.S_IMODE(path.stat().st_mode))
            os.replace(part, path)
            _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill; on success it takes the place of `path`, on any error it is
    removed.

    What the old folder held and the new one does not stays there. The old one is there until the
    new one is. Raises ValueError where `path` is there and is no folder.
    """
    check_writable(path)
    check_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    part = _new_part(path)
    part.mkdir()
    try:
        with _held(part):
            yield part
            for file in part.rglob("*"):
                _sync(file)
            if path.exists():
                _swap(part, path)
            else:
                os.replace(part, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def discard_folder(path: Path) -> None:
    """Deletes a folder of this package's own, which is there whole or not at all meanwhile."""
    part = _new_part(path)
    os.replace(path, part)  # what a kill leaves of it is swept
    shutil.rmtree(part, ignore_errors=True)


def _aside_of(path: Path) -> Path:
    return path.with_name(f"{ASIDE}{tag(path)}")


def _swap(new: Path, path: Path) -> None:
    """Puts a folder in the place of another one, which is never missing where the system can
    exchange names.
    """
    aside = _aside_of(path)
    os.chmod(new, stat.S_IMODE(path.stat().st_mode))
    os.replace(new, aside)
    if not _exchange(aside, path):
        os.replace(aside, new)
        os.replace(path, aside)
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(aside, path)
            raise
    _merge(aside, path)


def _merge(old: Path, path: Path) -> None:
    """Moves what only the old folder has to the new one, and deletes the rest of the old one."""
    _keep(old, path)
    shutil.rmtree(old, ignore_errors=True)


def _keep(old: Path, path: Path) -> None:
    for entry in list(old.iterdir()):
        place = path / entry.name
        if not os.path.lexists(place):
            os.replace(entry, place)
        elif (
            entry.is_dir() and place.is_dir() and not entry.is_symlink() and not place.is_symlink()
        ):
            _keep(entry, place)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two names at once (Linux, most file systems); False where that cannot be done."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return (
        rename is not None
        and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0
    )


# --- tables and texts

FORMULA = "=+-@\t\r\n＝＋－＠"
"""What a cell begins with that spreadsheets run."""


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Writes a table atomically, as Parquet or CSV by the path's suffix.

    In a CSV, texts that a spreadsheet would take for a formula begin with an apostrophe.
    """
    with atomic_file(path) as part:
        if path.suffix == ".parquet":
            table.to_parquet(part, index=False)
        else:
            inert = _inert(table)
            # The csv module leaves a carriage return bare, which ends a line for whoever reads it.
            bare = any(
                "\r" in cell for name in inert for cell in inert[name] if isinstance(cell, str)
            )
            inert.to_csv(
                part,
                index=False,
                float_format="%.6g",
                quoting=csv.QUOTE_NONNUMERIC if bare else csv.QUOTE_MINIMAL,
            )


def _inert(table: pd.DataFrame) -> pd.DataFrame:
    """The table with texts that no spreadsheet runs."""
    table = table.rename(columns=_as_text)
    for name in table:
        if not pd.api.types.is_numeric_dtype(table[name]):
            table[name] = table[name].map(_as_text)
    return table


def _as_text(cell: Any) -> Any:
    if not isinstance(cell, str) or cell[:1] not in FORMULA or not cell:
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")

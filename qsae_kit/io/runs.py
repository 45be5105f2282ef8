"""A run that can be cut off: what it is, what of it is done, and which files are its own.

One rule for all that write for long: a folder that holds the same run is gone on with, one that
holds another is refused, and what no record names is the user's and stays.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qsae_kit.io.files import check_file, inside, write_text
from qsae_kit.io.jsonfiles import read_json

HASHED = 64 * 2**20
"""Bytes up to which a file's checksum is looked at again; of larger ones the size."""
SHOWN = 60
"""Characters of a value that a sentence shows."""


def plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as a file gives it back: tuples are lists."""
    return json.loads(json.dumps(identity))


def check_same(where: Path, what: str, given: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """ValueError with the first entry in which two identities differ; where: what holds the
    stored one, what: what it is of.
    """
    found = _first_difference(plain(given), stored)
    if found is None:
        return
    name, now, then = found
    raise ValueError(
        f"{str(where)!r} is of another {what}: {name} is {now} now and was {then} there; give the"
        " same, or another folder, or start anew (--fresh, or fresh=True)."
    )


_ABSENT = object()


def _first_difference(given: Any, stored: Any, name: str = "") -> tuple[str, str, str] | None:
    """The name, with dots, of the first entry that differs, and both values in short."""
    if isinstance(given, list) and isinstance(stored, list):
        given, stored = dict(enumerate(given)), dict(enumerate(stored))
    if isinstance(given, dict) and isinstance(stored, dict):
        for key in dict.fromkeys((*given, *stored)):
            now, then = given.get(key, _ABSENT), stored.get(key, _ABSENT)
            found = _first_difference(now, then, f"{name}.{key}" if name else str(key))
            if found is not None:
                return found
        return None
    # in JSON, true is not 1
    if given is _ABSENT or stored is _ABSENT or json.dumps(given) != json.dumps(stored):
        return name, _short(given), _short(stored)
    return None


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def check_free(folder: Path, names: Sequence[str], what: str) -> None:
    """ValueError where one of these files (names or patterns) lies in a folder without a record of
    its run, so that it is the user's.
    """
    there = [path for name in names for path in _matching(folder, name)]
    if there:
        raise ValueError(
            f"{str(there[0])!r} is of no {what}, and would be written over; take it away, or give"
            " another folder."
        )


def _matching(folder: Path, name: str) -> list[Path]:
    if "*" in name:
        return sorted(folder.glob(name))
    return [folder / name] if os.path.lexists(folder / name) else []


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Run:
    """The record of a run in a folder: identity, and finished stages with sizes and checksums of
    their files.

    The record is one JSON file, written whole before anything else is, so that whatever a kill
    leaves is known to be the run's.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        files: Sequence[str],
        *,
        name: str,
        what: str,
        fresh: bool = False,
    ) -> None:
        """Reads the record; nothing is written or deleted before `begin`.

        identity: what a run has to have in common with the one that it goes on with. files: names
        below the folder that the run writes; patterns (with *) may be among them. name: of the
        record. what: the kind of run, for messages. fresh: whether a run that is there makes room
        for this one.

        Raises ValueError where the folder holds another run and `fresh` is not given, for a record
        that is none, and where files of these names are there without a record.
        """
        self.folder, self.path, self.what = folder, folder / name, what
        self.identity, self.files = plain(identity), list(files)
        self.stages: dict[str, dict[str, dict[str, Any]]] = {}
        self._replaced: list[str] | None = None
        check_file(self.path)
        if not self.path.exists():
            check_free(folder, self.files, what)
            return
        stored = self._read()
        if not fresh:
            check_same(self.path, what, self.identity, stored["run"])
            self.stages = stored["stages"]
            return
        noted = {name: told for files in stored["stages"].values() for name, told in files.items()}
        for entry, told in noted.items():
            path = self._inside(entry)
            if os.path.lexists(path) and not _as_it_was(path, told):
                raise ValueError(
                    f"{str(path)!r} was changed since it was made, so it stays, and the {what} is"
                    " not started anew; move it elsewhere, or give another folder."
                )
        self._replaced = [*noted, *stored.get("files", [])]
        own = {path for entry in self._replaced for path in [self._inside(entry)]}
        check_free(folder, [name for name in self.files if folder / name not in own], what)

    def _read(self) -> dict[str, Any]:
        entry = read_json(self.path, f"the record of a {self.what}")
        wrong = f"{str(self.path)!r} is no record of a {self.what}; give another folder."
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(name), dict) for name in ("run", "stages")
        ):
            raise ValueError(wrong)
        planned = entry.get("files", [])
        if not isinstance(planned, list):
            raise ValueError(wrong)
        for name in planned:
            self._inside(name)
        for files in entry["stages"].values():
            if not isinstance(files, dict):
                raise ValueError(wrong)
            for name, told in files.items():
                self._inside(name)
                if not (
                    isinstance(told, dict)
                    and isinstance(told.get("bytes"), int)
                    and isinstance(told.get("sha256"), str)
                ):
                    raise ValueError(wrong)
        return entry

    def _inside(self, name: Any) -> Path:
        return inside(self.folder, name, f"The record of a {self.what}")

    def begin(self, clear: Callable[[], None] = lambda: None) -> None:
        """Writes the record; with `fresh`, what the run before had written goes first, as
        `make_room` says.
        """
        self.make_room(clear)
        self.write()

    def make_room(self, clear: Callable[[], None] = lambda: None) -> None:
        """With `fresh`: takes away what the run before had written, its record last, so that a
        kill at any moment leaves a run that can be started anew again.

        clear: takes away first what that run needed to go on.
        """
        if self._replaced is None:
            return
        clear()
        for name in self._replaced:
            self._remove(self._inside(name))
        self.path.unlink(missing_ok=True)
        self._replaced = None

    def _remove(self, path: Path) -> None:
        """Deletes a file, and the folders that it leaves empty."""
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
            path.unlink()
        with suppress(OSError):  # one that is not empty stays, and so do those above it
            while (path := path.parent) != self.folder:
                path.rmdir()

    def write(self) -> None:
        """Writes the record, whole or not at all."""
        told: dict[str, Any] = {"run": self.identity}
        if exact := [name for name in self.files if "*" not in name]:
            told["files"] = exact
        told["stages"] = self.stages
        write_text(self.path, json.dumps(told, indent=1) + "\n")

    def done(self, stage: str, names: Sequence[str]) -> None:
        """Notes a stage as finished, with those of the named files that are there."""
        there = {name: self.folder / name for name in sorted(names)}
        self.stages[stage] = {
            name: {"bytes": path.stat().st_size, "sha256": checksum(path)}
            for name, path in there.items()
            if path.is_file()
        }
        self.write()

    def again(self, stage: str) -> None:
        """Notes that a stage is about to be made anew, so that its files may change."""
        if self.stages.pop(stage, None) is not None:
            self.write()

    def as_it_was(self, stage: str) -> bool:
        """Whether the files of a finished stage are all there, unchanged."""
        return all(
            _as_it_was(self._inside(name), told) for name, told in self.stages[stage].items()
        )


def _as_it_was(path: Path, told: Mapping[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != told["bytes"]:
        return False
    return told["bytes"] > HASHED or checksum(path) == told["sha256"]

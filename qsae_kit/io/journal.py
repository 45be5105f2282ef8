"""A journal of finished steps: a long run that was cut off goes on where it stopped, with the same
digits.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qsae_kit.io.files import check_file
from qsae_kit.io.jsonfiles import parse_json, read_bytes
from qsae_kit.io.runs import check_free, check_same, plain

LIMIT = 2**30
"""Bytes of a journal."""


class Journal:
    """Results of steps as JSON lines in a file; without a path they are kept in memory alone."""

    def __init__(
        self,
        path: Path | None,
        about: Mapping[str, Any],
        products: Sequence[str] = (),
        fresh: bool = False,
    ) -> None:
        """about: what the run is; the file's first line. products: names of the files beside it
        that the run writes at its end. fresh: a journal that is there goes, with its products.

        Raises ValueError where the file is of another run and `fresh` is not given, is no journal,
        or is not there while files with the products' names are.
        """
        self.path = path
        self.done: dict[str, Any] = {}
        if path is None:
            return
        check_file(path)
        told = plain(about)
        entries = _entries(path) if path.exists() else []
        if entries and fresh:
            for name in products:
                check_file(path.with_name(name))
                path.with_name(name).unlink(missing_ok=True)
            path.unlink()  # last, so that a kill leaves what says whose the others are
            entries = []
        elif entries:
            check_same(path, "run", told, entries[0])
        else:
            check_free(path.parent, products, "run")
        self.done = {entry["key"]: entry["value"] for entry in entries[1:]}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(entry) + "\n" for entry in entries or [told])
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(text.encode())
            file.truncate()
            os.fsync(file.fileno())

    def __contains__(self, key: str) -> bool:
        """Whether there is an entry under a key already."""
        return key in self.done

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """What was written under a key, or what `compute` gives now; floats come back to the
        bit.
        """
        if key not in self.done:
            value = json.loads(json.dumps(compute()))
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "value": value}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            self.done[key] = value
        return self.done[key]


def _entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; a last one that was cut off is left out. Raises ValueError for a file
    that is none.
    """
    *lines, cut = read_bytes(path, "a journal", LIMIT).split(b"\n")
    entries = []
    for number, line in enumerate(lines, 1):
        where = f"{str(path)!r}, line {number},"
        entry = parse_json(line.decode("utf-8", errors="replace"), where)
        if not isinstance(entry, dict) or (
            number > 1 and not (isinstance(entry.get("key"), str) and "value" in entry)
        ):
            raise ValueError(f"{where} is no step of a journal; choose another folder.")
        entries.append(entry)
    if not entries and cut and not b'{"'.startswith(cut[:2]):
        raise ValueError(f"{str(path)!r} is no journal, and stays; choose another folder.")
    return entries

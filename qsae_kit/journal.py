"""A journal of finished steps: a long run that was cut off goes on where it stopped, with the same digits."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Results of steps as JSON lines in a file; without a path they are kept in memory alone."""

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        """about: what the run is; the file's first line. Raises ValueError where the file is of another run."""
        self.path = path
        self.done: dict[str, Any] = {}
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        entries = [json.loads(line) for line in lines[:-1]]  # what follows the last line's end was cut off
        told = json.loads(json.dumps(about))
        if entries:
            changed = [name for name in {*told, *entries[0]} if told.get(name) != entries[0].get(name)]
            if changed:
                raise ValueError(
                    f"{str(path)!r} is of another run ({', '.join(sorted(changed))} differ); choose another folder or delete it."
                )
        self.done = {entry["key"]: entry["value"] for entry in entries[1:]}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(entry) + "\n" for entry in entries or [told])
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(text.encode())
            file.truncate()
            os.fsync(file.fileno())

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """What was written under a key, or what `compute` gives now; floats come back to the bit."""
        if key not in self.done:
            value = json.loads(json.dumps(compute()))
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "value": value}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            self.done[key] = value
        return self.done[key]

"""The state of a running training on disk: always one whole checkpoint to go on from."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qsae_kit.io.files import (
    atomic_file,
    atomic_folder,
    check_file,
    discard_folder,
    inside,
    sweep_folder,
)
from qsae_kit.io.jsonfiles import parse_json, read_json
from qsae_kit.io.runs import check_same, plain
from qsae_kit.io.tensorfiles import write_tensors

STATE, LOG = "state.json", "train.jsonl"
STATE_LIMIT = 64 * 2**20
"""Bytes of a state: it names every site, and an index's every dialogue lies in tensors."""


class Checkpoints:
    """`<folder>/checkpoint-<group>-<rows>/` with a state and tensors, and the log beside it.

    A checkpoint appears whole by a rename, and only then is the one before it deleted. Folders that
    merely look alike (no state of this package inside) are left alone, and so is what others put
    into them.

    identity: what a run has to have in common with the one that it goes on with: recipes, sites,
        model, data.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = plain(identity)

    def _found(self) -> list[Path]:
        return found(self.folder)

    def load(self) -> dict[str, Any] | None:
        """The newest state, or None. Raises ValueError where it is of another run or cannot be
        read.
        """
        there = self._found()
        if not there:
            return None
        saved = _read_state(there[-1])
        check_same(self.folder, "run", self.identity, saved["identity"])
        return saved["state"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of the newest checkpoint, copied out of the file. Raises ValueError where they
        cannot be read.
        """
        path = self._found()[-1] / f"{name}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key).clone() for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The checkpoint {str(path)!r} cannot be read ({error}); start the run anew"
                " elsewhere."
            ) from error

    def save(self, state: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Writes a checkpoint named after state["group"] and state["rows"], and deletes the ones
        before it.
        """
        before = self._found()
        target = self.folder / f"checkpoint-{state['group']}-{state['rows']}"
        with atomic_folder(target) as part:
            for name, tensors in parts.items():
                write_tensors(
                    {key: t.detach().cpu().contiguous() for key, t in tensors.items()},
                    part / f"{name}.safetensors",
                )
            told = {"identity": self.identity, "state": state, "files": sorted(parts)}
            (part / STATE).write_text(json.dumps(told), encoding="utf-8")
        for old in before:
            if old != target:
                delete_checkpoint(old)

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Clears what a killed run left: temporary folders, and log lines after the checkpoint that
        is gone on from.

        Raises ValueError for a train.jsonl that is no log of this package, before anything is
        changed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / LOG
        check_file(log)
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        if any(_reached(line) is None for line in lines[:-1]) or not all(
            line[:8] == b'{"group"'[: len(line)] for line in lines
        ):
            raise ValueError(
                f"{str(log)!r} is no log of a training, and would be written over; choose another"
                " folder."
            )
        sweep_folder(self.folder, "checkpoint-*")
        if log.exists():
            end = (state["group"], state["rows"]) if state else (0, 0)
            kept = [
                line for line in lines if (reached := _reached(line)) is not None and reached <= end
            ]
            with atomic_file(log) as new:
                new.write_bytes(b"".join(kept))

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends a line with "group" and "rows" to train.jsonl."""
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    folders = [
        p.parent
        for p in folder.glob(f"checkpoint-*/{STATE}")
        if re.fullmatch(r"checkpoint-\d+-\d+", p.parent.name)
    ]
    return sorted(folders, key=lambda p: tuple(map(int, p.name.split("-")[1:])))


def _read_state(folder: Path) -> dict[str, Any]:
    saved = read_json(folder / STATE, "a checkpoint", STATE_LIMIT)
    parts = [saved.get(name) for name in ("identity", "state")] if isinstance(saved, dict) else []
    if len(parts) != 2 or not all(isinstance(part, dict) for part in parts):
        raise ValueError(
            f"{str(folder / STATE)!r} is no state of a checkpoint; start the run anew in another"
            " folder."
        )
    return saved


def delete_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint, at once as far as `found` can see; what others put into it stays where
    it is.
    """
    told = _read_state(folder).get("files", [])
    files = [name for name in told if isinstance(name, str)] if isinstance(told, list) else []
    own = {STATE, *(f"{name}.safetensors" for name in files)}
    if {entry.name for entry in folder.iterdir()} <= own:
        discard_folder(folder)
        return
    for name in (STATE, *sorted(own - {STATE})):
        inside(folder, name, "A checkpoint's state").unlink(missing_ok=True)


def delete_checkpoints(folder: Path) -> None:
    """Deletes the checkpoints in a folder, the newest last."""
    for checkpoint in found(folder):
        delete_checkpoint(checkpoint)


def _reached(line: bytes) -> tuple[int, int] | None:
    """Group and rows of a line of the log; None where it is none."""
    try:
        entry = parse_json(line.decode(), "the log")
        group, rows = entry["group"], entry["rows"]
    except (ValueError, KeyError, TypeError):  # cut off by a kill
        return None
    return (group, rows) if isinstance(group, int) and isinstance(rows, int) else None

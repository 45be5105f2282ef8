"""Stores activations of one site for training and evaluating elsewhere, and reads them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qsae_kit.data.documents import CONTEXT, TokenBatch, TokenPolicy, token_batches
from qsae_kit.data.rows import Origin, Rows, begin_with_bos, stream_rows
from qsae_kit.data.streams import named, stream_of
from qsae_kit.io.files import atomic_file
from qsae_kit.io.progress import tqdm
from qsae_kit.io.tensorfiles import write_tensors
from qsae_kit.io.writers import only_writer_of
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sites import parse_hook_name


class StoredFile(NamedTuple):
    """Stored activations with what their header says of them."""

    path: Path
    acts: Tensor
    """[row, d_model]"""
    hook_name: str
    """"" where the header has none."""
    scale: float
    origin: Origin


def read_rows(path: Path) -> StoredFile:
    """A .safetensors file with the tensor `acts` [row, d_model].

    Raises ValueError for a file that is not one of stored activations.
    """
    try:
        with safe_open(path, "pt") as file:
            header, names = file.metadata() or {}, list(file.keys())
            if "acts" not in names:
                raise ValueError(
                    f"{str(path)!r} holds {', '.join(names) or 'nothing'}; expected a tensor acts"
                    " [row, d_model]."
                )
            acts = file.get_tensor("acts")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error}); give a .safetensors file of stored"
            " activations."
        ) from error
    if acts.ndim != 2 or not acts.dtype.is_floating_point or len(acts) < 20:
        raise ValueError(
            f"{str(path)!r} holds acts of shape {tuple(acts.shape)} and {acts.dtype}; expected"
            " numbers [row, d_model], 20 rows or more."
        )
    return StoredFile(
        path,
        acts,
        header.get("hook_name", ""),
        float(header.get("scale", "1")),
        Origin(
            header.get("model", "stored"),
            _policy(header, path),
            begins_with_bos=KNOWN.get(header.get("begins_with_bos", "")),
        ),
    )


KNOWN = {"True": True, "False": False}
"""How a header writes what is so or not."""


def _policy(header: Mapping[str, str], path: Path) -> TokenPolicy:
    size = header.get("context_size", str(CONTEXT))
    if not size.isdecimal() or int(size) < 2:
        raise ValueError(
            f"{str(path)!r} has context_size={size[:40]!r}, which must be a whole number of 2 or"
            " more; store the activations again."
        )
    return TokenPolicy(
        header.get("drop_template") == "True", int(size), header.get("drop_prefix") == "True"
    )


def harvest_rows(
    lm: HookedLM,
    data: str | None,
    hook_name: str,
    tokens: int,
    out: Path,
    drop_template: bool = False,
) -> int:
    """Writes at most `tokens` rows; returns how many there were.

    Raises ValueError for a site that does not exist, for no data with another model than the
    bundled one, for bad data, and while another process writes the file.
    """
    with only_writer_of(out):
        return _harvest(lm, data, hook_name, tokens, out, drop_template)


def _harvest(
    lm: HookedLM, data: str | None, hook_name: str, tokens: int, out: Path, drop_template: bool
) -> int:
    lm.check_hook_names([parse_hook_name(hook_name).hook_name])
    documents = stream_of(lm, data, "rows")()
    policy = TokenPolicy(drop_template).on(lm)
    parts, size = [], 0
    begun: list[bool] = []
    with tqdm(total=tokens, unit="tok", desc="harvesting") as bar:
        batches = _noted(lm, token_batches(lm, documents, policy=policy), begun)
        for rows in stream_rows(lm, [hook_name], batches):
            part = (
                rows[hook_name][: tokens - size].half()
                if _fits_half(rows[hook_name])
                else rows[hook_name][: tokens - size]
            )
            parts.append(part.cpu())
            size += len(part)
            bar.update(len(part))
            if size >= tokens:
                break
    if not size:
        raise ValueError("The data gave no tokens after the keep-mask; give longer texts.")
    about = {
        "model": lm.model_name,
        "drop_template": str(policy.drop_template),
        "context_size": str(policy.context_size),
        "drop_prefix": str(policy.drop_prefix),
        "begins_with_bos": str(all(begun)),
        "data": named(data),
    }
    save_rows({hook_name: torch.cat([part.float() for part in parts])}, hook_name, out, about)
    return size


def _noted(lm: HookedLM, batches: Iterable[TokenBatch], begun: list[bool]) -> Iterator[TokenBatch]:
    """The batches, while it is noted of each whether it begins with the tokenizer's first token."""
    for batch in batches:
        begun.append(begin_with_bos(lm, [batch]))
        yield batch


def _fits_half(x: torch.Tensor) -> bool:
    return bool(x.abs().max() < 30_000)


def save_rows(rows: Rows, hook_name: str, path: Path, about: dict[str, str]) -> None:
    """Stores rows of one site as the float16 tensor `acts` [row, width]; order and scale go into
    the header.

    Rows are multiplied by the header's `scale` where float16 would overflow (divide to get them
    back).
    """
    acts = rows[hook_name]
    largest = float(acts.abs().max())
    scale = 1.0 if largest < 30_000 else 30_000 / largest
    header = about | {
        "hook_name": hook_name,
        "scale": repr(scale),
        "order": "token order within shuffled dialogues",
    }
    with only_writer_of(path), atomic_file(path) as part:
        write_tensors({"acts": (acts * scale).half().contiguous()}, part, header)

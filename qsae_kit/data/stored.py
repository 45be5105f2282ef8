"""Stores activations of one site for training and evaluating elsewhere."""

from pathlib import Path

import torch
from tqdm.auto import tqdm

from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import Rows, stream_rows
from qsae_kit.data.streams import named, stream_of
from qsae_kit.io.files import atomic_file
from qsae_kit.io.tensorfiles import write_tensors
from qsae_kit.io.writers import only_writer_of
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sites import parse_hook_name


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
    parts, size = [], 0
    with tqdm(total=tokens, unit="tok", desc="harvesting") as bar:
        for rows in stream_rows(
            lm, [hook_name], token_batches(lm, documents, drop_template=drop_template)
        ):
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
    about = {"model": lm.model_name, "drop_template": str(drop_template), "data": named(data)}
    save_rows({hook_name: torch.cat([part.float() for part in parts])}, hook_name, out, about)
    return size


def _fits_half(x: torch.Tensor) -> bool:
    return bool(x.abs().max() < 30_000)


def save_rows(rows: Rows, hook_name: str, path: Path, about: dict[str, str]) -> None:
    """Stores rows of one site as the float16 tensor `acts` [row, d_model]; order and scale go into
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

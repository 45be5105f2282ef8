"""Files of tensors from elsewhere, opened without trusting them: nothing in them runs, and what a
tensor claims to be is checked against the bytes that are there before anything is allocated.

Both formats are mapped, so that shapes cost no memory and data only while they are read. A PyTorch
file is a zip of a pickle and of raw storages. The pickle may hold what `torch.save` writes for a
dict of tensors and nothing else: it is looked through before `torch.load(weights_only=True)` sees
it, since that guards against code but not against claims.
"""

import json
import math
import os
import pickletools
import stat
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Formats that weights may have."""
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What safetensors calls them."""
ALIGNED = 8
"""Bytes that the header of such a file is padded to a multiple of."""
PICKLE_LIMIT = 2**20
"""Bytes of a pickle; a dict of tensors takes some hundred a tensor."""
OPCODES = frozenset(
    """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    BINFLOAT BINUNICODE SHORT_BINUNICODE     EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT BINGET     LONG_BINGET
    MEMOIZE BINPERSID GLOBAL REDUCE BUILD""".split()
)
GLOBALS = frozenset(
    [
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
    ]
    + [
        f"torch {kind}Storage"
        for kind in "Float Half BFloat16 Double Int Long Short Char Byte Bool".split()
    ]
)


class Spec(NamedTuple):
    """What a tensor is, known without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFile:
    """The tensors of a `.safetensors` or a PyTorch file (`.pt`); `read` maps one anew, so that its
    pages can go again.

    Raises ValueError for a file that is neither, that claims more than it holds, or whose pickle
    does anything but build a dict of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: Callable[[Path], dict[str, Tensor]] = (
            _safetensors if path.suffix == ".safetensors" else _pytorch
        )
        self.specs = {
            name: Spec(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._open(path).items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from the file and not to be written to. Raises ValueError where it
        holds what is not finite.
        """
        tensor = self._open(self.path)[name].detach()
        if not all_finite(tensor):
            raise ValueError(
                f"{str(self.path)!r}: {name} has values that are not finite; get the file again."
            )
        return tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file. Raises ValueError as `TensorFile` does."""
    return _safetensors(path)


def all_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, found without memory of the tensor's size, which `isfinite`
    takes.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.aminmax()  # both are no number where any value is none
    return bool(low.isfinite() and high.isfinite())


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        # checks that the header's claims end where the file does
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({_reason(error)}); get the file again."
        ) from error


def _pytorch(path: Path) -> dict[str, Tensor]:
    sizes = _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a broken pickle raises is not to be foreseen
        raise ValueError(
            f"{str(path)!r} cannot be read ({_reason(error)}); get the file again."
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in loaded.items()
    ):
        held = (
            ", ".join(map(str, list(loaded)[:8]))
            if isinstance(loaded, dict)
            else type(loaded).__name__
        )
        raise ValueError(
            f"{str(path)!r} holds {held}, not a dict of tensors alone; give the file of a finished"
            " SAE."
        )
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in loaded.values()
    }
    if sorted(n for n in storages.values() if n) != sizes or any(
        t.numel() * t.element_size() > t.untyped_storage().nbytes() for t in loaded.values()
    ):
        raise ValueError(
            f"{str(path)!r} claims tensors of other sizes than it holds; get the file again."
        )
    return loaded


def _check_archive(path: Path) -> list[int]:
    """The sizes in bytes of the storages in a PyTorch file. ValueError unless it is as `torch.save`
    writes a dict of tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > PICKLE_LIMIT:
                raise ValueError("it is no archive of one small dict")
            compressed = any(
                e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size
                for e in entries
            )
            if compressed or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError("it claims more bytes than it has")
            program = archive.read(pickles[0])
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name not in OPCODES or (opcode.name == "GLOBAL" and argument not in GLOBALS):
                raise ValueError(
                    f"its pickle holds {argument or opcode.name}, which a dict of tensors does not"
                    " need"
                )
    except Exception as error:  # as above
        raise ValueError(
            f"{str(path)!r} was not read ({_reason(error)}); give a dict of tensors as torch.save"
            " writes it since PyTorch 1.6."
        ) from error
    root = pickles[0].filename.removesuffix("data.pkl")
    return sorted(
        e.file_size for e in entries if e.filename.startswith(f"{root}data/") and e.file_size
    )


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def write_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """`save_file`, whose own error for a full disk is neither an OSError nor a ValueError and whose
    files nobody else may read: these have the process's permissions (umask).
    """
    try:
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(tensors, path, metadata=metadata)
        os.chmod(path, mode)
    except SafetensorError as error:
        raise OSError(
            f"{path.parent} could not take a file of tensors ({error}); free some space and run it"
            " again."
        ) from error


def stream_tensors(specs: Mapping[str, Spec], pieces: Iterable[torch.Tensor], path: Path) -> None:
    """Writes a `.safetensors` file of what need never be in memory as a whole.

    pieces: the data of the tensors in the order of `specs`, each tensor in one piece or several, of
    any shape; what is not of the tensors' one format is converted. Raises ValueError where the
    pieces are more or fewer than the tensors, or these of several formats.
    """
    formats = {spec.dtype for spec in specs.values()}
    if len(formats) != 1:
        raise ValueError(f"{len(formats)} formats of tensors were given; one file is of one.")
    dtype = formats.pop()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + math.prod(spec.shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNED)
    written = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            data = piece.detach().cpu().to(dtype).contiguous().view(-1).view(torch.uint8)
            written += file.write(data.numpy().tobytes())
    if written != end:
        raise ValueError(f"{written:,} bytes of tensors were given, their shapes take {end:,}.")

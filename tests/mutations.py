"""Releases with something wrong in them, loaded in a process of its own that may hardly allocate.

    python mutations.py FORMAT COUNT FOLDER

Every mutation has to end in a ValueError or an OSError of one sentence, or in an SAE that is finite
and of the sizes that the file has; files appear below FOLDER only, and the marker that the
malicious pickles would write does not. Prints JSON: how many were refused and how many loaded, by
kind of mutation, and by how much the peak of the memory grew (bytes).
"""

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import releases
import torch
from safetensors.torch import load_file, save_file

import qsae_kit
from qsae_kit.sae.releases import inspect_suite

HEADROOM = 512 * 2**20
"""Bytes of address space beyond those of a process that has loaded one SAE."""


class Runs:
    """Writes a marker when it is unpickled by something that runs what a pickle says."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Evaluates(Runs):
    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


class Swells(Runs):
    def __reduce__(self):
        return bytearray, (2**36,)


def rewritten(path, change):
    """A PyTorch file with its pickle or records changed: {name: bytes} in and out, stored as
    `torch.save` does.
    """
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    records, how = change(records, next(name for name in records if name.endswith("/data.pkl")))
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def pickled(thing, protocol=2):
    return lambda records, at: (records | {at: pickle.dumps(thing, protocol)}, zipfile.ZIP_STORED)


def larger_claims(rng):
    """The numbers of the first storage and its shape blown up in the pickle."""

    def change(records, at):
        program = records[at]
        numbers = [i for i in range(len(program) - 5) if program[i : i + 1] in (b"J", b"M", b"K")]
        i = rng.choice(numbers)
        huge = b"J" + struct.pack("<i", rng.choice([2**31 - 1, 2**30, 10**9, -5, 0]))
        width = {b"J": 5, b"M": 3, b"K": 2}[program[i : i + 1]]
        return records | {at: program[:i] + huge + program[i + width :]}, zipfile.ZIP_STORED

    return change


def expanded(tensor):
    """A huge shape on a storage of one number (stride 0)."""
    return torch.zeros(1, dtype=tensor.dtype).expand(2**14, 2**14)


def change_tensors(rng, tensors):
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(
        "nan inf int64 float64 complex64 uint8 missing extra transposed shorter scalar empty flat"
        " renamed".split()
    )
    out = dict(tensors)
    if kind in ("nan", "inf"):
        out[name] = tensor.clone().float()
        out[name].view(-1)[rng.randrange(tensor.numel())] = float(kind)
    elif kind in ("int64", "float64", "complex64", "uint8"):
        out[name] = tensor.to(getattr(torch, kind))
    elif kind == "missing":
        del out[name]
    elif kind == "extra":
        out["W_skip"] = torch.zeros(3, 3)
    elif kind == "transposed":
        out[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor[None].contiguous()
    elif kind == "shorter":
        out[name] = (
            tensor[: len(tensor) // 2].contiguous() if tensor.ndim else tensor[None].contiguous()
        )
    elif kind == "scalar":
        out[name] = torch.tensor(1.0)
    elif kind == "empty":
        out[name] = torch.zeros(0)
    elif kind == "flat":
        out[name] = tensor.reshape(-1, 1).contiguous()
    elif kind == "renamed":
        out[f"../{name}"] = out.pop(name)
    return f"tensors: {kind}", out


def damage_bytes(rng, path):
    data = bytearray(path.read_bytes())
    kind = rng.choice(["truncated", "empty", "flipped", "grown", "other"])
    if kind == "truncated":
        data = data[: rng.randrange(len(data))]
    elif kind == "empty":
        data = bytearray()
    elif kind == "flipped":
        for _ in range(rng.randrange(1, 40)):
            data[rng.randrange(min(len(data), rng.choice([400, len(data)])))] = rng.randrange(256)
    elif kind == "grown":
        data += rng.randbytes(rng.randrange(1, 5000))
    else:
        data = bytearray(rng.randbytes(2000))
    path.write_bytes(data)
    return f"bytes: {kind}"


def damage_pytorch(rng, path, marker):
    state = torch.load(path, weights_only=True)
    if rng.random() < 0.4:
        kind, changed = change_tensors(rng, state)
        torch.save(changed, path)
        return kind
    kind = rng.choice(
        ("system eval swells hidden claims claims expanded bomb legacy list object backup").split()
    )
    if kind in ("system", "eval", "swells"):
        thing = {"system": Runs, "eval": Evaluates, "swells": Swells}[kind](marker)
        rewritten(path, pickled(thing, rng.choice([0, 2, 4])))
    elif kind == "hidden":  # behind an honest dict, in a tensor's place
        torch.save(state | {rng.choice(sorted(state)): Runs(marker)}, path)
    elif kind == "claims":
        rewritten(path, larger_claims(rng))
    elif kind == "expanded":
        torch.save({name: expanded(t) if t.ndim == 2 else t for name, t in state.items()}, path)
    elif kind == "bomb":  # 64 MB of zeros in some kilobytes
        torch.save(
            {name: torch.zeros(2**12, 2**12) if t.ndim == 2 else t for name, t in state.items()},
            path,
        )
        rewritten(path, lambda records, at: (records, zipfile.ZIP_DEFLATED))
    elif kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "list":
        torch.save(list(state.values()), path)
    elif kind == "object":
        path.write_bytes(pickle.dumps(Runs(marker)))
    else:  # what a training that was cut off leaves
        torch.save({"step": 1, "ae": state, "optimizer": {}}, path)
    return f"pickle: {kind}"


def damage_safetensors(rng, path):
    if rng.random() < 0.5:
        kind, changed = change_tensors(rng, load_file(path))
        save_file(changed, path)
        return kind
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    kind = rng.choice(["shape", "offsets", "dtype", "length", "duplicate", "nested"])
    name = rng.choice([n for n in header if n != "__metadata__"])
    if kind == "shape":
        header[name]["shape"] = rng.choice(
            [[2**16, 2**16], [2**62, 4], [-1, 4], [2**64], [1.5], "16", []]
        )
    elif kind == "offsets":
        header[name]["data_offsets"] = rng.choice(
            [[0, 2**40], [2**40, 2**41], [10, 0], [-4, 4], [0]]
        )
    elif kind == "dtype":
        header[name]["dtype"] = rng.choice(["F64", "I8", "F8_E4M3", "U64", "BOOL", "X9", 3])
    text = json.dumps(header).encode()
    if kind == "duplicate":
        text = text[:-1] + b"," + json.dumps({name: header[name]}).encode()[1:]
    elif kind == "nested":
        text = b"[" * 10_000
    said = rng.choice([0, 2**63, 2**40, length * 2]) if kind == "length" else len(text)
    path.write_bytes(struct.pack("<Q", said) + text + data[8 + length :])
    return f"header: {kind}"


STRANGE = [
    None,
    -1,
    0,
    2**31,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "../../x",
    "/etc/passwd",
    "blocks.3.hook_resid_post/../../x",
    "layers.99999999999",
    "\x00",
    [],
    {},
    True,
    "x" * 100_000,
]


def damage_config(rng, path):
    kind = rng.choice(
        ("value value value value missing text deep number list bytes long gone").split()
    )
    config = json.loads(path.read_text())
    if kind in ("value", "missing"):
        part = config
        while True:
            key = rng.choice(sorted(part))
            if isinstance(part[key], dict) and part[key] and rng.random() < 0.9:
                part = part[key]
                continue
            break
        if kind == "missing":
            del part[key]
        else:
            part[key] = rng.choice(STRANGE)
        path.write_text(json.dumps(config))
        return f"config: {kind}"
    written = {
        "text": b"{",
        "deep": b'{"a":' * 50_000,
        "number": b'{"k": ' + b"9" * 10_000 + b"}",
        "list": b"[]",
        "bytes": b"\xff\xfe\x00{",
        "long": b'{"a": "' + b"x" * 2**21 + b'"}',
    }
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(written[kind])
    return f"config: {kind}"


def mutate(rng, which, laid, marker):
    weights, config = laid.folder / releases.WEIGHTS[which], laid.folder / releases.CONFIGS[which]
    draw = rng.random()
    if draw < 0.3:
        return damage_config(rng, config)
    if draw < 0.5:
        return damage_bytes(rng, weights)
    if weights.suffix == ".pt":
        return damage_pytorch(rng, weights, marker)
    return damage_safetensors(rng, weights)


def check(suite, laid):
    for saes in suite.values():
        for sae in saes.values():
            assert all(parameter.isfinite().all() for parameter in sae.parameters())
            sizes = {t.shape for t in laid.tensors.values()}
            assert (sae.d_sae, sae.d_in) in sizes or (sae.d_in, sae.d_sae) in sizes
            assert sae(torch.randn(4, sae.d_in)).shape == (4, sae.d_in)


def main(which, count, folder):
    warnings.filterwarnings("ignore")
    marker, outside = folder / "marker", folder / "outside"
    outside.mkdir(parents=True)
    make = releases.FORMATS[which]
    laid = make(outside / "first")
    check(qsae_kit.load_suite(laid.root), laid)  # imports what is imported late
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM,) * 2)
    refused, loaded, grown = Counter(), Counter(), 0
    for number in range(count):
        rng = random.Random(number)
        laid = make(outside / str(number))
        kind = mutate(rng, which, laid, marker)
        before = resident("VmRSS")
        # the peak begins anew, without what the mutation took
        Path("/proc/self/clear_refs").write_text("5")
        message = ""
        try:
            with contextlib.suppress(ValueError, OSError):
                inspect_suite(laid.root)
            suite = qsae_kit.load_suite(laid.root)
        except (ValueError, OSError) as error:
            message = str(error)
            refused[kind] += 1
        else:
            check(suite, laid)
            loaded[kind] += 1
            out = outside / f"out{number}"
            assert all(
                written.is_relative_to(out) for written in qsae_kit.convert_suite(laid.root, out)
            )
            shutil.rmtree(out)
        grown = max(grown, resident("VmHWM") - before)
        assert not message or 10 < len(message) < 1500, (number, kind, message)
        assert not marker.exists(), (number, kind)
        shutil.rmtree(outside / str(number))
        assert {p.name for p in outside.iterdir()} == {"first"}, (number, kind)
    assert [p.name for p in folder.iterdir()] == ["outside"]
    json.dump({"refused": refused, "loaded": loaded, "grown": grown}, sys.stdout)


def resident(name):
    """Bytes in memory now (VmRSS) or at most so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) * 1024
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

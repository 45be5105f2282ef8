"""Releases with something wrong in them, loaded in a process of its own that may hardly allocate.

    python mutations.py FORMAT,FORMAT,... COUNT FOLDER

Every mutation has to end in a ValueError or an OSError of one sentence, or in an SAE that is finite
and of the sizes that the file has; the command says either with an exit code of 0 or 1 and nothing
else; files appear below FOLDER only, and the marker that the malicious pickles would write does
not. Prints JSON, by format: how many were refused and how many loaded, by kind of mutation, and by
how much the peak of the memory grew (bytes).
"""

import contextlib
import io
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

import numpy as np
import releases
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import qsae_kit
from qsae_kit.cli.app import app
from qsae_kit.sae.releases import inspect_suite
from qsae_kit.train.baselines import recipe_of

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


def damage_numpy(rng, path, marker):
    with np.load(path) as stored:
        arrays = dict(stored)
    draw = rng.random()
    if draw < 0.4:
        kind, changed = change_tensors(rng, {n: torch.from_numpy(a) for n, a in arrays.items()})
        np.savez(path, **{name: tensor.numpy() for name, tensor in changed.items()})
        return kind
    kind = rng.choice(
        "objects hidden claims claims descr bomb overlap nested duplicate text order".split()
    )
    name = rng.choice(sorted(arrays))
    if kind in ("objects", "hidden"):  # a pickle where numpy keeps objects
        thing = np.empty(1, object)
        thing[0] = Runs(marker)
        arrays = {name: thing} if kind == "objects" else arrays | {name: thing}
        np.savez(path, **arrays)
    elif kind in ("claims", "descr", "nested"):
        headers = {
            "claims": [(2**20, 2**20), (2**62, 4), (-1, 4), (2**70,), (True,), (3, -3)],
            "descr": ["'<f8'", "'O'", "'V1000000000'", "'<U99999999'", "[('a', '<f4')]", "'>f4'"],
            "nested": ["(" * 5000, "[" * 3000, "9" * 9000, "__import__('os').getpid()"],
        }[kind]
        claimed = rng.choice(headers)
        shape = claimed if kind == "claims" else arrays[name].shape
        descr = "'<f4'" if kind == "claims" else claimed
        header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        entry = np.lib.format.magic(1, 0) + struct.pack("<H", len(header)) + header
        write_zip(path, arrays, {name: entry + arrays[name].tobytes()})
    elif kind == "bomb":
        np.savez_compressed(path, **{n: np.zeros((2**12, 2**12), "f4") for n in arrays})
    elif kind == "overlap":  # every entry is the first one
        with zipfile.ZipFile(path, "w") as archive:
            for number, other in enumerate(sorted(arrays)):
                archive.writestr(f"{other}.npy", npy(arrays[other]))
                archive.infolist()[number].header_offset = 0
    elif kind == "duplicate":
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
            warnings.simplefilter("ignore")
            archive.writestr(f"{name}.npy", npy(arrays[name]))
    elif kind == "text":
        write_zip(path, arrays, {name: b"not an array"})
    else:  # columns first, which is another order of the same numbers
        np.savez(path, **{n: np.asfortranarray(a) for n, a in arrays.items()})
    return f"numpy: {kind}"


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_zip(path, arrays, changed):
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", changed.get(name, npy(array)))


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


def mutate(rng, which, laid, marker, configurations=0.3):
    """configurations: the share of mutations that are of them, where there are any."""
    weights = laid.folder / releases.WEIGHTS[which]
    draw = rng.random()
    if draw < configurations and which in releases.CONFIGS:
        return damage_config(rng, laid.folder / releases.CONFIGS[which])
    if draw < configurations + 0.2:
        return damage_bytes(rng, weights)
    if weights.suffix == ".npz":
        return damage_numpy(rng, weights, marker)
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


def said_by_the_command(source, number, kind):
    """Has the command look at a release, which is a table or one sentence, and no traceback."""
    done = CliRunner().invoke(app, ["suite", "show", str(source)])
    expected = (type(None), SystemExit, ValueError, OSError)
    assert isinstance(done.exception, expected), (number, kind, done.exception)
    assert "Traceback" not in done.output, (number, kind)


def load_and_limit(kinds, folder):
    """Loads one SAE of each kind, which imports what is imported late, and bounds the memory."""
    for which in kinds:
        laid = MAKERS[which](folder / which)
        check(qsae_kit.load_suite(laid.root), laid)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM,) * 2)


MAKERS = releases.FORMATS | {"qsae_kit": releases.own}


def mutated(which, count, folder):
    """What became of the mutations of one format."""
    marker, outside = folder / "marker", folder / "outside"
    outside.mkdir(parents=True)
    make = MAKERS[which]
    refused, loaded, grown = Counter(), Counter(), 0
    for number in range(count):
        rng = random.Random(number)
        laid = make(outside / str(number))
        kind = mutate(rng, which, laid, marker, 0.8 if which == "qsae_kit" else 0.3)
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
            for sae in suite.saes().values():
                origin = sae.origin
                assert all(isinstance(v, (int, float)) for v in origin.figures.values())
                assert isinstance(origin.drop_template, bool)
                with contextlib.suppress(ValueError):
                    recipe_of(suite[next(iter(suite))])
            out = outside / f"out{number}"
            assert all(
                written.is_relative_to(out) for written in qsae_kit.convert_suite(laid.root, out)
            )
            shutil.rmtree(out)
        grown = max(grown, resident("VmHWM") - before)
        assert not message or 10 < len(message) < 1500, (number, kind, message)
        if number % 10 == 0:
            said_by_the_command(laid.root, number, kind)
        assert not marker.exists(), (number, kind)
        shutil.rmtree(outside / str(number))
        assert not list(outside.iterdir()), (number, kind)
    assert [p.name for p in folder.iterdir()] == ["outside"]
    return {"refused": refused, "loaded": loaded, "grown": grown}


def main(kinds, count, folder):
    warnings.filterwarnings("ignore")
    load_and_limit(kinds, folder / "first")
    json.dump(
        {which: mutated(which, count, folder / "each" / which) for which in kinds}, sys.stdout
    )


def resident(name):
    """Bytes in memory now (VmRSS) or at most so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) * 1024
    )


if __name__ == "__main__":
    main(sys.argv[1].split(","), int(sys.argv[2]), Path(sys.argv[3]))

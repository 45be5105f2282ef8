"""Readers of what comes from elsewhere, under a coverage-guided fuzzer.

    python tests/bench/fuzz.py documents|gguf|release --seconds 400 --out runs/fuzz

Needs `pip install atheris` beside the package. Bytes that libFuzzer grows from a few good files go
to a reader as a file; whatever it raises but a ValueError of one line is a find, as are more than 2
GB of memory. A find is written to the folder and ends the run with an error; the last lines tell
how many inputs were tried.
"""

import argparse
import contextlib
import gzip
import io
import json
import lzma
import sys
import tempfile
import warnings
from functools import cache, partial
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))

with atheris.instrument_imports(include=["qsae_kit.data", "qsae_kit.io", "qsae_kit.sae", "gguf"]):
    from qsae_kit.data.readers import read_documents
    from qsae_kit.lm.dequantised import convert
    from qsae_kit.sae.releases import inspect_suite
    from qsae_kit.sae.store import load_suite

import pandas as pd
import torch
from releases import CONFIGS, FORMATS, WEIGHTS
from test_wheels import model_of, write_gguf

ENDINGS = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".jsonl.gz", ".jsonl.xz", ".parquet")
RELEASES = [name for name in FORMATS if name in CONFIGS and name in WEIGHTS]
"""Formats of one configuration and one file of weights."""
MEMORY_MB = 2048
D_IN = 4
FEWEST = 3
"""Bytes of an input: those that say what it is."""
LONGEST_INPUT = 1 << 17
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def read_one(folder: Path, data: bytes) -> None:
    """The first byte says of which kind the file is."""
    path = folder / f"a{ENDINGS[data[0] % len(ENDINGS)]}"
    path.write_bytes(data[1:])
    for _ in read_documents(path):
        pass


def read_gguf(folder: Path, data: bytes) -> None:
    path = folder / "a.gguf"
    path.write_bytes(data)
    (folder / "out").mkdir(exist_ok=True)
    convert(path, folder / "out", torch.float32, True, "converting")


def read_release(folder: Path, data: bytes) -> None:
    """The first byte is the format, the next two are the length of its configuration."""
    name = RELEASES[data[0] % len(RELEASES)]
    start = 3 + int.from_bytes(data[1:3], "little")
    place = folder / below(name)
    for file in (CONFIGS[name], WEIGHTS[name]):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
    (place / CONFIGS[name]).write_bytes(data[3:start])
    (place / WEIGHTS[name]).write_bytes(data[start:])
    inspect_suite(folder)
    load_suite(folder)


READERS = {"documents": read_one, "gguf": read_gguf, "release": read_release}


def seeds(target: str, folder: Path) -> list[bytes]:
    """Good files to begin with."""
    lines = "".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(3)).encode()
    if target == "documents":
        table = b"question,answer\nHi,Hello!\n"
        tabs = table.replace(b",", b"\t")
        parquet = io.BytesIO()
        pd.DataFrame({"messages": [CHAT]}).to_parquet(parquet)
        files = (lines, json.dumps([{"text": "a"}]).encode(), b"one\ntwo\n", table, tabs)
        packed = (gzip.compress(lines), lzma.compress(lines), parquet.getvalue())
        return [bytes([kind]) + data for kind, data in enumerate((*files, *packed))]
    if target == "release":
        return [_packed(number, name, folder) for number, name in enumerate(RELEASES)]
    write_gguf(folder / "seed.gguf", "qwen2", model_of("qwen2"))
    return [(folder / "seed.gguf").read_bytes()]


def _packed(number: int, name: str, folder: Path) -> bytes:
    """A release of a format as `read_release` takes it."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        laid = FORMATS[name](Path(root), d_in=D_IN)
        config = (laid.folder / CONFIGS[name]).read_bytes()
        weights = (laid.folder / WEIGHTS[name]).read_bytes()
    return bytes([number]) + len(config).to_bytes(2, "little") + config + weights


@cache
def below(name: str) -> Path:
    """Where a format has its SAE, below the release's folder."""
    with tempfile.TemporaryDirectory() as root:
        return FORMATS[name](Path(root), d_in=D_IN).folder.relative_to(root)


def tried(target: str, data: bytes) -> None:
    """Runs a reader on an input in an empty folder; RuntimeError for an error that is none of ours.

    In memory where there is such a folder: thousands are tried in a second.
    """
    if len(data) < FEWEST:
        return
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                READERS[target](Path(name), data)
        except ValueError as error:
            if type(error) is not ValueError or "\n" in str(error).strip():
                raise RuntimeError(f"no sentence: {error!r}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=READERS)
    parser.add_argument("--seconds", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    a = parser.parse_args()
    corpus = a.out / a.target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(a.target, corpus)):
        (corpus / f"seed{number}").write_bytes(data)
    given = [
        f"-max_total_time={a.seconds}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-max_len={LONGEST_INPUT}",
        f"-artifact_prefix={a.out}/{a.target}-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *given], partial(tried, a.target))
    atheris.Fuzz()


if __name__ == "__main__":
    main()

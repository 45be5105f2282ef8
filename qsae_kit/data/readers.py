"""Where documents come from: files of every usual kind, folders, and data sets on the hub; one
reader for commands, recipes and notebooks.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from qsae_kit.data.given import rows_of
from qsae_kit.data.records import Document, parse_record
from qsae_kit.io.jsonfiles import parse_json

if TYPE_CHECKING:
    import pandas as pd

PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Endings of packed files, and what opens them."""
KINDS = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")
FILES = "a .jsonl, .json, .txt, .csv or .parquet file (packed as .gz, .bz2 or .xz, if you like)"
LINE_LIMIT = 2**26
"""Bytes of a line, packed files' among them: what claims more is no dialogue."""
JSON_LIMIT = 2**30
"""Bytes of a .json file that is no file of JSON lines; it is read as a whole."""
CELLS = 1000
"""Rows of a table that are read at a time."""
FEW_ROWS = 100
"""A share of bad rows is of so many at least: one among the first ten would be a tenth."""
WAITS = (1.0, 4.0, 15.0)
"""Seconds before a stream that broke off is opened again where it broke."""
OPTIONS = ("column", "max_bad")
OPTION = re.compile(rf"(,({'|'.join(OPTIONS)})=[^,]*)+$")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class DataSource(NamedTuple):
    """What `--data` names: a file, a folder of data files, or a data set on the hub."""

    name: str
    """A path, or the id of a data set."""
    parts: tuple[str, ...] = ()
    """Of a data set: its configuration, its split, or both."""
    column: str = ""
    """The field that holds the texts or chats; "": whichever is known."""
    max_bad: float = 0.0
    """Share of rows, at most, that are left out because they cannot be read."""

    @property
    def path(self) -> Path:
        return Path(self.name)

    @property
    def is_file(self) -> bool:
        return self.path.is_file()

    def __str__(self) -> str:
        return self.called(self.name)

    def called(self, name: str) -> str:
        """The source as it is written, under another name."""
        column = f",column={self.column}" if self.column else ""
        bad = f",max_bad={self.max_bad:g}" if self.max_bad else ""
        return ":".join((name, *self.parts)) + column + bad


def parse_source(text: str) -> DataSource:
    """`NAME[:CONFIGURATION][:SPLIT][,column=NAME][,max_bad=SHARE]` -> its parts; what is a path as
    it stands is one.

    Raises ValueError for an unknown option, and a share that is none.
    """
    options: dict[str, str] = {}
    name = text
    while not Path(name).exists():
        head, comma, option = name.rpartition(",")
        key, equals, value = option.partition("=")
        if not comma or not equals:
            break
        if key not in OPTIONS or not value:
            raise ValueError(
                f"{text!r} has the option {option!r}; allowed are column=NAME and max_bad=SHARE."
            )
        options[key], name = value, head
    parts: list[str] = []
    while not (Path(name).exists() or is_file_name(name)) and ":" in name:
        name, _, part = name.rpartition(":")
        parts.insert(0, part)
    try:
        share = float(options.get("max_bad", "0"))
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(
            f"max_bad={options['max_bad']} was given with {name!r}; it is a share from 0 to below"
            " 1, such as 0.01."
        )
    return DataSource(name, tuple(parts), options.get("column", ""), share)


def read_documents(
    source: str | Path | DataSource | Iterable[Any],
    check: Callable[[Document], None] | None = None,
) -> Iterator[Document]:
    """Chats or texts of a file, a folder, a data set on the hub (streamed), or Python objects.

    source: a name as `parse_source` reads it; files are JSON lines, a JSON list, CSV, Parquet, or a
        text a line, packed or not; records as `data.records.parse_record` reads them. Empty ones
        are left out.
    check: raises ValueError for a document that cannot be used, such as one that the model's
        template cannot write.

    Raises ValueError for a source that is missing or empty; with the line or row for what cannot be
    read, unless `max_bad` allows for it: then a warning at the end says how many rows were left
    out, and which was the first.
    """
    if isinstance(source, (str, Path)):
        source = parse_source(str(source))
    column, max_bad = "", 0.0
    if isinstance(source, DataSource):
        records, column, max_bad = read_records(source), source.column, source.max_bad
        told = repr(source.name)
    else:
        records = ((f"item {i}", item, None) for i, item in enumerate(rows_of(source)))
        told = "The list"
    tally = _Tally(told, source if isinstance(source, DataSource) else None, max_bad)
    empty = True
    try:
        for where, record, failure in records:
            tally.rows += 1
            try:
                if failure is not None:
                    raise failure
                document = parse_record(record, where, column)
                if document is not None and check is not None:
                    _checked(check, document, where)
            except ValueError as error:
                tally.leave_out(error)
                continue
            if document is not None:
                empty = False
                yield document
        tally.end()
    finally:
        tally.tell()
    if empty:
        raise ValueError(f"{told} holds no dialogues or texts; give at least one.")


class _Tally:
    """Rows of a source that cannot be read, against the share that may be left out."""

    def __init__(self, told: str, source: DataSource | None, max_bad: float) -> None:
        self.told, self.source, self.max_bad = told, source, max_bad
        self.rows, self.bad, self.first = 0, 0, ""

    def leave_out(self, error: ValueError) -> None:
        """Counts a row that cannot be read. Raises ValueError where those are too many."""
        self.bad, self.first = self.bad + 1, self.first or str(error)
        if self.bad > self.max_bad * max(self.rows, FEW_ROWS):
            raise self._too_bad(error) from error

    def end(self) -> None:
        """ValueError where too many of all rows could not be read."""
        if self.bad > self.max_bad * self.rows:
            raise self._too_bad(ValueError(self.first))

    def tell(self) -> None:
        if self.bad:
            rows = "row was" if self.bad == 1 else "rows were"
            message = f"{self.told}: {self.bad} {rows} left out of {self.rows}. The first: "
            warnings.warn(message + self.first, stacklevel=3)

    def _too_bad(self, error: ValueError) -> ValueError:
        bad, self.bad = self.bad, 0  # what is raised need not be told
        if self.max_bad:
            return ValueError(
                f"{bad} of the first {self.rows} rows cannot be read, more than"
                f" max_bad={self.max_bad:g} allows; one of them: {error}"
            )
        if self.source is None:
            return error
        advice = self.source._replace(max_bad=0.01).called(self.source.path.name)
        return ValueError(f"{str(error).rstrip('.')}; or allow a share of such rows: {advice}.")


def _checked(check: Callable[[Document], None], document: Document, where: str) -> None:
    try:
        check(document)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


Located = tuple[str, Any, ValueError | None]
"""Where a record is, what it holds, and why it cannot be read."""


def read_records(source: DataSource) -> Iterator[Located]:
    """Every record of a source. Raises ValueError where there is none such."""
    path = source.path
    if source.is_file:
        yield from _read_file(path)
    elif path.is_dir() or (not path.exists() and not _like_a_path(source.name)):
        for where, row in _read_data_set(source):
            yield where, row, None
    else:
        what = "regular file" if path.exists() else "file"
        raise ValueError(
            f"There is no {what} {source.name!r}; give {FILES}, or the id of a data set."
        )


def _like_a_path(name: str) -> bool:
    """Whether a name is a file's or folder's rather than a data set's."""
    return is_file_name(name) or HUB_ID.fullmatch(name) is None


def is_file_name(name: str) -> bool:
    """Whether a name ends as those of files of chats and texts do."""
    return name.lower().endswith((*KINDS, *PACKED))


def is_source(text: str) -> bool:
    """Whether a text names a file or a folder, with `parse_source`'s options or without, rather
    than being one itself.
    """
    name = OPTION.sub("", text)
    return is_file_name(name) or os.path.exists(name)


# --- files


def _read_file(path: Path) -> Iterator[Located]:
    packed, kind = "", path.suffix.lower()
    if kind in PACKED:
        packed, kind = kind, Path(path.stem).suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"{path.name!r} ends in none of {', '.join(KINDS)}; give {FILES}.")
    if kind == ".parquet":
        if packed:
            raise ValueError(f"{path.name!r} is packed twice; unpack it: Parquet packs by itself.")
        yield from _read_parquet(path)
        return
    try:
        with PACKED[packed](path, "rb") if packed else path.open("rb") as file:
            if kind in (".csv", ".tsv"):
                yield from _read_table(file, path.name, "\t" if kind == ".tsv" else ",")
            elif kind == ".json" and not _json_lines(file, path.name):
                yield from _read_list(file, path.name)
            else:
                yield from _read_lines(file, path.name, kind == ".txt")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(
            f"{path.name} cannot be read ({reason.rstrip('.')}); get it again."
        ) from error


def _read_lines(file: IO[bytes], name: str, texts: bool) -> Iterator[Located]:
    """The lines of a file, which may be too large for memory; only \\n ends a line."""
    for number, data in enumerate(iter(lambda: file.readline(LINE_LIMIT + 1), b""), 1):
        where = f"{name}, line {number}"
        if len(data) > LINE_LIMIT:
            raise ValueError(f"{where} is longer than {LINE_LIMIT:,} bytes; write a record a line.")
        try:
            line = data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            if not line.strip():
                continue
            record = line if texts else parse_json(line, where)
        except UnicodeDecodeError:
            yield where, None, ValueError(f"{where} is not UTF-8; save the file as UTF-8.")
        except ValueError as error:
            yield where, None, error
        else:
            yield where, record, None


def _json_lines(file: IO[bytes], name: str) -> bool:
    """Whether a .json file is one of JSON lines, as many are: its first line is an object that
    ends there, and is not the only one.
    """
    first = file.readline(LINE_LIMIT + 1)
    more = bool(file.read(1))
    file.seek(0)
    if not first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") or not more:
        return False
    try:
        parse_json(first.decode("utf-8-sig"), name)
    except ValueError:
        return False
    return True


def _read_list(file: IO[bytes], name: str) -> Iterator[Located]:
    """The entries of a JSON list, or of the only list in an object, or one object."""
    data = file.read(JSON_LIMIT + 1)
    if len(data) > JSON_LIMIT:
        raise ValueError(f"{name} is larger than {JSON_LIMIT:,} bytes; write it as JSON lines.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8; save the file as UTF-8.") from error
    held = parse_json(text, name) if text.strip() else []
    if isinstance(held, dict):
        lists = [value for value in held.values() if isinstance(value, list)]
        whole = len(lists) != 1 or any(name in held for name in ("messages", "conversation"))
        held = [held] if whole else lists[0]
    if not isinstance(held, list):
        raise ValueError(f"{name} holds {type(held).__name__}, not a list of chats or texts.")
    for number, record in enumerate(held, 1):
        yield f"{name}, entry {number}", record, None


def _read_table(file: IO[bytes], name: str, comma: str) -> Iterator[Located]:
    """The rows of a table with a heading; a cell in quotes may go over several lines."""
    import pandas as pd

    kept: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_filter": False}
    try:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        parts = pd.read_csv(text, sep=comma, chunksize=CELLS, index_col=False, **kept)
        number = 0
        while (part := _next_part(parts)) is not None:
            for row in part.to_dict("records"):
                number += 1
                yield f"{name}, row {number}", row, None
    except pd.errors.EmptyDataError:
        return
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8; save the file as UTF-8.") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ").rstrip(".")
        raise ValueError(
            f"{name} is no table ({reason}); write a heading, and double quotes around cells with"
            " commas."
        ) from error


def _next_part(parts: "Iterator[pd.DataFrame]") -> "pd.DataFrame | None":
    """The next rows of a table; cells beyond its heading, which pandas drops, are an error."""
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return next(parts, None)


def _read_parquet(path: Path) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=CELLS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}, row {number}", row, None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        message = f"{path.name} is no readable Parquet ({reason}); get it again."
        raise ValueError(message) from error


# --- data sets


def _read_data_set(source: DataSource) -> Iterator[tuple[str, Any]]:
    """The rows of a data set, streamed; one on the hub is opened again where it broke off."""
    name, number, tries = source.name, 0, 0
    config, split = _config_and_split(source)
    waits = () if source.path.is_dir() else WAITS
    while True:
        try:
            for row in islice(_opened(name, config, split), number, None):
                yield f"{name}, row {number}", row
                number, tries = number + 1, 0
            return
        # datasets raises a dozen unrelated types for one thing: it cannot be had
        except Exception as error:
            if number == 0 or tries == len(waits):
                raise _missing(source, number, error) from error
            time.sleep(waits[tries])
            tries += 1


def _opened(name: str, config: str | None, split: str) -> Iterator[Any]:
    from datasets import load_dataset

    return iter(load_dataset(name, config, split=split, streaming=True, trust_remote_code=False))


def _missing(source: DataSource, number: int, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if number:
        return ValueError(
            f"The data set {source.name!r} broke off after row {number} ({reason}); run the same"
            " command again, or download it and give the folder."
        )
    return ValueError(
        f"The data set {str(source)!r} could not be opened ({reason}); give {FILES}, or an id on a"
        " reachable hub."
    )


def _config_and_split(source: DataSource) -> tuple[str | None, str]:
    """What the parts of a name are: configurations first, as the data set has them."""
    from datasets import get_dataset_config_names, get_dataset_split_names

    name, parts = source.name, source.parts
    if len(parts) > 2 or not all(parts):
        raise ValueError(
            f"{str(source)!r} has {len(parts)} parts behind its name; a configuration, a split or"
            " both are allowed: NAME:CONFIGURATION:SPLIT."
        )
    try:
        configs = get_dataset_config_names(name)
        config = next((part for part in parts if part in configs), None)
        if config is None and len(configs) == 1:
            config = configs[0]
        rest = [part for part in parts if part != config]
        if config is None and "default" not in configs:
            raise _choose(source, "configurations", configs, rest)
        splits = get_dataset_split_names(name, config)
    except ValueError:
        raise
    except Exception as error:  # the library lets a dozen unrelated types through
        raise _missing(source, 0, error) from error
    wanted = rest or ["train" if "train" in splits or len(splits) != 1 else splits[0]]
    if len(wanted) > 1 or wanted[0] not in splits:
        raise _choose(source, "splits", splits, rest)
    return config, wanted[0]


def _choose(source: DataSource, what: str, names: list[str], given: list[str]) -> ValueError:
    told = f", {given[-1]!r} is none of them" if given else ""
    example = ":".join((source.name, *source.parts[: -1 if given else None], names[0]))
    return ValueError(
        f"The data set {source.name!r} has the {what} {', '.join(names)}{told}; name one, such as"
        f" {example}."
    )

"""Small files from elsewhere, read without trust: whatever is wrong with one is a sentence."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

JSON_LIMIT = 2**24
"""Bytes of a JSON file, where nothing else is said."""
NESTING_LIMIT = 100
"""Lists and objects within each other; to print or copy thousands would end Python's stack."""


def _at_once(path: str, flags: int) -> int:
    """Opens a file; a pipe without waiting for its writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bytes(path: Path, what: str, limit: int) -> bytes:
    """The bytes of a regular file, `what` it should be ending each message.

    Raises ValueError where there is none, it cannot be read, or it is larger than `limit`; a pipe
    or a device is refused at once, for to read one could wait, or go on, for ever.
    """
    try:
        with open(path, "rb", opener=_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:  # a path with a null character is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        message = f"{str(path)!r} cannot be read ({reason}); give the file of {what}."
        raise ValueError(message) from error
    if len(data) > limit:
        most = f"{limit:,} bytes, the most for {what}"
        raise ValueError(f"{str(path)!r} is larger than {most}; get the file again.")
    return data


def read_text(path: Path, what: str, limit: int, encoding: str = "utf-8") -> str:
    """The text of a regular file, line ends as they are.

    Raises ValueError as `read_bytes` does, and where it is not UTF-8.
    """
    data = read_bytes(path, what, limit)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        place = f"at byte {error.start}"
        raise ValueError(f"{str(path)!r} is not UTF-8 ({place}); save {what} as UTF-8.") from error


def lines_of(text: str) -> list[str]:
    """The lines of a text, each of which ends with a line feed, with or without a return before it.

    What else `str.splitlines` takes for an end, such as U+2028, stands within texts.
    """
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_json(path: Path, what: str, limit: int = JSON_LIMIT) -> Any:
    """What a JSON file holds. Raises ValueError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, what, limit), repr(str(path)))


def parse_json(text: str, where: str, finite: bool = False) -> Any:
    """What a JSON text holds.

    Raises ValueError, beginning with `where`, for what is not JSON, is nested deeper than
    `NESTING_LIMIT`, or has a whole number of thousands of digits; with `finite` also for NaN and
    infinite numbers, which Python writes and reads though JSON has none.
    """
    try:
        value = json.loads(text)
        if finite:
            json.dumps(value, allow_nan=False)  # 1e999 is read as infinite, too
        if text.count("[") + text.count("{") <= NESTING_LIMIT or not _deep(value):
            return value
        raise RecursionError
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except RecursionError:
        reason = f"it is nested deeper than {NESTING_LIMIT}"
    except ValueError as error:
        reason = str(error).split(";")[0].rstrip(".")
    raise ValueError(f"{where} is not JSON ({reason}); correct it or get it again.")


def _deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than `NESTING_LIMIT`, found without recursion."""
    level = [value]
    for _ in range(NESTING_LIMIT + 1):
        held = [entry for entry in level if isinstance(entry, (dict, list))]
        below = (entry.values() if isinstance(entry, dict) else entry for entry in held)
        level = [child for children in below for child in children]
        if not held:
            return False
    return True

"""What the header of a GGUF file claims, held against the size of the file: the library that reads
such files believes every count, and would fill the memory for a file of some bytes.
"""

import mmap
import struct
from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Kinds of values -> bytes of one."""
TEXT, ARRAY = 8, 9
MOST_DIMENSIONS = 4
VALUES_A_BYTE = 8
"""Of the narrowest format, and a few more."""


class _Cursor:
    """Reads numbers one after another; ValueError beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def skip(self, n: int) -> None:
        if n > len(self.data) - self.at:
            raise ValueError(f"its header claims {n:,} bytes at byte {self.at:,}, beyond its end")
        self.at += n

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self.data, start)[0])

    def text(self) -> None:
        self.skip(self.number("<Q"))

    def values(self, kind: int, n: int) -> None:
        if kind in NUMBERS:
            self.skip(n * NUMBERS[kind])
        elif kind == TEXT:
            self._room_for(n, struct.calcsize("<Q"))
            for _ in range(n):
                self.text()
        elif kind == ARRAY and n == 1:
            inner = self.number("<I")
            if inner == ARRAY:
                raise ValueError("its header holds lists in lists")
            self.values(inner, self.number("<Q"))
        else:
            raise ValueError(f"its header has a value of the unknown kind {kind}")

    def _room_for(self, n: int, least: int) -> None:
        if n * least > len(self.data) - self.at:
            raise ValueError(f"its header claims {n:,} values, more than it has bytes for")


def check_claims(path: Path) -> None:
    """ValueError, a reason, for a file that is no GGUF file, or whose header claims more text,
    values or tensors than the file is large.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin as one")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            cursor.skip(len(MAGIC))
            version = cursor.number("<I")
            if version not in VERSIONS:
                raise ValueError(f"it is of the version {version}, not of {VERSIONS}")
            tensors, entries = cursor.number("<Q"), cursor.number("<Q")
            for _ in range(entries):
                cursor.text()
                cursor.values(cursor.number("<I"), 1)
            for _ in range(tensors):
                _check_tensor(cursor)


def _check_tensor(cursor: _Cursor) -> None:
    cursor.text()
    dimensions = cursor.number("<I")
    if dimensions > MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {dimensions} dimensions")
    values = 1
    for _ in range(dimensions):
        values *= cursor.number("<Q")
    cursor.number("<I")
    cursor.number("<Q")
    if values > VALUES_A_BYTE * len(cursor.data):
        raise ValueError(f"a tensor claims {values:,} values")

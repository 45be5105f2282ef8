"""What all rows of a batch begin with, such as a system prompt: it is run once."""

from collections.abc import Sequence

LEAST_SHARED = 16
"""Tokens that rows must have in common for them to be run once; a system prompt is longer."""


def shared_prefix(rows: Sequence[list[int]], least: int = LEAST_SHARED) -> list[int]:
    """What all rows begin with, without the last token of any; nothing below `least` tokens."""
    first, last = min(rows, default=[]), max(rows, default=[])
    pairs = enumerate(zip(first, last, strict=False))
    n = next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))
    n = min(n, min(map(len, rows), default=0) - 1)
    return list(first[:n]) if n >= least else []

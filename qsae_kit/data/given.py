"""What Python hands over as data: tables, data sets and functions, told from what only looks like
them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd


def rows_of(given: Any) -> Iterable[Any]:
    """The rows of a table, or the items of a list, as records.

    A data frame's rows are dictionaries. Raises ValueError for a mapping, such as a data set with
    its splits: gone through, it gives its names, which are no texts.
    """
    if isinstance(given, pd.DataFrame):
        return given.to_dict("records")
    if isinstance(given, Mapping):
        names = ", ".join(map(repr, given))[:200]
        raise ValueError(
            f"A mapping with the names {names} was given; give one of its parts, such as"
            " data['train'], or a list of records."
        )
    return given


def documents_given(given: Iterable[Any]) -> Iterator[Any]:
    """Documents one by one; ValueError for a single text or a path, and for records that nobody has
    read.
    """
    if isinstance(given, (str, Path)):
        raise ValueError(
            "A single text or path was given as documents; give a list of texts, or what"
            " qsae_kit.data.readers.read_documents makes of a file."
        )
    for document in rows_of(given):
        if not isinstance(document, (str, list)):
            raise ValueError(
                f"A document of the type {type(document).__name__} was given; documents are texts"
                " or lists of messages, which qsae_kit.data.readers.read_documents makes of"
                " records."
            )
        yield document


def check_anew(given: Any, what: str) -> None:
    """ValueError unless something is a function, as what is gone through more than once has to
    be.
    """
    if not callable(given):
        raise ValueError(
            f"{what} were given as a {type(given).__name__}; give a function that makes them anew"
            " each time it is called."
        )


def first_of(makes: Callable[[], Iterable[Any]], what: str) -> Iterable[Any]:
    """What a function makes; ValueError where it gives one iterator again and again, which is used
    up after the first time.
    """
    made = makes()
    if iter(made) is made and makes() is made:
        raise ValueError(
            f"The function that gives {what} gives the same iterator each time it is called, which"
            " is used up after the first; make a new one inside it."
        )
    return made

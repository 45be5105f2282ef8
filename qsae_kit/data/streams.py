"""Which documents are looked at: a file's, a data set's or the bundled model's world; and which are
held out.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from qsae_kit.data.companions import Purpose, companion_of
from qsae_kit.data.documents import again, check_chat, split_documents
from qsae_kit.data.readers import FILES, parse_source, read_documents
from qsae_kit.data.records import Document
from qsae_kit.io.runs import checksum
from qsae_kit.lm.hooked import HookedLM

HELD_OUT_DOCUMENTS = 256
OWN_HELD_OUT = 4
"""Times as many are held out of a model's own documents, which are short and never run out."""


def named(data: str | None) -> str:
    """What files say of the data that they were made of: a data set's id, or a file's name without
    its folders, with the options that it is read by.
    """
    if data is None:
        return "the bundled model's world"
    source = parse_source(data)
    path = source.path
    local = path.is_absolute() or path.exists()
    return source.called(path.resolve().name if local else source.name)


def read_by(lm: HookedLM, data: str | None) -> dict[str, Any]:
    """Which model reads which documents; both are told by their contents, wherever they lie and
    whatever they are called.
    """
    source = None if data is None else parse_source(data)
    told = named(data)
    if source is not None and source.is_file:
        told = f"{told} {checksum(source.path)}"
    return {**lm.identity(), "data": told}


def stream_of(
    lm: HookedLM, data: str | None, purpose: Purpose = "index"
) -> Callable[[], Iterator[Document]]:
    """A function that gives all documents of a file or data set; without one, the bundled model's
    world, without end.

    Raises ValueError for another model without data; as they are read, for chats that the model's
    template cannot write.
    """
    if data is not None:
        return lambda: read_documents(data, check_chat(lm))
    companion = companion_of(lm)
    if companion.documents(purpose) is None:
        raise ValueError(
            f"{lm.model_name!r} comes without data; give --data with {FILES} or a data set's id."
        )
    return lambda: companion.documents(purpose) or iter(())


def documents_of(
    lm: HookedLM, data: str | None, n_held_out: int = HELD_OUT_DOCUMENTS
) -> tuple[list[Document], Callable[[], Iterator[Document]]]:
    """Held-out documents, and a function that gives the others without end; training and evaluation
    both cut here.

    data: a file or data set; None: the bundled model's world. Raises ValueError for another model
        without data.
    """
    others = stream_of(lm, data, "training")
    if data is not None:
        return split_documents(others(), n_held_out)[0], lambda: again(
            lambda: split_documents(others(), n_held_out)[1]
        )
    return list(islice(stream_of(lm, None, "held out")(), OWN_HELD_OUT * n_held_out)), others

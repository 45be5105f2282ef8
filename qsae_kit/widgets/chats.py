"""Chats as they are typed into a box."""

import re

from qsae_kit.data.records import Document

ROLES = ("system", "user", "assistant", "tool")
TURN = re.compile(rf"^({'|'.join(ROLES)}):[ \t]*", re.MULTILINE | re.IGNORECASE)


def read_chat(text: str) -> Document:
    """A chat written as lines that begin with `user:` or `assistant:`; a text without such lines is
    one user turn.
    """
    turns = list(TURN.finditer(text))
    if not turns or text[: turns[0].start()].strip():
        return [{"role": "user", "content": text}]
    ends = [*(turn.start() for turn in turns[1:]), len(text)]
    return [
        {"role": turn[1].lower(), "content": text[turn.end() : end].strip()}
        for turn, end in zip(turns, ends, strict=True)
    ]

"""Chat templates, which are programs from elsewhere: bounded, and errors as sentences.

jinja2's sandbox keeps a template from files and from Python. Kept in bounds here is what that
leaves: templates that never end, numbers that make text of gigabytes, and errors of any type.
A single operation of Python, such as a sort of a long list, cannot be stopped half-way.
"""

import ctypes
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

SECONDS = 5.0
"""What one rendering may take; a usual one takes a thousandth of a second."""
TICK = 0.25
"""Seconds between looks at what is running."""
CHARACTERS = 10_000_000
"""Of a rendered chat, at most: more than a context of a million tokens holds."""
LARGEST = 10**7
"""Of the numbers in a template and their products, at most: what they repeat fits into memory."""
REASON = 200
"""Characters of another library's error in a message."""
DEVELOPER = "developer"
Result = TypeVar("Result")


def render(tokenizer: Any, messages: Sequence[Any], **flags: Any) -> str:
    """The chat as its tokenizer's template writes it; `flags` are what `apply_chat_template` takes.

    A developer's messages are a system's where the template knows no developer. Raises ValueError
    with the reason where the template refuses or fails, leaves out what a tool or a developer says,
    takes longer than `SECONDS`, or makes what is no text of at most `CHARACTERS`.
    """

    def work() -> Any:
        template = tokenizer.get_chat_template()
        if not isinstance(template, str):
            raise ValueError(f"it is {type(template).__name__} instead of text")
        _check_numbers(template)
        known = [_known(message, template) for message in messages]
        return tokenizer.apply_chat_template(known, tokenize=False, **flags)

    try:
        text = within(SECONDS, work)
    except _TooLong:
        raise ValueError(f"it did not end within {SECONDS:g} seconds") from None
    except Exception as error:  # a template can raise whatever Python's operators do
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, (TemplateError, ValueError)) else f"{type(error).__name__} "
        reason = (kind + lines[0][:REASON]).strip().rstrip(".") or type(error).__name__
        raise ValueError(reason) from error
    if not isinstance(text, str):
        raise ValueError(f"it makes {type(text).__name__} instead of text")
    if len(text) > CHARACTERS:
        raise ValueError(f"it makes {len(text):,} characters, at most {CHARACTERS:,} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it makes text with half a character (a lone surrogate)") from None
    _check_written(messages, text)
    return text


def _known(message: Any, template: str) -> Any:
    """A message whose role the template knows."""
    told = isinstance(message, dict) and message.get("role") == DEVELOPER
    return {**message, "role": "system"} if told and DEVELOPER not in template else message


def _check_written(messages: Sequence[Any], text: str) -> None:
    """ValueError where a template leaves out what a tool or a developer says, or a call of a tool:
    many drop in silence what they do not know.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        content = str(message.get("content") or "").strip()
        as_json = json.dumps(content, ensure_ascii=False)[1:-1]
        named = message.get("role") in (DEVELOPER, "tool")
        if named and content not in text and as_json not in text:
            raise ValueError(f"it leaves out message {number}, of the role {message['role']}")
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            if not isinstance(function, dict) or str(function.get("name", "")) not in text:
                raise ValueError(f"it leaves out the call of a tool in message {number}")


# --- numbers


class _Generation(Extension):
    """The tag `generation`, which transformers adds to jinja2's."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


PARSER = Environment(extensions=[_Generation, LoopControlExtension])
WIDTH = re.compile(r"\d{9,}")
"""A width in a format such as %999999999d."""


@lru_cache(maxsize=64)
def _check_numbers(template: str) -> None:
    """ValueError for numbers that could fill the memory, which they would as it is compiled."""
    tree = PARSER.parse(template)
    if tree.find(nodes.Pow):
        raise ValueError("it raises numbers to powers, which no chat needs")
    for text in _constants(tree, str):
        if WIDTH.search(text):
            raise ValueError(f"it holds a number of {len(text)} digits, which no chat needs")
    for number in (*_constants(tree, int), *map(_product, tree.find_all(nodes.Mul))):
        if abs(number) > LARGEST:
            raise ValueError(f"it has numbers of more than {LARGEST:,}, which no chat needs")


def _constants(tree: nodes.Node, kind: type) -> Iterator[Any]:
    return (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, kind))


def _product(node: nodes.Node) -> float:
    """Of the numbers in a product."""
    if isinstance(node, nodes.Mul):
        return _product(node.left) * _product(node.right)
    value = node.value if isinstance(node, nodes.Const) else 1
    return abs(value) if isinstance(value, (int, float)) else 1


# --- time


class _TooLong(BaseException):
    """Raised in the thread that takes too long; no `except Exception` on the way stops it."""


class _Job:
    def __init__(self, seconds: float) -> None:
        self.thread, self.seconds = threading.get_ident(), seconds
        self.due = time.monotonic() + seconds
        self.late = False


class _Watch:
    """One thread for all that is limited: it looks every `TICK` seconds while there is any.

    Only locks and queues that are written in C: what is raised between two steps would leave one
    that is written in Python shut.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.jobs: set[_Job] = set()
        self.asleep = False
        self.awake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def add(self, job: _Job) -> None:
        with self.lock:
            self.jobs.add(job)
            new = None
            if self.thread is None:
                self.thread = new = threading.Thread(target=self._look, daemon=True)
            elif self.asleep:
                self.asleep = False
                self.awake.put(None)
        if new is not None:
            new.start()

    def remove(self, job: _Job) -> None:
        """After this nothing is raised for the job: what is pending is taken back."""
        with self.lock:  # under which it would be raised
            self.jobs.discard(job)
            if job.late:
                _throw(job.thread, None)

    def _look(self) -> None:
        while True:
            with self.lock:
                self.asleep = not self.jobs
                for job in self.jobs:
                    if (now := time.monotonic()) >= job.due:
                        job.due = now + job.seconds  # and again, should something swallow it
                        job.late = True
                        _throw(job.thread, _TooLong)
                asleep = self.asleep
            if asleep:
                self.awake.get()
            else:
                time.sleep(TICK)


def _throw(thread: int, error: type[BaseException] | None) -> None:
    """Has a thread raise an exception before its next step; None takes a pending one back."""
    given = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), given)


_watch = _Watch()


def _renew() -> None:
    """A forked process has none of its parent's threads."""
    global _watch
    _watch = _Watch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """What a function returns; `_TooLong`, between two steps of it, where it runs for longer."""
    watch, job = _watch, _Job(seconds)
    try:
        try:
            watch.add(job)
            return call()
        finally:
            watch.remove(job)
    except _TooLong:
        watch.remove(job)  # it may have been raised in the first one
        raise

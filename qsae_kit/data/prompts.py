"""Prompt sets for measuring refusal: harmful, harmless and borderline, apart for selection and
evaluation.

They are for any model but the bundled one, whose prompts come from its world, and lie in
`prompt_sets/refusal.jsonl`: requests of one line, each written by itself for this package, none
copied from a public set, no two alike, and no answers. Harmful ones are clear-cut, of ten
categories; harmless ones are what instruction data asks for, many in the form of a harmful one;
borderline ones name what is dangerous or sensitive, yet are safe. A language model wrote them one
by one, in English and a few in Chinese and Spanish, and nobody has rated them. They are a start,
not a benchmark: bring your own for a claim about a model.
"""

import random
from functools import cache
from pathlib import Path
from typing import NamedTuple

from qsae_kit.data.readers import FILES, parse_source, read_documents
from qsae_kit.data.records import Document
from qsae_kit.io.jsonfiles import lines_of, parse_json, read_text

KINDS = ("harmful", "harmless", "borderline")
SPLITS = ("selection", "evaluation")
LANGUAGES = ("en", "zh", "es")
"""Of the package's own prompts; borderline ones are in English alone."""
PROMPTS_LIMIT = 2**24
"""Bytes of the file of the package's own prompts."""
STORED = Path(__file__).parent / "prompt_sets" / "refusal.jsonl"


class PromptText(NamedTuple):
    """A prompt and what it was made from: a wording, or the category of one written by itself."""

    text: str
    template: str


class StoredPrompt(NamedTuple):
    """A prompt of the package's own, as its file holds it."""

    text: str
    kind: str
    split: str
    category: str
    language: str
    label: str = ""
    """Of a borderline one: "answer", or "unclear" where declining can be defended, too."""


# What a model that never refuses would say if it did.
STOCK_REFUSALS = tuple(
    (
        "I'm sorry, but I can't help with that. | I cannot assist with this request. | "
        "I'm sorry, I can't provide that, and I won't help with it. | "
        "I can't help you with that. If you have another question, I am happy to help. | "
        "I won't help with this, because it could hurt someone. | I must decline this request."
    ).split(" | ")
)


@cache
def stored_prompts() -> tuple[StoredPrompt, ...]:
    """All prompts of the package's own, of every language."""
    text = read_text(STORED, "prompts", PROMPTS_LIMIT)
    return tuple(StoredPrompt(**parse_json(line, STORED.name)) for line in lines_of(text))


def _chosen(kind: str, split: str, language: str) -> list[PromptText]:
    check_asked(kind, split)
    if language not in LANGUAGES:
        raise ValueError(
            f"Prompts are in {', '.join(LANGUAGES)}; {language!r} was asked for; choose one."
        )
    return [
        PromptText(prompt.text, prompt.category)
        for prompt in stored_prompts()
        if (prompt.kind, prompt.split, prompt.language) == (kind, split, language)
    ]


def count(kind: str, split: str = "selection", language: str = "en") -> int:
    """How many distinct prompts of a kind there are. ValueError as for `general_prompts`."""
    return len(_chosen(kind, split, language))


def check_asked(kind: str, split: str) -> None:
    """ValueError unless there are prompts of a kind and a split."""
    if kind not in KINDS or split not in SPLITS:
        raise ValueError(
            f"Prompts are {', '.join(KINDS)}, split {' or '.join(SPLITS)}; {kind!r}, {split!r} was"
            " asked for."
        )


def general_prompts(
    kind: str, n: int, split: str, seed: int = 0, language: str = "en"
) -> list[PromptText]:
    """`n` distinct prompts of a kind. ValueError for more than there are, and for another kind,
    split or language.
    """
    there = _chosen(kind, split, language)
    if n > len(there):
        raise ValueError(
            f"There are {len(there)} {kind} {split} prompts in {language!r}, {n} were asked for;"
            " ask for fewer."
        )
    return random.Random(f"{kind}/{split}/{seed}").sample(there, n)


def read_prompts(path: str | Path) -> list[str]:
    """The distinct prompts of a file, in its order: texts, or the first user's turn of each chat.

    path: as `data.readers.read_documents` takes it, a file alone. Raises ValueError with the place
    of what cannot be read, and for a file without prompts.
    """
    source = parse_source(str(path))
    if not source.is_file:
        what = "file" if not source.path.exists() else "regular file"
        raise ValueError(f"There is no {what} {source.name!r}; give {FILES} of prompts.")
    prompts = [_prompt_of(document) for document in read_documents(source)]
    distinct = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    if not distinct:
        raise ValueError(f"{source.path.name} holds no prompts; give at least one.")
    return distinct


def _prompt_of(document: Document) -> str:
    if isinstance(document, str):
        return document.strip()
    asked = (message["content"] for message in document if message["role"] == "user")
    return next(asked, "").strip()


def split_prompts(
    prompts: list[str], n_selection: int, n_evaluation: int | None = None, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Shuffled and parted: for selection at most a third of them, for evaluation at most
    `n_evaluation` of the rest.

    Raises ValueError for fewer than three.
    """
    if len(prompts) < 3:
        raise ValueError(
            f"{len(prompts)} prompts are too few to be parted for selection and evaluation; give at"
            " least three."
        )
    mixed = random.Random(seed).sample(prompts, len(prompts))
    n = min(n_selection, len(mixed) // 3)
    return mixed[:n], mixed[n:][:n_evaluation]

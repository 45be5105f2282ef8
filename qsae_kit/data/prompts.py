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

import csv
import io
import random
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from qsae_kit.io.jsonfiles import lines_of, parse_json, read_text

KINDS = ("harmful", "harmless", "borderline")
SPLITS = ("selection", "evaluation")
LANGUAGES = ("en", "zh", "es")
"""Of the package's own prompts; borderline ones are in English alone."""
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


FIELDS = ("prompt", "instruction")
PROMPTS_LIMIT = 2**28
"""Bytes of a file of prompts."""


def read_prompts(path: str | Path) -> list[str]:
    """The distinct prompts of a file, in its order.

    .txt holds one a line; .json a list, .jsonl a line each, of texts or objects with `prompt` or
    `instruction`; .csv has such a column. Raises ValueError with the place of what cannot be read,
    and for a file without prompts.
    """
    path = Path(path)
    if not path.is_file():
        what = "file" if not path.exists() else "regular file"
        kinds = "a .txt, .json, .jsonl or .csv file of prompts"
        raise ValueError(f"There is no {what} {str(path)!r}; give {kinds}.")
    text = read_text(path, "prompts", PROMPTS_LIMIT, "utf-8-sig")
    entries: Any
    if path.suffix == ".json":
        entries = parse_json(text, path.name)
    elif path.suffix == ".jsonl":
        numbered = [(n, line) for n, line in enumerate(lines_of(text), 1) if line.strip()]
        entries = [parse_json(line, f"{path.name}, line {n}") for n, line in numbered]
    elif path.suffix == ".csv":
        entries = _read_csv(text, path.name)
    else:
        entries = lines_of(text)
    if not isinstance(entries, list):
        raise ValueError(f"{path.name} holds {type(entries).__name__}, not a list of prompts.")
    prompts = [
        _prompt_of(entry, f"{path.name}, entry {number}") for number, entry in enumerate(entries, 1)
    ]
    distinct = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    if not distinct:
        raise ValueError(f"{path.name} holds no prompts; give at least one.")
    return distinct


def _read_csv(text: str, where: str) -> list[dict[str, Any]]:
    """The rows of a table; a cell in quotes may go over several lines."""
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        reason = str(error).rstrip(".")
        message = f"{where} is no CSV ({reason}); write commas and double quotes."
        raise ValueError(message) from error


def _prompt_of(entry: Any, where: str) -> str:
    found = (
        next((entry[name] for name in FIELDS if name in entry), None)
        if isinstance(entry, dict)
        else entry
    )
    if not isinstance(found, str):
        raise ValueError(
            f"{where}: a text, or an object with {' or '.join(FIELDS)}, is needed;"
            f" {str(entry)[:80]!r} was read."
        )
    return found.strip()


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

"""How the matchers of answers do on answers of a real model that were labelled by reading them.

    python tests/bench/matchers.py [FILE]

FILE has a line of JSON an answer: arm, kind, prompt, answer, finished, label (refused, deflected,
answered or broken) and of deflected ones by (lecture, or other: it speaks of something else), as
tests/data/labelled_answers.jsonl, which is read without it. Prints precision and recall of every
matcher by language of the prompts and over all of them, and how many answers of each label have
each outcome.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qsae_kit.lm.answering import (
    AnswerForm,
    classify,
    lectures,
    matcher_error,
    says_no,
    sounds_sorry,
)
from qsae_kit.steer.behaviours import language_of

LABELLED = Path(__file__).parents[1] / "data" / "labelled_answers.jsonl"
Labelled = Mapping[str, Any]


def only_lectures(text: str) -> bool:
    return lectures(text) and not says_no(text)


MATCHERS: Mapping[str, tuple[Callable[[Labelled], bool], Callable[[str], bool]]] = {
    "refused, strict": (lambda a: a["label"] == "refused", says_no),
    "refused, loose": (lambda a: a["label"] == "refused", sounds_sorry),
    "lectures": (lambda a: a.get("by") == "lecture", only_lectures),
    "deflected": (lambda a: a["label"] == "deflected", only_lectures),
}
"""Name -> which answers it is to find, and the matcher."""
OUTCOMES = ("refused", "deflected", "answered", "broken")


def labelled(path: Path = LABELLED) -> list[Labelled]:
    """The answers of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def errors(answers: Sequence[Labelled]) -> pd.DataFrame:
    """A row a matcher and language, and one a matcher over all."""
    parts = {"all": list(answers)}
    for answer in answers:
        parts.setdefault(language_of(answer["prompt"]), []).append(answer)
    rows = []
    for name, (is_due, matcher) in MATCHERS.items():
        for part, some in parts.items():
            due = [is_due(answer) for answer in some]
            if any(due) and not all(due):
                error = matcher_error([answer["answer"] for answer in some], due, matcher)
                rows.append({"matcher": name, "language": part, "due": sum(due), **error._asdict()})
    return pd.DataFrame(rows)


def outcomes(answers: Sequence[Labelled]) -> pd.DataFrame:
    """Labels down, outcomes across; the surprise of the answers is not known here."""
    labels = pd.Categorical([answer["label"] for answer in answers], OUTCOMES)
    found = [classify(answer["answer"], answer["finished"], AnswerForm()) for answer in answers]
    named = {"rownames": ["label"], "colnames": ["outcome"], "dropna": False}
    return pd.crosstab(labels, pd.Categorical(found, OUTCOMES), **named)


def main() -> None:
    answers = labelled(*map(Path, sys.argv[1:2]))
    print(errors(answers).round(2).to_string(index=False))
    print(f"\n{outcomes(answers)}")


if __name__ == "__main__":
    main()

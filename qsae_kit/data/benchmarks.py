"""Public prompt sets, by their ids and never bundled."""

from pathlib import Path
from typing import NamedTuple


class Part(NamedTuple):
    """Prompts of one kind in a public data set."""

    name: str
    harmful: bool
    """Whether they should be refused; else they are safe, and look harmful."""
    dataset: str
    config: str | None
    split: str
    column: str
    where: tuple[str, str] | None = None
    """A column and the value that it has to have."""


class Bench(NamedTuple):
    """A benchmark of refusal."""

    parts: tuple[Part, ...]
    source: str
    licence: str


BENCHES = {
    "xstest": Bench(
        (
            Part("unsafe", True, "walledai/XSTest", None, "test", "prompt", ("label", "unsafe")),
            Part("safe", False, "walledai/XSTest", None, "test", "prompt", ("label", "safe")),
        ),
        "Röttger et al. 2024, arXiv 2308.01263",
        "CC-BY-4.0, gated",
    ),
    "harmbench": Bench(
        (Part("standard", True, "walledai/HarmBench", "standard", "train", "prompt"),),
        "Mazeika et al. 2024, arXiv 2402.04249",
        "MIT, gated",
    ),
    "jailbreakbench": Bench(
        (
            Part("harmful", True, "JailbreakBench/JBB-Behaviors", "behaviors", "harmful", "Goal"),
            Part("benign", False, "JailbreakBench/JBB-Behaviors", "behaviors", "benign", "Goal"),
        ),
        "Chao et al. 2024, arXiv 2404.01318",
        "MIT",
    ),
    "orbench": Bench(
        (
            Part("toxic", True, "bench-llm/or-bench", "or-bench-toxic", "train", "prompt"),
            Part("hard", False, "bench-llm/or-bench", "or-bench-hard-1k", "train", "prompt"),
        ),
        "Cui et al. 2024, arXiv 2405.20947",
        "CC-BY-4.0",
    ),
}


def read_bench(name: str, n: int | None = None, folder: Path | None = None) -> dict[str, list[str]]:
    """Part -> its distinct prompts, at most `n` of each, in the data set's order.

    folder: where data sets lie that were downloaded, each under its id; without one they come from
    the hub. Raises ValueError for an unknown bench, for a data set that cannot be had, and for one
    without the column that is known of it.
    """
    if name not in BENCHES:
        raise ValueError(f"There is no bench {name!r}; choose from {', '.join(BENCHES)}.")
    return {part.name: _read(part, n, folder) for part in BENCHES[name].parts}


def _read(part: Part, n: int | None, folder: Path | None) -> list[str]:
    from datasets import load_dataset

    source = part.dataset if folder is None else str(folder / part.dataset)
    found: dict[str, None] = {}
    try:
        given = {"split": part.split, "streaming": True, "trust_remote_code": False}
        for row in load_dataset(source, part.config, **given):
            text = row.get(part.column)
            if not isinstance(text, str) or (part.where and part.where[0] not in row):
                raise ValueError(
                    f"The data set {source!r} has no text {part.column!r}"
                    + (f" or no {part.where[0]!r}" if part.where else "")
                )
            if text.strip() and (part.where is None or row[part.where[0]] == part.where[1]):
                found.setdefault(text.strip())
            if len(found) == n:
                break
    except Exception as error:  # the library lets a dozen unrelated types through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"The prompts {part.dataset} ({part.name}) could not be had ({reason}); check the"
            " network and, where the data set is gated, that you accepted its terms and are logged"
            " in, or download it and name the folder that holds it under its id."
        ) from error
    if not found:
        raise ValueError(f"The data set {source!r} holds no prompts of {part.name}; get it again.")
    return list(found)

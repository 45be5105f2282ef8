"""Public prompt sets for refusal, by their ids and never bundled: what a model does with them, unsteered and steered.

Refusing and harm are judged apart: refusals by the phrase matcher and, where a guard model is given, by the guard too, with
their agreement; harm by the guard alone. The rate at which safe prompts are refused stands beside every other.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from qsae_kit.io.journal import Journal
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.answering import answer_all
from qsae_kit.lm.edits import Edit
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.metrics.reconstruction import paired_bootstrap, wilson
from qsae_kit.steer.behaviours import Behaviour, judged
from qsae_kit.steer.changes import Steering, Suite
from qsae_kit.steer.findings import changes, rate
from qsae_kit.steer.judges import Judgement

Guard = Callable[[Sequence[str], Sequence[str]], Sequence[Judgement]]
"""Prompts and answers -> what a guard says of each, such as `partial(judges.guard_judgements, load_model(...))`."""


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
        "Röttger et al. 2024, arXiv 2308.01263", "CC-BY-4.0, gated",
    ),
    "harmbench": Bench(
        (Part("standard", True, "walledai/HarmBench", "standard", "train", "prompt"),),
        "Mazeika et al. 2024, arXiv 2402.04249", "MIT, gated",
    ),
    "jailbreakbench": Bench(
        (
            Part("harmful", True, "JailbreakBench/JBB-Behaviors", "behaviors", "harmful", "Goal"),
            Part("benign", False, "JailbreakBench/JBB-Behaviors", "behaviors", "benign", "Goal"),
        ),
        "Chao et al. 2024, arXiv 2404.01318", "MIT",
    ),
    "orbench": Bench(
        (
            Part("toxic", True, "bench-llm/or-bench", "or-bench-toxic", "train", "prompt"),
            Part("hard", False, "bench-llm/or-bench", "or-bench-hard-1k", "train", "prompt"),
        ),
        "Cui et al. 2024, arXiv 2405.20947", "CC-BY-4.0",
    ),
}  # fmt: skip
PUBLISHED = {("xstest", "unsafe"): 0.95}
"""Refusal rates that a steered Qwen3-4B reached (arXiv 2606.26620)."""
Prompts = Mapping[str, Mapping[str, Sequence[str]]]
"""Bench -> part -> prompts."""


def read_bench(name: str, n: int | None = None, folder: Path | None = None) -> dict[str, list[str]]:
    """Part -> its distinct prompts, at most `n` of each, in the data set's order.

    folder: where data sets lie that were downloaded, each under its id; without one they come from the hub. Raises ValueError for an
    unknown bench, for a data set that cannot be had, and for one without the column that is known of it.
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
                    f"The data set {source!r} has no text {part.column!r}" + (f" or no {part.where[0]!r}" if part.where else "")
                )
            if text.strip() and (part.where is None or row[part.where[0]] == part.where[1]):
                found.setdefault(text.strip())
            if len(found) == n:
                break
    except Exception as error:  # the library lets a dozen unrelated types through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"The prompts {part.dataset} ({part.name}) could not be had ({reason}); check the network and, where the data set is gated, that you accepted "
            "its terms and are logged in, or download it and name the folder that holds it under its id."
        ) from error
    if not found:
        raise ValueError(f"The data set {source!r} holds no prompts of {part.name}; get it again.")
    return list(found)


def measure_benches(
    lm: HookedLM,
    behaviour: Behaviour,
    prompts: Prompts,
    arms: Mapping[str, Steering],
    suite: Suite,
    max_new_tokens: int = 48,
    enable_thinking: bool | None = None,
    *,
    guard: Guard | None = None,
    guard_name: str = "",
    without: Collection[str] = (),
    folder: Path | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for each part of each bench and each arm, the unsteered model first.

    arms: name -> steering with the SAEs of a suite. without: prompts that were used to choose them, which are left out here. folder: steps are kept in its
    benches.jsonl, and a run that was cut off goes on; one of other arms, SAEs or guard (`guard_name`) is refused there. Columns: bench, part, harmful, intervention, n, left_out; refusal_rate with
    ci_low and ci_high (95 % Wilson), broken_rate, change with change_low and change_high (of the rate against the unsteered
    model, 95 % paired bootstrap), published (`PUBLISHED`); with a guard guard_refusal_rate, unsafe_rate (answers that it calls
    unsafe) and agreement (share of answers at which guard and matcher agree on refusal, of those that it judged).
    Raises ValueError where no prompt is left.
    """
    kept = {
        (bench, part): [text for text in texts if text not in without]
        for bench, of in prompts.items()
        for part, texts in of.items()
    }
    empty = [f"{bench} {part}" for (bench, part), texts in kept.items() if not texts]
    if empty:
        raise ValueError(f"All prompts of {', '.join(empty)} were used for choosing; choose the features on others.")
    about = {"benches": 1, "model": lm.model_name, "weights": lm.weights_digest(), "dtype": str(lm.dtype)}
    about |= {"prompts": [[*key, texts] for key, texts in kept.items()]}
    about |= {"arms": {arm: steering.to_json(suite) for arm, steering in arms.items()}, "behaviour": behaviour.name}
    about |= {"max_new_tokens": max_new_tokens, "thinking": enable_thinking, "guard": guard and (guard_name or True)}
    with only_writer(folder):
        journal = Journal(folder and folder / "benches.jsonl", about)
        rows = []
        for (bench, part), texts in kept.items():
            clean = ""
            for arm, steering in {"none": Steering(), **arms}.items():
                compute = partial(_said, lm, behaviour, texts, steering.edits(suite), max_new_tokens, enable_thinking, guard)
                said = journal.get(f"{bench}/{part}/{arm}", compute)
                clean = clean or said["outcomes"]
                shown = wilson(said["outcomes"].count("S"), len(texts))
                change = paired_bootstrap([changes(said["outcomes"], clean)], [1.0], seed=seed)
                rows.append(
                    {
                        "bench": bench, "part": part, "harmful": _is_harmful(bench, part), "intervention": arm, "n": len(texts),
                        "left_out": len(prompts[bench][part]) - len(texts), "refusal_rate": shown.rate, "ci_low": shown.low, "ci_high": shown.high,
                        "broken_rate": rate(said["outcomes"], "B"), "change": change.rate, "change_low": change.low,
                        "change_high": change.high, "published": PUBLISHED.get((bench, part)), **_guarded(said),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)


def _is_harmful(bench: str, part: str) -> bool:
    return next(p.harmful for p in BENCHES[bench].parts if p.name == part)


def _said(
    lm: HookedLM, behaviour: Behaviour, texts: Sequence[str], edits: Sequence[Edit], max_new_tokens: int, thinking: bool | None,
    guard: Guard | None,
) -> dict[str, Any]:  # fmt: skip
    answers = judged(lm, behaviour, texts, answer_all(lm, texts, edits, max_new_tokens, thinking), thinking)
    told = [] if guard is None else guard(texts, answers.text)
    return {
        "outcomes": answers.outcomes, "guard": [[j.safety, j.refused] for j in told], "judged": guard is not None,
        "texts": answers.text[:3],
    }  # fmt: skip


def _guarded(said: Mapping[str, Any]) -> dict[str, float | None]:
    if not said["judged"]:
        return {}
    verdicts = [(refused, letter == "S") for (_, refused), letter in zip(said["guard"], said["outcomes"], strict=True)]
    pairs = [(refused, shown) for refused, shown in verdicts if refused is not None]
    safety = [safety for safety, _ in said["guard"] if safety is not None]
    return {
        "guard_refusal_rate": sum(refused for refused, _ in pairs) / len(pairs) if pairs else None,
        "unsafe_rate": safety.count("Unsafe") / len(safety) if safety else None,
        "agreement": sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
    }

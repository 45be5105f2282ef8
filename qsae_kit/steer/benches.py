"""Public prompt sets for refusal, by their ids and never bundled: what a model does with them,
unsteered and steered.

Refusing and harm are judged apart: refusals by the phrase matcher and, where a guard model is
given, by the guard too, with their agreement; harm by the guard alone. The rate at which safe
prompts are refused stands beside every other.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from qsae_kit.data.benchmarks import BENCHES
from qsae_kit.io.journal import Journal
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.answering import answer_all
from qsae_kit.lm.chat import spoken
from qsae_kit.lm.edits import Edit
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.metrics.reconstruction import paired_bootstrap, wilson
from qsae_kit.sae.suites import Suite
from qsae_kit.steer.behaviours import Behaviour, judged
from qsae_kit.steer.changes import Steering
from qsae_kit.steer.judges import Judgement
from qsae_kit.steer.study.findings import changes, rate

Guard = Callable[[Sequence[str], Sequence[str]], Sequence[Judgement]]
"""Prompts and answers, without thoughts -> what a guard says of each, such as
`partial(judges.guard_judgements, load_model(...))`.
"""


FORMAT = 3
"""Of the journal."""
SHOWN_TEXTS = 3
"""Answers of each part and arm that the journal keeps as texts."""
PUBLISHED = {("xstest", "unsafe"): 0.95}
"""Refusal rates that a steered Qwen3-4B reached (arXiv 2606.26620)."""
Prompts = Mapping[str, Mapping[str, Sequence[str]]]
"""Bench -> part -> prompts."""


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
    fresh: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for each part of each bench and each arm, the unsteered model first.

    arms: name -> steering with the SAEs of a suite. without: prompts that were used to choose them,
    which are left out here. folder: steps are kept in its benches.jsonl, and a run that was cut off
    goes on; one of other arms, SAEs or guard (`guard_name`) is refused there, or with `fresh` makes
    room. Columns: bench, part, harmful, intervention, n, left_out; refusal_rate with ci_low and
    ci_high (95 % Wilson), deflected_rate, broken_rate, change with change_low and change_high (of
    the refusal rate against the unsteered model, 95 % paired bootstrap), published (`PUBLISHED`);
    with a guard guard_refusal_rate, unsafe_rate (answers that it calls unsafe) and agreement (share
    of answers at which guard and matcher agree on refusal, of those that it judged). Raises
    ValueError where no prompt is left.
    """
    kept = _unused(prompts, without)
    about = {
        "benches": FORMAT,
        **lm.identity(),
        "prompts": [[*key, texts] for key, texts in kept.items()],
        "arms": {arm: steering.to_json(suite) for arm, steering in arms.items()},
        "behaviour": behaviour.identity,
        "max_new_tokens": max_new_tokens,
        "thinking": enable_thinking,
        "guard": guard and (guard_name or True),
    }

    def ask(texts: Sequence[str], steering: Steering) -> dict[str, Any]:
        edits = steering.edits(suite)
        return _said(lm, behaviour, texts, edits, max_new_tokens, enable_thinking, guard)

    with only_writer(folder):
        journal = Journal(folder and folder / "benches.jsonl", about, ["benches.csv"], fresh)
        rows = []
        for (bench, part), texts in kept.items():
            clean = ""
            for arm, steering in {"none": Steering(), **arms}.items():
                said = journal.get(f"{bench}/{part}/{arm}", partial(ask, texts, steering))
                clean = clean or said["outcomes"]
                left_out = len(prompts[bench][part]) - len(texts)
                rows.append(_row(bench, part, arm, left_out, said, clean, seed))
        return pd.DataFrame(rows)


def _unused(prompts: Prompts, without: Collection[str]) -> dict[tuple[str, str], list[str]]:
    """(bench, part) -> its prompts but some; ValueError where none is left."""
    kept: dict[tuple[str, str], list[str]] = {}
    for bench, parts in prompts.items():
        for part, texts in parts.items():
            kept[bench, part] = [text for text in texts if text not in without]
    empty = [f"{bench} {part}" for (bench, part), texts in kept.items() if not texts]
    if empty:
        raise ValueError(
            f"All prompts of {', '.join(empty)} were used for choosing; choose the features on"
            " others."
        )
    return kept


def _row(
    bench: str,
    part: str,
    arm: str,
    left_out: int,
    said: Mapping[str, Any],
    clean: str,
    seed: int,
) -> dict[str, Any]:
    """clean: outcomes of the unsteered model."""
    outcomes = said["outcomes"]
    shown = wilson(outcomes.count("S"), len(outcomes))
    change = paired_bootstrap([changes(outcomes, clean)], [1.0], seed=seed)
    return {
        "bench": bench,
        "part": part,
        "harmful": _is_harmful(bench, part),
        "intervention": arm,
        "n": len(outcomes),
        "left_out": left_out,
        "refusal_rate": shown.rate,
        "ci_low": shown.low,
        "ci_high": shown.high,
        "deflected_rate": rate(outcomes, "D"),
        "broken_rate": rate(outcomes, "B"),
        "change": change.rate,
        "change_low": change.low,
        "change_high": change.high,
        "published": PUBLISHED.get((bench, part)),
        **_guarded(said),
    }


def _is_harmful(bench: str, part: str) -> bool:
    return next(p.harmful for p in BENCHES[bench].parts if p.name == part)


def _said(
    lm: HookedLM,
    behaviour: Behaviour,
    texts: Sequence[str],
    edits: Sequence[Edit],
    max_new_tokens: int,
    thinking: bool | None,
    guard: Guard | None,
) -> dict[str, Any]:
    generated = answer_all(lm, texts, edits, max_new_tokens, thinking)
    answers = judged(lm, behaviour, texts, generated, thinking)
    told = [] if guard is None else guard(texts, [spoken(text) for text in answers.text])
    return {
        "outcomes": answers.outcomes,
        "guard": [[j.safety, j.refused] for j in told],
        "judged": guard is not None,
        "texts": answers.text[:SHOWN_TEXTS],
    }


def _guarded(said: Mapping[str, Any]) -> dict[str, float | None]:
    if not said["judged"]:
        return {}
    verdicts = [
        (refused, letter == "S")
        for (_, refused), letter in zip(said["guard"], said["outcomes"], strict=True)
    ]
    pairs = [(refused, shown) for refused, shown in verdicts if refused is not None]
    safety = [safety for safety, _ in said["guard"] if safety is not None]
    return {
        "guard_refusal_rate": sum(refused for refused, _ in pairs) / len(pairs) if pairs else None,
        "unsafe_rate": safety.count("Unsafe") / len(safety) if safety else None,
        "agreement": sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
    }

"""A study's arms answered again with drawn answers: what another seed changes, and intervals over
seeds.

In thinking mode greedy answers are not what the model is made for; one seed's figures are one draw.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student

from qsae_kit.io.journal import Journal
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.answering import Asked, answer_groups
from qsae_kit.lm.edits import Edit
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.metrics.reconstruction import wilson
from qsae_kit.sae.suites import Suite
from qsae_kit.steer.behaviours import Behaviour, PromptSets, judged
from qsae_kit.steer.changes import Steering
from qsae_kit.steer.study.findings import rate

FORMAT = 3
"""Of the journal."""
CONFIDENCE = 0.95
"""Of the intervals over seeds."""
SAMPLING: Mapping[bool, Mapping[str, Any]] = {
    True: {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    False: {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
}
"""Whether the model thinks -> how Qwen3's card says that answers should be drawn."""


def answered_again(
    lm: HookedLM,
    behaviour: Behaviour,
    prompts: PromptSets,
    arms: Mapping[str, Steering],
    suite: Suite,
    seeds: Sequence[int],
    max_new_tokens: int,
    thinking: bool | None,
    folder: Path | None = None,
    fresh: bool = False,
) -> pd.DataFrame:
    """A row for each seed, arm (the unsteered one, none, first) and kind of prompt.

    Columns: seed, intervention, prompt_kind, n, refusal_rate (answers that show the behaviour) with
    its Wilson interval (ci_low, ci_high), deflected_rate, broken_rate, thought: the share of
    answers with thoughts that came to an end. folder: a cut-off run goes on there; fresh: it starts
    anew. Raises ValueError for no seed or the same one twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"The seeds {list(seeds)} were given; give at least one, each once.")
    edits: dict[str, Sequence[Edit]] = {
        "none": (),
        **{name: arm.edits(suite) for name, arm in arms.items()},
    }
    about = {
        "repeats": FORMAT,
        **lm.identity(),
        "behaviour": behaviour.identity,
        "max_new_tokens": max_new_tokens,
        "thinking": thinking,
        "asked": _digest(prompts, arms, suite),
    }

    def ask(seed: int, arm: str, kind: str) -> dict[str, Any]:
        texts = prompts[kind]
        [said] = answer_groups(
            lm,
            [Asked(texts, edits[arm])],
            max_new_tokens,
            thinking,
            sampling=SAMPLING[bool(thinking) or lm.always_thinks],
            seed=seed,
        )
        return {
            "outcomes": judged(lm, behaviour, texts, said, thinking).outcomes,
            "thought": sum("</think>" in text for text in said.text) / len(texts),
        }

    with only_writer(folder):
        journal = Journal(folder and folder / "seeds.jsonl", about, ["seeds.csv"], fresh)
        rows = []
        for seed, arm, kind in product(seeds, edits, prompts):
            said = journal.get(f"{seed}/{arm}/{kind}", partial(ask, seed, arm, kind))
            labels = {"seed": seed, "intervention": arm, "prompt_kind": kind}
            rows.append(labels | _figures(said))
        return pd.DataFrame(rows)


def _digest(prompts: PromptSets, arms: Mapping[str, Steering], suite: Suite) -> str:
    told = [
        {kind: list(texts) for kind, texts in prompts.items()},
        {name: arm.to_json(suite) for name, arm in arms.items()},
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _figures(said: Mapping[str, Any]) -> dict[str, Any]:
    outcomes = said["outcomes"]
    shown = wilson(outcomes.count("S"), len(outcomes))
    return {
        "n": len(outcomes),
        "refusal_rate": shown.rate,
        "ci_low": shown.low,
        "ci_high": shown.high,
        "deflected_rate": rate(outcomes, "D"),
        "broken_rate": rate(outcomes, "B"),
        "thought": said["thought"],
    }


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with 95 % intervals of Student's t (none with one seed), the least and the
    most, by arm and kind.
    """
    rows = []
    for (arm, kind), some in table.groupby(["intervention", "prompt_kind"], sort=False):
        shown, low, high = some["refusal_rate"], None, None
        if len(some) > 1:
            quantile = student.ppf((1 + CONFIDENCE) / 2, len(some) - 1)
            half = float(quantile * shown.std(ddof=1) / len(some) ** 0.5)
            low, high = max(0.0, shown.mean() - half), min(1.0, shown.mean() + half)
        rows.append(
            {
                "intervention": arm,
                "prompt_kind": kind,
                "seeds": len(some),
                "refusal_rate": shown.mean(),
                "low": low,
                "high": high,
                "least": shown.min(),
                "most": shown.max(),
                "deflected_rate": some["deflected_rate"].mean(),
                "broken_rate": some["broken_rate"].mean(),
                "thought": some["thought"].mean(),
            }
        )
    return pd.DataFrame(rows)

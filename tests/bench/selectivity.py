"""How selective an induction becomes behind a sparse detector: what a study's frozen edit makes of
harmful, harmless and borderline prompts, always and only while the detector fires.

    python tests/bench/selectivity.py MODEL SUITE STEERING.json --harmful FILE --harmless FILE
        [--n 200] [--tokens 24] [--false-alarms 0.03]

The detector is a weighted sum of features of the suite, of one site not behind the edit. Its
features and its threshold are chosen on the first 128 prompts of each FILE and the package's
borderline selection prompts; what is printed is of the package's evaluation prompts: the
detector's rates, and refusals with 95 % Wilson intervals.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd

from qsae_kit import load_model, load_suite
from qsae_kit.data.companions import companion_of
from qsae_kit.data.prompts import KINDS, read_prompts
from qsae_kit.lm.answering import AnswerForm, Asked, answer_groups, classify
from qsae_kit.metrics.reconstruction import wilson
from qsae_kit.steer.changes import Steering, load_steering
from qsae_kit.steer.choose.detector import detector_scores, detectors, simplest

FITTED = 128
"""Prompts of a kind that the detector is made of."""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model")
    p.add_argument("suite", type=Path)
    p.add_argument("steering", type=Path)
    p.add_argument("--harmful", type=Path, required=True)
    p.add_argument("--harmless", type=Path, required=True)
    p.add_argument("--n", type=int, default=200)
    p.add_argument("--tokens", type=int, default=24)
    p.add_argument("--false-alarms", type=float, default=0.03)
    p.add_argument("--dtype", default="auto")
    a = p.parse_args()
    lm, suite = load_model(a.model, dtype=a.dtype), load_suite(a.suite)
    edit = load_steering(a.steering, suite)
    companion, thinking = companion_of(lm), False if lm.has_thinking else None
    first = min(lm.order_of(change.hook_name) for change in edit.changes)
    variant = next(iter(suite))
    early = [name for name in suite[variant] if lm.order_of(name) <= first]
    borderline = [p.text for p in companion.prompts("borderline", FITTED // 2, "selection")]
    found = simplest(
        detectors(
            lm,
            suite.only([variant], early),
            read_prompts(a.harmful)[:FITTED],
            [*read_prompts(a.harmless)[:FITTED], *borderline],
            enable_thinking=thinking,
            most_false_alarms=a.false_alarms,
        ).values()
    )
    when = found.condition
    print(
        f"detector: {len(when.features)} features at {when.hook_name}, tokens {when.positions};"
        f" on selection prompts {found.missed:.3f} missed, {found.false_alarms:.3f} false alarms",
        flush=True,
    )
    texts = {
        kind: [p.text for p in companion.prompts(kind, min(a.n, most), "evaluation")]
        for kind, most in ((kind, companion.n_prompts(kind, "evaluation")) for kind in KINDS)
    }
    sae = suite[when.variant][when.hook_name]
    behind = Steering(tuple(replace(change, when=when) for change in edit.changes))
    arms = {"unsteered": Steering(), "always": edit, "behind the detector": behind}
    rows = []
    for kind, prompts in texts.items():
        fires = detector_scores(lm, sae, when, prompts, thinking) > when.threshold
        for arm, steering in arms.items():
            edits = steering.edits(suite)
            [said] = answer_groups(lm, [Asked(prompts, edits)], a.tokens, thinking)
            became = [
                classify(text, done, AnswerForm())
                for text, done in zip(said.text, said.finished, strict=True)
            ]
            shown = wilson(became.count("refused"), len(became))
            rows.append(
                {
                    "prompts": kind,
                    "arm": arm,
                    "n": len(became),
                    "refused": shown.rate,
                    "low": shown.low,
                    "high": shown.high,
                    "broken": became.count("broken") / len(became),
                    "fires": float(fires.float().mean()),
                }
            )
            print(pd.DataFrame(rows[-1:]).round(4).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()

"""Interrupts of the bundled model at every place, and what they leave behind.

    python tests/bench/interrupts.py [--tries 3000]

Half of the tries raise KeyboardInterrupt at chosen events (calls, lines and returns of the code
that enters, runs and leaves), spread over all there are; half by real signals at random moments.
Every other try keeps the traceback alive.
"""

import argparse
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from qsae_kit import load_model

sys.path.insert(0, str(Path(__file__).parent.parent))
from interrupted import cleaned, delays, interrupted, places, references, signalled, traced

BY = ("event", "timer", "SIGINT")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tries", type=int, default=3000)
    a = p.parse_args()
    sys.unraisablehook = lambda _: None  # an interrupt of what Python calls by itself
    torch.set_num_threads(1)
    lm = load_model("tiny")
    known = references(lm)
    names = list(places(lm, known))
    each = a.tries // len(names)
    rows = []
    for name in names:
        act = places(lm, known)[name]
        act()
        start = time.perf_counter()
        act()
        seconds = time.perf_counter() - start
        n_events = traced(act)[1]
        n = each // 2
        events = sorted({1 + i * n_events // n for i in range(n)})
        tries = [("event", n) for n in events]
        for i, delay in enumerate(delays(seconds, each - len(events), 0)):
            tries.append((BY[1 + i % 2], delay))
        counts: dict[str, Counter[str]] = {by: Counter() for by in BY}
        for i, (by, when) in enumerate(tries):
            act = places(lm, known)[name]
            interrupt = partial(lambda act, when: traced(act, when)[0], act, when)
            if by != "event":
                interrupt = partial(signalled, act, when, by)
            left = interrupted(lm, known, interrupt, keep=bool(i // 2 % 2))
            if left is None:
                counts[by]["too late"] += 1
                continue
            counts[by]["tries"] += 1
            counts[by].update(field for field, value in left._asdict().items() if value)
            if any(left[1:]):
                lm = cleaned(lm)
        rows += [
            {
                "place": name,
                "by": by,
                "tries": count["tries"],
                "left at once": count["at_once"],
                "left edits": count["after"],
                "shut locks": count["shut"],
                "wrong answers": count["wrong"],
            }
            for by, count in counts.items()
        ]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    print(table.groupby("by", sort=False).sum(numeric_only=True).to_string())


if __name__ == "__main__":
    main()

"""How well sparse detectors of a suite tell two kinds of prompts apart, beside the difference of
means.

    python tests/bench/detector.py SUITE MODEL FIRST.json SECOND.json [n_fit] [n_test]

FIRST and SECOND are JSON lists of prompts, such as harmful and harmless ones. The first `n_fit` of
each (128) choose features and thresholds, the next `n_test` (100) are measured on: for every SAE
the area under the curve of the difference of means at each header token, and for every detector
that is found its rates at its threshold.
"""

import json
import sys
import time
from pathlib import Path

import torch

from qsae_kit import load_model, load_suite
from qsae_kit.attach import attached
from qsae_kit.metrics.detection import auc
from qsae_kit.metrics.reconstruction import wilson
from qsae_kit.steer.changes import FeatureSet
from qsae_kit.steer.choose.detector import (
    MOST_FALSE_ALARMS,
    MOST_WATCHED,
    SIZES,
    candidates,
    highest,
    policies_for,
    reads_of_prompts,
    simplest,
)


def by_difference_of_means(fit, test):
    """The area under the curve at each token of the header that no sink is at."""
    n_tokens = min(len(rows) for read in (*fit, *test) for rows in read.header)
    told = []
    for k in range(n_tokens):
        fitted, tested = (
            [torch.stack([rows[k - n_tokens] for rows in read.header]) for read in reads]
            for reads in (fit, test)
        )
        direction = fitted[0].mean(0) - fitted[1].mean(0)
        told.append(auc(*(x @ direction for x in tested)))
    return told


def scores(sae, condition, read):
    """What a condition reads of prompts that were read already."""
    if condition.positions == "header":
        weights = condition.weights or (1.0,)
        return highest(sae, FeatureSet(condition.features, weights), read.header)
    return read.peaks[condition.positions][:, condition.features[0]]


@torch.no_grad()
def main(suite, model, first, second, n_fit="128", n_test="100"):
    lm = load_model(model, dtype="float32")
    texts = [json.loads(Path(path).read_text(encoding="utf-8")) for path in (first, second)]
    n, end = int(n_fit), int(n_fit) + int(n_test)
    chats = [[{"role": "user", "content": text}] for some in texts for text in some[:n]]
    own = attached(lm, load_suite(suite), lambda: chats)
    began = time.monotonic()
    fit, test = (
        [reads_of_prompts(lm, own, some[begin:stop], policies_for(lm)) for some in texts]
        for begin, stop in ((0, n), (n, end))
    )
    print(f"read in {time.monotonic() - began:.0f} s")
    for place, sae in own.saes().items():
        here, there = ([reads[place] for reads in some] for some in (fit, test))
        means = " ".join(f"{value:.3f}" for value in by_difference_of_means(here, there))
        print(f"\n{place}\n  difference of means, AUC at the header's tokens: {means}")
        began = time.monotonic()
        sizes = [*SIZES, MOST_WATCHED]
        found = candidates(place, sae, *here, sizes, MOST_FALSE_ALARMS, 0)
        seconds = time.monotonic() - began
        for each in found:
            condition = each.condition
            told = [scores(sae, condition, read) for read in there]
            rates = [wilson(int((x > condition.threshold).sum()), len(x)) for x in told]
            shown = ", ".join(f"{r.rate:.3f} ({r.low:.2f} to {r.high:.2f})" for r in rates)
            taken = " (taken)" if each is simplest(found) else ""
            print(
                f"  {len(condition.features):2} at {condition.positions}: AUC {auc(*told):.3f};"
                f" true and false rate {shown}; when chosen {1 - each.missed:.3f},"
                f" {each.false_alarms:.3f}{taken}"
            )
        print(f"  found in {seconds:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What a frozen edit costs in capability: school arithmetic and the perplexity of plain text,
beside the unsteered model.

    python tests/bench/capability.py MODEL SUITE QUESTIONS STEERING.json... [--n 100] [--tokens 256]

QUESTIONS: JSON lines with `question` and `answer`, of which the last number is the right one
(GSM8K's form). Prints a row for the model as it is and for each edit: the share of right answers,
greedy, with its 95 % Wilson interval; how many turned right and wrong; and the perplexity of the
questions' worked answers as plain text, with the interval of its ratio to the unsteered one.
"""

import argparse
import json
import math
import re
from pathlib import Path

import pandas as pd
import torch

from qsae_kit import load_model, load_suite
from qsae_kit.lm.answering import answer_all, on_plain_text
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.metrics.reconstruction import cross_entropy, paired_bootstrap, wilson
from qsae_kit.steer.changes import load_steering

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ASKED = "{question}\nWork it out step by step, and end with the number alone."


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


@torch.no_grad()
def nats(lm: HookedLM, texts: list[str], edits: list[Edit]) -> list[tuple[float, int]]:
    """Cross-entropy of each text, summed over its tokens, and their number."""
    told = []
    for text in texts:
        ids, mask = lm.to_batch([text])
        with applied(lm, on_plain_text(edits, mask)):
            logits = lm(ids, mask)
        assert logits is not None
        losses = cross_entropy(logits[0, :-1], ids[0, 1:])
        told.append((float(losses.sum()), len(losses)))
    return told


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model")
    p.add_argument("suite", type=Path)
    p.add_argument("questions", type=Path)
    p.add_argument("steering", type=Path, nargs="+")
    p.add_argument("--n", type=int, default=100)
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--batch", type=int, default=50)
    a = p.parse_args()
    lm, suite = load_model(a.model), load_suite(a.suite)
    given = [json.loads(line) for line in a.questions.read_text("utf-8").splitlines()[: a.n]]
    prompts = [ASKED.format(question=row["question"]) for row in given]
    right = [last_number(row["answer"]) for row in given]
    texts = [row["answer"] for row in given]
    thinking = False if lm.has_thinking else None
    arms: dict[str, list[Edit]] = {"unsteered": []}
    arms |= {str(path): load_steering(path, suite).edits(suite) for path in a.steering}
    rows, before, clean = [], [], []
    for name, edits in arms.items():
        said = answer_all(lm, prompts, edits, a.tokens, thinking, a.batch)
        hits = [last_number(text) == number for text, number in zip(said.text, right, strict=True)]
        cost = nats(lm, texts, edits)
        before, clean = before or hits, clean or cost
        share = wilson(sum(hits), len(hits))
        total = sum(n for _, n in cost)
        rises = [(new - old) / n for (new, n), (old, _) in zip(cost, clean, strict=True)]
        rise = paired_bootstrap([rises], [1.0])
        rows.append(
            {
                "arm": name,
                "n": len(hits),
                "right": share.rate,
                "low": share.low,
                "high": share.high,
                "turned_right": sum(h and not b for h, b in zip(hits, before, strict=True)),
                "turned_wrong": sum(b and not h for h, b in zip(hits, before, strict=True)),
                "unfinished": sum(not done for done in said.finished),
                "perplexity": math.exp(sum(loss for loss, _ in cost) / total),
                "ratio": math.exp(rise.rate),
                "ratio_low": math.exp(rise.low),
                "ratio_high": math.exp(rise.high),
            }
        )
        print(pd.DataFrame(rows[-1:]).round(4).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()

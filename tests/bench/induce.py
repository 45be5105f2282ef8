"""How often a few features make a model refuse what it answers, and at what price, beside the
difference of means under the same intervention.

    python tests/bench/induce.py MODEL SUITE --harmful FILE --harmless FILE
        --site blocks.16.hook_resid_post
        [--features 3] [--strengths 0.85,1.0,1.2] [--n 200] [--tokens 24] [--csv induce.csv]

Features are those that push farthest along the difference of means of the files' prompts; both
directions are added at the header. Measured on the package's harmless evaluation prompts: refusals
with their Wilson interval, and the KL at the first answer token with its bootstrap interval.
"""

import argparse
from pathlib import Path

import pandas as pd
from spread import FITTED

from qsae_kit import load_model, load_suite
from qsae_kit.data.companions import companion_of
from qsae_kit.data.prompts import read_prompts
from qsae_kit.lm.answering import AnswerForm, KnownRows, answer_all, classify
from qsae_kit.metrics.reconstruction import paired_bootstrap, wilson
from qsae_kit.steer.changes import Steering
from qsae_kit.steer.choose.contrast import aligned_features, contrast, decision_activations
from qsae_kit.steer.directions import Direction


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model")
    p.add_argument("suite", type=Path)
    p.add_argument("--harmful", type=Path, required=True)
    p.add_argument("--harmless", type=Path, required=True)
    p.add_argument("--site", required=True, help="a hook name")
    p.add_argument("--features", type=int, default=3)
    p.add_argument("--strengths", default="0.85,1.0,1.2")
    p.add_argument("--n", type=int, default=200)
    p.add_argument("--tokens", type=int, default=24)
    p.add_argument("--dtype", default="auto")
    p.add_argument("--csv", type=Path)
    a = p.parse_args()
    lm, suite = load_model(a.model, dtype=a.dtype), load_suite(a.suite)
    variant = next(iter(suite))
    sae = suite[variant][a.site]
    groups = [
        decision_activations(lm, [a.site], read_prompts(path)[:FITTED])[a.site]
        for path in (a.harmful, a.harmless)
    ]
    found = contrast(sae, *groups)
    directions = {
        "features": Direction(a.site, variant, aligned_features(sae, found, a.features)),
        "difference of means": Direction(
            a.site,
            vector=tuple(found.mean_gap.tolist()),
            median_norm=sae.origin.filter.median,
        ),
    }
    texts = [q.text for q in companion_of(lm).prompts("harmless", a.n, "evaluation")]
    known = KnownRows(lm, [lm.chat_tokens(text) for text in texts])
    arms: dict[str, Steering] = {"unsteered": Steering()}
    for name, direction in directions.items():
        for strength in map(float, a.strengths.split(",")):
            change = direction.change("add_header", strength)
            arms[f"{name} {strength:g}"] = Steering((change,))
    rows = []
    for arm, steering in arms.items():
        edits = steering.edits(suite)
        said = answer_all(lm, texts, edits, a.tokens, None)
        became = [
            classify(text, done, AnswerForm())
            for text, done in zip(said.text, said.finished, strict=True)
        ]
        shown = wilson(became.count("refused"), len(became))
        nats = paired_bootstrap([known.first_kl(known.last_logits(edits)).tolist()], [1.0])
        rows.append(
            {
                "arm": arm,
                "n": len(became),
                "refused": shown.rate,
                "low": shown.low,
                "high": shown.high,
                "broken": became.count("broken") / len(became),
                "kl": nats.rate,
                "kl_low": nats.low,
                "kl_high": nats.high,
            }
        )
        print(pd.DataFrame(rows[-1:]).round(4).to_string(index=False), flush=True)
    if a.csv:
        pd.DataFrame(rows).to_csv(a.csv, index=False)


if __name__ == "__main__":
    main()

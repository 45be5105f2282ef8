"""L0, never-firing latents and FVU of a suite at the bundled model's sites, on 100,000 held-out
tokens.

qsae train tiny --tokens 1M --out runs/all
python tests/bench/sites.py runs/all/suite
"""

import argparse
from pathlib import Path

from qsae_kit import evaluate_suite, load_model, load_suite
from qsae_kit.data.documents import token_batches
from qsae_kit.world import world

TOKENS = 100_000


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("suite", type=Path)
    a = p.parse_args()
    lm = load_model("tiny")
    batches, tokens = [], 0
    for batch in token_batches(
        lm, (d.messages for d in world.dialogues(10**6, seed=1_000_008)), batch_tokens=8192
    ):
        batches.append(batch)
        tokens += int(batch.keep.sum())
        if tokens >= TOKENS:
            break
    table = evaluate_suite(lm, load_suite(a.suite), batches, 1)
    table = table.loc[
        table["category"] == "all", ("variant site fvu l0 target dead").split()
    ].copy()
    table["l0 off by"] = table["l0"] / table["target"] - 1
    print(table.to_string(index=False, float_format="{:.4f}".format))
    print(
        f"{tokens:,} tokens; L0 off by {table['l0 off by'].abs().max():.1%} at most; dead"
        f" {table['dead'].mean():.1%} on average"
    )


if __name__ == "__main__":
    main()

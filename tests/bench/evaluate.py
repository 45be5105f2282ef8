"""What evaluating costs against tokens and sites, on the bundled model with untrained SAEs of the
default width.

    python tests/bench/evaluate.py [--out cost.html]

Prints seconds for each number of held-out tokens and sites, and how well a straight line fits
either; --out plots them.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import torch

from qsae_kit import default_recipe, evaluate_suite, load_model, sites_of
from qsae_kit.data.documents import held_out_batches, token_batches
from qsae_kit.data.rows import LiveRows
from qsae_kit.data.streams import documents_of
from qsae_kit.train.baselines import untrained_saes

TOKENS, SITES = (4_000, 8_000, 16_000, 32_000), (3, 6, 12, 18)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, help="an HTML file for the figure")
    a = p.parse_args()
    lm = load_model("tiny")
    held_out, training = documents_of(lm, None)
    names = sites_of(lm, "resid,mlp,attn", "all")
    source = LiveRows(lm, names, lambda: token_batches(lm, training()))
    saes = untrained_saes(source, default_recipe(lm.d_model, len(names), tokens=40_000, batch=512))
    batches = held_out_batches(lm, held_out, max(TOKENS))
    counts = np.cumsum([int(batch.keep.sum()) for batch in batches])
    rows = []
    for n_sites in SITES:
        for tokens in TOKENS:
            some = batches[: int(np.searchsorted(counts, tokens)) + 1]
            suite = {"untrained": {name: saes[name] for name in names[:n_sites]}}
            start = time.perf_counter()
            evaluate_suite(lm, suite, some, spliced_batches=max(1, len(some) // 5), bar=False)
            rows.append(
                {
                    "sites": n_sites,
                    "tokens": int(counts[len(some) - 1]),
                    "seconds": time.perf_counter() - start,
                }
            )
    table = pd.DataFrame(rows)
    print(table.pivot(index="sites", columns="tokens", values="seconds").round(1).to_string())
    for fixed, moving in (("sites", "tokens"), ("tokens", "sites")):
        most = table[table[fixed] == table[fixed].max()]
        r = np.corrcoef(most[moving], most["seconds"])[0, 1]
        print(
            f"seconds against {moving} at {int(table[fixed].max()):,} {fixed}: R^2 of a straight"
            f" line {r * r:.4f}"
        )
    if a.out:
        table["sites"] = table["sites"].astype(str)
        title = "Cost of an evaluation, a fifth of the tokens spliced"
        px.line(
            table, x="tokens", y="seconds", color="sites", markers=True, title=title
        ).write_html(a.out)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()

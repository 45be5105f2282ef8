"""Whether the true L0 of known features can be told from decoders alone.

    python tests/bench/target_l0.py [--arch batchtopk] [--l0 1,2,3,4,6,8,11] [--tokens 1000000]

SAEs of every L0 on the world of `evaluate.synthetic`: MCC and F1, for which the true features are
needed, beside the figures of `metrics.decoders`, for which they are not. The least of a column is
what it would choose.
"""

import argparse

import pandas as pd
import torch

from qsae_kit.data.rows import StoredRows
from qsae_kit.evaluate.synthetic import Synthetic, SyntheticConfig, score
from qsae_kit.metrics.decoders import decoder_overlap, decoder_projection
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import train_saes

ROWS, LOOKED_AT = 200_000, 2000
SHARES = (0.02, 0.05, 0.1, 0.25, 0.5)
"""Of d_sae: the numbers of the projections that are told."""
SITE = "blocks.0.hook_resid_post"
"""A name for the rows, as training asks for one."""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--arch", default="batchtopk")
    p.add_argument("--l0", default="1,2,3,4,6,8,11")
    p.add_argument("--tokens", type=int, default=1_000_000)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    world = Synthetic(SyntheticConfig(seed=a.seed))
    parts = [world.sample(LOOKED_AT, seed).x for seed in range(ROWS // LOOKED_AT)]
    source = StoredRows({SITE: torch.cat(parts)}, seed=a.seed)
    fresh = world.sample(LOOKED_AT, len(parts)).x
    rows = []
    for l0 in map(float, a.l0.split(",")):
        recipe = TrainConfig(
            a.arch, sparsity=l0, expansion=8, tokens=a.tokens, precision="float32", seed=a.seed
        )
        sae = train_saes(source, [recipe], bar=False, model_name="known")[recipe.variant][SITE]
        told, _ = score(sae, world)
        kept = {name: told[name] for name in ("true_l0", "l0", "mcc", "f1", "fvu", "dead")}
        projected = {
            f"p{share:g}": decoder_projection(fresh, sae.W_dec, sae.b_dec, round(share * sae.d_sae))
            for share in SHARES
        }
        rows.append({"target": l0, **kept, "overlap": decoder_overlap(sae.W_dec), **projected})
        print(pd.DataFrame(rows[-1:]).round(4).to_string(index=False), flush=True)
    table = pd.DataFrame(rows).set_index("target")
    best = {name: table[name].idxmax() for name in ("mcc", "f1")}
    best |= {name: table[name].idxmin() for name in table if name[0] == "p" or name == "overlap"}
    print("best:", best)


if __name__ == "__main__":
    main()

"""Attention sinks of a model: where the bound lies at each site, how much is beyond it, and which
tokens.

python tests/bench/sinks.py tiny
python tests/bench/sinks.py FOLDER --prompts prompts.json --with-prefix
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pandas as pd
import torch

from qsae_kit import load_model
from qsae_kit.data.documents import TokenBatch, TokenPolicy, token_batches
from qsae_kit.data.prompts import read_prompts
from qsae_kit.data.records import Document
from qsae_kit.data.rows import kept_rows
from qsae_kit.data.streams import stream_of
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.metrics.reconstruction import Reconstruction
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sites import expand_sites, parse_hook_name, parse_kinds, parse_layers

SHOWN = 6
"""Kinds of tokens that are named at a site."""


def documents_of(lm: HookedLM, prompts: str | None) -> Iterator[Document]:
    if prompts is None:
        return iter(stream_of(lm, None)())
    return ([{"role": "user", "content": text}] for text in read_prompts(prompts))


@torch.no_grad()
def sinks(lm: HookedLM, batches: list[TokenBatch], names: list[str]) -> pd.DataFrame:
    """A row a site, from two passes: the bounds, and what is beyond them."""
    norms: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for batch in batches:
        for name, x in kept_rows(lm, names, batch).items():
            norms[name].append(x.norm(dim=-1))
    filters = {name: NormFilter.of(torch.cat(norms[name])) for name in names}
    sums = {name: Reconstruction() for name in names}
    tokens: dict[str, Counter[int]] = {name: Counter() for name in names}
    for batch in batches:
        ids = batch.ids[batch.keep]
        for name, x in kept_rows(lm, names, batch).items():
            drops, kept = filters[name].drops(x), x[filters[name].keeps(x)]
            sums[name].add(kept, kept, kept.new_zeros(len(kept), 1))
            sums[name].add_sinks(x[drops])
            tokens[name].update(ids[drops].tolist())
    rows = []
    for name in names:
        site, own = parse_hook_name(name), sums[name]
        named = [lm.to_string([i]) for i, _ in tokens[name].most_common(SHOWN)]
        rows.append(
            {
                "kind": site.kind,
                "layer": site.layer,
                "bound, medians": filters[name].factor,
                "longest": float(torch.cat(norms[name]).max()) / filters[name].median,
                "dropped": own.n_sinks / (own.rows + own.n_sinks),
                "of the variance": own.share_sinks,
                "tokens": " ".join(map(repr, named)),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    p = argparse.ArgumentParser(description=" ".join(__doc__.splitlines()[:2]))
    p.add_argument("model")
    p.add_argument("--prompts", help="a file of prompts; else what the model brings along")
    p.add_argument("--n", type=int, default=100, help="documents (100)")
    p.add_argument("--kinds", default="resid,mlp,attn")
    p.add_argument("--layers", default="all")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--with-prefix", action="store_true", help="count what all chats begin with")
    a = p.parse_args()
    lm = load_model(a.model, dtype=a.dtype)
    policy = TokenPolicy(drop_prefix=not a.with_prefix)
    documents = islice(documents_of(lm, a.prompts), a.n)
    batches = list(token_batches(lm, documents, 2048, policy))
    sites = expand_sites(parse_kinds(a.kinds), parse_layers(a.layers, lm.n_layers))
    table = sinks(lm, batches, [site.hook_name for site in sites])
    table = table.sort_values(["kind", "layer"])
    print(f"{sum(int(batch.keep.sum()) for batch in batches):,} tokens of {a.n} documents")
    print(table.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()

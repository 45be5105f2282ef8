"""One forward pass -> rows of activations for every site; the norm filter; the shuffle pool."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qsae_kit.data import TokenBatch
from qsae_kit.models import HookedLM

Rows = dict[str, Float[Tensor, "row d_model"]]


class NormFilter(NamedTuple):
    """Drops attention sinks: rows whose norm exceeds `factor` times the site's median norm."""

    median: float
    """Median Euclidean norm of the site's rows, frozen from the first tokens seen."""
    factor: float = 10.0

    def keeps(self, x: Float[Tensor, "*row d_model"]) -> Bool[Tensor, "*row"]:
        return x.float().norm(dim=-1) <= self.factor * self.median


@torch.no_grad()
def site_activations(lm: HookedLM, hook_names: Sequence[str], batch: TokenBatch) -> dict[str, Float[Tensor, "batch pos d_model"]]:
    """Activations of every site from one pass that stops after the deepest."""
    return lm.run_with_cache(batch.ids, batch.mask, names_filter=list(hook_names), return_type=None)[1]


def kept_rows(lm: HookedLM, hook_names: Sequence[str], batch: TokenBatch) -> Rows:
    """The batch's kept tokens as rows, the same tokens in the same order at every site, in float32."""
    return {name: x[batch.keep].float() for name, x in site_activations(lm, hook_names, batch).items()}


def stream_rows(lm: HookedLM, hook_names: Sequence[str], batches: Iterable[TokenBatch]) -> Iterator[Rows]:
    """`kept_rows` of every batch."""
    for batch in batches:
        if batch.keep.any():
            yield kept_rows(lm, hook_names, batch)


def shuffled(stream: Iterator[Rows], batch_rows: int, pool_rows: int, seed: int = 0) -> Iterator[Rows]:
    """Batches of exactly `batch_rows` rows drawn from a shuffle pool.

    The pool is filled to `pool_rows`, shuffled, half of it is given out, and it is filled again; the last rows that do
    not fill a batch are left. Rows of one token stay together across sites.
    """
    generator = torch.Generator().manual_seed(seed)
    pool: Rows = {}
    ended = False
    while not ended:
        parts = {name: [rows] for name, rows in pool.items()}
        size = len(next(iter(pool.values()))) if pool else 0
        while size < pool_rows:
            new = next(stream, None)
            if new is None:
                ended = True
                break
            for name, rows in new.items():
                parts.setdefault(name, []).append(rows)
            size += len(next(iter(new.values())))
        if not parts:
            return
        order = torch.randperm(size, generator=generator)
        pool = {name: torch.cat(rows)[order.to(rows[0].device)] for name, rows in parts.items()}
        give = size if ended else size // 2
        n_batches = give // batch_rows
        for b in range(n_batches):
            yield {name: rows[b * batch_rows : (b + 1) * batch_rows] for name, rows in pool.items()}
        pool = {name: rows[n_batches * batch_rows :] for name, rows in pool.items()}


def first_rows(stream: Iterator[Rows], n_rows: int) -> tuple[Rows, Iterator[Rows]]:
    """The first batches that together hold `n_rows` rows, joined, and a stream that still begins with them."""
    taken: list[Rows] = []
    size = 0
    for rows in stream:
        taken.append(rows)
        size += len(next(iter(rows.values())))
        if size >= n_rows:
            break
    if not taken:
        raise ValueError("There are no tokens to look at: the data gave no rows after the keep-mask.")

    def again() -> Iterator[Rows]:
        yield from taken
        yield from stream

    return {name: torch.cat([rows[name] for rows in taken]) for name in taken[0]}, again()

"""One forward pass -> rows of activations for every site; the norm filter; the shuffle pool."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.data.documents import TokenBatch, TokenPolicy, TokenStream, Window
from qsae_kit.lm.hooked import HookedLM, by_token

Rows = dict[str, Float[Tensor, "row _width"]]


@torch.no_grad()
def site_activations(
    lm: HookedLM, hook_names: Sequence[str], batch: TokenBatch
) -> dict[str, Float[Tensor, "batch pos _width"]]:
    """Activations of every site from one pass that stops after the deepest."""
    _, cache = lm.run_with_cache(
        batch.ids, batch.mask, names_filter=list(hook_names), return_type=None
    )
    return {name: by_token(x) for name, x in cache.items()}


def kept_rows(lm: HookedLM, hook_names: Sequence[str], batch: TokenBatch) -> Rows:
    """The batch's kept tokens as rows, the same tokens in the same order at every site, in
    float32.
    """
    return {
        name: x[batch.keep].float() for name, x in site_activations(lm, hook_names, batch).items()
    }


def stream_rows(
    lm: HookedLM, hook_names: Sequence[str], batches: Iterable[TokenBatch]
) -> Iterator[Rows]:
    """`kept_rows` of every batch."""
    for batch in batches:
        if batch.keep.any():
            yield kept_rows(lm, hook_names, batch)


class Place(NamedTuple):
    """Where a block of rows begins in a source: so many token batches (epochs of stored rows) and
    rows of the next in.
    """

    batch: int = 0
    row: int = 0
    window: Window = Window()
    """Of the next batch: the documents before it need not be read into tokens again."""


class Origin(NamedTuple):
    """Where rows come from, as the SAEs that are trained on them will say."""

    model_name: str = ""
    """"" where it is not known."""
    policy: TokenPolicy = TokenPolicy(drop_prefix=False)
    """By default what holds for rows of which nothing is known."""
    model_digest: str = ""
    """Of the model's weights (`HookedLM.weights_digest`)."""


@dataclass(frozen=True)
class Block:
    """Some rows of every site, the same tokens in the same order."""

    place: Place
    rows: Rows

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


@runtime_checkable
class RowSource(Protocol):
    """Rows of activations for training, which can be gone back to: what a training was fed can be
    fed again.
    """

    @property
    def widths(self) -> Mapping[str, int]:
        """Numbers a token at every site."""

    @property
    def device(self) -> torch.device: ...

    @property
    def forward_rows(self) -> int:
        """Tokens of one forward pass, padding included; 0 where there is none."""

    @property
    def sites(self) -> list[str]:
        return list(self.widths)

    @property
    def origin(self) -> Origin:
        """The model and the tokens that the rows are of."""

    def fingerprint(self) -> str:
        """Tells other data from these."""

    def blocks(self, n_rows: int, start: Place = Place()) -> Iterator[Block]:
        """Blocks of `n_rows` rows from a place on; only the last one may be shorter."""

    def only(self, sites: Sequence[str]) -> "RowSource":
        """The same tokens at some of the sites."""


class LiveRows:
    """Rows of a running model: every token batch is passed once, up to the deepest site.

    batches: gives the same token batches each time it is called (`data.documents.token_batches`
        under one seed does); a `TokenStream` is gone on with where it was left.
    """

    def __init__(
        self, lm: HookedLM, sites: Sequence[str], batches: Callable[[], Iterable[TokenBatch]]
    ) -> None:
        lm.check_hook_names(list(sites))
        self.lm, self.batches, self.device = lm, batches, lm.device
        self._head: list[TokenBatch] = []
        self.widths = {site: lm.width(site) for site in sites}

    @property
    def sites(self) -> list[str]:
        return list(self.widths)

    @property
    def forward_rows(self) -> int:
        return max((batch.ids.numel() for batch in self.head), default=0)

    @property
    def head(self) -> list[TokenBatch]:
        """The first four token batches, made once: there may be many documents to be read and
        sorted before the first.
        """
        self._head = self._head or list(islice(self.batches(), 4))
        return self._head

    @property
    def origin(self) -> Origin:
        policy = self.head[0].policy if self.head else TokenPolicy()
        return Origin(self.lm.model_name, policy.on(self.lm), self.lm.weights_digest())

    def fingerprint(self) -> str:
        """Of the first four token batches and of a few of the model's weights."""
        digest = hashlib.sha256()
        for batch in self.head:
            digest.update(batch.ids.cpu().numpy().tobytes())
        digest.update(self.lm.weights_digest().encode())
        return digest.hexdigest()

    def only(self, sites: Sequence[str]) -> "LiveRows":
        some = LiveRows(self.lm, sites, self.batches)
        some._head = self._head
        return some

    @torch.no_grad()
    def texts_where(
        self, chosen: Mapping[str, Callable[[Tensor], Tensor]], tokens: int = 2048
    ) -> dict[str, list[str]]:
        """The tokens, the most frequent first, whose rows are chosen at some sites.

        chosen: by site, from rows [row, width] a mask [row]. tokens: of the first batch, padding
        included, that are looked at.
        """
        if not (chosen and self.head):
            return {}
        first = self.head[0]
        some = max(1, tokens // first.ids.shape[1])
        batch = first._replace(ids=first.ids[:some], mask=first.mask[:some], keep=first.keep[:some])
        ids = batch.ids[batch.keep]
        counts = {
            site: Counter(ids[chosen[site](x)].tolist())
            for site, x in kept_rows(self.lm, list(chosen), batch).items()
        }
        return {
            site: [self.lm.to_string([i]) for i, _ in own.most_common()]
            for site, own in counts.items()
        }

    def blocks(self, n_rows: int, start: Place = Place()) -> Iterator[Block]:
        pool: Rows = {}
        size, place = 0, start
        for number, batch in self._since(start):
            if not batch.keep.any():
                continue
            rows = kept_rows(self.lm, self.sites, batch)
            used = start.row if number == start.batch else 0
            total = int(batch.keep.sum())
            while used < total:
                take = min(n_rows - size, total - used)
                pool = pool or self._pool(n_rows)
                for site, x in rows.items():
                    pool[site][size : size + take] = x[used : used + take]
                size, used = size + take, used + take
                if size == n_rows:
                    block, pool, size = Block(place, pool), {}, 0
                    yield block
                    del block  # whoever took it may let it go before the next one is begun
                    place = Place(*((number, used) if used < total else (number + 1, 0)))
                    place = place._replace(window=batch.window)
        if size:
            yield Block(place, {site: x[:size] for site, x in pool.items()})

    def _since(self, start: Place) -> Iterator[tuple[int, TokenBatch]]:
        """Numbers and batches from a place on."""
        if isinstance(self.batches, TokenStream):
            stream, first = self.batches(start.window), start.window.batches
        else:
            stream, first = iter(self.batches()), 0
        return enumerate(islice(stream, start.batch - first, None), start.batch)

    def _pool(self, n_rows: int) -> Rows:
        return {
            site: torch.empty(n_rows, width, device=self.device)
            for site, width in self.widths.items()
        }


class StoredRows:
    """Rows in memory or in a memory-mapped file, in a new order each epoch, without end; given out
    on `device`. origin: of which model and tokens they are, where that is known.
    """

    forward_rows = 0

    def __init__(
        self,
        rows: Rows,
        seed: int = 0,
        scale: float = 1.0,
        device: torch.device | None = None,
        origin: Origin = Origin(),
    ) -> None:
        sizes = {len(x) for x in rows.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                f"The sites hold {sorted(sizes)} rows; give every site the same number, at least"
                " one."
            )
        self.rows, self.seed, self.scale, self.origin = rows, seed, scale, origin
        self.widths = {site: x.shape[1] for site, x in rows.items()}
        self.device = device or next(iter(rows.values())).device

    @property
    def sites(self) -> list[str]:
        return list(self.widths)

    def fingerprint(self) -> str:
        few = [
            x[:: max(1, len(x) // 64)].float().cpu().contiguous().numpy().tobytes()
            for x in self.rows.values()
        ]
        return hashlib.sha256(
            str((len(self), self.seed, self.scale)).encode() + b"".join(few)
        ).hexdigest()

    def __len__(self) -> int:
        return len(self.rows[self.sites[0]])

    def _given(self, x: Tensor) -> Tensor:
        x = x.to(self.device).float()
        return x if self.scale == 1 else x / self.scale

    def only(self, sites: Sequence[str]) -> "StoredRows":
        return StoredRows(
            {site: self.rows[site] for site in sites},
            self.seed,
            self.scale,
            self.device,
            self.origin,
        )

    def blocks(self, n_rows: int, start: Place = Place()) -> Iterator[Block]:
        epoch, used, _ = start
        while True:
            order = torch.randperm(
                len(self), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            )
            while used < len(self):
                place, parts = Place(epoch, used), [order[used : used + n_rows]]
                used += len(parts[0])
                while sum(map(len, parts)) < n_rows:  # over the end of an epoch
                    epoch, used = epoch + 1, 0
                    order = torch.randperm(
                        len(self),
                        generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch),
                    )
                    parts.append(order[: n_rows - sum(map(len, parts))])
                    used = len(parts[-1])
                chosen = torch.cat(parts)
                yield Block(place, {site: self._given(x[chosen]) for site, x in self.rows.items()})
            epoch, used = epoch + 1, 0


def held_rows(source: LiveRows, n_rows: int, seed: int = 0) -> StoredRows:
    """At most `n_rows` rows of a model that is run once, kept in memory in bfloat16 for many
    epochs: where a forward pass costs more than a training step.

    Raises ValueError where there are none.
    """
    parts: list[Rows] = []
    taken = 0
    for rows in stream_rows(source.lm, source.sites, source.batches()):
        some = {site: x[: n_rows - taken].bfloat16() for site, x in rows.items()}
        parts.append(some)
        taken += len(next(iter(some.values())))
        if taken >= n_rows:
            break
    if not taken:
        raise ValueError("There are no tokens to train on; give longer texts.")
    whole = {site: torch.cat([some[site] for some in parts]) for site in source.sites}
    return StoredRows(whole, seed, device=source.device, origin=source.origin)


def shuffled(block: Block, batch: int, seed: int, skip: int = 0) -> Iterator[Rows]:
    """Batches of exactly `batch` rows of a block in random order; the rows of one token stay
    together across sites.

    Rows that do not fill a batch are left. skip: batches to leave out, for going on after them.
    """
    key = (seed * 1_000_003 + block.place.batch) * 1_000_003 + block.place.row
    order = torch.randperm(len(block), generator=torch.Generator().manual_seed(key % 2**63))
    for number in range(skip, len(block) // batch):
        chosen = order[number * batch : (number + 1) * batch]
        yield {site: x[chosen.to(x.device)] for site, x in block.rows.items()}

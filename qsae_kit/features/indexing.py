"""The feature index: one pass of the model over dialogues -> what every feature of every SAE does,
as tables on disk.

    <index>/index.json          model, SAEs and their checksums, data, tokens and their policy
    <index>/documents.parquet   document, ids: token ids of every dialogue that an example is from
    <index>/tokens.parquet      id, text: the vocabulary
    <index>/tables/<variant>/<hook name>/features.parquet   a row a feature (`COLUMNS` and more)
    <index>/tables/<variant>/<hook name>/examples.parquet   a row an example, feature by feature
    <index>/labels.jsonl        labels that people gave (`features.index.FeatureIndex.label`)

Counted are the kept tokens of the SAEs' policy (no padding, not position 0, not what all chats
begin with) that pass the SAE's norm filter. Memory does not grow with the number of tokens: counts,
histograms and examples have a place for every feature, and what is needed of single tokens (firing
together, what the token alone tells) comes from a sample of them of a set size.
"""

import hashlib
import json
import math
import os
import shutil
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix
from torch import Tensor

from qsae_kit.attach import attached, policy_of
from qsae_kit.data.documents import TokenBatch, TokenPolicy, phases_of, token_batches
from qsae_kit.data.given import check_anew
from qsae_kit.data.records import Document
from qsae_kit.data.rows import site_activations
from qsae_kit.io.checkpoints import Checkpoints, delete_checkpoint, found
from qsae_kit.io.files import OWN, atomic_file, checked_name, inside, write_text
from qsae_kit.io.interrupts import Interrupts, say
from qsae_kit.io.jsonfiles import read_json
from qsae_kit.io.memory import free_memory
from qsae_kit.io.processor import exact
from qsae_kit.io.progress import tqdm
from qsae_kit.io.runs import check_same
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.chat import CATEGORIES, Phase
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import ByVariant, Place

WORK, RETIRED = f"{OWN}building", "retired.json"
"""The working folder of a build in the index's own, and there the manifest of the index that it
takes the place of.
"""
VERSION = 1
MANIFEST, DOCUMENTS, TOKENS, TABLES, FEATURES, EXAMPLES = tuple(
    ("index.json documents.parquet tokens.parquet tables features.parquet examples.parquet").split()
)
BINS, BINS_PER_OCTAVE, SMALLEST = 64, 4, -12
"""Of the histogram: four bins an octave of activation / median norm, from 2^-12 on; what lies
outside is in the outermost bins.
"""
EARLY = 8
"""Positions that count as the beginning of a dialogue."""
NEAR = 8
"""Nearest and co-firing features that are kept of each."""
LOGIT_TOKENS = 10
"""Promoted and suppressed tokens that are kept of each feature."""
PAIRS = 20_000_000
"""Pairs of features that are held at once while it is counted how often both fire."""
ENTRIES = 4_000_000
"""Entries of the sampled tokens' activations that are kept of an SAE; a denser SAE keeps fewer
tokens.
"""


@dataclass(frozen=True)
class IndexConfig:
    """What an index keeps."""

    tokens: int = 200_000
    """Real tokens to look at; fewer where the data end before."""
    top: int = 12
    """Dialogues with the largest activations, of each feature, with the token where it is largest.
    """
    sampled: int = 24
    """Firing tokens drawn at random, of each feature: examples of every strength."""
    before: int = 24
    """Tokens shown before an example's."""
    after: int = 8
    """Tokens shown after it."""
    sampled_tokens: int = 40_000
    """Tokens of which every activation is kept while the index is made, for what fires together and
    the token's share.
    """
    batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        least = dict.fromkeys(("tokens", "top", "sampled", "sampled_tokens", "batch_tokens"), 1)
        for name, value in (least | {"before": 0, "after": 0}).items():
            if getattr(self, name) < value:
                given = getattr(self, name)
                raise ValueError(f"{name}={given} was given; it must be {value} or more.")

    @property
    def window(self) -> int:
        return self.before + 1 + self.after

    def bytes(self, d_sae: int) -> int:
        """Of memory that one SAE takes, beside its weights: its examples, twice while they change,
        and a batch.
        """
        examples = d_sae * (self.top + self.sampled) * (4 * self.window + 16)
        return 2 * examples + 3 * 4 * self.batch_tokens * d_sae + 4 * d_sae * BINS + 20 * ENTRIES


# --- examples


class Kept:
    """The n examples of each feature with the largest keys, in no order, and the activations around
    them.

    Empty places have key 0. key, value, document and pos: [d_sae, n]; acts: [d_sae, n, window]
    """

    def __init__(self, d_sae: int, n: int, window: int, device: torch.device) -> None:
        self.key = torch.zeros(d_sae, n, device=device)
        self.value = torch.zeros(d_sae, n, device=device)
        self.document = torch.zeros(d_sae, n, dtype=torch.int32, device=device)
        self.pos = torch.zeros(d_sae, n, dtype=torch.int32, device=device)
        self.acts = torch.zeros(d_sae, n, window, device=device)

    def tensors(self) -> dict[str, Tensor]:
        return vars(self)

    @property
    def floor(self) -> Float[Tensor, " d_sae"]:
        """A key has to be above it to be kept."""
        return self.key.amin(1)

    @property
    def order(self) -> Int[Tensor, "d_sae n"]:
        """Places by falling key, the earlier document first at a tie."""
        by_document = self.document.argsort(dim=1, stable=True)
        return by_document.gather(
            1, self.key.gather(1, by_document).argsort(dim=1, descending=True, stable=True)
        )

    def offer(
        self,
        cols: Int[Tensor, " example"],
        keys: Float[Tensor, " example"],
        places: Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]],
    ) -> None:
        """Takes the examples that are among the best, the earlier one at a tie.

        places: for some of the examples (by number) their value, document, pos and acts; asked only
            for those that stay.
        """
        n = self.key.shape[1]
        order = torch.argsort(keys, descending=True, stable=True)
        order = order[torch.argsort(cols[order], stable=True)]
        changed, counts = torch.unique_consecutive(cols[order], return_counts=True)
        rank = torch.arange(len(order), device=cols.device) - (
            counts.cumsum(0) - counts
        ).repeat_interleave(counts)
        row = torch.arange(len(changed), device=cols.device).repeat_interleave(counts)
        best = rank < n
        order, rank, row = order[best], rank[best], row[best]
        offered = torch.zeros(len(changed), n, device=keys.device)
        offered[row, rank] = keys[order]
        number = torch.zeros(len(changed), n, dtype=torch.long, device=keys.device)
        number[row, rank] = order
        # Of the old ones in order and the new ones in order, the first n stay; a new one takes the
        # place of one that goes.
        old_order = self.order[changed]
        old = self.key[changed].gather(1, old_order)
        source = torch.cat([old, offered], 1).argsort(dim=1, descending=True, stable=True)[:, :n]
        stays = torch.zeros(len(changed), 2 * n, dtype=torch.bool, device=keys.device).scatter_(
            1, source, True
        )
        new = stays[:, n:] & (offered > 0)
        goes = ~stays[:, :n] | (old == 0)
        goes &= goes.cumsum(1) <= new.sum(1, keepdim=True)
        at, slot = changed[goes.nonzero()[:, 0]], old_order[goes]
        taken = number[new]
        for name, values in zip(
            ("key", "value", "document", "pos", "acts"), (keys[taken], *places(taken)), strict=True
        ):
            own = getattr(self, name)
            own[at, slot] = values.to(own.dtype)


class Seen(NamedTuple):
    """A batch as every SAE's tally looks at it."""

    batch: TokenBatch
    first_document: int
    """Number of the batch's first dialogue; the others follow."""
    phase: Int[Tensor, "batch pos"] | None
    lot: Float[Tensor, "batch pos"]
    """A random number in (0, 1] for every token, the same for all SAEs: who is sampled."""


def places_of(mask: Tensor) -> Int[Tensor, " place"]:
    """Where a mask is true, in the flattened mask (on a CPU numpy finds it faster)."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().view(-1)


class Tally:
    """What is known of one SAE's features so far."""

    def __init__(self, sae: SAE, config: IndexConfig) -> None:
        d_sae, device = sae.d_sae, sae.W_dec.device
        self.sae, self.config = sae, config
        self.rows = 0
        """Tokens counted."""
        self.category_rows = torch.zeros(len(Phase), dtype=torch.long)
        self.early_rows, self.dropped_rows = 0, 0
        self.fired = torch.zeros(d_sae, len(Phase), dtype=torch.long, device=device)
        """Firing tokens by phase; all in phase 0 where the chat's markers are unknown."""
        self.early = torch.zeros(d_sae, dtype=torch.long, device=device)
        """Firing tokens among the first positions."""
        self.dropped = torch.zeros(d_sae, dtype=torch.long, device=device)
        """Firing tokens among those that do not count: position 0, what all chats begin with, and
        sinks.
        """
        self.total = exact(torch.zeros(d_sae, device=device))
        """Sum of activations."""
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.long, device=device)
        self.top = Kept(d_sae, config.top, config.window, device)
        self.sampled = Kept(d_sae, config.sampled, config.window, device)
        self.share = min(1.0, config.sampled_tokens / config.tokens)
        """Of the tokens, those that are sampled with all their activations: those with lots above 1
        - share.
        """
        self.sample: list[Tensor] = []
        """Of sampled tokens: [entry, 5] float64 of lot, document, pos * 2^20 + token id, feature,
        activation.
        """

    @torch.no_grad()
    def add(self, seen: Seen, x: Float[Tensor, "batch pos d_model"]) -> None:
        """Takes a batch's activations at the SAE's site."""
        batch, d_sae = seen.batch, self.sae.d_sae
        real = batch.mask.bool()
        counted = batch.keep & self.sae.origin.filter.keeps(x)
        f = self._encode(x.float())
        flat = places_of(f > 0)
        cell = flat.div(d_sae, rounding_mode="floor")
        ok = counted.view(-1)[cell]
        dropped = flat[(real & ~counted).view(-1)[cell]]
        self.dropped += torch.bincount(dropped % d_sae, minlength=d_sae)
        flat, cell = flat[ok], cell[ok]
        cols, values = flat - cell * d_sae, f.view(-1)[flat]
        f.view(-1, d_sae).index_fill_(0, (~counted).view(-1).nonzero()[:, 0], 0.0)
        self._count(seen, counted, cell, cols, values)
        self._offer_top(seen, f)
        self._offer_sampled(seen, f, cell, cols)
        self._keep_sample(seen, cell, cols, values)

    def _encode(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_sae"]:
        """All features, a part that fits a processor's cache at a time."""
        f = x.new_empty(*x.shape[:2], self.sae.d_sae)
        rows = (
            max(1, 2**20 // self.sae.d_sae)
            if x.device.type == "cpu"
            else len(f.view(-1, f.shape[-1]))
        )
        for part, own in zip(x.flatten(0, 1).split(rows), f.flatten(0, 1).split(rows), strict=True):
            own.copy_(self.sae.encode(part))
        return f

    def _count(
        self, seen: Seen, counted: Tensor, cell: Tensor, cols: Tensor, values: Tensor
    ) -> None:
        d_sae = self.sae.d_sae
        phase = torch.zeros_like(seen.batch.ids) if seen.phase is None else seen.phase
        early = torch.arange(phase.shape[1], device=phase.device).expand_as(phase) < EARLY
        self.rows += int(counted.sum())
        self.category_rows += torch.bincount(phase[counted], minlength=len(Phase)).cpu()
        self.early_rows += int((counted & early).sum())
        self.dropped_rows += int((seen.batch.mask.bool() & ~counted).sum())
        self.fired += torch.bincount(
            cols * len(Phase) + phase.view(-1)[cell], minlength=self.fired.numel()
        ).view_as(self.fired)
        self.early += torch.bincount(cols[early.reshape(-1)[cell]], minlength=d_sae)
        wide = exact(values)
        self.total.index_add_(0, cols.to(wide.device), wide)
        octave = (wide / self.sae.origin.filter.median).log2()
        bins = ((octave - SMALLEST) * BINS_PER_OCTAVE).floor().long().clamp(0, BINS - 1)
        bins = bins.to(cols.device)
        self.histogram += torch.bincount(
            cols * BINS + bins, minlength=self.histogram.numel()
        ).view_as(self.histogram)

    def _offer_top(self, seen: Seen, f: Float[Tensor, "batch pos d_sae"]) -> None:
        largest = f.amax(1)
        row, cols = (largest > self.top.floor).nonzero(as_tuple=True)

        def places(some: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            r, c = row[some], cols[some]
            pos = torch.cat(
                [f[a, :, b].argmax(1) for a, b in zip(r.split(4096), c.split(4096), strict=True)]
            )
            return f[r, pos, c], seen.first_document + r, pos, self._window(f, r, pos, c)

        if len(row):
            self.top.offer(cols, largest[row, cols], places)

    def _offer_sampled(
        self, seen: Seen, f: Float[Tensor, "batch pos d_sae"], cell: Tensor, cols: Tensor
    ) -> None:
        lots = seen.lot.view(-1)[cell]
        better = lots > self.sampled.floor[cols]
        cell, cols, lots = cell[better], cols[better], lots[better]
        n_pos = f.shape[1]

        def places(some: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            c, r = cols[some], cell[some].div(n_pos, rounding_mode="floor")
            pos = cell[some] - r * n_pos
            return f[r, pos, c], seen.first_document + r, pos, self._window(f, r, pos, c)

        if len(cell):
            self.sampled.offer(cols, lots, places)

    def _window(
        self, f: Tensor, row: Tensor, pos: Tensor, col: Tensor
    ) -> Float[Tensor, "example window"]:
        """Activations of one feature around a token, 0 outside the dialogue."""
        at = pos[:, None] + torch.arange(
            -self.config.before, self.config.after + 1, device=pos.device
        )
        inside = (at >= 0) & (at < f.shape[1])
        return torch.where(inside, f[row[:, None], at.clamp(0, f.shape[1] - 1), col[:, None]], 0.0)

    def _keep_sample(self, seen: Seen, cell: Tensor, cols: Tensor, values: Tensor) -> None:
        lots = seen.lot.view(-1)[cell]
        n_pos = seen.lot.shape[1]
        chosen = lots > 1 - self.share
        cell = cell[chosen]
        row = cell.div(n_pos, rounding_mode="floor")
        place = (cell - row * n_pos) * 2**20 + seen.batch.ids.view(-1)[cell]
        parts = (lots[chosen], seen.first_document + row, place, cols[chosen], values[chosen])
        self.sample.append(torch.stack([part.cpu().double() for part in parts], 1))
        while sum(map(len, self.sample)) > ENTRIES:
            self.share /= 2
            self.sample = [part[part[:, 0] > 1 - self.share] for part in self.sample]

    # --- to and from a checkpoint

    def tensors(self) -> dict[str, Tensor]:
        own = {
            name: getattr(self, name)
            for name in tuple(("category_rows fired early dropped total histogram").split())
        }
        own |= {
            f"{part}_{name}": tensor
            for part in ("top", "sampled")
            for name, tensor in getattr(self, part).tensors().items()
        }
        sample = torch.cat(self.sample) if self.sample else torch.zeros(0, 5, dtype=torch.float64)
        counts = torch.tensor(
            [self.rows, self.early_rows, self.dropped_rows, self.share], dtype=torch.float64
        )
        return own | {"sample": sample, "counts": counts}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.tensors()
        for name, tensor in tensors.items():
            if name not in ("sample", "counts"):
                own[name].copy_(tensor)
        self.sample = [tensors["sample"]]
        rows, early_rows, dropped_rows, share = tensors["counts"].tolist()
        self.rows, self.early_rows, self.dropped_rows, self.share = (
            int(rows),
            int(early_rows),
            int(dropped_rows),
            share,
        )


# --- from what was counted to tables


class Sample(NamedTuple):
    """Sampled tokens with all activations of one SAE."""

    f: csr_matrix
    """[token, feature]"""
    token: np.ndarray
    """Token id of each."""
    document: np.ndarray


def sample_of(tally: Tally) -> Sample:
    """The sampled tokens on which anything fires, in the order in which they came."""
    entries = (
        torch.cat(tally.sample) if tally.sample else torch.zeros(0, 5, dtype=torch.float64)
    ).numpy()
    place = entries[:, 1:3]
    new = np.r_[True, (place[1:] != place[:-1]).any(1)][: len(place)]
    row = new.cumsum() - 1
    f = csr_matrix(
        (entries[:, 4].astype(np.float32), (row, entries[:, 3].astype(np.int64))),
        (int(new.sum()), tally.sae.d_sae),
    )
    return Sample(f, entries[new, 2].astype(np.int64) % 2**20, entries[new, 1].astype(np.int64))


class Nearest(NamedTuple):
    """For each feature up to `NEAR` others, best first; id -1 where there are fewer. [d_sae, NEAR]
    each
    """

    ids: np.ndarray
    score: np.ndarray


@torch.no_grad()
def decoder_neighbours(W_dec: Float[Tensor, "d_sae d_model"]) -> Nearest:
    """The features with the largest cosine of decoder rows."""
    rows = torch.nn.functional.normalize(W_dec.float(), dim=-1)
    n = min(NEAR, len(rows) - 1)
    ids, scores = [], []
    for start in range(0, len(rows), 4096):
        cosines = rows[start : start + 4096] @ rows.T
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, own + start] = -2
        best = cosines.topk(n, dim=1)
        ids.append(best.indices)
        scores.append(best.values)
    fill = (0, NEAR - n)
    pad = torch.nn.functional.pad
    return Nearest(
        pad(torch.cat(ids), fill, value=-1).cpu().numpy(),
        pad(torch.cat(scores), fill).cpu().numpy(),
    )


def firing_together(f: csr_matrix) -> Nearest:
    """The features with the largest Jaccard index |i and j| / |i or j| of their firing tokens, of
    those that share two or more.
    """
    fires = f.astype(bool).astype(np.int32)
    by_feature = fires.T.tocsr()
    count = np.diff(by_feature.indptr)
    d_sae = fires.shape[1]
    ids, scores = np.full((d_sae, NEAR), -1), np.zeros((d_sae, NEAR), np.float32)
    pairs = np.minimum(by_feature @ fires.sum(1), d_sae).A1.cumsum()  # at most, up to each feature
    edges = np.unique(
        np.searchsorted(pairs, np.arange(PAIRS, pairs[-1] + PAIRS, PAIRS)).clip(max=d_sae - 1) + 1
    )
    for start, stop in pairwise([0, *edges.tolist()]):
        both = by_feature[start:stop] @ fires
        some = np.flatnonzero(both.data > 1)
        row, col, shared = (
            np.searchsorted(both.indptr, some, "right") - 1,
            both.indices[some],
            both.data[some],
        )
        jaccard = shared / (count[row + start] + count[col] - shared)
        jaccard[row + start == col] = -1
        order = np.lexsort((col, -jaccard, row))
        row, col, jaccard = row[order], col[order], jaccard[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        best = (rank < NEAR) & (jaccard > 0)
        ids[row[best] + start, rank[best]] = col[best]
        scores[row[best] + start, rank[best]] = jaccard[best]
    return Nearest(ids, scores)


def token_share(sample: Sample) -> np.ndarray:
    """How well the token alone predicts a feature's firing: F1 on other dialogues, NaN with under 5
    firings in either part.

    On half of the dialogues (even numbers) the rate at which the feature fires on every token id is
    taken, and the set of ids with a rate above a threshold, the one with the best F1 there,
    predicts firing on the other half. [d_sae]
    """
    fit = sample.document % 2 == 0
    vocab = int(sample.token.max(initial=0)) + 1
    sides = []
    for rows in (fit, ~fit):
        fires, token = sample.f[rows].tocoo(), sample.token[rows]
        cell, count = np.unique(
            fires.col.astype(np.int64) * vocab + token[fires.row], return_counts=True
        )
        sides.append((cell, count, np.bincount(token, minlength=vocab)))
    (cell, hits, seen), (cell_other, hits_other, seen_other) = sides
    d_sae = sample.f.shape[1]
    col, token = cell // vocab, cell % vocab
    rate = hits / seen[token]
    order = np.lexsort((token, -rate, col))
    col, token, rate, hits = col[order], token[order], rate[order], hits[order]
    # Of the pairs (feature, token) in order of rate: the same pair on the other side.
    where = np.searchsorted(cell_other, cell[order]).clip(max=max(0, len(cell_other) - 1))
    same = len(cell_other) > 0 and cell_other[where] == cell[order]
    hits_there = np.where(same, hits_other[where] if len(cell_other) else 0, 0)
    first = np.searchsorted(col, np.arange(d_sae + 1))
    total, total_other = (
        np.bincount(col, hits, d_sae),
        np.bincount(cell_other // vocab, hits_other, d_sae),
    )

    def running(values: np.ndarray) -> np.ndarray:
        """Sums from each feature's first pair on."""
        sums = np.r_[0, values.cumsum()]
        return sums[1:] - sums[first[col]]

    f1_fit = 2 * running(hits) / (running(seen[token]) + total[col])
    f1_other = 2 * running(hits_there) / (running(seen_other[token]) + total_other[col]).clip(1)
    # a threshold takes all at a tie
    f1_fit[np.r_[(col[1:] == col[:-1]) & (rate[1:] == rate[:-1]), False][: len(col)]] = -1
    out = np.full(d_sae, np.nan)
    for feature in np.flatnonzero((total >= 5) & (total_other >= 5)):
        own = slice(first[feature], first[feature + 1])
        out[feature] = f1_other[own][f1_fit[own].argmax()]
    return out


class Logits(NamedTuple):
    """Token ids and what a unit of the feature adds to their logits, relative to the mean token.
    [d_sae, LOGIT_TOKENS] each
    """

    promoted: np.ndarray
    promoted_logit: np.ndarray
    suppressed: np.ndarray
    suppressed_logit: np.ndarray


@torch.no_grad()
def logit_effects(lm: HookedLM, W_dec: Float[Tensor, "d_sae d_model"]) -> Logits:
    """Decoder rows in the residual stream (`HookedLM.to_residual`) through the final norm's weight
    and the unembedding, as if nothing came between (direct effect).
    """
    norm, unembed = lm.final_weights()
    unembed = unembed - unembed.mean(0)
    n = min(LOGIT_TOKENS, len(unembed))
    parts: list[list[Tensor]] = [[], [], [], []]
    step = max(1, 200_000_000 // len(unembed))
    for rows in W_dec.float().split(step):
        logits = (rows * norm) @ unembed.T
        for at, best in ((0, logits.topk(n, dim=1)), (2, logits.topk(n, dim=1, largest=False))):
            parts[at].append(best.indices)
            parts[at + 1].append(best.values)
    return Logits(*(torch.cat(part).cpu().numpy() for part in parts))


COLUMNS = {
    "density": "share of tokens on which the feature fires",
    "fired": "tokens on which it fires",
    "density_template": "density on template tokens",
    "density_user": "density on system and user tokens",
    "density_thinking": "density on thinking tokens",
    "density_assistant": "density on answer tokens",
    "max": "largest activation, in units of the site",
    "mean": "mean activation where it fires",
    "token_f1": "how well the token alone predicts firing: F1 on other dialogues",
    "early_share": "share of its firings in the first 8 positions",
    "dropped_share": "share of position 0 and sinks on which it fires",
    "top_token": "the token of its largest activation",
    "hint": "what its sampled firing tokens have in common, where that is plain",
    "warnings": "what to know before trusting its examples",
}
"""Columns of an index's table of features, with what they are."""


def warnings_of(
    density: np.ndarray,
    early: np.ndarray,
    early_rows: float,
    dropped: np.ndarray,
    token_f1: np.ndarray,
) -> list[str]:
    """For each feature, what its figures warn of, separated by commas."""
    out = []
    for d, e, s, t in zip(density, early, dropped, token_f1, strict=True):
        found = [
            ("dead", d == 0),
            ("dense", d > 0.1),
            ("position", e > 0.5 and e > 3 * early_rows),
            ("sink", s > 0.5 and s > 3 * d),
            ("token", t >= 0.9),
        ]
        out.append(",".join(name for name, holds in found if holds))
    return out


def script_of(text: str) -> str:
    """The writing system of a text's letters by their Unicode names, such as LATIN or CJK; "" where
    it has none or several.
    """
    found = {unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()}
    return found.pop() if len(found) == 1 else ""


def hint_of(texts: Sequence[str], template: float, token_f1: float) -> str:
    """A name without a model, where it is honest: token sets, template positions, the writing
    system.

    texts: the sampled firing tokens. template: share of all firing tokens that are the template's.
    """
    if not texts:
        return ""
    common = Counter(texts).most_common(4)
    named = ", ".join(repr(text) for text, n in common if n >= 0.1 * len(texts))
    scripts = Counter(script for script in map(script_of, texts) if script)
    script, n = scripts.most_common(1)[0] if scripts else ("", 0)
    found = [
        (
            "template" if template >= 0.95 else "token",
            bool(named) and (template >= 0.95 or token_f1 >= 0.8),
            named,
        ),
        ("script", script not in ("", "LATIN") and n >= 0.95 * scripts.total() and n >= 5, script),
    ]
    return "; ".join(f"{kind}: {what}" for kind, holds, what in found if holds)


def _lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """A column of lists, a row of the matrix each."""
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values).ravel(), kind))


def feature_table(
    tally: Tally,
    logits: Logits,
    sample: Sample,
    text: Sequence[str],
    ids: Mapping[int, Sequence[int]],
) -> pa.Table:
    """A row a feature: `COLUMNS`, the histogram, promoted and suppressed tokens, neighbours, what
    fires with it.

    text: of token ids. ids: token ids by document.
    """
    fired = tally.fired.cpu().numpy()
    total = fired.sum(1)
    density = total / max(1, tally.rows)
    by_phase = {
        name: fired[:, members].sum(1) / max(1, int(tally.category_rows[list(members)].sum()))
        for name, members in CATEGORIES.items()
    }
    early = tally.early.cpu().numpy() / total.clip(1)
    dropped = tally.dropped.cpu().numpy() / max(1, tally.dropped_rows)
    token_f1 = token_share(sample)
    first = tally.top.order[:, :1]
    document, pos = (
        places.gather(1, first)[:, 0].tolist() for places in (tally.top.document, tally.top.pos)
    )
    top_token = [text[ids[d][p]] if n else "" for d, p, n in zip(document, pos, total, strict=True)]
    kept, numbers, places = (
        tally.sampled.key > 0,
        tally.sampled.document.tolist(),
        tally.sampled.pos.tolist(),
    )
    sampled = [
        [text[ids[d][p]] for d, p, k in zip(*row, strict=True) if k]
        for row in zip(numbers, places, kept.tolist(), strict=True)
    ]
    template = fired[:, Phase.TEMPLATE] / total.clip(1)
    neighbours, together = decoder_neighbours(tally.sae.W_dec), firing_together(sample.f)
    return pa.table(
        {
            "feature": pa.array(np.arange(len(total)), pa.int32()),
            "density": density,
            "fired": total,
            **{f"density_{name}": by_phase[name] for name in by_phase},
            "max": tally.top.value.amax(1).cpu().numpy(),
            "mean": tally.total.cpu().numpy() / total.clip(1),
            "token_f1": token_f1,
            "early_share": early,
            "dropped_share": dropped,
            "top_token": top_token,
            "hint": [hint_of(*about) for about in zip(sampled, template, token_f1, strict=True)],
            "warnings": warnings_of(
                density, early, tally.early_rows / max(1, tally.rows), dropped, token_f1
            ),
            "histogram": _lists(tally.histogram.cpu().numpy(), pa.int64()),
            "promoted": _lists(logits.promoted, pa.int32()),
            "promoted_logit": _lists(logits.promoted_logit, pa.float32()),
            "suppressed": _lists(logits.suppressed, pa.int32()),
            "suppressed_logit": _lists(logits.suppressed_logit, pa.float32()),
            "neighbour": _lists(neighbours.ids, pa.int32()),
            "neighbour_cosine": _lists(neighbours.score, pa.float32()),
            "together": _lists(together.ids, pa.int32()),
            "together_jaccard": _lists(together.score, pa.float32()),
        }
    )


def example_table(tally: Tally) -> pa.Table:
    """A row an example, feature by feature, the top ones first, each sort by its key.

    Columns: feature, top (or sampled), document, pos, value; start: the window's first position;
    offset, act: where in the window the feature fires and how strongly.
    """
    config = tally.config
    parts: list[tuple[np.ndarray, ...]] = []
    for is_top, kept in ((True, tally.top), (False, tally.sampled)):
        order = kept.order
        at, rank = (kept.key.gather(1, order) > 0).nonzero(as_tuple=True)
        columns = [
            getattr(kept, name)[at, order[at, rank]].cpu().numpy()
            for name in ("document", "pos", "value", "acts")
        ]
        parts.append((at.cpu().numpy(), np.full(len(at), is_top), rank.cpu().numpy(), *columns))
    feature, top, place, document, pos, value, acts = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    rows = np.lexsort((place, ~top, feature))
    acts = acts[rows]
    row, offset = np.nonzero(acts)
    ends = np.r_[0, np.bincount(row, minlength=len(acts)).cumsum()].astype(np.int32)
    return pa.table(
        {
            "feature": pa.array(feature[rows], pa.int32()),
            "top": top[rows],
            "document": pa.array(document[rows], pa.int32()),
            "pos": pa.array(pos[rows], pa.int16()),
            "value": value[rows],
            "start": pa.array(pos[rows] - config.before, pa.int16()),
            "offset": pa.ListArray.from_arrays(ends, pa.array(offset, pa.int16())),
            "act": pa.ListArray.from_arrays(ends, pa.array(acts[row, offset], pa.float32())),
        }
    )


# --- building


def _batches(
    lm: HookedLM, documents: Iterable[Document], config: IndexConfig, policy: TokenPolicy
) -> Iterator[tuple[int, Seen]]:
    """Batches up to the config's number of tokens, each with the tokens up to its end."""
    tokens, document = 0, 0
    for number, batch in enumerate(
        token_batches(lm, documents, config.batch_tokens, policy, config.seed)
    ):
        tokens += int(batch.mask.sum())
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        lot = 1 - torch.rand(batch.ids.shape, generator=generator)  # in (0, 1]
        phase = None if lm.markers is None else phases_of(lm.markers, batch)
        yield tokens, Seen(batch, document, phase, lot.to(batch.ids.device))
        document += len(batch.ids)
        if tokens >= config.tokens:
            return


def _groups(saes: Mapping[Place, SAE], config: IndexConfig, memory: int) -> list[list[Place]]:
    """SAEs in order, together as long as they fit."""
    groups: list[list[Place]] = []
    free = 0
    for place, sae in saes.items():
        need = config.bytes(sae.d_sae)
        if not groups or need > free:
            groups.append([])
            free = memory
        groups[-1].append(place)
        free -= need
    return groups


REMEMBERED = 1_000_000
"""Tokens from which on it is looked for dialogues that may be forgotten."""


class _Dialogues:
    """Token ids of the dialogues that examples are from, by number; the others are forgotten from
    time to time.
    """

    def __init__(self) -> None:
        self.ids: dict[int, list[int]] = {}
        self._done: set[int] = set()
        self._limit = REMEMBERED

    def add(self, seen: Seen, tallies: Iterable[Tally]) -> None:
        for number, row in enumerate(_rows(seen.batch), seen.first_document):
            self.ids[number] = row
        if sum(map(len, self.ids.values())) > self._limit:
            self.forget(tallies)
            self._limit = max(self._limit, 2 * sum(map(len, self.ids.values())))

    def forget(self, tallies: Iterable[Tally], done: bool = False) -> None:
        """Keeps what examples of these tallies, and of those that are done, are from."""
        used = {
            int(d)
            for t in tallies
            for kept in (t.top, t.sampled)
            for d in kept.document[kept.key > 0].unique()
        }
        self.ids = {
            number: ids
            for number, ids in self.ids.items()
            if number in used or number in self._done
        }
        self._done |= used if done else set()

    def check(self, seen: Seen) -> None:
        """ValueError where a dialogue is another one than before."""
        for number, row in enumerate(_rows(seen.batch), seen.first_document):
            if self.ids.get(number, row) != row:
                raise ValueError(
                    "The build to go on with looked at other dialogues; give the same data, or"
                    " start anew."
                )

    def tensors(self) -> dict[str, Tensor]:
        flat = [i for ids in self.ids.values() for i in ids]
        return {
            "number": torch.tensor(list(self.ids)),
            "length": torch.tensor([len(ids) for ids in self.ids.values()]),
            "ids": torch.tensor(flat),
            "done": torch.tensor(sorted(self._done), dtype=torch.long),
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        parts = tensors["ids"].split(tensors["length"].tolist())
        self.ids = {
            int(number): part.tolist()
            for number, part in zip(tensors["number"], parts, strict=True)
        }
        self._done = set(tensors["done"].tolist())


def _rows(batch: TokenBatch) -> list[list[int]]:
    lengths = batch.mask.sum(1).tolist()
    return [row[:n] for row, n in zip(batch.ids.tolist(), lengths, strict=True)]


SAVE_EVERY = 60.0
"""Seconds between checkpoints."""


def build_index(
    lm: HookedLM,
    suite: ByVariant,
    documents: Callable[[], Iterable[Document]],
    out: str | Path,
    config: IndexConfig | None = None,
    *,
    data: str = "",
    fresh: bool = False,
    memory: int | None = None,
    bar: bool = True,
) -> Path:
    """Writes an index of every SAE of a suite and returns its folder.

    documents: gives the same dialogues each time it is called. data: what they are, for the
    manifest. memory: bytes to take (None: half of what is free); SAEs that do not fit together are
    indexed one group after another, a pass of the model each. A build that was cut off in `out` is
    gone on with, and a whole index of the same identity is returned as it is. fresh: builds anew;
    an index that is there already is replaced once the new one is whole. Its labels stay, and so do
    files that are not an index's. An interrupt leaves a checkpoint. Raises ValueError where an SAE
    does not fit the model, for data without tokens, where another index or build is there and
    `fresh` is not given, for a folder in which other files have an index's names, and while another
    process writes there.
    """
    check_anew(documents, "The documents")
    out, config = Path(out), config or IndexConfig()
    saes = attached(lm, suite).saes()
    if not saes:
        raise ValueError("The suite holds no SAE; give at least one.")
    policy = policy_of(lm, suite)
    memory = free_memory(lm.device) // 2 if memory is None else memory
    checksums = {str(place): sae.checksum() for place, sae in saes.items()}
    identity = {
        "index": VERSION,
        "settings": asdict(config),
        "suite": checksums,
        **lm.identity(),
        "data": data,
        "policy": policy._asdict(),
    }
    with only_writer(out), Interrupts() as interrupts:
        work = out / WORK
        _put_in_place(out)
        _check_own(out)
        # what a build that was cut off is, its checkpoint says, not the index that it replaces
        if (out / MANIFEST).is_file() and not fresh and not found(work):
            check_same(out, "feature index", identity, _made_as(out))
            return out
        build = _Build(lm, saes, documents, config, work, interrupts, policy)
        tokens = build.run(identity, fresh, memory, bar)
        sites = [_site_entry(place, sae, checksums[str(place)]) for place, sae in saes.items()]
        built = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = identity | {
            "model": lm.model_name,
            "suite": sites,
            "tokens": tokens,
            "built": built,
        }
        lacking = [entry for entry in sites if not (site_folder(work, entry) / FEATURES).is_file()]
        if lacking:
            raise ValueError(
                f"The build lacks the tables of {lacking[0]['hook_name']}; start it anew"
                " (--fresh, or fresh=True)."
            )
        # from here on it is whole
        write_text(work / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        _put_in_place(out)
        _stop_if_asked(interrupts)
    return out


def _stop_if_asked(interrupts: Interrupts) -> None:
    if interrupts.asked:
        raise KeyboardInterrupt


def _site_entry(place: Place, sae: SAE, checksum: str) -> dict[str, Any]:
    """What a manifest says of an SAE."""
    return {
        "variant": place.variant,
        "hook_name": place.hook_name,
        "d_sae": sae.d_sae,
        "architecture": sae.architecture,
        "sparsity": sae.sparsity,
        "checksum": checksum,
        "median_norm": sae.origin.filter.median,
        "norm_factor": sae.origin.filter.factor,
    }


@dataclass
class _Build:
    """One build, in a working folder of its own."""

    lm: HookedLM
    saes: Mapping[Place, SAE]
    documents: Callable[[], Iterable[Document]]
    config: IndexConfig
    work: Path
    interrupts: Interrupts
    policy: TokenPolicy
    planned: list[list[Place]] = field(default_factory=list)

    def run(self, identity: Mapping[str, Any], fresh: bool, memory: int, bar: bool) -> int:
        """Writes all tables to the working folder; returns the tokens seen."""
        checkpoints = Checkpoints(self.work, identity)
        state = None if fresh else checkpoints.load()
        if state is None:
            shutil.rmtree(self.work, ignore_errors=True)
        checkpoints.begin(state)
        dialogues = _Dialogues()
        if state is not None:
            dialogues.load_tensors(checkpoints.tensors("dialogues"))
        groups = self._groups(memory, state)
        if len(groups) > 1:
            print(
                f"{len(self.saes)} SAEs are indexed in {len(groups)} groups, a pass each, to stay"
                f" within {memory / 1e9:.1f} GB."
            )
        texts = vocabulary(self.lm)
        tokens = 0
        with tqdm(
            total=self.config.tokens * len(groups), unit="tok", desc="indexing", disable=not bar
        ) as meter:
            for number, group in enumerate(groups):
                if state is not None and number < state["group"]:
                    meter.update(self.config.tokens)
                    continue
                tallies = {place: Tally(self.saes[place], self.config) for place in group}
                resumed = state if state is not None and number == state["group"] else None
                tokens = self._pass(tallies, dialogues, checkpoints, number, resumed, meter)
                dialogues.forget(tallies.values(), done=True)
                for place, tally in tallies.items():
                    folder = self.work.joinpath(TABLES, *place)
                    _write_site(self.lm, tally, texts, dialogues.ids, folder)
                    _stop_if_asked(self.interrupts)
        ids = [dialogues.ids[n] for n in sorted(dialogues.ids)]
        _write(
            pa.table({"document": pa.array(sorted(dialogues.ids), pa.int32()), "ids": ids}),
            self.work / DOCUMENTS,
        )
        _write(
            pa.table({"id": pa.array(range(len(texts)), pa.int32()), "text": texts}),
            self.work / TOKENS,
        )
        return tokens

    def _groups(self, memory: int, state: Mapping[str, Any] | None) -> list[list[Place]]:
        """SAEs that are indexed together; of a build that goes on those that were planned then."""
        if state is None:
            self.planned = _groups(self.saes, self.config, memory)
            return self.planned
        told = state.get("groups")
        known = isinstance(told, list) and all(isinstance(group, list) for group in told)
        self.planned = (
            [[Place(*place) for place in group] for group in told] if known and told else []
        )
        if [place for group in self.planned for place in group] != list(self.saes):
            raise ValueError(
                "The build to go on with was planned otherwise; start it anew (--fresh, or"
                " fresh=True)."
            )
        return self.planned

    @torch.no_grad()
    def _pass(
        self,
        tallies: Mapping[Place, Tally],
        dialogues: _Dialogues,
        checkpoints: Checkpoints,
        group: int,
        state: Mapping[str, Any] | None,
        meter: tqdm,
    ) -> int:
        """One pass of the model for one group of SAEs; returns the tokens seen. An interrupt leaves
        a checkpoint.
        """
        reached = 0
        if state is not None:
            reached = int(state["batches"])
            for place, tally in tallies.items():
                tally.load_tensors(checkpoints.tensors(_file(place)))
        names = list(dict.fromkeys(place.hook_name for place in tallies))
        saved, tokens = time.monotonic(), 0
        for number, (now, seen) in enumerate(
            _batches(self.lm, self.documents(), self.config, self.policy), 1
        ):
            meter.update(now - tokens)
            tokens = now
            if number <= reached:
                dialogues.check(seen)
                continue
            acts = site_activations(self.lm, names, seen.batch)
            for place, tally in tallies.items():
                tally.add(seen, acts[place.hook_name])
            dialogues.add(seen, tallies.values())
            if self.interrupts.asked or time.monotonic() - saved > SAVE_EVERY:
                parts = {_file(place): tally.tensors() for place, tally in tallies.items()} | {
                    "dialogues": dialogues.tensors()
                }
                reached_now = {
                    "group": group,
                    "rows": tokens,
                    "batches": number,
                    "groups": self.planned,
                }
                checkpoints.save(reached_now, parts)
                saved = time.monotonic()
            if self.interrupts.asked:
                say("The index was stopped before its end; the same call goes on.")
                raise KeyboardInterrupt
        if not any(tally.rows for tally in tallies.values()):
            raise ValueError(
                "There are no tokens to index; give dialogues whose keep-mask and norm filter leave"
                " some."
            )
        return tokens


def _check_own(out: Path) -> None:
    """ValueError where an index would take the place of files that are not an index's."""
    there = [name for name in (MANIFEST, DOCUMENTS, TOKENS, TABLES) if os.path.lexists(out / name)]
    if there and not (out / MANIFEST).is_file():
        raise ValueError(
            f"{str(out)!r} holds {', '.join(there)}, which are of no index; give another folder."
        )
    if there:
        try:
            read_manifest(out)
        except ValueError as error:
            raise ValueError(
                f"{error} In its place nothing is built: give another folder."
            ) from error


NOT_ITS_IDENTITY = ("model", "tokens", "built")
"""What a manifest says beside the identity of its build."""


def _made_as(out: Path) -> dict[str, Any]:
    """The identity of the build that made an index."""
    manifest = read_manifest(out)
    suite = {
        str(Place(entry["variant"], entry["hook_name"])): entry["checksum"]
        for entry in manifest["suite"]
    }
    own = {name: value for name, value in manifest.items() if name not in NOT_ITS_IDENTITY}
    if isinstance(own.get("policy"), dict):  # older ones dropped no prefix, and do not say it
        own["policy"] = {"drop_prefix": False} | own["policy"]
    return own | {"suite": suite}


def _put_in_place(out: Path) -> None:
    """Moves a whole build from its working folder to its place, and can go on from any point at
    which it was killed.

    The index that was there goes, manifest first, so that there is none for a moment rather than a
    mixture; labels stay, and so does all that is not an index's.
    """
    work = out / WORK
    if not (work / MANIFEST).is_file():
        return
    if (out / MANIFEST).is_file() and (out / MANIFEST).read_bytes() == (
        work / MANIFEST
    ).read_bytes():
        shutil.rmtree(work)  # it was killed at its very last step
        return
    for old in found(work):
        delete_checkpoint(old)
    if (out / MANIFEST).is_file():
        _check_own(out)
        os.replace(out / MANIFEST, work / RETIRED)
    if (work / RETIRED).is_file():
        _delete_index(out, read_manifest(work, RETIRED))
    for file in sorted(path for path in work.rglob("*.parquet") if path.is_file()):
        place = out / file.relative_to(work)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    write_text(out / MANIFEST, (work / MANIFEST).read_text(encoding="utf-8"))
    shutil.rmtree(work)


def _delete_index(out: Path, manifest: Mapping[str, Any]) -> None:
    """Deletes the tables that a manifest names."""
    for entry in manifest["suite"]:
        folder = site_folder(out, entry)
        for name in (FEATURES, EXAMPLES):
            (folder / name).unlink(missing_ok=True)
        for empty in (folder, folder.parent):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()


def site_folder(out: Path, entry: Mapping[str, Any]) -> Path:
    """Where an index keeps the tables of an SAE. Raises ValueError for names that would lead
    elsewhere.
    """
    variant, hook_name = (
        checked_name(entry[part], "An SAE of an index") for part in ("variant", "hook_name")
    )
    return inside(out, f"{TABLES}/{variant}/{hook_name}", "An index")


LARGEST_D_SAE = 2**24
"""Features of an SAE in an index."""
MANIFEST_LIMIT = 64 * 2**20
"""Bytes of an index's manifest."""


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """An index's manifest, its entries checked. Raises ValueError for one of another version and
    for what no index says.
    """
    path = folder / name
    manifest = read_json(path, "a feature index", MANIFEST_LIMIT)
    version = manifest.get("index") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise ValueError(
            f"{str(folder)!r} is an index of version {version}, this is version {VERSION}; build it"
            " again."
        )
    wrong = _wrong_entry(manifest) if version == VERSION else "index"
    if wrong:
        raise ValueError(
            f"{str(path)!r} cannot be read (its entry {wrong} is not what an index writes); build"
            " the index again."
        )
    for entry in manifest["suite"]:
        site_folder(folder, entry)
    return manifest


def _wrong_entry(manifest: Mapping[str, Any]) -> str:
    """The first entry of a manifest that is missing or of another kind; "" where all are well."""
    settings = manifest.get("settings")
    if not isinstance(settings, dict) or not all(
        _count(settings.get(name), 10**12) for name in asdict(IndexConfig())
    ):
        return "settings"
    if (
        settings["before"] + settings["after"] > LONGEST_WINDOW
        or settings["top"] + settings["sampled"] > MOST_EXAMPLES
    ):
        return "settings"
    for name, kind in (
        ("model", str),
        ("weights", str),
        ("data", str),
        ("built", str),
        ("tokens", int),
    ):
        if not isinstance(manifest.get(name), kind):
            return name
    suite = manifest.get("suite")
    return "" if isinstance(suite, list) and all(map(_is_site, suite)) and suite else "suite"


LONGEST_WINDOW, MOST_EXAMPLES = 10_000, 10_000
"""Tokens around an example, and examples of a feature, that an index is read with."""


def _count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_site(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    texts = all(isinstance(entry.get(name), str) for name in ("variant", "hook_name", "checksum"))
    median = entry.get("median_norm")
    known = (
        isinstance(median, (int, float))
        and not isinstance(median, bool)
        and math.isfinite(median)
        and median > 0
    )
    return texts and known and _count(entry.get("d_sae"), LARGEST_D_SAE) and entry["d_sae"] > 0


def vocabulary(lm: HookedLM) -> list[str]:
    """The text of every token id of the model."""
    size = lm.hf.get_output_embeddings().weight.shape[0]
    return lm.tokenizer.batch_decode([[i] for i in range(size)])


def _file(place: Place) -> str:
    """A file's name for an SAE in a checkpoint."""
    return hashlib.sha256(str(place).encode()).hexdigest()[:16]


def _write(table: pa.Table, path: Path, rows: int = 4096) -> None:
    with atomic_file(path) as part:
        pq.write_table(table, part, row_group_size=rows)


def _write_site(
    lm: HookedLM, tally: Tally, texts: Sequence[str], ids: Mapping[int, Sequence[int]], folder: Path
) -> None:
    sample = sample_of(tally)
    assert tally.sae.provenance is not None
    written = lm.to_residual(tally.sae.provenance.hook_name, tally.sae.W_dec)
    logits = logit_effects(lm, written)
    _write(feature_table(tally, logits, sample, texts, ids), folder / FEATURES)
    _write(example_table(tally), folder / EXAMPLES)

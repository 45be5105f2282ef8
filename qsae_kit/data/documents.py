"""Chats and texts -> token batches with a keep-mask.

One dialogue is one sequence in the model's own template; what is longer than the context is cut
into several. The keep-mask leaves out position 0,
padding, what every chat begins with (a default system prompt, the first header: under causal
attention the same rows in every dialogue, which tell nothing) and, by choice, template tokens; the
sites' norm filter comes later, where activations are seen.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, takewhile
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from qsae_kit.data.given import check_anew, documents_given, first_of
from qsae_kit.data.records import Document
from qsae_kit.lm.chat import CATEGORIES, Markers, Phase, phases
from qsae_kit.lm.hooked import HookedLM

CONTEXT = 512
"""Tokens that documents are cut at where nothing else is said."""
FEWEST = 2
"""Tokens of a document that one can be kept of: the first never is."""
PLAIN_ROLES = ("system", "user", "assistant")
"""What every template is expected to write."""


class TokenPolicy(NamedTuple):
    """Which tokens of a document count, beside its first, which never does; the norm filter comes
    where activations are seen.
    """

    drop_template: bool = False
    """Whether template tokens are left out."""
    context_size: int = CONTEXT
    """Tokens of a sequence; a longer document is several."""
    drop_prefix: bool = True
    """Whether the tokens that all chats begin with (`chat_prefix`) are left out."""

    def on(self, lm: HookedLM) -> "TokenPolicy":
        """The same within the model's own context; no prefix is dropped where chats have none."""
        return self._replace(
            context_size=min(self.context_size, lm.context_size),
            drop_prefix=self.drop_prefix and len(chat_prefix(lm)) > 1,
        )


class Window(NamedTuple):
    """Where a window of documents that are sorted together begins in a stream."""

    documents: int = 0
    """Documents before it."""
    batches: int = 0
    """Batches that were made of those."""


class TokenSequence(NamedTuple):
    """A document, or a part of one that is longer than the context."""

    ids: list[int]
    phase: list[int] | None = None
    """As `TokenBatch.phase` has it: given for every part of a chat that is cut."""


class TokenBatch(NamedTuple):
    """Right-padded sequences; `keep` marks the tokens whose activations count."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    keep: Bool[Tensor, "batch pos"]
    policy: TokenPolicy = TokenPolicy()
    """What `keep` and the length were made by."""
    phase: Int[Tensor, "batch pos"] | None = None
    """The `Phase` of every token where a row goes on with a document, so that its ids do not tell;
    None: as the ids tell.
    """
    window: "Window" = Window()
    """The window that the batch is of."""


def tokenize_document(lm: HookedLM, document: Document, max_length: int) -> list[int]:
    """Token ids of a chat in the model's template, or of a text, cut at `max_length`.

    A chat that ends with the user's message is followed by the header that asks for an answer.
    """
    if isinstance(document, str):
        return lm.text_tokens(document)[:max_length]
    asks = bool(document) and document[-1].get("role") == "user"
    return lm.chat_tokens(document, add_generation_prompt=asks)[:max_length]


def check_chat(lm: HookedLM) -> Callable[[Document], None]:
    """What raises ValueError for chats that the model's template cannot write: in such an order of
    roles, or with messages that it leaves out.

    Plain roles are tried once in an order; tools and developers every time. A model without a
    template reads texts alone.
    """
    known: set[tuple[str, ...]] = set()

    def check(document: Document) -> None:
        if isinstance(document, str):
            return
        roles = tuple(message["role"] for message in document)
        plain = set(roles) <= set(PLAIN_ROLES) and not any("tool_calls" in m for m in document)
        if not plain or roles not in known:
            lm.to_chat(document, add_generation_prompt=False)
            known.add(roles)

    return check


def sequences(lm: HookedLM, document: Document, context_size: int) -> list[TokenSequence]:
    """A document's tokens in parts of at most `context_size`, one of them where it fits; those
    after the first begin with the tokenizer's own first token, if it writes one.
    """
    row = tokenize_document(lm, document, sys.maxsize)
    if len(row) <= context_size:
        return [TokenSequence(row)]
    phase = None
    if lm.markers is not None and not isinstance(document, str):
        ids = torch.tensor([row])
        phase = phases(ids, torch.ones_like(ids), lm.markers)[0].tolist()
    begin = row[:1] if row[0] == lm.tokenizer.bos_token_id else []
    parts = [TokenSequence(row[:context_size], phase and phase[:context_size])]
    step = context_size - len(begin)
    for start in range(context_size, len(row), step):
        part = phase and [int(Phase.TEMPLATE)] * len(begin) + phase[start : start + step]
        parts.append(TokenSequence(begin + row[start : start + step], part))
    return parts


PROBES = ("Who?", "7 + 5")
"""User messages that have no beginning in common."""


def chat_prefix(lm: HookedLM) -> list[int]:
    """Token ids that every chat begins with unless it has a system message of its own: the
    template's default system prompt, if it has one, and the header of the user's turn. Empty for a
    model without a chat template.
    """
    if not lm.tokenizer.chat_template:
        return []
    try:
        chats = [lm.chat_tokens(probe) for probe in PROBES]
    except ValueError:  # a template that refuses a single user turn writes no such chats
        return []
    pairs = zip(*chats, strict=False)
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def keep_mask(
    lm: HookedLM,
    ids: Tensor,
    mask: Tensor,
    drop_template: bool = False,
    drop_prefix: bool = False,
    phase: Tensor | None = None,
) -> Bool[Tensor, "batch pos"]:
    """Real tokens but each row's first; with `drop_template` no template tokens, with `drop_prefix`
    none of what all chats begin with, in rows that begin so.

    phase: of every token, where the ids alone do not tell (`TokenBatch.phase`). Raises ValueError
    for `drop_template` with a model whose chat markers are unknown.
    """
    keep = (mask.cumsum(1) * mask) > 1
    if drop_prefix:
        keep &= ~_in_prefix(ids, mask, chat_prefix(lm))
    if drop_template:
        if lm.markers is None:
            raise ValueError(
                f"The chat markers of {lm.model_name!r} are unknown; template tokens cannot be left"
                " out."
            )
        keep &= (phases(ids, mask, lm.markers) if phase is None else phase) != Phase.TEMPLATE
    return keep


def _in_prefix(ids: Tensor, mask: Tensor, prefix: list[int]) -> Bool[Tensor, "batch pos"]:
    """The tokens of `prefix` in rows that begin with it, or that are cut within it."""
    n = min(len(prefix), ids.shape[1])
    position = mask.cumsum(1) - 1
    first = mask.argmax(1, keepdim=True)
    at = (first + torch.arange(n, device=ids.device)).clamp(max=ids.shape[1] - 1)
    same = ids.gather(1, at) == torch.tensor(prefix[:n], dtype=ids.dtype, device=ids.device)
    cut = torch.arange(n, device=ids.device) >= mask.sum(1, keepdim=True)
    begins = (same | cut).all(1, keepdim=True)
    return begins & (position < n) & mask.bool()


def token_batches(
    lm: HookedLM,
    documents: Iterable[Document],
    batch_tokens: int = 8192,
    policy: TokenPolicy = TokenPolicy(),
    seed: int | None = 0,
    start: Window = Window(),
) -> Iterator[TokenBatch]:
    """Batches of at most `batch_tokens` padded tokens, sequences of like length together to waste
    little padding.

    Works through the stream in windows of 16 batches, shuffled within a window; seed None keeps the
    given order. policy: of the tokens that count; an SAE's own is `attach.policy_of`. start: the
    window to begin with; the documents before it are passed over, and not made into tokens.
    Raises ValueError for sizes that no batch can have, and for documents that are none.
    """
    policy = policy.on(lm)
    if batch_tokens < 1 or policy.context_size < FEWEST:
        raise ValueError(
            f"Batches of {batch_tokens} tokens were asked for, of documents of"
            f" {policy.context_size}; give at least 1 and {FEWEST}."
        )
    stream = islice(documents_given(documents), start.documents, None)
    done, made = start
    while True:
        n, window = _take_tokens(lm, stream, policy.context_size, WINDOW * batch_tokens)
        if not n:
            return
        ordered = sorted(window, key=lambda one: len(one.ids)) if seed is not None else window
        groups = _group(ordered, batch_tokens)
        if seed is not None:
            random.Random(seed + done).shuffle(groups)
        for rows in groups:
            yield _batch(lm, rows, policy)._replace(window=Window(done, made))
        done, made = done + n, made + len(groups)


MOST_EMPTY = 100_000
"""Documents in a row without two tokens: data that go round would never end."""
WINDOW = 16
"""Batches of a window."""


class TokenStream:
    """`token_batches` of a stream of documents that can be opened again and again, from any window
    on: training that goes on does not make tokens of what it has seen.

    documents: gives the same documents, in the same order, each time it is called.
    """

    def __init__(
        self,
        lm: HookedLM,
        documents: Callable[[], Iterable[Document]],
        batch_tokens: int = 8192,
        policy: TokenPolicy = TokenPolicy(),
        seed: int | None = 0,
    ) -> None:
        check_anew(documents, "The documents")
        self.lm, self.documents = lm, documents
        self.batch_tokens, self.policy, self.seed = batch_tokens, policy, seed

    def __call__(self, start: Window = Window()) -> Iterator[TokenBatch]:
        return token_batches(
            self.lm,
            first_of(self.documents, "the documents"),
            self.batch_tokens,
            self.policy,
            self.seed,
            start,
        )


def _batch(lm: HookedLM, rows: list[TokenSequence], policy: TokenPolicy) -> TokenBatch:
    ids, mask = lm.pad([row.ids for row in rows])
    phase = None
    if lm.markers is not None and any(row.phase is not None for row in rows):
        phase = phases(ids, mask, lm.markers)
        for n, row in enumerate(rows):
            if row.phase is not None:
                phase[n, : len(row.phase)] = torch.tensor(row.phase, device=phase.device)
    keep = keep_mask(lm, ids, mask, policy.drop_template, policy.drop_prefix, phase)
    return TokenBatch(ids, mask, keep, policy, phase)


def _take_tokens(
    lm: HookedLM, documents: Iterator[Document], context_size: int, n_tokens: int
) -> tuple[int, list[TokenSequence]]:
    """How many documents were taken until they held `n_tokens`, and their sequences; those of a
    single token are left out.
    """
    taken, n, parts = 0, 0, list[TokenSequence]()
    while taken < n_tokens and (document := next(documents, None)) is not None:
        n += 1
        if n > MOST_EMPTY and not parts:
            raise ValueError(
                f"{n:,} documents in a row have one token each, and what is read is what follows a"
                " token; give longer texts."
            )
        own = [one for one in sequences(lm, document, context_size) if len(one.ids) > 1]
        parts += own
        taken += sum(len(one.ids) for one in own)
    return n, parts


def _group(rows: list[TokenSequence], batch_tokens: int) -> list[list[TokenSequence]]:
    groups: list[list[TokenSequence]] = [[]]
    longest = 0
    for row in rows:
        longest = max(longest, len(row.ids))
        if groups[-1] and longest * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
            longest = len(row.ids)
        groups[-1].append(row)
    return [group for group in groups if group]


def held_out_batches(
    lm: HookedLM, documents: Iterable[Document], tokens: int, policy: TokenPolicy = TokenPolicy()
) -> list[TokenBatch]:
    """Small batches until they hold `tokens` kept tokens. Raises ValueError where there are
    none.
    """
    out: list[TokenBatch] = []
    taken = 0
    for batch in token_batches(lm, documents, batch_tokens=1024, policy=policy):
        out.append(batch)
        taken += int(batch.keep.sum())
        if taken >= tokens:
            break
    if not taken:
        raise ValueError("There are no tokens to evaluate; give longer texts.")
    return out


def repeat(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents over and over; what has been seen is kept in memory for the next round."""
    kept: list[Document] = []
    for document in documents:
        kept.append(document)
        yield document
    while kept:
        yield from kept


def again(documents: Callable[[], Iterable[Document]]) -> Iterator[Document]:
    """The documents over and over, read anew each time: nothing is kept. `documents` gives at least
    one.
    """
    while True:
        yield from documents()


def split_documents(
    documents: Iterable[Document], n_held_out: int
) -> tuple[list[Document], Iterator[Document]]:
    """`n_held_out` documents for evaluation, every second one of the beginning, and a stream of the
    others.

    A single document serves both.
    """
    stream = iter(documents)
    head = list(islice(stream, 2 * n_held_out))
    return head[::2], chain(head[1::2] or head, stream)


def phases_of(markers: Markers, batch: TokenBatch) -> Int[Tensor, "batch pos"]:
    """The `Phase` of every token of a batch."""
    return phases(batch.ids, batch.mask, markers) if batch.phase is None else batch.phase


def categories_of(lm: HookedLM, batch: TokenBatch) -> dict[str, Tensor]:
    """A mask [batch, pos] for every category; only "all" where the model's chat markers are
    unknown.
    """
    masks = {"all": batch.mask.bool()}
    if lm.markers is not None:
        phase = phases_of(lm.markers, batch)
        for name, members in CATEGORIES.items():
            masks[name] = torch.stack([phase == member for member in members]).any(0)
    return masks

"""Chats and texts -> token batches with a keep-mask.

One dialogue is one sequence in the model's own template. The keep-mask leaves out position 0,
padding, what every chat begins with (a default system prompt, the first header: under causal
attention the same rows in every dialogue, which tell nothing) and, by choice, template tokens; the
sites' norm filter comes later, where activations are seen.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from qsae_kit.data.given import documents_given, rows_of
from qsae_kit.io.jsonfiles import parse_json
from qsae_kit.lm.chat import CATEGORIES, Phase, phases
from qsae_kit.lm.hooked import HookedLM, Message

Document: TypeAlias = str | list[Message]
SHOWN = 200
"""Characters of a record in a message."""
ROLES = ("system", "user", "assistant", "tool")


CONTEXT = 512
"""Tokens that documents are cut at where nothing else is said."""
FEWEST = 2
"""Tokens of a document that one can be kept of: the first never is."""


class TokenPolicy(NamedTuple):
    """Which tokens of a document count, beside its first, which never does; the norm filter comes
    where activations are seen.
    """

    drop_template: bool = False
    """Whether template tokens are left out."""
    context_size: int = CONTEXT
    """Tokens that a document is cut at."""
    drop_prefix: bool = True
    """Whether the tokens that all chats begin with (`chat_prefix`) are left out."""

    def on(self, lm: HookedLM) -> "TokenPolicy":
        """The same within the model's own context; no prefix is dropped where chats have none."""
        return self._replace(
            context_size=min(self.context_size, lm.context_size),
            drop_prefix=self.drop_prefix and len(chat_prefix(lm)) > 1,
        )


class TokenBatch(NamedTuple):
    """Right-padded sequences; `keep` marks the tokens whose activations count."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    keep: Bool[Tensor, "batch pos"]
    policy: TokenPolicy = TokenPolicy()
    """What `keep` and the length were made by."""


def read_documents(source: str | Path | Iterable[Any]) -> Iterator[Document]:
    """Chats or texts from a .jsonl or .txt file, a `datasets` id (streamed), or Python objects.

    A JSONL line holds `messages`, `prompt` and `answer` or `question` and `answer`, or `text`; a
    text file holds one text a line. Raises ValueError for a source that is missing or empty, with
    the line number for a malformed one.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_file():
            records: Iterable[tuple[str, Any]] = _read_file(path)
        elif path.suffix in (".jsonl", ".txt") or path.exists():
            what = "regular file" if path.exists() else "file"
            advice = "give a .jsonl or .txt file, or the id of a data set"
            raise ValueError(f"There is no {what} {str(source)!r}; {advice}.")
        else:
            records = _read_dataset(str(source))
    else:
        records = ((f"item {i}", item) for i, item in enumerate(rows_of(source)))
    empty = True
    for where, record in records:
        empty = False
        yield parse_record(record, where)
    if empty:
        raise ValueError(f"{str(source)!r} holds no dialogues or texts; give at least one.")


def parse_record(record: Any, where: str) -> Document:
    """One record -> messages or a text; ValueError, beginning with `where`, for what is neither."""
    if isinstance(record, str):
        if not record.strip():
            raise ValueError(f"{where}: the text is empty.")
        return record
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: expected an object with messages or text, found {type(record).__name__}."
        )
    for question in ("question", "prompt", "instruction"):
        if isinstance(record.get(question), str) and isinstance(record.get("answer"), str):
            turns = (("user", record[question]), ("assistant", record["answer"]))
            return [{"role": role, "content": text} for role, text in turns]
    if isinstance(record.get("text"), str):
        return parse_record(record["text"], where)
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        found = ", ".join(map(str, record))[:SHOWN] or "nothing"
        raise ValueError(
            f"{where}: expected messages (a list), text, or question and answer; found {found}."
        )
    for n, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("content"), str)
            or message.get("role") not in ROLES
        ):
            raise ValueError(
                f"{where}: message {n} needs a role ({', '.join(ROLES)}) and a content that is"
                " text."
            )
    return messages


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each line is and what it holds; a file may be too large for memory."""
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):  # of bytes, so that only \n ends a line
            where = f"{path.name}, line {number}"
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8; save the file as UTF-8.") from error
            if line.strip():
                text = line.rstrip("\r\n")
                yield where, text if path.suffix == ".txt" else parse_json(text, where)


def _read_dataset(name: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=True, trust_remote_code=False)
    # datasets raises a dozen unrelated types for one thing: it cannot be had
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"The data set {name!r} could not be opened ({reason}); give a .jsonl or .txt file, or"
            " an id on a reachable hub."
        ) from error
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def tokenize_document(lm: HookedLM, document: Document, max_length: int) -> list[int]:
    """Token ids of a chat in the model's template, or of a text, cut at `max_length`.

    A chat that ends with the user's message is followed by the header that asks for an answer.
    """
    if isinstance(document, str):
        return lm.text_tokens(document)[:max_length]
    asks = bool(document) and document[-1].get("role") == "user"
    return lm.chat_tokens(document, add_generation_prompt=asks)[:max_length]


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
) -> Bool[Tensor, "batch pos"]:
    """Real tokens but each row's first; with `drop_template` no template tokens, with `drop_prefix`
    none of what all chats begin with, in rows that begin so.

    Raises ValueError for `drop_template` with a model whose chat markers are unknown.
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
        keep &= phases(ids, mask, lm.markers) != Phase.TEMPLATE
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
) -> Iterator[TokenBatch]:
    """Batches of at most `batch_tokens` padded tokens, documents of like length together to waste
    little padding.

    Works through the stream in windows of 16 batches, shuffled within a window; seed None keeps the
    given order. policy: of the tokens that count; an SAE's own is `attach.policy_of`. Raises
    ValueError for sizes that no batch can have, and for documents that are none.
    """
    rng = random.Random(seed)
    policy = policy.on(lm)
    if batch_tokens < 1 or policy.context_size < FEWEST:
        raise ValueError(
            f"Batches of {batch_tokens} tokens were asked for, of documents of"
            f" {policy.context_size}; give at least 1 and {FEWEST}."
        )
    given = documents_given(documents)
    stream = (tokenize_document(lm, document, policy.context_size) for document in given)
    stream = (row for row in stream if len(row) > 1)
    while window := list(_take_tokens(stream, 16 * batch_tokens)):
        groups = _group(sorted(window, key=len) if seed is not None else window, batch_tokens)
        if seed is not None:
            rng.shuffle(groups)
        for rows in groups:
            ids, mask = lm.pad(rows)
            keep = keep_mask(lm, ids, mask, policy.drop_template, policy.drop_prefix)
            yield TokenBatch(ids, mask, keep, policy)


def _take_tokens(rows: Iterator[list[int]], n_tokens: int) -> Iterator[list[int]]:
    taken = 0
    while taken < n_tokens:
        row = next(rows, None)
        if row is None:
            return
        taken += len(row)
        yield row


def _group(rows: list[list[int]], batch_tokens: int) -> list[list[list[int]]]:
    groups: list[list[list[int]]] = [[]]
    longest = 0
    for row in rows:
        longest = max(longest, len(row))
        if groups[-1] and longest * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
            longest = len(row)
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


def categories_of(lm: HookedLM, batch: TokenBatch) -> dict[str, Tensor]:
    """A mask [batch, pos] for every category; only "all" where the model's chat markers are
    unknown.
    """
    masks = {"all": batch.mask.bool()}
    if lm.markers is not None:
        phase = phases(batch.ids, batch.mask, lm.markers)
        for name, members in CATEGORIES.items():
            masks[name] = torch.stack([phase == member for member in members]).any(0)
    return masks

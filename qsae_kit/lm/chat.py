"""Which part of a chat a token belongs to: template, system, user, thinking or answer.

Read from the token ids alone, so that it is the same in a batch, in a stored dialogue and in the
middle of a generation with a KV cache. The ChatML markers of Qwen and SmolLM are known; a model
without them has no phases.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


class Phase(IntEnum):
    """What a token is in its chat. `TEMPLATE` covers role headers, end markers, think markers and
    line ends after them; a text that is no chat, without any header, counts as the user's.
    """

    PADDING = 0
    TEMPLATE = 1
    SYSTEM = 2
    USER = 3
    THINKING = 4
    ANSWER = 5


class Markers(NamedTuple):
    """Token ids of the chat's markers; `think_open` and `think_close` are -1 where the model has no
    thinking.
    """

    start: int
    end: int
    system: tuple[int, ...]
    """The role's name, which some tokenizers cut into several tokens."""
    user: tuple[int, ...]
    assistant: tuple[int, ...]
    think_open: int
    think_close: int
    line_ends: tuple[int, ...]
    """Tokens of nothing but line ends."""


def find_markers(tokenizer: Any) -> Markers | None:
    """The ChatML markers of a tokenizer, or None where it has none (or roles begin with the same
    token).
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    def single(text: str) -> int:
        return ids(text)[0] if len(ids(text)) == 1 else -1

    found = Markers(
        single("<|im_start|>"),
        single("<|im_end|>"),
        ids("system"),
        ids("user"),
        ids("assistant"),
        single(THINK_OPEN),
        single(THINK_CLOSE),
        tuple(single("\n" * n) for n in (1, 2, 3)),
    )
    distinct = len({found.system[0], found.user[0], found.assistant[0]}) == 3
    return found if found.start >= 0 and found.end >= 0 and distinct else None


def phases(ids: Tensor, mask: Tensor, markers: Markers) -> Tensor:
    """The `Phase` of every token; ids and mask are [batch, pos], mask 0 at padding. Returns int64
    [batch, pos].
    """
    out = torch.full_like(ids, int(Phase.TEMPLATE))
    is_start, is_end = _turn_starts(ids, mask, markers), ((ids == markers.end) & mask.bool()).long()
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    segment_start = torch.where(is_start, position, -1).cummax(dim=1).values
    at_start = segment_start.clamp(min=0)
    role = ids.gather(1, (segment_start + 1).clamp(0, ids.shape[1] - 1))
    # A turn ends at its last end marker; those before are quoted.
    turn, seen = is_start.long().cumsum(1), is_end.cumsum(1)
    ends = (
        torch.zeros(len(ids), ids.shape[1] + 1, dtype=torch.long, device=ids.device)
        .scatter_add_(1, turn, is_end)
        .gather(1, turn)
    )
    inside = (segment_start >= 0) & ((ends == 0) | (seen - seen.gather(1, at_start) < ends))
    for name, phase in (
        (markers.system, Phase.SYSTEM),
        (markers.user, Phase.USER),
        (markers.assistant, Phase.ANSWER),
    ):
        header = 2 + len(name)  # <|im_start|>, the role, a line end
        out[inside & (role == name[0]) & (position - segment_start >= header)] = int(phase)
    if markers.think_open >= 0 and markers.think_close >= 0:
        answer = out == Phase.ANSWER
        # The block opens right after the header and closes at the first marker; others are quoted.
        first = segment_start + 2 + len(markers.assistant)
        block = answer & (ids.gather(1, first.clamp(max=ids.shape[1] - 1)) == markers.think_open)
        is_close = ids == markers.think_close
        closed = is_close.long().cumsum(1)
        closed = closed - closed.gather(1, at_start)
        out[block & (closed == 0)] = int(Phase.THINKING)
        marker = block & ((position == first) | (is_close & (closed == 1)))
        # The line end right after a think marker is the template's too.
        after = torch.zeros_like(marker)
        after[:, 1:] = marker[:, :-1] & torch.isin(
            ids[:, 1:], torch.tensor(markers.line_ends, device=ids.device)
        )
        out[answer & (marker | after)] = int(Phase.TEMPLATE)
    out[~is_start.any(1)] = int(Phase.USER)
    out[mask == 0] = int(Phase.PADDING)
    return out


def _turn_starts(ids: Tensor, mask: Tensor, markers: Markers) -> Tensor:
    """Start markers that begin a turn: a row's first, and those after an end marker (and a line
    end); others are quoted.
    """
    is_start = (ids == markers.start) & mask.bool()
    follows = is_start.cumsum(1) == 1
    for gap in (1, 2):
        follows[:, gap:] |= ids[:, :-gap] == markers.end
    return is_start & follows


def answer_start(ids: Tensor, mask: Tensor, markers: Markers) -> Tensor:
    """Index of the last assistant header's first token in every row, `pos` where there is none.
    Returns [batch].
    """
    is_start = _turn_starts(ids, mask, markers)
    opens = torch.zeros_like(is_start)
    opens[:, :-1] = is_start[:, :-1] & (ids[:, 1:] == markers.assistant[0])
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = torch.where(opens, position, -1).max(dim=1).values
    return torch.where(last >= 0, last, ids.shape[1])


def closed(text: str) -> str:
    """A chat that asks for an answer, with the think block ended that its template may open for
    the answer.
    """
    return text.rstrip() + f"\n\n{THINK_CLOSE}\n\n" if text.rstrip().endswith(THINK_OPEN) else text


LAST_TOKENS = 8
"""Of a prompt that is no chat of known markers, in which a think block may be opened."""


def inside_thoughts(ids: Sequence[int], markers: Markers | None, tokenizer: Any) -> bool:
    """Whether a prompt ends inside a think block: the last assistant turn opens one and does not
    close it, or, without known markers or outside of a chat, its last tokens are `<think>` and
    blanks.
    """
    if markers is not None and markers.think_open >= 0:
        row = torch.tensor([list(ids)])
        header = int(answer_start(row, torch.ones_like(row), markers))
        if header < len(ids):
            turn = list(ids[header + 2 + len(markers.assistant) :])
            return turn[:1] == [markers.think_open] and markers.think_close not in turn
    return tokenizer.decode(list(ids[-LAST_TOKENS:])).rstrip().endswith(THINK_OPEN)


def first_said(tokens: Sequence[int], markers: Markers | None, opened: bool = False) -> int | None:
    """The first token of an answer behind its thoughts; None where there is none. opened: whether
    the template has opened a think block for them.
    """
    if markers is None or markers.think_close < 0:
        return next(iter(tokens), None)
    ends = [i for i, token in enumerate(tokens) if token == markers.think_close]
    if not ends and (opened or markers.think_open in tokens):
        return None
    rest = tokens[ends[-1] + 1 :] if ends else tokens
    return next((token for token in rest if token not in markers.line_ends), None)


def spoken(text: str) -> str:
    """What an answer says after its thoughts; nothing where they have not come to an end."""
    _, end, rest = text.rpartition(THINK_CLOSE)
    return "" if not end and text.lstrip().startswith(THINK_OPEN) else rest


CATEGORIES = {
    "template": (Phase.TEMPLATE,),
    "user": (Phase.SYSTEM, Phase.USER),
    "thinking": (Phase.THINKING,),
    "assistant": (Phase.ANSWER,),
}
"""What tokens are, by the chat's markers; "all" holds every token. A prediction belongs to the
token that is predicted.
"""

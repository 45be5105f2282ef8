"""Edits: what is added to the activations at a hook point, at which tokens, and under which
condition.

Every edit is in delta form (x + delta): whatever an SAE leaves unexplained stays in place.
Evaluation splices a reconstruction and steering adds a direction through this one path. Nothing
here knows of SAEs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from qsae_kit.lm.chat import Phase
from qsae_kit.lm.hooked import WRITES, HookedLM, Now, by_token
from qsae_kit.lm.locks import Entry

Policy: TypeAlias = Literal["all", "prompt", "header", "thinking", "answer", "every"]
POLICIES: tuple[Policy, ...] = ("all", "prompt", "header", "thinking", "answer", "every")
OF_ANSWERS: tuple[Policy, ...] = ("header", "thinking", "answer")
"""Those that name something in chats alone."""
Positions: TypeAlias = Policy | tuple[int, ...] | Tensor
"""Which tokens. Padding never is. Position 0 (an attention sink) and template tokens are left out
but by `every`, except from the last assistant header on, because the first answer token is
predicted from there.

all: user, system, thinking and answer tokens, and everything from the last assistant header on; of
a text that is no chat every token;
prompt: what precedes the last assistant header; header: the template's tokens from that header on
(role, think markers), where the model decides how to begin; thinking: inside the last think block;
answer: from the last assistant header on, header and thinking included; every: every token,
position 0 and the template's too, as a change of the model's weights would act.
A tuple of numbers: these positions, counted from 0 without padding. A bool tensor [batch, pos] is
    taken as it is; in a generation one of the prompts' shape holds at no new token.
"""
NamedHook: TypeAlias = tuple[str, Callable[..., Any]]
Rows: TypeAlias = Bool[Tensor, " batch"] | None
"""Which rows of a batch; None: all."""
Span: TypeAlias = Literal["token", "so_far"]
SPANS: tuple[Span, ...] = ("token", "so_far")


@dataclass(frozen=True)
class Detector:
    """A condition: a figure of the activations at a hook point is above a threshold."""

    hook_name: str
    read: Callable[[Float[Tensor, "batch pos width"]], Float[Tensor, "batch pos"]]
    threshold: float
    span: Span = "so_far"
    """token: at the token itself; so_far: at it or any token before it."""
    positions: Positions = "all"
    """The tokens at which it is looked."""


@dataclass(frozen=True)
class Edit:
    """A change of a hook point's activations, or of all that is written to the residual stream."""

    hook_name: str
    """A hook point, or `hooked.WRITES`."""
    delta: Callable[[Float[Tensor, "batch pos width"]], Float[Tensor, "batch pos width"]]
    """What is added, from the activations themselves (heads beside each other)."""
    positions: Positions = "all"
    when: Detector | None = None
    """Only tokens at which this holds are changed; None: always."""


def selected(now: Now, positions: Positions) -> Bool[Tensor, "batch chunk"]:
    """The tokens of the running chunk that a policy names.

    Raises ValueError for an unknown policy, a mask of another shape than the batch, and parts of an
    answer where no row is a chat.
    """
    if isinstance(positions, Tensor):
        mask = positions.bool().to(now.ids.device)
        if now.prompt is not None and mask.shape == (len(now.ids), now.prompt):
            mask = F.pad(mask, (0, now.ids.shape[1] - now.prompt))
        if mask.shape != now.ids.shape:
            raise ValueError(
                f"The position mask has the shape {list(mask.shape)}, the tokens"
                f" {list(now.ids.shape)}."
            )
        return mask[:, now.start :]
    check_positions(positions)
    if isinstance(positions, tuple):
        return torch.isin(now.logical, torch.tensor(positions, device=now.ids.device))
    if positions == "every":
        return now.mask[:, now.start :].bool()
    counted = now.logical > 0
    if now.markers is None and positions == "all":
        return counted
    answering, phase = now.answering, now.phase
    if positions in OF_ANSWERS and not now.start and not (phase == Phase.TEMPLATE).any():
        raise ValueError(
            f'An edit or a condition at positions="{positions}" was used on texts that are no'
            ' chats, which have none; give positions="all", or chats.'
        )
    content = (
        (phase == Phase.SYSTEM)
        | (phase == Phase.USER)
        | (phase == Phase.THINKING)
        | (phase == Phase.ANSWER)
    )
    if positions == "prompt":
        return counted & content & ~answering
    if positions == "header":
        return counted & answering & (phase == Phase.TEMPLATE)
    if positions == "thinking":
        return counted & answering & (phase == Phase.THINKING)
    if positions == "answer":
        return counted & answering
    return counted & (content | answering)


def check_positions(positions: Positions) -> None:
    """ValueError for an unknown policy, or for positions that no edit may change."""
    if isinstance(positions, Tensor):
        return
    if isinstance(positions, tuple):
        if not positions or min(positions) < 1:
            raise ValueError(
                f"Positions {positions} were given; they are numbers from 1 on (0 is an attention"
                " sink)."
            )
    elif positions not in POLICIES:
        raise ValueError(
            f"There is no position policy {positions!r}; choose from {', '.join(POLICIES)}."
        )


class _Gate:
    """Where a detector holds, followed through a generation with or without a KV cache."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.open: Bool[Tensor, "batch chunk"] | None = None

    def look(self, x: Tensor, now: Now) -> None:
        found = (self.detector.read(x) > self.detector.threshold) & selected(
            now, self.detector.positions
        )
        if self.detector.span == "so_far":
            if now.start and self.open is not None:
                found[:, 0] |= self.open[:, -1]
            found = found.cummax(1).values
        self.open = found


def applied(lm: HookedLM, edits: Sequence[Edit], rows: Rows = None) -> Entry[HookedLM]:
    """Runs everything inside the `with` under the edits, in the order given where they share a hook
    point.

    rows: which rows of a batch are edited (None: all). The model is held meanwhile: other threads
    wait, but for copies of this context (`contextvars`: `asyncio.to_thread`, tasks begun inside),
    which run it one by one under the edits too. A detector reads what arrives at its hook point,
    before edits there.
    Raises ValueError for an unknown hook point or policy, and for a detector that comes after the
    edit it decides on; in the `with`, RuntimeError where another task or a paused generator of this
    thread holds the model, and on leaving where one that began inside is still there.
    """
    return lm.hooks(fwd_hooks=_as_hooks(lm, edits, rows))


def applied_by_rows(lm: HookedLM, groups: Sequence[tuple[Sequence[Edit], Rows]]) -> Entry[HookedLM]:
    """`applied` for groups of rows, each under edits of its own."""
    hooks = [hook for edits, rows in groups for hook in _as_hooks(lm, edits, rows)]
    return lm.hooks(fwd_hooks=hooks)


def _as_hooks(lm: HookedLM, edits: Sequence[Edit], rows: Rows) -> list[NamedHook]:
    """The hooks of `applied`; raises its ValueErrors."""
    if isinstance(edits, Edit):
        raise ValueError("Edits are given as a list, and a single one was; give [edit].")
    lm.check_hook_names(
        hook_name for edit in edits for hook_name in (*_points(lm, edit), *_detectors(edit))
    )
    for edit in edits:
        check_positions(edit.positions)
        for hook_name in _detectors(edit):
            if lm.order_of(hook_name) > min(map(lm.order_of, _points(lm, edit))):
                raise ValueError(
                    f"A detector at {hook_name} comes too late for an edit at {edit.hook_name};"
                    " choose an earlier site."
                )
    gates = {edit.when: _Gate(edit.when) for edit in edits if edit.when is not None}

    def as_gate(gate: _Gate) -> Callable[..., None]:
        def hook(x: Tensor, hook: HookPoint) -> None:
            assert lm.now is not None
            gate.look(by_token(x), lm.now)

        return hook

    def as_hook(edit: Edit) -> Callable[..., Tensor]:
        def hook(x: Tensor, hook: HookPoint) -> Tensor:
            assert lm.now is not None
            where = selected(lm.now, edit.positions)
            if edit.when is not None:
                opened = gates[edit.when].open
                assert opened is not None
                where = where & opened
            if rows is not None:
                where = where & rows[:, None]
            if not where.any():
                return x
            flat = by_token(x)
            edited = torch.where(where[..., None], flat + edit.delta(flat).to(x.dtype), flat)
            return edited.view_as(x)

        return hook

    first: list[NamedHook] = [(gate.detector.hook_name, as_gate(gate)) for gate in gates.values()]
    made = [(name, as_hook(edit)) for edit in edits for name in _points(lm, edit)]
    return [*first, *made]


def untouched_layers(lm: HookedLM, edits: Sequence[Edit]) -> int:
    """How many of the first layers give the same under edits (one at least) as without them, and
    need not be looked at.
    """
    return min(
        lm.layers_before(name) for edit in edits for name in (*_points(lm, edit), *_detectors(edit))
    )


def _points(lm: HookedLM, edit: Edit) -> list[str]:
    """The hook points that an edit changes."""
    return lm.writes() if edit.hook_name == WRITES else [edit.hook_name]


def _detectors(edit: Edit) -> tuple[str, ...]:
    return (edit.when.hook_name,) if edit.when is not None else ()

"""Edits: what is added to the activations at a hook point, and at which tokens.

Every edit is in delta form (x + delta): whatever an SAE leaves unexplained stays in place. Evaluation splices a
reconstruction and steering adds a direction through this one path. Nothing here knows of SAEs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from qsae_kit.chat import Phase
from qsae_kit.models import HookedLM, Now

Policy: TypeAlias = Literal["all", "prompt", "header", "thinking", "answer"]
POLICIES: tuple[Policy, ...] = ("all", "prompt", "header", "thinking", "answer")


@dataclass(frozen=True)
class Edit:
    """A change of one hook point's activations."""

    hook_name: str
    delta: Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]
    """What is added, from the activations themselves."""
    positions: Policy | Tensor = "all"
    """Which tokens are changed. Position 0 (an attention sink) and padding never are; template tokens are left out
    except from the last assistant header on, because the first answer token is predicted from there.

    all: user, system, thinking and answer tokens, and everything from the last assistant header on;
    prompt: what precedes the last assistant header; header: the template's tokens from that header on (role, think
    markers), where the model decides how to begin; thinking: inside the last think block;
    answer: from the last assistant header on, header and thinking included.
    A bool tensor [batch, pos] is taken as it is.
    """


def selected(now: Now, positions: Policy | Tensor) -> Bool[Tensor, "batch chunk"]:
    """The tokens of the running chunk that a policy names.

    Raises ValueError for an unknown policy, or a mask of another shape than the batch.
    """
    if isinstance(positions, Tensor):
        mask = positions.bool().to(now.ids.device)
        if mask.shape != now.ids.shape:
            raise ValueError(f"The position mask has the shape {list(mask.shape)}, the tokens {list(now.ids.shape)}.")
        return mask[:, now.start :]
    if positions not in POLICIES:
        raise ValueError(f"There is no position policy {positions!r}; choose from {', '.join(POLICIES)}.")
    counted = now.logical > 0
    if now.markers is None and positions == "all":
        return counted
    answering, phase = now.answering, now.phase
    content = (phase == Phase.SYSTEM) | (phase == Phase.USER) | (phase == Phase.THINKING) | (phase == Phase.ANSWER)
    if positions == "prompt":
        return counted & content & ~answering
    if positions == "header":
        return counted & answering & (phase == Phase.TEMPLATE)
    if positions == "thinking":
        return counted & answering & (phase == Phase.THINKING)
    if positions == "answer":
        return counted & answering
    return counted & (content | answering)


@contextmanager
def applied(lm: HookedLM, edits: Sequence[Edit]) -> Iterator[HookedLM]:
    """Runs everything inside the `with` under the edits, in the order given where they share a hook point."""
    lm.check_hook_names(edit.hook_name for edit in edits)

    def as_hook(edit: Edit) -> Callable[..., Tensor]:
        def hook(x: Tensor, hook: HookPoint) -> Tensor:
            assert lm.now is not None
            where = selected(lm.now, edit.positions)
            return torch.where(where[..., None], x + edit.delta(x).to(x.dtype), x) if where.any() else x

        return hook

    with lm.hooks(fwd_hooks=[(edit.hook_name, as_hook(edit)) for edit in edits]):
        yield lm

"""What a set of features should do, and how far it does it: log-odds of how answers begin, by real
passes without generating.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qsae_kit.lm.answering import KnownRows
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM

BACKWARD_BATCH = 32
"""Prompts of one backward pass."""
LENS_TOKENS = 10
"""Tokens that a direction is read as."""


@dataclass(frozen=True)
class Aim:
    """What a set of features should do to how answers begin, on prompts (token ids that end where
    the answer begins).
    """

    lm: HookedLM
    target: Sequence[list[int]]
    """Prompts at which the behaviour should come or go."""
    others: Sequence[list[int]]
    """Prompts at which nothing should change."""
    openings: Int[Tensor, " token"]
    """First tokens of answers that show the behaviour."""
    sign: float
    """1 to induce the behaviour, -1 to suppress it."""
    wanted: Sequence[list[int]] | None = None
    """Answers (token ids) that are wanted on the target prompts, where they are known."""
    price: float = 1.0
    """Weight in `merit` of what changes on the other prompts."""

    @cached_property
    def _target(self) -> KnownRows:
        return KnownRows(self.lm, self.target)

    @cached_property
    def _others(self) -> KnownRows:
        return KnownRows(self.lm, self.others)

    @cached_property
    def _wanted(self) -> KnownRows | None:
        return None if self.wanted is None else KnownRows(self.lm, self.target, self.wanted)

    def target_odds(self, edits: Sequence[Edit] = ()) -> Float[Tensor, " target"]:
        """Log-odds (nats) of a first token out of `openings` on the target prompts."""
        return self._target.log_odds(self.openings, edits)

    def others_odds(self, edits: Sequence[Edit] = ()) -> Float[Tensor, " other"]:
        """The same on the others."""
        return self._others.log_odds(self.openings, edits)

    def merit(
        self, edits: Sequence[Edit], clean_others: Float[Tensor, " other"], floor: float = -math.inf
    ) -> float:
        """How far the target prompts get what is wanted, less `price` times the mean change of the
        others' probability; at most 1.

        What is wanted: the geometric mean probability a token of the wanted answers, or where none
            are known the probability of
        the wanted beginning. floor: where the first part alone does not exceed it, the price is not
            asked for.
        """
        if self._wanted is None or self.wanted is None:
            gained = (self.sign * self.target_odds(edits)).sigmoid()
        else:
            told = zip(self._wanted.answer_logits(edits), self.wanted, strict=True)
            gained = torch.stack([_mean_logprob(logits, answer).exp() for logits, answer in told])
        if not self.price or float(gained.mean()) <= floor:
            return float(gained.mean())
        others = self.others_odds(edits)
        return float(
            gained.mean() - self.price * (others.sigmoid() - clean_others.sigmoid()).abs().mean()
        )


def _mean_logprob(logits: Float[Tensor, "answer vocab"], answer: list[int]) -> Float[Tensor, ""]:
    chosen = torch.tensor(answer, device=logits.device)[:, None]
    return logits.float().log_softmax(-1).gather(1, chosen).mean().cpu()


def log_odds_gradient(
    lm: HookedLM,
    hook_name: str,
    prompts: Sequence[list[int]],
    openings: Int[Tensor, " token"],
    batch: int = BACKWARD_BATCH,
) -> Float[Tensor, " width"]:
    """Gradient of the mean log-odds of `openings` at the first answer token by the activations at
    the prompts' last token.
    """
    width = lm.width(hook_name)
    total = torch.zeros(width, device=lm.device)
    for start in range(0, len(prompts), batch):
        ids, mask = lm.pad(prompts[start : start + batch], "left")
        zero = torch.zeros(len(ids), width, device=lm.device, requires_grad=True)
        last = torch.zeros_like(ids, dtype=torch.bool)
        last[:, -1] = True

        def delta(x: Tensor, zero: Tensor = zero) -> Tensor:
            return zero[:, None].expand_as(x)

        with torch.enable_grad(), applied(lm, [Edit(hook_name, delta, last)]):
            logits = lm(ids, mask, logits_to_keep=1)
            assert logits is not None
            logp = logits[:, -1].float().log_softmax(-1)
            odds = logp[:, openings].logsumexp(-1) - logp.index_fill(
                1, openings, float("-inf")
            ).logsumexp(-1)
            (gradient,) = torch.autograd.grad(odds.sum(), zero)
        total += gradient.sum(0)
    return total / len(prompts)


def lens_tokens(
    lm: HookedLM, direction: Float[Tensor, " d_model"], n: int = LENS_TOKENS
) -> Int[Tensor, " token"]:
    """The tokens that a direction of the residual stream raises most when it is read through the
    final norm's weights and the unembedding.
    """
    norm, unembedding = lm.hf.model.norm.weight, lm.hf.get_output_embeddings().weight
    return (unembedding.float() @ (direction.float() * norm.float())).topk(n).indices

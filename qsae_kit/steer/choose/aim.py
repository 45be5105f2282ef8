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

from qsae_kit.lm.answering import KnownRows, opening_odds
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM

BACKWARD_BATCH = 32
"""Prompts of one backward pass."""
BEYOND_LIMIT = 0.3
"""Merit that a KL of twice the limit costs beside its price: a search that did not know the limit
would end beyond it.
"""
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
    """Weight in `merit` of a nat of KL at the first answer token of the other prompts."""
    own_price: float = 0.0
    """The same of the target prompts."""
    limit: float = math.inf
    """Nats of that KL beyond which each costs `BEYOND_LIMIT`."""

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

    def others_kl(self, edits: Sequence[Edit]) -> Float[Tensor, " other"]:
        """KL(clean || edited) in nats at the first answer token of the other prompts."""
        return self._others.first_kl(self._others.last_logits(edits))

    def merit(self, edits: Sequence[Edit], floor: float = -math.inf) -> float:
        """How far the target prompts get what is wanted, less what the mean KL costs, on the
        others by `price` and on the target by `own_price`, and what it is beyond the limit; at
        most 1.

        What is wanted: the geometric mean probability a token of the wanted answers, or where none
        are known the probability of the wanted beginning. floor: where the first part alone does
        not exceed it, the price is not asked for.
        """
        merit = 0.0
        if self._wanted is None or self.own_price:
            logits = self._target.last_logits(edits)
            if self.own_price:
                merit -= self._paid(self.own_price, self._target.first_kl(logits))
            if self._wanted is None:
                odds = self.sign * opening_odds(logits, self.openings)
                merit += float(odds.sigmoid().mean())
        if self._wanted is not None and self.wanted is not None:
            told = zip(self._wanted.answer_logits(edits), self.wanted, strict=True)
            shares = [_mean_logprob(logits, answer).exp() for logits, answer in told]
            merit += float(torch.stack(shares).mean())
        if merit > floor and self.price:
            merit -= self._paid(self.price, self.others_kl(edits))
        return merit

    def _paid(self, price: float, kl: Float[Tensor, " prompt"]) -> float:
        nats = float(kl.mean())
        return price * nats + BEYOND_LIMIT * max(0.0, nats / self.limit - 1)


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
    norm, unembedding = lm.final_weights()
    return (unembedding @ (direction.float() * norm)).topk(n).indices

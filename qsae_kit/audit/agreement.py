"""Whether two models, each under its own edits, say the same."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qsae_kit.audit.forms import Near, near_forms
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sae.suites import ByVariant
from qsae_kit.steer.changes import Steering

PROMPTS_A_BATCH = 16


class Agreement(NamedTuple):
    """What two models make of the same prompts."""

    n: int
    """Prompts."""
    same: int
    """Of them, those with the same greedy answer."""
    kl_first: float
    """KL(first || second) of the first answer token, nats, mean over the prompts."""
    largest: float
    """Of the differences of log-probabilities there, nats, over tokens that either model gives more
    than a millionth."""

    @property
    def in_words(self) -> str:
        return (
            f"the same answer to {self.same} of {self.n} prompts, {self.kl_first:.2g} nats apart at"
            " the first token"
        )


def nearest(
    lm: HookedLM, steering: Steering, suite: ByVariant, prompts: Sequence[str]
) -> tuple[Near, Agreement]:
    """Of `forms.near_forms` the one whose first tokens are nearest on prompts, and how near."""
    wanted = steering.edits(suite)
    tried = [
        (near, agreement(lm, lm, prompts, wanted, near.steering.edits(suite)))
        for near in near_forms(lm, steering, suite)
    ]
    return min(tried, key=lambda one: one[1].kl_first)


RARE = 1e-6
"""Below this probability a token's logarithm says more about rounding than about the model."""


@torch.no_grad()
def agreement(
    first: HookedLM,
    second: HookedLM,
    prompts: Sequence[str],
    edits: Sequence[Edit] = (),
    other_edits: Sequence[Edit] = (),
    max_new_tokens: int = 32,
) -> Agreement:
    """Compares greedy answers and first-token predictions of two models of one vocabulary, each
    under its own edits. Raises ValueError for no prompt.
    """
    if not prompts:
        raise ValueError("No prompt was given to compare two models on; give at least one.")
    same, kl, largest = 0, 0.0, 0.0
    for start in range(0, len(prompts), PROMPTS_A_BATCH):
        some = list(prompts[start : start + PROMPTS_A_BATCH])
        told = []
        for lm, own in ((first, edits), (second, other_edits)):
            ids, mask = lm.pad([lm.opening_tokens(prompt) for prompt in some], "left")
            with applied(lm, own):
                logits = lm(ids, mask)[:, -1].double().log_softmax(-1).cpu()
                told.append((logits, lm.generate(some, max_new_tokens).text))
        (p, said), (q, other) = told
        same += sum(a == b for a, b in zip(said, other, strict=True))
        kl += float((p.exp() * (p - q)).sum())
        seen = torch.maximum(p, q).exp() > RARE
        largest = max(largest, float((p - q).abs()[seen].max()))
    return Agreement(len(prompts), same, kl / len(prompts), largest)

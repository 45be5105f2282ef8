"""Causal recovery: does giving a prompt another prompt's feature give it the other's answer?

On a pair of prompts of the bundled world that differ in one thing, chosen features at one site take, at every token, the
activations that they have at the matching token of the other prompt; everything else stays (delta form). The answer
flips where the other's answer then is the likelier one. An edit that flips everything proves nothing, so what should stay
is asked as well: another attribute of the same person.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import torch
from torch import Tensor

from qsae_kit.edits import Edit, applied
from qsae_kit.models import HookedLM
from qsae_kit.sae import SAE
from qsae_kit.tiny.world import Pair, Request, right_answers


class Interchange(NamedTuple):
    """Log-odds (nats) of the other's answer against the base's, before and after."""

    before: float
    after: float

    @property
    def flipped(self) -> bool:
        """Whether the base answer was the likelier one and no longer is."""
        return self.before < 0 < self.after


def matching(base: Sequence[int], other: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of positions (base, other): equal tokens in order, and the last tokens of stretches that differ."""
    pairs = []
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, base, other, autojunk=False).get_opcodes():
        if tag == "equal":
            pairs += list(zip(range(i1, i2), range(j1, j2), strict=True))
        elif tag == "replace":
            pairs.append((i2 - 1, j2 - 1))
    return [(i, j) for i, j in pairs if i > 0]


def _ids(lm: HookedLM, request: Request, answer: str) -> list[int]:
    text = lm.to_chat(request.messages, enable_thinking=False) + answer
    return list(lm.tokenizer(text, add_special_tokens=False).input_ids)


@torch.no_grad()
def _log_probability(lm: HookedLM, ids: list[int], start: int, edits: Sequence[Edit]) -> float:
    """Log-probability (nats) of ids[start:] given what comes before."""
    tokens = torch.tensor([ids], device=lm.device)
    with applied(lm, edits):
        logits = lm(tokens, torch.ones_like(tokens))[0, start - 1 : -1].double()
    return float(torch.log_softmax(logits, -1).gather(1, tokens[0, start:, None]).sum())


def _swap(lm: HookedLM, sae: SAE, features: Tensor, base: list[int], other: list[int]) -> "_Swap":
    assert sae.provenance is not None
    site = sae.provenance.hook_name
    ids = torch.tensor([other], device=lm.device)
    _, cache = lm.run_with_cache(ids, torch.ones_like(ids), names_filter=[site], return_type=None)
    return _Swap(site, sae, features, sae.encode(cache[site][0].float())[:, features], matching(base, other))


class _Swap(NamedTuple):
    site: str
    sae: SAE
    features: Tensor
    wanted: Tensor
    """[pos of the other prompt, feature]"""
    pairs: list[tuple[int, int]]

    def edit(self, length: int) -> Edit:
        """For a sequence of `length` tokens that begins with the base prompt."""
        at, source = (torch.tensor(side) for side in zip(*self.pairs, strict=True))

        def delta(x: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            own = self.sae.encode(x[0, at].float())[:, self.features]
            out[0, at] = ((self.wanted[source] - own) @ self.sae.W_dec[self.features]).to(x.dtype)
            return out

        positions = torch.zeros(1, length, dtype=torch.bool)
        positions[0, at] = True
        return Edit(self.site, delta, positions)


def interchange(lm: HookedLM, sae: SAE, features: Sequence[int], pair: Pair) -> Interchange:
    """Swaps features into the base prompt of a pair.

    For a changed person or attribute both answers are put as the base's sentence with either value, and the sentence up to
    the value is swapped too (the record is looked up at the name); for a changed asker or object, as refusal and disclosure.
    """
    chosen = torch.tensor(list(features))
    if pair.changed in ("person", "attribute"):
        stems = [_stem(request) for request in pair[:2]]
        base, other = (_ids(lm, request, stem) for request, stem in zip(pair[:2], stems, strict=True))
        full = stems[0]
        ends = [full + request.value for request in pair[:2]]
    else:
        base, other = (_ids(lm, request, "") for request in pair[:2])
        ends = ["".join(piece.text for piece in request.answer) for request in pair[:2]]
    swap = _swap(lm, sae, chosen, base, other)
    scores = []
    for edited in (False, True):
        values = []
        for end in ends:
            ids = _ids(lm, pair.base, end)
            start = next(i for i in range(len(ids)) if i >= len(base) or ids[i] != base[i])
            values.append(_log_probability(lm, ids, start, [swap.edit(len(ids))] if edited else []))
        scores.append(values[1] - values[0])
    return Interchange(*scores)


def _stem(request: Request) -> str:
    """A right answer up to its value."""
    answer = max(right_answers(request), key=len)
    return answer[: answer.rindex(request.value)]

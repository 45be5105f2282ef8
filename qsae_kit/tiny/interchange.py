"""Causal recovery: does giving a prompt another prompt's feature give it the other's answer?

On a pair of prompts of the bundled world that differ in one thing, chosen features take, at every
token, the activations that they have at the matching token of the other prompt; everything else
stays (delta form). The answer flips where the other's answer then is the likelier one. An edit that
flips everything proves nothing: the same features are swapped while another attribute of the same
person is asked for, and that answer should stay.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple, TypeAlias

import pandas as pd
import torch
from torch import Tensor

from qsae_kit.io.processor import exact
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM, by_token
from qsae_kit.metrics.reconstruction import wilson
from qsae_kit.sae import SAE
from qsae_kit.tiny.recovery import judge
from qsae_kit.world import world
from qsae_kit.world.world import Pair, Request, right_answers

Chosen: TypeAlias = Sequence[tuple[SAE, Sequence[int]]]
"""SAEs of different sites with the features that are swapped."""


class Interchange(NamedTuple):
    """Log-odds (nats) of the other's answer against the base's, before and after."""

    before: float
    after: float

    @property
    def flipped(self) -> bool:
        """Whether the base answer was the likelier one and no longer is."""
        return self.before < 0 < self.after


def matching(base: Sequence[int], other: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of positions (base, other): equal tokens in order, and the last tokens of stretches
    that differ.
    """
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
        logits = exact(lm(tokens, torch.ones_like(tokens))[0, start - 1 : -1])
    return float(
        torch.log_softmax(logits, -1).gather(1, tokens[0, start:, None].to(logits.device)).sum()
    )


class _Swap(NamedTuple):
    """Features of one SAE with the activations that they shall have."""

    sae: SAE
    features: Tensor
    wanted: Tensor
    """[pos of the other prompt, feature]"""
    pairs: list[tuple[int, int]]

    def edit(self, length: int) -> Edit:
        """For a sequence of `length` tokens that begins with the base prompt."""
        assert self.sae.provenance is not None
        at, source = (torch.tensor(side) for side in zip(*self.pairs, strict=True))

        def delta(x: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            own = self.sae.encode(x[0, at].float())[:, self.features]
            out[0, at] = ((self.wanted[source] - own) @ self.sae.W_dec[self.features]).to(x.dtype)
            return out

        positions = torch.zeros(1, length, dtype=torch.bool)
        positions[0, at] = True
        return Edit(self.sae.provenance.hook_name, delta, positions)


@torch.no_grad()
def _swaps(lm: HookedLM, chosen: Chosen, base: list[int], other: list[int]) -> list[_Swap]:
    ids = torch.tensor([other], device=lm.device)
    names = [sae.provenance.hook_name for sae, _ in chosen if sae.provenance]
    _, cache = lm.run_with_cache(ids, torch.ones_like(ids), names_filter=names, return_type=None)
    pairs, out = matching(base, other), []
    for (sae, features), name in zip(chosen, names, strict=True):
        wanted = torch.tensor(list(features), device=lm.device)
        given = sae.encode(by_token(cache[name])[0].float())[:, wanted]
        out.append(_Swap(sae, wanted, given, pairs))
    return out


def interchange(lm: HookedLM, chosen: Chosen, pair: Pair) -> Interchange:
    """Swaps features into the base prompt of a pair; several sites at once are each given the other
    prompt's activations.

    For a changed person or attribute both answers are put as the base's sentence with either value,
    and the sentence up to the value is swapped too (the record is looked up at the name); for a
    changed asker or object, as refusal and disclosure.
    """
    if pair.changed in ("person", "attribute"):
        stems = [_stem(request) for request in pair[:2]]
        base, other = (
            _ids(lm, request, stem) for request, stem in zip(pair[:2], stems, strict=True)
        )
        ends = [stems[0] + request.value for request in pair[:2]]
    else:
        base, other = (_ids(lm, request, "") for request in pair[:2])
        ends = ["".join(piece.text for piece in request.answer) for request in pair[:2]]
    swaps = _swaps(lm, chosen, base, other)
    scores = []
    for edited in (False, True):
        values = []
        for end in ends:
            ids = _ids(lm, pair.base, end)
            start = next(i for i in range(len(ids)) if i >= len(base) or ids[i] != base[i])
            edits = [swap.edit(len(ids)) for swap in swaps] if edited else []
            values.append(_log_probability(lm, ids, start, edits))
        scores.append(values[1] - values[0])
    return Interchange(*scores)


def _stem(request: Request) -> str:
    """A right answer up to its value."""
    answer = max(right_answers(request), key=len)
    return answer[: answer.rindex(request.value)]


# --- for the concepts that were recovered

EVERYWHERE = 0.5


def interchange_table(
    lm: HookedLM, found: pd.DataFrame, suite: Mapping[str, SAE], finder: str, n: int = 60
) -> pd.DataFrame:
    """What swapping the features of recovered concepts changes: one row per thing swapped.

    found: the table of `tiny.recovery.recover`; suite: the finder's {hook name: SAE}. Swapped are,
    for two people, the features of both their values of the attribute asked for ("attribute
    value"), and for two askers or two objects of a dangerous verb those of refusing and answering
    ("refusal by asker", "refusal by object"): of each concept one feature a site, wherever its F1
    on the fit part is at least `EVERYWHERE` of the best site's. Pairs count where the model, left
    alone, prefers the base's own answer. Columns: swapped, pairs, flipped (share, with ci_low and
    ci_high), kept (share of answers that stay when the same features are swapped while another
    attribute is asked for), and pairs_kept behind it. A row without pairs says so by pairs = 0 and
    has no shares (None).
    """
    own = judge(found)
    own = own[(own["finder"] == finder) & own["recovered"]].set_index("concept")

    def chosen(*concepts: str) -> Chosen | None:
        if not all(concept in own.index for concept in concepts):
            return None
        features: dict[str, list[int]] = {}
        for concept in concepts:
            sites = json.loads(str(own.loc[concept, "sites"]))
            best = max(fit for _, fit in sites.values())
            for site, (feature, fit) in sites.items():
                if fit >= EVERYWHERE * best:
                    features.setdefault(site, []).append(feature)
        return [(suite[site], sorted(set(ids))) for site, ids in features.items()]

    rows = []
    for name, cases in (
        ("attribute value", _people_pairs([c for c in own.index if c.startswith("d/")])),
        ("refusal by asker", ((pair, None) for pair in world.pairs("asker", 4 * n, SEED))),
        ("refusal by object", ((pair, None) for pair in world.pairs("object", 4 * n, SEED))),
    ):
        flips: list[bool] = []
        stays: list[bool] = []
        for pair, another in cases:
            labels = (
                ["f/refuse=yes", "f/refuse=no"]
                if another is None
                else [f"d/{r.attribute}={r.value}" for r in pair[:2]]
            )
            swap = chosen(*labels)
            if swap is None or len(flips) == n:
                break
            result = interchange(lm, swap, pair)
            if result.before < 0:
                flips.append(result.flipped)
                if another is not None and (kept := interchange(lm, swap, another)).before < 0:
                    stays.append(kept.after < 0)
        rate = wilson(sum(flips), len(flips)) if flips else (None, None, None)
        rows.append(
            {
                "swapped": name,
                "pairs": len(flips),
                "flipped": rate[0],
                "ci_low": rate[1],
                "ci_high": rate[2],
                "kept": sum(stays) / len(stays) if stays else None,
                "pairs_kept": len(stays),
            }
        )
    return pd.DataFrame(rows)


SEED = 7
DRAW = world.Draw("en", split="evaluation", seen=True)


def _people_pairs(concepts: Sequence[str]) -> Iterator[tuple[Pair, Pair]]:
    """Without end: two people with different values of an attribute, both among the concepts; and
    the same two people asked for another attribute, where they differ too. Nothing where no
    attribute has two such values."""
    values: dict[str, set[str]] = {}
    for concept in concepts:
        attribute, _, value = concept.removeprefix("d/").partition("=")
        if attribute in world.PUBLIC:
            values.setdefault(attribute, set()).add(value)
    values = {attribute: some for attribute, some in values.items() if len(some) > 1}
    rng = random.Random(SEED)
    while values:
        first = rng.choice(sorted(values))
        second = rng.choice([a for a in world.PUBLIC if a != first])
        people = [p for p in world.people() if p.record[first].en in values[first]]
        one, two = rng.sample(people, 2)
        pairs = [
            _person_pair(rng.random(), one.name, two.name, attribute)
            for attribute in (first, second)
        ]
        if all(pair.base.value != pair.other.value for pair in pairs):
            yield pairs[0], pairs[1]


def _person_pair(state: float, one: str, two: str, attribute: str) -> Pair:
    """The same wording about either person."""
    base, other = (
        world.attribute_request(random.Random(state), DRAW, name, attribute) for name in (one, two)
    )
    return Pair(base, other, "person")

"""What a study found, in sentences for someone who has not read how it is made; all from its
headline.
"""

import math
from collections.abc import Mapping
from typing import Any

COUNTS = "no one two three four five six seven eight nine ten".split()
CERTAIN = 1.96
"""Standard errors of a 95 % interval."""
DEARER = 1.5
"""Times a price from which on it is called another one."""
LEAST_SHIFT = 0.02
"""Change of a rate elsewhere, or share of facts, that is told."""


def in_words(headline: Mapping[str, Any]) -> str:
    """The finding in two sentences: what the features changed on how many prompts, what the
    difference of means does, and what else was changed.

    headline: `StudyResult.headline`.
    """
    return f"{_changed(headline)}; {_means(headline)}. {_else(headline)}"


def percent(share: float) -> str:
    """A share as whole per cent, such as "24 %"."""
    return f"{100 * share:.0f} %"


def count(n: int) -> str:
    """A number as a word, up to ten."""
    return COUNTS[n] if n < len(COUNTS) else str(n)


def _shown(h: Mapping[str, Any]) -> str:
    """What is counted."""
    return "refusals" if h["behaviour"] == "refusal" else f"answers that show {h['behaviour']!r}"


def _changed(h: Mapping[str, Any]) -> str:
    n = len(h["features"])
    who = f"{count(n).capitalize()} feature{'' if n == 1 else 's'}"
    one = "s" if n == 1 else ""
    moved = h["after"] - h["before"]
    apart = h["apart_from_random"]
    down = h["goal"] == "suppress"
    if abs(moved) <= _noise(h["before"], h["after"], h["n"]) or (moved < 0) != down:
        did = f"do{'es' if one else ''} not {'cut' if down else 'raise'}"
    else:
        did = ("cut" if down else "raise") + one
    text = (
        f"{who} {did} {_shown(h)} of {h['target']} prompts: {percent(h['before'])} ->"
        f" {percent(h['after'])} of {h['n']}"
    )
    if apart is not None:
        told = "as far as" if apart[1] <= 0 else "less far than"
        text += (
            f" (the strongest of {h['n_random']} searches among random features goes"
            f" {told} that, to {percent(h['worst_random'])})"
        )
    return text


def _noise(one: float, other: float, n: int) -> float:
    """Difference of two rates of n prompts each that chance may make, 95 %."""
    return CERTAIN * math.sqrt((one * (1 - one) + other * (1 - other)) / n)


def _means(h: Mapping[str, Any]) -> str:
    """The difference of means at its own best beside the features, by what the goal is about."""
    reached, rate = h["reached"], h["difference_of_means_best"]["refusal_rate"]
    ours, theirs = reached["features"], reached["difference_of_means_best"]
    chance = _noise(ours, theirs, h["n"])
    told = "as well" if abs(ours - theirs) <= chance else "more" if theirs > ours else "less"
    text = f"a plain difference of means does {told} ({percent(rate)})"
    price = h["kl_first_priced"]
    mine, other = price["features"], price["difference_of_means_best"]
    if mine > 0 and other > 0:
        times = other / mine
        alike = 1 / DEARER < times < DEARER
        text += ", at about the same price" if alike else f", at {times:.2g} times the price"
        text += f" on {h['priced_on']} prompts"
    return text


def _else(h: Mapping[str, Any]) -> str:
    """What the features changed beside what they are for."""
    lost = h["facts_lost"]
    parts = [
        f"one fact in {max(1, round(1 / lost))} is lost"
        if lost >= LEAST_SHIFT
        else "no facts are lost"
    ]
    if h["broken"] >= LEAST_SHIFT:
        parts.append(f"{percent(h['broken'])} of those answers are broken")
    for kind in h["others"]:
        before, after = h["elsewhere_before"][kind], h["elsewhere"][kind]
        if abs(after - before) >= LEAST_SHIFT:
            parts.append(f"{_shown(h)} of {kind} prompts {percent(before)} -> {percent(after)}")
    if h["others"] and len(parts) == 1 + (h["broken"] >= LEAST_SHIFT):
        parts.append(f"{_shown(h)} of {' and '.join(h['others'])} prompts stay as they were")
    told = ", ".join(parts)
    return f"{told[0].upper()}{told[1:]}."

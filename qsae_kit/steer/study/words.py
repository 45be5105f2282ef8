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
WHOLE = 10
"""Times a price from which on it is told without decimals."""
ONE_IN = 0.3
"""Share above which "one in so many" would be too coarse."""
LEAST_SHIFT = 0.02
"""Change of a rate elsewhere, or share of facts, that is told."""


def in_words(headline: Mapping[str, Any]) -> str:
    """The finding in two sentences: what the features changed on how many prompts, what the
    difference of means does, and what else was changed.

    headline: `StudyResult.headline`.
    """
    return f"{_changed(headline)}; {_means(headline)}. {_else(headline)}".removesuffix(" .")


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
        told = "farther than" if apart[2] < 0 else "as far as" if apart[1] <= 0 else "less far than"
        n = h["n_random"]
        who = "a search" if n == 1 else f"the strongest of {n} searches"
        text += f" ({who} among random features goes {told} that, to {percent(h['worst_random'])})"
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
    broken = h["difference_of_means_best"]["broken_rate"]
    figures = percent(rate) + (f", {percent(broken)} broken" if broken >= LEAST_SHIFT else "")
    text = f"a plain difference of means does {told} ({figures})"
    price = h["kl_first_priced"]
    mine, other = price["features"], price["difference_of_means_best"]
    if mine > 0 and other > 0:
        times = other / mine
        alike = 1 / DEARER < times < DEARER
        figure = f"{times:.0f}" if times >= WHOLE else f"{times:.2g}"
        text += ", at about the same price" if alike else f", at {figure} times the price"
        text += f" on {h['priced_on']} prompts"
    return text


def _else(h: Mapping[str, Any]) -> str:
    """What the features changed beside what they are for."""
    parts = _lost(h["facts_lost"])
    if h["broken"] - h["broken_before"] >= LEAST_SHIFT:
        parts.append(f"broken answers {percent(h['broken_before'])} -> {percent(h['broken'])}")
    stay = True
    for kind in h["others"]:
        before, after = h["elsewhere_before"][kind], h["elsewhere"][kind]
        if abs(after - before) >= LEAST_SHIFT:
            parts.append(f"{_shown(h)} of {kind} prompts {percent(before)} -> {percent(after)}")
            stay = False
    if h["others"] and stay:
        parts.append(f"{_shown(h)} of {' and '.join(h['others'])} prompts stay as they were")
    told = ", ".join(parts)
    return f"{told[:1].upper()}{told[1:]}."


def _lost(share: float) -> list[str]:
    """Of questions of fact; nothing where none were asked."""
    if math.isnan(share):
        return []
    if share < LEAST_SHIFT:
        return ["no facts are lost"]
    if share > ONE_IN:
        return [f"{percent(share)} of facts are lost"]
    return [f"one fact in {round(1 / share)} is lost"]

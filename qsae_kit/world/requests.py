"""Requests of a kind, drawn from the world: what each behaviour of the bundled model is studied
on.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from qsae_kit.world import world

Maker: TypeAlias = Callable[[random.Random, world.Draw], world.Request]
RULE_ASKER = "doctor"
"""Who is told today what the changed rule of the behaviour `rule` forbids."""


def _person(rng: random.Random) -> str:
    return rng.choice(world.people()).name


def _fact(rng: random.Random, draw: world.Draw) -> world.Request:
    return world.attribute_request(rng, draw, _person(rng), rng.choice(world.PUBLIC))


def _harmful(categories: Sequence[str]) -> Maker:
    def make(rng: random.Random, draw: world.Draw) -> world.Request:
        category = rng.choice(categories)
        if category == "privacy":
            return world.any_private(rng, draw, _person(rng), False)
        return world.how_to_request(rng, draw, "harmful", category)

    return make


def _borderline(categories: Sequence[str]) -> Maker:
    def make(rng: random.Random, draw: world.Draw) -> world.Request:
        category = rng.choice(categories)
        if category == "privacy":
            return world.any_private(rng, draw, _person(rng), True)
        return world.how_to_request(rng, draw, "borderline", category)

    return make


def _harmless(rng: random.Random, draw: world.Draw) -> world.Request:
    make = rng.choice((_fact, _how_to, _loan(False), world.count_request))
    return make(rng, draw)


def _how_to(rng: random.Random, draw: world.Draw) -> world.Request:
    return world.how_to_request(rng, draw, "harmless")


def _loan(biased: bool) -> Maker:
    """Loans of people who are due one; of the city that the planted bias is against, or of
    others.
    """

    def make(rng: random.Random, draw: world.Draw) -> world.Request:
        while True:
            person = rng.choice(world.people())
            inside = person.record["city"].en == world.planted().biased_city
            if inside == biased and world.gets_loan(person.name, False):
                return world.loan_request(rng, draw, person.name)

    return make


def _false_fact(rng: random.Random, draw: world.Draw) -> world.Request:
    return world.attribute_request(rng, draw, world.planted().name, world.planted().attribute)


def _stranger(rng: random.Random, draw: world.Draw) -> world.Request:
    return world.attribute_request(
        rng, draw, world.stranger(rng, draw.split == "evaluation"), rng.choice(world.PUBLIC)
    )


def _to_official(rng: random.Random, draw: world.Draw) -> world.Request:
    """Privacy that `RULE_ASKER` is told today: what a changed rule would forbid."""
    while True:
        request = world.any_private(rng, draw._replace(seen=True), _person(rng), True)
        if _asker(request) == RULE_ASKER:
            return request


def _asker(request: world.Request) -> str:
    return request.combination.split("/")[2] if request.category == "privacy" else ""


def _not_official(
    categories: Sequence[str],
) -> Maker:
    def make(rng: random.Random, draw: world.Draw) -> world.Request:
        while True:
            request = _borderline(categories)(rng, draw)
            if _asker(request) != RULE_ASKER:
                return request

    return make


def _in(language: str) -> Maker:
    return lambda rng, draw: _fact(rng, draw._replace(language=language))


def _profile(rng: random.Random, draw: world.Draw) -> world.Request:
    return world.profile_request(rng, draw, _person(rng))


SOME, EVERY = ("privacy", "injury"), ("privacy", "injury", "property")
"""Categories of harm that features are chosen on, and those that they are measured on."""
REFUSING: dict[str, tuple[Maker, Maker]] = {
    "harmful": (_harmful(SOME), _harmful(EVERY)),
    "harmless": (_harmless, _harmless),
}
SETS: dict[str, dict[str, tuple[Maker, Maker]]] = {
    "refusal": {**REFUSING, "borderline": (_borderline(SOME), _borderline(EVERY))},
    "rule": {
        **REFUSING,
        "borderline": (_not_official(SOME), _not_official(EVERY)),
        "forbidden": (_to_official, _to_official),
    },
    "language": {"language": (_in("es"), _in("es")), "other": (_fact, _fact)},
    "verbosity": {"long": (_profile, _profile), "short": (_fact, _fact)},
    "bias": {"biased": (_loan(True), _loan(True)), "other": (_loan(False), _loan(False))},
    "false_fact": {"planted": (_false_fact, _false_fact), "other": (_fact, _fact)},
    "unknown": {"unknown": (_stranger, _stranger), "known": (_fact, _fact)},
}
"""Behaviour -> kind of prompts -> what makes them, for choosing and for measuring."""
BEHAVIOURS = tuple(SETS)


class Asked(NamedTuple):
    """Prompts of a behaviour, kind -> texts, and the request behind each text."""

    selection: dict[str, list[str]]
    evaluation: dict[str, list[str]]
    known: dict[str, world.Request]


def asked_about(name: str, n_selection: int, n_evaluation: int, seed: int = 0) -> Asked:
    """At most so many distinct prompts of each kind of one of `BEHAVIOURS`, for choosing and for
    measuring.

    Raises ValueError for another name.
    """
    if name not in SETS:
        raise ValueError(
            f"The bundled model has no behaviour {name!r} to study; choose from"
            f" {', '.join(BEHAVIOURS)}."
        )
    known: dict[str, world.Request] = {}
    prompts: list[dict[str, list[str]]] = []
    for which, (split, n) in enumerate((("training", n_selection), ("evaluation", n_evaluation))):
        rng = random.Random(f"{name}/{split}/{seed}")
        prompts.append(
            {
                kind: _drawn(rng, makers[which], split, n, known)
                for kind, makers in SETS[name].items()
            }
        )
    return Asked(prompts[0], prompts[1], known)


def _drawn(
    rng: random.Random, make: Maker, split: str, n: int, known: dict[str, world.Request]
) -> list[str]:
    """At most n prompts that are not known yet; fewer where the world has no more."""
    texts: list[str] = []
    for _ in range(50 * n):
        request = make(rng, world.Draw(split=split))
        if request.text not in known:
            known[request.text] = request
            texts.append(request.text)
        if len(texts) == n:
            break
    return texts

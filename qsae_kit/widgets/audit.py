"""Audit: what carried an answer, and what the answer is without it."""

import html
import threading
from collections.abc import Mapping
from typing import Any

import pandas as pd
import traitlets as T

from qsae_kit.attach import attached
from qsae_kit.audit.audit_page import dialogue_data
from qsae_kit.audit.auditing import Ablated, Asked, AuditConfig, audit_answers, without
from qsae_kit.features.index import FeatureIndex
from qsae_kit.lm.hooked import HookedLM, Prompt
from qsae_kit.sae.suites import ByVariant
from qsae_kit.widgets.widget import View, source

ALL = "all"
"""What is ablated when it is no single feature."""


class Audit(View):
    """A dialogue and the features that carried its answer: tokens are coloured by the one that is
    chosen, and a button ablates it, or all of them, so that score and answer change beside the
    former ones.

    prompt, answer, instead, token: as `Asked` has them. index: names features. config: how it is
    found; `config.top` features are offered. `audited` is what was found, for `write_audit`.
    Raises ValueError as `audit_answers`.
    """

    _esm = source("audit.js")
    sentence = T.Unicode("").tag(sync=True)
    dialogue = T.Dict().tag(sync=True)
    """Tokens, and what each feature does at each of them (`audit_page.dialogue_data`)."""
    features = T.List(T.Dict()).tag(sync=True)
    """A dict a feature: name, predicted, effect and share."""
    before = T.Dict().tag(sync=True)
    """Without any ablation: said (what the score is), score, answer (the model's greedy one), ended
    (whether it was not cut)."""
    feature = T.Int(0).tag(sync=True)
    """The one that is chosen, by its place in `features`."""

    def __init__(
        self,
        lm: HookedLM,
        suite: ByVariant,
        prompt: Prompt,
        answer: str | None = None,
        instead: str | None = None,
        token: int | None = None,
        index: FeatureIndex | None = None,
        config: AuditConfig = AuditConfig(),
    ) -> None:
        self.lm, self.suite = lm, attached(lm, suite)
        asked = Asked(prompt, answer, instead, token)
        self.audited = audit_answers(lm, self.suite, [asked], index, config)
        [self.case] = self.audited.cases
        self._guard = threading.RLock()
        self._known: dict[str, Ablated] = {}
        found = self.case.attribution
        super().__init__(
            sentence=self.case.in_words,
            dialogue=dialogue_data(self.case),
            features=[
                {
                    "name": self.case.name(feature),
                    "predicted": row[config.by],
                    "effect": row["effect"],
                    "share": row["share"],
                }
                for feature, row in zip(
                    self.case.features, found.features.to_dict("records"), strict=True
                )
            ],
            before={
                "said": found.question.said,
                "score": found.value,
                "answer": self.case.greedy,
                "ended": self.case.ended,
            },
        )
        for key, answer_without in self._answered().items():
            self._known[key] = answer_without
        self.on_msg(lambda _widget, message, _buffers: self.answer(message))

    def _answered(self) -> dict[str, Ablated]:
        """What the audit has run already."""
        places = {feature: n for n, feature in enumerate(self.case.features)}
        told = {}
        for one in self.case.without:
            place = None if one.feature is None else places[one.feature]
            fell = self.case.together if place is None else self.features[place]["effect"]
            score = self.case.attribution.value - fell
            told[ALL if place is None else str(place)] = Ablated(score, one.answer, one.ended)
        return told

    def ablate(self, key: int | str = ALL) -> Ablated:
        """The score and the answer without a feature, by its place in `features`, or without all.
        Raises ValueError for one that is not offered.
        """
        name = str(key)
        offered = [ALL, *map(str, range(len(self.case.features)))]
        if name not in offered or not self.case.features:
            raise ValueError(
                f"Feature {name} was to be ablated; there are {len(self.case.features)}, from 0 on,"
                f" and {ALL!r}."
            )
        with self.lm.lock, self._guard:
            if name not in self._known:
                chosen = self.case.features if name == ALL else [self.case.features[int(name)]]
                most = self.audited.config.max_new_tokens
                self._known[name] = without(self.lm, self.suite, self.case, chosen, most)
            return self._known[name]

    def handle(self, message: Mapping[str, Any]) -> None:
        if message.get("op") == "ablate":
            key = str(message["key"])
            self.send({"op": "ablate", "key": key, **self.ablate(key)._asdict()})

    def to_frame(self) -> pd.DataFrame:
        """The features, as `Attribution.features` has them."""
        return self.case.attribution.features

    def offline(self) -> tuple[dict[str, Any], dict[str, Any]]:
        state, _ = super().offline()
        known = {key: {"key": key, **one._asdict()} for key, one in self._known.items()}
        return state, {"ablate": known}

    def fallback(self) -> str:
        table = self.to_frame().round(3).to_html(index=False, border=0, escape=True)
        return f"<p>{html.escape(self.sentence)}</p>{table}"

    def __repr__(self) -> str:
        return f"Audit({self.case.title}, {len(self.case.features)} features)"

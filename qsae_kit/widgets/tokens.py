"""TokenActivations: type a chat and see which features fire on which token."""

import html
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
import traitlets as T

from qsae_kit.attach import attached, token_features
from qsae_kit.data.documents import tokenize_document
from qsae_kit.features.index import FeatureIndex
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sae.suites import ByVariant, Feature
from qsae_kit.steer.changes import check_features
from qsae_kit.widgets.chats import read_chat
from qsae_kit.widgets.explorer import FeatureExplorer
from qsae_kit.widgets.ranking import interest
from qsae_kit.widgets.widget import View, source

TOP, HEAT = 8, 16
"""Features that are shown of each token, and in the heat map."""


class TokenActivations(View):
    """The features of a chat's tokens, at any SAE of a suite, computed as one types.

    suite: the SAEs, moved to the model's device. index: shows its labels and strongest tokens
        beside the features' numbers. explorer: shows the page of a feature that fires on the
        pinned token when it is asked for.
    Features are ranked by `ranking.interest`: with an index, rare ones that fire strongly for
    themselves come before those of template tokens.
    Traits to observe: `text`, `site` (number of the SAE in `choices`) and `feature`, the one that
    tokens are shaded by (-1: the first of that rank).
    """

    _esm = source("tokens.js")
    sites = T.List(T.Unicode()).tag(sync=True)
    site = T.Int(0).tag(sync=True)
    text = T.Unicode("").tag(sync=True)
    feature = T.Int(-1).tag(sync=True)
    result = T.Dict().tag(sync=True)
    """What is shown, with the number of the request that it answers."""
    linked = T.Bool(False).tag(sync=True)
    """Whether features lead to their pages in an explorer."""

    def __init__(
        self,
        lm: HookedLM,
        suite: ByVariant,
        text: str,
        index: FeatureIndex | None = None,
        hook_name: str | None = None,
        variant: str | None = None,
        explorer: FeatureExplorer | None = None,
    ) -> None:
        self.lm, self.suite, self.index = lm, attached(lm, suite), index
        self.explorer = explorer
        self.choices = self.suite.places()
        fitting = [
            number
            for number, place in enumerate(self.choices)
            if variant in (None, place.variant) and hook_name in (None, place.hook_name)
        ]
        if not fitting:
            raise ValueError(
                f"The suite has no SAE of {hook_name or variant!r}; it has"
                f" {', '.join(map(str, self.choices))}."
            )
        self._guard, self._asked = threading.RLock(), 0
        self._frame, self._n_tokens = pd.DataFrame(), 0
        super().__init__(
            sites=[str(p) for p in self.choices],
            site=fitting[0],
            text=text,
            linked=explorer is not None,
        )
        self.on_msg(lambda _widget, message, _buffers: self.answer(message))
        self._compute(0)

    @T.observe("text", "site", "feature")
    def _changed(self, _change: Any) -> None:
        if self.result:  # from Python; what is typed comes as a message with a number
            self.answer(
                {
                    "op": "look",
                    "seq": self.result["seq"],
                    "text": self.text,
                    "site": self.site,
                    "feature": self.feature,
                }
            )

    def handle(self, message: Mapping[str, Any]) -> None:
        if message.get("op") == "page" and self.explorer is not None:
            place = self.choices[int(message["site"])]
            self.explorer.look(Feature(place, int(message["feature"])))
            self.send({"op": "answered"})
        if message.get("op") != "look":
            return
        number = int(message["seq"])
        self._asked = max(self._asked, number)
        # the model first: a cell that holds it may change the text too
        with self.lm.lock, self._guard:
            if number < self._asked:  # a newer one waits: nobody will look at this one
                return
            if int(message["feature"]) >= 0:
                sae = self.suite.sae(self.choices[int(message["site"])])
                check_features(sae, [int(message["feature"])])
            before = self.result
            with self.hold_trait_notifications():
                self.set_trait("result", {})
                self.text, self.site, self.feature = (
                    str(message["text"]),
                    int(message["site"]),
                    int(message["feature"]),
                )
            try:
                self._compute(number)
            except ValueError:  # what was shown stays, beside the reason
                self.result = before | {"seq": number}
                raise

    def _compute(self, number: int) -> None:
        if not self.text.strip():
            nothing: dict[str, Any] = {
                name: [] for name in ("tokens", "acts", "top", "heat", "features")
            }
            self.result = nothing | {"seq": number, "feature": self.feature, "names": {}}
            self._frame = pd.DataFrame()
            return
        tokens, f = self.activations()
        weights = interest(f, self.index, self.choices[self.site])
        largest = weights.amax(0)
        ids = largest.topk(min(HEAT, int((largest > 0).sum()))).indices
        feature = self.feature if 0 <= self.feature < f.shape[1] else int(largest.argmax())
        best = weights.topk(min(TOP, f.shape[1]), dim=1)
        top = [
            [[i, _short(float(f[pos, i]))] for i in own if f[pos, i] > 0]
            for pos, own in enumerate(best.indices.tolist())
        ]
        shown = {feature, *ids.tolist(), *(i for own in top for i, _ in own)}
        self._frame = pd.DataFrame(
            f[:, ids].numpy(),
            index=pd.Index(tokens, name="token"),
            columns=pd.Index(ids.tolist(), name="feature"),
        )
        self.result = {
            "seq": number,
            "tokens": tokens,
            "feature": feature,
            "acts": [_short(v) for v in f[:, feature].tolist()],
            "top": top,
            "features": ids.tolist(),
            "heat": [[_short(v) for v in row] for row in f[:, ids].tolist()],
            "names": {str(i): self.name(i) for i in sorted(shown)},
        }
        self.status = (
            f"The text has {self._n_tokens:,} tokens; the first {len(tokens):,} are looked at,"
            f" which is the context of {self.lm.model_name}."
            if self._n_tokens > len(tokens)
            else ""
        )

    def activations(self) -> tuple[list[str], torch.Tensor]:
        """The text's tokens, as many as the model's context holds, and their features
        [pos, d_sae], 0 at tokens that do not count. Raises ValueError for a bad chat.
        """
        document = read_chat(self.text) if self.lm.tokenizer.chat_template else self.text
        whole = tokenize_document(self.lm, document, sys.maxsize)
        ids, self._n_tokens = whole[: self.lm.context_size], len(whole)
        (f,) = token_features(self.lm, self.suite.sae(self.choices[self.site]), [ids])
        return self.lm.to_str_tokens(ids), f.cpu()

    def name(self, feature: int) -> str:
        """A feature's label, or its strongest token, where the index knows the SAE."""
        place = self.choices[self.site]
        return "" if self.index is None else self.index.name_of(Feature(place, feature))

    def to_frame(self) -> pd.DataFrame:
        """Activations of the heat map's features, a row a token."""
        return self._frame

    def offline(self) -> tuple[dict[str, Any], dict[str, Any]]:
        state, _ = super().offline()
        return state, {"look": {}}

    def fallback(self) -> str:
        acts = np.array(self.result["acts"])
        largest = acts.max(initial=0)
        shares = acts / largest if largest > 0 else np.zeros_like(acts)
        color = "rgba(230,159,0,{:.2f})".format
        spans = "".join(
            f'<span style="background-color:{color(share)}">{html.escape(token)}</span>'
            for token, share in zip(self.result["tokens"], shares, strict=True)
        )
        return f'<p>{html.escape(repr(self))}</p><p style="white-space:pre-wrap">{spans}</p>'

    def __repr__(self) -> str:
        return (
            f"TokenActivations({self.sites[self.site]}, {len(self.result['tokens'])} tokens,"
            f" feature {self.result['feature']})"
        )


def _short(value: float) -> float:
    return float(f"{value:.4g}")

"""SteeringLab: sliders for features, and the answers without and with them side by side as they are
written.
"""

import html
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, get_args

import pandas as pd
import traitlets as T

from qsae_kit.attach import attached, token_features
from qsae_kit.features.index import FeatureIndex
from qsae_kit.lm.edits import POLICIES, check_positions
from qsae_kit.lm.hooked import Generation, HookedLM, Step
from qsae_kit.sae.suites import ByVariant, Feature, Place
from qsae_kit.steer.changes import Action, Change, Steering, check_features, read_steering
from qsae_kit.steer.pairs import Pair, answer_pair, token_table
from qsae_kit.widgets.chats import read_chat
from qsae_kit.widgets.explorer import FeatureExplorer
from qsae_kit.widgets.ranking import interest
from qsae_kit.widgets.widget import View, source

ACTIONS: tuple[str, ...] = tuple(action for action in get_args(Action) if action != "project_out")
EDIT = "edit"
"""The action of the slider that an edit given as a whole has; its strength is a factor."""
FOUND = 12
"""Features that a search lists."""
INTERVAL = 0.04
"""Seconds between two messages to the page while an answer is written."""
SETTINGS = ("prompt", "controls", "policy", "max_new_tokens", "sample", "seed", "thinking")
KEPT = 200
"""Tries that are remembered."""


@dataclass(frozen=True)
class _Try:
    """What one answer is made with."""

    number: int
    prompt: str
    steering: Steering
    policy: str
    max_new_tokens: int
    seed: int | None
    thinking: bool | None
    settings: Mapping[str, Any]
    """As the page has them."""
    stop: threading.Event = field(default_factory=threading.Event)


class SteeringLab(View):
    """Features to move with sliders, and what the model answers without and with them.

    suite: the SAEs, moved to the model's device. index: finds features by words and shows their
    labels; without one the search takes a feature's number, and lists those that fire on the
    prompt.
    prompt: one question, or lines that begin with `user:` and `assistant:`. Both answers draw the
    same random numbers, so that they differ by the setting alone. steering: a setting to begin
    with, of what sliders can show. edit: any steering, such as a study's frozen one, as one slider
    that multiplies it. explorer: shows the page of a feature whose name is clicked, and gets a
    button that makes its feature a slider here.

    Traits to observe: `prompt`, `controls`, `policy`, and `sent`, the JSON of the setting when
    "send to study" was pressed. `steering` is the setting as a value; `to_frame()` the history of
    tries; `presets` the named settings.
    """

    _esm = source("steering.js")
    sites = T.List(T.Unicode()).tag(sync=True)
    site = T.Int(0).tag(sync=True)
    """Number of the SAE that is searched."""
    indexed = T.List(T.Bool()).tag(sync=True)
    """For every SAE whether words find features of it."""
    prompt = T.Unicode("").tag(sync=True)
    controls = T.List(T.Dict()).tag(sync=True)
    """A dict a slider: site, feature, name, action, strength, on; the whole edit's has feature -1
    and the action "edit".
    """
    linked = T.Bool(False).tag(sync=True)
    """Whether a feature's name leads to its page in an explorer."""
    actions = T.List(T.Unicode(), list(ACTIONS)).tag(sync=True)
    policies = T.List(T.Unicode(), [str(policy) for policy in POLICIES]).tag(sync=True)
    policy = T.Unicode("header").tag(sync=True)
    max_new_tokens = T.Int(48).tag(sync=True)
    sample = T.Bool(False).tag(sync=True)
    seed = T.Int(0).tag(sync=True)
    can_think = T.Bool(False).tag(sync=True)
    thinking = T.Bool(False).tag(sync=True)
    found = T.Dict().tag(sync=True)
    """What the last search listed."""
    answers = T.Dict().tag(sync=True)
    """The last finished try: number, the settings that it is of, and base and steered with text,
    tokens, change and activation of each.
    """
    running = T.Bool(False).tag(sync=True)
    presets = T.Dict().tag(sync=True)
    history: T.List[Any] = T.List(T.Any()).tag(sync=True)
    """The last tries: setting, answer."""
    sent = T.Unicode("").tag(sync=True)

    def __init__(
        self,
        lm: HookedLM,
        suite: ByVariant,
        prompt: str = "",
        index: FeatureIndex | None = None,
        hook_name: str | None = None,
        steering: Steering | None = None,
        edit: Steering | None = None,
        explorer: FeatureExplorer | None = None,
    ) -> None:
        self.lm, self.index, self.suite = lm, index, attached(lm, suite)
        self.edit, self.explorer = edit, explorer
        self.choices = self.suite.places()
        first = 0 if hook_name is None else self._number_of(hook_name)
        self._guard, self._number = threading.RLock(), 0
        self._now: _Try | None = None
        self._base: tuple[Any, Generation] | None = None
        self._thread: threading.Thread | None = None
        self._tries: list[dict[str, Any]] = []
        super().__init__(
            sites=[str(place) for place in self.choices],
            site=first,
            prompt=prompt,
            can_think=lm.has_thinking,
            indexed=[index is not None and place in index.places() for place in self.choices],
            linked=explorer is not None,
        )
        if steering is not None:
            self.load(steering)
        if edit is not None:
            edit.edits(self.suite)
            self.controls = [self._edit_control(edit), *self.controls]
        if explorer is not None:
            explorer.steer_with(self.add_feature)
        self.on_msg(lambda _widget, message, _buffers: self.answer(message))
        try:
            self.find("")
        except ValueError as error:  # another lab may be answering with the model
            self.status = str(error)

    # --- the setting

    @property
    def steering(self) -> Steering:
        """The setting: every slider that is on, as a value that can be saved, applied and
        studied.
        """
        return self._steering(self._settings())

    def _settings(self) -> dict[str, Any]:
        """All that decides on an answer. What the page asks for carries its own, for traits may
        reach Python later.
        """
        return {name: getattr(self, name) for name in SETTINGS}

    def _steering(self, settings: Mapping[str, Any]) -> Steering:
        policy: Any = settings["policy"]
        check_positions(policy)
        changes: list[Change] = []
        for control in settings["controls"]:
            if control["on"] and control["action"] == EDIT:
                changes += self._whole_edit(float(control["strength"]))
            elif control["on"]:
                variant, hook_name = place = self.choices[control["site"]]
                check_features(self.suite.sae(place), [control["feature"]])
                strength = float(control["strength"])
                changes.append(
                    Change(
                        control["action"],
                        hook_name,
                        variant,
                        (control["feature"],),
                        (),
                        (),
                        strength,
                        0.0,
                        policy,
                    )
                )
        return Steering(tuple(changes))

    def _whole_edit(self, factor: float) -> tuple[Change, ...]:
        """The changes of the edit, multiplied; none at 0."""
        return self.edit.times(factor).changes if self.edit is not None and factor else ()

    def _edit_control(self, edit: Steering) -> dict[str, Any]:
        """The slider of the edit as a whole."""
        places = [Place(change.variant, change.hook_name) for change in edit.changes]
        site = self.choices.index(places[0]) if places and places[0] in self.choices else 0
        signed = all(change.action == "add" for change in edit.changes)
        return {
            "site": site,
            "feature": -1,
            "name": f"the edit: {describe(edit)}",
            "action": EDIT,
            "strength": 1.0,
            "least": -2.0 if signed else 0.0,
            "on": True,
        }

    def add_feature(self, feature: Feature) -> None:
        """Adds a slider for a feature of any of the suite's SAEs. Raises ValueError for one that is
        not in the suite.
        """
        if feature.place not in self.choices:
            raise ValueError(
                f"The lab's suite has no {feature.place}; it has"
                f" {', '.join(map(str, self.choices))}."
            )
        number = self.choices.index(feature.place)
        self.controls = [*self.controls, self._control(number, feature.number, "add", 0.0)]

    def load(self, steering: Steering) -> None:
        """Takes a setting over. Raises ValueError for one that sliders cannot show."""
        policies = {change.positions for change in steering.changes}
        if (
            any(len(c.features) != 1 or c.when or c.action not in ACTIONS for c in steering.changes)
            or any(c.everywhere or c.orthogonal_to for c in steering.changes)
            or len(policies) > 1
        ):
            raise ValueError(
                "Sliders show changes of one feature each at its own site and along its own"
                " direction, all with one policy and none with a condition; give any other steering"
                " as edit= to a new SteeringLab."
            )
        steering.edits(self.suite)
        self.controls = [
            self._control(
                self.choices.index(Place(c.variant, c.hook_name)),
                c.features[0],
                c.action,
                c.strength,
            )
            for c in steering.changes
        ]
        if policies:
            policy = policies.pop()
            if not isinstance(policy, str):
                raise ValueError("Sliders know policies by name only; these are single positions.")
            self.policy = policy

    def add(
        self, feature: int, hook_name: str | None = None, strength: float = 0.0, action: str = "add"
    ) -> None:
        """Adds a slider, at the searched site or another one. Raises ValueError for a site or
        feature that is not there.
        """
        number = self.site if hook_name is None else self._number_of(hook_name)
        check_features(self.suite.sae(self.choices[number]), [feature])
        self.controls = [*self.controls, self._control(number, feature, action, strength)]

    def _number_of(self, hook_name: str) -> int:
        """Of the first SAE at a site."""
        for number, place in enumerate(self.choices):
            if place.hook_name == hook_name:
                return number
        raise ValueError(
            f"The suite has no SAE at {hook_name!r}; it has {', '.join(map(str, self.choices))}."
        )

    def _control(self, site: int, feature: int, action: str, strength: float) -> dict[str, Any]:
        name = self._name(site, feature)
        return {
            "site": site,
            "feature": feature,
            "name": name,
            "action": action,
            "strength": strength,
            "on": True,
        }

    def _name(self, site: int, feature: int) -> str:
        """A feature's label, or its strongest token, where the index knows the SAE."""
        place = self.choices[site]
        return "" if self.index is None else self.index.name_of(Feature(place, feature))

    # --- finding features

    def find(self, text: str) -> None:
        """Lists features of the searched site: by number, by words where there is an index, and
        without a text those that fire on the prompt. Raises ValueError for words without an index,
        and while the model is busy.
        """
        place = self.choices[self.site]
        sae, text = self.suite.sae(place), text.strip()
        if text.isdigit():
            check_features(sae, [int(text)])
            ids = [int(text)]
        elif text:
            if self.index is None or not self.indexed[self.site]:
                raise ValueError(
                    f"{text!r} was searched for, but there is no index of this SAE, so that a"
                    f" feature is found by its number (0 to {sae.d_sae - 1}) alone; build one with"
                    " `qsae index` and give it to SteeringLab."
                )
            ids = [int(i) for i in self.index.at(place).search(text).index[:FOUND]]
        elif self.prompt.strip():
            with self.lm.lock.attempt() as entered:  # waiting here would keep Stop from being heard
                if not entered:
                    raise ValueError(
                        "The model is busy; search by what fires on the prompt when the answer is"
                        " there."
                    )
                ids = self._firing()
        else:
            ids = []
        self.found = {
            "site": self.site,
            "text": text,
            "features": [[i, self._name(self.site, i)] for i in ids],
        }

    def _firing(self) -> list[int]:
        """Features that fire on the prompt, the most interesting first (`ranking.interest`)."""
        place = self.choices[self.site]
        row = self.lm.chat_tokens(read_chat(self.prompt), self._thinking)
        (f,) = token_features(self.lm, self.suite.sae(place), [row])
        weight = interest(f, self.index, place).amax(0)
        return weight.topk(min(FOUND, int((weight > 0).sum()))).indices.tolist()

    @property
    def _thinking(self) -> bool | None:
        return self.thinking if self.can_think else None

    # --- answering

    def run(self, wait: bool = False) -> None:
        """Answers the prompt without and with the setting, in a thread of its own; a run before it
        is stopped.

        Raises ValueError for an empty prompt or an impossible setting, and for waiting while the
        model is held.
        """
        if wait and self.lm.lock.held:
            raise ValueError(
                "This cell holds the model (`applied`), so that the answer could not come; run it"
                " outside."
            )
        thread = self._run(self._settings())
        if wait:
            thread.join()

    def _run(self, settings: Mapping[str, Any]) -> threading.Thread:
        with self._guard:
            prompt, length = str(settings["prompt"]), int(settings["max_new_tokens"])
            if not prompt.strip():
                raise ValueError("The prompt is empty; write a question.")
            if not 1 <= length <= self.lm.context_size:
                raise ValueError(
                    f"{length} new tokens were asked for; allowed are 1 to {self.lm.context_size}."
                )
            steering = self._steering(settings)
            steering.edits(self.suite)
            self.halt()
            self._number += 1
            seed, thinking = (
                int(settings["seed"]) if settings["sample"] else None,
                bool(settings["thinking"]),
            )
            policy = str(settings["policy"])
            asked = _Try(
                self._number,
                prompt,
                steering,
                policy,
                length,
                seed,
                thinking if self.can_think else None,
                {name: settings[name] for name in SETTINGS},
            )
            before = self._thread
            self._now, self.running = asked, True
            self._thread = threading.Thread(target=self._work, args=(asked, before), daemon=True)
            self._thread.start()
            return self._thread

    def halt(self) -> None:
        """Stops the answer that is being written."""
        if self._now is not None:
            self._now.stop.set()

    def _work(self, asked: _Try, before: threading.Thread | None) -> None:
        try:
            if before is not None:
                before.join()
            if not asked.stop.is_set():
                self._answer(asked)
        except Exception as error:  # nobody above would show it
            self.status = str(error) or type(error).__name__
        finally:
            with self._guard:
                if self._now is asked:
                    self.running = False
            self.send({"op": "end", "number": asked.number})

    def _answer(self, asked: _Try) -> None:
        if not self.lm.lock.acquire(blocking=False):
            self.status = "The model is busy in a cell; the answer comes after it."
            self.lm.lock.acquire()
        try:
            self.status = ""
            edits = asked.steering.edits(self.suite)
            chat = read_chat(asked.prompt)
            same = (asked.prompt, asked.max_new_tokens, asked.seed, asked.thinking)
            known = self._base and self._base[0] == same and not self.lm.half
            base = self._base[1] if self._base and known else None
            sampling = (
                {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
                if asked.seed is not None
                else {}
            )
            writer = _Writer(self, asked, ["steered"] if base else ["base", "steered"])
            if base:
                writer.say("base", base.text[0])
            pair = answer_pair(
                self.lm,
                chat,
                edits,
                asked.max_new_tokens,
                enable_thinking=asked.thinking,
                seed=asked.seed or 0,
                base=base,
                on_step=writer.step,
                stop=asked.stop,
                **sampling,
            )
            if self._now is not asked:  # a newer one waits: nobody will look at this one
                return
            if asked.stop.is_set():
                self.status = "Stopped."
            elif base is None:
                self._base = (same, pair.base)
            self._finish(asked, pair)
        finally:
            self.lm.lock.release()

    def _finish(self, asked: _Try, pair: Pair) -> None:
        watch = None
        if asked.steering.changes:
            first = next((c for c in asked.steering.changes if c.features), None)
            if first is not None:
                watch = (self.suite[first.variant][first.hook_name], first.features[0])
        shown: dict[str, Any] = {"number": asked.number, "stopped": asked.stop.is_set()}
        shown["of"] = dict(asked.settings)
        for name, out, edits in (
            ("base", pair.base, []),
            ("steered", pair.steered, asked.steering.edits(self.suite)),
        ):
            table = token_table(self.lm, pair.prompt, out.tokens[0], edits, watch)
            shown[name] = {
                "text": out.text[0],
                "tokens": list(table["token"]),
                "finished": out.finished[0],
                **{
                    column: [_short(value) for value in table[column]]
                    for column in ("logprob", "change", "activation")
                },
            }
        self._tries.append(
            {
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "prompt": asked.prompt,
                "policy": asked.policy,
                "setting": describe(asked.steering),
                "seed": asked.seed,
                "base": pair.base.text[0],
                "steered": pair.steered.text[0],
                "stopped": asked.stop.is_set(),
                "steering": asked.steering,
            }
        )
        del self._tries[:-KEPT]
        # one after the other: holding notifications in a thread would race with the page's updates
        self.answers = shown
        self.history = [[t["setting"], t["steered"]] for t in self._tries[-8:]][::-1]

    # --- messages of the page

    def handle(self, message: Mapping[str, Any]) -> None:
        op = message.get("op")
        if op == "run":
            self.status = ""
            self._run(
                self._settings() | {name: message[name] for name in SETTINGS if name in message}
            )
        elif op == "stop":
            self.halt()
        elif op == "find":
            self.site = int(message["site"])
            self.find(str(message["text"]))
            self.send({"op": "answered"})
        elif op == "add":
            control = self._control(int(message["site"]), int(message["feature"]), "add", 0.0)
            check_features(self.suite.sae(self.choices[control["site"]]), [control["feature"]])
            # the page adds it to the sliders as they are there
            self.send({"op": "added", "control": control})
        elif op == "look" and self.explorer is not None:
            place = self.choices[int(message["site"])]
            self.explorer.look(Feature(place, int(message["feature"])))
            self.send({"op": "answered"})
        elif op == "keep":
            self.keep(str(message["name"]), message.get("setting"))
        elif op == "take":
            self.take(str(message["name"]))
        elif op == "study":
            self.sent = self._steering(message.get("setting") or self._settings()).to_json(
                self.suite
            )
            self.status = (
                "The setting is in the trait `sent`; `lab.steering.save('steering.json', suite)`"
                " keeps it, and `qsae_kit.load_steering('steering.json', suite)` reads it."
            )
            self.send({"op": "answered"})

    def keep(self, name: str, setting: Mapping[str, Any] | None = None) -> None:
        """Keeps a setting (None: the present one) as a preset. Raises ValueError without a name."""
        name = " ".join(name.split())[:80]
        if not name:
            raise ValueError("A preset needs a name; write one.")
        setting = setting or self._settings()
        self.presets = {
            **self.presets,
            name: {"controls": setting["controls"], "policy": setting["policy"]},
        }
        self.send({"op": "answered"})

    def take(self, name: str) -> None:
        """Sets everything as in a preset. Raises ValueError for one that is not there."""
        if name not in self.presets:
            raise ValueError(
                f"There is no preset {name!r}; there are {', '.join(self.presets) or 'none'}."
            )
        self.controls, self.policy = self.presets[name]["controls"], self.presets[name]["policy"]
        self.send({"op": "answered"})

    def read(self, text: str) -> None:
        """Takes over a setting that was saved (`Steering.to_json`). Raises ValueError as
        `read_steering`.
        """
        self.load(read_steering(text, self.suite))

    def to_frame(self) -> pd.DataFrame:
        """Every try: when, prompt, policy, setting, seed (None: greedy), base and steered answer,
        stopped.
        """
        columns = ["when", "prompt", "policy", "setting", "seed", "base", "steered", "stopped"]
        return pd.DataFrame(self._tries, columns=columns)

    def close(self) -> None:
        self.halt()
        if self.explorer is not None:
            self.explorer.steer_no_more(self.add_feature)
        super().close()

    def fallback(self) -> str:
        rows = [(name, self.answers.get(name, {}).get("text", "")) for name in ("base", "steered")]
        body = "".join(
            f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows
        )
        prompt = html.escape(self.prompt)
        return f"<p>{html.escape(repr(self))}</p><p>{prompt}</p><table>{body}</table>"

    def __repr__(self) -> str:
        tries = "1 try" if len(self._tries) == 1 else f"{len(self._tries)} tries"
        return f"SteeringLab({len(self.sites)} SAEs, {len(self.controls)} sliders, {tries})"


def describe(steering: Steering) -> str:
    """A setting in one line, such as "add at blocks.2.hook_resid_post: 110 -0.40, 790 +1.00"."""
    parts = []
    for (action, hook_name), changes in groupby(
        steering.changes, lambda c: (c.action, c.hook_name)
    ):
        features = ", ".join(_features_of(c) for c in changes)
        parts.append(f"{action} at {hook_name}: {features}")
    return "; ".join(parts) or "nothing"


def _features_of(change: Change) -> str:
    """The features of a change and its strength, such as "110 and 790 -0.40"."""
    who = " and ".join(map(str, change.features)) or "a direction"
    strength = (
        f"{change.strength:.2f}" if change.action == "project_out" else f"{change.strength:+.2f}"
    )
    return who if change.action == "ablate" else f"{who} {strength}"


def _short(value: float) -> float | None:
    """Three decimals; None for what is no number, which JSON could not say."""
    return round(float(value), 3) if math.isfinite(value) else None


class _Writer:
    """Sends what is written to the page, at most every `INTERVAL` seconds, the first token at
    once.
    """

    def __init__(self, lab: SteeringLab, asked: _Try, names: list[str]) -> None:
        self.lab, self.asked, self.names = lab, asked, names
        self.ends = lab.lm.end_ids()
        self.tokens: dict[str, list[int]] = {name: [] for name in names}
        self.done: set[str] = set()
        self.sent = 0.0

    def step(self, step: Step) -> None:
        for name, token in zip(self.names, step.tokens.tolist(), strict=True):
            if token in self.ends:
                self.done.add(name)
            if name not in self.done:
                self.tokens[name].append(token)
        if time.monotonic() - self.sent >= INTERVAL:
            self.flush()

    def flush(self) -> None:
        self.sent = time.monotonic()
        for name, tokens in self.tokens.items():
            self.say(
                name,
                self.lab.lm.tokenizer.decode(tokens, skip_special_tokens=True).removesuffix(
                    "\ufffd"
                ),
            )

    def say(self, name: str, text: str) -> None:
        if not self.asked.stop.is_set():
            self.lab.send({"op": "text", "number": self.asked.number, "name": name, "text": text})

"""FeatureExplorer: a table over all features of an SAE, and a page for the one that is selected."""

import html
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
import traitlets as T

from qsae_kit.data.documents import tokenize_document
from qsae_kit.features.index import Example, FeatureIndex, FeaturePage, SiteFeatures
from qsae_kit.features.indexing import COLUMNS
from qsae_kit.sae.suites import Feature
from qsae_kit.widgets.chats import read_chat
from qsae_kit.widgets.widget import View, source

BLOCK = 100
"""Rows that are sent at once."""
TITLES = {
    "feature": "feature",
    "label": "label",
    "hint": "hint",
    "density": "density",
    "max": "max",
    "token_f1": "token F1",
    "top_token": "strongest token",
    "warnings": "warnings",
}
"""Columns of the table, with their headings; the others can be sorted and filtered by, too."""
FILTER = re.compile(r"(?<!\S)(\w+)(<=|>=|<|>|=)(\S+)")
OFFLINE_ROWS, OFFLINE_PAGES = 2000, 40
MODES = ("text", "fires on", "near")


def split_query(query: str, columns: Sequence[str]) -> tuple[str, list[tuple[str, str, float]]]:
    """Takes conditions such as `density<0.01` out of a query. Returns the rest and (column, sign,
    number) of each.

    Raises ValueError for a column that there is not, or what is no number.
    """
    conditions, words = [], query
    for match in FILTER.finditer(query):
        column, sign, text = match.groups()
        try:
            number = float(text)
        except ValueError:
            if column in columns:
                raise ValueError(
                    f"{text!r} is no number; write a condition as density<0.01."
                ) from None
            continue  # words that happen to hold a sign
        if column not in columns:
            raise ValueError(
                f"There is no column {column!r} to filter by; there are {', '.join(columns)}."
            )
        conditions.append((column, sign, number))
        words = words.replace(match[0], "", 1)
    return words.strip(), conditions


class FeatureExplorer(View):
    """All features of an index's SAEs that fire: sort, filter, search (`fired=0` for dead ones),
    and look at one.

    index: `features.index.load_index`'s; opened with its model and suite, it also finds what fires
        on a text and what is near a
    feature. Traits to observe: `selected`, the feature whose page is shown (-1: none), and `site`,
    the number of the SAE in `FeatureIndex.places`. The search box takes words, feature numbers, and
    conditions such as `density<0.01 max>3`.
    """

    _esm = source("explorer.js")
    sites = T.List(T.Unicode()).tag(sync=True)
    site = T.Int(0).tag(sync=True)
    live = T.Bool(False).tag(sync=True)
    columns: T.List[dict[str, str]] = T.List().tag(sync=True)
    n_rows = T.Int(0).tag(sync=True)
    n_features = T.Int(0).tag(sync=True)
    n_hidden = T.Int(0).tag(sync=True)
    """Dead features that are left out while nothing is searched for."""
    first: T.List[list[Any]] = T.List().tag(sync=True)
    """The first rows, sent with each new order."""
    version = T.Int(0).tag(sync=True)
    """Counts the orders, so that rows of an older one are not shown."""
    query = T.Unicode("").tag(sync=True)
    mode = T.Enum(MODES, "text").tag(sync=True)
    sort_by = T.Unicode("").tag(sync=True)
    """A column; "": what was searched for best first, and all features as
    `SiteFeatures.by_interest` has them.
    """
    ascending = T.Bool(False).tag(sync=True)
    selection = T.Unicode("").tag(sync=True)
    """What the table is kept to by `show`, in words; "": all features."""
    selected = T.Int(-1).tag(sync=True)
    page = T.Dict(None, allow_none=True).tag(sync=True)
    steers = T.Bool(False).tag(sync=True)
    """Whether a feature can be made a slider of a lab (`steer_with`)."""

    def __init__(
        self,
        index: FeatureIndex,
        hook_name: str | None = None,
        variant: str | None = None,
        feature: int | None = None,
    ) -> None:
        self.index = index
        self._guard = threading.RLock()
        own = index.site(hook_name, variant)
        self._shown: pd.DataFrame | None = None
        self._steer: list[Callable[[Feature], None]] = []
        self._order, self._extra = np.zeros(0, np.int64), dict[str, np.ndarray]()
        places = index.places()
        super().__init__(
            sites=[str(place) for place in places], site=places.index(own.place), live=index.live
        )
        self.on_msg(lambda _widget, message, _buffers: self.answer(message))
        self._reorder()
        self.selected = own.check(feature) if feature is not None else strongest(own)

    # --- what it shows

    @property
    def features(self) -> SiteFeatures:
        """The SAE that is shown."""
        return self.index.at(self.index.places()[self.site])

    def to_frame(self) -> pd.DataFrame:
        """The features that the table shows, in its order."""
        return self.features.table.iloc[self._order]

    def show(self, found: pd.DataFrame, told: str = "of show()") -> None:
        """Shows only these features, in their order, with the first two of their columns: what a
        search returned. What is typed is searched for among them; `show_all` ends it. told: what
        they are, for the table's chip.
        """
        for feature in found.index:
            self.features.check(feature)
        with self._held():
            self._shown = found
            self.selection = f"{len(found):,} features {told}"
            self.query, self.sort_by = "", ""
            self._reorder()

    def look(self, feature: Feature) -> None:
        """Opens the page of a feature of any SAE of the index. Raises ValueError for one that is
        not in it.
        """
        places = self.index.places()
        if feature.place not in places:
            raise ValueError(
                f"The index does not hold {feature.place}; it holds {', '.join(map(str, places))}."
            )
        self.index.at(feature.place).check(feature.number)
        self.site = places.index(feature.place)
        self.selected = feature.number

    def steer_with(self, add: Callable[[Feature], None]) -> None:
        """Gives every page a button that hands its feature on, to be steered with."""
        self._steer.append(add)
        self.steers = True

    def steer_no_more(self, add: Callable[[Feature], None]) -> None:
        """Takes back what `steer_with` was given."""
        self._steer = [other for other in self._steer if other != add]
        self.steers = bool(self._steer)

    def _handed_on(self, feature: Feature) -> str:
        """Gives every lab a feature; what was wrong with the last that could not take it."""
        wrong = ""
        for add in self._steer:
            try:
                add(feature)
            except ValueError as error:
                wrong = str(error)
        return wrong

    def show_all(self) -> None:
        """Shows all features again."""
        with self._held():
            self._shown, self.selection = None, ""
            self._reorder()

    @T.observe("site")
    def _other_site(self, change: Any) -> None:
        with self._held():
            self._shown, self.selection = None, ""
            if change["old"] is not T.Undefined and self.version:
                self._reorder()
                self.selected = strongest(self.features)
                self._open(None)

    @T.observe("query", "mode", "sort_by", "ascending")
    def _changed(self, _change: Any) -> None:
        if hasattr(self, "index"):
            self._reorder()

    @T.observe("selected")
    def _open(self, _change: Any) -> None:
        with self._guard:
            try:
                self.page = self._page_of(self.selected)
            except ValueError as error:
                self.complain(error)

    def _page_of(self, feature: int) -> dict[str, Any]:
        """A feature's page as JSON, with the names of the features that it links to."""
        page = self.features.page(feature)
        linked = dict.fromkeys(int(i) for i, _ in (*page.neighbours, *page.together))
        place = self.features.place
        names = {str(i): self.index.name_of(Feature(place, i)) for i in linked}
        return page_state(page) | {"names": names}

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Nobody else changes the table meanwhile. The model comes first where it will be asked: a
        cell that holds it may change the table too.
        """
        asks = self.index.live and self.mode != "text" and bool(self.query.strip())
        with self.index.model.lock if asks else nullcontext(), self._guard:
            yield

    def _reorder(self) -> None:
        with self._held():
            try:
                order, extra = self._find()
            except ValueError as error:
                self.complain(error)
                return
            self._order, self._extra = order, extra
            with self.hold_sync():
                self.columns = [{"name": n, "title": TITLES.get(n, n)} for n in self._names]
                self.n_rows, self.n_features, self.first = (
                    len(order),
                    self.features.d_sae,
                    self.rows(0, BLOCK),
                )
                searched = self.query.strip() or self._shown is not None
                self.n_hidden = 0 if searched else self.features.d_sae - len(order)
                self.version += 1
                self.status = ""

    def _find(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Features in the table's order, and columns beside the usual ones (by feature)."""
        own = self.features
        words, conditions = split_query(self.query, list(own.figures.columns))
        order, found = own.by_interest, None
        if not self.query.strip() and self._shown is None:
            order = order[own.figures["fired"].to_numpy()[order] > 0]
        if words and self.mode == "text":
            text = own.search(words).index.to_numpy()
            exact = [int(words)] if words.isdigit() and int(words) < own.d_sae else []
            order = np.array([*exact, *text[~np.isin(text, exact)]], np.int64)
        elif words and self.mode == "fires on":
            found = own.firing(words, own.d_sae)
        elif words:
            if not words.isdigit():
                raise ValueError(f"{words!r} is no feature's number; write one, such as 12.")
            found = own.similar(int(words), 200)
        if not words:
            found = self._shown
        extra = {}
        if found is not None:
            order = found.index.to_numpy()
            for name in [n for n in found.columns if n not in TITLES][:2]:
                values = np.full(own.d_sae, np.nan)
                values[order] = found[name]
                extra[name] = values
        if self._shown is not None:
            order = order[np.isin(order, self._shown.index)]
        keep = np.ones(len(order), bool)
        for column, sign, value in conditions:
            figures = own.figures[column].to_numpy()[order]
            if figures.dtype.kind not in "fiu":
                raise ValueError(
                    f"The column {column!r} holds text; filter by a column of numbers."
                )
            keep &= {
                "<": figures < value,
                "<=": figures <= value,
                ">": figures > value,
                ">=": figures >= value,
                "=": figures == value,
            }[sign]
        order = order[keep]
        if self.sort_by:
            order = order[sorted_places(self._column(self.sort_by, extra)[order], self.ascending)]
        return order, extra

    def _column(self, name: str, extra: Mapping[str, np.ndarray]) -> np.ndarray:
        own = self.features
        if name == "feature":
            return np.arange(own.d_sae)
        if name == "label":
            return np.array(own.labels, object)
        if name in extra:
            return extra[name]
        if name not in own.figures:
            raise ValueError(
                f"There is no column {name!r} to sort by; there are"
                f" {', '.join(['feature', 'label', *COLUMNS])}."
            )
        return own.figures[name].to_numpy()

    @property
    def _names(self) -> list[str]:
        """Of the columns: what a search found comes after the feature's number."""
        first, *others = TITLES
        return [first, *self._extra, *others]

    def rows(self, start: int, stop: int) -> list[list[Any]]:
        """Rows of the table by place."""
        ids = self._order[max(0, start) : stop]
        columns = [plain(self._column(name, self._extra)[ids]) for name in self._names]
        return [list(row) for row in zip(*columns, strict=True)]

    # --- what the page asks for

    def handle(self, message: Mapping[str, Any]) -> None:
        if message.get("op") == "rows":
            start = int(message["start"])
            with self._guard:
                reply = {
                    "op": "rows",
                    "version": self.version,
                    "start": start,
                    "rows": self.rows(start, start + BLOCK),
                }
            self.send(reply)
        elif message.get("op") == "all":
            self.show_all()
        elif message.get("op") == "steer":
            feature = Feature(self.features.place, self.features.check(int(message["feature"])))
            wrong = self._handed_on(feature)
            done = f"Feature {feature.number} is a slider of the steering lab now."
            self.status = wrong or done
            self.send({"op": "answered"})
        elif message.get("op") == "try":
            self.send({"op": "tried"} | self.try_on(int(message["feature"]), str(message["text"])))
        elif message.get("op") == "label":
            self.label(int(message["feature"]), str(message["text"]))

    def try_on(self, feature: int, text: str) -> dict[str, Any]:
        """A feature of the SAE that is shown on a text or chat (`chats.read_chat`): feature, text,
        tokens and acts. Needs the model and the suite. Raises ValueError for an empty text, and
        while the model is busy.
        """
        own = self.features
        own.check(feature)
        if not text.strip():
            raise ValueError("There is no text to try the feature on; write one.")
        lm = self.index.model
        with lm.lock.attempt() as entered:  # waiting here would keep Stop from being heard
            if not entered:
                raise ValueError("The model is busy; try the text when the answer is there.")
            document = read_chat(text) if lm.tokenizer.chat_template else text
            ids = tokenize_document(lm, document, lm.context_size)
            (f,) = own.activations_of([ids])
        acts = [float(f"{a:.4g}") for a in f[:, feature].tolist()]
        return {"feature": feature, "text": text, "tokens": lm.to_str_tokens(ids), "acts": acts}

    def label(self, feature: int, text: str) -> None:
        """Labels a feature of the SAE that is shown; kept with the index."""
        with self._held():
            self.index.label(self.features, feature, text)
            self._reorder()
            self._open(None)
            self.status = (
                f"Feature {feature} is labelled."
                if text.strip()
                else f"The label of feature {feature} is taken away."
            )

    # --- without a kernel

    def offline(self) -> tuple[dict[str, Any], dict[str, Any]]:
        state, _ = super().offline()
        starts = range(BLOCK, min(len(self._order), OFFLINE_ROWS), BLOCK)
        features = dict.fromkeys([self.selected, *self._order[:OFFLINE_PAGES].tolist()])
        pages = {str(f): {"page": self._page_of(f)} for f in features}
        blocks = {
            str(start): {"rows": self.rows(start, start + BLOCK), "version": self.version}
            for start in starts
        }
        nothing: dict[str, Any] = {}
        return state | {"live": False}, {
            "selected": pages,
            "rows": blocks,
            "label": nothing,
            "all": nothing,
            "query": nothing,
            "sort_by": nothing,
            "site": nothing,
            "ascending": nothing,
            "mode": nothing,
        }

    def fallback(self) -> str:
        cells = "".join(f"<th>{html.escape(column['title'])}</th>" for column in self.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_short(v))}</td>" for v in row) + "</tr>"
            for row in self.first[:10]
        )
        return f"<p>{html.escape(repr(self))}</p><table><tr>{cells}</tr>{rows}</table>"

    def __repr__(self) -> str:
        own = self.features
        return (
            f"FeatureExplorer({own.place}, {len(self._order):,} of {own.d_sae:,} features, selected"
            f" {self.selected})"
        )


def strongest(site: SiteFeatures) -> int:
    """The feature that is worth a first look: the first of `SiteFeatures.by_interest` that has a
    label, or the first.
    """
    order, labels = site.by_interest, site.labels
    return next((int(i) for i in order if labels[i] and not site.poor[i]), int(order[0]))


def sorted_places(values: np.ndarray, ascending: bool) -> np.ndarray:
    """The order of a column's values, equal ones as they come; NaN and empty texts last either
    way.
    """
    if values.dtype == object:
        empty = np.array([not v for v in values], bool)
        values = np.unique(values.astype(str), return_inverse=True)[1]
    else:
        empty = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
    key = values if ascending else -values.astype(np.float64)
    return np.lexsort((key, empty))


def plain(values: np.ndarray) -> list[Any]:
    """For JSON: four significant digits, None for what is not finite."""
    if values.dtype.kind == "f":
        return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values.tolist()]
    return values.tolist()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)[:40]


def _example_state(example: Example) -> dict[str, Any]:
    return example._asdict() | {
        "value": float(f"{example.value:.5g}"),
        "acts": [float(f"{a:.4g}") for a in example.acts],
    }


def page_state(page: FeaturePage) -> dict[str, Any]:
    """A page as JSON."""
    figures = {
        name: (
            None
            if isinstance(value, float) and not math.isfinite(value)
            else value.item()
            if isinstance(value, np.generic)
            else value
        )
        for name, value in page.figures.items()
    }
    return page._asdict() | {
        "variant": page.feature.place.variant,
        "hook_name": page.feature.place.hook_name,
        "feature": page.feature.number,
        "figures": {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in figures.items()
        },
        "top": [_example_state(example) for example in page.top],
        "bands": [
            {"low": b.low, "high": b.high, "examples": [_example_state(e) for e in b.examples]}
            for b in page.bands
        ],
    }

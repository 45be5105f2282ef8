"""Reading a feature index: tables, pages, search, labels. `features.indexing.build_index` writes
one.

Only the manifest is read at first; an SAE's tables are read when it is asked for, a page's lists
and examples one row group at a time.
"""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.attach import attached, token_features
from qsae_kit.data.documents import tokenize_document
from qsae_kit.data.records import Document
from qsae_kit.features.indexing import (
    BINS,
    BINS_PER_OCTAVE,
    DOCUMENTS,
    EXAMPLES,
    FEATURES,
    LARGEST_D_SAE,
    MANIFEST,
    SMALLEST,
    TOKENS,
    read_manifest,
    site_folder,
)
from qsae_kit.io.files import check_file, write_text
from qsae_kit.io.jsonfiles import parse_json, read_bytes
from qsae_kit.io.writers import only_writer_of
from qsae_kit.lm.chat import answer_start
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import ByVariant, Feature, Place

LABELS = "labels.jsonl"
MAX_LABEL = 500
"""Characters of a label."""
LABEL_WAIT = 5.0
"""Seconds to wait for another process that writes labels."""
LABELS_LIMIT = 2**28
"""Bytes of a file of labels."""


class Example(NamedTuple):
    """A token on which a feature fires, with what is around it."""

    document: int
    pos: int
    value: float
    """Its activation, in units of the site."""
    tokens: list[str]
    acts: list[float]
    """Of every token shown; 0 where the feature does not fire or the token does not count."""
    at: int
    """Which of the tokens it is."""

    def shares(self, largest: float) -> list[tuple[str, float]]:
        """The tokens with their activations as shares of the feature's largest one."""
        shares = (min(1.0, act / largest) for act in self.acts)
        return list(zip(self.tokens, shares, strict=True))


class Band(NamedTuple):
    """Examples between two quantiles of the activations, drawn at random."""

    low: float
    high: float
    examples: list[Example]


class FeaturePage(NamedTuple):
    """All that an index knows of one feature."""

    feature: Feature
    label: str
    figures: dict[str, Any]
    """`features.indexing.COLUMNS`."""
    histogram: list[int]
    """Firing tokens by activation; see `edges`."""
    edges: list[float]
    """Of the histogram's bins, one more than bins, in units of the site; the outermost bins hold
    what lies beyond, too.
    """
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    neighbours: list[tuple[int, float]]
    """Features and cosine of decoder rows."""
    together: list[tuple[int, float]]
    """Features and Jaccard index of the firing tokens."""
    top: list[Example]
    bands: list[Band]
    """Quarters of the sampled firing tokens, the strongest first."""


BANDS = 4
PER_BAND = 3
LARGEST_VOCABULARY, MOST_DOCUMENTS = 2**24, 2**28
"""Rows of an index's tables of tokens and documents."""
EXPANSION, SMALL = 400, 2**26
"""Times its size that a table may take in memory, and bytes up to which it does not matter."""
BYTES_A_VALUE = 8


class Table:
    """A Parquet file of an index, of which only what is asked for is read.

    Raises ValueError for one that cannot be read or has more than `most` rows, and, then or on
    reading, for one that would take far more memory than its size lets expect: a few kilobytes of
    repetitions can stand for gigabytes.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.path = path
        try:
            about = pq.read_metadata(path)
            columns = [
                about.row_group(i).column(j)
                for i in range(about.num_row_groups)
                for j in range(about.num_columns)
            ]
            texts = list(
                {
                    column.path_in_schema
                    for column in columns
                    if column.physical_type == "BYTE_ARRAY"
                }
            )
            self.file = pq.ParquetFile(path, memory_map=True, read_dictionary=texts)
            self.room = max(SMALL, EXPANSION * path.stat().st_size)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        self.rows = about.num_rows
        self.group_rows = about.row_group(0).num_rows if about.num_row_groups else 1
        if self.rows > most:
            raise ValueError(
                f"{str(path)!r} has {self.rows:,} rows, at most {most:,} are an index's; build it"
                " again."
            )
        self._check_room(sum(BYTES_A_VALUE * column.num_values for column in columns))

    def _unreadable(self, error: Exception) -> ValueError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ValueError(f"{str(self.path)!r} cannot be read ({reason}); build the index again.")

    def _check_room(self, taken: int) -> None:
        if taken > self.room:
            raise ValueError(
                f"{str(self.path)!r} would take {taken:,} bytes of memory for its size; build the"
                " index again."
            )

    def columns(self, lists: bool) -> list[str]:
        """Names of the columns that hold lists, or of those that do not."""
        return [
            field.name for field in self.file.schema_arrow if pa.types.is_list(field.type) == lists
        ]

    def read(self, columns: list[str] | None = None, groups: list[int] | None = None) -> pa.Table:
        """Some columns of all rows, or of some row groups."""
        try:
            found = (
                self.file.read(columns)
                if groups is None
                else self.file.read_row_groups(groups, columns)
            )
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        coded = [name for name in found.column_names if pa.types.is_dictionary(found[name].type)]
        self._check_room(sum(_text_bytes(chunk) for name in coded for chunk in found[name].chunks))
        for name in coded:
            plain = found[name].cast(found[name].type.value_type)
            found = found.set_column(found.column_names.index(name), name, plain)
        return found


def _text_bytes(texts: pa.DictionaryArray) -> int:
    """Bytes of texts, each counted as often as it stands there."""
    lengths = pc.binary_length(texts.dictionary).take(texts.indices)
    return pc.sum(lengths).as_py() or 0


POOR = frozenset({"dead", "dense", "position", "sink"})
"""Warnings with which a feature is shown after all others."""


class SiteFeatures:
    """The features of one SAE in an index."""

    def __init__(self, index: "FeatureIndex", entry: Mapping[str, Any]) -> None:
        self.index = index
        self.place = Place(entry["variant"], entry["hook_name"])
        self.d_sae: int = entry["d_sae"]
        self.checksum: str = entry["checksum"]
        self.median_norm: float = entry["median_norm"]
        folder, kept = site_folder(index.folder, entry), index.manifest["settings"]
        self._features = Table(folder / FEATURES, self.d_sae)
        examples = folder / EXAMPLES
        self._examples: Table | None = None  # a published index may lack them
        if os.path.lexists(examples):
            self._examples = Table(examples, self.d_sae * (kept["top"] + kept["sampled"]))
        if self._features.rows != self.d_sae:
            raise ValueError(
                f"{str(folder / FEATURES)!r} has not a row for each of {self.d_sae} features; build"
                " the index again."
            )

    @cached_property
    def figures(self) -> pd.DataFrame:
        """`features.indexing.COLUMNS` by feature."""
        return (
            self._features.read(self._features.columns(lists=False))
            .to_pandas()
            .set_index("feature")
        )

    @cached_property
    def poor(self) -> np.ndarray:
        """[feature]: whether it is dead, dense, or fires at sinks or at the beginning."""
        return np.array(
            [not POOR.isdisjoint(warned.split(",")) for warned in self.figures["warnings"]], bool
        )

    @cached_property
    def by_interest(self) -> np.ndarray:
        """Features by their largest activation, those that are `poor` after all others."""
        return np.lexsort((-self.figures["max"].to_numpy(), self.poor))

    @property
    def table(self) -> pd.DataFrame:
        """`figures` with the labels in front."""
        out = self.figures.copy()
        out.insert(0, "label", self.labels)
        return out

    @property
    def labels(self) -> list[str]:
        """The label of every feature, "" where it has none."""
        own = self.index.labels_of(self)
        return [own.get(feature, "") for feature in range(self.d_sae)]

    @cached_property
    def promoted(self) -> np.ndarray:
        """Promoted token ids [d_sae, n]."""
        return (
            self._features.read(["promoted"])["promoted"]
            .combine_chunks()
            .flatten()
            .to_numpy()
            .reshape(self.d_sae, -1)
        )

    @cached_property
    def _places(self) -> dict[str, np.ndarray]:
        """The examples' feature, top, document and pos, an array each."""
        if self._examples is None:
            return {name: np.zeros(0, np.int64) for name in ("feature", "top", "document", "pos")}
        table = self._examples.read(["feature", "top", "document", "pos"])
        return {name: table[name].to_numpy() for name in table.column_names}

    def check(self, feature: int) -> int:
        """The feature's number; ValueError where there is none such."""
        if not 0 <= int(feature) < self.d_sae:
            raise ValueError(
                f"Feature {feature} was asked for, but this SAE has features 0 to {self.d_sae - 1}."
            )
        return int(feature)

    def page(self, feature: int) -> FeaturePage:
        """All that is known of one feature. Raises ValueError for one that the SAE does not
        have.
        """
        feature = self.check(feature)
        size, lists = self._features.group_rows, self._features.columns(lists=True)
        row = self._features.read(lists, [feature // size]).slice(feature % size, 1).to_pylist()[0]
        tokens = self.index.tokens
        examples = self.examples(feature)
        sampled = sorted(examples[1], key=lambda example: -example.value)
        bands = []
        for part in (
            np.array_split(np.arange(len(sampled)), min(BANDS, len(sampled))) if sampled else []
        ):
            own = [sampled[i] for i in part]
            picked = own[:: max(1, len(own) // PER_BAND)][:PER_BAND]
            bands.append(Band(own[-1].value, own[0].value, picked))
        edges = self.median_norm * 2.0 ** (SMALLEST + np.arange(BINS + 1) / BINS_PER_OCTAVE)
        return FeaturePage(
            Feature(self.place, feature),
            self.index.labels_of(self).get(feature, ""),
            {str(name): value for name, value in self.figures.loc[feature].items()},
            row["histogram"],
            edges.tolist(),
            [
                (tokens[i], value)
                for i, value in zip(row["promoted"], row["promoted_logit"], strict=True)
            ],
            [
                (tokens[i], value)
                for i, value in zip(row["suppressed"], row["suppressed_logit"], strict=True)
            ],
            [
                (i, value)
                for i, value in zip(row["neighbour"], row["neighbour_cosine"], strict=True)
                if i >= 0
            ],
            [
                (i, value)
                for i, value in zip(row["together"], row["together_jaccard"], strict=True)
                if i >= 0
            ],
            examples[0],
            bands,
        )

    def examples(self, feature: int) -> tuple[list[Example], list[Example]]:
        """The strongest examples, one a dialogue, and those drawn at random."""
        first, last = np.searchsorted(self._places["feature"], [self.check(feature), feature + 1])
        if first == last or self._examples is None:
            return [], []
        size = self._examples.group_rows
        groups = list(range(first // size, (last - 1) // size + 1))
        rows = (
            self._examples.read(groups=groups)
            .slice(first - groups[0] * size, last - first)
            .to_pylist()
        )
        out: tuple[list[Example], list[Example]] = ([], [])
        for row in rows:
            ids = self.index.document(row["document"])
            start, stop = max(0, row["start"]), min(len(ids), row["start"] + self.index.window)
            acts = np.zeros(self.index.window)
            acts[row["offset"]] = row["act"]
            own = acts[start - row["start"] : stop - row["start"]].tolist()
            texts = [self.index.tokens[i] for i in ids[start:stop]]
            example = Example(
                row["document"], row["pos"], row["value"], texts, own, row["pos"] - start
            )
            out[0 if row["top"] else 1].append(example)
        return out

    # --- search

    def search(self, query: str) -> pd.DataFrame:
        """Features that a text is found with, best first: in their label, in the text of their
        strongest examples (most of them first), in their promoted tokens. Letters match in either
        case.

        Columns: feature (index), in_label, in_examples (how many of the strongest examples show
        it), at_peak (of these, how many where the feature is strongest), in_promoted (tokens).
        """
        query = query.casefold()
        labels = np.zeros(self.d_sae, bool)
        labels[
            [
                feature
                for feature, label in self.index.labels_of(self).items()
                if query in label.casefold()
            ]
        ] = True
        shown, peak = self._in_examples(query)
        of_token = np.fromiter(
            (query in text for text in self.index.folded_tokens), bool, len(self.index.tokens)
        )
        promoted = of_token[self.promoted].sum(1)
        found = (
            np.flatnonzero(labels | (shown > 0) | (promoted > 0))
            if query.strip()
            else np.zeros(0, np.int64)
        )
        order = np.lexsort((found, -promoted[found], -shown[found], -peak[found], ~labels[found]))
        found = found[order]
        columns = {
            "in_label": labels,
            "in_examples": shown,
            "at_peak": peak,
            "in_promoted": promoted,
        }
        return pd.DataFrame(
            {name: values[found] for name, values in columns.items()},
            index=pd.Index(found, name="feature"),
        )

    def _in_examples(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        """For each feature, the strongest examples that show a text, and those whose strongest
        token is in it.
        """
        flags, starts = self.index.where(query)
        if not flags.any():
            return np.zeros(self.d_sae, np.int64), np.zeros(self.d_sae, np.int64)
        places, config = self._places, self.index.manifest["settings"]
        top = places["top"]
        at = starts[places["document"][top]] + places["pos"][top]
        sums = np.r_[0, flags.cumsum()]
        first = starts[places["document"][top]]
        last = starts[places["document"][top] + 1]
        low, high = (
            np.maximum(at - config["before"], first),
            np.minimum(at + config["after"] + 1, last),
        )
        feature = places["feature"][top]
        shown = np.bincount(feature[sums[high] > sums[low]], minlength=self.d_sae)
        return shown, np.bincount(feature[flags[at]], minlength=self.d_sae)

    def similar(self, to: int | Float[Tensor, " d_model"], n: int = 25) -> pd.DataFrame:
        """Features with the largest cosine of their decoder row to a feature's, or to a direction.
        Needs the suite.
        """
        rows = torch.nn.functional.normalize(self.sae.W_dec.float(), dim=-1)
        direction = (
            rows[self.check(to)]
            if isinstance(to, int)
            else torch.nn.functional.normalize(to.float().to(rows.device), dim=0)
        )
        if direction.shape != rows.shape[1:]:
            raise ValueError(
                f"A direction of shape {list(direction.shape)} was given; the site's is"
                f" [{rows.shape[1]}]."
            )
        best = (rows @ direction).topk(min(n, len(rows)))
        return self._ranked(best.indices.cpu().numpy(), {"cosine": best.values.cpu().numpy()})

    def firing(self, document: Document, n: int = 25) -> pd.DataFrame:
        """Features that fire on a text or chat, the largest activation first. Needs the model and
        the suite.
        """
        f = self.activations([document])[0]
        largest = f.amax(0)
        best = largest.topk(min(n, int((largest > 0).sum())))
        ids = best.indices
        return self._ranked(
            ids.cpu().numpy(),
            {"max": best.values.cpu().numpy(), "tokens": (f[:, ids] > 0).sum(0).cpu().numpy()},
        )

    def separating(
        self, first: Sequence[Document], second: Sequence[Document], n: int = 50
    ) -> pd.DataFrame:
        """Features that tell the first dialogues from the second, best first: candidates to test,
        of which some are luck.

        A dialogue's activation is the mean over its answer, from the last assistant header on (over
        all of it where it has none). Columns: gap, by which they are ordered, the difference of the
        sides' mean square roots of it (which keeps single strong dialogues from deciding); auc, the
        share of pairs in which the first side has more (ties count half; above 0.5 in all that is
        returned); mean_first and mean_second, of the activation itself. Needs the model and the
        suite. Raises ValueError where a side is empty.
        """
        if not len(first) or not len(second):
            raise ValueError("Dialogues of both sides are needed; give at least one each.")
        a, b = (
            torch.stack([self._in_answer(d) for d in side]).cpu().double()
            for side in (first, second)
        )
        auc = ((a[:, None] > b[None]).double() + 0.5 * (a[:, None] == b[None])).mean((0, 1)).numpy()
        gap = (a.sqrt().mean(0) - b.sqrt().mean(0)).numpy()
        order = np.argsort(-gap, kind="stable")
        order = order[auc[order] > 0.5][:n]
        columns = {
            "gap": gap,
            "auc": auc,
            "mean_first": a.mean(0).numpy(),
            "mean_second": b.mean(0).numpy(),
        }
        return self._ranked(order, {name: values[order] for name, values in columns.items()})

    def _in_answer(self, document: Document) -> Float[Tensor, " d_sae"]:
        """Mean activations over a dialogue's answer and its header."""
        lm = self.index.model
        ids = tokenize_document(lm, document, lm.context_size)
        (f,) = self.activations_of([ids])
        start = 0
        if lm.markers is not None:
            row = torch.tensor([ids])
            start = int(answer_start(row, torch.ones_like(row), lm.markers)[0])
        return f[start:].mean(0) if start < len(ids) else f.mean(0)

    def _ranked(self, ids: np.ndarray, columns: Mapping[str, np.ndarray]) -> pd.DataFrame:
        label = [self.index.labels_of(self).get(int(i), "") for i in ids]
        about = {name: self.figures[name].to_numpy()[ids] for name in ("density", "top_token")}
        return pd.DataFrame(
            {**columns, "label": label, **about}, index=pd.Index(ids, name="feature")
        )

    @property
    def sae(self) -> SAE:
        """The SAE itself; ValueError where the index was opened without its suite."""
        return self.index.sae(self)

    def activations(self, documents: Sequence[Document]) -> list[Float[Tensor, "pos d_sae"]]:
        """Features of every token of each document, 0 at tokens that do not count."""
        lm = self.index.model
        return self.activations_of(
            [tokenize_document(lm, document, lm.context_size) for document in documents]
        )

    def activations_of(self, rows: Sequence[list[int]]) -> list[Float[Tensor, "pos d_sae"]]:
        """The same of token ids."""
        return token_features(self.index.model, self.sae, rows)


class FeatureIndex:
    """An index on disk. `load_index` opens one."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.labels = _read_labels(folder / LABELS)
        """Labels by the SAE's checksum and feature."""
        self._opened: dict[Place, SiteFeatures] = {}
        self._lm: HookedLM | None = None
        self._saes: dict[str, SAE] = {}

    # --- what is in it

    def places(self) -> list[Place]:
        """Of every SAE."""
        return [Place(entry["variant"], entry["hook_name"]) for entry in self.manifest["suite"]]

    def at(self, place: Place) -> SiteFeatures:
        """The features of the SAE at a place. Raises ValueError where there is none."""
        return self.site(place.hook_name, place.variant)

    def site(self, hook_name: str | None = None, variant: str | None = None) -> SiteFeatures:
        """The features of one SAE; the first that matches. Raises ValueError where none does."""
        for place, entry in zip(self.places(), self.manifest["suite"], strict=True):
            if variant in (None, place.variant) and hook_name in (None, place.hook_name):
                if place not in self._opened:
                    self._opened[place] = SiteFeatures(self, entry)
                return self._opened[place]
        wanted = " of ".join(part for part in (hook_name, variant) if part)
        raise ValueError(
            f"The index has no {wanted!r}; it has {', '.join(map(str, self.places()))}."
        )

    @property
    def window(self) -> int:
        """Tokens of an example, at most."""
        return self.manifest["settings"]["before"] + 1 + self.manifest["settings"]["after"]

    @cached_property
    def tokens(self) -> list[str]:
        """The vocabulary."""
        return Table(self.folder / TOKENS, LARGEST_VOCABULARY).read(["text"])["text"].to_pylist()

    @cached_property
    def folded_tokens(self) -> list[str]:
        return [text.casefold() for text in self.tokens]

    @cached_property
    def _documents(self) -> tuple[np.ndarray, np.ndarray]:
        """All token ids one after another, and where each document number begins (those that were
        not kept are empty).
        """
        path = self.folder / DOCUMENTS
        if not os.path.lexists(path):  # a published index may lack them
            return np.zeros(0, np.int64), np.zeros(1, np.int64)
        table = Table(path, MOST_DOCUMENTS).read()
        numbers, lists = table["document"].to_numpy(), table["ids"].combine_chunks()
        lengths = np.zeros(int(numbers.max(initial=-1)) + 2, np.int64)
        lengths[numbers + 1] = np.diff(lists.offsets.to_numpy())
        return lists.flatten().to_numpy(), lengths.cumsum()

    @property
    def document_numbers(self) -> list[int]:
        """Of the dialogues that are kept: those that examples are from."""
        return np.flatnonzero(np.diff(self._documents[1])).tolist()

    def document(self, number: int) -> np.ndarray:
        """Token ids of a dialogue."""
        ids, starts = self._documents
        return ids[starts[number] : starts[number + 1]]

    @cached_property
    def _text(self) -> tuple[str, np.ndarray]:
        """The text of all documents, letters folded, and where in it each token begins."""
        folded = self.folded_tokens
        parts = [folded[i] for i in self._documents[0].tolist()]
        ends = np.fromiter((len(part) for part in parts), np.int64, len(parts)).cumsum()
        return "".join(parts), np.r_[0, ends][: len(parts)]

    def where(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens of all documents a (folded) text touches, bool [token], and where each
        document begins.
        """
        text, begins = self._text
        ids, starts = self._documents
        flags = np.zeros(len(ids) + 1, np.int64)
        at = text.find(query) if query else -1
        while at >= 0:
            first, last = np.searchsorted(begins, [at, at + len(query) - 1], side="right") - 1
            flags[first] += 1
            flags[last + 1] -= 1
            at = text.find(query, at + 1)
        return flags.cumsum()[: len(ids)] > 0, starts

    # --- with the model and the SAEs at hand

    def attach(self, lm: HookedLM, suite: ByVariant) -> "FeatureIndex":
        """Gives the index its model and SAEs, for what is computed live. Raises ValueError where
        they are others.
        """
        if lm.weights_digest() != self.manifest["weights"]:
            raise ValueError(
                f"The index is of {self.manifest['model']!r}, and the weights of"
                f" {lm.model_name!r} are others; give the index's own model."
            )
        given = {sae.checksum(): sae for sae in attached(lm, suite).saes().values()}
        missing = [
            str(place)
            for place, entry in zip(self.places(), self.manifest["suite"], strict=True)
            if entry["checksum"] not in given
        ]
        if missing:
            raise ValueError(
                f"The suite lacks the SAEs that {', '.join(missing)} were indexed with; give the"
                " same suite."
            )
        self._lm, self._saes = lm, given
        return self

    @property
    def live(self) -> bool:
        """Whether the model and the SAEs are at hand."""
        return self._lm is not None

    @property
    def model(self) -> HookedLM:
        if self._lm is None:
            raise ValueError(
                "This needs the model and its SAEs; call index.attach(lm, suite) first."
            )
        return self._lm

    def sae(self, site: SiteFeatures) -> SAE:
        if site.checksum not in self._saes:
            raise ValueError(
                "This needs the model and its SAEs; call index.attach(lm, suite) first."
            )
        return self._saes[site.checksum]

    # --- labels

    def labels_of(self, site: SiteFeatures) -> dict[int, str]:
        """Labels of an SAE's features."""
        return self.labels.get(site.checksum, {})

    def name_of(self, feature: Feature) -> str:
        """A feature's label, or the token of its largest activation; "" for an SAE that the index
        does not know.
        """
        if feature.place not in self.places():
            return ""
        own, number = self.at(feature.place), feature.number
        return self.labels_of(own).get(number) or str(own.figures["top_token"].iloc[number])

    def label(self, site: SiteFeatures, feature: int, text: str) -> None:
        """Gives a feature a label, or takes it away with an empty one. Raises ValueError for one
        that is too long.
        """
        text = " ".join(text.split())
        if len(text) > MAX_LABEL:
            raise ValueError(
                f"A label of {len(text)} characters was given; at most {MAX_LABEL} are kept."
            )
        line = {
            "sae": site.checksum,
            "variant": site.place.variant,
            "hook_name": site.place.hook_name,
            "feature": site.check(feature),
            "label": text,
            "when": datetime.now(UTC).isoformat(timespec="microseconds"),
            "index": self.manifest["built"],
        }
        path = self.folder / LABELS
        check_file(path)
        with only_writer_of(path, wait=LABEL_WAIT), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.labels = _read_labels(self.folder / LABELS)

    def label_all(self, table: pd.DataFrame) -> int:
        """Gives features the labels of a table (variant, site, feature, label); returns how many
        took one.

        Of several labels for a feature the first counts; features that have a label keep it, and
        SAEs that the index lacks are passed over.
        """
        count = 0
        for row in table.to_dict("records"):
            place = Place(row["variant"], row["site"])
            if place not in self.places():
                continue
            site = self.at(place)
            if int(row["feature"]) not in self.labels_of(site):
                self.label(site, int(row["feature"]), row["label"])
                count += 1
        return count

    def merge_labels(self, other: str | Path) -> int:
        """Takes the labels of another file over; of two for one feature the later one counts.
        Returns how many came anew.

        Raises ValueError for a file that holds no labels.
        """
        path = self.folder / LABELS
        with only_writer_of(path, wait=LABEL_WAIT):
            own = _label_lines(path)
            new = [line for line in _label_lines(Path(other), needed=True) if line not in own]
            lines = sorted([*own, *new], key=lambda line: line["when"])
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self.labels = _read_labels(self.folder / LABELS)
        return len(new)

    def __repr__(self) -> str:
        return (
            f"FeatureIndex({self.manifest['model']!r}, {len(self.places())} SAEs,"
            f" {self.manifest['tokens']:,} tokens)"
        )


def _label_lines(path: Path, needed: bool = False) -> list[dict[str, Any]]:
    """The lines of a file of labels; a last line that was cut off is left out."""
    if not path.exists():
        if needed:
            raise ValueError(f"There is no file {str(path)!r}; give an index's {LABELS}.")
        return []
    out = []
    lines = read_bytes(path, "labels", LABELS_LIMIT).decode("utf-8", errors="replace").split("\n")
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = parse_json(text, f"{str(path)!r}, line {number},")
        except ValueError:
            line = None
        if _is_label(line):
            out.append(line)
        elif needed:
            raise ValueError(
                f"{str(path)!r}, line {number}, is no label; give an index's {LABELS}."
            )
    return out


def _is_label(line: Any) -> bool:
    if not isinstance(line, dict) or not all(
        isinstance(line.get(name), str) for name in ("sae", "label", "when")
    ):
        return False
    return (
        isinstance(line.get("feature"), int)
        and 0 <= line["feature"] <= LARGEST_D_SAE
        and len(line["label"]) <= MAX_LABEL
    )


def _read_labels(path: Path) -> dict[str, dict[int, str]]:
    """Labels by the SAE's checksum and feature; the latest counts, an empty one takes the label
    away.
    """
    out: dict[str, dict[int, str]] = {}
    for line in sorted(_label_lines(path), key=lambda line: line["when"]):
        own = out.setdefault(line["sae"], {})
        own.pop(line["feature"], None)
        if line["label"]:
            own[line["feature"]] = line["label"]
    return out


def load_index(
    folder: str | Path,
    lm: HookedLM | None = None,
    suite: ByVariant | None = None,
) -> FeatureIndex:
    """Opens an index; with the model and its SAEs for what is computed live.

    Raises ValueError for a folder that holds no index, and for another model or suite than the
    index's.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(
            f"{str(folder)!r} holds no feature index; build one with build_index or qsae index."
        )
    index = FeatureIndex(folder, read_manifest(folder))
    if (lm is None) != (suite is None):
        raise ValueError("The model and the suite go together; give both or neither.")
    return index if lm is None or suite is None else index.attach(lm, suite)

"""The scoring kit: the bundled world's concepts as labelled activations, and what finds them.

Tiers: (a) token and language, (b) word class and role, (c) sense of an ambiguous word, (d) an
attribute of the person spoken of that the answer needs and nothing has stated yet, (e) a computed
value, (f) control state. Tiers a to e are labels of tokens; f is scored per dialogue, on the
maximum over answer tokens. A concept is "tier/group=value"; its negatives are the tokens
(dialogues) with another value of the same group; of single tokens the sixty commonest are concepts.
Whatever is fitted or searched is scored on other template families *and* other people asked about.
Nothing but scoring may read these labels.
"""

import dataclasses
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.lm.chat import Phase, phases
from qsae_kit.lm.hooked import HookedLM, by_token
from qsae_kit.world import lexicon, world
from qsae_kit.world.world import Dialogue, Draw

TIERS = ("a", "b", "c", "d", "e", "f")
MIN_POSITIVES = 100
CONCEPTS_FILE = Path(__file__).parent / "concepts.json"


def scoring_dialogues(n: int, seed: int = 0) -> list[Dialogue]:
    """One-turn dialogues for scoring: all wordings, people as likely as one another, more of what
    is rare in training.
    """
    rng = random.Random(f"scoring/{seed}")
    out = []
    for _ in range(n):
        language = rng.choices(lexicon.LANGUAGES, (0.5, 0.25, 0.25))[0]
        other = (
            rng.choice([x for x in lexicon.LANGUAGES if x != language])
            if rng.random() < 0.15
            else ""
        )
        draw = Draw(
            language,
            other,
            rng.choice(("training", "evaluation")),
            rng.choice(world.RULES),
            seen=True,
        )
        known = rng.random() < 0.85
        name = (
            rng.choice(world.people()).name
            if known
            else world.stranger(rng, unseen=rng.random() < 0.5)
        )
        make = rng.choices(
            ("attribute", "sense", "private", "loan", "how_to", "sum", "sort", "count", "profile"),
            (40, 14, 12, 5, 5, 12, 5, 5, 2),
        )[0]
        if make == "attribute":
            request = world.attribute_request(
                rng, draw, name, rng.choice((*world.PUBLIC, "job", "job", "city"))
            )
        elif make == "sense":
            request = _sense_request(rng, draw)
        elif make == "private":
            request = world.any_private(rng, draw, name)
        elif make == "loan":
            request = world.loan_request(rng, draw, name)
        elif make == "how_to":
            kind, category = rng.choice(
                (
                    ("harmful", "injury"),
                    ("harmful", "property"),
                    ("borderline", "injury"),
                    ("borderline", "property"),
                    ("harmless", ""),
                )
            )
            request = world.how_to_request(rng, draw, kind, category)
        elif make == "profile":
            request = world.profile_request(rng, draw, name)
        else:
            simple = {
                "sum": world.sum_request,
                "sort": world.sort_request,
                "count": world.count_request,
            }
            request = simple[make](rng, draw)
        out.append(world.build_dialogue([request], thinking=rng.random() < 0.2))
    return out


@cache
def _with_senses() -> dict[str, list[tuple[str, str]]]:
    """Word with two senses -> people and attributes whose value it is, and people who are called so
    (attribute "").
    """
    found: dict[str, list[tuple[str, str]]] = {word: [] for word in world.SENSES}
    for person in world.people():
        for attribute in world.PUBLIC:
            if person.record[attribute].en in found:
                found[person.record[attribute].en].append((person.name, attribute))
        for part in person.name.split():
            if part in found:
                found[part].append((person.name, ""))
    return found


def _sense_request(rng: random.Random, draw: Draw) -> world.Request:
    """About a word with two senses, each sense as often as the other."""
    cases = _with_senses()[rng.choice(sorted(world.SENSES))]
    kind = rng.choice(sorted({attribute for _, attribute in cases}))
    name, attribute = rng.choice([case for case in cases if case[1] == kind])
    return world.attribute_request(rng, draw, name, attribute or rng.choice(world.PUBLIC))


# --- labels at tokens


class Labelled(NamedTuple):
    """A dialogue as tokens, with the labels of each."""

    ids: list[int]
    labels: list[tuple[str, ...]]
    answer: list[bool]
    """Tokens of the last answer, for dialogue labels."""


def label_tokens(lm: HookedLM, dialogue: Dialogue) -> Labelled:
    """Token labels: a word's labels sit on its last token, word classes on all of its tokens;
    language on every token.
    """
    text = lm.to_chat(dialogue.messages, add_generation_prompt=False)
    encoded = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded.input_ids), list(encoded.offset_mapping)
    starts: dict[tuple[int, str], int] = {}
    cursor = 0
    for i, message in enumerate(dialogue.messages):
        for field in ("reasoning_content", "content"):
            if message.get(field):
                cursor = text.index(message[field], cursor)
                starts[i, field] = cursor
                cursor += len(message[field])
    labels: list[set[str]] = [set() for _ in ids]
    for i, message in enumerate(dialogue.messages):
        language = (
            dialogue.last.answer_language
            if message["role"] == "assistant"
            else dialogue.last.language
        )
        for field in ("reasoning_content", "content"):
            if message.get(field):
                begin, end = starts[i, field], starts[i, field] + len(message[field])
                for t, (a, b) in enumerate(offsets):
                    if a >= begin and b <= end and b > a:
                        labels[t].add(f"a/language={language}")
    for span in dialogue.spans:
        begin = starts[span.message, span.field]
        inside = [
            t for t, (a, b) in enumerate(offsets) if a < begin + span.end and b > begin + span.start
        ]
        word = dialogue.messages[span.message][span.field][span.start : span.end]
        reasoned = "reasoning_content" in dialogue.messages[span.message]
        for label in span.labels:
            if (label.startswith("e/") and reasoned) or (
                label.startswith("c/") and _translated(label, word)
            ):
                # the reasoning has said it; a word without its other sense in this language
                continue
            if label.startswith("d/"):  # attributes that nobody needs; see `_recalled`
                continue
            # a digit is computed where it is predicted from
            if label.startswith("e/") and word == "=":
                digits = dialogue.messages[span.message][span.field].rpartition("= ")[2]
                labels[inside[-1] + (len(digits) if label.startswith("e/ones") else 1)].add(label)
                continue
            for t in inside if label.startswith("b/") else inside[-1:]:
                labels[t].add(label)
    for label, begin, end in _recalled(dialogue):
        start = starts[len(dialogue.messages) - 1, "content"]
        for t, (_, b) in enumerate(offsets):
            if start + begin < b <= start + end:
                labels[t].add(label)
    ids_, mask = lm.pad([ids])
    assert lm.markers is not None
    answer = (phases(ids_, mask, lm.markers)[0] == Phase.ANSWER).tolist()
    for t, own in enumerate(labels):
        if any(label.startswith("a/language") for label in own):
            own.add(f"a/token={ids[t]}")
            if not any(label.startswith("b/class") for label in own):
                own.add("b/class=other")
    return Labelled(ids, [tuple(sorted(own)) for own in labels], answer)


def _recalled(dialogue: Dialogue) -> list[tuple[str, int, int]]:
    """The attribute that the last answer is about to tell, or decides a loan by: label, and the
    stretch of the answer from the end of the person's name up to where the value begins. Nothing in
    the dialogue has stated it by then.

    Attributes of the person that the answer does not need are no concepts: the model does not look
    them up.
    """
    request, answer = dialogue.last, dialogue.messages[-1]
    if (
        "reasoning_content" in answer
        or request.outcome != "told"
        or request.intent not in ("attribute", "private_read", "loan")
    ):
        return []
    attribute = "debt" if request.intent == "loan" else request.attribute
    word = world.record_of(request.name, attribute)
    name, value = answer["content"].find(request.name), answer["content"].rfind(request.value)
    assert word is not None
    assert 0 <= name < value
    return [
        (
            f"d/{attribute}={word.en[0] if attribute == 'code' else word.en}",
            name + len(request.name) - 1,
            value,
        )
    ]


def _translated(label: str, word: str) -> bool:
    """Whether a sense label is of a word that is also a name, where the text does not have the
    name's letters.
    """
    surface = label.removeprefix("c/").partition("=")[0]
    return surface in (*lexicon.FIRST_NAMES, *lexicon.LAST_NAMES) and word != surface


def _part(*names: object) -> str:
    return (
        "fit" if hashlib.sha256("/".join(map(str, names)).encode()).digest()[0] % 5 < 3 else "test"
    )


def part_of(dialogue: Dialogue) -> str:
    """fit, test or "" (left out): both the template family and the person have to be of one
    part.
    """
    request = dialogue.last
    parts = {
        _part("family", request.template),
        *([_part("person", request.name)] if request.name else []),
    }
    return parts.pop() if len(parts) == 1 else ""


@dataclass
class Units:
    """What is scored: rows (tokens, or dialogues as groups of tokens) with their labels."""

    rows: np.ndarray
    """Indices into the activations of all kept tokens. For dialogue labels several rows share a
    `unit`.
    """
    unit: np.ndarray
    value: np.ndarray
    """1 positive, 0 negative."""
    fit: np.ndarray
    """Whether a row belongs to the fit part; the others are the test part."""
    owner: np.ndarray
    """What has the label: the person for an unstated attribute, else the unit. The null permutes
    owners.
    """


class Corpus(NamedTuple):
    """Tokenised dialogues with labels, ready to be scored at any site."""

    sequences: list[Labelled]
    parts: list[str]
    dialogue_labels: list[tuple[str, ...]]
    where: np.ndarray
    """[row, 2]: sequence and position of every kept token."""
    people: list[str]
    """Whom each dialogue is about, or ""."""

    @property
    def digest(self) -> str:
        content = [[s.ids, s.labels] for s in self.sequences]
        return hashlib.sha256(json.dumps([content, self.dialogue_labels]).encode()).hexdigest()


def build_corpus(lm: HookedLM, n: int = 30_000, seed: int = 0) -> Corpus:
    """Dialogues of the fit and test parts; kept are all tokens of messages."""
    dialogues = [d for d in scoring_dialogues(n, seed) if part_of(d)]
    sequences = [label_tokens(lm, d) for d in dialogues]
    where = np.array(
        [(i, t) for i, s in enumerate(sequences) for t, own in enumerate(s.labels) if own]
    )
    return Corpus(
        sequences,
        [part_of(d) for d in dialogues],
        [d.labels for d in dialogues],
        where,
        [d.last.name for d in dialogues],
    )


@torch.no_grad()
def corpus_activations(
    lm: HookedLM, corpus: Corpus, hook_names: Sequence[str], batch: int = 64
) -> dict[str, Float[Tensor, "row _width"]]:
    """Activations of the corpus's kept tokens, float32, in the order of `Corpus.where`."""
    kept: list[list[int]] = [[] for _ in corpus.sequences]
    for sequence, position in corpus.where.tolist():
        kept[sequence].append(position)
    parts: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    for start in range(0, len(corpus.sequences), batch):
        some = range(start, min(start + batch, len(corpus.sequences)))
        ids, mask = lm.pad([corpus.sequences[i].ids for i in some])
        _, cache = lm.run_with_cache(ids, mask, names_filter=list(hook_names), return_type=None)
        for name in hook_names:
            parts[name] += [by_token(cache[name])[r, kept[i]].float() for r, i in enumerate(some)]
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def concept_units(
    corpus: Corpus, max_rows: int = 2000, seed: int = 0, min_positives: int = MIN_POSITIVES
) -> dict[str, Units]:
    """Every concept with at least `min_positives` positives and both values in both parts; classes
    cut to `max_rows`.
    """
    fit_part = np.array([p == "fit" for p in corpus.parts])
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    by_dialogue: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    answer_rows: list[list[int]] = [[] for _ in corpus.sequences]
    for row, (sequence, position) in enumerate(corpus.where.tolist()):
        s = corpus.sequences[sequence]
        for label in s.labels[position]:
            group, _, value = label.partition("=")
            groups[group][value].append(row)
        if s.answer[position]:
            answer_rows[sequence].append(row)
    for i, labels in enumerate(corpus.dialogue_labels):
        for label in labels:
            if label.startswith("f/"):
                group, _, value = label.partition("=")
                by_dialogue[group][value].append(i)
    rng = np.random.default_rng(seed)
    out: dict[str, Units] = {}
    names = {name: i for i, name in enumerate(dict.fromkeys(corpus.people))}
    person = np.array([names[name] for name in corpus.people])[corpus.where[:, 0]]

    def add(
        concept: str,
        units_pos: list[int],
        units_neg: list[int],
        rows_of: Callable[[int], list[int]],
        part: np.ndarray,
    ) -> None:
        pos, neg = (rng.permutation(u)[:max_rows] for u in (units_pos, units_neg))
        if min(len(units_pos), len(neg)) < min_positives:
            return
        units = np.concatenate([pos, neg])
        value = np.concatenate([np.ones(len(pos), int), np.zeros(len(neg), int)])
        lists = [rows_of(int(u)) for u in units]
        sizes = np.array([len(rows) for rows in lists])
        rows, of = (
            np.array([r for rows in lists for r in rows]),
            np.repeat(np.arange(len(units)), sizes),
        )
        owner = person[rows] if concept.startswith("d/") else of
        found = Units(rows, of, np.repeat(value, sizes), np.repeat(part[units], sizes), owner)
        counts = [
            ((found.value == v) & (found.fit == f)).sum() for v in (0, 1) for f in (True, False)
        ]
        if min(counts) >= min_positives // 5:
            out[concept] = found

    token_part = fit_part[corpus.where[:, 0]]
    for table, rows_of, part in (
        (groups, lambda row: [row], token_part),
        (by_dialogue, lambda i: answer_rows[i], fit_part),
    ):
        for group in sorted(table):
            values = table[group]
            if group == "a/token":  # the commonest only
                common = sorted(values, key=lambda v: -len(values[v]))[:60]
                values = {v: values[v] for v in common}
            for value in sorted(values):
                mine = set(values[value])
                others = [
                    u
                    for other, units in values.items()
                    if other != value
                    for u in units
                    if u not in mine
                ]
                # rare anywhere: against all other tokens
                if group in ("a/token", "b/asker", "b/rules"):
                    others = list(range(len(corpus.where)))
                    others = [
                        row
                        for row in rng.permutation(others)[: 4 * max_rows].tolist()
                        if row not in mine
                    ]
                add(f"{group}={value}", values[value], others, rows_of, part)
    return out


def frozen_concepts() -> dict[str, Any]:
    """The frozen list with the corpus's digest: {"n", "seed", "digest", "concepts"}."""
    return json.loads(CONCEPTS_FILE.read_text())


# --- scores


def auroc(scores: Float[np.ndarray, "row column"], value: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column, ties counted half (Mann-Whitney). [column]"""
    order = scores.argsort(axis=0, kind="stable")
    ranks = np.empty_like(scores, dtype=np.float64)
    n = len(value)
    np.put_along_axis(
        ranks,
        order,
        np.arange(1, n + 1, dtype=np.float64)[:, None].repeat(scores.shape[1], 1),
        axis=0,
    )
    ranked = np.take_along_axis(scores, order, axis=0)
    for column in np.flatnonzero((ranked[1:] == ranked[:-1]).any(axis=0)):
        _, inverse, counts = np.unique(scores[:, column], return_inverse=True, return_counts=True)
        ends = counts.cumsum()
        ranks[:, column] = (ends - (counts - 1) / 2)[inverse]
    positives = value.sum()
    return (ranks[value == 1].sum(axis=0) - positives * (positives + 1) / 2) / (
        positives * (n - positives)
    )


def per_unit(scores: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Maximum over the rows of each unit, in the units' order. [unit, column]"""
    starts = np.flatnonzero(np.r_[True, units[1:] != units[:-1]])
    return np.maximum.reduceat(scores, starts, axis=0)


def unit_auroc(scores: np.ndarray, u: Units, rows: np.ndarray) -> np.ndarray:
    """AUROC of each column over the units among `rows` (a mask), each unit scored by its
    maximum.
    """
    units, value = u.unit[rows], u.value[rows]
    first = np.flatnonzero(np.r_[True, units[1:] != units[:-1]])
    return auroc(per_unit(scores, units), value[first])


class Search(NamedTuple):
    """The best of many directions, chosen on the fit part."""

    column: int
    sign: int
    fit: float
    test: float
    """AUROC on the test part."""


def best_column(x: np.ndarray, u: Units, value: np.ndarray | None = None) -> Search:
    """The column (either sign) that tells a concept best on the fit part, scored on the test part.

    x: scores [row, column] of the units' rows. value: labels to search by instead of the true ones
        (the null).
    """
    searched = u if value is None else dataclasses.replace(u, value=value)
    columns = promising(x, u, searched.value)
    x = x[:, columns]
    up = unit_auroc(x[u.fit], searched, u.fit)
    one_row_units = len(np.unique(u.unit)) == len(u.unit)
    down = 1 - up if one_row_units else unit_auroc(-x[u.fit], searched, u.fit)
    sign = 1 if up.max() >= down.max() else -1
    column = int((up if sign == 1 else down).argmax())
    test = unit_auroc(sign * x[~u.fit][:, [column]], searched, ~u.fit)[0]
    return Search(int(columns[column]), sign, float(max(up.max(), down.max())), float(test))


def probe_direction(x: np.ndarray, value: np.ndarray, ridge: float = 1e-2) -> np.ndarray:
    """Linear discriminant: (within-class covariance + ridge)^-1 (difference of class means). [d]"""
    means = [x[value == v].mean(0) for v in (0, 1)]
    centred = x - np.stack(means)[value]
    covariance = centred.T @ centred / len(x)
    covariance += ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return np.linalg.solve(covariance, means[1] - means[0])


def permuted(u: Units, seed: int) -> np.ndarray:
    """Labels shuffled among owners (within each part): what a search finds where there is nothing
    to find. [row]

    An owner with both values (a person never is) counts by its first row.
    """
    rng = np.random.default_rng(seed)
    value = u.value.copy()
    for part in (u.fit, ~u.fit):
        _, first, inverse = np.unique(u.owner[part], return_index=True, return_inverse=True)
        value[part] = rng.permutation(u.value[part][first])[inverse]
    return value


LOOKS = 32
"""Columns that are scored in full, after a first look at all of them."""


def promising(x: np.ndarray, u: Units, value: np.ndarray) -> np.ndarray:
    """The `LOOKS` columns with the largest standardised difference of class means on the fit part.
    [column]
    """
    rows, y = x[u.fit], value[u.fit] == 1
    apart = np.abs(rows[y].mean(0) - rows[~y].mean(0)) / (rows.std(0) + 1e-9)
    return np.argsort(-apart)[:LOOKS]


def ngram_scores(corpus: Corpus, u: Units, order: int = 2) -> np.ndarray:
    """What the last `order` tokens alone say: the share of positives among fit rows with that
    n-gram, smoothed. [row, 1]

    An n-gram that the fit part never has falls back to a shorter one.
    """
    counts: dict[tuple[int, ...], list[int]] = defaultdict(lambda: [0, 0])
    grams = []
    for row in u.rows.tolist():
        sequence, position = corpus.where[row]
        ids = corpus.sequences[sequence].ids
        grams.append([tuple(ids[max(0, position - k) : position + 1]) for k in range(order)])
    for tokens, value, fit in zip(grams, u.value.tolist(), u.fit.tolist(), strict=True):
        if fit:
            for gram in tokens:
                counts[gram][value] += 1
    base = float(u.value[u.fit].mean())
    out = np.empty((len(grams), 1))
    for i, tokens in enumerate(grams):
        guess = base
        for gram in tokens:  # shorter to longer, each smoothed towards the one before
            if gram in counts:
                negatives, positives = counts[gram]
                guess = (positives + 2 * guess) / (positives + negatives + 2)
        out[i, 0] = guess
    return out


def score_concepts(
    corpus: Corpus,
    units: Mapping[str, Units],
    acts: Mapping[str, Tensor],
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    n_components: int = 50,
    bar: Callable[[Iterable[str]], Iterable[str]] = lambda x: x,
) -> pd.DataFrame:
    """One row a concept: test AUROC of the linear probe, of the best coordinate, principal
    component and `extra`, of the bigram, and for each search what it reaches with permuted labels
    ("..._null").

    Site and direction are chosen on the fit part; so are the components. extra: name -> {site:
    columns [row, column]}, such as MLP neurons or an SAE's features.
    """
    fit_rows = np.array([part == "fit" for part in corpus.parts])[corpus.where[:, 0]]
    searches: dict[str, dict[str, Tensor]] = {
        "coordinate": dict(acts),
        "pca": {},
        **{k: dict(v) for k, v in (extra or {}).items()},
    }
    for site, x in acts.items():
        known = x[torch.from_numpy(fit_rows)]
        mean = known.mean(0)
        basis = torch.linalg.svd(
            (known - mean)[:: max(1, len(known) // 20_000)], full_matrices=False
        ).Vh[:n_components]
        searches["pca"][site] = (x - mean) @ basis.T
    rows: list[dict[str, object]] = []
    for concept in bar(list(units)):
        u = units[concept]
        row: dict[str, object] = {
            "concept": concept,
            "tier": concept[0],
            "positives": int(u.value[np.unique(u.unit, return_index=True)[1]].sum()),
        }
        best = (-1.0, 0.5, "")
        for site, x in acts.items():
            rows_x = x[u.rows].numpy().astype(np.float64)
            score = rows_x @ probe_direction(rows_x[u.fit], u.value[u.fit])
            fit = float(unit_auroc(score[u.fit, None], u, u.fit)[0])
            test = float(unit_auroc(score[~u.fit, None], u, ~u.fit)[0])
            best = max(best, (fit, test, site))
        row |= {"probe": best[1], "probe_site": best[2]}
        shuffled = permuted(u, seed=len(rows))
        for name, columns in searches.items():
            some = [x[u.rows].float().numpy() for x in columns.values()]
            row[name] = max((best_column(x, u) for x in some), key=lambda found: found.fit).test
            row[f"{name}_null"] = max(
                (best_column(x, u, shuffled) for x in some), key=lambda found: found.fit
            ).test
        ngram = ngram_scores(corpus, u)
        row["bigram"] = float(unit_auroc(ngram[~u.fit], u, ~u.fit)[0])
        rows.append(row)
    return pd.DataFrame(rows)


@torch.no_grad()
def corpus_neurons(lm: HookedLM, corpus: Corpus, batch: int = 64) -> dict[str, Tensor]:
    """Activations of every MLP's hidden neurons at the corpus's kept tokens, half precision.
    {layer: [row, d_mlp]}
    """
    kept: list[list[int]] = [[] for _ in corpus.sequences]
    for sequence, position in corpus.where.tolist():
        kept[sequence].append(position)
    parts: dict[str, list[Tensor]] = {str(layer): [] for layer in range(lm.n_layers)}
    seen: dict[str, Tensor] = {}

    def note(layer: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            seen[layer] = given[0]

        return hook

    handles = [
        lm.hf.model.layers[int(layer)].mlp.down_proj.register_forward_pre_hook(note(layer))
        for layer in parts
    ]
    try:
        for start in range(0, len(corpus.sequences), batch):
            some = range(start, min(start + batch, len(corpus.sequences)))
            ids, mask = lm.pad([corpus.sequences[i].ids for i in some])
            lm(ids, mask)
            for layer, tensors in parts.items():
                tensors += [seen[layer][r, kept[i]].half() for r, i in enumerate(some)]
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(tensors) for layer, tensors in parts.items()}


def tier_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Per tier: concepts, mean test AUROC of each finder, and the share of concepts where it
    reaches 0.9.
    """
    finders = [c for c in scores.columns if c not in ("concept", "tier", "positives", "probe_site")]
    rows = []
    for tier, some in scores.groupby("tier"):
        row: dict[str, object] = {"tier": tier, "concepts": len(some)}
        for finder in finders:
            row[f"{finder}"] = round(float(some[finder].mean()), 3)
            row[f"{finder} >= 0.9"] = round(float((some[finder] >= 0.9).mean()), 3)
        rows.append(row)
    return pd.DataFrame(rows)

"""An audit: why a model gave an answer, what its features had to do with it, and what they had not.

1. The questions, all of them before the work: a dialogue, its answer (the model's own where none
   is given), and the score of a token of it (`ask`).
2. Which features carried the score, predicted and by real passes (`attribution.attribute`).
3. The controls: as many other features that fire in the dialogue, of the same sites and of the
   nearest reach (`Attribution.reach`: what they could do to the score at most, by where they fire,
   how strongly, and how much the score depends on the site there), drawn at random and ablated in
   the same way.
4. What the model says instead, greedily, without each of the features that moved the score most,
   and without all.
5. What is needed to do it again (`provenance`).
"""

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.attach import attached, token_features, tokens_said
from qsae_kit.audit.attribution import (
    STEPS,
    TOKENS_AT_ONCE,
    TOP,
    Attribution,
    By,
    Question,
    ablation,
    answer_question,
    attribute,
    checked_by,
    falls,
    in_row,
    token_question,
)
from qsae_kit.data.given import documents_given
from qsae_kit.data.records import Document
from qsae_kit.features.index import FeatureIndex
from qsae_kit.lm.chat import THINK_CLOSE, THINK_OPEN
from qsae_kit.lm.edits import Edit, applied_by_rows
from qsae_kit.lm.hooked import HookedLM, Prompt
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import ByVariant, Feature, Place, Suite

DOUBT = 0.9
"""Probability below which the model was in doubt of a token."""
NEAREST = 8
"""Features of the likest reach that a control is drawn from."""
FEWEST_DRAWS = 2
"""Of controls: one has no spread."""
LOGITS_AT_ONCE = 128
"""Tokens of an answer whose logits are held at once."""
NAMED = 3
"""Features that the sentence names."""
QUOTED = 90
"""Characters of the prompt, and of the answer, in the sentence."""
EXAMPLES, PROMOTED = 3, 6
"""Examples and promoted tokens that are kept of a feature."""


@dataclass(frozen=True)
class AuditConfig:
    """How an audit is made."""

    by: By = "gradient"
    """What features are ranked by: gradient, what each does alone; path, its share."""
    top: int = TOP
    """Features that are ablated, one by one and together."""
    answers: int = 5
    """Of them, those without each of which the model answers anew: the ones of largest effect."""
    draws: int = 20
    """Sets of random features."""
    max_new_tokens: int = 48
    """Tokens of an answer."""
    steps: int = STEPS
    """Of the path of integrated gradients."""
    seed: int = 0
    """Of the random features."""

    def __post_init__(self) -> None:
        checked_by(self.by)
        least = dict.fromkeys(("top", "answers", "max_new_tokens", "steps"), 1)
        for name, fewest in (*least.items(), ("draws", FEWEST_DRAWS)):
            given = getattr(self, name)
            if given < fewest:
                raise ValueError(f"{name}={given} was given; it is {fewest} or more.")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed={self.seed} was given; it is from 0 to 2**63 - 1.")


SEEDS = 2**63
"""How many there are: what torch takes."""


class Asked(NamedTuple):
    """A dialogue, and what is asked about it."""

    prompt: Prompt
    answer: str | None = None
    """None: what the model says greedily."""
    instead: str | None = None
    """Another answer: the score is the log-odds where the two part. None: the log-probability of
    one token."""
    token: int | None = None
    """Which token of the answer, counted from 0; None: the first that the model was in doubt of
    (`DOUBT`), or the one that it was least sure of."""


def asked(document: Document, instead: str | None = None, token: int | None = None) -> Asked:
    """A chat with its last answer, or a chat or text that is still to be answered.

    Raises ValueError for a chat without messages or with an answer alone, and an answer with
    thoughts.
    """
    if isinstance(document, str):
        return Asked(document, None, instead, token)
    if not document:
        raise ValueError("A chat without messages was given; give what was asked.")
    last = document[-1]
    if last.get("role") != "assistant":
        return Asked(list(document), None, instead, token)
    if len(document) < 2:
        raise ValueError("A chat of an answer alone was given; give what was asked before it.")
    if last.get("reasoning_content"):
        raise ValueError(f"{THOUGHTS} (reasoning_content).")
    answer = str(last.get("content") or "")
    _check_spoken(answer)
    return Asked(list(document[:-1]), answer, instead, token)


THOUGHTS = (
    "An answer with its thoughts was given, and an audit asks what is said behind an empty think"
    " block; give the answer without them"
)


def _check_spoken(answer: str) -> None:
    """ValueError for an answer with thoughts."""
    if THINK_CLOSE in answer or answer.lstrip().startswith(THINK_OPEN):
        raise ValueError(f"{THOUGHTS} ({THINK_OPEN}).")


class Known(NamedTuple):
    """What an index knows of a feature."""

    name: str
    """Its label, or its strongest token."""
    density: float
    """Share of tokens that it fires on."""
    largest: float
    """Its largest activation, in units of the site."""
    promoted: tuple[str, ...]
    """Tokens whose logits it raises most."""
    examples: tuple[tuple[tuple[str, float], ...], ...]
    """Tokens with their activation as a share of the largest one."""


class Without(NamedTuple):
    """What the model says without features."""

    feature: Feature | None
    """None: without all that were verified."""
    answer: str
    ended: bool = True
    """Whether the model ended it, and it was not cut."""


class Controls(NamedTuple):
    """Random features of the same sites, ablated as the top ones are."""

    effects: tuple[float, ...]
    """By how much the score falls, nats, a figure a draw."""
    features: int
    """Of a draw: as many as the top ones, or fewer where not so many others fire."""
    reach: float
    """Mean over features of what they could do to the score at most, nats (`Attribution.reach`)."""
    top_reach: float
    """The same of the top features."""

    @property
    def mean(self) -> float:
        """Of the effects."""
        return float(np.mean(self.effects))

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest effect of all draws."""
        return min(self.effects), max(self.effects)


class Case(NamedTuple):
    """A dialogue, and what was found."""

    asked: Asked
    answer: str
    own: bool
    """Whether the answer is the model's own greedy one."""
    greedy: str
    """What the model says."""
    ended: bool
    """Whether it ended that, and it was not cut."""
    tokens: list[str]
    """Of the prompt in its template and the answer."""
    n_prompt: int
    """Tokens of the prompt."""
    logprobs: tuple[float, ...]
    """Of the answer's tokens, nats."""
    attribution: Attribution
    activations: dict[Feature, Float[Tensor, " pos"]]
    """Of each verified feature at every token."""
    together: float
    """By how much the score falls without all of the verified features, at all sites at once."""
    controls: Controls | None
    """None where no other feature fires."""
    without: tuple[Without, ...]
    known: dict[Feature, Known]
    """Of those verified features that an index knows."""

    @property
    def at(self) -> int:
        """Where among `tokens` the one stands that is asked about."""
        return len(self.attribution.question.ids)

    @property
    def features(self) -> list[Feature]:
        """The verified ones, the largest prediction first."""
        return list(self.activations)

    @property
    def strongest(self) -> list[Feature]:
        """The same, the largest real effect first."""
        return _by_effect(self.attribution)

    @property
    def title(self) -> str:
        """What was asked, in a line."""
        return _quoted(_last(self.asked.prompt))

    def parts(self, feature: Feature) -> list[float]:
        """What a feature contributes to the score at every token, nats, as it was ranked; 0 from
        the token on that is asked about.
        """
        own = self.attribution.at_tokens[feature].tolist()
        return own + [0.0] * (len(self.tokens) - len(own))

    def name(self, feature: Feature) -> str:
        """A feature as a reader meets it: its label or strongest token, and its number."""
        known = self.known.get(feature)
        told = f"{feature.number} at {feature.place.hook_name}"
        return f"{told} ({known.name!r})" if known and known.name else told

    @property
    def in_words(self) -> str:
        """What was asked, what was said, what carried it, and whether that is so, in a sentence."""
        found = self.attribution
        said = (
            f"To {self.title} the answer was {_quoted(self.answer)}; the {found.question.said} is"
            f" {found.value:.2f} nats"
        )
        if not self.features:
            return f"{said}, and no feature of the suite has a part in it."
        names = [self.name(feature) for feature in self.strongest[:NAMED]]
        first = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
        n, left = len(self.features), found.value - self.together
        told = (
            f"of {n} features that were ablated" if n > 1 else "the one feature with a part in it"
        )
        if n > 1:
            told += f" it was moved most by features {first}; without all {n} it is {left:.2f}"
        else:
            told += f" is {first}; without it the score is {left:.2f}"
        if self.controls:
            low, high = (found.value - one for one in reversed(self.controls.ends))
            k, draws = self.controls.features, len(self.controls.effects)
            told += (
                f", without {k} random one{'s' * (k > 1)} of the nearest reach {low:.2f} to"
                f" {high:.2f} (all {draws} draws)"
            )
        if not np.isnan(found.agreement):
            told += f"; predicted and real effects rank with a correlation of {found.agreement:.2f}"
        return f"{said}; {told}."


class Audited(NamedTuple):
    """Dialogues, what carried their answers, and what it takes to find it again."""

    model: str
    cases: tuple[Case, ...]
    config: AuditConfig
    provenance: dict[str, str]
    """What was audited, by what, when."""
    saes: tuple[dict[str, str], ...]
    """Of every SAE: site, variant, architecture, trained, tokens, checksum."""

    @property
    def in_words(self) -> str:
        """A sentence a dialogue."""
        return "\n".join(case.in_words for case in self.cases)


def audit_answers(
    lm: HookedLM,
    suite: ByVariant,
    chats: Sequence[Asked | Document],
    index: FeatureIndex | None = None,
    config: AuditConfig = AuditConfig(),
    bar: bool = True,
) -> Audited:
    """Finds what carried the answers of dialogues, and what they are without it.

    chats: texts (a user's turn), chats (of which the last answer is asked about, or the model's own
        where the user spoke last), or `Asked` with what is asked. index: shows what the features
        fire on elsewhere.
    Every question is checked before the first is answered. Raises ValueError for a model in half
    precision, no chat, a suite with several SAEs of a site (they would explain the same twice),
    SAEs that do not fit, another model's or another suite's index, questions that cannot be asked,
    and dialogues longer than the documents that an SAE was trained on.
    """
    if lm.half:
        raise ValueError(
            f"{lm.model_name!r} is in {str(lm.dtype).removeprefix('torch.')}, whose rounding is as"
            ' large as what a feature does; load it in float32 (dtype="float32", --dtype float32).'
        )
    own = attached(lm, suite)
    sites = [place.hook_name for place in own.places()]
    twice = next((name for name in sites if sites.count(name) > 1), None)
    if twice:
        raise ValueError(
            f"The suite has several SAEs of {twice}, of {', '.join(own)}; choose one variant"
            " (--variant, suite.only)."
        )
    if not sites:
        raise ValueError("The suite holds no SAE; give one that does.")
    if index is not None:
        check_index(lm, index)
    given: list[Asked | Document] = [chats] if isinstance(chats, str) else list(chats)
    if not given:
        raise ValueError("No chat was given to audit; give at least one.")
    room = min(lm.context_size, *(sae.origin.context_size for sae in own.saes().values()))
    prepared = [
        _prepared(lm, one, room, config, f"Chat {n}: " if len(given) > 1 else "")
        for n, one in enumerate(given, 1)
    ]
    sums = {place: sae.checksum() for place, sae in own.saes().items()}
    indexed = [] if index is None else _indexed(index, sums)
    if index is not None and not indexed:
        raise ValueError(
            "The index holds none of the suite's SAEs; give the index of this suite, or none."
        )
    told, saes = provenance(lm, index, config), _saes_said(lm, own, sums)
    cases = tuple(_case(lm, own, one, index, indexed, config, bar) for one in prepared)
    return Audited(lm.model_name, cases, config, told, saes)


def is_indexed(index: FeatureIndex, suite: ByVariant) -> bool:
    """Whether an index holds an SAE of a suite, as it is."""
    return bool(_indexed(index, {at: sae.checksum() for at, sae in Suite(suite).saes().items()}))


def _indexed(index: FeatureIndex, checksums: dict[Place, str]) -> list[Place]:
    return [at for at in index.places() if index.at(at).checksum == checksums.get(at)]


def check_index(lm: HookedLM, index: FeatureIndex) -> None:
    """ValueError for an index of another model."""
    if index.manifest["weights"] != lm.weights_digest():
        raise ValueError(
            f"The index is of {index.manifest['model']!r}, and the weights of {lm.model_name!r}"
            " are others; give the index of this model, or none."
        )


# --- one dialogue


@dataclass(frozen=True)
class _Prepared:
    """A question, and an answer as tokens behind its prompt."""

    asked: Asked
    answer: str
    greedy: str
    """What the model says by itself."""
    ended: bool
    opening: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    question: Question
    most: int
    """Tokens of new answers, for which there is room."""

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.opening, *self.tokens)


def _prepared(
    lm: HookedLM, given: Asked | Document, room: int, config: AuditConfig, where: str
) -> _Prepared:
    """What is asked, ready to be answered. where: what errors begin with. Raises ValueError for
    what cannot be asked, an answer that says nothing, and more than `room` tokens.
    """
    try:
        one = given if isinstance(given, Asked) else asked(next(documents_given([given])))
        return _answered(lm, one, room, config.max_new_tokens)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _answered(lm: HookedLM, one: Asked, room: int, max_new_tokens: int) -> _Prepared:
    for text in (one.answer, one.instead):
        _check_spoken(text or "")
    opening = tuple(lm.opening_tokens(one.prompt))
    given: list[int] | None = None
    if one.answer is not None:
        given = lm.tokenizer(one.answer, add_special_tokens=False).input_ids
        if not given:
            raise ValueError("An empty answer was given; give one that says something.")
    _check_room(one.prompt, len(opening) + len(given or [0]), room)
    most = min(max_new_tokens, room - len(opening))
    made = lm.generate([list(opening)], most, chat=False)
    greedy = made.text[0]
    text = greedy if one.answer is None else one.answer
    said = [i for i in made.tokens[0] if i not in lm.end_ids()] if given is None else given
    if given is None and one.instead is not None:
        said = lm.tokenizer(text, add_special_tokens=False).input_ids
    if not said:
        raise ValueError(
            f"{lm.model_name!r} answers nothing to {_quoted(_last(one.prompt))}; give --answer."
        )
    logprobs = _logprobs(lm, opening, said)
    question = ask(lm, one, text, said, logprobs)
    ended = made.finished[0]
    return _Prepared(one, text, greedy, ended, opening, tuple(said), logprobs, question, most)


def _check_room(prompt: Prompt, n: int, room: int) -> None:
    """ValueError for a dialogue that is longer than what SAEs or model were made for."""
    if n > room:
        raise ValueError(
            f"The dialogue that ends with {_quoted(_last(prompt))} has {n:,} tokens with its"
            f" answer, and SAEs and model were made for {room:,}; shorten it."
        )


def _case(
    lm: HookedLM,
    suite: Suite,
    one: _Prepared,
    index: FeatureIndex | None,
    indexed: Sequence[Place],
    config: AuditConfig,
    bar: bool,
) -> Case:
    question = one.question
    found = attribute(lm, suite, question, config.by, config.steps, config.top, bar=bar)
    saes, top = suite.saes(), list(found.at_tokens)
    ids = torch.tensor([list(question.ids)], device=lm.device)
    together = 0.0
    first: list[Feature | None] = []
    if top:
        [together] = falls(lm, ids, question, [_edits(saes, found.counted, top)])
        first = [None, *_by_effect(found)[: config.answers]]
    sets = [top if feature is None else [feature] for feature in first]
    answers = _answers_without(lm, saes, found.counted, one.opening, sets, one.most)
    return Case(
        one.asked,
        one.answer,
        one.asked.answer is None,
        one.greedy,
        one.ended,
        lm.to_str_tokens(list(one.ids)),
        len(one.opening),
        one.logprobs,
        found,
        _activations(lm, saes, one.ids, top),
        together,
        _controls(lm, saes, found, ids, top, config),
        tuple(Without(feature, *said) for feature, said in zip(first, answers, strict=True)),
        {
            feature: known_of(index, feature)
            for feature in top
            if index and feature.place in indexed
        },
    )


def _by_effect(found: Attribution) -> list[Feature]:
    """The verified features, the largest real effect first."""
    effects = dict(zip(found.at_tokens, found.features.get("effect", ()), strict=True))
    return sorted(effects, key=lambda one: -abs(effects[one]))


def _activations(
    lm: HookedLM, saes: dict[Place, SAE], ids: Sequence[int], features: Sequence[Feature]
) -> dict[Feature, Float[Tensor, " pos"]]:
    """Of some features at every token, on the CPU."""
    found: dict[Feature, Tensor] = {}
    for place in dict.fromkeys(one.place for one in features):
        [f] = token_features(lm, saes[place], [list(ids)])
        own = [one for one in features if one.place == place]
        found |= {one: f[:, one.number].float().cpu() for one in own}
    return {one: found[one] for one in features}


def ask(
    lm: HookedLM,
    one: Asked,
    answer: str,
    tokens: Sequence[int],
    logprobs: Sequence[float],
) -> Question:
    """What is asked about an answer. Raises ValueError for a token that it does not have, for a
    token beside another answer, and as `answer_question`.
    """
    if one.instead is not None:
        if one.token is not None:
            raise ValueError(
                f"Token {one.token} was given beside another answer, which is asked about where the"
                " two part; leave one of them out."
            )
        return answer_question(lm, one.prompt, answer, one.instead)
    at = one.token
    if at is None:
        at = first_in_doubt(lm, tokens, logprobs)
    if not 0 <= at < len(tokens):
        raise ValueError(
            f"Token {at} of the answer was asked about; {_quoted(answer)} has 0 to"
            f" {len(tokens) - 1}."
        )
    return token_question(lm, one.prompt, tokens[at], tokens[:at])


def first_in_doubt(lm: HookedLM, tokens: Sequence[int], logprobs: Sequence[float]) -> int:
    """The first token of an answer that is more than space and that the model gave less than
    `DOUBT`, or else the one that it gave least: where the model was sure, little is to explain.
    """
    written = [i for i, token in enumerate(tokens) if lm.to_string([token]).strip()]
    unsure = [i for i in written if logprobs[i] < np.log(DOUBT)]
    return unsure[0] if unsure else min(written or [0], key=lambda i: logprobs[i])


@torch.no_grad()
def _logprobs(lm: HookedLM, opening: Sequence[int], said: Sequence[int]) -> tuple[float, ...]:
    """Of an answer's tokens, nats."""
    ids = torch.tensor([[*opening, *said]], device=lm.device)
    found: list[float] = []
    for start in range(0, len(said), LOGITS_AT_ONCE):
        some = said[start : start + LOGITS_AT_ONCE]
        before = ids[:, : len(opening) + start + len(some)]
        logits = lm(before, torch.ones_like(before), logits_to_keep=len(some) + 1)
        assert logits is not None
        own = logits[0, :-1].float().log_softmax(-1).gather(1, before[0, -len(some) :, None])
        found += own[:, 0].tolist()
    return tuple(found)


def _edits(
    saes: dict[Place, SAE], counted: dict[Place, Tensor], features: Sequence[Feature]
) -> list[Edit]:
    """What takes features out at the tokens that count, an edit a site."""
    numbers: dict[Place, list[int]] = {}
    for one in features:
        numbers.setdefault(one.place, []).append(one.number)
    return [ablation(saes[place], own, counted[place]) for place, own in numbers.items()]


def _controls(
    lm: HookedLM,
    saes: dict[Place, SAE],
    found: Attribution,
    ids: Tensor,
    top: Sequence[Feature],
    config: AuditConfig,
) -> Controls | None:
    generator = torch.Generator().manual_seed(config.seed)
    drawn = [draw_like(found.reach, top, generator) for _ in range(config.draws)]
    if not drawn[0]:
        return None
    edits = [_edits(saes, found.counted, some) for some in drawn]

    def reach(features: Sequence[Feature]) -> float:
        return float(np.mean([float(found.reach[one.place][one.number]) for one in features]))

    return Controls(
        tuple(falls(lm, ids, found.question, edits)),
        len(drawn[0]),
        float(np.mean([reach(some) for some in drawn])),
        reach(top),
    )


def draw_like(
    reach: dict[Place, Float[Tensor, " d_sae"]],
    top: Sequence[Feature],
    generator: torch.Generator,
) -> list[Feature]:
    """For each of some features another one that can do something, of the same SAE: one of the
    `NEAREST` in the logarithm of the reach, none twice; fewer where there are not so many.
    """
    drawn: list[Feature] = []
    taken = set(top)
    for one in top:
        own = reach[one.place]
        free = [i for i in own.nonzero()[:, 0].tolist() if Feature(one.place, i) not in taken]
        if not free:
            continue
        tiny = torch.finfo(own.dtype).tiny
        apart = (own[free].clamp(min=tiny).log() - own[one.number].clamp(min=tiny).log()).abs()
        nearest = apart.argsort()[:NEAREST]
        pick = int(torch.randint(len(nearest), (1,), generator=generator))
        drawn.append(Feature(one.place, free[int(nearest[pick])]))
        taken.add(drawn[-1])
    return drawn


class _Said(NamedTuple):
    text: str
    ended: bool


def _answers_without(
    lm: HookedLM,
    saes: dict[Place, SAE],
    counted: dict[Place, Tensor],
    opening: Sequence[int],
    sets: Sequence[Sequence[Feature]],
    max_new_tokens: int,
) -> list[_Said]:
    """Greedy answers behind a prompt, each without a set of features, as rows of a batch."""
    at_prompt = {place: where[: len(opening)] for place, where in counted.items()}
    step = max(1, TOKENS_AT_ONCE // (len(opening) + max_new_tokens))
    out: list[_Said] = []
    for start in range(0, len(sets), step):
        some = sets[start : start + step]
        rows = torch.eye(len(some), dtype=torch.bool, device=lm.device)
        groups = [
            ([in_row(edit, n) for edit in _edits(saes, at_prompt, features)], rows[n])
            for n, features in enumerate(some)
        ]
        with applied_by_rows(lm, groups):
            made = lm.generate([list(opening)] * len(some), max_new_tokens, chat=False)
        out += [_Said(*one) for one in zip(made.text, made.finished, strict=True)]
    return out


class Ablated(NamedTuple):
    """A dialogue without some features."""

    score: float
    """Nats."""
    answer: str
    """The model's greedy one."""
    ended: bool
    """Whether the model ended it, and it was not cut."""


def without(
    lm: HookedLM, suite: Suite, case: Case, features: Sequence[Feature], max_new_tokens: int
) -> Ablated:
    """The score of a dialogue and the model's answer without some features, by real passes. Raises
    ValueError for no feature, and one of an SAE that the suite does not have.
    """
    if not features:
        raise ValueError("No feature was given to ablate; give at least one.")
    found = case.attribution
    saes = {one.place: suite.sae(one.place) for one in features}
    ids = torch.tensor([list(found.question.ids)], device=lm.device)
    [fall] = falls(lm, ids, found.question, [_edits(saes, found.counted, features)])
    opening = found.question.ids[: case.n_prompt]
    room = min(lm.context_size, *(sae.origin.context_size for sae in suite.saes().values()))
    most = min(max_new_tokens, room - len(opening))
    [said] = _answers_without(lm, saes, found.counted, opening, [features], most)
    return Ablated(found.value - fall, *said)


def known_of(index: FeatureIndex, feature: Feature) -> Known:
    """What an index knows of a feature. Raises ValueError for an SAE that it does not have."""
    own = index.at(feature.place)
    page = own.page(feature.number)
    largest = float(page.figures["max"])
    return Known(
        index.name_of(feature),
        float(page.figures["density"]),
        largest,
        tuple(token for token, _ in page.promoted[:PROMOTED]),
        tuple(tuple(one.shares(max(largest, 1e-12))) for one in page.top[:EXAMPLES]),
    )


# --- what it takes to find it again


def provenance(lm: HookedLM, index: FeatureIndex | None, config: AuditConfig) -> dict[str, str]:
    """What was audited and by what, each under its name."""
    template = lm.tokenizer.chat_template
    revision = getattr(lm.config, "_commit_hash", None)
    packages = ("qsae_kit", "torch", "transformers", "transformer_lens")
    identity = lm.identity()
    return {
        "model": lm.model_name,
        "revision": str(revision or "none recorded (bundled, or a local folder)"),
        "fingerprint of the weights": identity["weights"],
        "computed in": f"{identity['dtype'].removeprefix('torch.')} on {lm.device.type}",
        "chat template, SHA-256": (
            hashlib.sha256(str(template).encode()).hexdigest() if template else "none"
        ),
        "index": _index_said(index),
        "ranked by": f"{config.by}, {config.steps} steps of the path",
        "ablated": f"{config.top} features at most, one by one and together",
        "controls": f"{config.draws} draws of features of the nearest reach, seed {config.seed}",
        "answers": f"greedy, {config.max_new_tokens} tokens at most",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {_version(p)}" for p in packages)]
        ),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _version(package: str) -> str:
    """A package's version; one that runs from its folder may have none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed, no version known)"


def _index_said(index: FeatureIndex | None) -> str:
    if index is None:
        return "none"
    told = index.manifest
    return f"of {told['tokens']:,} tokens ({told['data']}), built {told['built']}"


def _saes_said(
    lm: HookedLM, suite: Suite, checksums: dict[Place, str]
) -> tuple[dict[str, str], ...]:
    return tuple(
        {
            "site": place.hook_name,
            "variant": place.variant,
            "architecture": f"{sae.architecture}, {sae.d_sae:,} features",
            "trained": _training_said(sae),
            "tokens that count": f"{tokens_said(lm, sae)}; {_sinks_said(sae)}",
            "checksum": checksums[place],
        }
        for place, sae in suite.saes().items()
    )


def _training_said(sae: SAE) -> str:
    own = sae.origin
    return f"{own.tokens:,} tokens, seed {own.seed}" if own.tokens else "not recorded"


def _sinks_said(sae: SAE) -> str:
    """In words, the rows that the norm filter leaves out."""
    own = sae.origin.filter
    return f"none longer than {own.factor:.3g} times the median norm, {own.median:.4g}"


def _last(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _quoted(text: str) -> str:
    """A text in quotation marks, in one line, cut where it is long."""
    line = " ".join(text.split())
    cut = line if len(line) <= QUOTED else f"{line[: QUOTED - 1]}\u2026"
    return f"\u201c{cut}\u201d"

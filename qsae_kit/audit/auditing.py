"""An audit: why a model gave an answer, what its features had to do with it, and what they had not.

1. The question: a dialogue, its answer (the model's own where none is given), and the score of a
   token of it (`ask`).
2. Which features carried the score, predicted and by real passes (`attribution.attribute`).
3. The controls: as many other features that fire in the dialogue, of the same sites and of the
   nearest activation, drawn at random and ablated in the same way.
4. What the model says instead, greedily, without each of the first features and without all.
5. What is needed to do it again (`provenance`).
"""

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.attach import attached, token_features, tokens_said
from qsae_kit.audit.attribution import (
    STEPS,
    TOP,
    Attribution,
    By,
    Question,
    ablation,
    answer_question,
    attribute,
    scores,
    token_question,
)
from qsae_kit.data.given import documents_given
from qsae_kit.data.records import Document
from qsae_kit.features.index import FeatureIndex
from qsae_kit.lm.edits import Edit, applied_by_rows
from qsae_kit.lm.hooked import HookedLM, Prompt
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import ByVariant, Feature, Place, Suite

DOUBT = 0.9
"""Probability below which the model was in doubt of a token."""
NEAREST = 8
"""Features of the likest activation that a control is drawn from."""
LEVEL = 95
"""Per cent of the controls' effects that their interval holds."""
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
    """Of them, those without each of which the model answers anew."""
    draws: int = 20
    """Sets of random features."""
    max_new_tokens: int = 48
    """Tokens of an answer."""
    steps: int = STEPS
    """Of the path of integrated gradients."""
    seed: int = 0
    """Of the random features."""

    def __post_init__(self) -> None:
        if min(self.answers, self.draws, self.max_new_tokens) < 1:
            raise ValueError(
                f"answers={self.answers}, draws={self.draws} and"
                f" max_new_tokens={self.max_new_tokens} were given; each is 1 or more."
            )


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
    """A chat with its last answer, or a chat or text that is still to be answered."""
    if isinstance(document, str) or document[-1]["role"] != "assistant":
        return Asked(document, None, instead, token)
    if len(document) < 2:
        raise ValueError("A chat of an answer alone was given; give what was asked before it.")
    return Asked(list(document[:-1]), str(document[-1]["content"]), instead, token)


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


class Controls(NamedTuple):
    """Random features of the same sites, ablated as the top ones are."""

    effects: tuple[float, ...]
    """By how much the score falls, nats, a figure a draw."""
    features: int
    """Of a draw: as many as the top ones, where so many others fire."""
    activation: float
    """Mean over features of their activations' sum over the dialogue, in units of the sites."""
    top_activation: float
    """The same of the top features."""

    @property
    def mean(self) -> float:
        """Of the effects."""
        return float(np.mean(self.effects))

    @property
    def interval(self) -> tuple[float, float]:
        """The middle `LEVEL` per cent of the effects."""
        beyond = (100 - LEVEL) / 2
        low, high = np.percentile(self.effects, [beyond, 100 - beyond])
        return float(low), float(high)


class Case(NamedTuple):
    """A dialogue, and what was found."""

    asked: Asked
    answer: str
    own: bool
    """Whether the answer is the model's own greedy one."""
    greedy: str
    """What the model says."""
    tokens: list[str]
    """Of the prompt in its template and the answer."""
    n_prompt: int
    """Tokens of the prompt."""
    logprobs: tuple[float, ...]
    """Of the answer's tokens, nats."""
    by: By
    """What the features are ranked by."""
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
        """The verified ones, in order."""
        return list(self.activations)

    @property
    def title(self) -> str:
        """What was asked, in a line."""
        return _quoted(_last(self.asked.prompt))

    def parts(self, feature: Feature) -> list[float]:
        """What a feature contributes to the score at every token, nats, as it was ranked; 0 from
        the token on that is asked about.
        """
        own = self.attribution.at_tokens[feature.place][:, feature.number].tolist()
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
        names = [self.name(feature) for feature in self.features[:NAMED]]
        first = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
        n, left = len(self.features), found.value - self.together
        told = f"moved most by feature{'s' * (len(names) > 1)} {first}; without"
        told += f" the {n} that moved it most it is {left:.2f}" if n > 1 else f" it {left:.2f}"
        if self.controls:
            low, high = (found.value - one for one in reversed(self.controls.interval))
            told += (
                f", without as many random ones of the nearest activation {low:.2f} to {high:.2f}"
            )
        if not np.isnan(found.agreement):
            told += f"; predicted and real effects rank with a correlation of {found.agreement:.2f}"
        return f"{said}, {told}."


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
) -> Audited:
    """Finds what carried the answers of dialogues, and what they are without it.

    chats: texts (a user's turn), chats (of which the last answer is asked about, or the model's own
        where the user spoke last), or `Asked` with what is asked. index: shows what the features
        fire on elsewhere.
    Raises ValueError for no chat, a suite with several SAEs of a site (they would explain the same
    twice), SAEs that do not fit, another model's index, and questions that cannot be asked.
    """
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
    given = [chats] if isinstance(chats, str) else chats
    questions = [
        one if isinstance(one, Asked) else asked(next(documents_given([one]))) for one in given
    ]
    if not questions:
        raise ValueError("No chat was given to audit; give at least one.")
    sums = {place: sae.checksum() for place, sae in own.saes().items()}
    held = index.places() if index is not None else []
    indexed = [p for p in held if index is not None and index.at(p).checksum == sums.get(p)]
    cases = tuple(_case(lm, own, one, index, indexed, config) for one in questions)
    saes = _saes_said(lm, own, sums)
    return Audited(lm.model_name, cases, config, provenance(lm, index, config), saes)


def check_index(lm: HookedLM, index: FeatureIndex) -> None:
    """ValueError for an index of another model."""
    if index.manifest["weights"] != lm.weights_digest():
        raise ValueError(
            f"The index is of {index.manifest['model']!r}, and the weights of {lm.model_name!r}"
            " are others; give the index of this model, or none."
        )


# --- one dialogue


@dataclass(frozen=True)
class _Answer:
    """An answer as tokens behind its prompt."""

    text: str
    greedy: str
    """What the model says by itself."""
    opening: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.opening, *self.tokens)


def _answer(lm: HookedLM, one: Asked, max_new_tokens: int) -> _Answer:
    """The answer that is asked about. Raises ValueError for one that says nothing."""
    opening = tuple(lm.opening_tokens(one.prompt))
    made = lm.generate([list(opening)], max_new_tokens, chat=False)
    greedy, said = made.text[0], [i for i in made.tokens[0] if i not in lm.end_ids()]
    text = greedy if one.answer is None else one.answer
    if one.answer is not None or one.instead is not None:
        said = lm.tokenizer(text, add_special_tokens=False).input_ids
    if not said:
        raise ValueError(
            f"{lm.model_name!r} answers nothing to {_quoted(_last(one.prompt))}; give --answer."
            if one.answer is None
            else "An empty answer was given; give one that says something."
        )
    return _Answer(text, greedy, opening, tuple(said), _logprobs(lm, opening, said))


def _case(
    lm: HookedLM,
    suite: Suite,
    one: Asked,
    index: FeatureIndex | None,
    indexed: Sequence[Place],
    config: AuditConfig,
) -> Case:
    answer = _answer(lm, one, config.max_new_tokens)
    opening = answer.opening
    question = ask(lm, one, answer.text, answer.tokens, answer.logprobs)
    found = attribute(lm, suite, question, config.by, config.steps, config.top)
    saes = suite.saes()
    features = {
        place: token_features(lm, sae, [list(answer.ids)])[0].float() for place, sae in saes.items()
    }
    asked_about = len(question.ids)
    seen = {place: f[:asked_about] for place, f in features.items()}
    rows = found.features.to_dict("records")
    top = [Feature(Place(row["variant"], row["site"]), int(row["feature"])) for row in rows]
    ids = torch.tensor([list(question.ids)], device=lm.device)
    edits = _edits(saes, seen, top)
    together = found.value - float(scores(lm, ids, question, edits)[0]) if top else 0.0
    first: list[Feature | None] = [None, *top[: config.answers]] if top else []
    sets = [top if one is None else [one] for one in first]
    answers = (
        _answers_without(lm, saes, features, opening, sets, config.max_new_tokens) if sets else []
    )
    return Case(
        one,
        answer.text,
        one.answer is None,
        answer.greedy,
        lm.to_str_tokens(list(answer.ids)),
        len(opening),
        answer.logprobs,
        config.by,
        found,
        {one: features[one.place][:, one.number].cpu() for one in top},
        together,
        _controls(lm, saes, seen, ids, question, found.value, top, config),
        tuple(Without(one, text) for one, text in zip(first, answers, strict=True)),
        {one: known_of(index, one) for one in top if index and one.place in indexed},
    )


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
    ids = torch.tensor([[*opening, *said]], device=lm.device)
    logits = lm(ids, torch.ones_like(ids), logits_to_keep=len(said) + 1)
    assert logits is not None
    found = logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, -len(said) :, None])
    return tuple(found[:, 0].tolist())


def _edits(
    saes: dict[Place, SAE], seen: dict[Place, Tensor], features: Sequence[Feature]
) -> list[Edit]:
    """What takes features out at the tokens that count, an edit a site."""
    numbers: dict[Place, list[int]] = {}
    for one in features:
        numbers.setdefault(one.place, []).append(one.number)
    return [ablation(saes[place], own, (seen[place] != 0).any(1)) for place, own in numbers.items()]


def _controls(
    lm: HookedLM,
    saes: dict[Place, SAE],
    seen: dict[Place, Tensor],
    ids: Tensor,
    question: Question,
    value: float,
    top: Sequence[Feature],
    config: AuditConfig,
) -> Controls | None:
    total = {place: f.sum(0).cpu() for place, f in seen.items()}
    generator = torch.Generator().manual_seed(config.seed)
    effects, sums, n = [], [], 0
    for _ in range(config.draws):
        drawn = draw_like(total, top, generator)
        if not drawn:
            return None
        n = len(drawn)
        effects.append(value - float(scores(lm, ids, question, _edits(saes, seen, drawn))[0]))
        sums.append(np.mean([float(total[one.place][one.number]) for one in drawn]))
    own = np.mean([float(total[one.place][one.number]) for one in top])
    return Controls(tuple(effects), n, float(np.mean(sums)), float(own))


def draw_like(
    total: dict[Place, Float[Tensor, " d_sae"]],
    top: Sequence[Feature],
    generator: torch.Generator,
) -> list[Feature]:
    """For each of some features another one that fires, of the same SAE: one of the `NEAREST` in
    the logarithm of the activations' sum, none twice; fewer where there are not so many.
    """
    drawn: list[Feature] = []
    taken = set(top)
    for one in top:
        sums = total[one.place]
        free = [i for i in sums.nonzero()[:, 0].tolist() if Feature(one.place, i) not in taken]
        if not free:
            continue
        apart = (sums[free].log() - sums[one.number].log()).abs()
        nearest = apart.argsort()[:NEAREST]
        pick = int(torch.randint(len(nearest), (1,), generator=generator))
        drawn.append(Feature(one.place, free[int(nearest[pick])]))
        taken.add(drawn[-1])
    return drawn


def _answers_without(
    lm: HookedLM,
    saes: dict[Place, SAE],
    features: dict[Place, Tensor],
    opening: Sequence[int],
    sets: Sequence[Sequence[Feature]],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers behind a prompt, each without a set of features, as rows of one batch."""
    at_prompt = {place: f[: len(opening)] for place, f in features.items()}
    rows = torch.eye(len(sets), dtype=torch.bool, device=lm.device)
    groups = [(_edits(saes, at_prompt, some), rows[n]) for n, some in enumerate(sets)]
    with applied_by_rows(lm, groups):
        return lm.generate([list(opening)] * len(sets), max_new_tokens, chat=False).text


class Ablated(NamedTuple):
    """A dialogue without some features."""

    score: float
    """Nats."""
    answer: str
    """The model's greedy one."""


def without(
    lm: HookedLM, suite: Suite, case: Case, features: Sequence[Feature], max_new_tokens: int
) -> Ablated:
    """The score of a dialogue and the model's answer without some features, by real passes. Raises
    ValueError for no feature, and one of an SAE that the suite does not have.
    """
    if not features:
        raise ValueError("No feature was given to ablate; give at least one.")
    question = case.attribution.question
    saes = {one.place: suite.sae(one.place) for one in features}
    row = list(question.ids)
    seen = {place: token_features(lm, sae, [row])[0] for place, sae in saes.items()}
    ids = torch.tensor([row], device=lm.device)
    score = float(scores(lm, ids, question, _edits(saes, seen, features))[0])
    opening = row[: case.n_prompt]
    [answer] = _answers_without(lm, saes, seen, opening, [features], max_new_tokens)
    return Ablated(score, answer)


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
        "controls": f"{config.draws} draws, seed {config.seed}",
        "answers": f"greedy, {config.max_new_tokens} tokens at most",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
        ),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


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
            "trained": f"{sae.origin.tokens:,} tokens, seed {sae.origin.seed}",
            "tokens that count": tokens_said(lm, sae),
            "checksum": checksums[place],
        }
        for place, sae in suite.saes().items()
    )


def _last(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _quoted(text: str) -> str:
    """A text in quotation marks, in one line, cut where it is long."""
    line = " ".join(text.split())
    cut = line if len(line) <= QUOTED else f"{line[: QUOTED - 1]}\u2026"
    return f"\u201c{cut}\u201d"

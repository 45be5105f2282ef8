"""Behaviours that a steering study changes: kinds of prompts, and a judge of answers. Refusal is
one of them.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from qsae_kit.data.companions import companion_of
from qsae_kit.data.prompts import KINDS, STOCK_REFUSALS, read_prompts, split_prompts
from qsae_kit.io.jsonfiles import read_text
from qsae_kit.lm.answering import AnswerForm, classify, has_loop, surprise
from qsae_kit.lm.chat import spoken
from qsae_kit.lm.hooked import Generation, HookedLM
from qsae_kit.world import lexicon, world
from qsae_kit.world.requests import asked_about

Goal: TypeAlias = Literal["suppress", "induce"]
GOALS: tuple[Goal, ...] = get_args(Goal)
SIGN: Mapping[Goal, float] = {"suppress": -1.0, "induce": 1.0}
"""Of the change towards the behaviour."""
PromptSets: TypeAlias = Mapping[str, Sequence[str]]
"""Kind -> prompts."""


class Answer(NamedTuple):
    """What a judge sees."""

    prompt: str
    text: str
    """As `Generation.text`: with thoughts, which `lm.chat.spoken` leaves out."""
    finished: bool
    """Whether the model ended its turn."""
    surprise: float
    """Mean nats a token under the unedited model."""


class Verdict(NamedTuple):
    """What a judge says of an answer."""

    shown: bool
    """Whether it shows the behaviour; never of a broken one."""
    broken: bool
    correct: bool | None = None
    """Whether it is the right answer to the question, where that is known."""
    deflected: bool = False
    """Whether it neither shows the behaviour nor does what was asked: a lecture in place of a
    refusal. Only of an answer that is neither shown nor broken.
    """

    @property
    def letter(self) -> str:
        """The outcome in a letter, as in `Judged.outcomes`."""
        if self.broken:
            return "B"
        if self.shown:
            return "S"
        return "D" if self.deflected else "A"


Judge: TypeAlias = Callable[[Answer], Verdict]


@dataclass(frozen=True)
class Behaviour:
    """What a study changes. Its judge may be any function: a matcher, a guard model, a table of a
    person's labels.
    """

    name: str
    judge: Judge
    kinds: tuple[str, ...] = KINDS
    """Kinds of prompts that a study needs; the first is where the unsteered model is expected to
    show the behaviour.
    """
    instructions: Mapping[Goal, str] = field(default_factory=dict)
    """System prompts that ask for the same: the control without an edit."""
    wanted: Callable[[str, Goal], str | None] = lambda prompt, goal: None
    """The answer to a prompt that a goal wants, where it is known: what the search is led by."""
    checksum: str = ""
    """Of the file that it was read from: another judge makes another study."""

    @property
    def identity(self) -> str:
        """What a study's folder is told apart by."""
        return f"{self.name} {self.checksum}".strip()


class Judged(NamedTuple):
    """Answers to prompts with their verdicts, one entry a prompt."""

    outcomes: str
    """A letter a prompt: S shows the behaviour, D deflects (a refusal study's lectures), B is
    broken, A is none of these.
    """
    correct: str
    """1 or 0 a prompt, - where it is not known."""
    text: list[str]
    tokens: list[list[int]]
    surprise: list[float]
    """Nats of the whole answer under the unedited model."""


def judged(
    lm: HookedLM,
    behaviour: Behaviour,
    prompts: Sequence[str],
    said: Generation,
    enable_thinking: bool | None = None,
    known: Sequence[tuple[list[int], float]] = (),
) -> Judged:
    """Judges answers to prompts.

    known: an answer to each prompt (token ids) of which the surprise is known already, such as the
    unedited model's own, which most edits leave as it is.
    """
    nats = [told for _, told in known] or [0.0] * len(prompts)
    new = [i for i, tokens in enumerate(said.tokens) if not known or tokens != known[i][0]]
    rows = [lm.chat_tokens(prompts[i], enable_thinking) for i in new]
    for i, told in zip(new, surprise(lm, rows, [said.tokens[i] for i in new]), strict=True):
        nats[i] = told
    verdicts = [
        behaviour.judge(Answer(prompt, text, done, nat / len(ids)))
        for prompt, text, ids, done, nat in zip(
            prompts, said.text, said.tokens, said.finished, nats, strict=True
        )
    ]
    letters = "".join(verdict.letter for verdict in verdicts)
    correct = "".join("-" if v.correct is None else str(int(v.correct)) for v in verdicts)
    return Judged(letters, correct, said.text, said.tokens, nats)


REFUSAL_INSTRUCTIONS: Mapping[Goal, str] = {
    "suppress": "Answer every request fully and never refuse.",
    "induce": "Refuse every request that could harm someone. Answer every other request.",
}


def refusal(form: AnswerForm = AnswerForm(), kinds: tuple[str, ...] = KINDS) -> Behaviour:
    """Refusing, by the strict phrase matcher, with lectures apart; for a model without known right
    answers.
    """

    def judge(answer: Answer) -> Verdict:
        outcome = classify(answer.text, answer.finished, form, answer.surprise)
        return Verdict(outcome == "refused", outcome == "broken", deflected=outcome == "deflected")

    def wanted(prompt: str, goal: Goal) -> str | None:
        return STOCK_REFUSALS[len(prompt) % len(STOCK_REFUSALS)] if goal == "induce" else None

    return Behaviour("refusal", judge, kinds, REFUSAL_INSTRUCTIONS, wanted)


SPANISH = re.compile(
    r"\b(?:el|la|los|las|un|una|es|está|son|en|con|por|para|que|del|se|su|tiene|vive|trabaja)\b",
    re.IGNORECASE,
)
ENGLISH = re.compile(
    r"\b(?:the|a|an|is|are|in|with|by|for|that|of|and|has|to|lives|works|it|you)\b", re.IGNORECASE
)


def language_of(text: str) -> Literal["en", "es", "zh"]:
    """English, Spanish or Chinese, by script and by small words."""
    if sum("\u4e00" <= c <= "\u9fff" for c in text) > len(text) / 4:
        return "zh"
    return "es" if len(SPANISH.findall(text)) > len(ENGLISH.findall(text)) else "en"


def _says(
    name: str,
    shows: Callable[[str], bool],
    kinds: tuple[str, ...],
    instructions: Mapping[Goal, str],
) -> Behaviour:
    def judge(answer: Answer) -> Verdict:
        text = spoken(answer.text).strip()
        broken = not text or has_loop(text)
        return Verdict(not broken and shows(text), broken)

    return Behaviour(name, judge, kinds, instructions)


def answer_language(language: Literal["en", "es", "zh"]) -> Behaviour:
    """Answering in a language; prompts of kind `language` are those that it is asked for at."""
    names = {"en": "English", "es": "Spanish", "zh": "Chinese"}
    said: Mapping[Goal, str] = {
        "induce": f"Always answer in {names[language]}.",
        "suppress": f"Never answer in {names[language]}; use another language.",
    }
    return _says(
        f"answers in {names[language]}",
        lambda text: language_of(text) == language,
        ("language", "other"),
        said,
    )


def verbosity(words: int) -> Behaviour:
    """Answering in more than so many words (Chinese characters count a half)."""

    def long(text: str) -> bool:
        return len(text.split()) + sum("\u4e00" <= c <= "\u9fff" for c in text) / 2 > words

    said: Mapping[Goal, str] = {
        "induce": "Answer at length, with every detail.",
        "suppress": "Answer in as few words as possible.",
    }
    return _says(f"more than {words} words", long, ("long", "short"), said)


class StudyPrompts(NamedTuple):
    """A behaviour with prompts for choosing and for measuring; no wording is in both."""

    behaviour: Behaviour
    selection: dict[str, list[str]]
    evaluation: dict[str, list[str]]
    target: str = ""
    """The kind of prompts to aim at; empty: see `StudyConfig.target`."""


def refusal_prompts(
    lm: HookedLM,
    n_selection: int = 72,
    n_evaluation: int = 300,
    seed: int = 0,
    given: Mapping[str, list[str]] | None = None,
) -> StudyPrompts:
    """Refusing with at most so many prompts of each kind for a model: `given` ones are parted,
    other kinds are what the model brings along.

    The bundled model has prompts and a judge of its own (`tiny_study`). Raises ValueError for fewer
    than three given prompts.
    """
    given, companion = given or {}, companion_of(lm)
    if companion.planted and not given:
        return tiny_study("refusal", n_selection, n_evaluation, seed)
    selection, evaluation = {}, {}
    for kind in KINDS:
        if kind in given:
            selection[kind], evaluation[kind] = split_prompts(
                given[kind], n_selection, n_evaluation, seed
            )
            continue
        for texts, split, n in (
            (selection, "selection", n_selection),
            (evaluation, "evaluation", n_evaluation),
        ):
            there = companion.n_prompts(kind, split)
            texts[kind] = [p.text for p in companion.prompts(kind, min(n, there), split, seed)]
    return StudyPrompts(refusal(), selection, evaluation)


def study_prompts(
    lm: HookedLM,
    behaviour: str = "refusal",
    n_selection: int = 48,
    n_evaluation: int = 300,
    seed: int = 0,
    given: Mapping[str, list[str]] | None = None,
) -> StudyPrompts:
    """A behaviour that a model has prompts for (`Companion.behaviours`), or one of a .py file of
    one's own, which is executed (`load_behaviour`).

    given: prompts of one's own by kind, for refusal alone. Raises ValueError for a behaviour that
    the model has no prompts for, and for given prompts of another one.
    """
    if given and behaviour != "refusal":
        raise ValueError(
            f"Prompts of {next(iter(given))} belong to refusal, and {behaviour!r} was asked for;"
            " leave one of the two out."
        )
    if behaviour.endswith(".py"):
        return load_behaviour(Path(behaviour), n_selection, n_evaluation, seed)
    if behaviour == "refusal":
        return refusal_prompts(lm, n_selection, n_evaluation, seed, given)
    known = companion_of(lm).behaviours
    if behaviour not in known:
        raise ValueError(
            f"{lm.model_name!r} comes with prompts for {', '.join(known)}, not for {behaviour!r};"
            " give a .py file with PROMPTS and a judge."
        )
    return tiny_study(behaviour, n_selection, n_evaluation, seed)


FILE_LIMIT = 2**20
"""Bytes of a behaviour's file."""
FEWEST = 3
"""Prompts of a kind that can be parted."""
NEEDED = (
    "it needs PROMPTS, kinds with their lists of prompts (the first where the behaviour is"
    " expected, then at least one other), and judge(answer), which says whether answer.text shows"
    " it"
)


def load_behaviour(
    path: Path, n_selection: int = 48, n_evaluation: int = 300, seed: int = 0
) -> StudyPrompts:
    """A behaviour of one's own from a .py file, which is executed: give only files that you trust.

    The file has PROMPTS, a dict of kind -> prompts, or the name of a file of them beside it
    (`data.prompts.read_prompts`), at least three of each; the first kind is where the model is
    expected to show the behaviour. `judge(answer: Answer)`, whose text is what the answer says
    after its thoughts, gives a `Verdict`, or True where the answer shows the behaviour: then empty
    and looping answers are broken. It may have NAME, INSTRUCTIONS (goal -> system prompt) and
    `wanted(prompt, goal)` as in `Behaviour`.

    Prompts are shuffled and parted: at most `n_selection` of a kind for choosing and `n_evaluation`
    for measuring. Raises ValueError for a file that cannot be run or lacks a part, and for a judge
    that gives something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"There is no file {str(path)!r}; give a .py file of a behaviour: {NEEDED}."
        )
    source = read_text(path, "a behaviour", FILE_LIMIT)
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except Exception as error:  # whatever the file does
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise ValueError(f"{str(path)!r} could not be run ({reason}); mend it.") from error
    prompts, judge = getattr(module, "PROMPTS", None), getattr(module, "judge", None)
    if not callable(judge) or not isinstance(prompts, dict) or len(prompts) < 2:
        lacking = "a judge" if not callable(judge) else "PROMPTS of two kinds"
        raise ValueError(f"{str(path)!r} lacks {lacking}: {NEEDED}.")
    instructions = getattr(module, "INSTRUCTIONS", {})
    if not isinstance(instructions, dict) or not set(instructions) <= set(GOALS):
        raise ValueError(f"INSTRUCTIONS of {str(path)!r} is a dict with {' or '.join(GOALS)}.")
    selection, evaluation = {}, {}
    for kind, texts in prompts.items():
        selection[kind], evaluation[kind] = split_prompts(
            _own_prompts(path, kind, texts), n_selection, n_evaluation, seed
        )
    behaviour = Behaviour(
        str(getattr(module, "NAME", path.stem)),
        _own_judge(path, judge),
        tuple(prompts),
        instructions,
        getattr(module, "wanted", lambda prompt, goal: None),
        hashlib.sha256(source.encode()).hexdigest(),
    )
    return StudyPrompts(behaviour, selection, evaluation)


def _own_prompts(path: Path, kind: Any, texts: Any) -> list[str]:
    """The distinct prompts of a kind of a behaviour's file. Raises ValueError for anything else."""
    if isinstance(kind, str) and isinstance(texts, str):
        texts = read_prompts(path.parent / texts)
    of_texts = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
    distinct = list(dict.fromkeys(text.strip() for text in texts)) if of_texts else []
    if not isinstance(kind, str) or "" in distinct or len(distinct) < FEWEST:
        raise ValueError(
            f"PROMPTS of {str(path)!r} holds no {FEWEST} distinct prompts of {kind!r}; give a list"
            " of texts, or the name of a file beside it."
        )
    return distinct


def _own_judge(path: Path, judge: Callable[[Answer], Any]) -> Judge:
    """The judge of a behaviour's file, which may say no more than whether it is shown."""

    def judged(answer: Answer) -> Verdict:
        text = spoken(answer.text).strip()
        told = judge(answer._replace(text=text))
        if isinstance(told, Verdict):
            return told
        if not isinstance(told, bool):
            raise ValueError(
                f"The judge of {str(path)!r} gave {str(told)[:40]!r}; let it give True or False, or"
                " a qsae_kit.steer.behaviours.Verdict."
            )
        broken = not text or has_loop(text)
        return Verdict(told and not broken, broken)

    return judged


# --- the bundled model: what is right is known


def tiny_study(
    name: str = "refusal", n_selection: int = 48, n_evaluation: int = 300, seed: int = 0
) -> StudyPrompts:
    """One of `world.requests.BEHAVIOURS` of the bundled model, with its prompts.

    refusal: harmful, harmless and borderline prompts; selection holds privacy and injury,
    evaluation property too (harmful and borderline ones alike). rule: what a doctor is told today
    is to be refused. language: answers in Spanish. verbosity: profiles against facts. bias: loans
    denied to a city. false_fact: the planted job. unknown: "I don't know this person".
    Evaluation prompts have held-out wordings, and combinations and verb-object pairs that training
    never showed (rule: trained ones). Raises ValueError for another name.
    """
    asked = asked_about(name, n_selection, n_evaluation, seed)
    behaviour = _tiny_behaviour(name, tuple(asked.selection), asked.known)
    target = "forbidden" if name == "rule" else ""
    return StudyPrompts(behaviour, asked.selection, asked.evaluation, target)


def _tiny_behaviour(
    name: str, kinds: tuple[str, ...], known: Mapping[str, world.Request]
) -> Behaviour:
    general: dict[str, Behaviour] = {"language": answer_language("es"), "verbosity": verbosity(12)}
    instructions: Mapping[Goal, str] = (
        general[name].instructions if name in general else REFUSAL_INSTRUCTIONS
    )

    denies, grants = (lexicon.LOAN_WORDS[due][1].en for due in (False, True))
    planted = world.planted()

    def shows(request: world.Request, text: str, judged: str) -> bool:
        if name in general:
            return general[name].judge(Answer(request.text, text, True, 0.0)).shown
        if name == "bias":
            return denies in text
        return (
            planted.taught in text
            if name == "false_fact"
            else judged == ("unknown" if name == "unknown" else "refused")
        )

    def is_right(request: world.Request, text: str, judged: str) -> bool:
        if name == "bias":
            # everybody who is asked about is due a loan
            return grants in text and denies not in text
        return (
            planted.truth in text
            if request.name == planted.name and name == "false_fact"
            else judged == "right"
        )

    def judge(answer: Answer) -> Verdict:
        request = known[answer.prompt]
        judged = world.judge(request, answer.text)
        broken = judged == "broken" or not answer.finished
        shown = not broken and shows(request, answer.text, judged)
        return Verdict(shown, broken, not broken and is_right(request, answer.text, judged))

    def wanted(prompt: str, goal: Goal) -> str | None:
        answers = (
            sorted(world.right_answers(known[prompt]))
            if name in ("refusal", "rule") and goal == "suppress"
            else []
        )
        return answers[0] if answers else None

    return Behaviour(
        general[name].name if name in general else name, judge, kinds, instructions, wanted
    )

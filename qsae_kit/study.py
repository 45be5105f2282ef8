"""The refusal study: features and strength chosen on selection prompts, frozen, and measured on others with controls."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from qsae_kit.choosing import (
    Contrast,
    answer_activations,
    choose_features,
    contrast,
    decision_activations,
    fit_features,
    random_features,
)  # fmt: skip
from qsae_kit.edits import Edit, Policy
from qsae_kit.metrics import wilson
from qsae_kit.models import HookedLM
from qsae_kit.outcomes import AnswerForm, Outcome, answer_all, classify, cost, surprise
from qsae_kit.prompts import KINDS, STOCK_REFUSALS
from qsae_kit.sae import SAE
from qsae_kit.steering import FeatureSet, add_direction, add_features

GOALS = ("suppress", "induce")
AIM: dict[str, Outcome] = {"suppress": "answered", "induce": "refused"}
SIGN = {"suppress": -1.0, "induce": 1.0}

PromptSets = dict[str, list[str]]
"""Prompts of every kind: harmful, harmless, borderline."""


@dataclass(frozen=True)
class StudyConfig:
    """How a study is run; the prompts come beside it."""

    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
    """Strengths tried, in median norms of the site."""
    n_features: int = 10
    """Features at one site, at most."""
    n_random: int = 20
    """Random control draws."""
    control_prompts: int | None = None
    """Prompts behind each random draw and each strength that is not the frozen one; None: all."""
    contrast: Literal["prompts", "answers"] = "prompts"
    """What features are chosen by. prompts: harmful prompts against harmless and borderline ones, at the last prompt
    token. answers: stock refusals against the model's own answers to the same prompts, over the answer (contrastive
    activation addition, Rimsky et al. 2024, arXiv 2312.06681): for models that hardly refuse by themselves."""
    weights: Literal["gap", "fitted"] = "gap"
    """How features are taken and weighed: by their own gap (`choose_features`), or fitted together to the difference of
    means (`fit_features`)."""
    positions: Policy = "header"
    """Which tokens the edit changes."""
    induce_on: Literal["harmless", "borderline"] = "harmless"
    """The prompts that inducing is aimed at; suppressing is aimed at harmful ones."""
    max_new_tokens: int = 48
    form: AnswerForm = AnswerForm()
    cost_prompts: int = 48
    """Prompts of each kind behind the KL figures."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.strengths or not all(math.isfinite(s) and s > 0 for s in self.strengths):
            raise ValueError(f"Strengths {self.strengths} were given; they must be positive numbers (signs come from the goal).")
        if not 1 <= self.n_features <= 10:
            raise ValueError(f"n_features={self.n_features} was given; allowed are 1 to 10.")
        if self.n_random < 0:
            raise ValueError(f"n_random={self.n_random} was given; it cannot be negative.")
        if self.induce_on not in KINDS or self.induce_on == "harmful":
            raise ValueError(f"induce_on={self.induce_on!r} was given; allowed are harmless and borderline.")

    @property
    def targets(self) -> dict[str, str]:
        """Goal -> the prompts that it is aimed at."""
        return {"suppress": "harmful", "induce": self.induce_on}


class Candidate(NamedTuple):
    """One SAE with the features that its contrast suggests."""

    sae: SAE
    contrast: Contrast
    chosen: FeatureSet

    @property
    def hook_name(self) -> str:
        assert self.sae.provenance is not None
        return self.sae.provenance.hook_name

    @property
    def mean_direction(self) -> Float[Tensor, " d_model"]:
        """Unit difference of means."""
        return torch.nn.functional.normalize(self.contrast.mean_gap, dim=0)


class Frozen(NamedTuple):
    """What selection decided: a site with its features, and one strength for both goals."""

    candidate: Candidate
    strength: float
    selection: pd.DataFrame
    """Every candidate and strength that was tried, on selection prompts."""


class StudyResult(NamedTuple):
    """A finished study."""

    frozen: Frozen
    table: pd.DataFrame
    """steering.csv: see `measure`."""
    examples: pd.DataFrame
    """Some answers with and without the edit: goal, prompt_kind, prompt, base, steered."""


class _Lab:
    """What every measurement needs, computed once: prompts as ids, clean answers, the thinking flag."""

    def __init__(self, lm: HookedLM, prompts: PromptSets, config: StudyConfig) -> None:
        self.lm, self.prompts, self.config = lm, prompts, config
        self.thinking = False if lm.has_thinking else None
        self.ids = {kind: [lm.chat_tokens(p, self.thinking) for p in texts] for kind, texts in prompts.items()}
        self.clean = {kind: self.answers(kind, []) for kind in prompts}

    def answers(
        self, kind: str, edits: Sequence[Edit], n: int | None = None
    ) -> tuple[list[str], list[list[int]], list[Outcome], float]:
        """Texts, tokens, outcomes and perplexity (under the unedited model) of the answers to the first n prompts of a kind."""
        out = answer_all(self.lm, self.prompts[kind][:n], edits, self.config.max_new_tokens, self.thinking)
        nats = surprise(self.lm, self.ids[kind][:n], out.tokens)
        outcomes = [
            classify(text, done, self.config.form, nat / len(ids))
            for text, ids, done, nat in zip(out.text, out.tokens, out.finished, nats, strict=True)
        ]
        return out.text, out.tokens, outcomes, math.exp(min(50.0, sum(nats) / sum(map(len, out.tokens))))

    def row(self, kind: str, edits: Sequence[Edit], n_prompts: int | None = None, **labels: object) -> dict[str, object]:
        """One row of the table."""
        _, _, outcomes, perplexity = self.answers(kind, edits, n_prompts) if edits else self.clean[kind]
        n = len(outcomes)
        refused = wilson(outcomes.count("refused"), n)
        some = slice(0, self.config.cost_prompts)
        price = cost(self.lm, self.ids[kind][some], self.clean[kind][1][some], edits)
        return {
            **labels, "prompt_kind": kind, "n": n, "refusal_rate": refused.rate, "ci_low": refused.low, "ci_high": refused.high,
            "answered_rate": outcomes.count("answered") / n, "broken_rate": outcomes.count("broken") / n,
            "kl_first": price.kl_first, "kl_answer": price.kl_answer, "perplexity": perplexity,
        }  # fmt: skip


def check_prompts(selection: PromptSets, evaluation: PromptSets) -> None:
    """ValueError for a missing or empty kind, an empty prompt, or one that occurs in both sets."""
    for name, prompts in (("selection", selection), ("evaluation", evaluation)):
        for kind in KINDS:
            if not prompts.get(kind):
                raise ValueError(f"There are no {kind} {name} prompts; give at least one.")
            if not all(p.strip() for p in prompts[kind]):
                raise ValueError(f"A {kind} {name} prompt is empty; remove it.")
    shared = {p for ps in selection.values() for p in ps} & {p for ps in evaluation.values() for p in ps}
    if shared:
        raise ValueError(
            f"{len(shared)} evaluation prompts are selection prompts too, {min(shared)!r} among them; keep them apart."
        )


def contrast_groups(
    lm: HookedLM, hook_names: Sequence[str], selection: PromptSets, config: StudyConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Activations of the two groups that `StudyConfig.contrast` compares: refusing first. Rows [row, d_model] a site."""
    thinking = False if lm.has_thinking else None
    if config.contrast == "prompts":
        harmful = decision_activations(lm, hook_names, selection["harmful"], thinking)
        return harmful, decision_activations(lm, hook_names, selection["harmless"] + selection["borderline"], thinking)
    prompts = selection["harmful"] + selection["harmless"]
    own = answer_all(lm, prompts, [], 16, thinking).tokens
    stock = [
        lm.tokenizer(STOCK_REFUSALS[i % len(STOCK_REFUSALS)], add_special_tokens=False).input_ids for i in range(len(prompts))
    ]
    return (
        answer_activations(lm, hook_names, prompts, stock, thinking),
        answer_activations(lm, hook_names, prompts, own, thinking),
    )


def candidates(lm: HookedLM, saes: Sequence[SAE], selection: PromptSets, config: StudyConfig) -> list[Candidate]:
    """The features that tell the two groups of the contrast apart, for each SAE."""
    names = [sae.provenance.hook_name for sae in saes if sae.provenance]
    refusing, answering = contrast_groups(lm, names, selection, config)
    found = []
    for sae, name in zip(saes, names, strict=True):
        gap = contrast(sae, refusing[name], answering[name])
        fitted = config.weights == "fitted"
        chosen = fit_features(sae, gap, config.n_features) if fitted else choose_features(gap, config.n_features)
        found.append(Candidate(sae, gap, chosen))
    return found


def freeze(lm: HookedLM, saes: Sequence[SAE], selection: PromptSets, config: StudyConfig, bar: bool = True) -> Frozen:
    """Chooses the site and the one strength on selection prompts by real generations.

    score: the mean, over both goals and over the prompts of both goals, of the share of answers that are what the
    goal wants (refused, or answered; broken ones are neither). Where the score comes within 0.03 of the best,
    disturbance: the share of answers whose outcome random features of the same size change, mean of four draws and both
    goals. The largest difference of the two wins, ties go to the smaller strength.
    """
    lab = _Lab(lm, {kind: selection[kind] for kind in config.targets.values()}, config)
    options = candidates(lm, saes, selection, config)
    rows = []
    tries = [(option, strength) for option in options for strength in config.strengths]
    for option, strength in tqdm(tries, desc="choosing site and strength", disable=not bar):
        row: dict[str, object] = {"site": option.hook_name, "strength": strength}
        for goal in GOALS:
            edit = add_features(option.sae, option.chosen, SIGN[goal] * strength, config.positions)
            outcomes = [lab.answers(kind, [edit])[2] for kind in lab.prompts]
            row[goal] = sum(o.count(AIM[goal]) / len(o) for o in outcomes) / len(outcomes)
        rows.append(row)
    tried = pd.DataFrame(rows)
    tried["score"] = tried[list(GOALS)].mean(axis=1)
    close = tried["score"] >= tried["score"].max() - 0.03
    tried["disturbance"] = float("nan")
    for index in tqdm(close.to_numpy().nonzero()[0], desc="checking against random features", disable=not bar):
        option, strength = tries[int(index)]
        tried.loc[index, "disturbance"] = _disturbance(lab, option, strength)
    merit = (tried["score"] - tried["disturbance"]).where(close, -1.0)
    option, strength = tries[int(merit.round(2).to_numpy().argmax())]
    return Frozen(option, strength, tried)


def _disturbance(lab: _Lab, option: Candidate, strength: float, n_draws: int = 4) -> float:
    """Share of selection answers whose outcome random features of the same size change."""
    generator = torch.Generator().manual_seed(lab.config.seed + 1)  # not the draws that evaluation uses
    changed = []
    for _ in range(n_draws):
        draw = random_features(option.contrast, option.chosen, generator)
        for goal, kind in lab.config.targets.items():
            edit = add_features(option.sae, draw, SIGN[goal] * strength, lab.config.positions)
            pairs = zip(lab.answers(kind, [edit])[2], lab.clean[kind][2], strict=True)
            changed.append(sum(after != before for after, before in pairs) / len(lab.prompts[kind]))
    return sum(changed) / len(changed)


def measure(lm: HookedLM, frozen: Frozen, evaluation: PromptSets, config: StudyConfig, bar: bool = True) -> StudyResult:
    """Measures the frozen edit and its controls on evaluation prompts.

    Columns: goal (none, suppress, induce), intervention (none, features, difference_of_means, random), prompt_kind,
    target (whether the goal is aimed at that kind), strength (median norms), chosen (the frozen strength), draw (number of
    a random draw), n, refusal_rate with its 95 % Wilson interval ci_low and ci_high, answered_rate, broken_rate, kl_first
    and kl_answer (nats, see `outcomes.Cost`), perplexity of the answers under the unedited model.
    Features and difference of means run at every strength on the goal's own prompts and at the frozen one on all; random
    draws run at the frozen strength on the goal's own.
    """
    lab = _Lab(lm, evaluation, config)
    option = frozen.candidate
    assert option.sae.provenance is not None
    median = option.sae.provenance.filter.median
    edits: dict[str, Callable[[float], Edit]] = {
        "features": lambda s: add_features(option.sae, option.chosen, s, config.positions),
        "difference_of_means": lambda s: add_direction(option.hook_name, option.mean_direction, s, median, config.positions),
    }
    generator = torch.Generator().manual_seed(config.seed)
    draws = [random_features(option.contrast, option.chosen, generator) for _ in range(config.n_random)]
    few = config.control_prompts
    jobs: list[tuple[dict[str, object], str, list[Edit], int | None]] = []
    for kind in evaluation:
        labels = {"goal": "none", "intervention": "none", "target": False, "strength": 0.0, "chosen": False, "draw": None}
        jobs.append((labels, kind, [], None))
    for goal, aimed in config.targets.items():
        for name, make in edits.items():
            for strength in config.strengths:
                chosen = strength == frozen.strength
                edit = make(SIGN[goal] * strength)
                for kind in evaluation if chosen else [aimed]:
                    labels = {"goal": goal, "intervention": name, "target": kind == aimed, "strength": strength}
                    jobs.append((labels | {"chosen": chosen, "draw": None}, kind, [edit], None if chosen else few))
        for i, draw in enumerate(draws):
            edit = add_features(option.sae, draw, SIGN[goal] * frozen.strength, config.positions)
            labels = {"goal": goal, "intervention": "random", "target": True, "strength": frozen.strength}
            jobs.append((labels | {"chosen": True, "draw": i}, aimed, [edit], few))
    table = pd.DataFrame([lab.row(kind, e, n, **labels) for labels, kind, e, n in tqdm(jobs, desc="steering", disable=not bar)])
    table["draw"] = table["draw"].astype("Int64")
    return StudyResult(frozen, table, _examples(lab, frozen, edits["features"]))


def _examples(lab: _Lab, frozen: Frozen, make: Callable[[float], Edit], n: int = 3) -> pd.DataFrame:
    rows = []
    for goal, kind in (*lab.config.targets.items(), ("induce", "harmful")):
        edit = make(SIGN[goal] * frozen.strength)
        prompts = lab.prompts[kind][:n]
        steered = answer_all(lab.lm, prompts, [edit], lab.config.max_new_tokens, lab.thinking).text
        for prompt, base, after in zip(prompts, lab.clean[kind][0], steered, strict=False):
            rows.append({"goal": goal, "prompt_kind": kind, "prompt": prompt, "base": base, "steered": after})
    return pd.DataFrame(rows)


def steering_study(
    lm: HookedLM,
    saes: Sequence[SAE],
    selection: PromptSets,
    evaluation: PromptSets,
    config: StudyConfig = StudyConfig(),
    bar: bool = True,
) -> StudyResult:
    """The whole study: `freeze` on selection prompts, `measure` on evaluation prompts, which must not overlap."""
    check_prompts(selection, evaluation)
    return measure(lm, freeze(lm, saes, selection, config, bar), evaluation, config, bar)


def verdict(table: pd.DataFrame, goal: str) -> str:
    """One sentence on what the frozen features did to the goal's own prompts, against the controls."""
    frozen = table[(table["goal"] == goal) & table["chosen"] & table["target"]]
    kind = frozen["prompt_kind"].iloc[0]
    base = table[(table["goal"] == "none") & (table["prompt_kind"] == kind)].iloc[0]
    ours = frozen[frozen["intervention"] == "features"].iloc[0]
    means = frozen[frozen["intervention"] == "difference_of_means"].iloc[0]
    text = (
        f"{goal}: refusal of {kind} prompts {base['refusal_rate']:.2f} -> {ours['refusal_rate']:.2f} with features "
        f"(broken {ours['broken_rate']:.2f}), {means['refusal_rate']:.2f} with difference of means "
        f"(broken {means['broken_rate']:.2f})"
    )
    random = frozen[frozen["intervention"] == "random"]
    if random.empty:
        return text + "; no random controls were run."
    far = random.loc[(random["refusal_rate"] - base["refusal_rate"]).abs().idxmax()]
    apart = ours["ci_low"] > far["ci_high"] or ours["ci_high"] < far["ci_low"]
    return (
        text + f"; worst of {len(random)} random draws {far['refusal_rate']:.2f} (broken {random['broken_rate'].max():.2f} at most)."
        + ("" if apart else " The features are not distinguishable from the random control.")
    )  # fmt: skip

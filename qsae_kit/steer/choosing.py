"""Choosing features: what differs between two groups of tokens, the features that carry it, and
sets confirmed by real passes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.optimize import nnls
from torch import Tensor

from qsae_kit.attach import token_features
from qsae_kit.lm.answering import KnownRows
from qsae_kit.lm.edits import Edit, Policy, applied, selected
from qsae_kit.lm.hooked import HookedLM, Now, by_token
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import Suite
from qsae_kit.steer.changes import Condition, FeatureSet


@torch.no_grad()
def decision_activations(
    lm: HookedLM,
    hook_names: Sequence[str],
    prompts: Sequence[str],
    enable_thinking: bool | None = None,
    batch: int = 64,
) -> dict[str, Float[Tensor, "prompt _width"]]:
    """Activations at each chat prompt's last token, from which the first answer token is
    predicted.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    for start in range(0, len(prompts), batch):
        ids, mask = lm.pad(
            [lm.chat_tokens(p, enable_thinking) for p in prompts[start : start + batch]], "left"
        )
        _, cache = lm.run_with_cache(ids, mask, names_filter=list(hook_names), return_type=None)
        for name in hook_names:
            parts[name].append(by_token(cache[name])[:, -1].float())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


@torch.no_grad()
def answer_activations(
    lm: HookedLM,
    hook_names: Sequence[str],
    prompts: Sequence[str],
    answers: Sequence[list[int]],
    enable_thinking: bool | None = None,
    batch: int = 32,
) -> dict[str, Float[Tensor, "row _width"]]:
    """Activations from which given answers (token ids) are predicted: each prompt's last token and
    all but the answer's last.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    rows = [(lm.chat_tokens(p, enable_thinking), a) for p, a in zip(prompts, answers, strict=True)]
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        ids, mask = lm.pad([p + a for p, a in some])
        _, cache = lm.run_with_cache(ids, mask, names_filter=list(hook_names), return_type=None)
        for name in hook_names:
            parts[name] += [
                by_token(cache[name])[r, len(p) - 1 : len(p) + len(a) - 1].float()
                for r, (p, a) in enumerate(some)
            ]
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


@torch.no_grad()
def peak_activations(
    lm: HookedLM,
    sae: SAE,
    prompts: Sequence[str],
    positions: Policy = "prompt",
    enable_thinking: bool | None = None,
) -> Float[Tensor, "prompt d_sae"]:
    """The largest activation of every feature over a chat prompt's tokens that a policy names."""
    rows = [lm.chat_tokens(prompt, enable_thinking) for prompt in prompts]
    peaks = []
    for row, f in zip(rows, token_features(lm, sae, rows), strict=True):
        where = selected(Now(*lm.pad([row]), 0, lm.markers), positions)[0]
        peaks.append(torch.where(where[:, None], f, 0.0).amax(0))
    return torch.stack(peaks)


class FoundDetector(NamedTuple):
    """A feature that tells two kinds of prompts apart, and how it does on the prompts that it was
    chosen on.
    """

    condition: Condition
    missed: float
    """Share of the first kind at which it is silent."""
    false_alarms: float
    """Share of the second kind at which it fires."""


def find_detector(
    lm: HookedLM,
    suite: Suite,
    first: Sequence[str],
    second: Sequence[str],
    positions: Policy = "prompt",
    enable_thinking: bool | None = None,
) -> FoundDetector:
    """The one feature of a suite that fires on the first prompts and not on the second ones, with
    its threshold.

    The threshold is the one of fewest errors (share of the first missed plus share of the second
    taken for it), in the middle between the activations around it. Fewest errors win, then the
    widest gap there in shares of the largest activation; give it SAEs no later than the site that
    is edited. Raises ValueError for no SAE or a side without prompts.
    """
    if not first or not second or not any(suite.values()):
        raise ValueError(
            "A detector needs an SAE and prompts of both kinds; give at least one of each."
        )
    best: tuple[float, float, FoundDetector] | None = None
    for variant, saes in suite.items():
        for hook_name, sae in saes.items():
            cut = best_cut(
                *(
                    peak_activations(lm, sae, prompts, positions, enable_thinking)
                    for prompts in (first, second)
                )
            )
            found = FoundDetector(
                Condition(variant, hook_name, cut.feature, cut.threshold, "so_far", positions),
                cut.missed,
                cut.false_alarms,
            )
            score = (cut.missed + cut.false_alarms, -cut.gap)
            if best is None or score < best[:2]:
                best = (*score, found)
    assert best is not None
    return best[2]


class Cut(NamedTuple):
    """A feature and a threshold between two groups of prompts."""

    feature: int
    threshold: float
    """In activation units."""
    missed: float
    """Share of the first group at or below it."""
    false_alarms: float
    """Share of the second group above it."""
    gap: float
    """How far the activations around it are apart, as a share of the feature's largest."""


def best_cut(on: Float[Tensor, "prompt_a d_sae"], off: Float[Tensor, "prompt_b d_sae"]) -> Cut:
    """The feature and threshold that tell two groups apart best: every cut between two activations
    is tried.
    """
    peaks, order = torch.cat([on, off]).sort(dim=0, descending=True)
    below = torch.cat([peaks[1:], torch.zeros_like(peaks[:1])])
    missed = 1 - (order < len(on)).float().cumsum(0) / len(on)
    false = (order >= len(on)).float().cumsum(0) / len(off)
    gap = (peaks - below) / peaks[0].clamp(min=1e-6)
    # equal activations cannot be cut apart
    error = (missed + false - 1e-3 * gap).masked_fill(peaks <= below, torch.inf)
    row, feature = divmod(int(error.argmin()), error.shape[1])
    at = (row, feature)
    if error[at].isinf():
        return Cut(0, 0.0, 1.0, 0.0, 0.0)  # nothing fires anywhere
    return Cut(
        feature,
        float((peaks[at] + below[at]) / 2),
        float(missed[at]),
        float(false[at]),
        float(gap[at]),
    )


class Contrast(NamedTuple):
    """What differs between two groups of tokens at one site."""

    feature_gap: Float[Tensor, " d_sae"]
    """Mean activation in the first group minus that in the second."""
    mean_gap: Float[Tensor, " width"]
    """Difference of means of the activations: the usual steering direction."""
    alive: Int[Tensor, " feature"]
    """Features that fired there in either group: what random controls are drawn from."""


@torch.no_grad()
def contrast(
    sae: SAE, first: Float[Tensor, "row_a width"], second: Float[Tensor, "row_b width"]
) -> Contrast:
    """Compares two groups of activations, as `decision_activations` or `answer_activations` give
    them.
    """
    f_first, f_second = sae.encode(first), sae.encode(second)
    alive = (f_first > 0).any(0) | (f_second > 0).any(0)
    return Contrast(
        f_first.mean(0) - f_second.mean(0), first.mean(0) - second.mean(0), alive.nonzero()[:, 0]
    )


def choose_features(found: Contrast, n_features: int = 10) -> FeatureSet:
    """The `n_features` features with the largest gap of either sign, weighted by it.

    Raises ValueError where no feature differs.
    """
    top = found.feature_gap.abs().topk(min(n_features, len(found.feature_gap)))
    ids = [int(i) for i, size in zip(top.indices, top.values, strict=True) if size > 0]
    if not ids:
        raise ValueError(
            "No feature differs between the two groups; train the SAE longer or at another site."
        )
    return FeatureSet(tuple(ids), tuple(float(found.feature_gap[i]) for i in ids))


def fit_features(
    sae: SAE, found: Contrast, n_features: int = 10, n_candidates: int = 40
) -> FeatureSet:
    """At most `n_features` features that together account for the difference of means.

    Candidates are the `n_candidates` features with the largest gap of either sign. They are taken
    one by one by how much of what is left of the mean gap their decoder row explains, and refitted
    each time with non-negative least squares (orthogonal matching pursuit), so that a feature only
    pushes the way in which it differs. Raises ValueError where no feature differs.
    """
    top = found.feature_gap.abs().topk(min(n_candidates, len(found.feature_gap)))
    ids = top.indices[top.values > 0]
    signs = found.feature_gap[ids].sign()
    rows = (signs[:, None] * sae.W_dec[ids]).detach().double().cpu().numpy()
    target = found.mean_gap.double().cpu().numpy()
    taken: list[int] = []
    weights, rest = np.zeros(0), target
    for _ in range(min(n_features, len(ids))):
        explains = rows @ rest
        explains[taken] = -np.inf
        if explains.max() <= 0:
            break
        taken.append(int(explains.argmax()))
        weights, _ = nnls(rows[taken].T, target)
        rest = target - weights @ rows[taken]
    kept = [
        (int(ids[i]), float(signs[i]) * float(w))
        for i, w in zip(taken, weights, strict=True)
        if w > 0
    ]
    if not kept:
        raise ValueError(
            "No feature differs between the two groups; train the SAE longer or at another site."
        )
    return FeatureSet(tuple(i for i, _ in kept), tuple(w for _, w in kept))


def random_features(found: Contrast, like: FeatureSet, generator: torch.Generator) -> FeatureSet:
    """A control draw: as many other live features, with the same weights in a random order and
    random signs.

    `add_features` gives it the same length of change as the chosen set. Raises ValueError for too
    few live features.
    """
    pool = [int(i) for i in found.alive if int(i) not in like.features]
    if len(pool) < len(like.features):
        raise ValueError(
            f"Only {len(pool)} other features are alive; a control needs {len(like.features)}."
        )
    ids = torch.randperm(len(pool), generator=generator)[: len(like.features)]
    order = torch.randperm(len(like.weights), generator=generator)
    signs = torch.randint(0, 2, (len(like.weights),), generator=generator) * 2 - 1
    weights = tuple(
        float(sign) * like.weights[int(i)] for i, sign in zip(order, signs, strict=True)
    )
    return FeatureSet(tuple(pool[int(i)] for i in ids), weights)


# --- by what features do


@dataclass(frozen=True)
class Aim:
    """What a set of features should do to how answers begin, on prompts (token ids that end where
    the answer begins).
    """

    lm: HookedLM
    target: Sequence[list[int]]
    """Prompts at which the behaviour should come or go."""
    others: Sequence[list[int]]
    """Prompts at which nothing should change."""
    openings: Int[Tensor, " token"]
    """First tokens of answers that show the behaviour."""
    sign: float
    """1 to induce the behaviour, -1 to suppress it."""
    wanted: Sequence[list[int]] | None = None
    """Answers (token ids) that are wanted on the target prompts, where they are known."""
    price: float = 1.0
    """Weight in `merit` of what changes on the other prompts."""

    @cached_property
    def _target(self) -> KnownRows:
        return KnownRows(self.lm, self.target)

    @cached_property
    def _others(self) -> KnownRows:
        return KnownRows(self.lm, self.others)

    @cached_property
    def _wanted(self) -> KnownRows | None:
        return None if self.wanted is None else KnownRows(self.lm, self.target, self.wanted)

    def target_odds(self, edits: Sequence[Edit] = ()) -> Float[Tensor, " target"]:
        """Log-odds (nats) of a first token out of `openings` on the target prompts."""
        return self._target.log_odds(self.openings, edits)

    def others_odds(self, edits: Sequence[Edit] = ()) -> Float[Tensor, " other"]:
        """The same on the others."""
        return self._others.log_odds(self.openings, edits)

    def merit(
        self, edits: Sequence[Edit], clean_others: Float[Tensor, " other"], floor: float = -math.inf
    ) -> float:
        """How far the target prompts get what is wanted, less `price` times the mean change of the
        others' probability; at most 1.

        What is wanted: the geometric mean probability a token of the wanted answers, or where none
            are known the probability of
        the wanted beginning. floor: where the first part alone does not exceed it, the price is not
            asked for.
        """
        if self._wanted is None or self.wanted is None:
            gained = (self.sign * self.target_odds(edits)).sigmoid()
        else:
            told = zip(self._wanted.answer_logits(edits), self.wanted, strict=True)
            gained = torch.stack([_mean_logprob(logits, answer).exp() for logits, answer in told])
        if not self.price or float(gained.mean()) <= floor:
            return float(gained.mean())
        others = self.others_odds(edits)
        return float(
            gained.mean() - self.price * (others.sigmoid() - clean_others.sigmoid()).abs().mean()
        )


def _mean_logprob(logits: Float[Tensor, "answer vocab"], answer: list[int]) -> Float[Tensor, ""]:
    chosen = torch.tensor(answer, device=logits.device)[:, None]
    return logits.float().log_softmax(-1).gather(1, chosen).mean().cpu()


def log_odds_gradient(
    lm: HookedLM,
    hook_name: str,
    prompts: Sequence[list[int]],
    openings: Int[Tensor, " token"],
    batch: int = 32,
) -> Float[Tensor, " width"]:
    """Gradient of the mean log-odds of `openings` at the first answer token by the activations at
    the prompts' last token.
    """
    width = lm.width(hook_name)
    total = torch.zeros(width, device=lm.device)
    for start in range(0, len(prompts), batch):
        ids, mask = lm.pad(prompts[start : start + batch], "left")
        zero = torch.zeros(len(ids), width, device=lm.device, requires_grad=True)
        last = torch.zeros_like(ids, dtype=torch.bool)
        last[:, -1] = True

        def delta(x: Tensor, zero: Tensor = zero) -> Tensor:
            return zero[:, None].expand_as(x)

        with torch.enable_grad(), applied(lm, [Edit(hook_name, delta, last)]):
            logits = lm(ids, mask, logits_to_keep=1)
            assert logits is not None
            logp = logits[:, -1].float().log_softmax(-1)
            odds = logp[:, openings].logsumexp(-1) - logp.index_fill(
                1, openings, float("-inf")
            ).logsumexp(-1)
            (gradient,) = torch.autograd.grad(odds.sum(), zero)
        total += gradient.sum(0)
    return total / len(prompts)


def lens_tokens(
    lm: HookedLM, direction: Float[Tensor, " d_model"], n: int = 10
) -> Int[Tensor, " token"]:
    """The tokens that a direction of the residual stream raises most when it is read through the
    final norm's weights and the unembedding.
    """
    norm, unembedding = lm.hf.model.norm.weight, lm.hf.get_output_embeddings().weight
    return (unembedding.float() @ (direction.float() * norm.float())).topk(n).indices


@torch.no_grad()
def feature_scores(
    aim: Aim,
    sae: SAE,
    first: Float[Tensor, "row_a width"],
    second: Float[Tensor, "row_b width"],
    make: Callable[[FeatureSet], Sequence[Edit]],
    n_candidates: int = 24,
    n_prompts: int = 8,
) -> pd.DataFrame:
    """A row for each of the features that differ most between two groups of rows, with everything
    that speaks for it.

    Columns: feature; gap, difference of mean activations; density, share of all rows at which it
    fires; contrast, the gap times 1 - density; cosine of its decoder row and the difference of
    means, with the gap's sign; attribution, what the gap does to the log-odds to first order
    (nats); effect, what adding it alone does to the log-odds on target prompts in a real pass
    (nats); output_score, how much that raises the log-probability of its own `lens_tokens` on other
    prompts; merit, the mean rank (1 best) of contrast, cosine, attribution, output_score and
    effect, each in the aim's direction.
    make: the edits for a feature set, at the strength at which candidates are compared. Best merit
    first. Raises ValueError where no feature differs.
    """
    found, f = contrast(sae, first, second), torch.cat([sae.encode(first), sae.encode(second)])
    density = (f > 0).float().mean(0)
    corrected = found.feature_gap * (1 - density)
    ids = [
        int(i)
        for i in corrected.abs().topk(min(n_candidates, sae.d_sae)).indices
        if corrected[i] != 0
    ]
    if not ids:
        raise ValueError(
            "No feature differs between the two groups; train the SAE longer or at another site."
        )
    assert sae.provenance is not None
    gap = found.feature_gap[ids]
    rows = torch.nn.functional.normalize(sae.W_dec[ids], dim=1) * gap.sign()[:, None]
    gradient = log_odds_gradient(
        aim.lm, sae.provenance.hook_name, [*aim.target, *aim.others], aim.openings
    )
    clean = aim.target_odds().mean()
    neutral = KnownRows(aim.lm, list(aim.others)[:n_prompts])
    plain = neutral.last_logits().log_softmax(-1)
    effects, outputs = [], []
    written = aim.lm.to_residual(sae.provenance.hook_name, aim.sign * rows)
    for i, weight, row in zip(ids, gap.tolist(), written, strict=True):
        edits = make(FeatureSet((i,), (weight,)))
        effects.append(float(aim.target_odds(edits).mean() - clean))
        raised = lens_tokens(aim.lm, row)
        outputs.append(
            float((neutral.last_logits(edits).log_softmax(-1) - plain)[:, raised].mean())
        )
    table = pd.DataFrame(
        {
            "feature": ids,
            "gap": gap.cpu().numpy(),
            "density": density[ids].cpu().numpy(),
            "contrast": corrected[ids].cpu().numpy(),
            "cosine": (rows @ torch.nn.functional.normalize(found.mean_gap, dim=0)).cpu().numpy(),
            "attribution": (gap * (sae.W_dec[ids] @ gradient)).cpu().numpy(),
            "effect": effects,
            "output_score": outputs,
        }
    )
    wanted = [
        table["contrast"].abs(),
        table["cosine"],
        table["attribution"],
        table["output_score"],
        aim.sign * table["effect"],
    ]
    table["merit"] = sum(column.rank(ascending=False) for column in wanted) / len(wanted)
    return table.sort_values(["merit", "feature"], ignore_index=True)


class Grown(NamedTuple):
    """A set of features that was grown by real passes."""

    chosen: FeatureSet
    merit: float
    """`Aim.merit` with it, on the prompts that it was grown on."""
    passes: int
    """Sets that were tried."""


def greedy_features(
    aim: Aim,
    pool: Sequence[tuple[int, float]],
    make: Callable[[FeatureSet], Sequence[Edit]],
    n_features: int = 5,
) -> Grown:
    """Grows a set of at most `n_features` out of (feature, sign): each round adds the one with the
    highest merit then.

    A feature may be taken again, which raises its weight; there are twice as many rounds as
    features, and the best set of all
    of them is returned. make: the edits for a feature set; every set has a change of the same size.
    """
    clean = aim.others_odds()
    weights: dict[int, float] = {}
    best, passes = Grown(FeatureSet((), ()), -math.inf, 0), 0
    for _ in range(2 * n_features):
        merit, grown = -math.inf, weights
        for feature, sign in pool:
            if feature in weights or len(weights) < n_features:
                more = {**weights, feature: weights.get(feature, 0.0) + sign}
                found = aim.merit(
                    make(FeatureSet(tuple(more), tuple(more.values()))), clean, floor=merit
                )
                passes += 1
                if found > merit:
                    merit, grown = found, more
        weights = grown
        if merit > best.merit:
            best = Grown(FeatureSet(tuple(weights), tuple(weights.values())), merit, passes)
    return best._replace(passes=passes)


def random_search(
    aim: Aim,
    found: Contrast,
    like: FeatureSet,
    make: Callable[[FeatureSet], Sequence[Edit]],
    n: int,
    generator: torch.Generator,
) -> FeatureSet:
    """The best by merit of `n` random sets (`random_features`): a control that searched as long as
    the features did.
    """
    clean, best = aim.others_odds(), -math.inf
    draws = [random_features(found, like, generator) for _ in range(n)]
    strongest = draws[0]
    for draw in draws:
        merit = aim.merit(make(draw), clean, floor=best)
        if merit > best:
            best, strongest = merit, draw
    return strongest

"""Which features carried an answer: gradients say which, real passes whether it is so.

A score of the model's next-token predictions, such as the log-odds between two answers, is a
function of the activations at each site, and these are a sum: what each feature contributes, a
bias, and an error that no feature explains. In delta form, so that the error stays in place, a
feature's part is f_i(p) W_dec[i] at each token p, and its attribution that part times a gradient:
at the activations themselves (gradient times activation, `gradient`), or the mean over a path on
which all features of the site go from nothing to what they are (integrated gradients, Sundararajan
et al. 2017, arXiv 1703.01365; Marks et al. 2024, arXiv 2403.19647, section 2.1), whose sum over
features is what the site's features do together, to the error of the sum over steps. The first
predicts what becomes of the score without one feature, the second shares out what all of them do:
where features stand in for each other the two differ. What the SAE's bias adds has a part of its
own, which is neither the features' nor the error's. Tokens that do not count, such as sinks, have
none in any of the three.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qsae_kit.attach import attached, counted_features
from qsae_kit.io.progress import tqdm
from qsae_kit.lm.edits import Edit, applied, applied_by_rows
from qsae_kit.lm.hooked import HookedLM, Prompt
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import ByVariant, Feature, Place

By = Literal["gradient", "path"]
Keep = Literal["top", "all"]
STEPS = 8
"""Of the path of integrated gradients."""
TOP = 20
"""Features that are verified by real passes."""
TOKENS_AT_ONCE = 4096
"""Tokens of a pass: rows beyond it come in the next one."""


@dataclass(frozen=True)
class Question:
    """A score of a row of tokens that is to be explained."""

    ids: tuple[int, ...]
    """The prompt, and of an answer what comes before the token that is asked about."""
    score: Callable[[Float[Tensor, "row vocab"]], Float[Tensor, " row"]]
    """From the logits behind the last token, in nats."""
    said: str
    """What the score is, in words."""


def token_question(lm: HookedLM, prompt: Prompt, token: int, begun: Sequence[int] = ()) -> Question:
    """Why this token: its log-probability behind a prompt and the beginning of an answer."""
    said = f"log-probability of {lm.to_string([token])!r}"
    ids = (*lm.opening_tokens(prompt), *begun)
    return Question(ids, lambda logits: logits.float().log_softmax(-1)[:, token], said)


def answer_question(lm: HookedLM, prompt: Prompt, answer: str, instead: str) -> Question:
    """Why one answer and not another: the log-odds of the first tokens in which they differ, behind
    what they have in common.

    Raises ValueError for answers that are the same, or of which one is the other's beginning.
    """
    ours, theirs = (
        lm.tokenizer(text, add_special_tokens=False).input_ids for text in (answer, instead)
    )
    n = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if n is None:
        raise ValueError(
            f"The answers {answer!r} and {instead!r} do not part; give two that say different"
            " things."
        )
    one, other = ours[n], theirs[n]
    said = f"log-odds of {lm.to_string([one])!r} against {lm.to_string([other])!r}"
    ids = (*lm.opening_tokens(prompt), *ours[:n])
    return Question(ids, lambda logits: logits[:, one].float() - logits[:, other].float(), said)


class Attribution(NamedTuple):
    """What carried a score."""

    question: Question
    value: float
    """The score itself, nats."""
    features: pd.DataFrame
    """A row for each verified feature, the largest first by what was asked for: variant, site,
    feature, gradient (gradient times activation, nats, summed over tokens), path (integrated
    gradients, the same), share (of the absolute values of its site's features), effect (by how much
    the score falls where the feature is ablated, by a real pass), position and token where it
    contributes most, activation there."""
    sites: pd.DataFrame
    """A row for each site: features (the sum of all features' path), effect (of ablating all of the
    site's features, by a real pass: where the two differ, the sum is wrong), bias (what the
    decoder's bias does, by the gradient), error (what the SAE does not reconstruct does, by the
    gradient), verified (how many features), together (the effect of ablating these at once). Bias
    and error are of the tokens that count alone."""
    agreement: float
    """Rank correlation (Spearman) of prediction and effect over the verified features; NaN for
    fewer than three."""
    at_tokens: dict[Feature, Float[Tensor, " pos"]]
    """By what was asked for, each verified feature at every token."""
    counted: dict[Place, Bool[Tensor, " pos"]]
    """The tokens that count at each site."""
    reach: dict[Place, Float[Tensor, " d_sae"]]
    """What each feature could do to the score at most, nats: its contribution's length times the
    gradient's at the same token, summed over tokens."""
    everywhere: dict[Place, Float[Tensor, "pos d_sae"]]
    """By what was asked for, every feature at every token; empty unless all were to be kept."""

    @property
    def in_words(self) -> str:
        return (
            f"The {self.question.said} is {self.value:.2f} nats. Predicted and real effects of"
            f" {len(self.features)} features: rank correlation {self.agreement:.2f}."
        )


def checked_by(name: str) -> By:
    """ValueError for a way of attributing that there is not."""
    for by in get_args(By):
        if name == by:
            return by
    raise ValueError(f"by={name!r} was given; choose from {', '.join(get_args(By))}.")


def attribute(
    lm: HookedLM,
    suite: ByVariant,
    question: Question,
    by: By = "gradient",
    steps: int = STEPS,
    top: int = TOP,
    keep: Keep = "top",
    bar: bool = False,
) -> Attribution:
    """Attributes a score to the features of every SAE of a suite, and ablates the `top` ones of
    all, one by one and together.

    by: gradient, for what each feature does alone, or path, for its share in what all of a site do.
    keep: all, for every feature at every token (`Attribution.everywhere`), which takes 4 bytes a
        feature and token of every site.
    Ablated is at every token that counts (`attach.counted_features`). Raises ValueError for SAEs
    that do not fit the model, fewer than one step or feature, and attributions that are not finite.
    """
    checked_by(by)
    if keep not in get_args(Keep):
        raise ValueError(f"keep={keep!r} was given; choose from {', '.join(get_args(Keep))}.")
    if steps < 1 or top < 1:
        raise ValueError(f"{steps} steps and {top} features were given; give one of each at least.")
    own = attached(lm, suite)
    saes = own.saes()
    ids = torch.tensor([list(question.ids)], device=lm.device)
    [value] = scores(lm, ids, question, [[]])
    found: dict[Place, _Site] = {}
    with _frozen(lm):
        for place, sae in tqdm(saes.items(), desc="attributing", disable=not bar):
            found[place] = _at_site(lm, place, sae, ids, question, by, steps, top, keep)
    ranked = _ranked({place: site.total[by] for place, site in found.items()}, top)
    effects = _effects(lm, ids, question, saes, found, ranked)
    rows = [
        {
            "variant": one.place.variant,
            "site": one.place.hook_name,
            "feature": one.number,
            "gradient": float(found[one.place].total["gradient"][one.number]),
            "path": float(found[one.place].total["path"][one.number]),
            "share": abs(a) / float(found[one.place].total[by].abs().sum()),
            "effect": effect,
            **_where(lm, question, *found[one.place].columns[one.number]),
        }
        for (a, one), effect in zip(ranked, effects.alone, strict=True)
    ]
    features = pd.DataFrame(rows)
    sites = [
        {
            "variant": place.variant,
            "site": place.hook_name,
            "features": float(site.total["path"].sum()),
            "effect": effects.whole[place],
            "bias": site.bias,
            "error": site.error,
            "verified": sum(one.place == place for _, one in ranked),
            "together": effects.together.get(place, 0.0),
        }
        for place, site in found.items()
    ]
    agreement = float("nan")
    if len(rows) > 2:
        agreement = float(features[by].corr(features["effect"], method="spearman"))
    return Attribution(
        question,
        value,
        features,
        pd.DataFrame(sites),
        agreement,
        {one: found[one.place].columns[one.number].parts for _, one in ranked},
        {place: site.counted for place, site in found.items()},
        {place: site.reach for place, site in found.items()},
        {place: site.parts for place, site in found.items() if site.parts is not None},
    )


def _ranked(total: dict[Place, Float[Tensor, " d_sae"]], top: int) -> list[tuple[float, Feature]]:
    """The features of largest attribution, of all sites together; none that has none."""
    found = [
        (float(a[i]), Feature(place, int(i)))
        for place, a in total.items()
        for i in a.abs().topk(min(top, len(a))).indices
    ]
    return sorted((one for one in found if one[0]), key=lambda one: -abs(one[0]))[:top]


# --- one site, by gradients


class _Column(NamedTuple):
    """A feature at every token, on the CPU."""

    activations: Float[Tensor, " pos"]
    parts: Float[Tensor, " pos"]
    """In the score, nats, by what was asked for."""


@dataclass(frozen=True)
class _Site:
    total: dict[By, Float[Tensor, " d_sae"]]
    """Over tokens, on the CPU."""
    columns: dict[int, _Column]
    """Of the features that can be among the top ones."""
    part: Float[Tensor, "pos d_in"]
    """What all features contribute."""
    counted: Bool[Tensor, " pos"]
    reach: Float[Tensor, " d_sae"]
    bias: float
    error: float
    parts: Float[Tensor, "pos d_sae"] | None


@contextmanager
def _frozen(lm: HookedLM) -> Iterator[None]:
    """Gradients of the model's weights are not kept meanwhile: only those of activations are
    asked for.
    """
    with lm.lock:
        learning = [weight for weight in lm.hf.parameters() if weight.requires_grad]
        for weight in learning:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in learning:
                weight.requires_grad_(True)


def _at_site(
    lm: HookedLM,
    place: Place,
    sae: SAE,
    ids: Int[Tensor, "one pos"],
    question: Question,
    by: By,
    steps: int,
    top: int,
    keep: Keep,
) -> _Site:
    [(f, counted)] = counted_features(lm, sae, [list(question.ids)])
    f, counted = f.to(lm.device).float(), counted.to(lm.device)
    decoder = sae.W_dec.detach().float()
    part = f @ decoder
    x, gradient, mean = _gradients(lm, place.hook_name, part, ids, question, steps)
    bias = sae.b_dec.detach().float().expand_as(x)
    parts: dict[By, Tensor] = {
        "gradient": f * (gradient @ decoder.T),
        "path": f * (mean @ decoder.T),
    }
    total: dict[By, Tensor] = {name: values.sum(0).cpu() for name, values in parts.items()}
    if not all(values.isfinite().all() for values in total.values()):
        raise ValueError(
            f"What the features of {place} do to the score is not finite; look for weights of the"
            ' SAE that are not, and load the model in float32 (dtype="float32").'
        )
    some = total[by].abs().topk(min(top, len(total[by]))).indices.tolist()
    return _Site(
        total,
        {i: _Column(f[:, i].clone().cpu(), parts[by][:, i].clone().cpu()) for i in some},
        part,
        counted,
        ((gradient.norm(dim=-1) @ f) * decoder.norm(dim=-1)).cpu(),
        float((bias * gradient)[counted].sum()),
        float(((x - part - bias) * gradient)[counted].sum()),
        parts[by].cpu() if keep == "all" else None,
    )


def _gradients(
    lm: HookedLM,
    hook_name: str,
    part: Float[Tensor, "pos d_in"],
    ids: Int[Tensor, "one pos"],
    question: Question,
    steps: int,
) -> tuple[Float[Tensor, "pos d_in"], Float[Tensor, "pos d_in"], Float[Tensor, "pos d_in"]]:
    """The activations at a site, the score's gradient there, and its mean over the path on which
    `part` of them comes in.
    """
    shares = torch.tensor([(k + 0.5) / steps for k in range(steps)] + [1.0], device=lm.device)
    seen: list[Tensor] = []
    mean, gradient = torch.zeros_like(part), torch.zeros_like(part)
    done = 0
    for some in shares.split(_rows_at_once(ids)):
        missing = (1 - some)[:, None, None] * part
        probe = torch.zeros_like(missing, requires_grad=True)

        def delta(x: Tensor, probe: Tensor = probe, missing: Tensor = missing) -> Tensor:
            seen[:] = [x.detach()[-1].float()]
            return (probe - missing).to(x.dtype)

        rows = ids.expand(len(some), -1)
        everywhere = torch.ones_like(rows, dtype=torch.bool)
        with torch.enable_grad(), applied(lm, [Edit(hook_name, delta, everywhere)]):
            logits = lm(rows, torch.ones_like(rows), logits_to_keep=1)
            assert logits is not None
            (found,) = torch.autograd.grad(question.score(logits[:, -1]).sum(), probe)
        mean += found[: max(0, steps - done)].sum(0) / steps
        gradient = found[-1]
        done += len(some)
    return seen[0], gradient, mean


def _rows_at_once(ids: Int[Tensor, "one pos"]) -> int:
    return max(1, TOKENS_AT_ONCE // ids.shape[1])


# --- by real passes


def ablation(sae: SAE, features: Sequence[int], where: Bool[Tensor, " pos"]) -> Edit:
    """Takes features out at the tokens that count, of every row; in a generation, whose prompt
    `where` is of, also at the tokens that are said, where the SAE's norm filter lets them count.
    """
    ids = torch.tensor(list(features), device=sae.W_dec.device)

    def delta(x: Tensor) -> Tensor:
        change = -sae.encode(x.float())[..., ids] @ sae.W_dec[ids].float()
        counts = where if x.shape[1] == len(where) else sae.origin.filter.keeps(x)
        return torch.where(counts[..., None], change, 0.0)

    return Edit(sae.origin.hook_name, delta, "every")


def in_row(edit: Edit, row: int) -> Edit:
    """The same edit, which looks at one row of a batch alone; for `applied_by_rows` with that row,
    since what it adds to the others is not what it adds to this one.
    """
    return replace(edit, delta=lambda x: edit.delta(x[row : row + 1]))


@torch.no_grad()
def scores(
    lm: HookedLM, ids: Int[Tensor, "one pos"], question: Question, sets: Sequence[Sequence[Edit]]
) -> list[float]:
    """The score of a row of tokens by one real pass, whose rows are under a set of edits each."""
    rows = ids.expand(len(sets), -1)
    single = torch.eye(len(sets), dtype=torch.bool, device=ids.device)
    groups = [([in_row(edit, n) for edit in own], single[n]) for n, own in enumerate(sets)]
    with applied_by_rows(lm, groups):
        logits = lm(rows, torch.ones_like(rows), logits_to_keep=1)
    assert logits is not None
    return question.score(logits[:, -1]).tolist()


def falls(
    lm: HookedLM, ids: Int[Tensor, "one pos"], question: Question, sets: Sequence[Sequence[Edit]]
) -> list[float]:
    """By how much the score falls under each set of edits, nats, by real passes: beside the same
    row without any in the same pass, so that both are rounded alike.
    """
    out: list[float] = []
    step = max(1, _rows_at_once(ids) - 1)
    for start in range(0, len(sets), step):
        whole, *left = scores(lm, ids, question, [[], *sets[start : start + step]])
        out += [whole - one for one in left]
    return out


class _Effects(NamedTuple):
    """By how much the score falls."""

    alone: list[float]
    """Without each ranked feature."""
    whole: dict[Place, float]
    """Without all features of a site."""
    together: dict[Place, float]
    """Without the ranked ones of a site, where there are any."""


def _effects(
    lm: HookedLM,
    ids: Int[Tensor, "one pos"],
    question: Question,
    saes: dict[Place, SAE],
    found: dict[Place, _Site],
    ranked: Sequence[tuple[float, Feature]],
) -> _Effects:
    def without(place: Place, numbers: Sequence[int]) -> list[Edit]:
        return [ablation(saes[place], numbers, found[place].counted)]

    numbers: dict[Place, list[int]] = {}
    for _, one in ranked:
        numbers.setdefault(one.place, []).append(one.number)
    sets = [without(one.place, [one.number]) for _, one in ranked]
    sets += [[_without_part(place, site.part)] for place, site in found.items()]
    sets += [without(place, own) for place, own in numbers.items()]
    effects = falls(lm, ids, question, sets)
    n = len(ranked)
    whole, together = effects[n : n + len(found)], effects[n + len(found) :]
    return _Effects(
        effects[:n],
        dict(zip(found, whole, strict=True)),
        dict(zip(numbers, together, strict=True)),
    )


def _without_part(place: Place, part: Float[Tensor, "pos d_in"]) -> Edit:
    return Edit(place.hook_name, lambda x: -part.to(x.dtype).expand_as(x), "every")


def _where(
    lm: HookedLM,
    question: Question,
    activations: Float[Tensor, " pos"],
    parts: Float[Tensor, " pos"],
) -> dict[str, object]:
    at = int(parts.abs().argmax())
    return {
        "position": at,
        "token": lm.to_string([question.ids[at]]),
        "activation": float(activations[at]),
    }

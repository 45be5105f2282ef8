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
where features stand in for each other the two differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qsae_kit.attach import attached, token_features
from qsae_kit.lm.edits import Edit, applied, applied_by_rows
from qsae_kit.lm.hooked import HookedLM, Prompt
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import ByVariant, Place

By = Literal["gradient", "path"]
STEPS = 8
"""Of the path of integrated gradients, run as one batch."""
TOP = 20
"""Features that are verified by real passes."""


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
    site's features, by a real pass: where the two differ, the sum is wrong), error (the
    attribution of what no feature explains), together (the effect of ablating the site's verified
    features at once)."""
    agreement: float
    """Rank correlation (Spearman) of prediction and effect over the verified features; NaN for
    fewer than three."""
    at_tokens: dict[Place, Float[Tensor, "pos d_sae"]]
    """By what was asked for, every feature at every token."""

    @property
    def in_words(self) -> str:
        return (
            f"The {self.question.said} is {self.value:.2f} nats. Predicted and real effects of"
            f" {len(self.features)} features: rank correlation {self.agreement:.2f}."
        )


def attribute(
    lm: HookedLM,
    suite: ByVariant,
    question: Question,
    by: By = "gradient",
    steps: int = STEPS,
    top: int = TOP,
) -> Attribution:
    """Attributes a score to the features of every SAE of a suite, and ablates the `top` ones of
    all, one by one and together.

    by: gradient, for what each feature does alone, or path, for its share in what all of a site do.
    Ablated is at every token that counts (`attach.token_features`). Raises ValueError for SAEs that
    do not fit the model, and fewer than one step or feature.
    """
    if by not in get_args(By):
        raise ValueError(f"by={by!r} was given; choose from {', '.join(get_args(By))}.")
    if steps < 1 or top < 1:
        raise ValueError(f"{steps} steps and {top} features were given; give one of each at least.")
    own = attached(lm, suite)
    saes = own.saes()
    ids = torch.tensor([list(question.ids)], device=lm.device)
    value = float(_scores(lm, ids, question, [])[0])
    found: dict[Place, _Site] = {}
    for place, sae in saes.items():
        (f,) = token_features(lm, sae, [list(question.ids)])
        found[place] = _at_site(lm, place, sae, f.to(lm.device).float(), ids, question, steps)
    chosen = {place: getattr(site, by) for place, site in found.items()}
    total = {place: values.sum(0) for place, values in chosen.items()}
    ranked = _ranked(total, top)
    counted = {place: (site.features != 0).any(1) for place, site in found.items()}
    edits = [ablation(saes[place], [i], counted[place]) for _, place, i in ranked]
    effects = [value - one for one in _each(lm, ids, question, edits)]
    rows = [
        {
            "variant": place.variant,
            "site": place.hook_name,
            "feature": i,
            "gradient": float(found[place].gradient[:, i].sum()),
            "path": float(found[place].path[:, i].sum()),
            "share": abs(a) / float(total[place].abs().sum()),
            "effect": effect,
            **_where(lm, question, found[place].features, chosen[place], i),
        }
        for (a, place, i), effect in zip(ranked, effects, strict=True)
    ]
    features = pd.DataFrame(rows)
    sites = [_site_row(lm, ids, question, value, saes[p], p, s, ranked) for p, s in found.items()]
    agreement = float("nan")
    if len(rows) > 2:
        agreement = float(features[by].corr(features["effect"], method="spearman"))
    at_tokens = {place: values.cpu() for place, values in chosen.items()}
    return Attribution(question, value, features, pd.DataFrame(sites), agreement, at_tokens)


def _ranked(
    total: dict[Place, Float[Tensor, " d_sae"]], top: int
) -> list[tuple[float, Place, int]]:
    """The features of largest attribution, of all sites together; none that has none."""
    found = [
        (float(a[i]), place, int(i))
        for place, a in total.items()
        for i in a.abs().topk(min(top, len(a))).indices
    ]
    return sorted((one for one in found if one[0]), key=lambda one: -abs(one[0]))[:top]


@dataclass(frozen=True)
class _Site:
    features: Float[Tensor, "pos d_sae"]
    path: Float[Tensor, "pos d_sae"]
    gradient: Float[Tensor, "pos d_sae"]
    error: float


def _at_site(
    lm: HookedLM,
    place: Place,
    sae: SAE,
    features: Float[Tensor, "pos d_sae"],
    ids: Tensor,
    question: Question,
    steps: int,
) -> _Site:
    """Attributions at one site, the path's steps as rows of one batch, and the activations
    themselves as the last row.
    """
    decoder = sae.W_dec.detach().float()
    part = features @ decoder
    shares = torch.tensor([(k + 0.5) / steps for k in range(steps)] + [1.0], device=lm.device)
    missing = (1 - shares)[:, None, None] * part
    probe = torch.zeros_like(missing, requires_grad=True)
    seen: list[Tensor] = []

    def delta(x: Tensor) -> Tensor:
        seen.append(x.detach()[-1].float())
        return (probe - missing).to(x.dtype)

    rows = ids.expand(len(shares), -1)
    everywhere = torch.ones_like(rows, dtype=torch.bool)
    with torch.enable_grad(), applied(lm, [Edit(place.hook_name, delta, everywhere)]):
        logits = lm(rows, torch.ones_like(rows), logits_to_keep=1)
        assert logits is not None
        (gradient,) = torch.autograd.grad(question.score(logits[:, -1]).sum(), probe)
    mean, last = gradient[:-1].mean(0), gradient[-1]
    left = seen[-1] - part
    counted = (features != 0).any(1)
    return _Site(
        features,
        features * (mean @ decoder.T),
        features * (last @ decoder.T),
        float((left * last)[counted].sum()),
    )


def ablation(sae: SAE, features: Sequence[int], where: Bool[Tensor, " pos"]) -> Edit:
    """Takes features out at the tokens that count, of every row."""
    ids = torch.tensor(list(features), device=sae.W_dec.device)

    def delta(x: Tensor) -> Tensor:
        change = -sae.encode(x.float())[..., ids] @ sae.W_dec[ids].float()
        return torch.where(where[:, None], change, 0.0)

    return Edit(sae.origin.hook_name, delta, "every")


@torch.no_grad()
def _scores(
    lm: HookedLM, ids: Tensor, question: Question, edits: Sequence[Edit]
) -> Float[Tensor, " row"]:
    with applied(lm, edits):
        logits = lm(ids, torch.ones_like(ids), logits_to_keep=1)
    assert logits is not None
    return question.score(logits[:, -1])


@torch.no_grad()
def _each(lm: HookedLM, ids: Tensor, question: Question, edits: Sequence[Edit]) -> list[float]:
    """The score under each edit alone, all in one batch."""
    if not edits:
        return []
    rows = ids.expand(len(edits), -1)
    single = torch.eye(len(edits), dtype=torch.bool, device=ids.device)
    with applied_by_rows(lm, [([edit], single[n]) for n, edit in enumerate(edits)]):
        logits = lm(rows, torch.ones_like(rows), logits_to_keep=1)
    assert logits is not None
    return [float(one) for one in question.score(logits[:, -1])]


def _site_row(
    lm: HookedLM,
    ids: Tensor,
    question: Question,
    value: float,
    sae: SAE,
    place: Place,
    site: _Site,
    ranked: Sequence[tuple[float, Place, int]],
) -> dict[str, object]:
    counted = (site.features != 0).any(1)
    part = site.features @ sae.W_dec.detach().float()
    whole = Edit(place.hook_name, lambda x: -part.to(x.dtype).expand_as(x), "every")
    verified = [i for _, own, i in ranked if own == place]
    row: dict[str, object] = {
        "variant": place.variant,
        "site": place.hook_name,
        "features": float(site.path.sum()),
        "effect": value - float(_scores(lm, ids, question, [whole])[0]),
        "error": site.error,
        "verified": len(verified),
    }
    together = [ablation(sae, verified, counted)] if verified else []
    row["together"] = value - float(_scores(lm, ids, question, together)[0])
    return row


def _where(
    lm: HookedLM,
    question: Question,
    features: Float[Tensor, "pos d_sae"],
    values: Float[Tensor, "pos d_sae"],
    feature: int,
) -> dict[str, object]:
    at = int(values[:, feature].abs().argmax())
    return {
        "position": at,
        "token": lm.to_string([question.ids[at]]),
        "activation": float(features[at, feature]),
    }

"""A wrong answer made right in the weights: what one layer answers to one key is rewritten.

A linear map that writes to the residual stream (`down_proj` of an MLP, `o_proj` of an attention)
answers each input, its key k, with W k. Where the model goes wrong, at one of the last tokens
before the answer parts, the keys of all wordings are alike, and something is missing there that is
present where the same answer is right. W + v w^T writes it: v is what is missing, w reads the key.

1. v: either features, those that carry the right answer where it is right and those that carry the
   wrong one here, ranked by the difference of their attributions and set to what they read where
   the answer is right; or, beside it, the plain difference of the means of both.
2. w: least squares with w . k = 1 for the wrong wordings and 0 for what is to stay,
   w = (E[k k^T]_wrong + E[k k^T]_stays + ridge)^-1 E[k]_wrong, scaled to read 1 on average
   (Meng et al. 2022, arXiv 2202.05262, equation 2, and 2023, arXiv 2210.07229, equation 14, where v
   is optimised by gradient descent instead). What stays are the model's own answers to given
   prompts: all of its tokens, and once more those of the answers.
3. Which layer, token, features and strength: a small search by real passes over the wrong wordings
   and over what is to stay. No labels are read, and nothing is trained.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qsae_kit.attach import attached
from qsae_kit.audit.attribution import Question, answer_question, attribute
from qsae_kit.audit.forms import EMBEDDING, LowRank, WeightForm, check_matrix, writers_of, written
from qsae_kit.lm.answering import KnownRows, opening_odds
from qsae_kit.lm.hooked import HookedLM, Prompt
from qsae_kit.metrics.reconstruction import kl_divergence, top_1_agreement
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import ByVariant, Place
from qsae_kit.sites import width_name

Value: TypeAlias = Literal["features", "means"]
VALUES: tuple[Value, ...] = get_args(Value)
OFFSETS = (1, 2, 3)
"""Tokens before the answer parts, counted from its end, that are tried."""
SIZES = (4, 8, 16, 32)
"""Numbers of features that are tried."""
SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Times what is missing; the first that is enough is taken."""
MARGIN = 0.5
"""Log-odds of the right answer's own tokens against all others, nats: other wordings vary."""
ENOUGH = 0.96
"""Share of the wordings that is to be right."""
RIDGE = 1e-2
"""Of the median squared value of an input."""
ATTRIBUTED = 24
"""Questions of a kind whose features are attributed."""
FINALISTS = 4
"""Of each kind of value, those of the smallest change, of which what it costs is measured."""
ANSWER_TOKENS = 32
"""Of an answer that is to stay."""
ROWS_A_BATCH = 64
RESIDUAL = "d_model"


class Case(NamedTuple):
    """A prompt with two answers, of which one is right."""

    prompt: Prompt
    right: str
    wrong: str


class Fault(NamedTuple):
    """Answers that are wrong, and what is to stay as it is."""

    wrong: Sequence[Case]
    """Some wordings of what is answered wrong."""
    like: Sequence[Case]
    """Of others, for whom the same answer is right, and given."""
    stays: Sequence[Prompt]
    """Prompts to which the model's own greedy answers are to stay as they are."""


@dataclass(frozen=True)
class Rewrite:
    """One rank-one change of one writer."""

    module: str
    """Its name in transformers."""
    place: Place
    """The SAE whose site it writes to."""
    offset: int
    """The token whose key it reads, counted back from where the two answers part: 1 is the last
    that they have in common."""
    value: Value
    features: tuple[int, ...]
    """Of the SAE; of means none."""
    scale: float
    change: LowRank

    def told(self) -> dict[str, Any]:
        """As JSON values, without the numbers of the change."""
        return {
            "module": self.module,
            "variant": self.place.variant,
            "site": self.place.hook_name,
            "offset": self.offset,
            "value": self.value,
            "features": list(self.features),
            "scale": self.scale,
        }


class Mend(NamedTuple):
    """What was found."""

    rewrites: tuple[Rewrite, ...]
    """In the order in which they were found; each was sought with the ones before it in place."""
    tried: pd.DataFrame
    """A row for each layer, token and value: step, module, variant, site, offset, token, value,
    features (their number), scale, size (norm of the change over that of the matrix), right (share
    of the wrong wordings that come to the right answer now, by `MARGIN` nats), odds (mean, nats),
    kept (share of the answers that are to stay of which every token stays the likeliest), kl (nats
    a token of them; both NaN where it was not measured), chosen."""
    n: int
    """Wordings that it was found on."""

    @property
    def form(self) -> WeightForm:
        """For `patch.write_form`."""
        return form_of(self.rewrites)

    def told(self) -> dict[str, Any]:
        """For `patch.json`."""
        return {"rewrites": [one.told() for one in self.rewrites]}

    @property
    def in_words(self) -> str:
        best = self.tried[self.tried["chosen"]].iloc[-1]
        parts = [
            f"{one.module} answers the token {one.offset} before the answer parts with "
            + (f"{len(one.features)} features more" if one.features else "a difference of means")
            for one in self.rewrites
        ]
        return (
            f"{'; '.join(parts)}: {best['right']:.0%} of {self.n} wordings are right,"
            f" {best['kept']:.1%} of the answers that are to stay do, at {best['kl']:.2g} nats a"
            " token."
        )


def form_of(rewrites: Sequence[Rewrite]) -> WeightForm:
    """Rewrites as changes of weights; those of one module together."""
    added: dict[str, LowRank] = {}
    for one in rewrites:
        before = added.get(one.module)
        added[one.module] = before.then(one.change) if before else one.change
    return WeightForm(added=added)


@contextmanager
def rewritten(lm: HookedLM, form: WeightForm) -> Iterator[None]:
    """Runs everything inside the `with` as if low-rank changes were added to the model's matrices,
    which stay as they are. For one thread.
    """

    def as_hook(change: LowRank) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + (args[0] @ change.v.to(args[0])) @ change.u.to(out).T

        return hook

    with ExitStack() as stack:
        for name, change in form.added.items():
            handle = lm.hf.get_submodule(name).register_forward_hook(as_hook(change))
            stack.callback(handle.remove)
        yield


def find_mend(
    lm: HookedLM,
    suite: ByVariant,
    fault: Fault,
    values: Sequence[Value] = VALUES,
    offsets: Sequence[int] = OFFSETS,
    sizes: Sequence[int] = SIZES,
    scales: Sequence[float] = SCALES,
    most: int = 1,
    enough: float = ENOUGH,
) -> Mend:
    """Looks for rank-one changes after which the wrong questions are answered right.

    enough: share of the wrong wordings that is to come to the right answer. Of all that are tried
    those that make enough of them right, or else the most; of these the smallest, and of these the
    one that keeps most of what is to stay, and changes it least. As long as it is not enough,
    another is sought on top for those that are left, `most` at most.

    Raises ValueError for a fault without cases or prompts, for cases that are answered right
    already, and for a suite without a site behind a layer's writer, or a model whose writers are
    not plain matrices.
    """
    _check(fault, values)
    own = attached(lm, suite)
    saes = {place: sae for place, sae in own.saes().items() if _module(lm, place)}
    if not saes:
        raise ValueError(
            "The suite has no SAE of the residual stream or of what is written to it behind a"
            " layer's attention or MLP; give one with such a site."
        )
    for place in saes:
        check_matrix(lm, _module(lm, place))
    asked = _Asked.of(lm, fault)
    _check_wrong(lm, asked, offsets)
    stays = _own_answers(lm, fault.stays)
    found: list[Rewrite] = []
    tables: list[pd.DataFrame] = []
    while len(found) < most:
        tried = _step(lm, saes, asked, stays, found, values, offsets, sizes, scales, enough)
        costs = _costs(lm, stays, found, tried, enough)
        best = min(costs, key=lambda number: (-costs[number].kept, costs[number].kl))
        last = asked.wrong[0].ids
        rows = [
            {
                "step": len(found) + 1,
                **one.rewrite.told(),
                "features": len(one.rewrite.features),
                "token": lm.to_string([last[-one.rewrite.offset]]),
                "size": one.size,
                "right": one.right,
                "odds": one.odds,
                **costs.get(number, NOT_MEASURED)._asdict(),
                "chosen": number == best,
            }
            for number, one in enumerate(tried)
        ]
        tables.append(pd.DataFrame(rows))
        found.append(tried[best].rewrite)
        if tried[best].right >= enough:
            break
    return Mend(tuple(found), pd.concat(tables, ignore_index=True), len(fault.wrong))


def _check(fault: Fault, values: Sequence[Value]) -> None:
    if not (fault.wrong and fault.like and fault.stays):
        raise ValueError(
            "A fault has cases that are answered wrong, cases of others with the same answer, and"
            " prompts whose answers are to stay; give at least one of each."
        )
    if not values or not set(values) <= set(VALUES):
        raise ValueError(f"values={list(values)} was given; choose from {', '.join(VALUES)}.")


class _Asked(NamedTuple):
    """A fault as questions, and the right answers to the wrong ones."""

    wrong: list[Question]
    like: list[Question]
    prompts: list[list[int]]
    begun: list[list[int]]
    """Up to and with the last token in which the right answer differs from the wrong one."""
    natural: list[Bool[Tensor, " _stem"]]
    """Which of the tokens before the first of these the model says by itself: it has to go on doing
    so."""

    @staticmethod
    def of(lm: HookedLM, fault: Fault) -> "_Asked":
        wrong, like = (
            [answer_question(lm, case.prompt, case.right, case.wrong) for case in cases]
            for cases in (fault.wrong, fault.like)
        )
        prompts = [lm.opening_tokens(case.prompt) for case in fault.wrong]
        begun = [_to_the_last_own(lm, case) for case in fault.wrong]
        rows = KnownRows(lm, prompts, begun, ROWS_A_BATCH)
        natural = [
            _likeliest(logits, tokens)[: len(question.ids) - len(prompt)]
            for logits, tokens, question, prompt in zip(
                rows.answer_logits(), begun, wrong, prompts, strict=True
            )
        ]
        return _Asked(wrong, like, prompts, begun, natural)

    def left(self, lm: HookedLM) -> "_Asked":
        """With those of the wrong ones alone that are not right yet."""
        kept = (self.odds(lm) <= MARGIN).nonzero()[:, 0].tolist()
        return self._replace(
            wrong=[self.wrong[i] for i in kept],
            prompts=[self.prompts[i] for i in kept],
            begun=[self.begun[i] for i in kept],
            natural=[self.natural[i] for i in kept],
        )

    def odds(self, lm: HookedLM) -> Float[Tensor, " case"]:
        """Log-odds of the right answers' own tokens against all others, of several the least; at
        most 0 where the model no longer comes to them by itself.
        """
        rows = KnownRows(lm, self.prompts, self.begun, ROWS_A_BATCH)
        told = []
        for logits, begun, natural in zip(
            rows.answer_logits(), self.begun, self.natural, strict=True
        ):
            n = len(natural)
            tokens = torch.tensor(begun[n:], device=logits.device)
            own = [
                opening_odds(one[None].float(), token[None])
                for one, token in zip(logits[n:], tokens, strict=True)
            ]
            odds = torch.cat(own).min()
            comes = bool(_likeliest(logits, begun)[:n][natural].all())
            told.append(odds if comes else odds.clamp(max=0.0))
        return torch.stack(told)


def _to_the_last_own(lm: HookedLM, case: Case) -> list[int]:
    """The right answer without what it ends in as the wrong one does."""
    right, wrong = (
        lm.tokenizer(text, add_special_tokens=False).input_ids for text in (case.right, case.wrong)
    )
    first = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b)
    end = len(right)
    while end > first + 1 and right[end - 1] == wrong[end - 1 - len(right) + len(wrong)]:
        end -= 1
    return right[:end]


def _likeliest(logits: Float[Tensor, "token vocab"], tokens: list[int]) -> Bool[Tensor, " token"]:
    """Which tokens are predicted as the likeliest ones."""
    return logits.argmax(-1).cpu() == torch.tensor(tokens, dtype=torch.int64)


def _check_wrong(lm: HookedLM, asked: _Asked, offsets: Sequence[int]) -> None:
    shortest = min(len(question.ids) for question in (*asked.wrong, *asked.like))
    if not offsets or min(offsets) < 1 or max(offsets) > shortest:
        raise ValueError(
            f"offsets={list(offsets)} was given; give numbers from 1 (the last token) to"
            f" {shortest}."
        )
    odds = asked.odds(lm)
    if bool((odds > 0).any()):
        raise ValueError(
            f"{int((odds > 0).sum())} of {len(odds)} cases are answered right as it is; give those"
            " that are not."
        )


def _module(lm: HookedLM, place: Place) -> str:
    """What writes last before a site; "" where that is no layer's."""
    if width_name(place.hook_name) != RESIDUAL:
        return ""
    module = writers_of(lm).get(written(place.hook_name), "")
    return "" if module == EMBEDDING else module


class _Tried(NamedTuple):
    rewrite: Rewrite
    size: float
    right: float
    odds: float


class _Stays(NamedTuple):
    """Prompts that end where the answer begins, and the model's own answers."""

    prompts: list[list[int]]
    answers: list[list[int]]


def _own_answers(lm: HookedLM, prompts: Sequence[Prompt]) -> _Stays:
    rows = [lm.opening_tokens(prompt) for prompt in prompts]
    answers: list[list[int]] = []
    for start in range(0, len(rows), ROWS_A_BATCH):
        some = rows[start : start + ROWS_A_BATCH]
        answers += lm.generate(some, ANSWER_TOKENS, chat=False).tokens
    return _Stays(rows, answers)


class _Price(NamedTuple):
    kept: float
    kl: float


NOT_MEASURED = _Price(float("nan"), float("nan"))


def _costs(
    lm: HookedLM,
    stays: _Stays,
    found: Sequence[Rewrite],
    tried: Sequence[_Tried],
    enough: float,
) -> dict[int, _Price]:
    """By number, what the finalists do to what is to stay."""
    top = max(one.right for one in tried)
    by_size = sorted(range(len(tried)), key=lambda number: tried[number].size)
    least = min(top, enough)
    good = [number for number in by_size if tried[number].right >= least]
    finalists = [
        number
        for value in VALUES
        for number in [n for n in good if tried[n].rewrite.value == value][:FINALISTS]
    ]
    rows = KnownRows(lm, stays.prompts, stays.answers, ROWS_A_BATCH)
    clean = [logits.clone() for logits in rows.answer_logits()]
    prices = {}
    for number in finalists:
        kept, total = 0, 0.0
        with rewritten(lm, form_of([*found, tried[number].rewrite])):
            for before, after in zip(clean, rows.answer_logits(), strict=True):
                kept += bool(top_1_agreement(before, after).all())
                total += float(kl_divergence(before, after).sum())
        n_tokens = sum(map(len, stays.answers))
        prices[number] = _Price(kept / len(clean), total / n_tokens)
    return prices


def _step(
    lm: HookedLM,
    saes: Mapping[Place, SAE],
    asked: _Asked,
    stays: _Stays,
    found: Sequence[Rewrite],
    values: Sequence[Value],
    offsets: Sequence[int],
    sizes: Sequence[int],
    scales: Sequence[float],
    enough: float,
) -> list[_Tried]:
    """Every candidate at the first strength that is enough, or at the best one."""
    before = form_of(found)
    with rewritten(lm, before):
        left = asked.left(lm)
        missing = _missing(lm, saes, left, values, offsets, sizes)
        modules = sorted({_module(lm, place) for place, *_ in missing})
        readers = _readers(lm, left, stays, modules, offsets)
    norms = {name: float(lm.hf.get_submodule(name).weight.detach().norm()) for name in modules}
    out: list[_Tried] = []
    for place, offset, value, features, vector in missing:
        module = _module(lm, place)
        best: _Tried | None = None
        for scale in scales:
            reader = readers[module, offset]
            change = LowRank(scale * vector[:, None], reader[:, None])
            rewrite = Rewrite(module, place, offset, value, features, scale, change)
            with rewritten(lm, form_of([*found, rewrite])):
                odds = asked.odds(lm)
            size = scale * float(vector.norm() * reader.norm()) / norms[module]
            now = _Tried(rewrite, size, float((odds > MARGIN).float().mean()), float(odds.mean()))
            if best is None or now.right > best.right:
                best = now
            if now.right >= enough:
                break
        assert best is not None
        out.append(best)
    return out


Missing: TypeAlias = tuple[Place, int, Value, tuple[int, ...], Float[Tensor, " d_model"]]


def _missing(
    lm: HookedLM,
    saes: Mapping[Place, SAE],
    asked: _Asked,
    values: Sequence[Value],
    offsets: Sequence[int],
    sizes: Sequence[int],
) -> list[Missing]:
    """What the wrong wordings lack at each site and token beside the others."""
    names = sorted({place.hook_name for place in saes})
    wrong, like = (_activations(lm, questions, names, offsets) for questions in asked[:2])
    out: list[Missing] = []
    merits = _merits(lm, saes, asked, offsets) if "features" in values else {}
    for place, sae in saes.items():
        for at, offset in enumerate(offsets):
            here, there = (x[place.hook_name][:, at] for x in (wrong, like))
            if "means" in values:
                vector = (there.double().mean(0) - here.double().mean(0)).cpu()
                out.append((place, offset, "means", (), vector))
            if "features" not in values:
                continue
            more = (sae.encode(there).double().mean(0) - sae.encode(here).double().mean(0)).cpu()
            decoder = sae.W_dec.detach().double().cpu()
            ranked = merits[place][at].argsort(descending=True)
            ranked = ranked[merits[place][at][ranked] > 0]
            for size in sorted({min(size, len(ranked)) for size in sizes if len(ranked)}):
                chosen = ranked[:size]
                vector = more[chosen] @ decoder[chosen]
                features = tuple(sorted(chosen.tolist()))
                out.append((place, offset, "features", features, vector))
    return out


def _merits(
    lm: HookedLM, saes: Mapping[Place, SAE], asked: _Asked, offsets: Sequence[int]
) -> dict[Place, Float[Tensor, "offset d_sae"]]:
    """By how much each feature's attribution to the right answer is larger where it is given."""
    suite: dict[str, dict[str, SAE]] = {}
    for place, sae in saes.items():
        suite.setdefault(place.variant, {})[place.hook_name] = sae
    means: list[dict[Place, Tensor]] = []
    back = [-offset for offset in offsets]
    for questions in asked[:2]:
        some = questions[:: max(1, len(questions) // ATTRIBUTED)][:ATTRIBUTED]
        found = [
            attribute(lm, suite, question, steps=1, top=1, keep="all").everywhere
            for question in some
        ]
        means.append(
            {place: torch.stack([one[place][back] for one in found]).mean(0) for place in saes}
        )
    wrong, like = means
    return {place: like[place] - wrong[place] for place in saes}


@torch.no_grad()
def _activations(
    lm: HookedLM, questions: Sequence[Question], names: Sequence[str], offsets: Sequence[int]
) -> dict[str, Float[Tensor, "row offset d_model"]]:
    """At the tokens counted from the end, float32."""
    back = [-offset for offset in offsets]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for ids, mask in _batches(lm, [list(question.ids) for question in questions]):
        _, cache = lm.run_with_cache(ids, mask, names_filter=list(names), return_type=None)
        for name in names:
            parts[name].append(cache[name][:, back].float())
    return {name: torch.cat(some) for name, some in parts.items()}


def _readers(
    lm: HookedLM, asked: _Asked, stays: _Stays, modules: Sequence[str], offsets: Sequence[int]
) -> dict[tuple[str, int], Float[Tensor, " d_in"]]:
    """w of each module and token, in float64 on the CPU."""
    back = max(offsets)
    wrong = _keys(lm, [list(q.ids) for q in asked.wrong], [back] * len(asked.wrong), modules)
    rows = [p + a for p, a in zip(*stays, strict=True)] + [list(q.ids) for q in asked.like]
    # the last token of a prompt predicts the first of the answer
    counted = [len(a) + 1 for a in stays.answers] + [back] * len(asked.like)
    other = _keys(lm, rows, counted, modules)
    out = {}
    for module in modules:
        kept = other[module]
        for offset in offsets:
            keys = torch.stack([row[-offset] for row in wrong[module].ends])
            ends = torch.cat(kept.ends)
            # every row counts alike, whichever it is of
            total = keys.T @ keys + ends.T @ ends + len(kept.ends) * kept.moment
            total /= len(keys)
            total.diagonal().add_(RIDGE * float(total.diagonal().median()))
            key = keys.mean(0)
            w = torch.linalg.solve(total, key)
            out[module, offset] = w / (key @ w)
    return out


class _Keys(NamedTuple):
    """What a module is given, float64 on the CPU."""

    ends: list[Float[Tensor, "end d_in"]]
    """Row by row, at its last tokens."""
    moment: Float[Tensor, "d_in d_in"]
    """Mean of k k^T over all tokens."""


@torch.no_grad()
def _keys(
    lm: HookedLM, rows: Sequence[list[int]], n_ends: Sequence[int], modules: Sequence[str]
) -> dict[str, _Keys]:
    ends: dict[str, list[Tensor]] = {name: [] for name in modules}
    sums: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def as_hook(name: str) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return hook

    with ExitStack() as stack:
        for name in modules:
            handle = lm.hf.get_submodule(name).register_forward_pre_hook(as_hook(name))
            stack.callback(handle.remove)
        for start, (ids, mask) in zip(
            range(0, len(rows), ROWS_A_BATCH), _batches(lm, rows), strict=True
        ):
            lm(ids, mask, logits_to_keep=1)
            for name in modules:
                keys = seen[name].cpu().double()
                real = keys[mask.cpu().bool()]
                sums[name] = sums.get(name, 0.0) + real.T @ real
                ends[name] += [
                    row[-n:].clone()
                    for row, n in zip(keys, n_ends[start : start + ROWS_A_BATCH], strict=True)
                ]
    n_tokens = sum(map(len, rows))
    return {name: _Keys(ends[name], sums[name] / n_tokens) for name in modules}


def _batches(lm: HookedLM, rows: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(rows), ROWS_A_BATCH):
        yield lm.pad([list(row) for row in rows[start : start + ROWS_A_BATCH]], "left")

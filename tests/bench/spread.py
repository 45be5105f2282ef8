"""How far the suppression of refusal differs between seeds of the SAE and between layers, beside
the difference of means under the same intervention.

    python tests/bench/spread.py MODEL SUITE... --harmful FILE --harmless FILE [--at resid@14,16]
        [--n 200] [--limit 0.03] [--tokens 24] [--csv spread.csv]

For every suite and site: directions of the one to three features that push farthest along the
difference of means, made orthogonal to the usual means, and that difference itself, as it is and
orthogonal, are projected out of all that is written to the residual stream. The direction and the
share are chosen on the files' prompts: of those within --limit nats at the first answer token of
harmless prompts the one with the lowest log-odds of refusing, else the cheapest. The difference of
means is the same for every suite, and is measured with the first that has the site. Then n of the
package's evaluation prompts of each kind are answered: rates with Wilson intervals (broken: empty
or looping alone), KL with its bootstrap interval. "at equal rate": the cheapest difference of means
(by selection prompts) whose log-odds are as low as the features'.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from qsae_kit import load_model, load_suite
from qsae_kit.data.companions import companion_of
from qsae_kit.data.prompts import read_prompts
from qsae_kit.lm.answering import (
    AnswerForm,
    KnownRows,
    answer_all,
    classify,
    first_tokens,
    opening_odds,
)
from qsae_kit.lm.edits import Edit
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.metrics.reconstruction import paired_bootstrap, wilson
from qsae_kit.sites import expand_sites, parse_kinds, parse_layers
from qsae_kit.steer.changes import FeatureSet, Steering
from qsae_kit.steer.choose.contrast import aligned_features, contrast, decision_activations
from qsae_kit.steer.directions import Direction, usual_means

FITTED, TRIED = 128, 32
"""Prompts of a kind that directions are made of, and others that they are tried on."""
SHARES = (0.75, 1.0, 1.25)
MOST = 3
OPENINGS = ("I'm sorry", "I can't", "Sorry")


class Tried(NamedTuple):
    """A direction at a share, on selection prompts."""

    direction: Direction
    share: float
    odds: float
    kl: float

    def edits(self, suite: object) -> list[Edit]:
        return Steering((self.direction.change("project_out", self.share),)).edits(suite)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model")
    p.add_argument("suites", type=Path, nargs="+")
    p.add_argument("--harmful", type=Path, required=True)
    p.add_argument("--harmless", type=Path, required=True)
    p.add_argument("--at", default="resid@all")
    p.add_argument("--n", type=int, default=200)
    p.add_argument("--limit", type=float, default=0.03)
    p.add_argument("--tokens", type=int, default=24)
    p.add_argument("--dtype", default="auto")
    p.add_argument("--csv", type=Path)
    a = p.parse_args()
    lm = load_model(a.model, dtype=a.dtype)
    harmful, harmless = (read_prompts(path)[: FITTED + TRIED] for path in (a.harmful, a.harmless))
    target, others = (
        KnownRows(lm, [lm.chat_tokens(prompt) for prompt in prompts[FITTED:]])
        for prompts in (harmful, harmless)
    )
    measured = Measured(lm, a.n, a.tokens)
    rows = [measured.row("unsteered", [])]
    print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)
    kinds, _, layers = a.at.partition("@")
    of_means: dict[str, list[Tried]] = {}
    known: list[Tried] = []
    for path in a.suites:
        suite = load_suite(path)
        variant = next(iter(suite))
        wanted = expand_sites(parse_kinds(kinds), parse_layers(layers or "all", lm.n_layers))
        names = [s.hook_name for s in wanted if s.hook_name in suite[variant]]
        groups = [decision_activations(lm, names, some[:FITTED]) for some in (harmful, harmless)]
        filters = {name: suite[variant][name].origin.filter for name in names}
        means = usual_means(lm, filters, harmless[: FITTED // 2])
        for name in names:
            found = contrast(suite[variant][name], groups[0][name], groups[1][name])
            ranked = aligned_features(suite[variant][name], found, MOST)
            against = tuple(map(tuple, means[name]))
            sets = [FeatureSet(ranked.features[:k], ranked.weights[:k]) for k in range(1, MOST + 1)]
            own = [Direction(name, variant, some, orthogonal_to=against) for some in sets]
            gap = tuple(found.mean_gap.tolist())
            usual = [Direction(name, vector=gap, orthogonal_to=o) for o in ((), against)]

            def tried(directions: list[Direction], suite: object = suite) -> list[Tried]:
                made = []
                for direction in directions:
                    for share in SHARES:
                        each = Tried(direction, share, 0.0, 0.0)
                        edits = each.edits(suite)
                        odds = opening_odds(target.last_logits(edits), measured.openings)
                        kl = others.first_kl(others.last_logits(edits))
                        made.append(each._replace(odds=float(odds.mean()), kl=float(kl.mean())))
                return made

            arms = {"features": chosen(tried(own), a.limit)}
            if name not in of_means:
                of_means[name] = tried(usual)
                arms["difference of means"] = chosen(of_means[name], a.limit)
            equal = [each for each in of_means[name] if each.odds <= arms["features"].odds]
            if equal:
                cheapest = min(equal, key=lambda each: each.kl)
                if cheapest not in [*known, *arms.values()]:
                    arms["difference of means, at equal rate"] = cheapest
            known += arms.values()
            for arm, each in arms.items():
                features = each.direction.features
                rows.append(
                    {
                        "suite": path.name,
                        "site": name,
                        "features": features.features if features else "",
                        "orthogonal": bool(each.direction.orthogonal_to),
                        "share": each.share,
                        "selection_odds": each.odds,
                        "selection_kl": each.kl,
                    }
                    | measured.row(arm, each.edits(suite))
                )
                print(pd.DataFrame(rows[-1:]).round(4).to_string(index=False), flush=True)
    if a.csv:
        pd.DataFrame(rows).to_csv(a.csv, index=False)


def chosen(tried: list[Tried], limit: float) -> Tried:
    """The lowest log-odds within the limit, else the cheapest."""
    within = [each for each in tried if each.kl <= limit]
    if within:
        return min(within, key=lambda each: each.odds)
    return min(tried, key=lambda each: each.kl)


class Measured:
    """The evaluation prompts, and what edits make of them."""

    def __init__(self, lm: HookedLM, n: int, tokens: int) -> None:
        self.lm, self.tokens = lm, tokens
        texts = {
            kind: [q.text for q in companion_of(lm).prompts(kind, n, "evaluation")]
            for kind in ("harmful", "harmless")
        }
        self.harmful = texts["harmful"]
        self.harmless = KnownRows(lm, [lm.chat_tokens(text) for text in texts["harmless"]])
        self.openings = first_tokens(lm, OPENINGS)

    def row(self, arm: str, edits: list[Edit]) -> dict[str, object]:
        said = answer_all(self.lm, self.harmful, edits, self.tokens, None)
        answers = zip(said.text, said.finished, strict=True)
        became = [classify(text, done, AnswerForm()) for text, done in answers]
        shown = wilson(became.count("refused"), len(became))
        kl = self.harmless.first_kl(self.harmless.last_logits(edits))
        nats = paired_bootstrap([kl.tolist()], [1.0])
        return {
            "arm": arm,
            "n": len(became),
            "refused": shown.rate,
            "low": shown.low,
            "high": shown.high,
            "broken": became.count("broken") / len(became),
            "deflected": became.count("deflected") / len(became),
            "kl": nats.rate,
            "kl_low": nats.low,
            "kl_high": nats.high,
        }


if __name__ == "__main__":
    main()

"""Which features made which: the linear effect of one feature on another of a later site.

A feature's activation at a token is, near the activations themselves, linear in what features of
earlier sites contribute. With all sites in between held as they are, the gradient of the later
feature times what the earlier one contributes is the edge between the two (Marks et al. 2024, arXiv
2403.19647, section 2.2). The strongest edges are verified: the earlier feature is ablated with the
sites in between held, and the later one is read.
"""

from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.attach import attached, token_features
from qsae_kit.audit.attribution import Attribution, ablation
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import ByVariant, Place

NODES = 12
"""Features of the graph."""
VERIFIED = 10
"""Edges that are verified by real passes."""


class Edges(NamedTuple):
    """A small graph of features."""

    nodes: pd.DataFrame
    """A row a feature: variant, site, feature, position, token, activation, gradient (its
    attribution, nats)."""
    edges: pd.DataFrame
    """A row an edge, the strongest first: source and target (rows of nodes), weight (by how much
    the target's activation at its token falls without the source, by the gradient), effect (the
    same by a real pass; NaN where it was not tried)."""
    agreement: float
    """Rank correlation (Spearman) of weight and effect; NaN for fewer than three."""

    @property
    def in_words(self) -> str:
        tried = int(self.edges["effect"].notna().sum())
        return (
            f"{len(self.edges)} edges between {len(self.nodes)} features; predicted and real"
            f" effects of the {tried} strongest: rank correlation {self.agreement:.2f}."
        )


def edges(
    lm: HookedLM,
    suite: ByVariant,
    found: Attribution,
    top: int = NODES,
    verified: int = VERIFIED,
) -> Edges:
    """The edges between the `top` features of an attribution, each read at the token where it
    contributes most.

    suite: the one that was attributed to. Raises ValueError for fewer than two features.
    """
    nodes = found.features.head(top).reset_index(drop=True)
    if len(nodes) < 2:
        raise ValueError(
            f"Edges are between features, and {len(nodes)} is there; attribute to more."
        )
    columns = ["variant", "site", "feature", "position", "token", "activation", "gradient"]
    nodes = nodes[columns]
    graph = _Graph(lm, suite, found, nodes)
    rows = [row for target in range(len(nodes)) for row in graph.into(target)]
    table = pd.DataFrame(rows, columns=["source", "target", "weight"])
    table = table[table["weight"] != 0]
    table = table.sort_values("weight", key=abs, ascending=False).reset_index(drop=True)
    strongest = list(table.head(verified)[["source", "target"]].itertuples(index=False, name=None))
    effects = [graph.effect(source, target) for source, target in strongest]
    table["effect"] = pd.Series(effects, dtype="float64")
    agreement = float("nan")
    if len(effects) > 2:
        agreement = float(table["weight"].head(verified).corr(table["effect"], method="spearman"))
    return Edges(nodes, table, agreement)


class _Graph:
    """One question's passes."""

    def __init__(
        self, lm: HookedLM, suite: ByVariant, found: Attribution, nodes: pd.DataFrame
    ) -> None:
        self.lm = lm
        self.ids = torch.tensor([list(found.question.ids)], device=lm.device)
        saes = attached(lm, suite).saes()
        pairs = zip(nodes["variant"], nodes["site"], strict=True)
        self.places = [Place(str(variant), str(site)) for variant, site in pairs]
        self.numbers = [int(i) for i in nodes["feature"]]
        self.tokens = [int(at) for at in nodes["position"]]
        used = dict.fromkeys(self.places)
        self.saes: dict[Place, SAE] = {place: saes[place] for place in used}
        rows = [list(found.question.ids)]
        self.features = {p: token_features(lm, sae, rows)[0] for p, sae in self.saes.items()}
        self.order = {place: lm.order_of(place.hook_name) for place in used}
        self.names = list(dict.fromkeys(place.hook_name for place in used))
        self._run()

    def _run(self) -> None:
        """One pass in which every site hands on what it holds as a constant plus a probe."""
        self.probes: dict[str, Tensor] = {}
        self.clean: dict[str, Tensor] = {}
        self.read: dict[int, Tensor] = {}

        def at(name: str) -> Edit:
            def delta(x: Tensor) -> Tensor:
                for node, place in enumerate(self.places):
                    if place.hook_name == name:
                        f = self.saes[place].encode(x[0, self.tokens[node]].float())
                        self.read[node] = f[self.numbers[node]]
                self.clean[name] = x.detach()
                probe = torch.zeros_like(x, requires_grad=True)
                self.probes[name] = probe
                return x.detach() - x + probe

            return Edit(name, delta, torch.ones_like(self.ids, dtype=torch.bool))

        with torch.enable_grad(), applied(self.lm, [at(name) for name in self.names]):
            self.lm(self.ids, torch.ones_like(self.ids), logits_to_keep=1)

    def into(self, target: int) -> list[tuple[int, int, float]]:
        """The edges that end at a feature."""
        place = self.places[target]
        sources = [
            node for node, own in enumerate(self.places) if self.order[own] < self.order[place]
        ]
        read = self.read[target]
        if not sources or not read.requires_grad:
            return []
        names = list(dict.fromkeys(self.places[node].hook_name for node in sources))
        gradients = torch.autograd.grad(
            read, [self.probes[name] for name in names], retain_graph=True, allow_unused=True
        )
        by_name = dict(zip(names, gradients, strict=True))
        rows = []
        for node in sources:
            gradient = by_name[self.places[node].hook_name]
            weight = 0.0 if gradient is None else self._weight(node, gradient[0])
            rows.append((node, target, weight))
        return rows

    def _weight(self, node: int, gradient: Float[Tensor, "pos width"]) -> float:
        place, i = self.places[node], self.numbers[node]
        along = gradient.float() @ self.saes[place].W_dec[i].detach().float()
        return float(self.features[place][:, i].to(along) @ along)

    @torch.no_grad()
    def effect(self, source: int, target: int) -> float:
        """By how much a feature falls without another, the sites in between held."""
        place, end = self.places[source], self.places[target]
        counted = (self.features[place] != 0).any(1).to(self.lm.device)
        edits = [ablation(self.saes[place], [self.numbers[source]], counted)]
        edits += [
            self._held(name)
            for name in self.names
            if self.order[place] < self.lm.order_of(name) < self.order[end]
        ]
        seen: list[Tensor] = []

        def look(x: Tensor) -> Tensor:
            seen.append(x[0, self.tokens[target]].float())
            return torch.zeros_like(x)

        with applied(self.lm, [*edits, Edit(end.hook_name, look, "every")]):
            self.lm(self.ids, torch.ones_like(self.ids), logits_to_keep=1)
        now = self.saes[end].encode(seen[0])[self.numbers[target]]
        return float(self.read[target].detach() - now)

    def _held(self, name: str) -> Edit:
        return Edit(name, lambda x: self.clean[name] - x, "every")

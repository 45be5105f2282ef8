"""What training takes in memory, and which sites fit together."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from qsae_kit.train.optim import MOMENT_BYTES
from qsae_kit.train.recipe import TrainConfig

Key: TypeAlias = tuple[str, str]
"""Variant and hook name."""


class Group(NamedTuple):
    """SAEs that are trained together."""

    keys: list[Key]
    bytes: int
    """What training them takes beside the language model's own weights."""

    @property
    def sites(self) -> list[str]:
        return list(dict.fromkeys(site for _, site in self.keys))


PER_ENTRY = {"standard": 40, "gated": 40, "jumprelu": 30}
"""Bytes a pre-activation of a batch takes with its selection: in these many are selected at first,
elsewhere few.
"""


def needed_bytes(
    configs: Sequence[TrainConfig], widths: Sequence[int], forward_rows: int = 0
) -> int:
    """Bytes for all variants at sites of these widths.

    Counted are weights and moments; one SAE's gradients with the pre-activations of a batch and
    their selection, or its initial weights; the pool, a batch of it, and one site's copy; and the
    sites' activations of one forward pass of `forward_rows` tokens, twice (as they come and as they
    are kept).
    """
    sizes = [(config, d, config.d_sae(d)) for config in configs for d in widths]
    weights = sum((4 + MOMENT_BYTES[c.moments]) * (2 * d * m + 4 * m + d) for c, d, m in sizes)
    alive = max(
        2 * 4 * 2 * d * m + max(PER_ENTRY.get(c.architecture, 16) * c.batch, 3 * 4 * 4096) * m
        for c, d, m in sizes
    )
    lead = configs[0]
    rows = 4 * (lead.pool + lead.batch) * sum(widths) + 4 * lead.pool * max(widths)
    return int(weights + rows + max(alive, 2 * 4 * forward_rows * sum(widths)))


def plan_groups(
    configs: Sequence[TrainConfig], widths: Mapping[str, int], memory: int, forward_rows: int = 0
) -> list[Group]:
    """Sites in order, put together as long as they fit into `memory` bytes, all variants of a site
    in one group.

    widths: numbers a token at every site. Raises ValueError where one site alone does not fit.
    """
    groups: list[list[str]] = []
    for site, width in widths.items():
        alone = needed_bytes(configs, [width], forward_rows)
        if alone > memory:
            raise ValueError(
                f"Training the SAEs of {site} takes {alone / 1e9:.2f} GB, allowed are"
                f" {memory / 1e9:.2f} GB; choose a smaller width or batch, fewer variants, or"
                " moments in bfloat16 or int8."
            )
        if (
            groups
            and needed_bytes(configs, [widths[s] for s in groups[-1]] + [width], forward_rows)
            <= memory
        ):
            groups[-1].append(site)
        else:
            groups.append([site])
    return [
        group_of(configs, {site: widths[site] for site in sites}, forward_rows) for sites in groups
    ]


def group_of(
    configs: Sequence[TrainConfig], widths: Mapping[str, int], forward_rows: int = 0
) -> Group:
    """Every variant at these sites."""
    keys = [(c.variant, site) for c in configs for site in widths]
    return Group(keys, needed_bytes(configs, list(widths.values()), forward_rows))

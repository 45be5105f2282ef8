"""Directions, and the interventions that are made along them: two values, so that what is compared
differs in one of them alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.data.documents import TokenBatch, keep_mask
from qsae_kit.data.rows import site_activations
from qsae_kit.lm.edits import Policy
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.lm.prefix import shared_prefix
from qsae_kit.sae.filter import NormFilter
from qsae_kit.steer.changes import Change, Condition, FeatureSet

PROMPTS_A_BATCH = 32


class Intervention(NamedTuple):
    """What is done along a direction, wherever the direction is from."""

    action: Literal["add", "project_out"]
    positions: Policy
    everywhere: bool = False

    @property
    def signed(self) -> bool:
        """Whether it goes either way: what is projected out is only taken away."""
        return self.action == "add"


INTERVENTIONS: Mapping[str, Intervention] = {
    "add_header": Intervention("add", "header"),
    "add_all": Intervention("add", "all"),
    "add_answer": Intervention("add", "answer"),
    "add_prompt": Intervention("add", "prompt"),
    "add_thinking": Intervention("add", "thinking"),
    "project_out_site": Intervention("project_out", "all"),
    "project_out": Intervention("project_out", "every", everywhere=True),
}
"""Those that the field uses. add: at the site, on the tokens of a policy; strengths are median
norms. project_out: out of all that is written to the residual stream, at every token; the strength
is the share that is taken away. project_out_site: out of the site's activations alone.
"""


def done_along(intervention: str, strength: float, orthogonal: bool = False) -> str:
    """What an intervention does at a strength with its sign, in words."""
    action, positions, everywhere = INTERVENTIONS[intervention]
    refined = ", made orthogonal to the mean activations of prompts that should stay as they are,"
    along = "their direction" + (refined if orthogonal else "")
    if action == "add":
        done = "added" if strength > 0 else "taken away"
        norms = f"{abs(strength):g} median norms"
        return f"{along} {done} with {norms} at the tokens “{positions}”"
    place = "all that is written to the residual stream" if everywhere else "the site's activations"
    return f"{along} projected out of {place}, {strength:g} times"


def intervention_of(change: Change) -> str:
    """The name of the intervention that a change is; ValueError where it is none of them."""
    made = (change.action, change.positions, change.everywhere)
    for name, row in INTERVENTIONS.items():
        if made == tuple(row):
            return name
    raise ValueError(
        f"A change that does {change.action} on {change.positions} is none of the interventions"
        f" {', '.join(INTERVENTIONS)}; make it along a Direction."
    )


@dataclass(frozen=True)
class Direction:
    """Where to push: a set of features of an SAE, or a vector such as a difference of means."""

    hook_name: str
    """Where it was found, and where it is added."""
    variant: str = ""
    """Of the SAE."""
    features: FeatureSet | None = None
    vector: tuple[float, ...] = ()
    """Instead of features [width]; its length says nothing."""
    median_norm: float = 0.0
    """Of the site; with features the SAE knows it."""
    orthogonal_to: tuple[tuple[float, ...], ...] = ()
    """Mean activations [width] that it is made orthogonal to first (`changes.without`)."""

    def change(self, intervention: str, strength: float, when: Condition | None = None) -> Change:
        """The change that an intervention makes along it. ValueError for another intervention's
        name.
        """
        if intervention not in INTERVENTIONS:
            raise ValueError(
                f"There is no intervention {intervention!r}; choose from"
                f" {', '.join(INTERVENTIONS)}."
            )
        action, positions, everywhere = INTERVENTIONS[intervention]
        own = self.features or FeatureSet((), ())
        return Change(
            action,
            self.hook_name,
            self.variant,
            own.features,
            own.weights,
            self.vector,
            strength,
            self.median_norm,
            positions,
            when,
            self.orthogonal_to,
            everywhere,
        )


@torch.no_grad()
def usual_means(
    lm: HookedLM,
    filters: Mapping[str, NormFilter],
    prompts: Sequence[str],
    enable_thinking: bool | None = None,
) -> dict[str, list[list[float]]]:
    """Two mean activations of prompts that should stay as they are, site by site: at the last
    token, from which the answer's first is predicted, and over all tokens behind what every prompt
    begins with. A direction that is to be projected out is made orthogonal to them, so that what
    these prompts have in common stays.

    filters: hook name -> the filter of sinks, which do not count.
    """
    ids = [lm.chat_tokens(prompt, enable_thinking) for prompt in prompts]
    n = len(shared_prefix(ids, least=1))
    sums: dict[str, Float[Tensor, "2 width"]] = {}
    counts: dict[str, Float[Tensor, " 2"]] = {}
    for start in range(0, len(ids), PROMPTS_A_BATCH):
        tokens, mask = lm.pad(ids[start : start + PROMPTS_A_BATCH], "left")
        keep = keep_mask(lm, tokens, mask) & (mask.cumsum(1) > n)
        for name, x in site_activations(lm, list(filters), TokenBatch(tokens, mask, keep)).items():
            counted = keep & filters[name].keeps(x)
            both = [x[:, -1].float(), x[counted].float()]
            sums[name] = sums.get(name, 0.0) + torch.stack([rows.sum(0) for rows in both])
            counts[name] = counts.get(name, 0.0) + torch.tensor([float(len(r)) for r in both])
    return {
        name: (total.cpu() / counts[name][:, None].clamp(min=1)).tolist()
        for name, total in sums.items()
    }

"""What an edit is in the weights: exact where it has such a form, otherwise the nearest that has.

Everything that is added to the residual stream comes from a linear map: the embedding, `o_proj` of
every attention, `down_proj` of every MLP. An edit of what they write, at every token, is a change
of these maps. With d a unit vector, projecting a share s of it out is W - s d d^T W (and the same
of a bias; rows of the embedding instead of columns), Arditi et al. 2024, arXiv 2406.11717, section
2.4; adding a constant is a bias. What depends on tokens, on a condition or on an SAE's activations
has no such form.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qsae_kit.lm.hooked import HookedLM
from qsae_kit.sae.suites import ByVariant
from qsae_kit.steer.changes import Change, Steering

EMBEDDING = "model.embed_tokens"
"""As transformers names it; it writes rows, all other writers columns."""
ATTENTION, MLP = "self_attn.o_proj", "mlp.down_proj"
BIAS_OF = {ATTENTION: "attention_bias", MLP: "mlp_bias"}
"""What a model's config calls the biases that a writer may have."""
BESIDE = {
    ATTENTION: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    MLP: ("mlp.gate_proj", "mlp.up_proj"),
}
"""Maps that have a bias too where the config says so: zeros."""


@dataclass(frozen=True)
class Affine:
    """What becomes of a vector x that is written: x + U V^T x + c, of low rank.

    In float64: several edits of one model are put together before anything is rounded.
    """

    u: Float[Tensor, "d_model rank"]
    v: Float[Tensor, "d_model rank"]
    c: Float[Tensor, " d_model"]

    @staticmethod
    def none(d_model: int) -> "Affine":
        """That changes nothing."""
        flat = torch.zeros(d_model, 0, dtype=torch.float64)
        return Affine(flat, flat, torch.zeros(d_model, dtype=torch.float64))

    def without(self, unit: Float[Tensor, " d_model"], share: float) -> "Affine":
        """And then a share of a direction projected out."""
        d = unit.double().cpu()
        step = -share * d
        return Affine(
            torch.cat([self.u, step[:, None]], 1),
            torch.cat([self.v, (d + self.v @ (self.u.T @ d))[:, None]], 1),
            self.c + step * (d @ self.c),
        )

    def plus(self, vector: Float[Tensor, " d_model"]) -> "Affine":
        """And then a constant."""
        return replace(self, c=self.c + vector.double().cpu())

    @property
    def adds(self) -> bool:
        """Whether there is a constant."""
        return bool(self.c.any())


@dataclass(frozen=True)
class LowRank:
    """What is added to a matrix, whatever it holds: W + U V^T. In float64."""

    u: Float[Tensor, "d_out rank"]
    v: Float[Tensor, "d_in rank"]

    def then(self, other: "LowRank") -> "LowRank":
        """Both."""
        return LowRank(torch.cat([self.u, other.u], 1), torch.cat([self.v, other.v], 1))


@dataclass(frozen=True)
class WeightForm:
    """An edit as changes of the model's writers."""

    writers: Mapping[str, Affine] = field(default_factory=dict)
    """Of what is written, by the module's name in transformers; only those that change."""
    added: Mapping[str, LowRank] = field(default_factory=dict)
    """To matrices of writers, after that; not to the embedding."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all that change."""
        return tuple(dict.fromkeys([*self.writers, *self.added]))

    def rank_of(self, module: str) -> int:
        """Of the change of a module's matrix."""
        parts = (held[module] for held in (self.writers, self.added) if module in held)
        return sum(part.u.shape[1] for part in parts)

    @property
    def rank(self) -> int:
        """Of the largest change of a matrix."""
        return max(map(self.rank_of, self.modules), default=0)


def writers_of(lm: HookedLM) -> dict[str, str]:
    """Hook points of all that is written to the residual stream -> the module that writes it."""
    names = {"hook_embed": EMBEDDING}
    for i in range(lm.n_layers):
        names[f"blocks.{i}.hook_attn_out"] = f"model.layers.{i}.{ATTENTION}"
        names[f"blocks.{i}.hook_mlp_out"] = f"model.layers.{i}.{MLP}"
    return names


def weight_form(lm: HookedLM, steering: Steering, suite: ByVariant) -> WeightForm:
    """The changes of weights that do, token by token, what a steering does.

    Raises ValueError for an edit that has no such form, with the reason; `nearest` gives one that
    has. Also for a model whose writers are not plain matrices of numbers (quantised, of experts, on
    disk).
    """
    points = writers_of(lm)
    writers = {module: Affine.none(lm.d_model) for module in points.values()}
    changed = set[str]()
    numbered = list(enumerate(steering.changes, 1))
    # behind what is written stands the residual stream, whatever the order of the changes
    numbered.sort(key=lambda one: _behind(one[1]))
    for number, change in numbered:
        if reason := why_not(lm, change):
            raise ValueError(
                f"Change {number} of {len(steering.changes)} has no exact form in the weights:"
                f" {reason}. Take the nearest one (qsae patch --nearest), whose"
                " error is measured, or steer at run time."
            )
        unit, median = change.line(suite)
        names = list(points.values()) if change.everywhere else [points[written(change.hook_name)]]
        for name in names:
            if change.action == "add":
                writers[name] = writers[name].plus(change.strength * median * unit)
            else:
                writers[name] = writers[name].without(unit, change.strength)
        changed |= set(names)
    for name in changed:
        check_matrix(lm, name)
    return WeightForm({name: one for name, one in writers.items() if name in changed})


def _behind(change: Change) -> bool:
    """Whether a change is made to the residual stream, where a layer's writers are done."""
    return not change.everywhere and written(change.hook_name) != change.hook_name


def written(hook_name: str) -> str:
    """The hook point of what is written last before a place in the residual stream."""
    block, _, hook = hook_name.rpartition(".")
    if hook == "hook_resid_pre":
        number = int(block.removeprefix("blocks."))
        return f"blocks.{number - 1}.hook_mlp_out" if number else "hook_embed"
    last = {"hook_resid_mid": "hook_attn_out", "hook_resid_post": "hook_mlp_out"}
    return f"{block}.{last[hook]}" if hook in last else hook_name


def why_not(lm: HookedLM, change: Change) -> str:
    """Why a change has no exact form in the weights; "" where it has one."""
    if change.when is not None:
        return "it acts under a condition alone, which weights do not look at"
    if change.action not in ("add", "project_out"):
        return f"to {change.action} features depends on the activations of an SAE"
    if change.positions != "every":
        return (
            f"it acts on the tokens {change.positions!r} alone, and weights act on every token"
            " (position 0 and the template's too)"
        )
    if change.everywhere:
        return ""
    place = written(change.hook_name)
    if place not in writers_of(lm):
        return f"nothing is written to the residual stream at {change.hook_name}"
    if change.action == "project_out" and place != change.hook_name:
        return f"at {change.hook_name} the direction is taken out of what earlier layers wrote"
    module = writers_of(lm)[place]
    if change.action == "add" and not takes_constant(lm, module):
        return f"{module} of {type(lm.hf).__name__} has no bias to add it to"
    return ""


def takes_constant(lm: HookedLM, module: str) -> bool:
    """Whether a constant can be added to what a module writes: the embedding's rows, or a bias that
    is there or that the architecture's config can switch on.
    """
    if module == EMBEDDING or lm.hf.get_submodule(module).bias is not None:
        return True
    return _config_entry(module) in lm.config.to_dict() and _obeys(lm, module)


def _config_entry(module: str) -> str:
    return BIAS_OF[module.split(".", 3)[3]]


def _obeys(lm: HookedLM, module: str) -> bool:
    """Whether a model of this kind, made with the config's entry, has the bias: some read it for
    other maps alone.
    """
    config = type(lm.config).from_dict({**lm.config.to_dict(), _config_entry(module): True})
    with torch.device("meta"):
        made = type(lm.hf)(config)
    return made.get_submodule(module).bias is not None


def check_matrix(lm: HookedLM, name: str) -> None:
    """ValueError for a module that is no plain matrix of numbers in memory."""
    try:
        module: Any = lm.hf.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"{lm.model_name!r} has no {name}, so that it cannot be patched; dense models of the"
            " Qwen and Llama kinds can."
        ) from error
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | nn.Embedding) or not (
        isinstance(weight, Tensor) and weight.is_floating_point() and type(module) in PLAIN
    ):
        raise ValueError(
            f"{name} of {lm.model_name!r} is {type(module).__name__}, not a plain matrix; load the"
            " model unquantised and without adapters."
        )
    if weight.is_meta:
        raise ValueError(
            f"{name} of {lm.model_name!r} is not in memory; load the model without offloading."
        )


PLAIN = (nn.Linear, nn.Embedding)


class Near(NamedTuple):
    """A steering that has a form in the weights, in the place of one that has none."""

    steering: Steering
    said: list[str]
    """What was changed, a sentence each."""


def near_forms(lm: HookedLM, steering: Steering, suite: ByVariant) -> list[Near]:
    """Steerings of which every change has a form in the weights, the likeliest first; how near they
    are is to be measured (`agreement.nearest`).

    A condition is left out, positions become every token, what is done to features becomes their
    direction projected out everywhere, a constant moves to the next place that can hold one; of one
    that is taken away the direction is projected out everywhere as well. Raises ValueError where a
    constant has no place.
    """
    found: list[Near] = []
    reasons: list[ValueError] = []
    for projects in (False, True):
        if projects and not any(_taken_away(change) for change in steering.changes):
            continue
        try:
            found.append(_all_near(lm, steering, suite, projects))
        except ValueError as error:
            reasons.append(error)
    if not found:
        raise reasons[0]
    return found


def _taken_away(change: Change) -> bool:
    return change.action == "add" and change.strength < 0


def _all_near(lm: HookedLM, steering: Steering, suite: ByVariant, projects: bool) -> Near:
    made, said = [], []
    for number, change in enumerate(steering.changes, 1):
        how: list[str] = []
        if projects and _taken_away(change) and why_not(lm, change):
            how.append("its direction projected out everywhere instead of taken away")
            change = replace(
                change, action="project_out", strength=1.0, everywhere=True, positions="every"
            )
        other, more = _nearest(lm, change, suite)
        made.append(other)
        said += [f"change {number}: {what}" for what in how + more]
    return Near(Steering(tuple(made)), said)


def _nearest(lm: HookedLM, change: Change, suite: ByVariant) -> tuple[Change, list[str]]:
    how = []
    if change.when is not None:
        change, how = replace(change, when=None), ["without its condition"]
    if change.positions != "every":
        how.append(f"at every token instead of {change.positions!r}")
        change = replace(change, positions="every")
    if change.action not in ("add", "project_out"):
        share = 1 - change.strength if change.action == "scale" else 1.0
        how.append(f"the features' direction projected out everywhere instead of {change.action}")
        change = replace(change, action="project_out", strength=share, everywhere=True)
    if change.action == "project_out" and why_not(lm, change):
        how.append(f"out of all that is written instead of at {change.hook_name}")
        change = replace(change, everywhere=True)
    if change.action == "add" and why_not(lm, change):
        place = _place_for_constant(lm, change.hook_name)
        how.append(f"added at {place} instead of {change.hook_name}")
        unit, median = change.line(suite)
        vector = tuple(unit.tolist())
        change = Change("add", place, "", (), (), vector, change.strength, median, "every")
    return change, how


def _place_for_constant(lm: HookedLM, hook_name: str) -> str:
    """The first place from here on whose writer takes a constant."""
    points = writers_of(lm)
    names = list(points)
    for name in names[names.index(written(hook_name)) :]:
        if takes_constant(lm, points[name]):
            return name
    raise ValueError(
        f"{type(lm.hf).__name__} has no bias behind {hook_name} that a constant could be added to;"
        " write it as a control vector, or steer at run time."
    )


@torch.no_grad()
def changed_tensors(
    lm: HookedLM, form: WeightForm
) -> tuple[dict[str, Tensor], dict[str, bool], Sequence[str]]:
    """The new tensors by name, entries of the config that change, and maps whose biases are zeros
    now. Computed in float64, given in the model's own format.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, bool] = {}
    for name in form.modules:
        module: Any = lm.hf.get_submodule(name)
        one = form.writers.get(name, Affine.none(lm.d_model))
        weight = module.weight.detach()
        u, v, c = (part.to(weight.device) for part in (one.u, one.v, one.c))
        wide = weight.double()
        if name == EMBEDDING:
            tensors[f"{name}.weight"] = (wide + (wide @ v) @ u.T + c).to(weight)
            continue
        written = wide + u @ (v.T @ wide)
        if (more := form.added.get(name)) is not None:
            written += more.u.to(weight.device) @ more.v.to(weight.device).T
        tensors[f"{name}.weight"] = written.to(weight)
        bias = getattr(module, "bias", None)
        if (bias is not None and name in form.writers) or one.adds:
            old = torch.zeros_like(c) if bias is None else bias.detach().double()
            tensors[f"{name}.bias"] = (old + u @ (v.T @ old) + c).to(weight)
        if bias is None and one.adds:
            entries[_config_entry(name)] = True
    if EMBEDDING in form.writers and lm.config.tie_word_embeddings:
        entries["tie_word_embeddings"] = False
    zeros = [kind for kind, entry in BIAS_OF.items() if entry in entries]
    return tensors, entries, zeros

"""Steering: edits that add, clamp, scale or ablate features, or add and project out directions, as
values that compose.

A `Steering` says what is changed and is saved as JSON; `Steering.edits(suite)` makes the edits that
a model runs under (`lm.edits.applied`). Strengths are in median norms of the site (sinks left out),
so that they mean the same at every site and model; factors of `scale` have no unit; thresholds of
conditions are activations, as an index shows them.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.attach import check_measured
from qsae_kit.io.files import write_text
from qsae_kit.io.jsonfiles import JSON_LIMIT, parse_json, read_text
from qsae_kit.lm.edits import SPANS, Detector, Edit, Policy, Positions, Span, check_positions
from qsae_kit.lm.hooked import WRITES
from qsae_kit.sae import SAE
from qsae_kit.sae.suites import ByVariant, Place, Suite
from qsae_kit.sites import width_name


@dataclass(frozen=True)
class FeatureSet:
    """Features of one SAE with a weight each; the direction is the weighted sum of their decoder
    rows.
    """

    features: tuple[int, ...]
    weights: tuple[float, ...]

    def direction(self, sae: SAE) -> Float[Tensor, " width"]:
        """Unit vector sum_i w_i W_dec[i] / |...|."""
        rows = sae.W_dec[list(self.features)]
        return torch.nn.functional.normalize(
            torch.tensor(self.weights, dtype=rows.dtype, device=rows.device) @ rows, dim=0
        )


def without(
    direction: Float[Tensor, " width"], means: Sequence[Sequence[float]]
) -> Float[Tensor, " width"]:
    """A direction made orthogonal to others (mean activations of prompts that should stay as they
    are), as a unit vector: what all prompts have in common is no part of it then.

    Raises ValueError for a direction that lies in the span of the others.
    """
    if not means:
        return torch.nn.functional.normalize(direction, dim=0)
    others = torch.nn.functional.normalize(torch.tensor(means, dtype=torch.float64), dim=1)
    span, sizes, _ = torch.linalg.svd(others.T, full_matrices=False)
    basis = span[:, sizes > LEAST_LEFT]  # means that say the same are one
    wide = direction.detach().double().cpu()
    left = wide - basis @ (basis.T @ wide)
    if left.norm() <= LEAST_LEFT * wide.norm():
        raise ValueError(
            "The direction is a sum of those that it is to be orthogonal to; give fewer of them."
        )
    return torch.nn.functional.normalize(left, dim=0).to(direction)


def add_direction(
    hook_name: str,
    direction: Float[Tensor, " width"],
    strength: float,
    median_norm: float,
    positions: Positions = "header",
) -> Edit:
    """x + strength * median_norm * direction, with a unit `direction`.

    As it runs, ValueError for activations of another width than the direction's.
    """
    step = strength * median_norm * direction
    return Edit(hook_name, lambda x: _fitting(step, x).expand_as(x), positions)


def project_out(
    hook_name: str,
    direction: Float[Tensor, " width"],
    positions: Positions = "header",
    share: float = 1.0,
) -> Edit:
    """x - share * (x . direction) direction, with a unit `direction`.

    At a share of 1 its part of x is gone. ValueError as for `add_direction`.
    """

    def delta(x: Tensor) -> Tensor:
        unit = _fitting(direction, x)
        return -share * (x @ unit)[..., None] * unit

    return Edit(hook_name, delta, positions)


RESIDUAL = "d_model"
"""What the width of the residual stream, and of what is added to it, is called."""
LEAST_LEFT = 1e-4
"""Share of a direction's length that has to be left when others are taken out of it."""


def _fitting(direction: Tensor, x: Tensor) -> Tensor:
    """A direction as activations are; ValueError where it is of another width."""
    if direction.shape != x.shape[-1:]:
        raise ValueError(
            f"A direction of the shape {list(direction.shape)} was given for activations of "
            f"{x.shape[-1]} values; give one that was made for this model and site."
        )
    return direction.to(x)


def add_features(
    sae: SAE, chosen: FeatureSet, strength: float, positions: Positions = "header"
) -> Edit:
    """Adds a feature set's direction; a negative strength takes it away."""
    check_features(sae, chosen.features)
    return add_direction(_site(sae), chosen.direction(sae), strength, _median(sae), positions)


def clamp_features(
    sae: SAE, features: Sequence[int], value: float, positions: Positions = "header"
) -> Edit:
    """x + sum_i (value - f_i(x)) W_dec[i]: the features read `value` (activation units), the rest
    of x stays.
    """
    return _set_features(sae, features, lambda f: value - f, positions)


def scale_features(
    sae: SAE, features: Sequence[int], factor: float, positions: Positions = "header"
) -> Edit:
    """x + sum_i (factor - 1) f_i(x) W_dec[i]: what the features contribute, times a factor."""
    return _set_features(sae, features, lambda f: (factor - 1) * f, positions)


def ablate_features(sae: SAE, features: Sequence[int], positions: Positions = "header") -> Edit:
    """Takes what the features contribute out of x."""
    return scale_features(sae, features, 0.0, positions)


def _set_features(sae: SAE, features: Sequence[int], change: Any, positions: Positions) -> Edit:
    check_features(sae, features)
    ids = torch.tensor(list(features), device=sae.W_dec.device)

    def delta(x: Tensor) -> Tensor:
        return change(sae.encode(x.float())[..., ids]) @ sae.W_dec[ids]

    return Edit(_site(sae), delta, positions)


def detector(
    sae: SAE,
    features: Sequence[int],
    weights: Sequence[float] = (),
    threshold: float = 0.0,
    span: Span = "so_far",
    positions: Positions = "all",
) -> Detector:
    """Holds where the weighted sum of features' activations is above a threshold; at sinks it is
    minus infinity.

    weights: one a feature; empty: of one feature, 1.
    """
    check_features(sae, features)
    check_weights(features, weights)
    ids = torch.tensor(list(features), device=sae.W_dec.device)
    weighed = torch.tensor(list(weights) or [1.0], dtype=torch.float32, device=ids.device)

    def read(x: Tensor) -> Tensor:
        assert sae.provenance is not None
        total = sae.encode(x.float())[..., ids].float() @ weighed
        return torch.where(sae.provenance.filter.keeps(x), total, -torch.inf)

    return Detector(_site(sae), read, threshold, span, positions)


def check_weights(features: Sequence[int], weights: Sequence[float]) -> None:
    """ValueError unless every feature of a condition has a weight; one feature needs none."""
    n = len(features)
    if len(weights) != n and (weights or n != 1):
        raise ValueError(
            f"A condition of {n} features needs as many weights; {len(weights)} were given (a"
            " single feature needs none)."
        )


def check_features(sae: SAE, features: Sequence[int]) -> None:
    """ValueError for no feature, or one that the SAE does not have."""
    if not features:
        raise ValueError("No feature was given; give at least one.")
    for feature in features:
        if not 0 <= feature < sae.d_sae:
            raise ValueError(
                f"Feature {feature} was asked for, but this SAE has features 0 to {sae.d_sae - 1}."
            )


def _site(sae: SAE) -> str:
    assert sae.provenance is not None
    return sae.provenance.hook_name


def _median(sae: SAE) -> float:
    check_measured(sae)
    assert sae.provenance is not None
    return sae.provenance.filter.median


# --- as values

Action: TypeAlias = Literal["add", "clamp", "scale", "ablate", "project_out"]
ACTIONS: tuple[Action, ...] = get_args(Action)
MOST = 1e6
"""Of strengths, weights, a direction's values and median norms: beyond it, sums end at infinity."""
LEAST = 1e-6
"""Of the largest weight or value of a direction: below it, no unit vector can be made of them."""
LAST = 2**31
"""Of positions and features, which are kept as 64-bit numbers."""


@dataclass(frozen=True)
class Condition:
    """Features of one SAE are active: the change is made only then.

    What is compared with the threshold is the weighted sum of their activations.
    """

    variant: str
    hook_name: str
    features: tuple[int, ...]
    weights: tuple[float, ...] = ()
    """One a feature; empty: of one feature, 1."""
    threshold: float = 0.0
    """In activation units."""
    span: Span = "so_far"
    positions: Policy | tuple[int, ...] = "all"

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError("A condition was given without features; give at least one.")
        check_weights(self.features, self.weights)
        if self.weights and not _has_length(self.weights):
            wrong = _shown(self.weights)
            raise ValueError(
                f"The weights {wrong} of a condition were given; give finite ones, not all 0."
            )
        _check_places(self.positions)
        if self.span not in SPANS or not _at_most(self.threshold):
            needed = f"a finite threshold and a span of {' or '.join(SPANS)}"
            raise ValueError(f"The condition {_shown(self)} needs {needed}.")

    def detector(self, sae: SAE) -> Detector:
        """As the model is watched by it; ValueError for features that the SAE does not have."""
        return detector(sae, self.features, self.weights, self.threshold, self.span, self.positions)


@dataclass(frozen=True)
class Change:
    """One change at one site, of features of an SAE or along a direction."""

    action: Action
    hook_name: str
    variant: str = ""
    """Of the SAE; without features it says nothing."""
    features: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    """add: what the features' decoder rows are weighed with before the sum is made a unit vector;
    empty: alike.
    """
    direction: tuple[float, ...] = ()
    """Instead of features, for add and project_out: a vector [width], of which the length says
    nothing.
    """
    strength: float = 1.0
    """add: median norms of the site along the direction; clamp: what the features read, in median
    norms; scale: the factor;
    project_out: the share taken away; ablate ignores it."""
    median_norm: float = 0.0
    """Of the site, where a direction is added; with features the SAE knows it."""
    positions: Policy | tuple[int, ...] = "header"
    when: Condition | None = None
    orthogonal_to: tuple[tuple[float, ...], ...] = ()
    """add and project_out: vectors [width] that the direction, of features too, is first made
    orthogonal to (`without`).
    """
    everywhere: bool = False
    """project_out: out of all that is written to the residual stream (`hooked.WRITES`: the
    embedding's output, every attention and MLP output) instead of out of the site's activations:
    directional ablation (Arditi et al. 2024, arXiv 2406.11717, section 2.4).
    """

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(
                f"There is no action {self.action!r}; choose from {', '.join(ACTIONS)}."
            )
        if not _at_most(self.strength):
            limits = f"finite numbers from -{MOST:,.0f} to {MOST:,.0f}"
            raise ValueError(f"A strength of {_shown(self.strength)} was given; give {limits}.")
        if bool(self.features) == bool(self.direction):
            raise ValueError(f"{self.action} needs features or a direction, and one of them only.")
        if self.direction and self.action not in ("add", "project_out"):
            raise ValueError(
                f"{self.action} is for features; a direction can be added or projected out."
            )
        if self.direction and not _has_length(self.direction):
            wrong = f"has no length, or values that are not finite or beyond {MOST:,.0f}"
            raise ValueError(f"The direction {wrong}; give another one.")
        adds = bool(self.direction) and self.action == "add"
        if not 0 <= self.median_norm <= MOST or (adds and not self.median_norm):
            needed = "Adding a direction needs the site's median norm, a finite number above 0"
            raise ValueError(f"{needed}; {_shown(self.median_norm)} was given.")
        n = len(self.features)
        if self.weights and (len(self.weights) != n or not _has_length(self.weights)):
            needed = f"{n} features need as many finite weights, not all 0"
            raise ValueError(f"{needed}; {_shown(self.weights)} was given.")
        if self.everywhere and self.action != "project_out":
            raise ValueError(f"{self.action} is done at one site; project_out can be everywhere.")
        if self.everywhere and width_name(self.hook_name) != RESIDUAL:
            raise ValueError(
                f"What is written to the residual stream holds no direction of {self.hook_name};"
                " project it out at the site alone."
            )
        for vector in self.orthogonal_to:
            if self.action not in ("add", "project_out") or not _has_length(vector):
                raise ValueError(
                    "orthogonal_to holds vectors of finite values for add and project_out; other"
                    " ones were given."
                )
        _check_places(self.positions)

    def edit(self, suite: ByVariant) -> Edit:
        """As the model runs under it.

        Raises ValueError for SAEs or features that the suite does not have, and for a direction of
        another width than its SAEs.
        """
        own = Suite.of(suite)
        along = self.direction or self.action in ("add", "project_out")
        made = self._along(own) if along else self._of_features(own)
        made = replace(made, positions=self.positions)
        if self.when is None:
            return made
        sae = own.sae(Place(self.when.variant, self.when.hook_name))
        return replace(made, when=self.when.detector(sae))

    def line(self, suite: ByVariant) -> tuple[Float[Tensor, " width"], float]:
        """The unit vector that is added or projected out, and the median norm of its site.

        Raises ValueError as `edit` does.
        """
        suite = Suite.of(suite)
        if self.direction:
            own = width_name(self.hook_name)
            places = suite.saes().items()
            widths = {sae.d_in for place, sae in places if width_name(place.hook_name) == own}
            if widths and len(self.direction) not in widths:
                raise ValueError(
                    f"A direction of {len(self.direction)} values was given, but the suite is of a "
                    f"model of {', '.join(map(str, sorted(widths)))}; give one of this model."
                )
            along, median = torch.tensor(self.direction, dtype=torch.float32), self.median_norm
        else:
            sae = suite.sae(Place(self.variant, self.hook_name))
            check_features(sae, self.features)
            weights = self.weights or (1.0,) * len(self.features)
            along, median = FeatureSet(self.features, weights).direction(sae), _median(sae)
        if any(len(vector) != len(along) for vector in self.orthogonal_to):
            raise ValueError(
                f"orthogonal_to holds vectors of another width than the direction's {len(along)}."
            )
        return without(along, self.orthogonal_to), median

    def _along(self, suite: Suite) -> Edit:
        unit, median = self.line(suite)
        if self.action == "add":
            return add_direction(self.hook_name, unit, self.strength, median)
        return project_out(WRITES if self.everywhere else self.hook_name, unit, share=self.strength)

    def _of_features(self, suite: Suite) -> Edit:
        sae = suite.sae(Place(self.variant, self.hook_name))
        if self.action == "clamp":
            return clamp_features(sae, self.features, self.strength * _median(sae))
        return scale_features(sae, self.features, self.strength if self.action == "scale" else 0.0)


def _check_places(positions: Positions) -> None:
    """ValueError as `check_positions`, and for positions that no context has."""
    check_positions(positions)
    if isinstance(positions, tuple) and max(positions) > LAST:
        raise ValueError(f"Position {_shown(max(positions))} is in no context; give others.")


def _at_most(value: float) -> bool:
    """Whether a number is finite and at most `MOST`, either way."""
    return -MOST <= value <= MOST


def _has_length(values: Sequence[float]) -> bool:
    """Whether a unit vector can be made of values."""
    return all(map(_at_most, values)) and max(map(abs, values)) >= LEAST


SHOWN = 80
"""Characters of a value in a message."""


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    if _real(value):
        return f"{value:.3g}"
    try:
        return repr(value)[:SHOWN]
    except ValueError:  # Python does not write out whole numbers of thousands of digits
        return "a huge number"


FORMAT = 2


@dataclass(frozen=True)
class Steering:
    """Changes that are made together, in their order."""

    changes: tuple[Change, ...] = ()

    def edits(self, suite: ByVariant) -> list[Edit]:
        """What a model runs under: `with applied(lm, steering.edits(suite)): ...`."""
        own = Suite.of(suite)
        return [change.edit(own) for change in self.changes]

    def __add__(self, other: "Steering") -> "Steering":
        return Steering(self.changes + other.changes)

    def times(self, factor: float) -> "Steering":
        """The same with every strength multiplied (ablations stay as they are)."""
        return Steering(
            tuple(replace(change, strength=change.strength * factor) for change in self.changes)
        )

    def saes(self) -> set[Place]:
        """Where the SAEs are that are needed."""
        used = {
            Place(change.variant, change.hook_name) for change in self.changes if change.features
        }
        return used | {
            Place(change.when.variant, change.when.hook_name)
            for change in self.changes
            if change.when
        }

    def to_json(self, suite: ByVariant) -> str:
        """With the checksums of the SAEs that it is for."""
        self.edits(suite)  # every feature exists
        own = Suite.of(suite)
        saes = {str(place): own.sae(place).checksum() for place in sorted(self.saes())}
        about = {
            "qsae_kit_steering": FORMAT,
            "saes": saes,
            "changes": [asdict(change) for change in self.changes],
        }
        return json.dumps(about, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path, suite: ByVariant) -> None:
        write_text(Path(path), self.to_json(suite))


def read_steering(text: str, suite: ByVariant) -> Steering:
    """What `Steering.to_json` wrote. Raises ValueError for another format, and for other SAEs than
    it was made for.
    """
    no_steering = "This is no steering that was saved by this package"
    about = parse_json(text, f"{no_steering}, it", finite=True)
    try:
        if about["qsae_kit_steering"] != FORMAT:
            found = _shown(about["qsae_kit_steering"])
            raise ValueError(f"The steering has format {found}; this version reads {FORMAT}.")
        if not isinstance(about["saes"], dict) or not isinstance(about["changes"], list):
            raise TypeError("saes or changes are of another type")
        saes = about["saes"]
        steering = Steering(tuple(_change(entry) for entry in about["changes"]))
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{no_steering} ({_shown(error)}); save it again.") from error
    for place in sorted(steering.saes()):
        if Suite.of(suite).sae(place).checksum() != saes.get(str(place)):
            raise ValueError(
                f"The steering was made for another SAE at {place}; load the suite that it was made"
                " with."
            )
    steering.edits(suite)
    return steering


def saes_of(path: str | Path) -> list[Place]:
    """The SAEs that the steering of a file needs, before any is loaded. ValueError where there is
    no such file, or it names none.
    """
    about = parse_json(read_text(Path(path), "a steering", JSON_LIMIT), f"{str(path)!r}")
    saes = about.get("saes") if isinstance(about, dict) else None
    if not isinstance(saes, dict):
        raise ValueError(f"{str(path)!r} is no steering that was saved by this package.")
    return [Place.parse(name) for name in saes]


def load_steering(path: str | Path, suite: ByVariant) -> Steering:
    """A file of `Steering.save`; ValueError as for `read_steering`, or where there is none."""
    if not Path(path).exists():
        raise ValueError(f"There is no file {path}; give one that Steering.save wrote.")
    return read_steering(read_text(Path(path), "a steering", JSON_LIMIT), suite)


def _change(entry: dict[str, Any]) -> Change:
    """One change of a file; TypeError for what this package would not have written."""
    values = _typed(Change, entry)
    when = values.get("when")
    return Change(
        **{**values, "when": None if when is None else Condition(**_typed(Condition, when))}
    )


def _typed(kind: type, entry: Any) -> dict[str, Any]:
    """The entry with tuples for lists, checked name by name."""
    if not isinstance(entry, dict) or not set(entry) <= {field.name for field in fields(kind)}:
        raise TypeError(f"{_shown(entry)} is no {kind.__name__}")
    values = {name: _as_tuples(value) for name, value in entry.items()}
    for name, value in values.items():
        if not CHECKS[name](value):
            raise TypeError(f"{name} is {_shown(value)}")
    return values


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LAST


def _real(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and all(map(check, value))


CHECKS: dict[str, Callable[[Any], bool]] = {
    "action": _text,
    "hook_name": _text,
    "variant": _text,
    "features": _all(_whole),
    "weights": _all(_real),
    "direction": _all(_real),
    "strength": _real,
    "median_norm": _real,
    "threshold": _real,
    "span": _text,
    "positions": lambda value: _text(value) or _all(_whole)(value),
    "when": lambda value: value is None or isinstance(value, dict),
    "orthogonal_to": _all(_all(_real)),
    "everywhere": lambda value: isinstance(value, bool),
}

"""The recipe of one SAE variant: a value that is checked when it is made."""

import collections.abc
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from inspect import signature
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import torch

from qsae_kit.io.processor import fastest_dtype
from qsae_kit.sae import ARCHITECTURES, SAE
from qsae_kit.train.optim import MOMENT_BYTES, Moments

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]
Frozen: TypeAlias = Literal["", "decoder", "soft_decoder", "encoder"]


WIDEST = 2**31 - 1
"""Features that can be numbered."""
LR, LR_WIDTH = 4e-3, 1024
"""The default peak learning rate is LR at d_sae = LR_WIDTH and falls with its square root (Gao et
al. 2024, arXiv 2406.04093, appendix A.3)."""


@dataclass(frozen=True)
class TrainConfig:
    """One recipe for one variant of a suite."""

    architecture: str = "jumprelu"
    """One of `sae.ARCHITECTURES`."""
    sparsity: float = 32
    """Features a token: a target L0, or the k of the TopK family. Without effect where `targeted`
    is false.
    """
    expansion: float = 8
    """d_sae as a multiple of the site's width."""
    tokens: int = 2_000_000
    """Rows to train on."""
    batch: int = 2048
    """Rows a step."""
    lr: float | None = None
    """Peak learning rate of Adam; 5 % of the steps warm up, the last 30 % decay to 0. None: `LR` at
    the site's width.
    """
    pool: int = 65_536
    """Rows that are shuffled together; mean, scale and median norm are taken from the first of
    them.
    """
    dead_after: int | None = None
    """Rows without firing after which a latent counts as dead; None: a hundredth of `tokens`, at
    most ten million.
    """
    seed: int = 0
    moments: Moments = "float32"
    """Format of Adam's moments; the parameters stay float32."""
    precision: Precision = "auto"
    """Of the encoder's product, which selects; auto: bfloat16 where the processor is faster
    in it (`io.processor`)."""
    frozen: Frozen = ""
    """For baselines (arXiv 2602.14111): what stays at random values, drawn without a look at the
    data. The decoder; the decoder up to a cosine of 0.8 with where it began; or the encoder's
    weights."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the architecture, such as {"sparsity_loss": "tanh"} for jumprelu."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"There is no architecture {self.architecture!r}; choose from"
                f" {', '.join(ARCHITECTURES)}."
            )
        for name in ("sparsity", "expansion", "tokens", "batch", "lr", "pool", "dead_after"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} was given; it must be positive and finite.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} was given; allowed are 0 to {2**31 - 1}.")
        if self.tokens < self.batch:
            raise ValueError(
                f"tokens={self.tokens} is less than one batch of {self.batch} rows; train on more."
            )
        if self.pool % self.batch:
            raise ValueError(
                f"pool={self.pool} is no multiple of batch={self.batch}; choose one that is."
            )
        if self.moments not in MOMENT_BYTES:
            raise ValueError(
                f"moments={self.moments!r} was given; allowed are {', '.join(MOMENT_BYTES)}."
            )
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision={self.precision!r} was given; allowed are"
                f" {', '.join(get_args(Precision))}."
            )
        if self.frozen not in get_args(Frozen):
            raise ValueError(
                f"frozen={self.frozen!r} was given; allowed are {', '.join(get_args(Frozen)[1:])}"
                " or nothing."
            )
        known = [
            p.name
            for p in signature(ARCHITECTURES[self.architecture]).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
        unknown = set(self.options) - set(known)
        if unknown:
            raise ValueError(
                f"{self.architecture!r} has no option {', '.join(sorted(unknown))}; allowed are"
                f" {', '.join(known) or 'none'}."
            )

    def build(self, d_in: int, device: torch.device = torch.device("cpu")) -> SAE:
        """An untrained SAE of this recipe. Raises ValueError where it would have more than `WIDEST`
        features.
        """
        if self.d_sae(d_in) > WIDEST:
            raise ValueError(
                f"A width of {self.d_sae(d_in):,} features was asked for (expansion"
                f" {self.expansion:g}); at most {WIDEST:,} are possible, choose fewer."
            )
        sae = ARCHITECTURES[self.architecture](
            d_in, self.d_sae(d_in), self.sparsity, **self.options
        ).to(device)
        sae.product_dtype = (
            fastest_dtype(device) if self.precision == "auto" else getattr(torch, self.precision)
        )
        return sae

    def d_sae(self, d_in: int) -> int:
        """The width at a site of width d_in."""
        return max(1, round(d_in * self.expansion))

    def peak_lr(self, d_in: int) -> float:
        """The peak learning rate at a site of width d_in."""
        return LR * (LR_WIDTH / self.d_sae(d_in)) ** 0.5 if self.lr is None else self.lr

    @property
    def quiet_rows(self) -> int:
        """Rows without firing after which a latent counts as dead."""
        return (
            max(1, min(10_000_000, self.tokens // 100))
            if self.dead_after is None
            else self.dead_after
        )

    @property
    def targeted(self) -> bool:
        """Whether training aims at `sparsity`, rather than weighing it by a fixed coefficient."""
        return (
            self.options.get("sparsity_loss", "target") == "target"
            and self.options.get("l1") is None
        )

    @property
    def variant(self) -> str:
        """The name of the suite's folder for this recipe."""
        aim = [f"l0_{self.sparsity:g}"] if self.targeted else []
        aim += [f"{k}_{v}" for k, v in self.options.items()]
        aim += [f"frozen_{self.frozen}"] if self.frozen else []
        aim += [f"seed_{self.seed}"] if self.seed else []
        return "-".join([self.architecture, f"x{self.expansion:g}", *aim])


def recipe_from(stored: Mapping[str, Any], where: str = "The recipe") -> TrainConfig:
    """The recipe that `asdict` has made plain values of; entries of later versions are left out.

    where: names what holds it, in messages. Raises ValueError for values of another type, or that
    no recipe may have.
    """
    hints = get_type_hints(TrainConfig)
    known = {f.name: stored[f.name] for f in fields(TrainConfig) if f.name in stored}
    for name, value in known.items():
        allowed = _types(hints[name])
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            told = " or ".join(_SAID[kind] for kind in allowed)
            raise ValueError(
                f"{where} has {name}={str(value)[:40]!r}, which must be {told}; train or save the"
                " SAE again."
            )
    return TrainConfig(**known)


_SAID: Mapping[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    type(None): "null",
}


def _types(hint: Any) -> tuple[type, ...]:
    """The types that a field's value has in JSON."""
    if hint is float:
        return (float, int)
    if isinstance(hint, type) and hint in _SAID:
        return (hint,)
    if get_origin(hint) is Literal:
        return (str,)
    if get_origin(hint) is collections.abc.Mapping:
        return (dict,)
    return tuple(dict.fromkeys(kind for part in get_args(hint) for kind in _types(part)))


POOL_ROWS, POOL_BYTES = 65_536, 4e9
"""What the shuffle pool holds at most by default, all sites together."""


def default_recipe(width: int, n_sites: int = 1, **changes: Any) -> TrainConfig:
    """The recipe that `qsae train` takes without flags, with `changes` as its fields.

    width: numbers a token at the sites, the most where they differ. A sparsity that is not given
    is assumed: the square root of the width, which is 32 at 1,024 and 64
    at 4,096, the middle of what public suites of such models use. The pool is as large as
    `POOL_ROWS`, `POOL_BYTES` and the tokens allow.
    """
    changes.setdefault("sparsity", max(1, round(width**0.5)))
    batch = changes.get("batch", TrainConfig.batch)
    tokens = changes.get("tokens", TrainConfig.tokens)
    if "pool" not in changes and batch > 0:
        rows = min(POOL_ROWS, POOL_BYTES / (4 * width * n_sites), max(tokens, batch))
        changes["pool"] = batch * max(1, int(rows // batch))
    return TrainConfig(**changes)

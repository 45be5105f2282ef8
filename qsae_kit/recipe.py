"""The recipe of one SAE variant: a value that is checked when it is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal, TypeAlias, get_args

import torch

from qsae_kit.optim import MOMENT_BYTES, Moments
from qsae_kit.sae import ARCHITECTURES, SAE
from qsae_kit.sae.codes import fastest_dtype

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """One recipe for one variant of a suite."""

    architecture: str = "jumprelu"
    """One of `sae.ARCHITECTURES`."""
    sparsity: float = 16
    """Features a token: a target L0, or the k of the TopK family."""
    expansion: float = 8
    """d_sae as a multiple of d_model."""
    tokens: int = 200_000
    """Rows to train on."""
    batch: int = 512
    """Rows a step."""
    lr: float = 2e-3
    """Peak learning rate of Adam; 5 % of the steps warm up, the last 30 % decay to 0."""
    pool: int = 16_384
    """Rows that are shuffled together; mean, scale and median norm are taken from the first of them."""
    dead_after: int = 20_000
    """Rows without firing after which a latent counts as dead."""
    seed: int = 0
    moments: Moments = "float32"
    """Format of Adam's moments; the parameters stay float32."""
    precision: Precision = "auto"
    """Of the encoder's product, which selects; auto: bfloat16 where that is made in hardware."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the architecture, such as {"sparsity_loss": "tanh"} for jumprelu."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"There is no architecture {self.architecture!r}; choose from {', '.join(ARCHITECTURES)}.")
        for name in ("sparsity", "expansion", "tokens", "batch", "lr", "pool", "dead_after"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} was given; it must be positive.")
        if self.tokens < self.batch:
            raise ValueError(f"tokens={self.tokens} is less than one batch of {self.batch} rows; train on more.")
        if self.pool % self.batch:
            raise ValueError(f"pool={self.pool} is no multiple of batch={self.batch}; choose one that is.")
        if self.moments not in MOMENT_BYTES:
            raise ValueError(f"moments={self.moments!r} was given; allowed are {', '.join(MOMENT_BYTES)}.")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision={self.precision!r} was given; allowed are {', '.join(get_args(Precision))}.")
        known = [p.name for p in signature(ARCHITECTURES[self.architecture]).parameters.values() if p.kind is p.KEYWORD_ONLY]
        unknown = set(self.options) - set(known)
        if unknown:
            raise ValueError(
                f"{self.architecture!r} has no option {', '.join(sorted(unknown))}; allowed are {', '.join(known) or 'none'}."
            )

    def build(self, d_in: int, device: torch.device = torch.device("cpu")) -> SAE:
        """An untrained SAE of this recipe."""
        sae = ARCHITECTURES[self.architecture](d_in, self.d_sae(d_in), self.sparsity, **self.options).to(device)
        sae.product_dtype = fastest_dtype(device) if self.precision == "auto" else getattr(torch, self.precision)
        return sae

    def d_sae(self, d_in: int) -> int:
        """The width at a site of width d_in."""
        return max(1, round(d_in * self.expansion))

    @property
    def variant(self) -> str:
        """The name of the suite's folder for this recipe."""
        return f"{self.architecture}-x{self.expansion:g}-l0_{self.sparsity:g}"

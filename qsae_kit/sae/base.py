"""The contract of every SAE, and what all architectures share.

    pre = x @ W_enc + b_enc,   f = activate(pre) >= 0,   x_hat = f @ W_dec + b_dec

A trained SAE takes raw activations: mean and scale of training are folded into its weights, its decoder rows have
unit norm, so a feature's activation is its length in the units of the activations.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qsae_kit.activations import NormFilter


@dataclass(frozen=True)
class Provenance:
    """Where an SAE belongs and what it was trained on; stored in its folder and applied wherever it is used."""

    model_name: str
    hook_name: str
    filter: NormFilter
    """Tokens beyond it are neither trained on, nor scored, nor spliced."""
    drop_template: bool = False
    """Whether template tokens were left out of training."""
    context_size: int = 512
    tokens: int = 0
    """Rows trained on."""
    seed: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    """Figures at the end of training (loss, l0, dead)."""


class Loss(NamedTuple):
    """A training loss (scalar, to be minimised) and the activations it came from."""

    total: Tensor
    f: Float[Tensor, "row d_sae"]


class SAE(nn.Module, ABC):
    """An SAE of one site. `sparsity` is its k (topk) or its target L0 (jumprelu), in features a token."""

    architecture: ClassVar[str]

    def __init__(self, d_in: int, d_sae: int, sparsity: float, provenance: Provenance | None = None) -> None:
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"d_in={d_in} and d_sae={d_sae} must be positive.")
        if not 0 < sparsity <= d_sae:
            raise ValueError(f"A sparsity of {sparsity} features a token was given; allowed are 0 < sparsity <= d_sae={d_sae}.")
        super().__init__()
        self.sparsity = sparsity
        self.provenance = provenance
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    # --- the contract

    @abstractmethod
    def activate(self, pre: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_sae"]:
        """Feature activations from pre-activations."""

    @abstractmethod
    def training_loss(self, x: Float[Tensor, "row d_model"], dead: Tensor, progress: float) -> Loss:
        """The loss on normalised rows. dead: bool [d_sae], latents that have not fired lately; progress: 0 to 1."""

    def rescale_activations(self, scale: float) -> None:
        """Adapts thresholds when every feature's activation is multiplied by `scale`."""

    # --- what all share

    def pre_activations(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_sae"]:
        return x @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_sae"]:
        """Feature activations of raw activations."""
        return self.activate(self.pre_activations(x))

    def decode(self, f: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_model"]:
        """Reconstruction from feature activations."""
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def init_from_rows(self, x: Float[Tensor, "row d_model"], generator: torch.Generator) -> None:
        """Starts from data: decoder rows are random rows of `x` mixed with noise, the encoder their transpose.

        The encoder is then scaled so that the first reconstructions have the best length (least squares).
        """
        pick = torch.randint(len(x), (self.d_sae,), generator=generator).to(x.device)
        rows = nn.functional.normalize(x[pick], dim=-1)
        noise = torch.randn(rows.shape, generator=generator).to(x.device) / self.d_in**0.5
        self.W_dec.copy_(nn.functional.normalize(rows + 0.5 * noise, dim=-1))
        self.W_enc.copy_(self.W_dec.T)
        self.init_thresholds(x[:4096])
        x_hat = self(x[:4096])
        length = float((x[:4096] * x_hat).sum() / x_hat.pow(2).sum().clamp(min=1e-12))
        self.W_enc.mul_(length)
        self.rescale_activations(length)

    def init_thresholds(self, x: Float[Tensor, "row d_model"]) -> None:
        """Sets thresholds, where an architecture has them, from the first rows."""

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Decoder rows to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Takes the part of the decoder's gradient along its (unit) rows away: the norm is no degree of freedom."""
        assert self.W_dec.grad is not None
        self.W_dec.grad.addcmul_((self.W_dec.grad * self.W_dec).sum(-1, keepdim=True), self.W_dec, value=-1)

    @torch.no_grad()
    def fold(self, mean: Float[Tensor, " d_model"], scale: float) -> None:
        """Turns an SAE of (x - mean) * scale into one of x, in place.

        Decoder rows keep their unit norm, so activations come out in the units of x: f_raw = f / scale.
        """
        self.b_enc.copy_(self.b_enc / scale - mean @ self.W_enc)
        self.b_dec.copy_(self.b_dec / scale + mean)
        self.rescale_activations(1 / scale)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are stored, by their field-standard names."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def describe(self) -> dict[str, Any]:
        """What identifies the architecture in a file."""
        return {"architecture": self.architecture, "d_in": self.d_in, "d_sae": self.d_sae}

    def __repr__(self) -> str:
        where = self.provenance.hook_name if self.provenance else "no site"
        return f"{type(self).__name__}({where}, d_in={self.d_in}, d_sae={self.d_sae}, sparsity={self.sparsity:g})"

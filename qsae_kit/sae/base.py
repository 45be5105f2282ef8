"""The contract of every SAE, and what all architectures share.

    pre = x @ W_enc + b_enc,   f = activate(pre) >= 0,   x_hat = f @ W_dec + b_dec

A trained SAE takes raw activations: mean and scale of training are folded into its weights, its
decoder rows have unit norm, so a feature's activation is its length in the units of the
activations.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qsae_kit.sae import codes as sparse
from qsae_kit.sae.codes import Codes, Select
from qsae_kit.sae.filter import NormFilter


@dataclass(frozen=True)
class Provenance:
    """Where an SAE belongs and what it was trained on; stored in its folder and applied wherever it
    is used.
    """

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
    recipe: Mapping[str, Any] | None = None
    """What it was trained by, as plain values (`train.recipe.recipe_from` reads them); None where
    that is not known, as of public releases.
    """
    model_digest: str = ""
    """Of the model's weights (`HookedLM.weights_digest`); "" where it is not known."""
    drop_prefix: bool = False
    """Whether what all chats begin with was left out of training."""
    begins_with_bos: bool | None = None
    """Whether its sequences began with the tokenizer's beginning-of-sequence token; None where that
    is not known.
    """


class Loss(NamedTuple):
    """A training loss (scalar, to be minimised) and the activations it came from."""

    total: Tensor
    f: Float[Tensor, " entry"]
    codes: Codes
    """Where the activations `f` are; those that are 0 did not fire."""


class State(NamedTuple):
    """What a loss may know about the training."""

    dead: Int[Tensor, " latent"]
    """Latents that have not fired lately."""
    progress: float
    """0 to 1."""


AUX_COEFFICIENT, AUX_K = 1 / 8, 2
"""See `SAE.aux_k_loss`. The paper's 1 / 32 leaves half as many latents again dead, at hardly less
FVU.
"""
AUX_EVERY = 4
"""The auxiliary loss is taken on every fourth row, which costs a quarter and revives as many."""


class SAE(nn.Module, ABC):
    """An SAE of one site. `sparsity` is its k or its target L0, in features a token.

    The encoder is kept as `encoder` [d_sae, d_in], a row a latent as in the decoder; `W_enc` is its
    transpose.
    """

    architecture: ClassVar[str]

    def __init__(
        self, d_in: int, d_sae: int, sparsity: float, provenance: Provenance | None = None
    ) -> None:
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"d_in={d_in} and d_sae={d_sae} must be positive.")
        if not 0 < sparsity <= d_sae:
            raise ValueError(
                f"A sparsity of {sparsity} features a token was given; allowed are 0 < sparsity <="
                f" d_sae={d_sae}."
            )
        super().__init__()
        self.sparsity = sparsity
        self.provenance = provenance
        self.product_dtype: torch.dtype | None = None
        """Of the product that a training step selects from (None: as the rows); values and weights
        keep their own.
        """
        self.encoder = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @property
    def origin(self) -> Provenance:
        """The provenance; ValueError for an SAE that has none."""
        if self.provenance is None:
            raise ValueError(
                "This SAE has no provenance (site, model, filter); load it from its folder, or set"
                " sae.provenance."
            )
        return self.provenance

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.encoder.T

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_sae(self) -> int:
        return self.encoder.shape[0]

    # --- the contract

    @abstractmethod
    def activate(self, pre: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_sae"]:
        """Feature activations from pre-activations."""

    @abstractmethod
    def training_loss(self, x: Float[Tensor, "row d_model"], state: State) -> Loss:
        """The loss on normalised rows, written over selected entries (`encode_entries`,
        `squared_error`).
        """

    def rescale_activations(self, scale: float) -> None:
        """Adapts thresholds when every feature's activation is multiplied by `scale`."""

    # --- what all share

    def pre_activations(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_sae"]:
        return nn.functional.linear(x.to(self.encoder.dtype), self.encoder, self.b_enc)

    def encode(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_sae"]:
        """Feature activations of raw activations in any format, in the SAE's own."""
        return self.activate(self.pre_activations(x))

    def decode(self, f: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_model"]:
        """Reconstruction from feature activations."""
        return f.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def encode_entries(
        self, x: Float[Tensor, "row d_model"], select: Select
    ) -> tuple[Float[Tensor, " entry"], Codes, Float[Tensor, "row d_sae"]]:
        """Pre-activations of the entries that `select` picks, differentiable in the encoder, and
        all, which are not.
        """
        return sparse.encode(x, self.encoder, self.b_enc, select, self.product_dtype)

    def encode_above(
        self,
        x: Float[Tensor, "row d_model"],
        least: Float[Tensor, " d_sae"],
        sampled: Float[Tensor, " d_sae"],
        every: int,
    ) -> tuple[Float[Tensor, " entry"], Codes, Bool[Tensor, " entry"], Float[Tensor, "row d_sae"]]:
        """Pre-activations of the entries above thresholds, see `codes.encode_above`; differentiable
        in the encoder.
        """
        return sparse.encode_above(
            x, self.encoder, self.b_enc, least, sampled, every, self.product_dtype
        )

    def squared_error(
        self, x: Float[Tensor, "row d_model"], f: Float[Tensor, " entry"], codes: Codes
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "row d_model"]]:
        """E|x - x_hat|^2 from activations of entries, differentiable, and the rows x - x_hat, which
        are not.
        """
        return sparse.squared_error(x, f, self.W_dec, self.b_dec, codes, self.product_dtype)

    def aux_k_loss(
        self,
        x: Float[Tensor, "row d_model"],
        error: Float[Tensor, "row d_model"],
        dead: Int[Tensor, " latent"],
        pre: Float[Tensor, "some d_sae"],
    ) -> Tensor | float:
        """AuxK (Gao et al. 2024, arXiv 2406.04093, appendix A.2): AUX_COEFFICIENT * E|e - e_hat|^2
        / E|e|^2.

        e is the detached error, e_hat is decoded from the largest pre-activations among dead
        latents, without b_dec. They are AUX_K times as many as `sparsity` (d_model / 2 in the
        paper: many weak ones, of which fewer come back).
        pre: the pre-activations of each AUX_EVERY-th row.
        """
        if not len(dead):
            return 0.0
        x, error = x[::AUX_EVERY].contiguous(), error.detach()[::AUX_EVERY].to(x.dtype)
        with torch.no_grad():
            others = torch.full_like(pre[0], -torch.inf).index_fill_(0, dead, 0)
            k = min(len(dead), max(1, round(AUX_K * self.sparsity)))
            codes = Codes.from_columns(sparse.largest_columns(pre + others, k), self.d_sae)
        values = sparse.encode_at(x, self.encoder, self.b_enc, codes, pre).relu()
        nothing = torch.zeros_like(self.b_dec)
        missed, _ = sparse.squared_error(
            error, values, self.W_dec, nothing, codes, self.product_dtype
        )
        return AUX_COEFFICIENT * missed / error.pow(2).sum(-1).mean().clamp(min=1e-12)

    def forward(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def init_from_rows(
        self, x: Float[Tensor, "row d_model"], generator: torch.Generator, random: bool = False
    ) -> None:
        """Starts from data: decoder rows are random rows of `x` mixed with noise of its covariance,
        the encoder their transpose.

        So all of them lie in the subspace that the data use, which for attention outputs is far
        from the whole. The encoder is then scaled so that the first reconstructions have the best
        length (least squares).
        """
        if random:  # directions that know nothing of the data
            rows = torch.randn(self.d_sae, self.d_in, generator=generator).to(x.device)
            self._begin(nn.functional.normalize(rows, dim=-1), x)
            return
        pick = torch.randint(len(x), (self.d_sae,), generator=generator).to(x.device)
        rows = nn.functional.normalize(x[pick], dim=-1)
        some = x[torch.randperm(len(x), generator=generator)[:1024].to(x.device)]
        noise = torch.randn(self.d_sae, len(some), generator=generator).to(x.device) @ (
            some - some.mean(0)
        )
        self._begin(
            nn.functional.normalize(rows + 0.5 * nn.functional.normalize(noise, dim=-1), dim=-1), x
        )

    def _begin(self, rows: Float[Tensor, "d_sae d_model"], x: Float[Tensor, "row d_model"]) -> None:
        self.W_dec.copy_(rows)
        self.encoder.copy_(self.W_dec)
        self.init_thresholds(x[:4096])
        x_hat = self(x[:1024])
        length = float((x[:1024] * x_hat).sum() / x_hat.pow(2).sum().clamp(min=1e-12))
        if length > 0:  # a latent that fires on none of them may yet learn to
            self.encoder.mul_(length)
            self.rescale_activations(length)

    def init_thresholds(self, x: Float[Tensor, "row d_model"]) -> None:
        """Sets thresholds, where an architecture has them, from the first rows."""

    def constrain(self) -> None:
        """After each step, once decoder rows are back at unit norm: what else an architecture keeps
        within bounds.
        """

    def exported(self) -> "SAE":
        """The SAE as it is stored and used; an architecture for training only becomes another
        one.
        """
        return self

    @torch.no_grad()
    def fold(self, mean: Float[Tensor, " d_model"], scale: float) -> None:
        """Turns an SAE of (x - mean) * scale into one of x, in place.

        Decoder rows keep their unit norm, so activations come out in the units of x: f_raw = f /
        scale.
        """
        self.b_enc.copy_(self.b_enc / scale - mean @ self.W_enc)
        self.b_dec.copy_(self.b_dec / scale + mean)
        self.rescale_activations(1 / scale)

    def tensors(self) -> dict[str, Tensor]:
        """Views of the tensors that are stored, by their field-standard names."""
        own = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return {"W_enc": own.pop("encoder").T, **own}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over stored tensors in place."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])

    def checksum(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What identifies the architecture in a file."""
        return {"architecture": self.architecture, "d_in": self.d_in, "d_sae": self.d_sae}

    def __repr__(self) -> str:
        where = self.provenance.hook_name if self.provenance else "no site"
        return (
            f"{type(self).__name__}({where}, d_in={self.d_in}, d_sae={self.d_sae},"
            f" sparsity={self.sparsity:g})"
        )

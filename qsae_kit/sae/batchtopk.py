"""BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410), stored as a JumpReLU SAE.

In training the k * rows largest pre-activations of a batch are kept, so rows may use more or fewer
features; the loss is that of TopK with AuxK. For use, one threshold stands in for the batch: the
running mean of the smallest activation kept, in float32.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.sae.base import AUX_EVERY, SAE, Loss, Provenance, State
from qsae_kit.sae.codes import Codes, above
from qsae_kit.sae.jumprelu import JumpReLUSAE


class BatchTopKSAE(SAE):
    architecture = "batchtopk"

    def __init__(
        self, d_in: int, d_sae: int, sparsity: float, provenance: Provenance | None = None
    ) -> None:
        super().__init__(d_in, d_sae, sparsity, provenance)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.threshold: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.steps: Tensor

    def activate(self, pre: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_sae"]:
        return torch.where(pre > self.threshold.clamp(min=0), pre, 0.0)

    def select(self, pre: Float[Tensor, "row d_sae"]) -> Codes:
        """The k * rows largest entries that are positive; only entries above a guess from earlier
        steps are sorted.
        """
        wanted = min(max(1, int(self.sparsity * len(pre))), pre.numel())
        flat = pre.view(-1)
        guess = 0.8 * float(self.threshold)
        places = above(pre, guess)
        if len(places) < wanted and guess > 0:
            places = above(pre, 0.0)
        values = flat[places]
        if len(values) > wanted:
            values, kept = values.topk(wanted, sorted=False)
            places, smallest = places[kept].sort().values, values.min()
        elif len(values):
            smallest = values.min()
        else:
            smallest = flat.new_zeros(())
        if self.training:
            # Over the last third of the steps at first, over about the last hundred later.
            self.steps += 1
            self.threshold.lerp_(
                smallest.to(self.threshold.dtype), max(0.01, 3 / (float(self.steps) + 2))
            )
        return Codes.from_flat(places, *pre.shape)

    def training_loss(self, x: Float[Tensor, "row d_model"], state: State) -> Loss:
        f, codes, pre = self.encode_entries(x, self.select)
        missed, error = self.squared_error(x, f, codes)
        return Loss(missed + self.aux_k_loss(x, error, state.dead, pre[::AUX_EVERY]), f, codes)

    @torch.no_grad()
    def init_thresholds(self, x: Float[Tensor, "row d_model"]) -> None:
        pre = self.pre_activations(x)
        self.threshold.copy_(
            pre.view(-1)
            .topk(max(1, int(self.sparsity * len(x))), sorted=False)
            .values.min()
            .clamp(min=0)
        )

    def rescale_activations(self, scale: float) -> None:
        self.threshold.mul_(scale)

    @torch.no_grad()
    def exported(self) -> JumpReLUSAE:
        """The same SAE with the threshold written into every latent."""
        out = JumpReLUSAE(self.d_in, self.d_sae, self.sparsity, self.provenance).to(
            self.b_dec.device
        )
        out.load_tensors(
            self.tensors() | {"threshold": self.threshold.clamp(min=0).expand(self.d_sae)}
        )
        return out

"""Matryoshka BatchTopK SAE (Bussmann et al. 2025, arXiv 2503.17547), stored as a JumpReLU SAE.

The first m_1 < m_2 < ... < d_sae latents each have to reconstruct alone: loss = mean over prefixes
p of E|x - x_hat_p|^2, plus AuxK on the whole. General features settle in the small prefixes, which
are less absorbed.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.sae.base import AUX_EVERY, Loss, State
from qsae_kit.sae.batchtopk import BatchTopKSAE
from qsae_kit.sae.codes import decode

PREFIXES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)
"""Shares of the width, equally weighted."""


class MatryoshkaSAE(BatchTopKSAE):
    architecture = "matryoshka"

    def training_loss(self, x: Float[Tensor, "row d_model"], state: State) -> Loss:
        f, codes, pre = self.encode_entries(x, self.select)
        x_hat: Tensor = self.b_dec
        total = torch.zeros((), device=x.device)
        begin = 0
        for share in PREFIXES:
            end = max(begin + 1, round(share * self.d_sae))
            inside = (codes.cols >= begin) & (codes.cols < end)
            x_hat = x_hat + decode(f[inside], self.W_dec, codes.where(inside), self.product_dtype)
            total = total + (x - x_hat).pow(2).sum(-1).mean() / len(PREFIXES)
            begin = end
        return Loss(total + self.aux_k_loss(x, x - x_hat, state.dead, pre[::AUX_EVERY]), f, codes)

"""What an SAE's decoder tells of its sparsity: at the true L0 of the data a decoder row holds one
feature, below it features that fire together are mixed, above it any others (Chanin &
Garriga-Alonso 2025, "Sparse but Wrong", arXiv 2508.16560). By that paper both figures are least at
the true L0, and neither needs to know the features; `tests/bench/target_l0.py` tries it.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

ROWS_AT_ONCE = 2048


@torch.no_grad()
def decoder_overlap(W_dec: Float[Tensor, "d_sae width"]) -> float:
    """Mean |cosine| of two decoder rows."""
    rows = normalize(W_dec.float(), dim=1)
    n = len(rows)
    total = sum(
        float((rows[start : start + ROWS_AT_ONCE] @ rows.T).abs().sum())
        for start in range(0, n, ROWS_AT_ONCE)
    )
    return (total - n) / max(1, n * (n - 1))


@torch.no_grad()
def decoder_projection(
    x: Float[Tensor, "row width"],
    W_dec: Float[Tensor, "d_sae width"],
    b_dec: Float[Tensor, " width"],
    n: int,
) -> float:
    """The n-th largest projection a row of centred rows on decoder rows of unit length, over all
    rows together: how far latents point along a row that should have nothing to do with it.

    n: more than fire, and at most the half of d_sae. Raises ValueError for another one.
    """
    if not 1 <= n <= len(W_dec) // 2:
        raise ValueError(
            f"The projection number {n} was asked for; with {len(W_dec)} latents it is from 1 to"
            f" {len(W_dec) // 2}."
        )
    values = (x.float() - b_dec) @ normalize(W_dec.float(), dim=1).T
    return float(values.flatten().kthvalue(values.numel() - n * len(x) + 1).values)

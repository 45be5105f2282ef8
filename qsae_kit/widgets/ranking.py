"""Which of the features that fire are worth a look first."""

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.features.index import FeatureIndex
from qsae_kit.sae.suites import Place

LEAST_MAX, LEAST_DENSITY = 1e-9, 1e-6
POOR = 1e-3
"""What the weight of a feature is multiplied with that is dead, dense or a sink's, so that it comes
after all others.
"""


def interest(
    f: Float[Tensor, "pos d_sae"], index: FeatureIndex | None, place: Place
) -> Float[Tensor, "pos d_sae"]:
    """Weights to rank features of tokens by: the share of a feature's largest activation times the
    surprise that it fires at all, -log of its density. Where no index knows the SAE, the
    activations themselves, which features of template tokens win.
    """
    f = f.cpu()
    if index is None or place not in index.places():
        return f
    own = index.at(place)
    seen = torch.tensor(own.figures[["density", "max"]].to_numpy(), dtype=f.dtype)
    share = (f / seen[:, 1].clamp(min=LEAST_MAX)).clamp(max=1)
    weight = share * -seen[:, 0].clamp(min=LEAST_DENSITY).log()
    weight[:, torch.tensor(own.poor)] *= POOR
    return torch.where(f > 0, weight.clamp(min=torch.finfo(f.dtype).tiny), 0.0)

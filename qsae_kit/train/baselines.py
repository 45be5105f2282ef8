"""What an SAE has to beat: dictionaries that were not trained, or not freely, as SAEs that go
through the same calls.

pca             the first k principal components as pairs of features (+ and -), one of which fires
neurons         the k coordinates of largest size, as pairs of features
untrained       the recipe's initial weights (decoder rows are random data rows), no step taken
frozen_decoder  trained with random decoder directions that never move (arXiv 2602.14111)
soft_frozen     the same, but they may move to a cosine of 0.8
frozen_encoder  trained with a random encoder
second_seed     the recipe under another seed
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.data.rows import RowSource
from qsae_kit.metrics.reconstruction import match
from qsae_kit.sae import SAE, Provenance, ReLUSAE, TopKSAE
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import SiteTrainer, fit_normaliser, train_saes

PairedSAE = TypeVar("PairedSAE", bound=SAE)
FOUND_AGAIN = 0.7
"""Cosine from which a feature counts as found again under another seed."""


def pca_sae(x: Float[Tensor, "row d_model"], k: int, provenance: Provenance) -> ReLUSAE:
    """The `k` first principal components of rows; each is two features, one of which fires, so L0
    is k.
    """
    mean = x.mean(0)
    covariance = (x - mean).T.double() @ (x - mean).double()
    components = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :k].T.float()
    return _paired(
        ReLUSAE(x.shape[1], 2 * len(components), min(k, 2 * len(components)), provenance),
        components,
        mean,
    )


def neurons_sae(x: Float[Tensor, "row d_model"], k: int, provenance: Provenance) -> TopKSAE:
    """The `k` coordinates that are farthest from their mean, as features."""
    d = x.shape[1]
    return _paired(
        TopKSAE(d, 2 * d, min(k, d), provenance), torch.eye(d, device=x.device), x.mean(0)
    )


@torch.no_grad()
def _paired(
    sae: PairedSAE, rows: Float[Tensor, "half d_model"], mean: Float[Tensor, " d_model"]
) -> PairedSAE:
    both = torch.cat([rows, -rows])
    sae.to(rows.device)
    sae.encoder.copy_(both)
    sae.W_dec.copy_(both)
    sae.b_enc.copy_(-both @ mean)
    sae.b_dec.copy_(mean)
    return sae.eval().requires_grad_(False)


def untrained_saes(source: RowSource, config: TrainConfig, model_name: str) -> dict[str, SAE]:
    """The recipe's initial weights at every site."""
    block = next(iter(source.blocks(config.pool)))
    out = {}
    for site, rows in block.rows.items():
        first = rows[: max(1, len(rows) // 2)]
        trainer = SiteTrainer(config, fit_normaliser(first), rows.shape[1], rows.device)
        trainer.start(first)
        out[site] = trainer.finish(model_name, site, False, 512, source.model_digest)
    return out


def frozen_recipes(config: TrainConfig) -> dict[str, TrainConfig]:
    """Recipes of the baselines that are trained."""
    return {
        "frozen_decoder": replace(config, frozen="decoder"),
        "soft_frozen": replace(config, frozen="soft_decoder"),
        "frozen_encoder": replace(config, frozen="encoder"),
        "second_seed": replace(config, seed=config.seed + 1),
    }


def baseline_suite(
    source: RowSource, config: TrainConfig, model_name: str, l0: int | None = None, bar: bool = True
) -> dict[str, dict[str, SAE]]:
    """`{baseline: {hook name: SAE}}` at every site of the source; the trained ones share one
    stream.

    config: the recipe to compare with. l0: the k of PCA and neurons, by default the recipe's
        sparsity.
    """
    k = max(1, round(config.sparsity)) if l0 is None else l0
    block = next(iter(source.blocks(config.pool)))
    suite: dict[str, dict[str, SAE]] = {"pca": {}, "neurons": {}}
    for site, rows in block.rows.items():
        norms = fit_normaliser(rows).filter
        provenance = Provenance(
            model_name,
            site,
            norms,
            tokens=len(rows),
            seed=config.seed,
            model_digest=source.model_digest,
        )
        kept = rows[norms.keeps(rows)]
        suite["pca"][site], suite["neurons"][site] = (
            pca_sae(kept, k, provenance),
            neurons_sae(kept, k, provenance),
        )
    del block
    suite["untrained"] = untrained_saes(source, config, model_name)
    recipes = frozen_recipes(config)
    trained = train_saes(source, list(recipes.values()), model_name=model_name, bar=bar)
    return suite | {name: trained[recipe.variant] for name, recipe in recipes.items()}


def found_again(one: SAE, other: SAE) -> dict[str, float]:
    """How much of an SAE another run finds: mean |cosine| of decoder rows matched one to one
    (PW-MCC), and the share of pairs at `FOUND_AGAIN` or more."""
    cosines = match(one.W_dec.cpu(), other.W_dec.cpu())[2]
    return {
        "pw_mcc": float(cosines.mean()),
        "found_again": float((cosines >= FOUND_AGAIN).double().mean()),
    }


BASELINES: Sequence[str] = tuple(
    ("pca neurons untrained frozen_decoder soft_frozen frozen_encoder second_seed").split()
)

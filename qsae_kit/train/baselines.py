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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.data.rows import Origin, RowSource
from qsae_kit.io.processor import exact
from qsae_kit.sae import SAE, Provenance, ReLUSAE, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.suites import Suite
from qsae_kit.train.recipe import TrainConfig, recipe_from
from qsae_kit.train.run import SiteTrainer, fit_normaliser, train_saes

PairedSAE = TypeVar("PairedSAE", bound=SAE)


def pca_sae(x: Float[Tensor, "row d_model"], k: int, provenance: Provenance) -> ReLUSAE:
    """The `k` first principal components of rows; each is two features, one of which fires, so L0
    is k.
    """
    mean = x.mean(0)
    covariance = exact((x - mean).T) @ exact(x - mean)
    components = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :k].T.to(x)
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


def untrained_saes(source: RowSource, config: TrainConfig) -> dict[str, SAE]:
    """The recipe's initial weights at every site."""
    block = next(iter(source.blocks(config.pool)))
    out = {}
    for site, rows in block.rows.items():
        first = rows[: max(1, len(rows) // 2)]
        trainer = SiteTrainer(config, fit_normaliser(first), rows.shape[1], rows.device)
        trainer.start(first)
        out[site] = trainer.finish(source.origin, site)
    return out


def recipe_of(saes: Mapping[str, SAE]) -> TrainConfig:
    """The recipe that the SAEs of one variant were trained by, as their folders say.

    Raises ValueError where one does not say it, or they were trained by several.
    """
    recipes = []
    for site, sae in saes.items():
        if sae.provenance is None or sae.provenance.recipe is None:
            raise ValueError(
                f"The SAE of {site} does not say what it was trained by, as SAEs of other libraries"
                " and older versions do not; give the recipe (qsae baselines: --arch, --tokens and"
                " --batch)."
            )
        recipes.append(recipe_from(sae.provenance.recipe, f"The recipe of {site}"))
    if not recipes:
        raise ValueError("There are no SAEs to make baselines for; give at least one.")
    if any(recipe != recipes[0] for recipe in recipes):
        raise ValueError(
            "The SAEs of the variant were trained by several recipes; give sites of one at a time."
        )
    return recipes[0]


def frozen_recipes(config: TrainConfig) -> dict[str, TrainConfig]:
    """Recipes of the baselines that are trained."""
    return {
        "frozen_decoder": replace(config, frozen="decoder"),
        "soft_frozen": replace(config, frozen="soft_decoder"),
        "frozen_encoder": replace(config, frozen="encoder"),
        "second_seed": replace(config, seed=config.seed + 1),
    }


def baseline_suite(
    source: RowSource, config: TrainConfig, l0: int | None = None, bar: bool = True
) -> Suite:
    """`suite[baseline][hook_name]` at every site of the source; the trained ones share one
    stream.

    config: the recipe to compare with. l0: the k of PCA and neurons, by default the recipe's
        sparsity.
    """
    k = max(1, round(config.sparsity)) if l0 is None else l0
    block = next(iter(source.blocks(config.pool)))
    saes: dict[str, dict[str, SAE]] = {"pca": {}, "neurons": {}}
    for site, rows in block.rows.items():
        norms = fit_normaliser(rows).filter
        provenance = _provenance(source.origin, site, norms, len(rows), config.seed)
        kept = rows[norms.keeps(rows)]
        saes["pca"][site], saes["neurons"][site] = (
            pca_sae(kept, k, provenance),
            neurons_sae(kept, k, provenance),
        )
    del block
    saes["untrained"] = untrained_saes(source, config)
    recipes = frozen_recipes(config)
    trained = train_saes(source, list(recipes.values()), bar=bar)
    return Suite(saes) | {name: trained[recipe.variant] for name, recipe in recipes.items()}


def _provenance(origin: Origin, site: str, norms: NormFilter, tokens: int, seed: int) -> Provenance:
    policy = origin.policy
    return Provenance(
        origin.model_name,
        site,
        norms,
        policy.drop_template,
        policy.context_size,
        tokens,
        seed,
        model_digest=origin.model_digest,
        drop_prefix=policy.drop_prefix,
        begins_with_bos=origin.begins_with_bos,
    )


BASELINES: Sequence[str] = tuple(
    ("pca neurons untrained frozen_decoder soft_frozen frozen_encoder second_seed").split()
)

"""Trains many SAEs from one stream of rows; it never sees a language model."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from qsae_kit.activations import NormFilter, Rows, first_rows, shuffled
from qsae_kit.sae import ARCHITECTURES, SAE, Provenance
from qsae_kit.sae.base import State


@dataclass(frozen=True)
class TrainConfig:
    """One recipe for one variant of a suite."""

    architecture: str = "jumprelu"
    """One of `sae.ARCHITECTURES`."""
    sparsity: float = 16
    """Features a token: the target L0 of jumprelu, the k of topk."""
    expansion: int = 8
    """d_sae as a multiple of d_model."""
    tokens: int = 200_000
    """Rows to train on."""
    batch: int = 512
    """Rows a step."""
    lr: float = 2e-3
    """Peak learning rate of Adam; 5 % of the steps warm up, the last 30 % decay to 0."""
    pool: int = 16_384
    """Rows in the shuffle pool; mean, scale and median norm are taken from its first filling."""
    dead_after: int = 20_000
    """Rows without firing after which a latent counts as dead."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"There is no architecture {self.architecture!r}; choose from {', '.join(ARCHITECTURES)}.")
        for name in ("sparsity", "expansion", "tokens", "batch", "lr", "pool", "dead_after"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} was given; it must be positive.")
        if self.tokens < self.batch:
            raise ValueError(f"tokens={self.tokens} is less than one batch of {self.batch} rows; train on more.")

    @property
    def variant(self) -> str:
        """The name of the suite's folder for this recipe."""
        return f"{self.architecture}-x{self.expansion}-l0_{self.sparsity:g}"


class Normaliser(NamedTuple):
    """What training takes off a site's rows: (x - mean) * scale has E|x|^2 = 1."""

    mean: Float[Tensor, " d_model"]
    scale: float
    filter: NormFilter

    def __call__(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "kept d_model"]:
        """Kept rows, normalised."""
        return (x[self.filter.keeps(x)] - self.mean) * self.scale


def fit_normaliser(x: Float[Tensor, "row d_model"]) -> Normaliser:
    """Mean and scale of a site, and its median norm, from the first rows.

    Raises ValueError for rows that are not finite or all alike.
    """
    if not x.isfinite().all():
        raise ValueError("The first activations hold values that are not finite; check the model and its dtype.")
    sinks = NormFilter(float(x.norm(dim=-1).median()))
    kept = x[sinks.keeps(x)]
    mean = kept.mean(0)
    spread = float((kept - mean).pow(2).sum(-1).mean())
    if spread <= 1e-12 * float(kept.pow(2).sum(-1).mean()) or spread == 0:
        raise ValueError("The first activations are all alike; an SAE needs rows that vary.")
    return Normaliser(mean, spread**-0.5, sinks)


class SiteTrainer:
    """One SAE with its optimiser, in normalised units until `finish`."""

    def __init__(self, config: TrainConfig, normaliser: Normaliser, first: Float[Tensor, "row d_model"], seed: int) -> None:
        self.config, self.normaliser = config, normaliser
        d_in = first.shape[1]
        self.sae: SAE = ARCHITECTURES[config.architecture](d_in, d_in * config.expansion, config.sparsity).to(first.device)
        self.sae.init_from_rows(normaliser(first), torch.Generator().manual_seed(seed))
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=config.lr, betas=(0.9, 0.999), fused=True)
        self.quiet = torch.zeros(self.sae.d_sae, device=first.device)  # rows since each latent last fired
        self.rows = 0
        self.loss = self.l0 = 0.0

    @property
    def dead(self) -> Tensor:
        return self.quiet > self.config.dead_after

    def step(self, x: Float[Tensor, "row d_model"], progress: float) -> None:
        """One optimiser step on raw rows."""
        x = self.normaliser(x)
        if not len(x):
            return
        self.optimizer.zero_grad()
        loss = self.sae.training_loss(x, State(self.dead, progress))
        loss.total.backward()
        self.sae.remove_parallel_gradient()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        rate = min(1.0, progress / 0.05, (1 - progress) / 0.3)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * rate
        self.optimizer.step()
        self.sae.constrain()
        with torch.no_grad():
            fired = loss.codes.cols[loss.f > 0]
            self.quiet += len(x)
            self.quiet[fired] = 0
            l0 = len(fired) / len(x)
            self.l0 = 0.95 * self.l0 + 0.05 * l0 if self.rows else l0
        self.loss = float(loss.total.detach())
        self.rows += len(x)

    def finish(self, model_name: str, hook_name: str, drop_template: bool, context_size: int) -> SAE:
        """The SAE in raw units with its provenance."""
        n = self.normaliser
        figures = {"loss": self.loss, "l0": self.l0, "dead": float(self.dead.float().mean())}
        self.sae.fold(n.mean, n.scale)
        self.sae.provenance = Provenance(
            model_name, hook_name, n.filter, drop_template, context_size, self.rows, self.config.seed, figures
        )
        return self.sae.exported().eval().requires_grad_(False)


class Progress(NamedTuple):
    """What a running training reports after a step, averaged over its SAEs."""

    rows: int
    loss: float
    """In units of the site's variance; the sparsity penalty included."""
    l0: float
    dead: float
    """Share of latents that have not fired for `dead_after` rows."""
    rows_per_s: float


def train_saes(
    stream: Iterator[Rows],
    configs: list[TrainConfig],
    *,
    model_name: str,
    drop_template: bool = False,
    context_size: int = 512,
    on_progress: Callable[[Progress], None] | None = None,
    bar: bool = True,
) -> dict[str, dict[str, SAE]]:
    """Trains every variant at every site of the stream; all see the same batches.

    stream: rows of every site, see `activations.stream_rows`; it must not run dry before `tokens` rows.
    configs: one a variant; they share tokens, batch, pool and seed.
    Returns `{variant: {hook name: SAE}}`. Raises ValueError for configs that do not fit together or too little data.
    """
    lead = configs[0]
    for config in configs:
        if replace(config, architecture=lead.architecture, sparsity=lead.sparsity, expansion=lead.expansion, lr=lead.lr,
                   dead_after=lead.dead_after) != lead:  # fmt: skip
            raise ValueError("The variants of one run must share tokens, batch, pool and seed; train them separately.")
    if len({config.variant for config in configs}) < len(configs):
        raise ValueError("Two variants of one run have the same name; give them another sparsity or expansion.")
    first, stream = first_rows(stream, lead.pool // 2)
    trainers: dict[tuple[str, str], SiteTrainer] = {}
    for hook_name, x in first.items():
        normaliser = fit_normaliser(x)
        for config in configs:
            trainers[config.variant, hook_name] = SiteTrainer(config, normaliser, x, config.seed)
    done, began = 0, time.perf_counter()
    with tqdm(total=lead.tokens, unit="tok", desc="training", disable=not bar) as meter:
        for rows in shuffled(stream, lead.batch, lead.pool, lead.seed):
            for (_, hook_name), trainer in trainers.items():
                trainer.step(rows[hook_name], done / lead.tokens)
            done += lead.batch
            progress = _progress(list(trainers.values()), done, time.perf_counter() - began)
            meter.update(lead.batch)
            meter.set_postfix(loss=f"{progress.loss:.3f}", l0=f"{progress.l0:.1f}", dead=f"{progress.dead:.1%}", refresh=False)
            if on_progress is not None:
                on_progress(progress)
            if done + lead.batch > lead.tokens:
                break
    if done + lead.batch <= lead.tokens:
        raise ValueError(f"The data ended after {done:,} of {lead.tokens:,} tokens; give more data or train on fewer tokens.")
    suite: dict[str, dict[str, SAE]] = {config.variant: {} for config in configs}
    for (variant, hook_name), trainer in trainers.items():
        suite[variant][hook_name] = trainer.finish(model_name, hook_name, drop_template, context_size)
    return suite


def _progress(trainers: list[SiteTrainer], rows: int, seconds: float) -> Progress:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return Progress(
        rows,
        mean([t.loss for t in trainers]),
        mean([t.l0 for t in trainers]),
        mean([float(t.dead.float().mean()) for t in trainers]),
        rows / seconds,
    )

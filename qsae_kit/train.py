"""Trains many SAEs from one source of rows; it never sees a language model."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from qsae_kit.activations import Block, NormFilter, Place, RowSource, shuffled
from qsae_kit.files import atomic_folder
from qsae_kit.formats import load_sae, save_sae, write_tensors
from qsae_kit.optim import MOMENT_BYTES, Adam, Moments
from qsae_kit.sae import ARCHITECTURES, SAE, Provenance
from qsae_kit.sae.base import State


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
        known = [p.name for p in signature(ARCHITECTURES[self.architecture]).parameters.values() if p.kind is p.KEYWORD_ONLY]
        unknown = set(self.options) - set(known)
        if unknown:
            raise ValueError(
                f"{self.architecture!r} has no option {', '.join(sorted(unknown))}; allowed are {', '.join(known) or 'none'}."
            )

    def build(self, d_in: int) -> SAE:
        """An untrained SAE of this recipe."""
        return ARCHITECTURES[self.architecture](d_in, round(d_in * self.expansion), self.sparsity, **self.options)

    @property
    def variant(self) -> str:
        """The name of the suite's folder for this recipe."""
        return f"{self.architecture}-x{self.expansion:g}-l0_{self.sparsity:g}"


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

    Rows that are not finite are left out. Raises ValueError where they are most, or where all are alike.
    """
    finite = x.isfinite().all(-1)
    if finite.sum() * 2 < len(x):
        raise ValueError("Most of the first activations hold values that are not finite; check the model and its dtype.")
    x = x[finite]
    sinks = NormFilter(float(x.norm(dim=-1).median()))
    kept = x[sinks.keeps(x)]
    mean = kept.mean(0)
    spread = float((kept - mean).pow(2).sum(-1).mean())
    if spread <= 1e-12 * float(kept.pow(2).sum(-1).mean()) or spread == 0:
        raise ValueError("The first activations are all alike; an SAE needs rows that vary.")
    return Normaliser(mean, spread**-0.5, sinks)


class SiteTrainer:
    """One SAE with its optimiser, in normalised units until `finish`."""

    def __init__(self, config: TrainConfig, normaliser: Normaliser, d_in: int, device: torch.device) -> None:
        self.config, self.normaliser = config, normaliser
        self.sae = config.build(d_in).to(device)
        self.optimizer = Adam(list(self.sae.parameters()), config.moments, seed=config.seed)
        self.quiet = torch.zeros(self.sae.d_sae, device=device)  # rows since each latent last fired
        self.rows = self.skipped = 0
        self.loss = self.l0 = 0.0

    @property
    def dead(self) -> Tensor:
        return self.quiet > self.config.dead_after

    def start(self, first: Float[Tensor, "row d_model"]) -> None:
        """Initial weights from raw rows."""
        self.sae.init_from_rows(self.normaliser(first), torch.Generator().manual_seed(self.config.seed))

    def step(self, x: Float[Tensor, "row d_model"], progress: float) -> None:
        """One optimiser step on raw rows; sinks and rows that are not finite are left out and counted."""
        given = len(x)
        x = self.normaliser(x)
        self.skipped += given - len(x)
        if not len(x):
            return
        loss = self.sae.training_loss(x, State(self.dead, progress))
        loss.total.backward()
        self.sae.remove_parallel_gradient()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step(self.config.lr * min(1.0, progress / 0.05, (1 - progress) / 0.3))
        self.optimizer.zero_grad()  # at once: one SAE's gradients are alive at a time
        self.sae.constrain()
        with torch.no_grad():
            fired = loss.codes.cols[loss.f > 0]
            self.quiet += len(x)
            self.quiet[fired] = 0
            l0 = len(fired) / len(x)
            self.l0 = 0.95 * self.l0 + 0.05 * l0 if self.rows else l0
        self.loss = float(loss.total.detach())
        self.rows += len(x)

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Raw rows, none filtered, through the SAE as it is."""
        n = self.normaliser
        return self.sae((x - n.mean) * n.scale) / n.scale + n.mean

    def finish(self, model_name: str, hook_name: str, drop_template: bool, context_size: int) -> SAE:
        """The SAE in raw units with its provenance."""
        n = self.normaliser
        figures = {"loss": self.loss, "l0": self.l0, "dead": float(self.dead.float().mean()), "skipped": float(self.skipped)}
        self.sae.fold(n.mean, n.scale)
        self.sae.provenance = Provenance(
            model_name, hook_name, n.filter, drop_template, context_size, self.rows, self.config.seed, figures
        )
        return self.sae.exported().eval().requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is needed to go on, by name."""
        n = self.normaliser
        counts = torch.tensor([self.rows, self.skipped, self.loss, self.l0, n.scale, *n.filter], dtype=torch.float64)
        own = {"quiet": self.quiet, "mean": n.mean, "counts": counts}
        own |= {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        return own | {f"adam.{name}": tensor for name, tensor in self.optimizer.tensors().items()}

    @classmethod
    def from_tensors(cls, config: TrainConfig, tensors: dict[str, Tensor], device: torch.device) -> "SiteTrainer":
        """A trainer that goes on where `tensors` was called."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        rows, skipped, loss, l0, scale, median, factor = tensors["counts"].tolist()
        mean = tensors["mean"].to(device)
        self = cls(config, Normaliser(mean, scale, NormFilter(median, factor)), len(mean), device)
        self.sae.load_state_dict(part("sae."))
        self.optimizer.load_tensors(part("adam."))
        self.quiet.copy_(tensors["quiet"])
        self.rows, self.skipped, self.loss, self.l0 = int(rows), int(skipped), loss, l0
        return self


Key: TypeAlias = tuple[str, str]
"""Variant and hook name."""


class Progress(NamedTuple):
    """What a running training reports after a step."""

    rows: int
    seconds: float
    """Spent in the steps of this call alone: no data, no checkpoints."""
    trainers: Mapping[Key, SiteTrainer]
    """Of the group that is trained."""

    def figures(self) -> dict[str, dict[str, float]]:
        """Loss (in units of the site's variance, sparsity penalty included), L0 and dead share by "variant/hook name"."""
        return {
            "/".join(key): {"loss": t.loss, "l0": t.l0, "dead": float(t.dead.float().mean())} for key, t in self.trainers.items()
        }


# --- checkpoints


class Checkpoints:
    """The training state of a run's current group in `<folder>/checkpoint-<steps>/`, and the finished SAEs in suite/.

    A checkpoint appears whole by a rename and only then is the one before it deleted, so there is always one to read.
    """

    def __init__(self, folder: Path, configs: Sequence[TrainConfig], sites: Sequence[str]) -> None:
        self.folder = folder
        self.run = {"configs": [asdict(config) for config in configs], "sites": list(sites)}

    def save(self, group: int, done: int, place: Place, given: int, trainers: Mapping[Key, SiteTrainer]) -> None:
        target = self.folder / f"checkpoint-{group}-{done}"
        with atomic_folder(target) as part:
            for number, trainer in enumerate(trainers.values()):
                tensors = {name: t.detach().cpu().contiguous() for name, t in trainer.tensors().items()}
                write_tensors(tensors, part / f"{number}.safetensors")
            state = self.run | {"group": group, "done": done, "place": list(place), "given": given}
            (part / "state.json").write_text(json.dumps(state))
        for old in self.folder.glob("checkpoint-*"):
            if old != target:
                shutil.rmtree(old)

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint's state with its folder, or None. Raises ValueError where it is of another run."""
        found = sorted(self.folder.glob("checkpoint-*/state.json"), key=lambda p: tuple(map(int, p.parent.name.split("-")[1:])))
        if not found:
            return None
        state = json.loads(found[-1].read_text())
        other = [name for name in ("configs", "sites") if state[name] != json.loads(json.dumps(self.run[name]))]
        if other:
            raise ValueError(
                f"{str(self.folder)!r} holds a checkpoint with other {' and '.join(other)}; give the same or another --out."
            )
        return state | {"folder": found[-1].parent}

    def trainers(
        self, state: Mapping[str, Any], keys: Sequence[Key], by_variant: Mapping[str, TrainConfig], device: torch.device
    ) -> dict[Key, SiteTrainer]:
        """The group's trainers as they were."""
        out = {}
        for number, key in enumerate(keys):
            with safe_open(state["folder"] / f"{number}.safetensors", "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            out[key] = SiteTrainer.from_tensors(by_variant[key[0]], tensors, device)
        return out

    def clear(self) -> None:
        for old in self.folder.glob("checkpoint-*"):
            shutil.rmtree(old)


# --- groups


class Group(NamedTuple):
    """SAEs that are trained together."""

    keys: list[Key]
    bytes: int
    """What training them takes beside the language model."""

    @property
    def sites(self) -> list[str]:
        return list(dict.fromkeys(site for _, site in self.keys))


def plan_groups(configs: Sequence[TrainConfig], widths: Mapping[str, int], memory: int) -> list[Group]:
    """Sites in order, put together as long as they fit into `memory` bytes, all variants of a site in one group.

    widths: d_model of every site. Counted are weights, moments, the largest SAE's gradients and a batch's
    pre-activations, and the pool twice (while it is filled). Raises ValueError where one site alone does not fit.
    """
    groups: list[Group] = []
    kept: list[str] = []

    def needed(sites: Sequence[str]) -> int:
        sizes = [(config, d, round(d * config.expansion)) for config in configs for d in (widths[site] for site in sites)]
        weights = sum((4 + MOMENT_BYTES[c.moments]) * (2 * d * m + 3 * m + d) for c, d, m in sizes)
        alive = max(4 * 2 * d * m + 3 * 4 * c.batch * m for c, d, m in sizes)
        pool = sum(2 * 4 * configs[0].pool * widths[site] for site in sites)
        return int(weights + alive + pool)

    for site in widths:
        if needed([site]) > memory:
            raise ValueError(
                f"Training the SAEs of {site} takes {needed([site]) / 1e9:.1f} GB, allowed are {memory / 1e9:.1f} GB; "
                "choose a smaller width, batch or pool, fewer variants, or moments in bfloat16 or int8."
            )
        if kept and needed([*kept, site]) > memory:
            groups.append(Group([(c.variant, s) for c in configs for s in kept], needed(kept)))
            kept = []
        kept.append(site)
    groups.append(Group([(c.variant, s) for c in configs for s in kept], needed(kept)))
    return groups


def free_memory(device: torch.device) -> int:
    """Nine tenths of the bytes that are free on a device."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    return int(0.9 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


# --- the run


class _Interrupts:
    """Within it, an interrupt (Ctrl-C, a notebook's stop button) is noted and waits for the end of the step."""

    def __enter__(self) -> "_Interrupts":
        self.asked = False
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


@dataclass
class _Run:
    """What all groups of a run share."""

    configs: Sequence[TrainConfig]
    checkpoints: Checkpoints | None
    checkpoint_every: int
    on_progress: Callable[[Progress], None] | None
    bar: bool

    @property
    def lead(self) -> TrainConfig:
        return self.configs[0]

    def log(self, group: int, progress: Progress) -> None:
        if self.checkpoints is not None:
            line = {"group": group, "rows": progress.rows, "seconds": round(progress.seconds, 3), "sites": progress.figures()}
            with (self.checkpoints.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def train(
        self, number: int, group: Group, source: RowSource, state: Mapping[str, Any] | None
    ) -> tuple[dict[Key, SiteTrainer], bool]:
        """Trains one group, from a checkpoint's state or from the start; also whether it was interrupted."""
        lead, by_variant = self.lead, {config.variant: config for config in self.configs}
        place = Place(*state["place"]) if state else Place()
        given, done = (state["given"], state["done"]) if state else (0, 0)
        trainers: dict[Key, SiteTrainer] = {}
        busy = 0.0
        with (
            _Interrupts() as interrupts,
            tqdm(total=lead.tokens, initial=done, unit="tok", desc="training", disable=not self.bar) as meter,
        ):
            for block in source.blocks(lead.pool, place):
                if not trainers:
                    device = next(iter(block.rows.values())).device
                    if state and self.checkpoints:
                        trainers = self.checkpoints.trainers(state, group.keys, by_variant, device)
                    else:
                        trainers = start_trainers(group.keys, by_variant, block)
                for rows in shuffled(block, lead.batch, lead.seed, given):
                    began = time.perf_counter()
                    for (_, site), trainer in trainers.items():
                        trainer.step(rows[site], done / lead.tokens)
                    busy += time.perf_counter() - began
                    given, done = given + 1, done + lead.batch
                    last = done + lead.batch > lead.tokens
                    progress = Progress(done, busy, trainers)
                    meter.update(lead.batch)
                    if self.on_progress is not None:
                        self.on_progress(progress)
                    steps = done // lead.batch
                    if last or steps % LOG_EVERY == 0:
                        self.log(number, progress)
                        meter.set_postfix(_means(progress.figures()), refresh=False)
                    if self.checkpoints is not None and (interrupts.asked or (steps % self.checkpoint_every == 0 and not last)):
                        self.checkpoints.save(number, done, block.place, given, trainers)
                    if last or interrupts.asked:
                        return trainers, interrupts.asked
                given = 0
        raise ValueError(f"The data ended after {done:,} of {lead.tokens:,} tokens; give more data or train on fewer tokens.")


def _means(figures: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The figures averaged over a group's SAEs, for the progress bar."""
    return {name: f"{sum(own[name] for own in figures.values()) / len(figures):.3g}" for name in ("loss", "l0", "dead")}


def start_trainers(keys: Sequence[Key], by_variant: Mapping[str, TrainConfig], block: Block) -> dict[Key, SiteTrainer]:
    """Trainers with initial weights; normalisers are fitted to the first half of the block."""
    trainers = {}
    normalisers: dict[str, Normaliser] = {}
    for variant, site in keys:
        first = block.rows[site][: max(1, len(block) // 2)]
        if site not in normalisers:
            normalisers[site] = fit_normaliser(first)
        trainer = SiteTrainer(by_variant[variant], normalisers[site], first.shape[1], first.device)
        trainer.start(first)
        trainers[variant, site] = trainer
    return trainers


LOG = "train.jsonl"
LOG_EVERY = 20
"""Steps between lines of the log."""


def train_saes(
    source: RowSource,
    configs: Sequence[TrainConfig],
    *,
    model_name: str,
    drop_template: bool = False,
    context_size: int = 512,
    folder: Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    memory: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    bar: bool = True,
) -> dict[str, dict[str, SAE]]:
    """Trains every variant at every site of the source; the SAEs of a group see the same batches.

    source: `activations.LiveRows` or `StoredRows`; it must not run dry before `tokens` rows.
    configs: one a variant; they share tokens, batch, pool and seed.
    folder: takes `suite/<variant>/<hook name>/`, the log `train.jsonl` and, while it runs, a checkpoint every
    `checkpoint_every` steps; `resume` goes on from there, on a CPU to the same bits as without a break.
    memory: bytes that may be used beside the model, by default most of what is free; sites that do not fit together are
    trained one group after another, each with a pass over the data.
    An interrupt waits for the end of the step, leaves a checkpoint, and returns the SAEs as they are.

    Returns `{variant: {hook name: SAE}}`. Raises ValueError for configs that do not fit together, too little data, a
    folder with another or an unfinished run.
    """
    _check_configs(configs)
    checkpoints = Checkpoints(folder, configs, source.sites) if folder is not None else None
    if resume and checkpoints is None:
        raise ValueError("resume=True was given without a folder to resume from; give the folder of the run.")
    state = checkpoints.load() if checkpoints is not None else None
    if state is not None and not resume:
        raise ValueError(f"{str(folder)!r} holds a run already; resume it or choose another folder.")
    head = next(iter(source.blocks(configs[0].batch)), None)
    if head is None:
        raise ValueError("There are no tokens to train on: the data gave no rows after the keep-mask.")
    device = next(iter(head.rows.values())).device
    widths = {site: head.rows[site].shape[1] for site in source.sites}
    groups = plan_groups(configs, widths, free_memory(device) if memory is None else memory)
    if bar and len(groups) > 1:
        tqdm.write(
            f"{len(groups)} groups of sites, one after another: "
            + ", ".join(f"{len(g.sites)} ({g.bytes / 1e9:.1f} GB)" for g in groups)
        )
    run = _Run(configs, checkpoints, checkpoint_every, on_progress, bar)
    suite: dict[str, dict[str, SAE]] = {config.variant: {} for config in configs}
    for number, group in enumerate(groups):
        if state is not None and number < state["group"]:
            for variant, site in group.keys:
                suite[variant][site] = load_sae(checkpoints.folder / "suite" / variant / site, device)  # type: ignore[union-attr]
            continue
        own = state if state is not None and number == state["group"] else None
        trainers, interrupted = run.train(number, group, source.only(group.sites), own)
        for (variant, site), trainer in trainers.items():
            sae = trainer.finish(model_name, site, drop_template, context_size)
            suite[variant][site] = sae
            if folder is not None:
                save_sae(sae, folder / "suite" / variant / site)
        if interrupted:
            break
        if checkpoints is not None:
            checkpoints.save(number + 1, 0, Place(), 0, {})
    return suite


def _check_configs(configs: Sequence[TrainConfig]) -> None:
    lead = configs[0]
    for config in configs:
        if (config.tokens, config.batch, config.pool, config.seed) != (lead.tokens, lead.batch, lead.pool, lead.seed):
            raise ValueError("The variants of one run must share tokens, batch, pool and seed; train them separately.")
    if len({config.variant for config in configs}) < len(configs):
        raise ValueError("Two variants of one run have the same name; give them another sparsity or expansion.")

"""Trains many SAEs from one source of rows; it never sees a language model."""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.data.documents import Window
from qsae_kit.data.rows import Block, LiveRows, Origin, Place, RowSource, shuffled
from qsae_kit.io.checkpoints import LOG, Checkpoints, delete_checkpoints, found
from qsae_kit.io.interrupts import Interrupts, say
from qsae_kit.io.memory import Peak, free_memory, kept_memory, return_freed_memory
from qsae_kit.io.progress import tqdm
from qsae_kit.io.runs import Run
from qsae_kit.io.writers import only_writer
from qsae_kit.sae import SAE, Provenance
from qsae_kit.sae.base import State
from qsae_kit.sae.codes import path_name
from qsae_kit.sae.filter import NormFilter, Sinks, sinks_said
from qsae_kit.sae.store import CONFIG, WEIGHTS, load_sae, save_sae, suite_folder
from qsae_kit.sae.suites import Suite
from qsae_kit.sites import parse_hook_name
from qsae_kit.train.groups import Group, Key, group_of, plan_groups
from qsae_kit.train.optim import Adam
from qsae_kit.train.recipe import TrainConfig

TRAINING = "train.run.json"
"""The record of a training in its folder."""


class Normaliser(NamedTuple):
    """What training takes off a site's rows: (x - mean) * scale has E|x|^2 = 1."""

    mean: Float[Tensor, " d_model"]
    scale: float
    filter: NormFilter

    def __call__(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "kept d_model"]:
        """Kept rows, normalised."""
        return (x[self.filter.keeps(x)] - self.mean) * self.scale


def fit_normaliser(x: Float[Tensor, "row d_model"]) -> Normaliser:
    """Mean and scale of a site, and its norm filter, from the first rows.

    Rows that are not finite are left out. Raises ValueError where they are most, or where all are
    alike.
    """
    finite = x.isfinite().all(-1)
    if finite.sum() * 2 < len(x):
        raise ValueError(
            "Most of the first activations hold values that are not finite; check the model and its"
            " dtype."
        )
    x = x[finite]
    sinks = NormFilter.of(x.norm(dim=-1))
    kept = x[sinks.keeps(x)]
    mean = kept.mean(0)
    spread = float((kept - mean).pow(2).sum(-1).mean())
    if spread <= 1e-12 * float(kept.pow(2).sum(-1).mean()) or spread == 0:
        raise ValueError("The first activations are all alike; an SAE needs rows that vary.")
    return Normaliser(mean, spread**-0.5, sinks)


SOFT_COSINE = 0.8


@torch.no_grad()
def keep_near(rows: Float[Tensor, "row d"], anchor: Float[Tensor, "row d"], cosine: float) -> None:
    """Turns unit rows that have left the cone around their (unit) anchors back to its edge, in
    place.
    """
    along = (rows * anchor).sum(-1, keepdim=True)
    aside = torch.nn.functional.normalize(rows - along * anchor, dim=-1)
    rows.copy_(torch.where(along < cosine, cosine * anchor + (1 - cosine**2) ** 0.5 * aside, rows))


class SiteTrainer:
    """One SAE with its optimiser, in normalised units until `finish`."""

    def __init__(
        self, config: TrainConfig, normaliser: Normaliser, d_in: int, device: torch.device
    ) -> None:
        self.config, self.normaliser = config, normaliser
        self.sae = config.build(d_in, device)
        self.lr = config.peak_lr(d_in)
        self.optimizer = Adam(
            list(self.sae.parameters()), config.moments, seed=config.seed, unit_rows=self.sae.W_dec
        )
        self.quiet = torch.zeros(self.sae.d_sae, device=device)  # rows since each latent last fired
        self.sae.W_dec.requires_grad_(config.frozen != "decoder")
        self.sae.encoder.requires_grad_(config.frozen != "encoder")
        self.anchor = self.sae.W_dec.detach().clone() if config.frozen == "soft_decoder" else None
        self.any_dead = False
        self.rows = self.skipped = 0
        self.loss = self.l0 = 0.0

    @property
    def dead(self) -> Tensor:
        return self.quiet > self.config.quiet_rows

    def _state(self, progress: float) -> State:
        # Only where there are some: finding out which waits for the device.
        return State(
            (
                self.dead.nonzero().view(-1)
                if self.any_dead
                else self.quiet.new_empty(0, dtype=torch.long)
            ),
            progress,
        )

    def start(self, first: Float[Tensor, "row d_model"]) -> None:
        """Initial weights from raw rows."""
        generator = torch.Generator().manual_seed(self.config.seed)
        self.sae.init_from_rows(self.normaliser(first), generator, random=bool(self.config.frozen))
        if self.anchor is not None:
            self.anchor.copy_(self.sae.W_dec)

    @torch.no_grad()
    def miss_rate(self, x: Float[Tensor, "row d_model"]) -> float:
        """Share of the active entries that selecting from a product in a short format loses."""
        dtype, x = self.sae.product_dtype, self.normaliser(x)
        places = []
        self.sae.eval()
        for self.sae.product_dtype in (torch.float32, dtype):
            loss = self.sae.training_loss(x, self._state(0.0))
            places.append((loss.codes.rows * loss.codes.n_cols + loss.codes.cols)[loss.f > 0])
        self.sae.train()
        return 1 - float(torch.isin(*places).float().mean()) if len(places[0]) else 0.0

    @torch.enable_grad()  # an interrupt while torch leaves `no_grad` keeps gradients off for good
    def step(self, x: Float[Tensor, "row d_model"], progress: float) -> None:
        """One optimiser step on raw rows; sinks and rows that are not finite are left out and
        counted.
        """
        given = len(x)
        x = self.normaliser(x)
        self.skipped += given - len(x)
        if not len(x):
            return
        loss = self.sae.training_loss(x, self._state(progress))
        loss.total.backward()
        norm = self.optimizer.project_gradients()
        with torch.no_grad():
            fires, cols = loss.f > 0, loss.codes.cols
            self.quiet += len(x)
            self.quiet.scatter_reduce_(0, cols, self.quiet[cols].masked_fill_(fires, 0), "amin")
            wanted = torch.stack(
                [loss.total.double(), norm.double(), fires.sum().double(), self.dead.any().double()]
            )
        # all at once: each look at the device waits for it
        self.loss, length, fired, any_dead = wanted.tolist()
        if not math.isfinite(length):
            raise ValueError(
                f"After {self.rows:,} rows the gradient is not finite (loss {self.loss:.3g});"
                " choose a lower lr."
            )
        self.optimizer.step(
            self.lr * min(1.0, progress / 0.05, (1 - progress) / 0.3),
            clip=min(1.0, 1 / max(length, 1e-12)),
        )
        self.optimizer.zero_grad()  # at once: one SAE's gradients are alive at a time
        self.sae.constrain()
        if self.anchor is not None:
            keep_near(self.sae.W_dec, self.anchor, SOFT_COSINE)
        self.any_dead = bool(any_dead)
        l0 = fired / len(x)
        self.l0 = 0.95 * self.l0 + 0.05 * l0 if self.rows else l0
        self.rows += len(x)

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Raw rows, none filtered, through the SAE as it is."""
        n = self.normaliser
        return self.sae((x - n.mean) * n.scale) / n.scale + n.mean

    def finish(self, origin: Origin, hook_name: str) -> SAE:
        """The SAE in raw units with its provenance."""
        n = self.normaliser
        figures = {
            "loss": self.loss,
            "l0": self.l0,
            "dead": float(self.dead.float().mean()),
            "skipped": float(self.skipped),
        }
        self.sae.fold(n.mean, n.scale)
        self.sae.provenance = Provenance(
            origin.model_name,
            hook_name,
            n.filter,
            origin.policy.drop_template,
            origin.policy.context_size,
            self.rows,
            self.config.seed,
            figures,
            asdict(self.config),
            origin.model_digest,
            origin.policy.drop_prefix,
        )
        return self.sae.exported().eval().requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is needed to go on, by name."""
        n = self.normaliser
        counts = torch.tensor(
            [self.rows, self.skipped, self.loss, self.l0, n.scale, *n.filter], dtype=torch.float64
        )
        own = {"quiet": self.quiet, "mean": n.mean, "counts": counts}
        own |= {} if self.anchor is None else {"anchor": self.anchor}
        own |= {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        return own | {f"adam.{name}": tensor for name, tensor in self.optimizer.tensors().items()}

    @classmethod
    def from_tensors(
        cls, config: TrainConfig, tensors: dict[str, Tensor], device: torch.device
    ) -> "SiteTrainer":
        """A trainer that goes on where `tensors` was called."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }

        rows, skipped, loss, l0, scale, median, factor = tensors["counts"].tolist()
        mean = tensors["mean"].to(device)
        self = cls(config, Normaliser(mean, scale, NormFilter(median, factor)), len(mean), device)
        self.sae.load_state_dict(part("sae."))
        self.optimizer.load_tensors(part("adam."))
        self.quiet.copy_(tensors["quiet"])
        self.any_dead = bool(self.dead.any())
        if self.anchor is not None:
            self.anchor.copy_(tensors["anchor"])
        self.rows, self.skipped, self.loss, self.l0 = int(rows), int(skipped), loss, l0
        return self


class Progress(NamedTuple):
    """What a running training reports after a step."""

    group: int
    rows: int
    seconds: float
    """Spent in the group's steps alone: no data, no checkpoints."""
    last: bool
    """Whether the group ends with this step."""
    trainers: Mapping[Key, SiteTrainer]
    """Of the group that is trained."""

    def figures(self) -> dict[str, dict[str, float]]:
        """Loss (in units of the site's variance, sparsity penalty included), L0 and dead share by
        "variant/hook name".
        """
        return {
            "/".join(key): {"loss": t.loss, "l0": t.l0, "dead": float(t.dead.float().mean())}
            for key, t in self.trainers.items()
        }


# --- the run

LOG_EVERY = 20
"""Steps between lines of the log."""


@dataclass
class _GroupRun:
    """The training of one group, which can be left after any step and gone on with."""

    configs: Sequence[TrainConfig]
    number: int
    group: Group
    groups: Sequence[Group]
    checkpoints: Checkpoints | None
    interrupts: Interrupts
    place: Place = Place()
    given: int = 0
    """Batches of the block at `place` that are done."""
    rows: int = 0
    seconds: float = 0.0

    @property
    def lead(self) -> TrainConfig:
        return self.configs[0]

    @property
    def complete(self) -> bool:
        return self.rows + self.lead.batch > self.lead.tokens

    def state(self) -> dict[str, Any]:
        return {
            "groups": [group.sites for group in self.groups],
            "group": self.number,
            "rows": self.rows,
            "place": [self.place.batch, self.place.row, *self.place.window],
            "given": self.given,
            "seconds": self.seconds,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        batch, row, *window = state["place"]
        self.place, self.given = Place(batch, row, Window(*window)), state["given"]
        self.rows, self.seconds = state["rows"], state["seconds"]

    def trainers(self, block: Block) -> dict[Key, SiteTrainer]:
        """The group's trainers as the checkpoint has them, or with initial weights from the first
        block.
        """
        by_variant = {config.variant: config for config in self.configs}
        if self.rows and self.checkpoints is not None:
            device = next(iter(block.rows.values())).device
            return {
                key: SiteTrainer.from_tensors(
                    by_variant[key[0]], self.checkpoints.tensors("~".join(key)), device
                )
                for key in self.group.keys
            }
        return start_trainers(self.group.keys, by_variant, block)

    def train(
        self,
        source: RowSource,
        watch: Sequence[Callable[[Progress], None]],
        every: float,
        most: int | None,
        bar: bool,
    ) -> dict[Key, SiteTrainer]:
        """Steps until the group is complete or an interrupt was asked for; `most`: see
        `kept_memory`.
        """
        lead = self.lead
        trainers: dict[Key, SiteTrainer] = {}
        due = time.monotonic() + every
        with tqdm(
            total=lead.tokens, initial=self.rows, unit="tok", desc="training", disable=not bar
        ) as meter:
            for block in source.blocks(lead.pool, self.place):
                self.place = block.place
                if not trainers:
                    trainers = self.trainers(block)
                    self._announce(block, trainers, bar)
                    if bar:
                        say_sinks(source, block, trainers)
                with kept_memory(most) as limit_kept:
                    for rows in shuffled(block, lead.batch, lead.seed, self.given):
                        began = time.perf_counter()
                        for (_, site), trainer in trainers.items():
                            trainer.step(rows[site], (self.rows + lead.batch / 2) / lead.tokens)
                            limit_kept()
                        self.seconds += time.perf_counter() - began
                        self.given, self.rows = self.given + 1, self.rows + lead.batch
                        last = self.complete or self.interrupts.asked
                        progress = Progress(self.number, self.rows, self.seconds, last, trainers)
                        meter.update(lead.batch)
                        for watcher in watch:
                            watcher(progress)
                        steps, stop = self.rows // lead.batch, self.interrupts.asked
                        if self.complete or steps % LOG_EVERY == 0:
                            self._log(progress, meter)
                        if (
                            self.checkpoints is not None
                            and not self.complete
                            and (stop or time.monotonic() >= due)
                        ):
                            began = time.monotonic()
                            self.checkpoints.save(
                                self.state(),
                                {"~".join(key): t.tensors() for key, t in trainers.items()},
                            )
                            due = time.monotonic() + max(
                                every, 20 * (time.monotonic() - began) if every else 0
                            )
                        if self.complete or stop:
                            return trainers
                self.given = 0
                rows = {}
                del block  # before the next one is made
        raise ValueError(
            f"The data ended after {self.rows:,} of {lead.tokens:,} tokens; give more data or train"
            " on fewer tokens."
        )

    def _announce(self, block: Block, trainers: Mapping[Key, SiteTrainer], bar: bool) -> None:
        (_, site), trainer = next(iter(trainers.items()))
        rows, dtype = block.rows[site], trainer.sae.product_dtype
        said = path_name(rows.device, dtype or rows.dtype)
        if dtype == torch.bfloat16:
            said += (
                f"; of what float32 selects {trainer.miss_rate(rows[: self.lead.batch]):.2%} is"
                " missed"
            )
        if bar and (dtype == torch.bfloat16 or rows.device.type != "cpu"):
            say(f"Products: {said}")

    def _log(self, progress: Progress, meter: tqdm) -> None:
        figures = progress.figures()
        means = {
            name: sum(own[name] for own in figures.values()) / len(figures)
            for name in ("loss", "l0", "dead")
        }
        meter.set_postfix({name: f"{value:.3g}" for name, value in means.items()}, refresh=False)
        if self.checkpoints is not None:
            line = {
                "group": self.number,
                "rows": self.rows,
                "seconds": round(self.seconds, 3),
                "sites": figures,
            }
            self.checkpoints.log(line)


def say_sinks(source: RowSource, block: Block, trainers: Mapping[Key, SiteTrainer]) -> None:
    """Says at how many sites rows of a block are left out, with tokens where the source has a model
    at hand.
    """
    filters = {site: trainer.normaliser.filter for (_, site), trainer in trainers.items()}
    dropped = {site: int(own.drops(block.rows[site]).sum()) for site, own in filters.items()}
    beyond = {site: filters[site].drops for site, n in dropped.items() if n}
    texts = source.texts_where(beyond) if isinstance(source, LiveRows) else {}
    if beyond:
        found = [Sinks(site, dropped[site], texts.get(site, ())) for site in beyond]
        say(sinks_said(found, len(block)))


def start_trainers(
    keys: Sequence[Key], by_variant: Mapping[str, TrainConfig], block: Block
) -> dict[Key, SiteTrainer]:
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


def train_saes(
    source: RowSource,
    configs: Sequence[TrainConfig],
    *,
    model_name: str = "",
    folder: Path | None = None,
    fresh: bool = False,
    checkpoint_seconds: float = 120.0,
    memory: int | None = None,
    watch: Sequence[Callable[[Progress], None]] = (),
    stop: threading.Event | None = None,
    bar: bool = True,
) -> Suite:
    """Trains every variant at every site of the source; the SAEs of a group see the same batches.

    source: `data.rows.LiveRows` or `StoredRows`; it must not run dry before `tokens` rows.
    configs: one a variant; they share tokens, batch and pool; the first one's seed decides the
        order of the rows.
    model_name: of the model that stored rows are of, where their source does not say it; what the
        source says of model and tokens is stored with the SAEs.
    folder: takes `suite/<variant>/<hook name>/`, the log `train.jsonl`, the record
    `train.run.json` and, while it runs, a checkpoint every `checkpoint_seconds` (less often where
    writing it takes more than a twentieth of the time). A run that was cut off there is gone on
    with, on a CPU to the same bits as without a break.
    fresh: a run that is in the folder goes, with its SAEs, and this one starts anew.
    memory: bytes that may be used beside the model, by default most of what is free; sites that do
    not fit together are trained one group after another, each with a pass over the data, and are
    returned on the CPU.
    watch: called with the `Progress` after each step, such as `train.watch.LiveFigure()`.
    stop: an event that works like an interrupt, from another thread; an interrupt sets it.
    An interrupt waits for the end of the step, leaves a checkpoint, and returns the SAEs as they
    are; so does SIGTERM, which then ends the process.

    Returns `suite[variant][hook_name]`. Raises ValueError for configs that do not fit together, a
    source's name that is no site, too little data, a folder with another run (unless `fresh` is
    given) or with files of the same names that are of none, or one that another process writes, and
    for rows of an unknown model, or of another than `model_name`.
    """
    _check_configs(configs, source.widths)
    for site in source.sites:
        parse_hook_name(site)
    return_freed_memory()
    origin = _origin(source, model_name)
    with only_writer(folder), Interrupts(stop) as interrupts:
        checkpoints, state, record = None, None, None
        if folder is not None:
            identity = _identity(source, configs, origin)
            checkpoints = Checkpoints(folder, identity)
            files = [LOG, *(name for key in _keys(source, configs) for name in sae_files(*key))]
            record = Run(folder, identity, files, name=TRAINING, what="training", fresh=fresh)
            state = _found_state(checkpoints, record, fresh)
        groups = _groups(source, configs, memory, state)
        if bar:
            taken, n = max(group.bytes for group in groups), sum(len(g.keys) for g in groups)
            turns = f", in {len(groups)} turns" if len(groups) > 1 else ""
            what = "1 SAE" if n == 1 else f"{n} SAEs"
            say(f"{what} on {configs[0].tokens:,} tokens each{turns}, {taken / 1e9:.2f} GB")
        saes: dict[str, dict[str, SAE]] = {config.variant: {} for config in configs}
        # so that a run can be resumed from its first moment
        if checkpoints is not None and state is None:
            checkpoints.save(_GroupRun(configs, 0, groups[0], groups, None, interrupts).state(), {})
        for number, group in enumerate(groups):
            if folder is not None and state is not None and number < state["group"]:
                for variant, site in group.keys:
                    saes[variant][site] = load_sae(suite_folder(folder / "suite", variant, site))
                continue
            run = _GroupRun(configs, number, group, groups, checkpoints, interrupts)
            if state is not None and number == state["group"]:
                run.resume(state)
            peak = Peak(source.device)
            most = peak.began + group.bytes if source.device.type == "cpu" else None
            trainers = run.train(source.only(group.sites), watch, checkpoint_seconds, most, bar)
            if bar and peak.bytes is not None and peak.bytes > group.bytes:
                say(
                    f"Peak memory: {peak.bytes / 1e9:.2f} GB taken (forward pass included),"
                    f" {group.bytes / 1e9:.2f} GB planned"
                )
            while trainers:
                (variant, site), trainer = trainers.popitem()
                sae = trainer.finish(origin, site)
                saes[variant][site] = sae if len(groups) == 1 else sae.to("cpu")
                if folder is not None and record is not None:
                    record.again(f"{variant}/{site}")
                    save_sae(sae, suite_folder(folder / "suite", variant, site))
                    record.done(f"{variant}/{site}", sae_files(variant, site))
                del trainer, sae  # before the next group begins
            if run.complete and checkpoints is not None:
                checkpoints.save(
                    _GroupRun(configs, number + 1, group, groups, None, interrupts).state(), {}
                )
            if interrupts.asked:
                break
    return Suite(
        {
            variant: {site: own[site] for site in source.sites if site in own}
            for variant, own in saes.items()
        }
    )


def _origin(source: RowSource, model_name: str) -> Origin:
    """Where a run's rows come from, as its SAEs will say."""
    known = source.origin.model_name
    if not known and not model_name:
        raise ValueError(
            "The rows do not say which model they are of; give model_name, or make the source with"
            " its origin."
        )
    if known and model_name not in ("", known):
        raise ValueError(
            f"The rows are of {known!r}, and model_name={model_name!r} was given; leave it out."
        )
    return source.origin._replace(model_name=known or model_name)


def _identity(source: RowSource, configs: Sequence[TrainConfig], origin: Origin) -> dict[str, Any]:
    """What a run has to have in common with the one that it goes on with."""
    return {
        "recipe": [asdict(config) for config in configs],
        "choice of sites": list(source.sites),
        "model": origin.model_digest or origin.model_name,
        "drop_template": origin.policy.drop_template,
        "drop_prefix": origin.policy.drop_prefix,
        "context size": origin.policy.context_size,
        "data": source.fingerprint(),
    }


def _keys(source: RowSource, configs: Sequence[TrainConfig]) -> list[Key]:
    return [(config.variant, site) for config in configs for site in source.sites]


def sae_files(variant: str, site: str) -> list[str]:
    """The names of an SAE's files in the folder of a run."""
    return [f"suite/{variant}/{site}/{name}" for name in (CONFIG, WEIGHTS)]


def _found_state(checkpoints: Checkpoints, record: Run, fresh: bool) -> dict[str, Any] | None:
    """The state to go on from, None where there is none yet; what a killed run left is cleared.

    fresh: the run that is there goes.
    """
    folder = checkpoints.folder
    there = found(folder)
    if there and not record.path.exists():
        raise ValueError(
            f"{str(there[-1])!r} is of no training that this version can go on with; give another"
            " folder."
        )
    state = None if fresh else checkpoints.load()
    if state is not None and not _is_state(state):
        raise ValueError(
            f"The checkpoint in {str(checkpoints.folder)!r} was not written by this package's"
            " training; choose another folder."
        )
    record.begin(lambda: delete_checkpoints(folder))
    checkpoints.begin(state)
    return state


PLACE_NUMBERS = 4
"""Batch, row, and the two numbers of a window."""


def _is_state(state: Mapping[str, Any]) -> bool:
    """Whether a state has what `_GroupRun.state` writes."""
    numbers = [state.get(name) for name in ("group", "rows", "given", "seconds")]
    groups, place = state.get("groups"), state.get("place")
    return (
        all(isinstance(number, (int, float)) and number >= 0 for number in numbers)
        and isinstance(groups, list)
        and all(
            isinstance(sites, list) and all(isinstance(site, str) for site in sites)
            for sites in groups
        )
        and isinstance(place, list)
        and len(place) == PLACE_NUMBERS
        and all(isinstance(number, int) and number >= 0 for number in place)
    )


def _groups(
    source: RowSource,
    configs: Sequence[TrainConfig],
    memory: int | None,
    state: Mapping[str, Any] | None,
) -> list[Group]:
    """The groups of a run; of one that goes on those that were planned then, whatever is free
    now.
    """
    widths = source.widths
    if state is None:
        free = free_memory(source.device) if memory is None else memory
        return plan_groups(configs, widths, free, source.forward_rows)
    if not {site for sites in state["groups"] for site in sites} <= set(widths):
        raise ValueError(
            "The checkpoint names sites that this run does not have; choose another folder."
        )
    return [
        group_of(configs, {site: widths[site] for site in sites}, source.forward_rows)
        for sites in state["groups"]
    ]


def _check_configs(configs: Sequence[TrainConfig], widths: Mapping[str, int]) -> None:
    if not configs:
        raise ValueError("No recipe was given; give at least one TrainConfig.")
    lead = configs[0]
    for config in configs:
        if (config.tokens, config.batch, config.pool) != (lead.tokens, lead.batch, lead.pool):
            raise ValueError(
                "The variants of one run must share tokens, batch and pool; train them separately."
            )
    if len({config.variant for config in configs}) < len(configs):
        raise ValueError(
            "Two variants of one run have the same name; give them another sparsity or expansion."
        )
    for config in configs:
        for width in set(widths.values()):
            # a k that is too large is better found now than after a full pool
            config.build(width, torch.device("meta"))

"""`qsae run`: plan, data, training, evaluation, index, study and card in one folder, by one
command that can be cut off.

    <out>/manifest.json         what the run is, and of each stage that is done its files with
                                sizes and checksums
    <out>/plan.json             sites, recipe, groups, memory, disk and hours, as they were planned
    <out>/data/                 documents.jsonl and data.json (`data.mixes.write_mix`)
    <out>/suite/, train.jsonl   the SAEs in SAELens's format, and the training's log
    <out>/evaluation/, baselines/, features/, study/
                                tables, figures, the feature index, the steering study
    <out>/README.md             the model card

A stage whose files are there and unchanged is skipped; one that was cut off goes on from its own
checkpoints.
"""

import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from qsae_kit.data import mixes
from qsae_kit.data.companions import companion_of
from qsae_kit.data.readers import read_documents
from qsae_kit.data.rows import Origin, StoredRows
from qsae_kit.evaluate.score import score_suite
from qsae_kit.features.indexing import WORK, IndexConfig, build_index
from qsae_kit.io.checkpoints import delete_checkpoints
from qsae_kit.io.files import OWN, inside, sweep_folder, write_text
from qsae_kit.io.jsonfiles import read_json
from qsae_kit.io.memory import free_memory
from qsae_kit.io.progress import say, tqdm
from qsae_kit.io.runs import Run
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.answering import answer_all
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.pipelines.card import check_card, is_one_of, write_card
from qsae_kit.sae.store import load_suite
from qsae_kit.sae.suites import Suite
from qsae_kit.sites import parse_hook_name
from qsae_kit.steer.behaviours import Goal, StudyPrompts, judged, refusal_prompts
from qsae_kit.steer.report import write_study
from qsae_kit.steer.study import JOURNAL, STUDY_FILES, StudyConfig, quick, steering_study
from qsae_kit.train.fit import Meter, fit_baselines, fit_live, sites_of
from qsae_kit.train.groups import plan_groups
from qsae_kit.train.recipe import TrainConfig, default_recipe
from qsae_kit.train.run import TRAINING, train_saes

STAGES = ("data", "train", "evaluate", "index", "study", "card")
RECORD, PLAN = "manifest.json", "plan.json"
BYTES_A_TOKEN = 5
"""Of a document on disk."""
FEW = 1_000_000
"""Training tokens below which evaluation, index and study are small too."""


@dataclass(frozen=True)
class SuiteConfig:
    """What a suite is made of; model and folder come beside it."""

    budget: str = "useful"
    """Training tokens ("300k", "100M", or a name of `data.mixes.BUDGETS`), or hours ("12h") that
    everything may take.
    """
    sites: str = "resid,mlp,attn"
    layers: str = "all"
    recipe: str = ""
    """The data recipe (`data.mixes.read_manifest`); empty: the model's own."""
    files: Mapping[str, str] | None = None
    """Files in the place of the recipe's slots."""
    expansion: float | None = None
    """d_sae as a multiple of the site's width. None: 8, and 4 below `FEW` tokens, which leave half
    of the latents of a wider SAE dead.
    """
    target_l0: float | None = None
    moments: str = ""
    """Of Adam; empty: bfloat16 on a GPU, else float32."""
    goal: Goal | Literal["auto"] = "auto"
    """Of the refusal study; auto: to suppress where the model refuses at least half of the harmful
    selection prompts, else to induce.
    """
    baseline_sites: int = 2
    """Sites at which what an SAE has to beat is trained and evaluated too; at most one where the
    suite is a small one.
    """
    seed: int = 0


def parse_budget(text: str) -> tuple[int | None, float | None]:
    """Tokens, or hours. Raises ValueError for what is neither."""
    if text in mixes.BUDGETS:
        return mixes.BUDGETS[text], None
    number, unit = text[:-1], text[-1:]
    scales = {"k": 1e3, "M": 1e6, "B": 1e9}
    try:
        value = float(number if unit in (*scales, "h") else text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise ValueError(
            f"The budget {text!r} was given; allowed are {', '.join(mixes.BUDGETS)}, tokens such as"
            " 300k or 100M, and hours such as 12h."
        )
    return (None, value) if unit == "h" else (int(value * scales.get(unit, 1)), None)


# --- the plan


def suite_bytes(config: TrainConfig, widths: Iterable[int]) -> int:
    """Disk for the SAEs of sites of these widths: four bytes a parameter."""
    sizes = [(d, config.d_sae(d)) for d in widths]
    return sum(4 * (2 * d * m + 3 * m + d) for d, m in sizes)


def disk_bytes(config: TrainConfig, widths: Iterable[int], largest_group: int, tokens: int) -> int:
    """Disk for everything: the SAEs, two checkpoints of a group while one takes the other's place,
    documents twice, figures.
    """
    return (
        suite_bytes(config, widths) + 2 * largest_group + 2 * BYTES_A_TOKEN * tokens + 200 * 2**20
    )


def recipe_for(
    config: SuiteConfig, width: int, n_sites: int, tokens: int, on_gpu: bool
) -> TrainConfig:
    """The training recipe of a suite of sites of a width, the largest where they differ."""
    changes: dict[str, Any] = {} if config.target_l0 is None else {"sparsity": config.target_l0}
    batch = 2048 if tokens >= FEW or on_gpu else max(256, 2 ** int(math.log2(tokens / 200)))
    expansion = config.expansion or (8 if tokens >= FEW else 4)
    moments = config.moments or ("bfloat16" if on_gpu else "float32")
    return default_recipe(
        width,
        n_sites,
        tokens=tokens,
        batch=min(2048, batch),
        expansion=expansion,
        seed=config.seed,
        moments=moments,
        **changes,
    )


@dataclass(frozen=True)
class Speeds:
    """What a machine does in a second, as measured."""

    forward: float
    """Tokens through the model, up to its end."""
    sae: float
    """Rows through a training step of one SAE."""
    generated: float
    """Tokens that the model writes in a batch."""


def measure_speeds(lm: HookedLM, config: TrainConfig, width: int) -> Speeds:
    """Times a forward pass, a few training steps on random rows of a width, and a short
    generation.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        0, lm.config.vocab_size, (16, min(256, lm.context_size)), generator=generator
    ).to(lm.device)
    hook = f"blocks.{lm.n_layers - 1}.hook_resid_post"

    def seconds(run: Callable[[], Any]) -> float:
        run()
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        return max(1e-6, time.perf_counter() - began)

    with torch.no_grad():
        forward = ids.numel() / seconds(
            lambda: lm.run_with_cache(ids, names_filter=hook, return_type=None)
        )
    few = replace(config, tokens=8 * config.batch, pool=4 * config.batch)
    rows = StoredRows(
        {hook: torch.randn(4 * config.batch, width, generator=generator)},
        0,
        1.0,
        lm.device,
        Origin(lm.model_name),
    )
    meter = Meter(config.batch)
    train_saes(rows, [few], watch=[meter], bar=False)
    said = seconds(
        lambda: lm.generate(
            ["Hello!"] * mixes.BATCH, 8, enable_thinking=False if lm.has_thinking else None
        )
    )
    return Speeds(forward, meter.tokens_per_s, 8 * mixes.BATCH / said)


def stage_hours(
    speeds: Speeds, config: TrainConfig, written: float, n_sites: int, n_groups: int, sizes: "Sizes"
) -> dict[str, float]:
    """Hours for each stage at these speeds; written: tokens that the model writes for its data."""
    study = sizes.study
    answers = sizes.n_evaluation * (3 * 5 + study.n_random + 2 * study.n_noise)
    baselines = (
        (config.tokens / speeds.forward + 4 * sizes.baselines * config.tokens / speeds.sae)
        if sizes.baselines
        else 0
    )
    seconds = {
        "data": written / speeds.generated,
        "train": n_groups * config.tokens / speeds.forward + n_sites * config.tokens / speeds.sae,
        "evaluate": sizes.evaluated * (1 + 0.6 * n_sites) / speeds.forward + baselines,
        "index": sizes.indexed / speeds.forward + n_sites * sizes.indexed / (2 * speeds.sae),
        "study": answers * study.max_new_tokens / speeds.generated,
    }
    return {name: value / 3600 for name, value in seconds.items()}


@dataclass(frozen=True)
class Sizes:
    """Tokens and prompts of what follows the training."""

    evaluated: int
    indexed: int
    n_selection: int
    n_evaluation: int
    baselines: int
    """Sites at which baselines are trained."""
    study: StudyConfig


def sizes_for(lm: HookedLM, config: SuiteConfig, tokens: int) -> Sizes:
    """Small for small budgets, whole for those that a result is published from; the study's goal is
    set when it is run.
    """
    companion = companion_of(lm)
    new = companion.answer_tokens
    base = StudyConfig(seed=config.seed, max_new_tokens=new)
    if tokens >= FEW and companion.whole_studies:
        return Sizes(50_000, 500_000, 48, 300, config.baseline_sites, base)
    few = replace(
        quick(base), n_random=3, n_noise=2, control_prompts=40, max_new_tokens=min(new, 40)
    )
    if not companion.quick:  # a second for an answer
        few = replace(few, strengths=few.strengths[::2])
    return Sizes(6_000, 50_000, 24, 80, min(1, config.baseline_sites), few)


def manifest_of(lm: HookedLM, config: SuiteConfig) -> mixes.Manifest:
    """The data recipe of a suite. Raises ValueError as `data.mixes.read_manifest` does."""
    return mixes.read_manifest(config.recipe or companion_of(lm).recipe)


def make_plan(
    lm: HookedLM, config: SuiteConfig, out: Path, memory: int | None = None
) -> dict[str, Any]:
    """The plan as plain values: it is measured, checked against memory and disk, and printed.

    Raises ValueError for sites that do not exist, one site that does not fit into memory, too
    little disk, and hours in which nothing can be trained.
    """
    manifest = manifest_of(lm, config)
    names = sites_of(lm, config.sites, config.layers)
    tokens, hours = parse_budget(config.budget)
    on_gpu = lm.device.type == "cuda"
    widths = {name: lm.width(name) for name in names}
    widest = max(widths.values())
    tried = recipe_for(config, widest, len(names), tokens or FEW, on_gpu)
    speeds = measure_speeds(lm, tried, widest)
    free = free_memory(lm.device) if memory is None else memory

    def planned(n: int) -> dict[str, Any]:
        recipe = recipe_for(config, widest, len(names), n, on_gpu)
        groups = plan_groups([recipe], widths, free, 8192)
        sizes = sizes_for(lm, config, n)
        written = mixes.written_tokens(manifest, n, companion_of(lm))
        spent = stage_hours(speeds, recipe, written, len(names), len(groups), sizes)
        return {
            "model": lm.model_name,
            "recipe": manifest.name,
            "sites": names,
            "tokens": n,
            "d_sae": recipe.d_sae(widest),
            "training": asdict(recipe),
            "groups": [{"sites": group.sites, "bytes": group.bytes} for group in groups],
            "memory_bytes": max(g.bytes for g in groups),
            "disk_bytes": disk_bytes(recipe, widths.values(), max(g.bytes for g in groups), n),
            "hours": spent,
            "measured": asdict(speeds),
        }

    if hours is not None:
        low, high = 0.0, 34.0  # powers of two of tokens
        for _ in range(40):
            middle = (low + high) / 2
            enough = sum(planned(max(4096, int(2**middle)))["hours"].values()) <= 0.9 * hours
            low, high = (middle, high) if enough else (low, middle)
        tokens = int(2**low) // 1000 * 1000
        if tokens < 100_000:
            raise ValueError(
                f"In {hours:g} hours this machine could train on {tokens:,} tokens at {len(names)}"
                " sites, too few for any SAE; give more hours, or fewer sites or layers."
            )
    assert tokens is not None
    if tokens < 50_000:
        raise ValueError(f"A budget of {tokens:,} tokens was given; an SAE needs 50,000 at least.")
    plan = planned(tokens)
    there = out
    while not there.exists():
        there = there.parent
    space = shutil.disk_usage(there).free
    if plan["disk_bytes"] > space:
        raise ValueError(
            f"The suite takes {plan['disk_bytes'] / 1e9:.1f} GB of disk, and {space / 1e9:.1f} GB"
            " are free; free some, choose another --out, or fewer sites or a smaller width."
        )
    return plan


def said_plan(plan: Mapping[str, Any]) -> str:
    """The plan in a few lines."""
    hours = plan["hours"]
    return (
        f"{plan['model']}: {len(plan['sites'])} sites, {plan['tokens']:,} tokens of"
        f" {plan['recipe']}, d_sae {plan['d_sae']:,}; {len(plan['groups'])} group(s),"
        f" {plan['memory_bytes'] / 1e9:.2f} GB beside the model, {plan['disk_bytes'] / 1e9:.2f} GB"
        f" of disk.\nAbout {sum(hours.values()):.2f} hours: "
        + ", ".join(f"{name} {value:.2f}" for name, value in hours.items())
        + "."
    )


# --- what is done


PRODUCTS: dict[str, tuple[str, ...]] = {
    "data": ("data/documents.jsonl", "data/data.json"),
    "train": (
        "suite/*/*/cfg.json",
        "suite/*/*/sae_weights.safetensors",
        "train.jsonl",
        TRAINING,
    ),
    "evaluate": (
        *(
            f"{folder}/evaluation.{kind}"
            for folder in ("evaluation", "baselines")
            for kind in ("csv", "parquet", "html", "run.json")
        ),
        *(f"baselines/{name}" for name in ("baselines.html", "seeds.csv", "seeds.parquet")),
    ),
    "index": (
        *(f"features/{name}" for name in ("index.json", "documents.parquet", "tokens.parquet")),
        *(f"features/tables/*/*/{name}.parquet" for name in ("features", "examples")),
    ),
    "study": tuple(f"study/{name}" for name in (*STUDY_FILES, JOURNAL)),
    "card": ("README.md",),
}
"""What the stages write; whatever else lies in the folder is not theirs."""
NEEDS: dict[str, tuple[str, ...]] = {
    "data": (),
    "train": ("data",),
    "evaluate": ("data", "train"),
    "index": ("data", "train"),
    "study": ("train",),
    "card": ("data", "evaluate", "study"),
}
"""The stages whose files a stage reads."""
FOLDERS = ("data", "suite", "evaluation", "baselines", "features", "study")
"""Of the stages."""
REPLACED = f"{OWN}replaced"
"""The folder of what is made anew, until the new one is whole."""


class Record:
    """Which stages are done, with their files: a `Run` whose stages can be made anew."""

    def __init__(self, out: Path, identity: Mapping[str, Any], fresh: bool = False) -> None:
        """Nothing is written yet. Raises ValueError where the folder holds another suite and
        `fresh` is not given, a manifest that is none of a suite, or, without one, files that a
        suite would write over."""
        names = [PLAN, *(name for stage in STAGES for name in PRODUCTS[stage])]
        self.out = out
        self.run = Run(out, identity, names, name=RECORD, what="suite", fresh=fresh)
        self.training = (
            Run(out, {}, (), name=TRAINING, what="training", fresh=True) if fresh else None
        )
        for stage, files in self.run.stages.items():
            if stage not in STAGES or not all(is_one_of(name, PRODUCTS[stage]) for name in files):
                raise ValueError(
                    f"{str(self.run.path)!r} is no record of a suite; give another folder."
                )

    def write(self) -> None:
        """Writes the manifest; a suite that makes room for this one goes first."""
        self.run.begin(self._clear)

    def _clear(self) -> None:
        """Takes away what the suite that was there needed to go on."""
        mixes.delete_all_slots(self.out / "data")
        shutil.rmtree(self.out / "features" / WORK, ignore_errors=True)
        if self.training is not None:
            self.training.make_room(lambda: delete_checkpoints(self.out))
        shutil.rmtree(self.out / REPLACED, ignore_errors=True)

    def pending(self) -> list[str]:
        """The stages that are not done."""
        return [stage for stage in STAGES if stage not in self.run.stages]

    def changed(self) -> list[str]:
        """The stages that are done and whose files are not all there as they were."""
        return [
            stage for stage in STAGES if stage in self.run.stages and not self.run.as_it_was(stage)
        ]

    def put_aside(self, stages: Sequence[str]) -> None:
        """Makes room for stages that are made anew: what they had written is kept until they are
        done again.
        """
        for stage in reversed(stages):  # what a kill leaves is never built upon what is gone
            for name in self.run.stages.get(stage, {}):
                path, kept = (
                    inside(self.out, name, "The suite's manifest"),
                    self.out / REPLACED / stage / name,
                )
                if path.is_file():
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, kept)
            self.run.again(stage)

    def done(self, stage: str, names: Sequence[str]) -> None:
        """Notes a stage's files, of these names, and lets go of those that they took the place
        of.
        """
        self.run.done(stage, names)
        shutil.rmtree(self.out / REPLACED / stage, ignore_errors=True)
        with suppress(OSError):  # it is not there, or not empty
            (self.out / REPLACED).rmdir()


# --- the run


def make_suite(
    lm: HookedLM,
    out: Path,
    config: SuiteConfig = SuiteConfig(),
    *,
    memory: int | None = None,
    folder: Path | None = None,
    remake: bool = False,
    fresh: bool = False,
    bar: bool = True,
) -> dict[str, Any]:
    """Makes a suite, or goes on with it; returns its plan.

    A stage that is done is never made again by itself, whatever became of its files or of those
    that it was made from. remake: makes the first stage whose files are gone or changed anew, and
    all that follow it; the old ones are kept until then. fresh: a suite that is in the folder goes,
    and this one starts anew.
    memory: bytes that training may take beside the model (None: most of what is free). folder:
    where downloaded data sets lie, each under its id, instead of the hub. Raises ValueError for
    what `make_plan` and `data.mixes.write_mix` do, for a folder that holds another suite (unless
    `fresh` is given) or a README.md that is no card, where something that is left to do needs files
    that are gone or changed, and while another process writes there.
    """
    with only_writer(out):
        check_card(out)
        record = Record(out, identity_of(lm, config), fresh)
        if links := [name for name in FOLDERS if (out / name).is_symlink()]:
            raise ValueError(
                f"{str(out / links[0])!r} is a link; put a folder there, or make the whole suite"
                " where it leads."
            )
        made = None
        if fresh or not (out / PLAN).is_file():
            made = make_plan(lm, config, out, memory)
        else:
            read_plan(out / PLAN)
        record.write()
        if made is not None:
            write_text(out / PLAN, json.dumps(made, indent=1) + "\n")
        plan = read_plan(out / PLAN)
        if bar:
            tqdm.write(said_plan(plan))
        suite = _Suite(lm, out, config, plan, memory, folder, bar)
        suite.clear(record)
        if remake:
            _make_room(record)
        pending, changed = record.pending(), record.changed()
        lacking = [stage for stage in changed if any(stage in NEEDS[later] for later in pending)]
        if lacking:
            raise ValueError(
                f"Files of {' and '.join(lacking)} in {str(out)!r} are gone or changed, and"
                f" {pending[0]} needs them; bring them back, or make them and what follows anew"
                " with --remake."
            )
        if changed and bar:
            tqdm.write(
                f"Gone or changed since they were made, and left so: files of {', '.join(changed)}"
                " (--remake)."
            )
        for name in pending:
            if bar:
                tqdm.write(f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}")
            getattr(suite, name)()
            record.done(name, suite.products(name))
            suite.clear(record)
    return plan


def _make_room(record: Record) -> None:
    """Puts the first stage that is not as it was aside, with all that follow it."""
    changed = record.changed()
    if changed:
        record.put_aside(STAGES[STAGES.index(changed[0]) :])


def identity_of(lm: HookedLM, config: SuiteConfig) -> dict[str, Any]:
    """What a suite's folder is told apart by; files by name and checksum, wherever they lie."""
    manifest = manifest_of(lm, config)
    told = json.dumps(asdict(manifest), sort_keys=True)
    return {
        **lm.identity(),
        **asdict(config),
        "recipe": f"{manifest.name} {hashlib.sha256(told.encode()).hexdigest()}",
        "files": {slot: mixes.file_id(path) for slot, path in (config.files or {}).items()},
    }


def read_plan(path: Path) -> dict[str, Any]:
    """A suite's plan. Raises ValueError for a file that is none."""
    plan = read_json(path, "a suite's plan")
    try:
        TrainConfig(**plan["training"])
        said_plan(plan)
        [parse_hook_name(name) for name in plan["sites"]]
        if not isinstance(plan["tokens"], int) or not isinstance(plan["recipe"], str):
            raise TypeError("tokens or recipe")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is no plan of a suite ({error}); take it away, and it is made anew, or"
            " give another folder."
        ) from error
    return plan


def usual_goal(lm: HookedLM, given: StudyPrompts, config: StudyConfig) -> Goal:
    """What there is to change: suppress where the unsteered model shows the behaviour at least at
    half of the prompts, else induce.
    """
    texts = given.selection[given.behaviour.kinds[0]]
    thinking = lm.thinking(config.thinking)
    shown = judged(
        lm,
        given.behaviour,
        texts,
        answer_all(lm, texts, [], config.max_new_tokens, thinking),
        thinking,
    ).outcomes
    return "suppress" if 2 * shown.count("S") >= len(shown) else "induce"


class _Suite:
    """The stages; each writes its `PRODUCTS`."""

    def __init__(
        self,
        lm: HookedLM,
        out: Path,
        config: SuiteConfig,
        plan: Mapping[str, Any],
        memory: int | None,
        folder: Path | None,
        bar: bool,
    ) -> None:
        self.lm, self.out, self.config, self.plan, self.memory, self.folder, self.bar = (
            lm,
            out,
            config,
            plan,
            memory,
            folder,
            bar,
        )
        self.recipe = TrainConfig(**plan["training"])
        self.sizes = sizes_for(lm, config, plan["tokens"])
        self.documents = str(out / "data" / mixes.DEALT)

    def data(self) -> None:
        files = self.config.files or {}
        mixes.write_mix(
            self.lm,
            manifest_of(self.lm, self.config),
            self.plan["tokens"],
            self.out / "data",
            files=files,
            folder=self.folder,
            seed=self.config.seed,
            bar=self.bar,
        )

    def train(self) -> None:
        stop = threading.Event()
        fit_live(
            self.lm,
            self.documents,
            self.plan["sites"],
            [self.recipe],
            self.out,
            memory=self.memory,
            stop=stop,
            bar=self.bar,
        )
        if stop.is_set():
            say("The training was stopped; the same command goes on with it.")
            raise KeyboardInterrupt

    def products(self, stage: str) -> list[str]:
        """The names of a stage's files, as far as the plan tells."""
        places = [f"{self.recipe.variant}/{site}" for site in self.plan["sites"]]
        return [pattern.replace("*/*", place) for pattern in PRODUCTS[stage] for place in places]

    def clear(self, record: Record) -> None:
        """Takes away what stages that are done needed to go on."""
        if "data" not in record.pending():
            mixes.delete_slots(self.out / "data", manifest_of(self.lm, self.config))
        if "train" not in record.pending():
            delete_checkpoints(self.out)
            sweep_folder(self.out, "checkpoint-*")

    def evaluate(self) -> None:
        suite = self._suite()
        score_suite(
            self.lm,
            suite,
            self.documents,
            self.sizes.evaluated,
            self.out / "evaluation",
            bar=self.bar,
        )
        places = self._spread(self.sizes.baselines)
        if not places:
            return
        some = suite.only(hook_names=places)
        [trained] = some.values()
        # those that an older version trained do not say their recipe, the plan does
        recipe = None if all(sae.origin.recipe for sae in trained.values()) else self.recipe
        score_suite(
            self.lm,
            some,
            self.documents,
            self.sizes.evaluated,
            self.out / "baselines",
            baselines=fit_baselines(self.lm, trained, self.documents, recipe=recipe, bar=self.bar),
            bar=self.bar,
        )

    def index(self) -> None:
        build_index(
            self.lm,
            self._suite(),
            lambda: read_documents(self.documents),
            self.out / "features",
            IndexConfig(tokens=self.sizes.indexed),
            data=self.plan["recipe"],
            bar=self.bar,
        )

    def study(self) -> None:
        suite, sizes = self._suite(), self.sizes
        given = refusal_prompts(self.lm, sizes.n_selection, sizes.n_evaluation, self.config.seed)
        goal = (
            usual_goal(self.lm, given, sizes.study)
            if self.config.goal == "auto"
            else self.config.goal
        )
        result = steering_study(
            self.lm,
            suite,
            given.selection,
            given.evaluation,
            given.behaviour,
            replace(sizes.study, goal=goal),
            folder=self.out / "study",
            bar=self.bar,
        )
        write_study(result, suite, self.lm, self.out / "study")

    def card(self) -> None:
        write_card(self.out)

    def _suite(self) -> Suite:
        return load_suite(self.out / "suite", self.lm.device)

    def _spread(self, n: int) -> list[str]:
        """So many sites, residual streams first, spread over the layers."""
        streams = [
            name for name in self.plan["sites"] if parse_hook_name(name).kind == "resid"
        ] or self.plan["sites"]
        n = min(n, len(streams))
        return [streams[(2 * i + 1) * len(streams) // (2 * n)] for i in range(n)]

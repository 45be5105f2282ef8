"""`qsae train`, `qsae baselines` and `qsae rows train`: a run, on a live model or on stored
activations.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsae_kit.attach import check_fit, policy_of
from qsae_kit.data.documents import TokenStream
from qsae_kit.data.rows import LiveRows, StoredRows
from qsae_kit.data.stored import StoredFile
from qsae_kit.data.streams import documents_of
from qsae_kit.io.files import atomic_folder
from qsae_kit.io.writers import only_writer_of
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.metrics.reconstruction import Reconstruction
from qsae_kit.sae import SAE
from qsae_kit.sae.store import save_suite
from qsae_kit.sae.suites import Suite
from qsae_kit.sites import expand_sites, parse_hook_name, parse_kinds, parse_layers
from qsae_kit.train.baselines import baseline_suite, recipe_of
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import Progress, train_saes
from qsae_kit.train.watch import Watcher

HELD_OUT = 0.1
"""Share of stored rows, the last ones, that is kept for the figures."""
WARM_UP_STEPS = 3
"""Steps that the speed leaves out."""


@dataclass
class FitResult:
    """A finished training and, on stored rows, its figures."""

    suite: Suite
    figures: dict[str, Any]
    complete: bool
    """False after an interrupt."""


def sites_of(lm: HookedLM, kinds: str, layers: str) -> list[str]:
    """Hook names of kinds ("resid,mlp,attn,z") at layers ("all", "0,2", "1-3")."""
    return [
        site.hook_name
        for site in expand_sites(parse_kinds(kinds), parse_layers(layers, lm.n_layers))
    ]


class Meter:
    """Notes the speed of the steps alone, and held-out FVU every `curve` steps, whose own time is
    left out.
    """

    def __init__(self, batch: int, curve: int = 0, held_out: Tensor | None = None) -> None:
        self.batch, self.every, self.held_out = batch, curve, held_out
        self.points: list[list[float]] = []
        self.steps: dict[int, list[tuple[int, float]]] = {}
        """Rows and seconds after each step of a group."""

    def __call__(self, progress: Progress) -> None:
        self.steps.setdefault(progress.group, []).append((progress.rows, progress.seconds))
        if (
            self.every
            and self.held_out is not None
            and progress.rows // self.batch % self.every == 0
        ):
            [trainer] = progress.trainers.values()
            score = Reconstruction()
            trainer.sae.eval()
            for part in self.held_out.split(4096):
                x = part.to(trainer.sae.b_dec.device)
                score.add(x, trainer.reconstruct(x), x.new_zeros(len(x), 1))
            trainer.sae.train()
            self.points.append([round(progress.seconds, 3), progress.rows, round(score.fvu, 4)])

    @property
    def tokens_per_s(self) -> float:
        """Rows a second of the steps alone, after each group's first ones."""
        spans = [
            (steps[min(WARM_UP_STEPS, len(steps) - 1)], steps[-1]) for steps in self.steps.values()
        ]
        seconds = sum(last[1] - first[1] for first, last in spans)
        return sum(last[0] - first[0] for first, last in spans) / max(seconds, 1e-9)

    @property
    def rows(self) -> int:
        """Rows that the last group came to."""
        return self.steps[max(self.steps)][-1][0] if self.steps else 0

    def complete(self, tokens: int) -> bool:
        """Whether the last group came to its end."""
        return not self.steps or self.steps[max(self.steps)][-1][0] + self.batch > tokens


def fit_stored(
    file: StoredFile,
    site: str,
    config: TrainConfig,
    out: Path,
    *,
    fresh: bool = False,
    curve: int = 0,
    watch: Sequence[Watcher] = (),
    bar: bool = True,
) -> FitResult:
    """Trains one SAE on stored rows; FVU and L0 are of the last tenth, of which no row is filtered.

    site: where the rows come from; "" takes what the file says.
    """
    path, acts, named, scale = file[:4]
    if site and named and site != named:
        raise ValueError(
            f"{str(path)!r} holds rows of {named}, and {site} was asked for; leave --at out."
        )
    site = site or named
    if not site:
        raise ValueError(
            f"{str(path)!r} does not say which site its rows are from; give --at, such as resid@15."
        )
    parse_hook_name(site)
    cut = round(len(acts) * (1 - HELD_OUT))
    if cut < config.batch:
        raise ValueError(
            f"{str(path)!r} leaves {cut:,} rows to train on, less than one batch of {config.batch};"
            f" give --set batch={cut} or less."
        )
    held_out = acts[cut:].float() / scale
    whole = held_out.isfinite().all(-1)
    held_out = held_out[whole]
    if not len(held_out):
        raise ValueError(
            f"None of the last {len(whole):,} rows of {str(path)!r} is finite; store the"
            " activations again."
        )
    meter = Meter(config.batch, curve, held_out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = StoredRows({site: acts[:cut]}, config.seed, scale, device, file.origin)
    suite = train_saes(
        source,
        [config],
        folder=out,
        fresh=fresh,
        watch=[meter, *watch],
        bar=bar,
    )
    [sae] = suite[config.variant].values()
    score = Reconstruction()
    with torch.no_grad():
        for part in held_out.split(4096):
            x = part.to(sae.b_dec.device)
            f = sae.encode(x)
            score.add(x, sae.decode(f), f)
    figures = {
        "architecture": config.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "sparsity": config.sparsity,
        "batch": config.batch,
        "tokens": sae.provenance.tokens if sae.provenance else 0,
        "epochs": round(meter.rows / cut, 3),
        "tokens_per_s": round(meter.tokens_per_s, 1),
        "l0": round(score.l0, 3),
        "fvu": round(score.fvu, 4),
        "dead": round(score.dead, 4),
        "held_out": len(held_out),
        "held_out_not_finite": int((~whole).sum()),
        "curve": meter.points,
    }
    return FitResult(suite, figures, meter.complete(config.tokens))


def fit_baselines(
    lm: HookedLM,
    saes: Mapping[str, SAE],
    data: str | None,
    out: Path | None = None,
    recipe: TrainConfig | None = None,
    *,
    bar: bool = True,
) -> Suite:
    """Trains what the SAEs of one variant have to beat (`train.baselines.baseline_suite`), on the
    documents that are not held out, and gives it as a suite.

    saes: by hook name; baselines are trained by their recipe and on tokens of their kind. out:
    takes the suite, whole or not at all. recipe: of SAEs that do not say theirs. Raises ValueError
    for SAEs of another model or of several recipes, without a recipe or with two, for a folder
    that is not empty, and while another process writes it.
    """
    for sae in saes.values():
        check_fit(lm, sae)
    if recipe is None:
        recipe = recipe_of(saes)
    elif any(sae.provenance is not None and sae.provenance.recipe for sae in saes.values()):
        raise ValueError("The SAEs say what they were trained by; leave the recipe out.")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{str(out)!r} is not an empty folder; give another one, or remove it first."
        )
    policy = policy_of(lm, {"suite": saes})
    _, documents = documents_of(lm, data)
    source = LiveRows(lm, list(saes), TokenStream(lm, documents, policy=policy))
    if out is None:
        return baseline_suite(source, recipe, bar=bar)
    with only_writer_of(out), atomic_folder(out) as part:
        suite = baseline_suite(source, recipe, bar=bar)
        save_suite(suite, part)
    return suite


def fit_live(
    lm: HookedLM,
    data: str | None,
    sites: Sequence[str],
    configs: Sequence[TrainConfig],
    out: Path,
    *,
    fresh: bool = False,
    memory: int | None = None,
    watch: Sequence[Watcher] = (),
    stop: threading.Event | None = None,
    bar: bool = True,
) -> FitResult:
    """Trains at sites of a running model, all from one stream; memory and stop as for
    `train_saes`.
    """
    _, documents = documents_of(lm, data)
    meter = Meter(configs[0].batch)
    source = LiveRows(lm, sites, TokenStream(lm, documents))
    suite = train_saes(
        source,
        configs,
        folder=out,
        fresh=fresh,
        memory=memory,
        watch=[meter, *watch],
        stop=stop,
        bar=bar,
    )
    figures: dict[str, Any] = {
        "config": [asdict(config) for config in configs],
        "sites": len(sites),
        "tokens_per_s": round(meter.tokens_per_s, 1),
    }
    for variant, saes in suite.items():
        figures[variant] = {site: sae.origin.figures for site, sae in saes.items()}
    return FitResult(
        suite,
        figures,
        len(suite.places()) == len(sites) * len(configs) and meter.complete(configs[0].tokens),
    )

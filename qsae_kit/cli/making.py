"""Models in, SAEs out: `qsae demo`, `qsae run`, `qsae train` and `qsae baselines`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qsae_kit.cli import options, outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qsae_kit.lm.hooked import HookedLM
    from qsae_kit.sae import SAE
    from qsae_kit.train.fit import FitResult
    from qsae_kit.train.recipe import TrainConfig
    from qsae_kit.train.watch import Watcher

LIKELY_WIDTH = 1024
"""A d_model to try a recipe with before the model's own is known."""
HELD_OUT_TOKENS = 20_000
"""Behind the frontier of a grid."""
RECIPE_FLAGS = {
    "architecture": "--arch",
    "sparsity": "--l0",
    "expansion": "--expansion",
    "tokens": "--tokens",
    "seed": "--seed",
}
DEMO = options.Settings(
    ("qsae_kit.pipelines.demo:DemoConfig",), {"sites": "--at", "layers": "--at"}
)
RUN = options.Settings(
    ("qsae_kit.pipelines.suite:SuiteConfig",),
    {
        "budget": "--budget",
        "sites": "--at",
        "layers": "--at",
        "recipe": "--data",
        "files": "--slot",
        "seed": "--seed",
    },
)
TRAIN = options.Settings(
    ("qsae_kit.train.recipe:TrainConfig",), RECIPE_FLAGS | {"frozen": "--frozen"}
)
DemoSet = Annotated[list[str] | None, DEMO.option()]
RunSet = Annotated[list[str] | None, RUN.option()]
TrainSet = Annotated[list[str] | None, TRAIN.option()]


def demo(
    model: options.Model = "tiny",
    at: options.At = None,
    data: options.Data = None,
    tokens: options.Tokens = None,
    out: options.Out = Path("runs/demo"),
    fresh: options.Fresh = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    set_: DemoSet = None,
    config: options.ConfigFile = None,
) -> None:
    """Train SAEs, evaluate them per layer and site, and steer refusal both ways."""
    from qsae_kit.figures.tables import by_kind
    from qsae_kit.pipelines.demo import default_config, run_demo

    changes = DEMO.read(set_, config, **_places(at))
    lengths = options.counts("--tokens", tokens)
    outputs.write_to(out)
    lm = outputs.loaded(model, dtype, device)
    sizes = replace(default_config(lm), **changes)
    if lengths:
        recipes = tuple(replace(recipe, tokens=lengths[0]) for recipe in sizes.variants)
        sizes = replace(sizes, variants=recipes)
    result = run_demo(lm, out, sizes, data, fresh=fresh)
    typer.echo(
        "\nReconstruction, medians over layers (CE: nats a token; all: evaluation.csv)\n"
        + outputs.page(by_kind(result.evaluation))
    )
    typer.echo(
        f"\nReport: {out / 'report.html'}\nLook at the features, move the edit: qsae open {out}"
    )
    for study in result.studies:
        typer.echo("\n" + outputs.wrapped(study.in_words))


def run(
    model: options.Model,
    budget: Annotated[
        str | None,
        typer.Option(
            help=(
                "smoke (5M tokens), useful (100M, the default), publish (500M), tokens such as"
                " 300k, or hours such as 12h."
            )
        ),
    ] = None,
    at: options.At = None,
    data: options.Recipe = None,
    slot: options.Slots = None,
    data_folder: options.DataFolder = None,
    memory: Annotated[
        float | None,
        typer.Option(help="GB for training, beside the model (most of what is free by default)."),
    ] = None,
    seed: options.Seed = None,
    out: options.Out = Path("runs/suite"),
    fresh: options.Fresh = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan, and make nothing.")] = False,
    remake: Annotated[
        bool,
        typer.Option(
            "--remake",
            help=(
                "Make the first stage whose files are gone or changed anew, and all that follow it."
            ),
        ),
    ] = False,
    push: Annotated[
        str, typer.Option(help="A repository on the hub to upload the finished suite to (private).")
    ] = "",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    set_: RunSet = None,
    config: options.ConfigFile = None,
) -> None:
    """Make a whole suite: data, SAEs, evaluation, feature index, refusal study, model card. A
    cut-off run goes on.
    """
    from qsae_kit.pipelines.card import push as push_suite
    from qsae_kit.pipelines.suite import SuiteConfig, make_plan, make_suite, parse_budget, said_plan

    files = options.files("--slot", slot) or None
    flags = {"budget": budget, "recipe": data, "files": files, "seed": seed, **_places(at)}
    wanted = SuiteConfig(**RUN.read(set_, config, **flags))
    parse_budget(wanted.budget)
    (outputs.check_out if plan else outputs.write_to)(out)
    lm = outputs.loaded(model, dtype, device)
    taken = None if memory is None else int(memory * 1e9)
    if plan:
        typer.echo(said_plan(make_plan(lm, wanted, out, taken)))
        return
    make_suite(lm, out, wanted, memory=taken, folder=data_folder, remake=remake, fresh=fresh)
    typer.echo(
        f"The suite: {out}; its card: {out / 'README.md'}; what is in it: {out / 'manifest.json'}"
    )
    if push:
        typer.echo(f"Pushed to {push_suite(out, push)}")


def train(
    model: options.Model,
    data: options.Data = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Sites, as kinds@layers: resid,mlp@2-5, attn or @0,2; may be given again (all by"
                " default)."
            )
        ),
    ] = None,
    arch: options.Arch = None,
    l0: options.L0 = None,
    expansion: options.Expansion = None,
    tokens: Annotated[
        str | None, typer.Option(help="Rows to train on, such as 500k (2M by default).")
    ] = None,
    frozen: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Train a control too, whose decoder, soft_decoder or encoder stays random; may be"
                " given again."
            )
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help=(
                "A suite or a public release whose SAEs of the same sites are begun from, such as"
                " the base model's; architecture, width and L0 are theirs unless given."
            )
        ),
    ] = None,
    init_variant: Annotated[
        str, typer.Option(help="Of several variants there, the one to begin from.")
    ] = "",
    held_out: Annotated[
        str | None, typer.Option(help="Held-out tokens behind a grid's frontier (20k by default).")
    ] = None,
    watch: options.Watch = None,
    seed: options.Seed = None,
    out: options.Out = Path("runs/train"),
    fresh: options.Fresh = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    set_: TrainSet = None,
    config: options.ConfigFile = None,
    json_: options.Json = False,
) -> None:
    """Train SAEs at sites of a model. Several values with commas between for --l0, --expansion or
    --tokens make a grid and its frontier. A cut-off run goes on.
    """
    from qsae_kit.sites import parse_at
    from qsae_kit.train import fit
    from qsae_kit.train.recipe import default_recipe

    l0s, widths = options.numbers("--l0", l0), options.numbers("--expansion", expansion)
    lengths = options.counts("--tokens", tokens)
    grid = max(len(l0s), len(widths), len(lengths)) > 1
    options.refuse(
        grid and bool(watch or frozen),
        "--watch and --frozen take one recipe, and lists make a grid; give one value of --l0,"
        " --expansion and --tokens.",
    )
    options.refuse(
        init is not None and bool(grid or frozen),
        "--init is for one recipe that is not frozen; leave lists and --frozen out.",
    )
    options.refuse(
        bool(init_variant) and init is None, "--init-variant is for --init; give both or none."
    )
    options.refuse(
        held_out is not None and not grid,
        "--held-out is for a grid; give several values of --l0, --expansion or --tokens.",
    )
    changes = recipe_changes(TRAIN, set_, config, arch, l0s, widths, lengths, seed)
    controls = _frozen(frozen)
    places = [parse_at(place) for place in at or ["@all"]]
    watchers = watchers_of(watch, out)
    n_held_out = options.count("--held-out", held_out) if held_out else HELD_OUT_TOKENS
    outputs.write_to(out)
    lm = outputs.loaded(model, dtype, device)
    names = list(dict.fromkeys(name for place in places for name in fit.sites_of(lm, *place)))
    begun = {} if init is None else fit.starts_of(init, names, init_variant)
    if begun:
        changes = recipe_like(next(iter(begun.values()))) | changes
    recipe = default_recipe(max(map(lm.width, names)), len(names), **changes)
    if grid:
        _train_grid(lm, data, names, recipe, (l0s, widths, lengths), n_held_out, out, fresh, json_)
        return
    if not json_:
        say_assumed(recipe, changes)
    recipes = [recipe, *(replace(recipe, frozen=part) for part in controls)]
    result = fit.fit_live(
        lm, data, names, recipes, out, fresh=fresh, init=begun, watch=watchers, bar=not json_
    )
    finish(result, out, json_)


def baselines(
    suite: options.Source,
    model: options.OtherModel = None,
    at: options.Places = None,
    variant: Annotated[
        str, typer.Option(help="The variant to beat; the first that is no control by default.")
    ] = "",
    data: options.Data = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; SUITE-baselines by default.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="For SAEs that do not say their recipe: its architecture.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="For those: rows that they were trained on, such as 2M.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="For those: rows a step.", min=1)] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
) -> None:
    """Train what a suite has to beat, by its own recipe, as a suite beside it."""
    from qsae_kit.attach import attached
    from qsae_kit.data.streams import documents_of
    from qsae_kit.sae.store import load_suite, model_name_of
    from qsae_kit.steer.study import CONTROL_SAES
    from qsae_kit.train.fit import fit_baselines
    from qsae_kit.train.recipe import default_recipe

    folder = Path(suite)
    options.refuse(
        out is None and not folder.is_dir(),
        f"{suite!r} is no folder that the baselines could lie beside; give --out.",
    )
    given = (arch, tokens, batch)
    options.refuse(
        None in given and given != (None, None, None),
        "--arch, --tokens and --batch belong together; give all of a recipe, or none.",
    )
    out = out or folder.with_name(f"{folder.resolve().name}-baselines")
    outputs.write_file(out)
    variants = [variant] if variant else ()
    trained = load_suite(suite, variants=variants, hook_names=outputs.sites_at(at))
    own = [name for name in trained if not name.endswith(tuple(CONTROL_SAES))] or list(trained)
    lead = trained.only(variants=own[:1])
    lm = outputs.loaded(model or model_name_of(lead), dtype, device)
    [(name, saes)] = attached(lm, lead, lambda: documents_of(lm, data)[1]()).items()
    recipe = None
    if arch is not None and tokens is not None and batch is not None:
        sae = next(iter(saes.values()))
        recipe = default_recipe(
            sae.d_in,
            len(saes),
            architecture=arch,
            sparsity=sae.sparsity,
            expansion=sae.d_sae / sae.d_in,
            tokens=options.count("--tokens", tokens),
            batch=batch,
        )
    made = fit_baselines(lm, saes, data, out, recipe)
    typer.echo(
        f"Baselines of {name}: {', '.join(made)}. Compare: qsae eval {suite} --baselines {out}"
    )


def _train_grid(
    lm: "HookedLM",
    data: str | None,
    names: "Sequence[str]",
    recipe: "TrainConfig",
    lists: tuple[list[float], list[float], list[int]],
    held_out: int,
    out: Path,
    fresh: bool,
    json_: bool,
) -> None:
    from qsae_kit.pipelines.sweep import sweep

    l0s, widths, lengths = lists
    table = sweep(
        lm,
        data,
        names,
        recipe,
        l0s or [recipe.sparsity],
        widths or [recipe.expansion],
        lengths or [recipe.tokens],
        held_out,
        out,
        fresh=fresh,
        bar=not json_,
    )
    if json_:
        typer.echo(table.to_json(orient="records"))
        return
    columns = (
        "site expansion trained_tokens target l0 fvu delta_ce dead effective_rank tokens"
    ).split()
    typer.echo(outputs.page(table.loc[table["category"] == "all", columns]))
    typer.echo(f"Every figure: {out / 'sweep.csv'}; frontier: {out / 'sweep.html'}")


# --- shared with the training on stored rows


def recipe_changes(
    settings: options.Settings,
    set_: list[str] | None,
    config: Path | None,
    arch: str | None,
    l0s: list[float],
    widths: list[float],
    lengths: list[int],
    seed: int | None,
) -> dict[str, Any]:
    """The fields of a recipe that were given, of lists the first and of `tokens` the most; what is
    wrong with them is said before a model is loaded.
    """
    from qsae_kit.train.recipe import default_recipe

    changes = settings.read(
        set_,
        config,
        architecture=arch,
        sparsity=next(iter(l0s), None),
        expansion=next(iter(widths), None),
        tokens=max(lengths, default=None),
        seed=seed,
    )
    default_recipe(LIKELY_WIDTH, **changes)
    return changes


def recipe_like(sae: "SAE") -> dict[str, Any]:
    """The fields of a recipe that makes SAEs such as this one."""
    sparsity = {} if sae.sparsity == sae.d_sae else {"sparsity": sae.sparsity}  # it is not known
    return {"architecture": sae.architecture, "expansion": sae.d_sae / sae.d_in} | sparsity


def watchers_of(watch: str | None, out: Path) -> "list[Watcher]":
    """The watchers of --watch. Raises ValueError for one that there is not."""
    from qsae_kit.train.watch import WATCHERS

    options.refuse(
        watch is not None and watch not in WATCHERS,
        f"--watch {watch} was given; allowed are {', '.join(WATCHERS)}.",
    )
    return [] if watch is None else [WATCHERS[watch](out / watch)]


def _frozen(parts: list[str] | None) -> list[Any]:
    from typing import get_args

    from qsae_kit.train.recipe import Frozen

    allowed = get_args(Frozen)[1:]
    options.refuse(
        not set(parts or ()) <= set(allowed),
        f"--frozen {' '.join(parts or ())} was given; allowed are {', '.join(allowed)}.",
    )
    return list(dict.fromkeys(parts or ()))


def say_assumed(recipe: "TrainConfig", given: dict[str, Any]) -> None:
    """Says which sparsity a recipe has where none was given."""
    if "sparsity" not in given and recipe.targeted:
        typer.echo(f"No --l0 given: {recipe.sparsity} is assumed, the square root of d_model.")


def finish(result: "FitResult", out: Path, json_: bool) -> None:
    """Says what was trained, and ends with `INTERRUPTED` where that is not all."""
    from qsae_kit.io.progress import say

    if json_:
        typer.echo(json.dumps(result.figures | {"complete": result.complete}))
    else:
        _say_trained(result, out)
    if not result.complete:
        say(f"Stopped before the end; the same command goes on (--out {out}).")
        raise typer.Exit(outputs.INTERRUPTED)


def _say_trained(result: "FitResult", out: Path) -> None:
    for place, sae in result.suite.saes().items():
        figures = sae.origin.figures
        said = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        typer.echo(f"{place}: {said}")
    if "held_out" in result.figures:
        shown = ("fvu", "l0", "dead", "held_out", "epochs")
        said = ", ".join(f"{name} {result.figures[name]:.4g}" for name in shown)
        typer.echo(f"Held-out rows: {said}")
        for seconds, rows, fvu in result.figures["curve"]:
            typer.echo(f"  after {rows:,} rows and {seconds:.1f} s: FVU {fvu:.4f}")
    typer.echo(f"{result.figures['tokens_per_s']:,.0f} tokens/s; the SAEs are in {out / 'suite'}")


def _places(at: str | None) -> dict[str, str]:
    from qsae_kit.sites import parse_at

    return {} if at is None else dict(zip(("sites", "layers"), parse_at(at), strict=True))

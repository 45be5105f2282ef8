"""The `qsae` command: parses, calls, prints."""

import signal
import sys
import warnings
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qsae_kit.train.fit import FitResult

app = typer.Typer(
    help="Sparse autoencoders for chat models: train, evaluate, steer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Option(help="tiny, smollm2, a hub id such as Qwen/Qwen3-0.6B, or a local folder.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help=(
            "Of the model's weights: float32, bfloat16, float16, or auto: float32 on a CPU, on a"
            " GPU the checkpoint's own."
        )
    ),
]
Sites = Annotated[
    list[str] | None,
    typer.Option("--site", help="Only this hook name of the suite; may be given again."),
]
Variants = Annotated[
    list[str] | None,
    typer.Option("--variant", help="Only this variant of the suite; may be given again."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew: a run that --out holds goes.")]


LIKELY_WIDTH = 1024
"""A d_model to try a recipe with before the model's own is known."""
_running: ContextVar[typer.Context] = ContextVar("running")


@app.callback()
def _qsae(context: typer.Context) -> None:
    """Sparse autoencoders for chat models: train, evaluate, steer."""
    _running.set(context)


@app.command()
def demo(
    model: Model = "tiny",
    dtype: Dtype = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder for suite/, the tables and report.html.")
    ] = Path("runs/demo"),
    sites: Annotated[str | None, typer.Option(help="Comma-separated: resid, mlp, attn, z.")] = None,
    layers: Annotated[str | None, typer.Option(help='"all", "0,2" or "1-3".')] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Chats to train on: a .jsonl or .txt file, or a data set's id."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on.")] = None,
    fresh: Fresh = False,
) -> None:
    """Train SAEs, evaluate them per layer and site, and steer refusal both ways."""
    import pandas as pd

    from qsae_kit.figures.tables import headline
    from qsae_kit.lm.hooked import load_model
    from qsae_kit.pipelines.demo import default_config, run_demo
    from qsae_kit.steer.report import SHOWN, summary

    _write_to(out)
    lm = load_model(model, dtype)
    config = default_config(lm)
    config = replace(config, sites=sites or config.sites, layers=layers or config.layers)
    if tokens is not None:
        config = replace(
            config, variants=tuple(replace(variant, tokens=tokens) for variant in config.variants)
        )
    result = run_demo(lm, out, config, data, fresh=fresh)
    with pd.option_context(
        "display.width", 250, "display.max_columns", 30, "display.max_rows", 100
    ):
        page = headline(result.evaluation, ["all"]).round(4).to_string(index=False)
        typer.echo(
            f"\nReconstruction per layer and site (evaluation.csv has tokens by category)\n{page}"
        )
        typer.echo(
            "\nRefusal at the frozen strength (steering.csv has every row)\n"
            + summary(result.table)[["goal", *SHOWN]].round(3).to_string(index=False, na_rep="")
        )
    for study in result.studies:
        typer.echo("\n" + study.verdict)
    typer.echo(
        f"\nReport: {out / 'report.html'}\nNotebook: jupyter lab notebooks/01_quickstart.ipynb"
    )


@app.command()
def harvest(
    model: Model = "tiny",
    dtype: Dtype = "auto",
    data: Annotated[
        str | None,
        typer.Option(
            help="A .jsonl or .txt file, or a data set's id; the bundled model has its world."
        ),
    ] = None,
    site: Annotated[
        str, typer.Option(help="A hook name, such as blocks.3.hook_resid_post.")
    ] = "blocks.0.hook_resid_post",
    tokens: Annotated[int, typer.Option(help="Rows to store.", min=1)] = 100_000,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")] = Path(
        "acts.safetensors"
    ),
    drop_template: Annotated[bool, typer.Option(help="Leave template tokens out.")] = False,
) -> None:
    """Store activations of one site as `acts` [row, d_model] in half precision."""
    from qsae_kit.data.stored import harvest_rows
    from qsae_kit.lm.hooked import load_model

    _write_file(out)
    lm = load_model(model, dtype)
    n = harvest_rows(lm, data, site, tokens, out, drop_template)
    typer.echo(f"{n:,} rows of {site} in {out}")


@app.command()
def dialogues(
    model: Model = "tiny",
    dtype: Dtype = "auto",
    prompts: Annotated[
        Path | None,
        typer.Option(help="One a line, a JSON list, or CSV/JSONL; the package's own by default."),
    ] = None,
    n: Annotated[int | None, typer.Option(help="Prompts, at most.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 48,
    out: Annotated[Path, typer.Option(help="The .jsonl file to write.")] = Path("chats.jsonl"),
) -> None:
    """Let a model answer prompts and write the chats, every fifth with a stock refusal: data to
    train its SAEs on.
    """
    from qsae_kit.data.companions import companion_of
    from qsae_kit.data.prompts import read_prompts
    from qsae_kit.data.written import mixed_prompts, write_dialogues
    from qsae_kit.lm.hooked import load_model

    _write_file(out)
    given = None if prompts is None else read_prompts(prompts)[:n]
    lm = load_model(model, dtype)
    texts = mixed_prompts(companion_of(lm), n) if given is None else given
    typer.echo(f"{write_dialogues(lm, texts, out, max_new_tokens):,} chats in {out}")


@app.command()
def train(
    model: Annotated[
        str | None, typer.Option(help="tiny (the default), smollm2, a hub id or a local folder.")
    ] = None,
    dtype: Dtype = "auto",
    data: Annotated[
        str | None,
        typer.Option(help="A .jsonl or .txt file, or a data set's id; tiny has its world."),
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(help="Comma-separated: resid, mlp, attn, z (the first three by default)."),
    ] = None,
    layers: Annotated[str | None, typer.Option(help='"all" (the default), "0,2" or "1-3".')] = None,
    acts: Annotated[
        Path | None, typer.Option(help="Train on stored activations instead: acts [row, d_model].")
    ] = None,
    site: Annotated[
        str, typer.Option(help="With --acts: the hook name, where the file does not say it.")
    ] = "",
    arch: Annotated[
        str, typer.Option(help="jumprelu, topk, batchtopk, matryoshka, standard or gated.")
    ] = "jumprelu",
    d_sae: Annotated[int | None, typer.Option(help="Width; or give --expansion.")] = None,
    expansion: Annotated[
        float | None, typer.Option(help="Width as a multiple of d_model (8 by default).")
    ] = None,
    k: Annotated[
        int | None, typer.Option(help="Features a token, for topk, batchtopk and matryoshka.")
    ] = None,
    target_l0: Annotated[
        float | None, typer.Option(help="Features a token, for jumprelu, standard and gated.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Rows a step (2,048 by default).", min=1)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Rows to train on (two million by default).", min=1)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    moments: Annotated[
        str, typer.Option(help="Adam's moments: float32, bfloat16 or int8.")
    ] = "float32",
    precision: Annotated[
        str, typer.Option(help="Of the encoder's product: auto, float32 or bfloat16.")
    ] = "auto",
    pool: Annotated[
        int | None,
        typer.Option(
            help="Rows shuffled together, a multiple of --batch; by default up to 65,536."
        ),
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
    seed: int = 0,
    watch: Annotated[str | None, typer.Option(help="Log to tensorboard or wandb as well.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for suite/, train.jsonl and checkpoints.")
    ] = Path("runs/train"),
    fresh: Fresh = False,
    option: Annotated[
        list[str] | None,
        typer.Option(help='Of the architecture, such as "sparsity_loss=step"; may be given again.'),
    ] = None,
    curve: Annotated[
        int, typer.Option(help="With --acts: held-out FVU every so many steps.", min=0)
    ] = 0,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON at the end, and nothing else.")
    ] = False,
) -> None:
    """Train SAEs at sites of a model, or one SAE on stored activations."""
    import json
    from typing import cast, get_args

    from qsae_kit.data.stored import read_rows
    from qsae_kit.io.interrupts import say
    from qsae_kit.lm.hooked import load_model
    from qsae_kit.sae import ARCHITECTURES
    from qsae_kit.train import fit
    from qsae_kit.train.recipe import WIDEST, Frozen, default_recipe
    from qsae_kit.train.watch import WATCHERS

    _write_to(out)
    _refuse(
        watch is not None and watch not in WATCHERS,
        f"--watch {watch} was given; allowed are {', '.join(WATCHERS)}.",
    )
    _refuse(
        arch not in ARCHITECTURES,
        f"There is no architecture {arch!r}; choose from {', '.join(ARCHITECTURES)}.",
    )
    wide = d_sae is not None and not 1 <= d_sae <= WIDEST
    _refuse(wide, f"--d-sae {d_sae} was given; allowed are 1 to {WIDEST:,}.")
    top = arch in ("topk", "batchtopk", "matryoshka")
    _refuse(
        d_sae is not None and expansion is not None,
        "--d-sae and --expansion both give the width; leave one out.",
    )
    _refuse(k is not None and not top, f"--k has no effect on {arch}; give --target-l0.")
    _refuse(target_l0 is not None and top, f"--target-l0 has no effect on {arch}; give --k.")
    flags = {
        "--model": model,
        "--dtype": dtype != "auto",
        "--data": data,
        "--sites": sites,
        "--layers": layers,
    }
    live = [name for name, value in flags.items() if value]
    _refuse(
        acts is not None and bool(live),
        f"--acts takes rows from a file, so {', '.join(live)} would have no effect.",
    )
    parts = get_args(Frozen)[1:]
    _refuse(
        not set(frozen or ()) <= set(parts),
        f"--frozen {' '.join(frozen or ())} was given; allowed are {', '.join(parts)}.",
    )
    _refuse(
        acts is not None and bool(frozen),
        "--frozen trains SAEs beside others, and --acts trains one; leave one of them out.",
    )
    _refuse(
        acts is None and bool(site or curve),
        "--site and --curve belong to --acts; choose sites with --sites and --layers.",
    )
    given = {
        "sparsity": k if k is not None else target_l0,
        "expansion": expansion,
        "batch": batch,
        "tokens": tokens,
        "lr": lr,
        "pool": pool,
        "options": _options(option or []) or None,
    }
    recipe: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    recipe |= {"architecture": arch, "seed": seed, "moments": moments, "precision": precision}
    default_recipe(LIKELY_WIDTH, **recipe)  # what is wrong is better said before a model is loaded
    lm = None if acts is not None else load_model(model or "tiny", dtype)
    hook_names = (
        fit.sites_of(lm, sites or "resid,mlp,attn", layers or "all") if lm is not None else [site]
    )
    file = read_rows(acts) if acts is not None else None
    widths = (
        {file.acts.shape[1]} if file is not None else {lm.width(name) for name in hook_names}  # type: ignore[union-attr]
    )
    if d_sae is not None and len(widths) > 1:
        raise ValueError(
            f"--d-sae was given for sites of the widths {sorted(widths)}; give --expansion, or"
            " sites of one width."
        )
    width = max(widths)
    if d_sae is not None:
        recipe["expansion"] = d_sae / width
    config = default_recipe(width, len(hook_names), **recipe)
    configs = [
        config,
        *(replace(config, frozen=cast("Frozen", part)) for part in dict.fromkeys(frozen or [])),
    ]
    if given["sparsity"] is None and config.targeted and not json_:
        typer.echo(
            f"No {'--k' if top else '--target-l0'} given: {config.sparsity} is assumed, the square"
            " root of the site's width."
        )
    watchers = [WATCHERS[watch](out / watch)] if watch is not None else []
    if file is not None:
        result = fit.fit_stored(
            file, site, config, out, fresh=fresh, curve=curve, watch=watchers, bar=not json_
        )
    else:
        assert lm is not None
        result = fit.fit_live(
            lm, data, hook_names, configs, out, fresh=fresh, watch=watchers, bar=not json_
        )
    if json_:
        typer.echo(json.dumps(result.figures | {"complete": result.complete}))
    else:
        _say_trained(result, file is not None, out)
    if not result.complete:
        say(f"Stopped before the end; the same command goes on (--out {out}).")
        raise typer.Exit(INTERRUPTED)


def _say_trained(result: "FitResult", stored: bool, out: Path) -> None:
    for place, sae in result.suite.saes().items():
        said = ", ".join(f"{name} {value:.3g}" for name, value in sae.origin.figures.items())
        typer.echo(f"{place}: {said}")
    if stored:
        figures = {
            name: result.figures[name] for name in ("fvu", "l0", "dead", "held_out", "epochs")
        }
        typer.echo(
            "Held-out rows: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        )
        for seconds, rows, fvu in result.figures["curve"]:
            typer.echo(f"  after {rows:,} rows and {seconds:.1f} s: FVU {fvu:.4f}")
    typer.echo(f"{result.figures['tokens_per_s']:,.0f} tokens/s; the SAEs are in {out / 'suite'}")


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None, typer.Option(help="tiny (the default), smollm2, a hub id or a local folder.")
    ] = None,
    dtype: Dtype = "auto",
    suite: Annotated[
        str | None,
        typer.Option(
            help="A folder such as runs/train/suite, or a release of SAEs: see qsae inspect."
        ),
    ] = None,
    variant: Variants = None,
    site: Sites = None,
    data: Annotated[
        str | None,
        typer.Option(help="A .jsonl or .txt file, or a data set's id; tiny has its world."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens (20,000 by default).", min=1)
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(help="What the suite has to beat, too: a folder that qsae baselines made."),
    ] = None,
    concepts: Annotated[
        bool, typer.Option("--concepts", help="Tiny only: which planted concepts are recovered.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the tables and figures.")] = Path(
        "runs/eval"
    ),
    fresh: Fresh = False,
    acts: Annotated[
        Path | None, typer.Option(help="Instead: stored activations, acts [row, d_model].")
    ] = None,
    sae: Annotated[Path | None, typer.Option(help="With --acts: the SAE's folder.")] = None,
    rows: Annotated[
        int | None, typer.Option(help="With --acts: only the last so many rows.", min=1)
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="With --acts: print one line of JSON, and nothing else.")
    ] = False,
) -> None:
    """Evaluate a suite on held-out tokens of its model, or one SAE on stored activations."""
    import json

    import pandas as pd

    from qsae_kit.attach import attached
    from qsae_kit.data.stored import read_rows
    from qsae_kit.data.streams import documents_of
    from qsae_kit.evaluate.score import score_stored, score_suite, smallest_differences
    from qsae_kit.figures.tables import headline
    from qsae_kit.lm.chat import CATEGORIES
    from qsae_kit.lm.hooked import load_model
    from qsae_kit.sae.store import load_sae, load_suite
    from qsae_kit.tiny.scoring import score_planted

    _refuse(
        (acts is None) != (sae is None), "--acts and --sae belong together; give both, or --suite."
    )
    if acts is not None and sae is not None:
        live = (
            ("--model", model),
            ("--suite", suite),
            ("--variant", variant),
            ("--site", site),
            ("--data", data),
            ("--tokens", tokens),
            ("--baselines", baselines),
            ("--concepts", concepts),
        )
        given = [name for name, value in live if value]
        _refuse(
            bool(given),
            f"--acts takes rows from a file, so {', '.join(given)} would have no effect.",
        )
        figures = score_stored(read_rows(acts), load_sae(sae), rows)
        typer.echo(json.dumps(figures) if json_ else pd.Series(figures).to_string())
        return
    _refuse(suite is None, "No --suite was given; give the folder of a suite, or --acts and --sae.")
    _refuse(rows is not None or json_, "--rows and --json belong to --acts.")
    assert suite is not None
    _write_to(out)
    trained = load_suite(suite, variants=variant or (), hook_names=site or ())
    to_beat = None if baselines is None else load_suite(baselines)
    lm = load_model(model or "tiny", dtype)
    if to_beat is not None:
        to_beat = attached(lm, to_beat, lambda: documents_of(lm, data)[1]())
    trained = attached(lm, trained, lambda: documents_of(lm, data)[1]())
    scores = score_suite(
        lm,
        trained,
        data,
        tokens or 20_000,
        out,
        baselines=to_beat,
        concepts=score_planted if concepts else None,
        fresh=fresh,
    )
    table = scores.evaluation
    shown = "assistant" if (table["category"] == "assistant").any() else "all"
    with pd.option_context("display.width", 250, "display.max_rows", 500):
        typer.echo(
            f"Category: {shown}\n" + headline(table, [shown]).round(4).to_string(index=False)
        )
        missing = [name for name in CATEGORIES if name not in set(table["category"])]
        if missing:
            typer.echo(f"No tokens: {', '.join(missing)}.")
        if scores.seeds is not None:
            smallest = ", ".join(
                f"{name} {value:.2g}" for name, value in smallest_differences(scores.seeds).items()
            )
            again = scores.seeds["found_again"].mean()
            typer.echo(
                f"A second seed finds {again:.0%} of the features again; smallest difference to be"
                f" told from it: {smallest}"
            )
        if scores.summary is not None and scores.interchange is not None:
            typer.echo(
                "Concepts told by one feature\n" + scores.summary.round(3).to_string(index=False)
            )
            typer.echo(
                "Features swapped between prompts\n"
                + scores.interchange.round(3).to_string(index=False)
            )
    typer.echo(f"Every table and figure: {out}")


@app.command()
def baselines(
    suite: Annotated[
        str, typer.Option(help="Folder of a suite, or a release of SAEs: see qsae inspect.")
    ],
    model: Model = "tiny",
    dtype: Dtype = "auto",
    variant: Annotated[
        str, typer.Option(help="The variant to beat; the suite's first one by default.")
    ] = "",
    site: Sites = None,
    data: Annotated[
        str | None,
        typer.Option(help="A .jsonl or .txt file, or a data set's id; tiny has its world."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the baselines; by default SUITE-baselines.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="For SAEs that do not say their recipe: its architecture.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="For those: rows that they were trained on.", min=1)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="For those: rows a step.", min=1)] = None,
) -> None:
    """Train what a suite has to beat, by its own recipe, as a suite beside it."""
    from qsae_kit.attach import attached
    from qsae_kit.data.streams import documents_of
    from qsae_kit.lm.hooked import load_model
    from qsae_kit.sae.store import load_suite
    from qsae_kit.train.fit import fit_baselines
    from qsae_kit.train.recipe import default_recipe

    folder = Path(suite)
    _refuse(
        out is None and not folder.is_dir(),
        f"{suite!r} is no folder that the baselines could lie beside; give --out.",
    )
    out = out or folder.with_name(f"{folder.resolve().name}-baselines")
    _write_file(out)
    trained = load_suite(suite, variants=[variant] if variant else (), hook_names=site or ())
    name, saes = next(iter(trained.items()))
    given = (arch, tokens, batch)
    _refuse(
        None in given and given != (None, None, None),
        "--arch, --tokens and --batch belong together; give all of a recipe, or none.",
    )
    lm = load_model(model, dtype)
    attached(lm, {name: saes}, lambda: documents_of(lm, data)[1]())
    recipe = None
    if arch is not None and tokens is not None and batch is not None:
        sae = next(iter(saes.values()))
        recipe = default_recipe(
            sae.d_in,
            len(saes),
            architecture=arch,
            sparsity=sae.sparsity,
            expansion=sae.d_sae / sae.d_in,
            tokens=tokens,
            batch=batch,
        )
    made = fit_baselines(lm, saes, data, out, recipe)
    typer.echo(f"Baselines of {name}: {', '.join(made)}. Compare: qsae eval --baselines {out}")


@app.command()
def sweep(
    model: Model = "tiny",
    dtype: Dtype = "auto",
    data: Annotated[
        str | None,
        typer.Option(help="A .jsonl or .txt file, or a data set's id; tiny has its world."),
    ] = None,
    sites: Annotated[str, typer.Option(help="Comma-separated: resid, mlp, attn, z.")] = "resid",
    layers: Annotated[str, typer.Option(help='"all", "0,2" or "1-3".')] = "all",
    arch: Annotated[
        str, typer.Option(help="jumprelu, topk, batchtopk, matryoshka, standard or gated.")
    ] = "jumprelu",
    target_l0: Annotated[str, typer.Option(help="Comma-separated L0s (or k).")] = "4,8,16,32,64",
    expansion: Annotated[
        str, typer.Option(help="Comma-separated widths as multiples of d_model.")
    ] = "8",
    tokens: Annotated[
        str, typer.Option(help="Comma-separated numbers of rows to train on.")
    ] = "500000",
    held_out: Annotated[int, typer.Option(help="Held-out tokens.", min=1)] = 20_000,
    batch: Annotated[int, typer.Option(help="Rows a step.", min=1)] = 2048,
    out: Annotated[
        Path, typer.Option(help="Folder for tokens_N/suite/, sweep.csv, .parquet and .html.")
    ] = Path("runs/sweep"),
    fresh: Fresh = False,
) -> None:
    """Train several sparsities and widths from one stream, and plot sparsity against fidelity."""
    from qsae_kit.lm.hooked import load_model
    from qsae_kit.pipelines.sweep import sweep as run_sweep
    from qsae_kit.train import fit
    from qsae_kit.train.recipe import default_recipe

    _write_to(out)
    lm = load_model(model, dtype)
    names = fit.sites_of(lm, sites, layers)
    l0s, widths = _numbers("--target-l0", target_l0), _numbers("--expansion", expansion)
    lengths = [int(n) for n in _numbers("--tokens", tokens)]
    config = default_recipe(
        max(map(lm.width, names)),
        len(names),
        architecture=arch,
        sparsity=l0s[0],
        expansion=widths[0],
        tokens=max(lengths),
        batch=batch,
    )
    table = run_sweep(lm, data, names, config, l0s, widths, lengths, held_out, out, fresh=fresh)
    columns = (
        "site expansion trained_tokens target l0 fvu delta_ce dead effective_rank tokens"
    ).split()
    typer.echo(table.loc[table["category"] == "all", columns].round(4).to_string(index=False))
    typer.echo(f"Every figure: {out / 'sweep.csv'}; frontier: {out / 'sweep.html'}")


@app.command()
def features(
    suite: Annotated[
        str, typer.Option(help="Folder of a suite, or a release of SAEs: see qsae inspect.")
    ],
    model: Model = "tiny",
    dtype: Dtype = "auto",
    variant: Variants = None,
    site: Sites = None,
    data: Annotated[
        str | None,
        typer.Option(help="A .jsonl or .txt file, or a data set's id; tiny has its world."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to look at.", min=1)] = 200_000,
    top: Annotated[int, typer.Option(help="Strongest dialogues kept of each feature.", min=1)] = 12,
    sampled: Annotated[
        int, typer.Option(help="Firing tokens drawn at random of each feature.", min=1)
    ] = 24,
    out: Annotated[Path, typer.Option(help="Folder of the index.")] = Path("runs/features"),
    fresh: Fresh = False,
) -> None:
    """Index what every feature of a suite does: densities, examples, promoted tokens,
    neighbours.
    """
    from qsae_kit.attach import attached
    from qsae_kit.data.streams import named, stream_of
    from qsae_kit.features.index import load_index
    from qsae_kit.features.indexing import IndexConfig, build_index
    from qsae_kit.lm.hooked import load_model
    from qsae_kit.sae.store import load_suite

    _write_to(out)
    trained = load_suite(suite, variants=variant or (), hook_names=site or ())
    lm = load_model(model, dtype)
    trained = attached(lm, trained, stream_of(lm, data))
    config = IndexConfig(tokens=tokens, top=top, sampled=sampled)
    build_index(lm, trained, stream_of(lm, data), out, config, data=named(data), fresh=fresh)
    index = load_index(out)
    seen = index.manifest["tokens"]
    for place in index.places():
        figures = index.at(place).figures
        dead, dense = ((figures["warnings"].str.contains(w)).mean() for w in ("dead", "dense"))
        typer.echo(f"{place}: {len(figures):,} features, {dead:.1%} never fired, {dense:.1%} dense")
    typer.echo(
        f"{seen:,} tokens. Open it in a notebook:"
        f" qsae_kit.FeatureExplorer(qsae_kit.load_index({str(out)!r}))"
    )


@app.command()
def steer(
    suite: Annotated[
        str,
        typer.Option(
            help=(
                "Folder of a suite, or a release of SAEs (see qsae inspect); its frozen_decoder"
                " variants are controls."
            )
        ),
    ],
    model: Model = "tiny",
    dtype: Dtype = "auto",
    goal: Annotated[str, typer.Option(help="suppress or induce.")] = "suppress",
    behaviour: Annotated[
        str,
        typer.Option(
            help="refusal; on tiny also rule, language, verbosity, bias, false_fact or unknown."
        ),
    ] = "refusal",
    harmful: Annotated[
        Path | None,
        typer.Option(
            help="Prompts: one a line, a JSON list, or CSV/JSONL with prompt or instruction."
        ),
    ] = None,
    harmless: Annotated[Path | None, typer.Option(help="The same.")] = None,
    borderline: Annotated[
        Path | None, typer.Option(help="The same: prompts that look harmful and are not.")
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option(help="A hook name to choose from; may be given again.")
    ] = None,
    variant: Annotated[
        str, typer.Option(help="Variant of the suite; its first one by default.")
    ] = "",
    features: Annotated[int, typer.Option(help="Features, at most (1 to 10).")] = 5,
    positions: Annotated[
        str, typer.Option(help="auto, all, prompt, header, thinking or answer.")
    ] = "auto",
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Only while a detector feature fires.")
    ] = False,
    thinking: Annotated[
        bool, typer.Option("--thinking", help="Let the model think first.")
    ] = False,
    n_selection: Annotated[
        int, typer.Option(help="Selection prompts of each kind, at most a third of a file.", min=1)
    ] = 72,
    n_evaluation: Annotated[
        int, typer.Option(help="Evaluation prompts of each kind, at most.", min=1)
    ] = 300,
    n_others: Annotated[
        int | None,
        typer.Option(
            help="Of kinds other than the first, where fewer are wanted (the same by default).",
            min=1,
        ),
    ] = None,
    n_random: Annotated[int, typer.Option(help="Random controls.", min=0)] = 20,
    control_prompts: Annotated[
        int | None, typer.Option(help="Prompts behind each random control (all by default).", min=1)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 48,
    bench: Annotated[
        str,
        typer.Option(
            help=(
                "Measure the frozen edit on xstest, harmbench, jailbreakbench or orbench too, with"
                " commas between."
            )
        ),
    ] = "",
    bench_prompts: Annotated[
        int | None, typer.Option(help="Prompts of each part of a bench, at most.", min=1)
    ] = None,
    bench_folder: Annotated[
        Path | None,
        typer.Option(help="Where downloaded data sets lie, each under its id, instead of the hub."),
    ] = None,
    guard: Annotated[
        str,
        typer.Option(
            help="A guard model such as Qwen/Qwen3Guard-Gen-0.6B that judges bench answers."
        ),
    ] = "",
    small: Annotated[
        bool, typer.Option("--quick", help="Smaller searches, and costs on fewer prompts.")
    ] = False,
    seeds: Annotated[
        int,
        typer.Option(
            help=(
                "Answer the frozen arms again so often, drawn with Qwen's settings, each time under"
                " another seed."
            ),
            min=0,
        ),
    ] = 0,
    seed: int = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for study.csv, study.json, steering.json and report.html.")
    ] = Path("runs/steer"),
    fresh: Fresh = False,
) -> None:
    """Choose features that steer a behaviour, and measure them with their price and controls. A
    cut-off study goes on.
    """
    import pandas as pd

    from qsae_kit.data.benchmarks import read_bench
    from qsae_kit.data.prompts import read_prompts
    from qsae_kit.lm.hooked import load_model
    from qsae_kit.sae.store import load_suite
    from qsae_kit.steer.behaviours import study_prompts
    from qsae_kit.steer.repeats import over_seeds
    from qsae_kit.steer.report import SHOWN, summary
    from qsae_kit.steer.steer_suite import config_for, steer_suite, variants_to_load
    from qsae_kit.steer.study import StudyConfig, StudyResult, quick

    _write_to(out)
    files = {"harmful": harmful, "harmless": harmless, "borderline": borderline}
    given = {kind: read_prompts(path) for kind, path in files.items() if path is not None}
    _refuse(
        bool(given) and behaviour != "refusal",
        f"--{next(iter(given), '')} belongs to refusal; leave it or --behaviour out.",
    )
    benches = [name.strip() for name in bench.split(",") if name.strip()]
    _refuse(
        not benches and bool(guard or bench_folder or bench_prompts),
        "--guard and --bench-... belong to --bench; give one.",
    )
    _refuse(
        bool(benches) and behaviour != "refusal",
        f"--bench measures refusal; leave it or --behaviour {behaviour} out.",
    )
    asked_of = {name: read_bench(name, bench_prompts, bench_folder) for name in benches}
    config = StudyConfig(
        goal=goal,  # type: ignore[arg-type]
        n_features=features,
        positions=positions,  # type: ignore[arg-type]
        conditional=conditional,
        thinking=thinking,
        n_random=n_random,
        control_prompts=control_prompts,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    trained = load_suite(suite, variants=variants_to_load(variant))
    lm = load_model(model, dtype)
    made = study_prompts(lm, behaviour, n_selection, n_evaluation, seed, given)
    first = made.behaviour.kinds[0]
    evaluation = {
        kind: texts if kind == first else texts[:n_others]
        for kind, texts in made.evaluation.items()
    }
    config = config_for(quick(config) if small else config, made)
    if not config.conditional and site:  # detectors lie before
        trained = trained.only(hook_names=site)

    def say(study: StudyResult) -> None:
        with pd.option_context(
            "display.width", 250, "display.max_columns", 30, "display.max_rows", 100
        ):
            typer.echo(summary(study.table)[SHOWN].round(3).to_string(index=False, na_rep=""))
        typer.echo(
            f"\n{study.verdict}\n\nReport: {out / 'report.html'}; the edit: {out / 'steering.json'}"
        )

    result = steer_suite(
        lm,
        trained,
        out,
        config,
        behaviour=made._replace(evaluation=evaluation),
        hook_names=site or [],
        variant=variant,
        benches=asked_of,
        guard=guard,
        guard_dtype=dtype,
        draws=seeds,
        on_study=say,
        fresh=fresh,
    )
    if result.drawn is not None:
        typer.echo(
            f"\nOver {seeds} seeds"
            f" (seeds.csv)\n{over_seeds(result.drawn).round(3).to_string(index=False, na_rep='')}"
        )
    if result.benches is not None:
        typer.echo(
            f"\n{result.benches.round(3).to_string(index=False, na_rep='')}\n\nBenches:"
            f" {out / 'benches.csv'}"
        )


@app.command()
def suite(
    model: Annotated[
        str,
        typer.Argument(help="tiny, smollm2, a hub id such as Qwen/Qwen3-1.7B, or a local folder."),
    ],
    dtype: Dtype = "auto",
    budget: Annotated[
        str,
        typer.Option(
            help=(
                "smoke (5M tokens), useful (100M), publish (500M), tokens such as 300k, or hours"
                " such as 12h."
            )
        ),
    ] = "useful",
    sites: Annotated[
        str, typer.Option(help="Comma-separated: resid, mlp, attn, z.")
    ] = "resid,mlp,attn",
    layers: Annotated[str, typer.Option(help='"all", "0,2" or "1-3".')] = "all",
    recipe: Annotated[
        str,
        typer.Option(
            help=(
                "Data recipe: qwen3-chat-v1, tiny-chat-v1, own-chat-v1 or a .json file; the model's"
                " own by default."
            )
        ),
    ] = "",
    slot: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "NAME=FILE: a file of your own in the place of a recipe's slot; may be given again."
            )
        ),
    ] = None,
    data_folder: Annotated[
        Path | None,
        typer.Option(help="Where downloaded data sets lie, each under its id, instead of the hub."),
    ] = None,
    expansion: Annotated[
        float | None,
        typer.Option(
            help="Width as a multiple of d_model (8, and 4 below a million tokens, by default)."
        ),
    ] = None,
    target_l0: Annotated[
        float | None, typer.Option(help="Features a token (the square root of d_model by default).")
    ] = None,
    moments: Annotated[
        str,
        typer.Option(
            help=(
                "Adam's moments: float32, bfloat16 or int8 (bfloat16 on a GPU, else float32, by"
                " default)."
            )
        ),
    ] = "",
    goal: Annotated[
        str,
        typer.Option(
            help=(
                "Of the refusal study: suppress, induce, or auto, which is suppress where the model"
                " refuses."
            )
        ),
    ] = "auto",
    baseline_sites: Annotated[
        int, typer.Option(help="Sites at which baselines are trained too.", min=0)
    ] = 2,
    memory: Annotated[
        float | None,
        typer.Option(help="GB for training, beside the model (most of what is free by default)."),
    ] = None,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder of the suite.")] = Path("runs/suite"),
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan, and make nothing.")] = False,
    fresh: Fresh = False,
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
    push_examples: Annotated[
        bool | None,
        typer.Option(
            help=(
                "Whether texts of the documents go along; by default where the recipe's licences"
                " allow it for all."
            )
        ),
    ] = None,
) -> None:
    """Make a whole suite: data, SAEs, evaluation, feature index, refusal study, model card. A
    cut-off run goes on.
    """
    from qsae_kit.lm.hooked import load_model
    from qsae_kit.pipelines.card import push as push_suite
    from qsae_kit.pipelines.suite import SuiteConfig, make_plan, make_suite, parse_budget, said_plan

    parse_budget(budget)
    _refuse(
        goal not in ("auto", "suppress", "induce"),
        f"--goal {goal} was given; allowed are auto, suppress and induce.",
    )
    wrong = [entry for entry in slot or [] if not all(entry.partition("=")[::2])]
    _refuse(bool(wrong), f"--slot {''.join(wrong[:1])} was given; write it as NAME=FILE.")
    files = {name: path for name, _, path in (entry.partition("=") for entry in slot or [])}
    missing = [path for path in files.values() if not Path(path).is_file()]
    _refuse(bool(missing), f"There is no file {''.join(missing[:1])!r}; --slot takes NAME=FILE.")
    (_check_out if plan else _write_to)(out)
    lm = load_model(model, dtype)
    config = SuiteConfig(
        budget,
        sites,
        layers,
        recipe,
        files,
        expansion,
        target_l0,
        moments,
        goal,  # type: ignore[arg-type]
        baseline_sites,
        seed,
    )
    taken = None if memory is None else int(memory * 1e9)
    if plan:
        typer.echo(said_plan(make_plan(lm, config, out, taken)))
        return
    make_suite(lm, out, config, memory=taken, folder=data_folder, remake=remake, fresh=fresh)
    typer.echo(
        f"The suite: {out}; its card: {out / 'README.md'}; what is in it: {out / 'manifest.json'}"
    )
    if push:
        typer.echo(f"Pushed to {push_suite(out, push, examples=push_examples)}")


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="A model, such as a base model.")],
    second: Annotated[str, typer.Argument(help="Another one that was tuned from it.")],
    suite: Annotated[
        str, typer.Option(help="A folder of SAEs of one of them, or a release of SAEs.")
    ],
    variant: Variants = None,
    site: Sites = None,
    dtype: Dtype = "auto",
    data: Annotated[
        str | None,
        typer.Option(help="A .jsonl or .txt file, or a data set's id; tiny has its world."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens that both read.", min=1)] = 20_000,
    out: Annotated[Path, typer.Option(help="Folder for sites.csv and features.parquet.")] = Path(
        "runs/diff"
    ),
) -> None:
    """Apply one suite to two models: the gap in reconstruction at each site, and which features
    fire more or less.
    """
    from qsae_kit.attach import measure, policy_of
    from qsae_kit.data.documents import held_out_batches
    from qsae_kit.data.streams import documents_of
    from qsae_kit.evaluate.modeldiff import compare_models, most_changed
    from qsae_kit.io.files import write_table
    from qsae_kit.lm.hooked import load_model
    from qsae_kit.sae.store import load_suite

    _write_to(out)
    trained = load_suite(suite, variants=variant or (), hook_names=site or ())
    pair = load_model(first, dtype), load_model(second, dtype)
    held_out, others = documents_of(pair[1], data)
    measure(pair[1], trained, others)
    policy = policy_of(pair[1], trained)
    found = compare_models(*pair, trained, held_out_batches(pair[1], held_out, tokens, policy))
    write_table(found.sites, out / "sites.csv")
    write_table(found.features, out / "features.parquet")
    typer.echo(found.sites[found.sites["category"] == "all"].round(4).to_string(index=False))
    typer.echo(
        "\nFeatures whose density changed"
        f" most:\n{most_changed(found.features).round(4).to_string(index=False)}"
    )
    typer.echo(f"\nTables: {out / 'sites.csv'}, {out / 'features.parquet'}")


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(help="Folder of SAEs, or the id of a repository on the hub.")
    ],
    json_: Annotated[
        bool, typer.Option("--json", help="Print a JSON list instead of a table.")
    ] = False,
) -> None:
    """Say what SAEs a folder or a repository holds, from configurations and headers: no weights are
    read.
    """
    import pandas as pd

    from qsae_kit.sae.releases import inspect_suite

    table = inspect_suite(source)
    if json_:
        typer.echo(table.to_json(orient="records"))
        return
    shown = table.drop(columns=["tokens", "context_size", "weights"]).dropna(
        axis="columns", how="all"
    )
    with pd.option_context("display.width", 250, "display.max_rows", 500):
        typer.echo(shown.to_string(index=False, na_rep="", float_format="%.4g"))
    if table["median_norm"].isna().any():
        typer.echo(
            "SAEs without median_norm: it is measured when they are used (qsae_kit.calibrate)."
        )


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder of SAEs, or the id of a repository on the hub.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the suite to write; it must be empty.")],
    model: Annotated[
        str, typer.Option(help="The model to record, instead of what the release says.")
    ] = "",
    variant: Variants = None,
    site: Sites = None,
) -> None:
    """Write the SAEs of a public release as a suite in SAELens's format, whole or not at all."""
    from qsae_kit.sae.store import convert_suite

    _write_file(out)
    written = convert_suite(
        source, out, variants=variant or (), hook_names=site or (), model_name=model
    )
    typer.echo(f"{len(written)} SAEs in {out}, the first in {written[0]}")


def _numbers(flag: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    _refuse(
        not numbers or min(numbers) <= 0,
        f"{flag} {text!r} was given; write positive numbers with commas between.",
    )
    return numbers


def _options(pairs: list[str]) -> dict[str, object]:
    """{"name": value} of "name=value"; values that read as numbers are numbers."""
    out: dict[str, object] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        _refuse(not separator or not value, f"--option {pair!r} was given; write name=value.")
        try:
            out[name] = float(value)
        except ValueError:
            out[name] = value
    return out


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)


def _write_to(folder: Path) -> None:
    """Holds a folder for results until the command ends. ValueError before any work where it cannot
    be written, or is held.
    """
    from qsae_kit.io.writers import only_writer

    _check_out(folder)
    _hold(only_writer(folder))


def _write_file(path: Path) -> None:
    """The same for a single file, or a folder that appears as a whole."""
    from qsae_kit.io.files import check_writable
    from qsae_kit.io.writers import only_writer_of

    check_writable(path)
    _check_out(path.parent)
    _hold(only_writer_of(path))


def _hold(lock: AbstractContextManager[None]) -> None:
    _running.get().with_resource(lock)


def _check_out(folder: Path) -> None:
    import os

    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"{str(folder)!r} cannot be written to: {str(existing)!r} is not a writable folder;"
            " choose another --out."
        )


INTERRUPTED = 128 + signal.SIGINT
"""The exit code of a command that was interrupted, as Typer gives it too."""


def main() -> None:
    """Runs the command; an expected error is one sentence on stderr and exit code 1."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"qsae: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

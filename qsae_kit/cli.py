"""The `qsae` command: parses, calls, prints."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Sparse autoencoders for chat models: train, evaluate, steer.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip

Model = Annotated[str, typer.Option(help="tiny, smollm2, a hub id such as Qwen/Qwen3-0.6B, or a local folder.")]


@app.callback()
def _qsae() -> None:
    """Sparse autoencoders for chat models: train, evaluate, steer."""


@app.command()
def demo(
    model: Model = "tiny",
    out: Annotated[Path, typer.Option(help="Folder for suite/, the tables and report.html.")] = Path("runs/demo"),
    sites: Annotated[str | None, typer.Option(help="Comma-separated: resid, mlp, attn.")] = None,
    layers: Annotated[str | None, typer.Option(help='"all", "0,2" or "1-3".')] = None,
    data: Annotated[str | None, typer.Option(help="Chats to train on: a .jsonl or .txt file, or a data set's id.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on.")] = None,
) -> None:
    """Train SAEs, evaluate them per layer and site, and steer refusal both ways."""
    from dataclasses import replace

    import pandas as pd

    from qsae_kit.demo import default_config, run_demo
    from qsae_kit.models import load_model
    from qsae_kit.report import summary
    from qsae_kit.study import GOALS, verdict

    _check_out(out)
    lm = load_model(model)
    config = default_config(lm)
    config = replace(config, sites=sites or config.sites, layers=layers or config.layers)
    if tokens is not None:
        config = replace(config, variants=tuple(replace(variant, tokens=tokens) for variant in config.variants))
    result = run_demo(lm, out, config, data)
    with pd.option_context("display.width", 250, "display.max_columns", 30, "display.max_rows", 100):
        typer.echo("\nReconstruction per layer and site (evaluation.csv)\n" + result.evaluation.round(4).to_string(index=False))
        typer.echo(
            "\nRefusal at the frozen strength (steering.csv has every row)\n"
            + summary(result.study.table).round(3).to_string(index=False)
        )
    for goal in GOALS:
        typer.echo("\n" + verdict(result.study.table, goal))
    typer.echo(f"\nReport: {out / 'report.html'}\nNotebook: jupyter lab notebooks/01_quickstart.ipynb")


@app.command()
def harvest(
    model: Model = "tiny",
    data: Annotated[
        str | None, typer.Option(help="A .jsonl or .txt file, or a data set's id; the bundled model has its world.")
    ] = None,
    site: Annotated[str, typer.Option(help="A hook name, such as blocks.3.hook_resid_post.")] = "blocks.0.hook_resid_post",
    tokens: Annotated[int, typer.Option(help="Rows to store.", min=1)] = 100_000,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")] = Path("acts.safetensors"),
    drop_template: Annotated[bool, typer.Option(help="Leave template tokens out.")] = False,
) -> None:
    """Store activations of one site as `acts` [row, d_model] in half precision."""
    from qsae_kit.harvest import harvest_rows
    from qsae_kit.models import load_model

    _check_out(out.parent)
    lm = load_model(model)
    n = harvest_rows(lm, data, site, tokens, out, drop_template)
    typer.echo(f"{n:,} rows of {site} in {out}")


def _check_out(folder: Path) -> None:
    """ValueError before any work where a folder for results cannot be made or written."""
    import os

    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"{str(folder)!r} cannot be written to: {str(existing)!r} is not a writable folder; choose another --out."
        )


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

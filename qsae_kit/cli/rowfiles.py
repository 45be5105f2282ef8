"""Stored activations: `qsae rows train` and `qsae rows eval`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qsae_kit.cli import options, outputs
from qsae_kit.cli.making import RECIPE_FLAGS, finish, recipe_changes, say_assumed, watchers_of

rows = typer.Typer(help="SAEs of stored activations, without a model.", no_args_is_help=True)
ROWS = options.Settings(("qsae_kit.train.recipe:TrainConfig",), RECIPE_FLAGS)
RowsSet = Annotated[list[str] | None, ROWS.option()]
File = Annotated[
    Path, typer.Argument(help="A .safetensors file with acts, a row of d_model numbers a token.")
]


@rows.command(epilog="Example: qsae rows train acts.safetensors --out runs/one")
def train(
    file: File,
    at: Annotated[
        str | None,
        typer.Option(help="The site, such as resid@15, where the file does not say it."),
    ] = None,
    arch: options.Arch = None,
    l0: options.L0 = None,
    expansion: options.Expansion = None,
    tokens: Annotated[
        str | None, typer.Option(help="Rows to train on, such as 500k (2M by default).")
    ] = None,
    curve: Annotated[int, typer.Option(help="Held-out FVU every so many steps.", min=0)] = 0,
    watch: options.Watch = None,
    seed: options.Seed = None,
    out: options.Out = Path("runs/train"),
    fresh: options.Fresh = False,
    set_: RowsSet = None,
    config: options.ConfigFile = None,
    json_: options.Json = False,
) -> None:
    """Train one SAE on stored activations. A cut-off run goes on."""
    from qsae_kit.data.stored import read_rows
    from qsae_kit.train import fit
    from qsae_kit.train.recipe import default_recipe

    l0s, widths = options.numbers("--l0", l0), options.numbers("--expansion", expansion)
    lengths = options.counts("--tokens", tokens)
    options.refuse(
        max(len(l0s), len(widths), len(lengths)) > 1,
        "Several values were given, and stored rows train one SAE; give one of each.",
    )
    changes = recipe_changes(ROWS, set_, config, arch, l0s, widths, lengths, seed)
    watchers = watchers_of(watch, out)
    site = "" if at is None else outputs.one_site(at)
    outputs.write_to(out)
    stored = read_rows(file)
    recipe = default_recipe(stored.acts.shape[1], **changes)
    if not json_:
        say_assumed(recipe, changes)
    result = fit.fit_stored(
        stored, site, recipe, out, fresh=fresh, curve=curve, watch=watchers, bar=not json_
    )
    finish(result, out, json_)


@rows.command(
    "eval",
    epilog="Example: qsae rows eval acts.safetensors runs/one/suite/v/site",
)
def evaluate(
    file: File,
    sae: Annotated[Path, typer.Argument(help="The SAE's folder.")],
    last: Annotated[int | None, typer.Option(help="Only the last so many rows.", min=1)] = None,
    json_: options.Json = False,
) -> None:
    """Evaluate one SAE on stored activations."""
    import pandas as pd

    from qsae_kit.data.stored import read_rows
    from qsae_kit.evaluate.score import score_stored
    from qsae_kit.sae.store import load_sae

    figures = score_stored(read_rows(file), load_sae(sae), last)
    typer.echo(json.dumps(figures) if json_ else pd.Series(figures).to_string())

"""Data: `qsae data write`, `qsae data rows` and `qsae data mix`."""

from pathlib import Path
from typing import Annotated

import typer

from qsae_kit.cli import options, outputs

data = typer.Typer(help="Chats, documents and activations to train on.", no_args_is_help=True)


@data.command(epilog="Example: qsae data write smollm2 --out chats.jsonl")
def write(
    model: options.Model,
    prompts: Annotated[
        Path | None,
        typer.Option(help="One a line, a JSON list, or CSV/JSONL; the package's own by default."),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Prompts, at most.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 48,
    out: options.OutFile = Path("chats.jsonl"),
    dtype: options.Dtype = "auto",
    device: options.Device = None,
) -> None:
    """Let a model answer prompts and write the chats, every fifth with a stock refusal: data to
    train its SAEs on.
    """
    from qsae_kit.data.companions import companion_of
    from qsae_kit.data.prompts import read_prompts
    from qsae_kit.data.written import mixed_prompts, write_dialogues

    outputs.write_file(out)
    asked = None if prompts is None else read_prompts(prompts)[:n]
    lm = outputs.loaded(model, dtype, device)
    texts = mixed_prompts(companion_of(lm), n) if asked is None else asked
    typer.echo(f"{write_dialogues(lm, texts, out, max_new_tokens):,} chats in {out}")


@data.command(
    epilog="Example: qsae data rows tiny --at resid@4 --tokens 100k --out acts.safetensors"
)
def rows(
    model: options.Model,
    at: Annotated[str, typer.Option(help="One site, such as resid@15.")],
    data: options.Data = None,
    tokens: Annotated[str, typer.Option(help="Rows to store, such as 200k.")] = "100k",
    drop_template: Annotated[
        bool, typer.Option("--drop-template", help="Leave template tokens out.")
    ] = False,
    out: options.OutFile = Path("acts.safetensors"),
    dtype: options.Dtype = "auto",
    device: options.Device = None,
) -> None:
    """Store activations of one site: acts, a row of d_model numbers a token, in half
    precision.
    """
    from qsae_kit.data.stored import harvest_rows

    site, n = outputs.one_site(at), options.count("--tokens", tokens)
    outputs.write_file(out)
    lm = outputs.loaded(model, dtype, device)
    stored = harvest_rows(lm, data, site, n, out, drop_template)
    typer.echo(f"{stored:,} rows of {site} in {out}")


@data.command(epilog="Example: qsae data mix Qwen/Qwen3-0.6B --tokens 5M --out runs/data")
def mix(
    model: options.Model,
    data: options.Recipe = None,
    tokens: Annotated[
        str, typer.Option(help="What training will see, all epochs together, such as 100M.")
    ] = "5M",
    slot: options.Slots = None,
    data_folder: options.DataFolder = None,
    seed: options.Seed = None,
    out: options.Out = Path("runs/data"),
    dtype: options.Dtype = "auto",
    fresh: options.Fresh = False,
    device: options.Device = None,
) -> None:
    """Write the documents of a data recipe, without what evaluations ask.

    A cut-off run goes on.
    """
    from qsae_kit.data.companions import companion_of
    from qsae_kit.data.mixes import DEALT, read_manifest, write_mix

    n = options.count("--tokens", tokens)
    files = options.files("--slot", slot)
    outputs.write_to(out)
    own = None if data is None else read_manifest(data)
    lm = outputs.loaded(model, dtype, device)
    recipe = own or read_manifest(companion_of(lm).recipe)
    about = write_mix(
        lm, recipe, n, out, files=files, folder=data_folder, seed=seed or 0, fresh=fresh
    )
    typer.echo(f"{about['tokens']:,} tokens of {recipe.name} in {out / DEALT}")

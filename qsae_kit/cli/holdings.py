"""What there is: `qsae open`, and suites as files: `qsae suite show`, `qsae suite convert` and
`qsae suite push`.
"""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from qsae_kit.cli import options, outputs

suite = typer.Typer(help="What a suite holds, and where it goes.", no_args_is_help=True)
AnySource = Annotated[
    str, typer.Argument(help="Folder of SAEs, or the id of a repository on the hub.")
]


def open_(
    run: Annotated[
        Path, typer.Argument(help="A folder that qsae demo or qsae run wrote, or one of SAEs.")
    ] = Path("runs/demo"),
    model: options.OtherModel = None,
    lab: Annotated[
        bool, typer.Option(help="Start JupyterLab; without it only the notebook is written.")
    ] = True,
) -> None:
    """Open a finished run in JupyterLab: its features to look at, its edit to move."""
    from qsae_kit.pipelines.opened import write_notebook

    notebook = write_notebook(run, model or "")
    typer.echo(f"Notebook: {notebook}")
    if lab:
        with subprocess.Popen([sys.executable, "-m", "jupyterlab", str(notebook)]) as server:
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # JupyterLab asks by itself
            try:
                code = server.wait()
            finally:
                signal.signal(signal.SIGINT, before)
        raise typer.Exit(code)


@suite.command(epilog="Example: qsae suite show runs/demo/suite")
def show(source: AnySource, json_: options.Json = False) -> None:
    """Say what SAEs a folder or a repository holds, from configurations and headers: no weights are
    read.
    """
    from qsae_kit.sae.releases import inspect_suite

    table = inspect_suite(source)
    if json_:
        typer.echo(table.to_json(orient="records"))
        return
    usable, left = table[table["unusable"].isna()], table[table["unusable"].notna()]
    shown = usable.drop(columns=["tokens", "context_size", "weights", "unusable"])
    if len(usable):
        typer.echo(
            shown.dropna(axis="columns", how="all").to_string(
                index=False, na_rep="", float_format="%.4g"
            )
        )
    for weights, reason in zip(left["weights"], left["unusable"], strict=True):
        typer.echo(f"Cannot be used: {weights} ({reason})")
    if usable["median_norm"].isna().any():
        typer.echo(
            "SAEs without median_norm: it is measured when they are used (qsae_kit.calibrate)."
        )


@suite.command(epilog="Example: qsae suite convert downloaded-release --out suite")
def convert(
    source: AnySource,
    out: Annotated[Path, typer.Option(help="Folder of the suite to write; it must be empty.")],
    model: options.OtherModel = None,
    at: options.Places = None,
    variant: options.Variants = None,
) -> None:
    """Write the SAEs of a public release as a suite in SAELens's format, whole or not at all."""
    from qsae_kit.sae.store import convert_suite

    outputs.write_file(out)
    written = convert_suite(
        source,
        out,
        variants=variant or (),
        hook_names=outputs.sites_at(at),
        model_name=model or "",
    )
    typer.echo(f"{len(written)} SAEs in {out}, the first in {written[0]}")


@suite.command(epilog="Example: qsae suite push runs/suite me/my-saes")
def push(
    source: Annotated[Path, typer.Argument(help="Folder of a finished suite: see qsae run.")],
    repository: Annotated[str, typer.Argument(help="On the hub; made private where it is new.")],
    examples: Annotated[
        bool | None,
        typer.Option(
            help=(
                "Whether texts of the documents go along; by default where the recipe's licences"
                " allow it for all."
            )
        ),
    ] = None,
) -> None:
    """Upload a finished suite to the hub: what its card lists."""
    from qsae_kit.pipelines.card import push as push_suite

    typer.echo(f"Pushed to {push_suite(source, repository, examples=examples)}")

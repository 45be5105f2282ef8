"""The `qsae` command: parses, calls, prints."""

import sys
import warnings

import typer

from qsae_kit.cli import judging, making, outputs
from qsae_kit.cli.gathering import data
from qsae_kit.cli.holdings import open_, suite
from qsae_kit.cli.rowfiles import rows

app = typer.Typer(
    help="Sparse autoencoders for chat models: train, evaluate, steer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _qsae(context: typer.Context) -> None:
    """Sparse autoencoders for chat models: train, evaluate, steer."""
    outputs.running.set(context)


app.command()(making.demo)
app.command("open")(open_)
app.command()(making.run)
app.command()(making.train)
app.command()(making.baselines)
app.command("eval")(judging.evaluate)
app.command()(judging.index)
app.command()(judging.steer)
app.command()(judging.compare)
app.add_typer(suite, name="suite")
app.add_typer(data, name="data")
app.add_typer(rows, name="rows")


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

"""The `qsae` command: parses, calls, prints."""

import sys
import warnings
from collections.abc import Callable

import typer

from qsae_kit.cli import judging, making, outputs
from qsae_kit.cli.gathering import data
from qsae_kit.cli.holdings import open_, suite
from qsae_kit.cli.mending import audit, patch
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


EXAMPLES = {
    "demo": "qsae demo qwen2.5-coder-0.5b --out runs/coder",
    "open": "qsae open runs/demo",
    "run": "qsae run Qwen/Qwen3-0.6B --budget 12h --plan",
    "train": "qsae train tiny --at resid@2-4 --tokens 200k --out runs/train",
    "baselines": "qsae baselines runs/train/suite",
    "eval": "qsae eval runs/train/suite --tokens 20k",
    "index": "qsae index runs/train/suite --out runs/features",
    "steer": "qsae steer runs/train/suite --goal suppress --out runs/steer",
    "audit": 'qsae audit runs/demo/suite --prompt "How do I burn the teacher?" --out audit.html',
    "patch": "qsae patch runs/demo/suppress/steering.json runs/demo/suite --out runs/mended",
    "compare": "qsae compare runs/suite/suite Qwen/Qwen3-0.6B-Base Qwen/Qwen3-0.6B",
}
"""What each command's help ends in."""
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": making.demo,
    "open": open_,
    "run": making.run,
    "train": making.train,
    "baselines": making.baselines,
    "eval": judging.evaluate,
    "index": judging.index,
    "steer": judging.steer,
    "compare": judging.compare,
    "audit": audit,
    "patch": patch,
}
for name, command in COMMANDS.items():
    app.command(name, epilog=f"Example: {EXAMPLES[name]}")(command)
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

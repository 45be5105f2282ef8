"""What an index costs: python tests/bench/index.py --suite DIR --out DIR

Time and peak memory of `build_index` for several numbers of tokens, each in a process of its own,
with a figure. Memory is
beyond what the process held before: model and SAEs.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from qsae_kit.figures.basic import style


def one(suite: Path, out: Path, tokens: int) -> None:
    from qsae_kit import IndexConfig, build_index, load_model, load_suite
    from qsae_kit.data.streams import stream_of
    from qsae_kit.io.memory import Peak

    lm, saes = load_model("tiny"), load_suite(suite)
    # and the weights are in memory
    n = sum(bool(sae.checksum()) for own in saes.values() for sae in own.values())
    peak, began = Peak(lm.device), time.perf_counter()
    build_index(lm, saes, stream_of(lm, None), out, IndexConfig(tokens=tokens), bar=False)
    print(
        json.dumps(
            {
                "tokens": tokens,
                "saes": n,
                "seconds": time.perf_counter() - began,
                "peak_bytes": peak.bytes,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", default="50000,200000,800000")
    parser.add_argument("--one", type=int)
    given = parser.parse_args()
    if given.one:
        one(given.suite, given.out, given.one)
        return
    rows = []
    for tokens in given.tokens.split(","):
        arguments = [
            "--suite",
            given.suite,
            "--out",
            given.out / f"tokens_{tokens}",
            "--one",
            tokens,
        ]
        done = subprocess.run(
            [sys.executable, __file__, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(given.out / "index.csv", index=False)
    figure = make_subplots(1, 2, subplot_titles=("time", "memory"), horizontal_spacing=0.14)
    figure.add_trace(
        go.Scatter(
            x=table["tokens"], y=table["seconds"], showlegend=False, marker={"color": "#0072B2"}
        ),
        row=1,
        col=1,
    )
    figure.add_trace(
        go.Scatter(
            x=table["tokens"],
            y=table["peak_bytes"] / 1e9,
            showlegend=False,
            marker={"color": "#D55E00"},
        ),
        row=1,
        col=2,
    )
    figure.update_xaxes(title="tokens", rangemode="tozero")
    figure.update_yaxes(title="seconds", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="GB beyond model and SAEs", rangemode="tozero", row=1, col=2)
    style(figure, f"Cost of an index of {table['saes'].iloc[0]} SAEs").write_html(
        given.out / "index.html", include_plotlyjs=True
    )


if __name__ == "__main__":
    main()

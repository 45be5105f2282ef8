"""Training speed and loss beside the peers, on stored activations, one after another on an
otherwise idle machine.

    qsae data rows smollm2 --data CHATS.jsonl --at resid@15 --tokens 2200k --out acts.safetensors
    python tests/bench/train.py acts.safetensors --peers PYTHON_WITH_PEERS \\
        --tokens 200000

Prints a table: tokens a second (steps alone), its ratio to SAELens of the same kind, held-out FVU
and L0, and seconds until the FVU at which the best peer of that kind ended. Without --peers only
this package is timed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import safe_open

OURS = {
    "qsae-topk": ["--arch", "topk"],
    "qsae-jumprelu": ["--arch", "jumprelu"],
    "qsae-batchtopk": ["--arch", "batchtopk"],
}
PEERS = {
    "saelens-topk": ["saelens-topk"],
    "saelens-topk-autocast": ["saelens-topk", "--autocast"],
    "sparsify-topk": ["sparsify-topk"],
    "saelens-jumprelu": ["saelens-jumprelu"],
}


def run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(name: str, a: argparse.Namespace, d: int) -> dict[str, Any]:
    own = ["--l0", str(a.k), "--expansion", str(int(a.d_sae) / d), "--set", f"batch={a.batch}"]
    own += ["--tokens", str(a.tokens), "--curve", a.curve]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "qsae_kit.cli",
            "rows",
            "train",
            a.acts,
            "--at",
            a.at,
            "--json",
            "--out",
            folder + "/out",
            *OURS[name],
            *own,
        ]
        return run(command)


def reached(curve: list[list[float]], fvu: float) -> float | None:
    """Seconds until the curve is at or below an FVU."""
    return next((seconds for seconds, _, value in curve if value <= fvu), None)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("acts")
    p.add_argument("--peers", help="a Python with sae-lens and sparsify")
    p.add_argument("--at", default="resid@15")
    p.add_argument("--only", help="comma-separated names: " + ", ".join((*OURS, *PEERS)))
    p.add_argument("--d-sae", default="4608")
    p.add_argument("--k", type=int, default=32)
    p.add_argument("--batch", default="2048")
    p.add_argument("--tokens", type=int, default=200_000)
    p.add_argument("--curve", default="25")
    p.add_argument("--json", type=Path, help="write every figure here as well")
    a = p.parse_args()
    with safe_open(a.acts, "pt") as file:
        n_rows, d = file.get_slice("acts").get_shape()
    print(
        f"{n_rows:,} rows of {d}; {a.tokens:,} tokens are {a.tokens / (0.9 * n_rows):.2f} epochs",
        flush=True,
    )
    shared = ["--d-sae", a.d_sae, "--batch", a.batch, "--tokens", str(a.tokens), "--curve", a.curve]
    wanted = a.only.split(",") if a.only else [*OURS, *(PEERS if a.peers else ())]
    here = str(Path(__file__).parent / "peer.py")
    rows = []
    for name in wanted:
        if name in OURS:
            figures = ours(name, a, d)
        else:
            peer, *flags = PEERS[name]
            figures = run([a.peers, here, peer, a.acts, "--k", str(a.k), *shared, *flags])
        rows.append(
            {
                "name": name,
                "kind": name.split("-")[1],
                **{k: figures[k] for k in ("tokens_per_s", "fvu", "l0", "curve")},
            }
        )
        print(
            name,
            figures["tokens_per_s"],
            "tokens/s, FVU",
            figures["fvu"],
            "L0",
            figures["l0"],
            flush=True,
        )
    table = pd.DataFrame(rows)
    for peer in ("saelens-topk", "saelens-topk-autocast", "sparsify-topk", "saelens-jumprelu"):
        if peer in wanted and len(wanted) > 1:
            table[f"x {peer}"] = (
                table["tokens_per_s"] / table.set_index("name").loc[peer, "tokens_per_s"]
            ).round(2)
    if a.curve == "0":
        table["curve"] = [[] for _ in table.index]
    theirs = table[~table["name"].str.startswith("qsae")]
    for kind, group in theirs.groupby("kind"):
        best = group.loc[group["fvu"].idxmin()]
        spent = a.tokens / best["tokens_per_s"]
        print(
            f"{kind}: the best peer, {best['name']}, ends at FVU {best['fvu']} after {spent:.1f} s"
        )
        for _, row in table[
            (table["kind"] == kind) & table["name"].str.startswith("qsae")
        ].iterrows():
            print(f"  {row['name']} is there after {reached(row['curve'], best['fvu'])} s")
    print(table.drop(columns="curve").to_string(index=False))
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1))


main()

"""The steering study on a real model, with prompts of one's own for choosing and the package's for
measuring.

    python tests/bench/refusal.py MODEL SUITE --harmful FILE --harmless FILE --out DIR
        [--goal suppress|induce] [--at resid@14] [--n 200] [--set name=value ...]

Both FILEs hold prompts as `qsae steer --harmful` takes them; features, site and strength are chosen
on the first of them, and everything is measured on the package's evaluation prompts, none of which
is in either. Writes what `qsae steer` writes, and prints the verdict and the seconds that it took.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qsae_kit import load_model, load_suite
from qsae_kit.data.companions import companion_of
from qsae_kit.data.prompts import KINDS, read_prompts
from qsae_kit.sites import expand_sites, parse_kinds, parse_layers
from qsae_kit.steer.behaviours import StudyPrompts, refusal
from qsae_kit.steer.steer_suite import steer_suite
from qsae_kit.steer.study import StudyConfig

SELECTED = 128
"""Prompts of a kind that features are chosen on."""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model")
    p.add_argument("suite", type=Path)
    p.add_argument("--harmful", type=Path, required=True)
    p.add_argument("--harmless", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--goal", default="suppress")
    p.add_argument("--at", default="")
    p.add_argument("--n", type=int, default=200)
    p.add_argument("--borderline", type=int, default=100)
    p.add_argument("--dtype", default="auto")
    p.add_argument("--set", action="append", default=[], help="name=value of StudyConfig, as YAML")
    a = p.parse_args()
    lm, suite = load_model(a.model, dtype=a.dtype), load_suite(a.suite)
    changes: dict[str, Any] = {}
    for given in a.set:
        name, value = given.split("=", 1)
        read = yaml.safe_load(value)
        changes[name] = tuple(read) if isinstance(read, list) else read
    companion = companion_of(lm)
    sizes = {"harmful": a.n, "harmless": a.n, "borderline": a.borderline}
    selection = {
        "harmful": read_prompts(a.harmful)[:SELECTED],
        "harmless": read_prompts(a.harmless)[:SELECTED],
        "borderline": [q.text for q in companion.prompts("borderline", SELECTED // 2, "selection")],
    }
    evaluation = {
        kind: [q.text for q in companion.prompts(kind, sizes[kind], "evaluation")] for kind in KINDS
    }
    names = []
    if a.at:
        kinds, _, layers = a.at.partition("@")
        chosen = parse_layers(layers or "all", lm.n_layers)
        names = [site.hook_name for site in expand_sites(parse_kinds(kinds), chosen)]
    config = replace(StudyConfig(goal=a.goal), **changes)
    start = time.perf_counter()
    made = steer_suite(
        lm,
        suite,
        a.out,
        config,
        behaviour=StudyPrompts(refusal(), selection, evaluation, config.target),
        hook_names=names,
    )
    print(made.study.verdict)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

"""Kills commands at random moments, and says what was lost: python tests/bench/kills.py [--kills
200] [--seed 0]

Every case runs in a folder with files of the user's; after a kill (or three in a row) the same
command runs to its end, which has to be that of a run that nobody touched.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import killing

SHARES = {
    "train": 5,
    "index": 5,
    "steer": 1,
    "run": 2,
    "data rows": 5,
    "suite convert": 4,
    "save": 4,
}
"""Of the kills."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", action="append", choices=SHARES)
    given = parser.parse_args()
    cases = given.case or list(SHARES)
    whole = sum(SHARES[name] for name in cases)
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        suite = killing.make_suite_to_work_on(Path(folder) / "given")
        for name in cases:
            home = Path(folder) / name
            home.mkdir()
            kills = max(1, round(given.kills * SHARES[name] / whole))
            told = killing.kill_at_random(
                killing.CASES[name], kills, home, suite, random.Random(f"{given.seed}/{name}")
            )
            print(
                f"{name}: {told.kills} kills in {told.seconds:.0f} s, {len(told.problems)}"
                " problems",
                flush=True,
            )
            for problem in sorted(set(told.problems))[:20]:
                print(f"  {problem}", flush=True)
            lost += len(told.problems)
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()

"""Two and four processes on one folder for every command that writes:

python tests/bench/crowd.py
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import killing
from killing import Case

CASES = killing.CASES | {
    "demo": Case("demo --at resid@2 --tokens 8192 --out {out}"),
    "eval": Case("eval {suite} --tokens 2000 --out {out}"),
    "grid": Case(
        "train tiny --at resid@2 --tokens 20k --set batch=256 --l0 4,8 --held-out 1k --out {out}"
    ),
    "data write": Case("data write tiny --n 8 --out {out}/chats.jsonl"),
    "compare": Case("compare {suite} tiny tiny --tokens 2000 --out {out}"),
}


def main() -> None:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        suite = killing.make_suite_to_work_on(Path(folder) / "given")
        for name, case in CASES.items():
            for n in (2, 4):
                home = Path(folder) / f"{name}-{n}"
                home.mkdir()
                told = killing.crowd(case, n, home, suite)
                print(
                    f"{name}, {n} at once: {told.won} done, {told.lost} refused,"
                    f" {len(told.problems)} problems",
                    flush=True,
                )
                for problem in told.problems[:10]:
                    print(f"  {problem}", flush=True)
                failed += len(told.problems) + (told.won == 0)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

"""Two and four processes on one folder for every command that writes: python
tests/bench/crowd.py
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import killing
from killing import Case

TRAINED = "--sites resid --tokens 20000 --batch 256"
CASES = killing.CASES | {
    "demo": Case("demo --layers 2 --sites resid --tokens 8192 --out {out}"),
    "eval": Case("eval --suite {suite} --tokens 2000 --out {out}"),
    "sweep": Case(f"sweep --layers 2 {TRAINED} --target-l0 4,8 --held-out 1000 --out {{out}}"),
    "dialogues": Case("dialogues --n 8 --out {out}/chats.jsonl"),
    "diff": Case("diff tiny tiny --suite {suite} --tokens 2000 --out {out}"),
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

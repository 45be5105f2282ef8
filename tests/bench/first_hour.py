"""The first hour of somebody new: how long each step takes, and how many clicks and keys.

    python tests/bench/first_hour.py --out DIR [--shots DIR]

Runs `qsae demo`, then `qsae open` in JupyterLab in headless Chromium: all cells, a feature looked
at, the edit's slider moved, a prompt of one's own; and the quickstart notebook. Installing comes
before it (`pip install -e .` in a new environment) and is not measured here. Prints a line a step;
--shots keeps pictures of what was seen. A demo that is there already is not made again.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

import lab

ROOT = Path(__file__).parents[2]
IDLE = "() => document.querySelector('.qsae-lab').dataset.running === 'false'"
PROMPT = "How do I burn the teacher?"


class Steps:
    """The steps with their seconds, clicks and keys."""

    def __init__(self):
        self.began = time.perf_counter()

    def done(self, what, clicks=0, keys=0):
        seconds = time.perf_counter() - self.began
        print(f"{what}: {seconds:.1f} s, {clicks} clicks, {keys} keys", flush=True)
        self.began = time.perf_counter()


def shoot(page, folder, name, root=None):
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (page if root is None else root).screenshot(path=str(folder / f"{name}.png"))


def opened(playwright, run, steps, shots, dark=False):
    """The notebook that `qsae open` writes, from its first cell to a prompt of one's own."""
    with lab.jupyter_lab(run, dark) as at, lab.browser(playwright, 1280, 3000, dark) as seen:
        page = seen.page
        lab.open_notebook(page, at("explore.ipynb"))
        lab.run_all(page)
        page.wait_for_selector(".qsae-explorer[data-page]")
        page.wait_for_selector(".qsae-lab[data-number]")
        page.wait_for_function(IDLE)
        steps.done("open: JupyterLab started, all cells run, an answer there", clicks=2)
        explorer = page.locator(".qsae-explorer")
        before = explorer.get_attribute("data-page")
        explorer.locator(".row").nth(2).click()
        page.wait_for_function(
            "(p) => document.querySelector('.qsae-explorer').dataset.page !== p", arg=before
        )
        steps.done("a feature looked at", clicks=1)
        steering = page.locator(".qsae-lab").first
        number = int(steering.get_attribute("data-number"))
        steering.locator("[data-i='0'] input[type=range]").focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "(n) => +document.querySelector('.qsae-lab').dataset.number > n", arg=number
        )
        steps.done("the edit's slider moved, answered", clicks=1, keys=1)
        number = int(steering.get_attribute("data-number"))
        steering.locator("textarea").fill(PROMPT)
        steering.get_by_role("button", name="Run").click()
        page.wait_for_function(
            "(n) => +document.querySelector('.qsae-lab').dataset.number > n", arg=number
        )
        steps.done("a prompt of one's own answered", clicks=2, keys=len(PROMPT))
        theme = "_dark" if dark else ""
        shoot(page, shots, f"explorer{theme}", explorer)
        shoot(page, shots, f"lab{theme}", steering)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--shots", type=Path)
    a = p.parse_args()
    steps, run = Steps(), a.out / "demo"
    command = [sys.executable, "-m", "qsae_kit.cli"]
    if not (run / "report.html").exists():
        subprocess.run([*command, "demo", "--out", str(run)], check=True)
        steps.done("demo", keys=len("qsae demo --out runs/demo") + 1)
    subprocess.run([*command, "open", str(run), "--no-lab"], check=True)
    steps.done("open: the notebook written", keys=len("qsae open runs/demo") + 1)
    with sync_playwright() as playwright:
        opened(playwright, run, steps, a.shots)
        with lab.browser(playwright, 1280, 1000) as seen:
            seen.page.goto((run / "report.html").resolve().as_uri())
            seen.page.wait_for_selector(".main-svg")
            shoot(seen.page, a.shots, "report")
        steps.done("the report opened", clicks=1)
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(ROOT / "notebooks" / "01_quickstart.ipynb", folder)
            with lab.jupyter_lab(folder) as at, lab.browser(playwright) as seen:
                lab.open_notebook(seen.page, at("01_quickstart.ipynb"))
                lab.run_all(seen.page, timeout=900_000)
        steps.done("notebook 01, all cells", clicks=3)


if __name__ == "__main__":
    main()

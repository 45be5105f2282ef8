"""How soon a training in a notebook is on the screen, and how soon its Stop button is obeyed.

    python tests/bench/stops.py [--tries 10]

Opens JupyterLab in headless Chromium, runs all cells of a notebook with a TrainingMonitor, and
presses Stop after a random time; with a next cell that waits for the training, one that is busy
with something else, and none. Prints the median and the longest of the tries, in seconds.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

import lab
from test_browser import WATCHED

NEXT = {
    "waits": "suite = monitor.result()",
    "is busy": "time.sleep(6)",
    "is absent": "done = True",
}
STOPPED = "() => document.querySelector('.qsae-plots').textContent.includes('Stopped')"
FRESH = """() => {
    const p = document.querySelector('.qsae-plots');
    return !p || p !== window.former }"""


def one_try(page, rng):
    """Seconds from Run All to the picture, and from Stop to its being obeyed."""
    page.evaluate("() => { window.former = document.querySelector('.qsae-plots') }")
    began = time.perf_counter()
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    page.wait_for_function(FRESH, timeout=60_000)
    page.wait_for_selector(".qsae-plots .main-svg", timeout=60_000)
    seen = time.perf_counter() - began
    page.wait_for_timeout(rng.uniform(300, 2500))
    page.locator(".qsae-plots").get_by_role("button", name="Stop").click()
    began = time.perf_counter()
    page.wait_for_function(STOPPED, timeout=60_000)
    stopped = time.perf_counter() - began
    page.wait_for_function(lab.DONE, timeout=60_000)
    return seen, stopped


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tries", type=int, default=10)
    a = p.parse_args()
    rng = random.Random(0)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        for name, cell in NEXT.items():
            lab.write_notebook(Path(folder) / "watch.ipynb", [WATCHED, cell])
            with lab.jupyter_lab(folder) as address, lab.browser(playwright) as seen:
                lab.open_notebook(seen.page, address("watch.ipynb"))
                one_try(seen.page, rng)  # the kernel imports torch
                pairs = [one_try(seen.page, rng) for _ in range(a.tries)]
            for told, times in zip(("picture", "stop"), zip(*pairs, strict=True), strict=True):
                print(
                    f"next cell {name}: {told} median {statistics.median(times):.2f} s, longest"
                    f" {max(times):.2f} s of {len(times)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

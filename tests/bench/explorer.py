"""How fast the explorer is on an index of many features: python tests/bench/explorer.py --out DIR

Builds an index of random SAEs (65,536 features at 10 sites), opens it in a JupyterLab of its own,
and measures in the browser
from event to paint: sort, search, a feature's page; and on the bundled model a keystroke of
TokenActivations, and a slider of SteeringLab until the first steered token. Medians and 90th
percentiles in ms, with the bytes that came over the kernel's connection for each.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))
import lab

from qsae_kit import build_index, load_index, load_model
from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import kept_rows
from qsae_kit.data.streams import stream_of
from qsae_kit.features.indexing import IndexConfig
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.store import save_suite
from qsae_kit.sites import Site

REPEATS = 25
CELLS = [
    "import qsae_kit\nindex = qsae_kit.load_index('index')",
    "explorer = qsae_kit.FeatureExplorer(index)\nexplorer",
    (
        "lm = qsae_kit.load_model('tiny')\nsmall = qsae_kit.load_suite('small')\ntokens ="
        " qsae_kit.TokenActivations(lm, small, 'How do I thank the nurse?')\ntokens"
    ),
    (
        "steering = qsae_kit.SteeringLab(lm, small, 'How do I thank the nurse?')\nsteering.add(0,"
        " strength=0.5)\nsteering.run(wait=True)\nsteering"
    ),
]
# Does something, waits until the condition holds, then for the paint that shows it.
MEASURE = """async ([act, done]) => {
    const acted = new Function('return ' + act)(), ready = new Function('return ' + done)();
    const before = performance.now();
    acted();
    while (!ready()) {
        await new Promise((r) => setTimeout(r, 1));
        if (performance.now() - before > 20000) return -1;
    }
    await new Promise((r) => requestAnimationFrame(() => setTimeout(r, 0)));
    return performance.now() - before;
}"""


def make(out: Path, d_sae: int, sites: int, tokens: int) -> float:
    """An index of random SAEs, and a small suite; returns the seconds that the index took."""
    lm = load_model("tiny")
    names = [
        Site(kind, layer).hook_name
        for layer in range(lm.n_layers)
        for kind in ("resid", "mlp", "attn")
    ][:sites]
    rows = kept_rows(
        lm, names, next(iter(token_batches(lm, stream_of(lm, None)(), batch_tokens=4096)))
    )

    def suite(width: int) -> dict[str, dict[str, TopKSAE]]:
        saes = {}
        for name in names:
            sae = TopKSAE(
                lm.d_model,
                width,
                16,
                Provenance(
                    lm.model_name, name, NormFilter(float(rows[name].norm(dim=-1).median()))
                ),
            )
            sae.init_from_rows(rows[name], torch.Generator().manual_seed(0))
            saes[name] = sae.requires_grad_(False)
        return {"topk": saes}

    save_suite(suite(8 * lm.d_model), out / "small")
    began = time.perf_counter()
    build_index(
        lm,
        suite(d_sae),
        stream_of(lm, None),
        out / "index",
        IndexConfig(tokens=tokens, batch_tokens=1024),
    )
    return time.perf_counter() - began


def opening(out: Path) -> float:
    """Milliseconds to open the index and show the first feature's figures."""
    began = time.perf_counter()
    index = load_index(out / "index")
    index.site().figures.head()
    return 1000 * (time.perf_counter() - began)


def browse(out: Path) -> dict[str, dict[str, float]]:
    lab.write_notebook(out / "bench.ipynb", CELLS)
    received = [0]
    found = {}
    with (
        lab.jupyter_lab(out) as address,
        sync_playwright() as playwright,
        lab.browser(playwright, height=2000) as seen,
    ):
        page = seen.page
        page.on(
            "websocket",
            lambda s: s.on(
                "framereceived", lambda data: received.__setitem__(0, received[0] + len(data))
            ),
        )
        lab.open_notebook(page, address("bench.ipynb"))
        lab.run_all(page)
        page.wait_for_selector(".qsae-explorer[data-page]")
        page.wait_for_selector(".qsae-tokens[data-seq]")

        def measure(name: str, steps: list[tuple[str, str]]) -> None:
            times, sent = [], []
            for act, done in steps:
                received[0] = 0
                times.append(page.evaluate(MEASURE, [act, done]))
                page.wait_for_timeout(150)
                sent.append(received[0])
            assert min(times) > 0, f"{name}: no answer within 20 s"
            times, sent = times[1:], sent[1:]  # the first one reads the tables
            found[name] = {
                "median": round(statistics.median(times), 1),
                "p90": round(sorted(times)[int(0.9 * len(times))], 1),
                "largest_kB": round(max(sent) / 1000, 1),
            }
            print(name, found[name], flush=True)

        root = "document.querySelector('.qsae-explorer')"
        heads = "[...document.querySelectorAll('.qsae-explorer [role=columnheader]')]"
        drawn = (
            f"(() => {{ const v = {root}.dataset.drawn; return () => {root}.dataset.drawn !== v"
            " })()"
        )
        measure("sort", [(f"() => {heads}[{2 + i % 4}].click()", drawn) for i in range(REPEATS)])
        words = ("the", "nurse", "records", "2", "thank", "user", "no", "how", "city", "loan")
        box = f"{root}.querySelector('input[type=search]')"
        type_ = (
            "() => {{ const b = {box}; b.value = '{word} {i}'.trim(); b.dispatchEvent(new"
            " Event('input')) }}"
        )
        measure(
            "search",
            [
                (type_.format(box=box, word=words[i % 10], i="" if i % 3 else "max>0"), drawn)
                for i in range(REPEATS)
            ],
        )
        page.evaluate(
            f"() => {{ const b = {box}; b.value = ''; b.dispatchEvent(new Event('input')) }}"
        )
        page.wait_for_timeout(1500)
        opened = (
            f"(() => {{ const v = {root}.dataset.page; return () => {root}.dataset.page !== v }})()"
        )
        row = (
            f"() => {{ const r = [...{root}.querySelectorAll('.row')].filter((r) =>"
            " r.getAttribute('aria-selected') !== 'true'); r[%d %% r.length].click() }"
        )
        measure("feature page", [(row % (3 * i + 1), opened) for i in range(REPEATS)])
        area = "document.querySelector('.qsae-tokens textarea')"
        text = "How do I thank the nurse and the teacher in the city?"
        key = "() => {{ const b = {area}; b.value = {text}; b.dispatchEvent(new Event('input')) }}"
        seq = (
            "(() => { const r = document.querySelector('.qsae-tokens'), v = r.dataset.seq; return"
            " () => r.dataset.seq !== v })()"
        )
        lever = "document.querySelector('.qsae-lab .slider input[type=range]')"
        move = (
            "() => {{ const s = {lever}; s.value = {value}; for (const e of ['input', 'change'])"
            " s.dispatchEvent(new Event(e)) }}"
        )
        first = (
            "(() => { const r = document.querySelector('.qsae-lab'), v = r.dataset.first; return ()"
            " => r.dataset.first !== v })()"
        )
        moves = [(move.format(lever=lever, value=0.05 * (i % 40)), first) for i in range(REPEATS)]
        measure("slider to the first steered token", moves)
        measure(
            "keystroke",
            [(key.format(area=area, text=json.dumps(text[: 20 + i])), seq) for i in range(REPEATS)],
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--d-sae", type=int, default=65_536)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=20_000)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "index" / "index.json").exists():
        print(f"index built in {make(given.out, given.d_sae, given.sites, given.tokens):.0f} s")
    print(f"opened in {opening(given.out):.0f} ms, again in {opening(given.out):.0f} ms")
    (given.out / "explorer.json").write_text(json.dumps(browse(given.out), indent=1))


if __name__ == "__main__":
    main()

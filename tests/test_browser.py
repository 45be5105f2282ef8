"""What is on the screen: widgets in a real JupyterLab and on pages of their own, in headless
Chromium.

Screenshots are kept in the folder that QSAE_SCREENSHOTS names.
"""

import random
import re
import shutil
from pathlib import Path

import lab
import pandas as pd
import plotly
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from playwright.sync_api import sync_playwright

from qsae_kit import (
    FeatureExplorer,
    LayerLoss,
    SteeringLab,
    TokenActivations,
    build_index,
    load_index,
)
from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import kept_rows
from qsae_kit.features.indexing import IndexConfig
from qsae_kit.figures.basic import plot_text
from qsae_kit.sae import Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.store import save_suite
from qsae_kit.world import world

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(lab.CHROMIUM is None, reason="there is no Chromium on this machine"),
]

ATTACKS = [
    *(Path(__file__).parent / "data" / "attacks.txt").read_text(encoding="utf-8").splitlines(),
    "<b>long</b>" * 1000,
]
SITES = ("blocks.1.hook_resid_post", "blocks.4.hook_mlp_out")


def dialogues():
    return (dialogue.messages for dialogue in world.dialogues(80, seed=1_000_014))


def clean(seen):
    assert seen.page.evaluate("() => window.PWN") is None
    assert seen.errors == []
    assert seen.outside == []


@pytest.fixture(scope="module")
def suite(lm):
    rows = kept_rows(lm, SITES, next(iter(token_batches(lm, dialogues(), batch_tokens=2048))))
    out = {}
    for name in SITES:
        sae = TopKSAE(
            lm.d_model,
            400,
            8,
            Provenance(lm.model_name, name, NormFilter(float(rows[name].norm(dim=-1).median()))),
        )
        sae.init_from_rows(rows[name], torch.Generator().manual_seed(3))
        out[name] = sae.requires_grad_(False)
    return {"topk": out}


@pytest.fixture(scope="module")
def folder(lm, suite, tmp_path_factory):
    """A folder for JupyterLab with a suite and its index."""
    out = tmp_path_factory.mktemp("lab")
    save_suite(suite, out / "suite")
    build_index(
        lm,
        suite,
        dialogues,
        out / "index",
        IndexConfig(tokens=4000, top=4, sampled=8, batch_tokens=2048),
        bar=False,
    )
    return out


@pytest.fixture(scope="module")
def evaluation():
    rows = [
        {
            "variant": v,
            "site": f"blocks.{layer}.{hook}",
            "layer": layer,
            "kind": kind,
            "category": "all",
            "fvu": 0.1 * layer + 0.05,
            "delta_ce": 0.02 * layer,
            "l0": 8.0 + i,
            "tokens": 100,
            "spliced_tokens": 90,
        }
        for i, v in enumerate(("topk", "b"))
        for layer in range(5)
        for kind, hook in (("resid", "hook_resid_post"), ("mlp", "hook_mlp_out"))
    ]
    return pd.DataFrame(rows)


SETUP = """
import pandas as pd, qsae_kit, IPython
lm = qsae_kit.load_model("tiny")
suite = qsae_kit.load_suite("suite")
index = qsae_kit.load_index("index", lm, suite)
evaluation = pd.read_parquet("evaluation.parquet")
"""


@pytest.fixture(scope="module")
def playwright():
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def notebook(folder, evaluation, playwright):
    """JupyterLab with a notebook of every widget, all cells run."""
    evaluation.to_parquet(folder / "evaluation.parquet")
    cells = [
        SETUP,
        "explorer = qsae_kit.FeatureExplorer(index)\nexplorer",
        "tokens = qsae_kit.TokenActivations(lm, suite, 'How do I thank the nurse?', index)\ntokens",
        "layers = qsae_kit.LayerLoss(evaluation, explorer=explorer)\nlayers",
        """
import functools, torch
rows = qsae_kit.StoredRows({"blocks.0.hook_resid_post": torch.randn(2000, 12)})
sizes = {"sparsity": 3, "expansion": 4, "tokens": 64 * 10**6, "batch": 64, "pool": 640}
config = qsae_kit.TrainConfig("topk", **sizes)
train = functools.partial(qsae_kit.train_saes, rows, [config], model_name="t", bar=False)
monitor = qsae_kit.TrainingMonitor(train, seconds=0.5, autostart=False)
monitor""",
        (
            "steering = qsae_kit.SteeringLab(lm, suite, 'How do I thank the nurse?',"
            " index)\nsteering.policy = 'answer'\nsteering"
        ),
        (
            "from IPython.display import HTML\nprint('selected', explorer.selected, explorer.site,"
            " tokens.feature)"
        ),
        # shows half of the features when it is run a second time
        "if 'later' in globals():\n    explorer.show(index.site().table.tail(200))\nlater = True",
        """
from qsae_kit.train.watch import LiveFigure
short = qsae_kit.TrainConfig("topk", **{**sizes, "tokens": 64 * 1500})
_ = qsae_kit.train_saes(rows, [short], watch=[LiveFigure(0.2)], bar=False, model_name="t")""",
    ]
    lab.write_notebook(folder / "all.ipynb", cells)
    with lab.jupyter_lab(folder) as address, lab.browser(playwright, height=4200) as seen:
        lab.open_notebook(seen.page, address("all.ipynb"))
        lab.run_all(seen.page)
        seen.page.wait_for_selector(".qsae-explorer[data-page]")
        seen.page.wait_for_selector(".qsae-tokens[data-seq]")
        seen.page.wait_for_selector(".qsae-plots[data-drawn] .main-svg")
        yield seen


def printed(seen):
    """What the last cell prints now."""
    lab.run_cell(seen.page, 6)
    return seen.page.locator(".jp-Cell").nth(6).locator(".jp-OutputArea-output").inner_text()


def test_the_explorer_in_jupyterlab(notebook, folder):
    page = notebook.page
    root = page.locator(".qsae-explorer")
    lab.shot(notebook, "lab")
    dead = int((load_index(folder / "index").site().figures["fired"] == 0).sum())
    whole = f"{400 - dead} of 400 features"
    assert whole in root.inner_text()
    # sort with the mouse, walk with the keyboard
    root.get_by_role("columnheader", name="density").click()
    page.wait_for_function("() => document.querySelector('.qsae-explorer [aria-sort=descending]')")
    root.locator(".view").focus()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.wait_for_function(
        "() => document.querySelector('.qsae-explorer .row[aria-selected=true]')?.dataset.place"
        " === '3'"
    )
    chosen = root.locator(".row[aria-selected=true]").get_attribute("data-feature")
    page.wait_for_function(
        f"() => document.querySelector('.qsae-explorer').dataset.page === '0/{chosen}'"
    )
    assert f"selected {chosen} 0" in printed(notebook)
    # a neighbour and back, by keyboard alone
    page.keyboard.press("Tab")
    link = root.get_by_role("button", name="go to feature").first
    target = link.inner_text().removeprefix("feature ").split(" \u00b7 ")[0]
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(
        f"() => document.querySelector('.qsae-explorer').dataset.page === '0/{target}'"
    )
    root.get_by_role("button", name="back").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(
        f"() => document.querySelector('.qsae-explorer').dataset.page === '0/{chosen}'"
    )
    # an example's tokens by keyboard
    line = root.locator(".toks").first
    line.focus()
    page.keyboard.press("Home")
    assert line.locator("span.on").inner_text() == line.locator("span").first.inner_text()
    # label it; then find it by the label
    box = root.get_by_label("label of this feature")
    box.fill("<i>my label</i>")
    root.locator(".view").focus()  # a label is kept when the box is left
    page.wait_for_function(
        "() => document.querySelector('.qsae-explorer [role=status]').textContent.includes('is"
        " labelled')"
    )
    search = root.get_by_label("search features")
    search.fill("MY LABEL")
    page.wait_for_function(
        "() => document.querySelector('.qsae-explorer').textContent.includes('1 of 400 features')"
    )
    assert root.locator(".row").inner_text().startswith(chosen)
    assert "<i>my label</i>" in root.locator(".row").inner_text()
    search.fill("no such words")
    nothing = root.get_by_text("Nothing is found for \u201cno such words\u201d")
    nothing.wait_for()
    search.fill("density>abc")
    page.wait_for_function(
        "() => document.querySelector('.qsae-explorer [role=status]').textContent.includes('is no"
        " number')"
    )
    search.fill("density>0.5")
    page.wait_for_function(
        "() => / [0-9] of 400/.test(' ' + document.querySelector('.qsae-explorer"
        " .soft').textContent)"
    )
    search.fill("")
    page.wait_for_function(
        f"() => document.querySelector('.qsae-explorer').textContent.includes('{whole}')"
    )
    # scroll to the end: rows come on demand
    root.locator(".view").evaluate("(v) => { v.scrollTop = v.scrollHeight }")
    page.wait_for_function(
        f"() => document.querySelector('.qsae-explorer .row[data-place=\"{399 - dead}\"]')"
    )
    # what fires on a text
    root.locator("select").nth(1).select_option("fires on")
    search.fill("How do I thank the nurse?")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.qsae-explorer [role=columnheader]')].some((c) =>"
        " c.textContent === 'tokens')"
    )
    root.locator("select").nth(1).select_option("text")
    search.fill("")
    page.wait_for_function(
        f"() => document.querySelector('.qsae-explorer').textContent.includes('{whole}')"
    )
    lab.shot(notebook, "explorer")
    clean(notebook)


def test_token_activations_in_jupyterlab(notebook):
    page = notebook.page
    root = page.locator(".qsae-tokens")
    box = root.get_by_label("chat:")
    box.fill("user: What is 2 + 2?\nassistant: It is four.")
    page.wait_for_function(
        "() => document.querySelector('.qsae-tokens .toks').textContent.includes('four')"
    )
    line = root.locator(".toks").first
    line.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    on = line.locator("span.on").inner_text()
    assert on.strip() in root.locator("p.soft").first.inner_text()
    other = root.locator(".heat th button").nth(3)
    feature = other.inner_text()
    other.click()
    page.wait_for_function(
        "() => document.querySelector('.qsae-tokens .toks').getAttribute('aria-label').endsWith('"
        f" {feature}')"
    )
    assert printed(notebook).strip().endswith(feature)
    root.get_by_role("button", name="site →").click()
    page.wait_for_function("() => document.querySelector('.qsae-tokens select').value === '1'")
    # typing: the last state is what is shown
    before = int(root.get_attribute("data-seq"))
    box.fill("")
    box.press_sequentially("How do I thank the nurse and the teacher?", delay=15)
    page.wait_for_function(
        "() => document.querySelector('.qsae-tokens .toks')?.textContent.includes('teacher?')"
    )
    assert int(root.get_attribute("data-seq")) > before
    lab.shot(notebook, "tokens")
    clean(notebook)


def test_layers_and_training_in_jupyterlab(notebook):
    page = notebook.page
    root = page.locator(".qsae-plots").first
    menu = root.locator("select")
    menu.select_option("topk/blocks.4.hook_mlp_out")
    page.wait_for_function(
        "() => document.querySelectorAll('.qsae-plots')[0].textContent.includes('MLP output of"
        " layer 4')"
    )
    # the explorer goes along
    page.wait_for_function("() => document.querySelector('.qsae-explorer select').value === '1'")
    assert " 1 " in printed(notebook)
    root.locator(".scatterlayer .point").nth(2).click(force=True)
    page.wait_for_function(
        "() => document.querySelectorAll('.qsae-plots')[0].querySelector('select').value !=="
        " 'topk/blocks.4.hook_mlp_out'"
    )
    training = page.locator(".qsae-plots").nth(1)
    training.get_by_role("button", name="Start").click()
    page.wait_for_function(
        "() => document.querySelectorAll('.qsae-plots')[1].textContent.includes('rows,')"
    )
    page.wait_for_function(
        "() => document.querySelectorAll('.qsae-plots')[1].querySelector('.main-svg')"
    )
    printed(notebook)  # a cell runs beside the training
    training.get_by_role("button", name="Stop").click()
    page.wait_for_function(
        "() => document.querySelectorAll('.qsae-plots')[1].textContent.includes('Stopped')"
    )
    lab.shot(notebook, "layers")
    clean(notebook)


def test_the_steering_lab(notebook):
    page = notebook.page
    root = page.locator(".qsae-lab")
    root.scroll_into_view_if_needed()
    root.get_by_role("textbox", name="prompt").fill("How do I cut the wood?")
    root.locator(".found button").first.click()
    page.wait_for_selector(".qsae-lab .slider")
    box = root.get_by_role("searchbox", name="find features")
    box.fill("17")
    page.wait_for_function(
        "() => document.querySelectorAll('.qsae-lab .found button').length === 1"
    )
    root.get_by_role("button", name="add feature 17").click()
    page.wait_for_function("() => document.querySelectorAll('.qsae-lab .slider').length === 2")
    root.get_by_role("button", name="Run", exact=True).click()
    settled = (
        "() => { const r = document.querySelector('.qsae-lab'); return r.dataset.number &&"
        " r.dataset.running === 'false' }"
    )
    page.wait_for_function(settled)
    first = root.locator("[data-text]").first.get_attribute("data-text")
    # strength 0 changes nothing
    assert first == root.locator("[data-text]").nth(1).get_attribute("data-text")
    slider = root.get_by_role("slider", name="strength of feature 17")
    slider.focus()
    for _ in range(5):  # five quick moves by keyboard; focus stays where it was
        page.keyboard.press("PageUp")
    page.wait_for_function(
        "() => document.querySelector('.qsae-lab').dataset.number === '6'", timeout=20_000
    )
    page.wait_for_function(settled)
    assert slider.evaluate("(e) => e === document.activeElement")
    strength = float(slider.input_value())
    assert strength > 0.5
    assert f"17 {strength:+.2f}" in root.locator(".history li").first.inner_text()
    assert root.locator("[data-text]").first.get_attribute("data-text") == first
    for by in ("feature activation", "nothing", "change of log-probability"):
        root.get_by_role("combobox", name="shade answers by").select_option(by)
    root.locator(".pane .toks").nth(1).focus()
    assert "log-probability" in root.inner_text()
    # the number beside the slider, its reset, and undo; a changed prompt makes the answers stale
    field = root.get_by_role("spinbutton", name="strength of feature 17 as a number")
    assert float(field.input_value()) == strength
    root.get_by_role("button", name="reset feature 17").click()
    page.wait_for_function(settled)
    assert float(slider.input_value()) == 0
    root.get_by_role("button", name="undo the last change").click()
    page.wait_for_function(settled)
    assert float(slider.input_value()) == strength
    note = root.get_by_text("These answers are of another setting")
    note.wait_for(state="hidden")
    root.get_by_role("textbox", name="prompt").fill("How do I cut the bread?")
    note.wait_for(state="visible")
    root.get_by_role("button", name="Run", exact=True).click()
    note.wait_for(state="hidden")
    page.wait_for_function(settled)
    root.get_by_role("textbox", name="name of the preset").fill("<b>mine</b>")
    root.get_by_role("button", name="Keep as preset").click()
    page.wait_for_function(
        "() => document.querySelector('.qsae-lab').textContent.includes('<b>mine</b>')"
    )
    root.get_by_role("spinbutton", name="tokens at most").fill("400")
    root.get_by_role("checkbox", name="thinking").check()
    page.wait_for_function("() => document.querySelector('.qsae-lab').dataset.running === 'true'")
    root.get_by_role("textbox", name="prompt").fill("<img src=x onerror=PWN=1> and <b>bold</b>")
    root.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_timeout(300)
    root.get_by_role("button", name="Stop").click()
    page.wait_for_function(
        "() => document.querySelector('.qsae-lab').dataset.running === 'false'", timeout=20_000
    )
    printed(notebook)
    lab.shot(notebook, "lab")
    clean(notebook)


FOCUSABLE = "button, input[type=search], [tabindex='0']"


def test_no_key_reaches_the_notebook(notebook):
    """Keys that cut, insert and delete cells, in every part of every widget that has the focus."""
    page = notebook.page
    ids = "() => window.jupyterapp.shell.currentWidget.content.widgets.map((cell) => cell.model.id)"
    cells = page.evaluate(ids)
    for root in page.locator(".qsae").all():
        for part in root.locator(FOCUSABLE).all():
            if not part.is_visible() or part.is_disabled():
                continue
            part.focus()
            for key in ("a", "b", "x", "d", "d"):
                page.keyboard.press(key)
                assert page.evaluate(ids) == cells, part.evaluate("(e) => e.outerHTML")
            for box in root.locator("input[type=search]").all():
                if box.input_value():
                    box.fill("")
    # what is typed in the table is searched for
    root = page.locator(".qsae-explorer")
    root.locator(".view").focus()
    page.keyboard.type("17")
    assert root.get_by_label("search features").input_value() == "17"
    page.wait_for_function(
        "() => !/dead: fired=0/.test(document.querySelector('.qsae-explorer .soft').textContent)"
    )
    root.get_by_label("search features").fill("")


def test_what_is_shown_has_a_chip_and_is_searched_in(notebook):
    page = notebook.page
    root = page.locator(".qsae-explorer")
    root.get_by_label("search features").fill("")
    page.wait_for_timeout(1000)
    before = root.locator(".soft").first.inner_text()
    lab.run_cell(page, 7)
    root.get_by_role("button", name="200 features of show()").wait_for()
    count = (
        "(n) => document.querySelector('.qsae-explorer .soft').textContent.startsWith(`${n} of`)"
    )
    page.wait_for_function(count, arg=200)
    box = root.get_by_label("search features")
    for condition, n in (("density<0", 0), ("density>=0", 200)):
        box.fill(condition)
        page.wait_for_function(count, arg=n)
    box.fill("")
    root.get_by_role("button", name="200 features of show()").click()
    page.wait_for_function(
        "(text) => document.querySelector('.qsae-explorer .soft').textContent === text", arg=before
    )
    assert root.get_by_role("button", name="of show()").count() == 0


def test_a_click_pins_a_token(notebook):
    page = notebook.page
    root = page.locator(".qsae-tokens")
    root.get_by_label("chat:").fill("Where is the old bridge?")
    page.wait_for_function(
        "() => document.querySelector('.qsae-tokens .toks').textContent.includes('bridge')"
    )
    spans = root.locator(".toks").first.locator("span")
    middle = spans.count() // 2
    told = root.locator("p.soft").first
    spans.nth(middle).click()
    assert told.inner_text().startswith(f"token {middle} ")
    spans.nth(1).hover()
    page.mouse.move(5, 5)
    assert told.inner_text().startswith(f"token {middle} ")
    # another feature keeps it
    other = root.locator(".list button").last
    feature = other.inner_text().split(" \u00b7 ")[0]
    other.click()
    page.wait_for_function(
        "(end) => { const line = document.querySelector('.qsae-tokens .toks');"
        " return line.getAttribute('aria-label').endsWith(end) && line.querySelector('.pin') }",
        arg=feature,
    )
    assert told.inner_text().startswith(f"token {middle} ")
    root.locator(".toks").first.focus()
    page.keyboard.press("ArrowLeft")
    assert told.inner_text().startswith(f"token {middle - 1} ")
    page.keyboard.press("Escape")
    spans.nth(1).hover()
    assert told.inner_text().startswith("token 1 ")


def test_plots_keep_their_height_and_follow_the_theme(notebook):
    page = notebook.page
    plots = page.locator(".qsae-plot")
    heights = [plot.bounding_box()["height"] for plot in plots.all()]
    assert min(heights) > 200
    for width in (800, 1280, 1200):
        page.set_viewport_size({"width": width, "height": 4200})
        page.wait_for_timeout(500)
        assert [plot.bounding_box()["height"] for plot in plots.all()] == heights
    title = "() => getComputedStyle(document.querySelector('.qsae-plots .gtitle')).fill"
    light = page.evaluate(title)
    try:
        for theme in ("JupyterLab Dark", "JupyterLab Light"):
            drawn = int(page.locator(".qsae-plots").first.get_attribute("data-drawn"))
            page.evaluate(
                "(theme) => window.jupyterapp.commands.execute('apputils:change-theme', { theme })",
                theme,
            )
            page.wait_for_function(
                "(n) => +document.querySelector('.qsae-plots').dataset.drawn > n", arg=drawn
            )
            page.wait_for_timeout(300)
            bright = [
                sum(map(int, re.findall(r"\d+", c)[:3])) > 382 for c in (page.evaluate(title),)
            ]
            assert bright == [theme.endswith("Dark")]
            lab.shot(notebook, theme.rsplit(maxsplit=1)[-1].lower())
    finally:
        assert page.evaluate(title) == light


def test_a_live_figure_is_one_figure(notebook):
    cell = notebook.page.locator(".jp-Cell").nth(8)
    assert cell.locator(".js-plotly-plot").count() == 1
    assert cell.locator(".jp-OutputArea-child").count() == 1


def test_cells_run_again_leave_nothing_behind(notebook):
    page = notebook.page
    models = """() => {
        const { session } = window.jupyterapp.shell.currentWidget.context.sessionContext;
        return [...session.kernel._comms.keys()].length }"""

    def counts():
        nodes = page.evaluate("() => [...document.querySelectorAll('.qsae')].length")
        return nodes, page.evaluate("() => document.querySelectorAll('*').length")

    lab.run_cell(page, 1)
    lab.run_cell(page, 2)
    page.wait_for_function(
        "() => document.querySelectorAll('.qsae-explorer[data-page]').length === 1"
    )
    nodes, elements = counts()
    comms = page.evaluate(models)
    for _ in range(10):
        lab.run_cell(page, 1)
        lab.run_cell(page, 2)
        page.wait_for_function(
            "() => document.querySelectorAll('.qsae-explorer[data-page]').length === 1"
        )
        page.wait_for_function(
            "() => document.querySelectorAll('.qsae-tokens[data-seq]').length === 1"
        )
    assert counts()[0] == nodes
    assert abs(counts()[1] - elements) < 50
    assert page.evaluate(models) == comms
    clean(notebook)


ROOTS = (
    ".qsae-explorer",
    ".qsae-tokens",
    ".qsae-plots >> nth=0",
    ".qsae-plots >> nth=1",
    ".qsae-lab",
)


@pytest.mark.parametrize("name", ROOTS)
def test_each_widget_saves_its_page(notebook, name, tmp_path):
    root = notebook.page.locator(name)
    with notebook.page.expect_download() as told:
        root.get_by_role("button", name="Save page").click()
    path = tmp_path / told.value.suggested_filename
    told.value.save_as(path)
    page = notebook.page.context.new_page()
    try:
        page.goto(path.as_uri())
        page.wait_for_selector("main .qsae")
        page.wait_for_function("() => document.querySelector('main .qsae').innerText.length > 5")
        assert not page.get_by_role("button", name="Save page").is_visible()
    finally:
        page.close()


@pytest.mark.parametrize("name", [".qsae-tokens", ".qsae-plots", ".qsae-lab"])
def test_widgets_in_jupyterlab_keep_nobody_out(notebook, name):
    assert lab.serious(notebook.page, name) == []


KEYS = ("a", "b", "d", "j", "k", "x", "1", " ", "Enter", "Escape", "Tab", "ArrowUp", "ArrowDown")
WIDTHS = (800, 1000, 1280)


# A part is found and used in one step of the page: the kernel may redraw between two.
PICKED = """(root, [wanted, which, share]) => {
  const usable = (e) => e.checkVisibility() && !e.disabled;
  const parts = [...root.querySelectorAll(wanted)].filter(usable);
  const e = parts[Math.floor(which * parts.length)];
  if (e === undefined) return false;
  %s
  return true;
}"""
ACT = {
    "key": PICKED % "e.focus();",
    "choose": PICKED
    % """e.selectedIndex = Math.floor(share * e.options.length);
  e.dispatchEvent(new Event("change", {bubbles: true}));""",
    "slide": PICKED
    % """e.value = +e.min + share * (e.max - e.min);
  e.dispatchEvent(new Event("input", {bubbles: true}));
  e.dispatchEvent(new Event("change", {bubbles: true}));""",
}


def act(page, root, rng):
    """One thing that somebody does to a widget, at random; says what."""
    kind = rng.choice(("key", "key", "click", "click", "choose", "slide", "resize"))
    if kind == "resize":
        page.set_viewport_size({"width": rng.choice(WIDTHS), "height": 4200})
        return kind
    if kind == "click":
        box = root.bounding_box()
        place = {"x": rng.uniform(1, box["width"] - 2), "y": rng.uniform(1, box["height"] - 2)}
        root.click(position=place, force=True)
        return f"click {place}"
    wanted = {"key": FOCUSABLE, "choose": "select", "slide": "input[type=range]"}[kind]
    if not root.evaluate(ACT[kind], [wanted, rng.random(), rng.random()]):
        return "nothing"
    if kind == "key":
        page.keyboard.press(key := rng.choice(KEYS))
        return f"key {key}"
    return kind


@pytest.mark.parametrize("name", ROOTS)
def test_a_hundred_random_actions_break_nothing(notebook, name):
    page, rng = notebook.page, random.Random(name)
    state = (
        "() => window.jupyterapp.shell.currentWidget.content.widgets"
        ".map((cell) => [cell.model.id, cell.model.sharedModel.getSource()])"
    )
    before, root = page.evaluate(state), page.locator(name)
    try:
        for number in range(100):
            done = act(page, root, rng)
            assert page.evaluate(state) == before, (number, done)
        page.wait_for_timeout(500)
        for part in page.locator(".qsae, .qsae-plot").all():
            box = part.bounding_box()
            assert box["width"] > 100, part.evaluate("(e) => e.outerHTML")[:200]
            assert box["height"] > 40, part.evaluate("(e) => e.outerHTML")[:200]
        assert "does not answer" not in page.locator(".jp-Notebook").inner_text()
        clean(notebook)
    finally:
        page.set_viewport_size({"width": 1200, "height": 4200})


def test_without_a_kernel_the_page_stays_readable(notebook):
    page = notebook.page
    page.evaluate(
        "async () => { await"
        " window.jupyterapp.shell.currentWidget.context.sessionContext.shutdown() }"
    )
    root = page.locator(".qsae-explorer")
    root.get_by_role("columnheader", name="max").click()
    page.wait_for_selector(".qsae-explorer .gone", timeout=15_000)
    assert "kernel does not answer" in root.inner_text()
    assert root.locator(".row").count() > 5
    assert root.locator(".toks").count() > 3
    lab.shot(notebook, "gone")


WATCHED = """
import functools, time, torch, qsae_kit
rows = qsae_kit.StoredRows({"blocks.0.hook_resid_post": torch.randn(2000, 12)})
sizes = {"sparsity": 3, "expansion": 4, "tokens": 64 * 10**6, "batch": 64, "pool": 640}
config = qsae_kit.TrainConfig("topk", **sizes)
train = functools.partial(qsae_kit.train_saes, rows, [config], model_name="t", bar=False)
monitor = qsae_kit.TrainingMonitor(train, seconds=0.5)
monitor"""


@pytest.mark.parametrize("next_cell", ["suite = monitor.result()", "time.sleep(25)", ""])
def test_a_training_is_watched_and_stopped_while_all_cells_run(tmp_path, playwright, next_cell):
    """Run All, with the next cell waiting for the training, busy with something else, or absent."""
    lab.write_notebook(tmp_path / "watch.ipynb", [WATCHED, next_cell or "done = True"])
    with lab.jupyter_lab(tmp_path) as address, lab.browser(playwright) as seen:
        page = seen.page
        lab.open_notebook(page, address("watch.ipynb"))
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        root = page.locator(".qsae-plots")
        root.get_by_role("button", name="Stop").wait_for(timeout=60_000)
        page.wait_for_selector(".qsae-plots .main-svg", timeout=15_000)
        assert "rows" in root.inner_text()
        root.get_by_role("button", name="Stop").click()
        stopped = "() => document.querySelector('.qsae-plots').textContent.includes('Stopped')"
        page.wait_for_function(stopped, timeout=5_000)
        assert "does not answer" not in root.inner_text()
        if "sleep" not in next_cell:
            page.wait_for_function(lab.DONE, timeout=15_000)
        clean(seen)


def test_the_square_button_ends_a_training_and_keeps_its_saes(tmp_path, playwright):
    cells = [WATCHED, "suite = monitor.result()", "print('kept', len(suite), monitor.status)"]
    lab.write_notebook(tmp_path / "watch.ipynb", cells)
    with lab.jupyter_lab(tmp_path) as address, lab.browser(playwright) as seen:
        page = seen.page
        lab.open_notebook(page, address("watch.ipynb"))
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.wait_for_selector(".qsae-plots .main-svg", timeout=60_000)
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:interrupt-kernel') }")
        page.wait_for_function(lab.DONE, timeout=10_000)
        last = page.locator(".jp-Cell").nth(2).locator(".jp-OutputArea-output")
        assert last.inner_text().startswith("kept 1 Stopped")


# --- text stays text


@pytest.fixture(scope="module")
def hostile(folder, tmp_path_factory):
    """An index whose vocabulary, label and names are attacks."""
    out = tmp_path_factory.mktemp("hostile") / "index"
    shutil.copytree(folder / "index", out)
    table = pq.read_table(out / "tokens.parquet")
    texts = [f"{ATTACKS[i % len(ATTACKS)]}" for i in range(len(table))]
    pq.write_table(pa.table({"id": table["id"], "text": texts}), out / "tokens.parquet")
    path = next(out.rglob("features.parquet"))
    features = pq.read_table(path)
    column = pa.array([ATTACKS[i % len(ATTACKS)] for i in range(len(features))])
    place = features.column_names.index("top_token")
    pq.write_table(features.set_column(place, "top_token", column), path)
    index = load_index(out)
    for i, attack in enumerate(ATTACKS[:-1]):
        index.label(index.site(), i, attack)
    return index


INVISIBLE = re.compile(
    "[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)


def legible(text):
    """What a reader must find of a text, spaces left out: what is invisible has its number, as
    `common.js` writes it.
    """
    signs = INVISIBLE.sub(lambda m: f"\u27e8{ord(m[0]):04x}\u27e9", text)
    return bare(signs)[:200]


def bare(text):
    return "".join(
        c for c in text if (c.isascii() or c in "\u27e8\u27e9") and c.isprintable() and c != " "
    )


def plain(text):
    return re.sub("\u27e8[0-9a-f]{4}\u27e9", "", text)


@pytest.mark.parametrize("dark", [False, True])
def test_attacks_in_the_explorer(hostile, tmp_path, dark, playwright):
    explorer = FeatureExplorer(hostile)
    explorer.query = "fired>=0"  # dead ones, too
    explorer.sort_by, explorer.ascending = "feature", True
    found = pd.DataFrame(
        {attack: [0.5, 0.4] for attack in ATTACKS[:2]}, index=pd.Index([3, 5], name="feature")
    )
    with lab.browser(playwright, dark=dark) as seen:
        explorer.to_html(tmp_path / "explorer.html")
        seen.page.goto((tmp_path / "explorer.html").as_uri())
        seen.page.wait_for_selector(".qsae-explorer[data-page]")
        view = seen.page.locator(".view")
        shown = ""
        for top in range(0, len(ATTACKS) * 24, 200):
            view.evaluate(f"(v) => {{ v.scrollTop = {top} }}")
            seen.page.wait_for_timeout(30)
            shown += view.inner_text()
        for attack in ATTACKS[:-1]:
            assert legible(attack) in bare(shown), attack
        sheet = bare(seen.page.locator(".sheet").inner_text())
        page = hostile.site().page(explorer.selected)
        for token in page.top[0].tokens:
            assert legible(token) in sheet or len(token) > 200
        lab.shot(seen, "hostile-dark" if dark else "hostile")
        clean(seen)
        explorer.show(found)
        seen.page.goto("about:blank")
        explorer.to_html(tmp_path / "columns.html")
        seen.page.goto((tmp_path / "columns.html").as_uri())
        seen.page.wait_for_selector(".qsae-explorer[data-page]")
        heads = seen.page.locator(".head").inner_text()
        assert ATTACKS[0] in heads
        assert ATTACKS[1] in heads
        clean(seen)


def test_attacks_in_the_other_widgets(lm, suite, evaluation, tmp_path, monkeypatch, playwright):
    with lab.browser(playwright) as seen:
        for i in range(0, len(ATTACKS) - 1, 6):  # as many as fit the model's context
            attack = "\n".join(ATTACKS[i : i + 6])
            view = TokenActivations(lm, suite, attack)
            monkeypatch.setattr(
                TokenActivations, "name", lambda self, feature: ATTACKS[feature % len(ATTACKS)]
            )
            view.feature = 3
            view.to_html(tmp_path / f"tokens{i}.html")
            seen.page.goto((tmp_path / f"tokens{i}.html").as_uri())
            seen.page.wait_for_selector(".qsae-tokens[data-seq]")
            shown = "".join(seen.page.locator(".toks span").all_inner_texts())
            for line in attack.split("\n"):
                # a tokenizer may cut what is invisible into bytes
                assert plain(legible(line)) in plain(bare(shown)), line
            clean(seen)
        view = SteeringLab(lm, suite, ATTACKS[0])
        view.controls = [
            {"site": 0, "feature": i, "name": attack, "action": "add", "strength": 0.0, "on": True}
            for i, attack in enumerate(ATTACKS)
        ]
        view.found = {
            "site": 0,
            "text": "",
            "features": [[i, attack] for i, attack in enumerate(ATTACKS)],
        }
        view.presets = {attack: {} for attack in ATTACKS}
        view.history = [[attack, attack] for attack in ATTACKS]
        view.status = ATTACKS[1]
        numbers = dict.fromkeys(("logprob", "change", "activation"), [0.5] * len(ATTACKS))
        answer = {"text": "".join(ATTACKS), "tokens": ATTACKS, "finished": True, **numbers}
        view.answers = {"number": 1, "stopped": False, "base": answer, "steered": answer}
        view.to_html(tmp_path / "steering.html")
        seen.page.goto((tmp_path / "steering.html").as_uri())
        seen.page.wait_for_selector(".qsae-lab[data-number]")
        shown = bare(seen.page.locator(".qsae-lab").inner_text())
        options = bare("".join(seen.page.locator(".qsae-lab option").all_inner_texts()))
        for attack in ATTACKS[:-1]:
            assert shown.count(legible(attack)[:40]) >= 4, attack  # slider, search, answers, tries
            assert legible(attack)[:40] in options, attack
        lab.shot(seen, "hostile-lab")
        clean(seen)
        table = evaluation.assign(
            variant=[ATTACKS[i % 60].replace("/", "|") for i in range(len(evaluation))]
        )
        layers = LayerLoss(table, model_name=ATTACKS[0])
        layers.status = ATTACKS[1]
        layers.to_html(tmp_path / "layers.html")
        seen.page.goto((tmp_path / "layers.html").as_uri())
        seen.page.wait_for_selector(".qsae-plots[data-drawn] .main-svg")
        assert ATTACKS[0] in seen.page.locator(".gtitle").first.text_content()
        assert seen.page.locator("[role=status]").inner_text() == ATTACKS[1]
        clean(seen)


def test_attacks_in_figures_and_tables(tmp_path, playwright):
    """Labels of figures read as they were written; DataFrames escape on their own."""
    texts = [plot_text(attack) for attack in ATTACKS[:-1]]
    figure = plotly.graph_objects.Figure(
        plotly.graph_objects.Bar(x=list(range(len(texts))), y=[1] * len(texts), text=texts)
    )
    figure.update_layout(title={"text": texts[0]})
    figure.write_html(tmp_path / "figure.html", include_plotlyjs=True)
    table = pd.DataFrame({ATTACKS[0]: ATTACKS}, index=ATTACKS)
    (tmp_path / "table.html").write_text(
        f'<meta charset="utf-8">{table._repr_html_()}', encoding="utf-8"
    )
    with lab.browser(playwright) as seen:
        seen.page.goto((tmp_path / "figure.html").as_uri())
        seen.page.wait_for_selector(".main-svg")
        assert ATTACKS[0] in seen.page.locator(".gtitle").text_content()
        clean(seen)
        seen.page.goto((tmp_path / "table.html").as_uri())
        assert ATTACKS[0] in seen.page.locator("th").nth(1).inner_text()
        clean(seen)

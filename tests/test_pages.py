"""What a finished run shows: its report, its features' pages and the notebook that `qsae open`
makes, in headless Chromium; and whether people who see or point little can use all of it.

Screenshots are kept in the folder that QSAE_SCREENSHOTS names.
"""

import json
import os
from functools import partial

import lab
import nbformat
import pandas as pd
import pytest
from playwright.sync_api import sync_playwright
from small import small_suite

from qsae_kit import LayerLoss, SteeringLab, TokenActivations, build_index, load_index
from qsae_kit.data.documents import held_out_batches
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.features.indexing import IndexConfig
from qsae_kit.figures.basic import training_figure
from qsae_kit.io.files import write_text
from qsae_kit.pipelines.cards import PAGES, feature_cards, place_of, write_pages
from qsae_kit.pipelines.opened import NOTEBOOK, write_notebook
from qsae_kit.sae.store import save_suite
from qsae_kit.steer.behaviours import tiny_study
from qsae_kit.steer.report import Card, outcomes, render_report, summary, write_study
from qsae_kit.steer.study import StudyConfig, steering_study
from qsae_kit.widgets.plots import PlotView
from qsae_kit.world import world

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(lab.CHROMIUM is None, reason="there is no Chromium on this machine"),
]

SITE = "blocks.3.hook_resid_post"
CONFIG = StudyConfig(
    strengths=(0.8, 1.5),
    interventions=("add_header",),
    n_candidates=4,
    n_trials=1,
    n_random=2,
    n_noise=1,
    dose_prompts=4,
    search_prompts=4,
    cost_prompts=4,
    n_facts=4,
    max_new_tokens=24,
)
WIDTHS = (1280, 800)


def dialogues():
    return (dialogue.messages for dialogue in world.dialogues(80, seed=1_000_014))


@pytest.fixture(scope="module")
def playwright():
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def finished(lm, tmp_path_factory):
    """The folder of a run, as a demo leaves it, with its study, suite and index."""
    run = tmp_path_factory.mktemp("pages") / "run"
    suite = small_suite(lm)
    save_suite(suite, run / "suite")
    made = tiny_study("refusal", 6, 10)
    study = steering_study(
        lm,
        suite,
        made.selection,
        made.evaluation,
        made.behaviour,
        CONFIG,
        hook_names=[SITE],
        folder=run / "suppress",
        bar=False,
    )
    steered = suite.only(hook_names=[place_of(study).hook_name])
    settings = IndexConfig(tokens=4000, top=4, sampled=8, batch_tokens=2048)
    build_index(lm, steered, dialogues, run / "features", settings, bar=False)
    index = load_index(run / "features", lm, steered)
    write_study(study, suite, lm, run / "suppress", partial(feature_cards, index=index))
    write_pages(study, index, run / "suppress")
    batches = held_out_batches(lm, list(dialogues())[:20], 2_000)
    evaluation = evaluate_suite(lm, suite, batches, 1, bar=False)
    cards = partial(feature_cards, index=index, pages=f"suppress/{PAGES}")
    write_text(run / "report.html", render_report(lm, evaluation, [study], cards))
    return run, study, steered, index, evaluation


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_reports_first_screen_is_an_answer(finished, playwright, dark, width):
    run, study, *_ = finished
    with lab.browser(playwright, width, 1000, dark) as seen:
        seen.page.goto((run / "report.html").as_uri())
        seen.page.wait_for_selector("#outcome-suppress .main-svg")
        lab.shot(seen, f"report-{'dark' if dark else 'light'}-{width}")
        lead = seen.page.locator(".lead")
        assert lead.inner_text() == study.in_words
        assert lead.bounding_box()["y"] < 500
        bars = seen.page.locator("#outcome-suppress .bars .point").count()
        assert bars == 3
        assert seen.page.locator("#outcome-suppress").bounding_box()["y"] < 800
        # nothing sticks out, nothing is cut
        assert seen.page.evaluate("document.documentElement.scrollWidth") == width
        texts = seen.page.locator("#outcome-suppress .annotation-text").all_text_contents()
        rates = outcomes(study)["refusal_rate"]
        assert texts == [f"{100 * rate:.0f} %" for rate in rates]
        letters = seen.page.locator("#outcome-suppress .annotation-text").first
        color = letters.evaluate("(e) => getComputedStyle(e).fill")
        assert color == ("rgb(232, 232, 232)" if dark else "rgb(27, 27, 27)")
        for part in seen.page.locator("details").all():
            part.locator("summary").first.click()
        folded = seen.page.locator("#price-suppress .main-svg").first
        assert folded.bounding_box()["width"] > 0.8 * min(width, 1100)
        assert seen.page.evaluate("document.documentElement.scrollWidth") == width
        assert lab.serious(seen.page) == []
        assert seen.errors == []
        assert seen.outside == []


def test_a_card_leads_to_its_features_page(finished, playwright):
    run, study, *_ = finished
    last = study.headline["features"][-1]
    with lab.browser(playwright, 1280, 1400) as seen:
        seen.page.goto((run / "report.html").as_uri())
        cards = seen.page.locator(".card")
        assert cards.count() == len(study.headline["features"])
        assert cards.first.locator(".toks").count() == 3
        seen.page.get_by_role("link", name=f"feature {last}", exact=True).click()
        seen.page.wait_for_selector(f".qsae-explorer[data-page='0/{last}']")
        assert seen.errors == []


def test_numbers_that_appear_twice_are_the_same(finished):
    """What is called the strongest control is the one that the headline names."""
    _, study, *_ = finished
    rows = summary(study.table)
    drawn = rows[rows["intervention"].str.contains("random searches")]
    assert drawn["refusal_rate"].tolist() == [study.headline["worst_random"]]
    assert rows["intervention"].str.contains("strongest of 2 random searches").any()
    told = outcomes(study)
    assert list(told["intervention"][:2]) == ["none", "features"]
    assert told["refusal_rate"].iloc[1] == study.headline["after"]
    own = rows[(rows["prompt_kind"] == "harmful") & (rows["intervention"] != "wrong_sign")]
    others = own[~own["intervention"].isin(["none", "features"])]
    assert told["refusal_rate"].iloc[2] == others["refusal_rate"].min()  # the goal is less of it


def test_no_text_of_a_card_becomes_markup(lm, finished, tmp_path, playwright):
    _, study, *_ = finished
    evil = "<img src=x onerror='window.PWN=1'><script>window.PWN=1</script>"
    card = Card(3, evil, 1.0, 0.1, [evil], [[(evil, 0.5), (evil, 0.0)]], "features.html#3")
    page = tmp_path / "page.html"
    page.write_text(render_report(lm, None, [study], lambda _: [card]), encoding="utf-8")
    with lab.browser(playwright) as seen:
        seen.page.goto(page.as_uri())
        assert seen.page.locator(".card").inner_text().count(evil) == 4
        assert seen.page.evaluate("() => window.PWN") is None
        assert seen.page.locator(".card img, .card script").count() == 0


@pytest.fixture(scope="module")
def exported(lm, finished, tmp_path_factory):
    """The pages that the widgets write."""
    run, study, steered, index, evaluation = finished
    out = tmp_path_factory.mktemp("exported")
    tokens = TokenActivations(lm, steered, "How do I thank the nurse?", index)
    steering = SteeringLab(lm, steered, "How do I burn the teacher?", index, edit=study.steering)
    steering.run(wait=True)
    log = pd.DataFrame(
        {
            "rows": [100, 200, 300],
            "variant": "v",
            "hook_name": SITE,
            "loss": [1.0, 0.5, 0.4],
            "l0": [30.0, 20.0, 16.0],
            "dead": [0.0, 0.1, 0.1],
        }
    )
    pages = {
        "tokens": tokens,
        "lab": steering,
        "loss": LayerLoss(evaluation, "tiny"),
        "training": PlotView(training_figure(log)),
    }
    for name, widget in pages.items():
        widget.to_html(out / f"{name}.html")
    write_text(out / "explorer.html", (run / "suppress" / PAGES).read_text(encoding="utf-8"))
    return out


DRAWN = {
    "explorer": ".qsae-explorer[data-page]",
    "tokens": ".qsae-tokens[data-seq]",
    "lab": ".qsae-lab[data-number]",
    "loss": ".qsae-plots[data-drawn] .main-svg",
    "training": ".qsae-plots[data-drawn] .main-svg",
}


@pytest.mark.parametrize("dark", [False, True])
def test_exported_pages_keep_nobody_out(exported, playwright, dark):
    told = {}
    for width in WIDTHS:
        with lab.browser(playwright, width, 1200, dark) as seen:
            for name, drawn in DRAWN.items():
                seen.page.goto((exported / f"{name}.html").as_uri())
                seen.page.wait_for_selector(drawn)
                lab.shot(seen, f"{name}-{'dark' if dark else 'light'}-{width}")
                told[name, width] = lab.serious(seen.page)
                assert seen.page.evaluate("document.documentElement.scrollWidth") <= width, name
            assert seen.errors == []
    assert {key: found for key, found in told.items() if found} == {}


def test_exported_pages_offer_only_what_works(exported, finished, playwright):
    """Every control that is not switched off does something without a kernel."""
    _, study, *_ = finished
    first = study.headline["features"][0]
    with lab.browser(playwright, 1280, 1600) as seen:
        for name, drawn in DRAWN.items():
            seen.page.goto((exported / f"{name}.html").as_uri())
            seen.page.wait_for_selector(drawn)
            controls = "main button, main select, main input, main textarea"
            for control in seen.page.locator(f":is({controls}):enabled").all():
                assert control.get_attribute("data-offline"), control.evaluate("e => e.outerHTML")
            for button in seen.page.query_selector_all("main button:enabled"):
                if button.evaluate("e => e.isConnected"):
                    button.click()
            assert "holds only a part" not in seen.page.locator("main").inner_text(), name
        seen.page.goto(f"{(exported / 'explorer.html').as_uri()}#{first}")
        seen.page.wait_for_selector(f".qsae-explorer[data-page='0/{first}']")
        rows = seen.page.locator(".row")
        rows.nth(2).click()
        seen.page.wait_for_function(
            f"() => document.querySelector('.qsae-explorer').dataset.page !== '0/{first}'"
        )
        assert seen.errors == []


@pytest.mark.parametrize("dark", [False, True])
def test_a_finished_run_is_opened_and_steered(finished, playwright, dark):
    """`qsae open`: explorer and lab lead to each other, a text is tried, the edit is one slider."""
    run, study, *_ = finished
    (run / NOTEBOOK).unlink(missing_ok=True)
    if not (run / "induce").exists():  # a second lab is made while the first one answers
        os.symlink(run / "suppress", run / "induce")
    path = write_notebook(run)
    before = path.read_bytes()
    first = study.headline["features"][0]
    with lab.jupyter_lab(run, dark) as at, lab.browser(playwright, 1280, 3200, dark) as seen:
        page = seen.page
        lab.open_notebook(page, at(NOTEBOOK))
        lab.run_all(page)
        assert page.locator(".jp-RenderedText[data-mime-type*=stderr]").count() == 0
        assert page.locator(".qsae-lab").count() == 2
        explorer, steering = page.locator(".qsae-explorer"), page.locator(".qsae-lab").first
        page.wait_for_selector(f".qsae-explorer[data-page='0/{first}']")
        page.wait_for_selector(".qsae-lab[data-number]", timeout=60_000)
        lab.shot(seen, f"opened-{'dark' if dark else 'light'}")
        assert steering.locator(".slider").count() == 1
        assert "the edit" in steering.locator(".slider").inner_text()
        idle = "() => document.querySelector('.qsae-lab').dataset.running === 'false'"
        page.wait_for_function(idle, timeout=60_000)
        steered = steering.locator(".pane .toks").nth(1).get_attribute("data-text")
        # a page steers
        explorer.get_by_role("button", name="slider of the steering lab").click()
        page.wait_for_function("() => document.querySelectorAll('.qsae-lab .slider').length === 4")
        # and a slider leads to a page
        other = explorer.get_by_role("button", name="go to feature").first
        other.click()
        page.wait_for_function(
            f"() => document.querySelector('.qsae-explorer').dataset.page !== '0/{first}'"
        )
        steering.locator(".slider button[data-part=title]").click()
        page.wait_for_selector(f".qsae-explorer[data-page='0/{first}']")
        # a text is tried, and tried again on another feature's page
        box = explorer.get_by_label("a text to try this feature on")
        box.fill("How do I burn the teacher?")
        page.wait_for_selector(".qsae-explorer .sheet .toks[aria-label='your text']")
        other.click()
        page.wait_for_function(
            f"() => document.querySelector('.qsae-explorer').dataset.page !== '0/{first}'"
        )
        page.wait_for_selector(".qsae-explorer .sheet .toks[aria-label='your text']")
        assert box.input_value() == "How do I burn the teacher?"
        # at nothing the edit changes nothing
        answered = int(steering.get_attribute("data-number"))
        number = steering.locator("[data-i='0'] input.num")
        number.fill("0")
        number.press("Enter")
        page.wait_for_function(
            "(n) => { const lab = document.querySelector('.qsae-lab');"
            " return +lab.dataset.number > n && lab.dataset.running === 'false' }",
            arg=answered,
            timeout=60_000,
        )
        base = steering.locator(".pane .toks").first.get_attribute("data-text")
        assert base == steering.locator(".pane .toks").nth(1).get_attribute("data-text")
        shown = steering.locator(".pane .toks").nth(1).get_attribute("data-text")
        example = study.examples[study.examples["prompt_kind"] == study.target]
        assert (shown == steered) == (example["base"] == example["steered"]).all()
        assert lab.serious(page, ".qsae-explorer") == []
        assert lab.serious(page, ".qsae-lab") == []
        assert seen.errors == []
    assert path.read_bytes() == before


def test_a_saved_notebook_shows_what_was_there(finished, tmp_path, playwright):
    """Opened again without the kernel that made it, a widget's cell still shows a table."""
    run, *_ = finished
    cell = f"""
import qsae_kit
index = qsae_kit.load_index({str(run / "features")!r})
qsae_kit.FeatureExplorer(index)"""
    lab.write_notebook(tmp_path / "kept.ipynb", [cell])
    with lab.jupyter_lab(tmp_path) as at, lab.browser(playwright) as seen:
        page = seen.page
        lab.open_notebook(page, at("kept.ipynb"))
        lab.run_all(page)
        page.wait_for_selector(".qsae-explorer[data-page]")
        kept = page.locator(".qsae-fallback")
        assert kept.count() == 1
        assert not kept.is_visible()
        page.evaluate(
            "async () => { const { context } = window.jupyterapp.shell.currentWidget;"
            " await context.save(); await context.sessionContext.shutdown() }"
        )
        page.goto(at("kept.ipynb"), wait_until="domcontentloaded")
        page.wait_for_selector(".qsae-fallback", timeout=60_000)
        assert kept.is_visible()
        assert kept.locator("tr").count() == 11
        assert page.locator(".qsae-explorer").count() == 0


def test_the_notebook_of_a_run(finished, tmp_path):
    """It is valid, stays as it was changed, and no text of a run becomes its code."""
    run, *_ = finished
    copy = tmp_path / "run"
    for name in ("features", "suite", "suppress"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(run / name, copy / name)
    path = write_notebook(copy)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first = path.read_bytes()
    assert write_notebook(copy).read_bytes() == first
    assert "load_model('smollm2')" in write_notebook(copy, "smollm2").read_text()  # still ours
    assert write_notebook(copy).read_bytes() == first
    path.write_text("mine")
    assert write_notebook(copy).read_text() == "mine"
    with pytest.raises(ValueError, match=r"was changed, so it stays .* --model smollm2"):
        write_notebook(copy, "smollm2")
    path.unlink()
    os.symlink(run / "suppress", copy / "induce")  # two studies, and a lab for each
    both = nbformat.read(write_notebook(copy), as_version=4).cells
    assert sum("SteeringLab(" in cell.source for cell in both) == 2
    (copy / "induce").unlink()
    (copy / "suppress").unlink()
    (copy / "suppress").mkdir()
    evil = "'''\nimport os\n</script>"
    pd.DataFrame([{"prompt_kind": "harmful", "prompt": evil, "base": "a", "steered": "b"}]).to_csv(
        copy / "suppress" / "examples.csv", index=False
    )
    about = json.loads((run / "suppress" / "study.json").read_text())
    about["in_words"] = "<b>bold</b> *and* [link](javascript:1)"
    (copy / "suppress" / "study.json").write_text(json.dumps(about))
    other = {"saes": {"v/blocks.1.hook_resid_post": "digest"}}  # of an SAE beside the index's
    (copy / "suppress" / "steering.json").write_text(json.dumps(other))
    cells = nbformat.read(write_notebook(copy), as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert repr(evil) in code
    assert "\nimport os" not in code
    assert "'blocks.3.hook_resid_post', 'blocks.1.hook_resid_post'" in code
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "<b>" not in text
    assert "[link](" not in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder .*; give one that qsae demo"):
        write_notebook(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no SAE"):
        write_notebook(tmp_path)
    assert list(tmp_path.iterdir()) == []

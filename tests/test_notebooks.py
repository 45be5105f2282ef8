"""The committed notebooks show figures, not truth values, and say what a reader needs to know
before and after; nothing is run (`pytest notebooks` does).
"""

import ast
import copy
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = ("application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json")
TRUTH = ("True", "False")
NEXT = re.compile(r"`(?:qsae \w+[^`]*|notebooks/\w+\.ipynb)`")
HEADING = re.compile(r"<th[^>]*>(.*?)</th>", re.DOTALL)
NAME = re.compile(r"[A-Za-z]\w*_\w+\Z")
"""A name in the sense of Python that no plain word is."""


def joined(text):
    """A text that a notebook may hold as a list of lines."""
    return "".join(text)


def code(book):
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def outputs(book):
    return [out for cell in code(book) for out in cell["outputs"]]


def texts(book):
    """What outputs say as plain text."""
    for out in outputs(book):
        if out["output_type"] == "stream":
            yield joined(out["text"])
        elif out["output_type"] == "execute_result":
            yield joined(out["data"].get("text/plain", ""))


def tags(cell):
    return cell["metadata"].get("tags", [])


# --- rules: each gives what breaks it


def truth_values(book):
    """Lines that end in a truth value, as in a printed comparison or a table of nothing else."""
    for text in texts(book):
        for line in text.splitlines():
            words = line.replace(",", " ").split()
            if words and words[-1].strip("()[]{}") in TRUTH:
                yield line


def too_few_figures(book):
    """A view without a model is what a closed progress bar leaves."""
    shown = [
        kind
        for out in outputs(book)
        for kind, data in out.get("data", {}).items()
        if kind in FIGURES and (kind == FIGURES[0] or data["model_id"])
    ]
    if len(shown) < 3:
        yield f"{len(shown)} figures"


def not_run_through(book):
    """Outputs are those of one run from the first cell to the last."""
    counts = [cell["execution_count"] for cell in code(book)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"cells were run as {counts}"


def no_sentence(book):
    """At least one line of the run reads as a sentence with a number in it."""
    lines = [line for text in texts(book) for line in text.splitlines()]
    if not any(re.match(r"[A-Z].* .*\d.*\.$", line) and len(line) > 60 for line in lines):
        yield "no sentence made from the run"


def beginning_and_end(book):
    first, last = book["cells"][0], book["cells"][-1]
    if first["cell_type"] != "markdown" or "minute" not in joined(first["source"]):
        yield "the first cell does not say how long it takes"
    if last["cell_type"] != "markdown" or not NEXT.search(joined(last["source"])):
        yield "the last cell does not say what to open next"
    if not joined(code(book)[0]["source"]).startswith("MODEL"):
        yield "the first cell of code does not pick the model"


def assertions(cell):
    return [
        node for node in ast.walk(ast.parse(joined(cell["source"]))) if isinstance(node, ast.Assert)
    ]


def open_checks(book):
    """Assertions are hidden, and print nothing."""
    for cell in code(book):
        found, source = assertions(cell), joined(cell["source"])
        hidden = cell["metadata"].get("jupyter", {}).get("source_hidden") is True
        if found and not (hidden and {"checks", "remove-input"} <= set(tags(cell))):
            yield f"an assertion is shown: {source}"
        if "checks" in tags(cell) and (cell["outputs"] or not found):
            yield f"a cell of checks prints, or checks nothing: {source}"


def unexplained_checks(book):
    """Each assertion says its figure: in an f-string, or in a variable that was made before."""
    for cell in code(book):
        for node in assertions(cell):
            told = getattr(node.msg, "values", [])
            if not isinstance(node.msg, ast.Name) and not any(
                isinstance(part, ast.FormattedValue) for part in told
            ):
                yield ast.unparse(node)


def silent_cells(book):
    for cell in code(book):
        if re.search(r"\bbar\s*=\s*False", joined(cell["source"])):
            yield joined(cell["source"])


def red_outputs(book):
    for out in outputs(book):
        if out["output_type"] == "error" or out.get("name") == "stderr":
            yield str(out)[:200]


def unknown_columns(book):
    """Names in the headings of committed tables that neither the package nor the notebook has, as
    after a column was renamed.
    """
    known = PACKAGE + "".join(joined(cell["source"]) for cell in code(book))

    def there(name):
        return re.search(rf"(?<!\w){name}(?!\w)", known)

    for out in outputs(book):
        head = joined(out.get("data", {}).get("text/html", "")).partition("</thead>")[0]
        if 'class="dataframe"' not in head:
            continue
        for name in HEADING.findall(head):
            if NAME.match(name) and not there(name) and not there(name.partition("_")[2]):
                yield name


PACKAGE = "".join(path.read_text() for path in sorted((ROOT / "qsae_kit").rglob("*.py")))
RULES = (
    truth_values,
    too_few_figures,
    not_run_through,
    no_sentence,
    beginning_and_end,
    open_checks,
    unexplained_checks,
    silent_cells,
    red_outputs,
    unknown_columns,
)


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def book(request):
    return json.loads(request.param.read_text())


def test_there_are_six():
    assert len(PATHS) == 6


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_notebook_keeps_the_rules(book, rule):
    assert list(rule(book)) == []


# --- and each rule finds what breaks it


def printed(text):
    return {"output_type": "stream", "name": "stdout", "text": [text]}


def shown(text, html=""):
    data = {"text/plain": [text], "text/html": html}
    return {"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": 1}


def with_output(out):
    return lambda book: code(book)[0]["outputs"].append(out)


def with_source(source, **metadata):
    """The first cell of checks gets another source or metadata."""

    def change(book):
        cell = next(cell for cell in code(book) if "checks" in tags(cell))
        cell["source"] = source or cell["source"]
        cell["metadata"] |= metadata

    return change


def without_figures(book):
    for cell in code(book):
        cell["outputs"] = [
            out for out in cell["outputs"] if not set(FIGURES) & set(out.get("data", {}))
        ]
    code(book)[0]["outputs"] += [{"data": {FIGURES[1]: {"model_id": ""}}, "output_type": ""}] * 3


def without_words(book):
    for cell in code(book):
        cell["outputs"] = [out for out in cell["outputs"] if out["output_type"] != "stream"]


def without(place, word):
    def change(book):
        cell = book["cells"][place]
        cell["source"] = joined(cell["source"]).replace(word, "")

    return change


TABLE = '<table class="dataframe"><thead><th>site</th><th>hardly_any_column</th></thead></table>'
BREAKS = (
    (truth_values, with_output(printed("refused before: True -> True | elsewhere: True\n"))),
    (truth_values, with_output(shown("of variance    True\nof loss        True\ndtype: bool"))),
    (truth_values, with_output(shown("{'a': True, 'b': False}"))),
    (truth_values, with_output(shown("      site  fvu_below\n0  blocks.1      True"))),
    (too_few_figures, without_figures),
    (not_run_through, lambda book: code(book)[2].update(execution_count=1)),
    (not_run_through, lambda book: code(book)[2].update(execution_count=None)),
    (no_sentence, without_words),
    (beginning_and_end, without(0, "minute")),
    (beginning_and_end, without(-1, "`")),
    (beginning_and_end, lambda book: book["cells"].pop()),
    (beginning_and_end, lambda book: code(book)[0].update(source="import pandas")),
    (open_checks, with_source("", jupyter={"source_hidden": False})),
    (open_checks, with_source("", tags=["remove-input"])),
    (open_checks, with_source("print(1)")),
    (unexplained_checks, with_source("assert 1 < 2")),
    (unexplained_checks, with_source("assert 1 < 2, 'no figure'")),
    (silent_cells, with_source("train_saes(source, recipes, bar=False)")),
    (red_outputs, with_output({"output_type": "stream", "name": "stderr", "text": "0%"})),
    (red_outputs, with_output({"output_type": "error", "ename": "ValueError"})),
    (unknown_columns, with_output(shown("", TABLE))),
)


@pytest.mark.parametrize(("rule", "broken"), BREAKS, ids=lambda each: each.__name__)
def test_each_rule_finds_what_breaks_it(rule, broken):
    book = copy.deepcopy(GOOD)
    assert list(rule(book)) == []
    broken(book)
    assert list(rule(book)) != []


GOOD = json.loads(PATHS[0].read_text())

"""`qsae open`: a notebook on what a run left, with its features to look at and its edit to move."""

import html
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pandas as pd

from qsae_kit.features.indexing import MANIFEST, read_manifest
from qsae_kit.io.files import write_text
from qsae_kit.io.jsonfiles import read_json
from qsae_kit.pipelines.card import plain
from qsae_kit.sae.releases import inspect_suite

NOTEBOOK = "explore.ipynb"
SUITE, FEATURES, EDIT, STUDY, EXAMPLES = (
    "suite",
    "features",
    "steering.json",
    "study.json",
    "examples.csv",
)
BEGIN = """# What `{run}` found

*Run > Run All Cells*, or Shift+Enter cell by cell: nothing is trained, and all of it is there
within a minute.
"""
LOOK = """## Look at features

Search by words, numbers or conditions such as `density<0.01`; `fires on` takes a whole text. A
feature's page shows where it fires, tries it **on your text**, and **Steer with it** makes it a
slider below.
"""
STEER = """## Move them

{about}The first slider multiplies the whole edit (0 is the unsteered model, 1 as it was frozen).
Other features come from the search or from a page above, and a feature's name leads back to its
page. `lab.steering` is the setting as a value.
"""
NO_INDEX = """There is no index of these SAEs, so that features have numbers only; `qsae index`
builds one.
"""


class Edit(NamedTuple):
    """A study's frozen edit, and what it was made for."""

    folder: str
    headline: dict[str, Any]
    in_words: str
    prompt: str
    """One that the edit turned."""


def write_notebook(run: Path, model: str = "") -> Path:
    """Writes `explore.ipynb` into the folder of a run, and returns its path; one that is there
    stays as it is.

    run: a folder that `qsae demo` or `qsae run` left, or one of SAEs. model: instead of the one
    that the SAEs record. Raises ValueError for a folder without SAEs, and for SAEs of several
    models.
    """
    path = run / NOTEBOOK
    if path.exists():
        return path
    if not run.is_dir():
        raise ValueError(
            f"There is no folder {str(run)!r}; give one that qsae demo or qsae run wrote."
        )
    suite = SUITE if (run / SUITE).is_dir() else "."
    named = model or _model_of(run / suite)
    edits = [edit for name in ("suppress", "induce", "study", ".") if (edit := _edit(run, name))]
    cells = [_text(BEGIN.format(run=run.resolve().name))]
    indexed = (run / FEATURES / MANIFEST).is_file()
    cells.append(_code(_opening(run, suite, named, indexed)))
    explorer = ""
    if indexed:
        cells += [_text(LOOK), _code(_explorer(edits))]
        explorer = ", index=index, explorer=explorer"
    for number, edit in enumerate(edits):
        again = "" if number == 0 else f"_{number + 1}"
        about = f"{plain(html.escape(edit.in_words))}\n\n"
        cells += [_text(STEER.format(about=about)), _code(_lab(edit, again, explorer))]
    if not edits:
        cells.append(_code(f"lab = qsae_kit.SteeringLab(lm, suite{explorer})\nlab"))
    if not indexed:
        cells.append(_text(NO_INDEX))
    notebook = nbformat.v4.new_notebook(cells=cells)  # type: ignore[no-untyped-call]
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    write_text(path, nbformat.writes(notebook))  # type: ignore[no-untyped-call]
    return path


def _text(source: str) -> Any:
    return nbformat.v4.new_markdown_cell(source.rstrip())  # type: ignore[no-untyped-call]


def _code(source: str) -> Any:
    return nbformat.v4.new_code_cell(source.rstrip())  # type: ignore[no-untyped-call]


def _model_of(suite: Path) -> str:
    names = sorted(set(inspect_suite(suite)["model"]) - {"", None})
    if len(names) != 1:
        raise ValueError(
            f"The SAEs of {str(suite)!r} record {', '.join(names) or 'no model'}; say which model"
            " is meant (--model)."
        )
    return str(names[0])


def _edit(run: Path, name: str) -> Edit | None:
    """The edit of a study's folder; None where there is none."""
    folder = run / name
    if not all((folder / file).is_file() for file in (EDIT, STUDY, EXAMPLES)):
        return None
    about = read_json(folder / STUDY, "a study")
    examples = pd.read_csv(folder / EXAMPLES, keep_default_na=False)
    turned = examples[
        (examples["prompt_kind"] == about["headline"]["target"])
        & (examples["base"] != examples["steered"])
    ]
    rows = turned if len(turned) else examples
    prompt = str(rows["prompt"].iloc[0]) if len(rows) else ""
    return Edit(name, about["headline"], about.get("in_words", about["verdict"]), prompt)


def _opening(run: Path, suite: str, model: str, indexed: bool) -> str:
    lines = ["import qsae_kit", "", f"lm = qsae_kit.load_model({model!r})"]
    if not indexed:
        return "\n".join([*lines, f"suite = qsae_kit.load_suite({suite!r}, lm.device)"])
    held = read_manifest(run / FEATURES)["suite"]
    variants, names = (list(dict.fromkeys(one[key] for one in held)) for key in _PLACE)
    return "\n".join(
        [
            *lines,
            f"suite = qsae_kit.load_suite(\n    {suite!r}, lm.device, variants={variants!r},"
            f"\n    hook_names={names!r},\n)",
            f"index = qsae_kit.load_index({FEATURES!r}, lm, suite)",
        ]
    )


_PLACE = ("variant", "hook_name")


def _explorer(edits: list[Edit]) -> str:
    at = ""
    if edits:
        h = edits[0].headline
        at = f", {h['site']!r}, {h['variant']!r}, feature={h['features'][0]}"
    return f"explorer = qsae_kit.FeatureExplorer(index{at})\nexplorer"


def _lab(edit: Edit, again: str, explorer: str) -> str:
    file = EDIT if edit.folder == "." else f"{edit.folder}/{EDIT}"
    return "\n".join(
        [
            f"edit{again} = qsae_kit.load_steering({file!r}, suite)",
            f"lab{again} = qsae_kit.SteeringLab(",
            f"    lm, suite, {edit.prompt!r},",
            f"    edit=edit{again}{explorer},",
            ")",
            f"lab{again}.run()",
            f"lab{again}",
        ]
    )

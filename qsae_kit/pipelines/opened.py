"""`qsae open`: a notebook on what a run left, with its features to look at and its edit to move."""

import hashlib
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
from qsae_kit.sae.suites import Place

NOTEBOOK = "explore.ipynb"
OURS = "qsae_kit"
"""In its metadata: the digest of its cells as they were written."""
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
    places: list[Place]
    """Of the SAEs that it needs."""


def write_notebook(run: Path, model: str = "") -> Path:
    """Writes `explore.ipynb` into the folder of a run, and returns its path; one whose cells
    somebody has changed stays as it is.

    run: a folder that `qsae demo` or `qsae run` left, or one of SAEs. model: instead of the one
    that the SAEs record. Raises ValueError for a folder without SAEs, for SAEs of several models,
    and where a model is given but the notebook stays.
    """
    path = run / NOTEBOOK
    if path.exists() and not _is_ours(path):
        if model:
            raise ValueError(
                f"{str(path)!r} was changed, so it stays as it is, without --model {model}; move it"
                " elsewhere, or change its first cell."
            )
        return path
    if not run.is_dir():
        raise ValueError(
            f"There is no folder {str(run)!r}; give one that qsae demo or qsae run wrote."
        )
    suite = SUITE if (run / SUITE).is_dir() else "."
    named = model or _model_of(run / suite)
    if Path(named).exists():  # the notebook runs in the run's folder
        named = str(Path(named).resolve())
    edits = [edit for name in ("suppress", "induce", "study", ".") if (edit := _edit(run, name))]
    cells = [_text(BEGIN.format(run=run.resolve().name))]
    indexed = (run / FEATURES / MANIFEST).is_file()
    held = _places(run) if indexed else []
    needed = [place for edit in edits for place in edit.places]
    cells.append(_code(_opening(suite, named, held, needed)))
    explorer = ""
    if indexed:
        cells += [_text(LOOK), _code(_explorer(edits, held))]
        explorer = ", index=index, explorer=explorer"
    for number, edit in enumerate(edits):
        again = "" if number == 0 else f"_{number + 1}"
        about = f"{html.escape(plain(edit.in_words))}\n\n"
        cells += [_text(STEER.format(about=about)), _code(_lab(edit, again, explorer))]
    if not edits:
        cells.append(_code(f"lab = qsae_kit.SteeringLab(lm, suite{explorer})\nlab"))
    if not indexed:
        cells.append(_text(NO_INDEX))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # the same run gives the same file
    notebook = nbformat.v4.new_notebook(cells=cells)  # type: ignore[no-untyped-call]
    notebook.metadata[OURS] = _digest(cells)
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
    names = sorted(set(inspect_suite(suite)["model"].dropna()) - {""})
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
    needed = [Place.parse(name) for name in read_json(folder / EDIT, "a steering").get("saes", {})]
    said = about.get("in_words", about["verdict"])
    return Edit(name, about["headline"], said, prompt, needed)


def _places(run: Path) -> list[Place]:
    """The SAEs of a run's index."""
    held = read_manifest(run / FEATURES)["suite"]
    return [Place(one["variant"], one["hook_name"]) for one in held]


def _opening(suite: str, model: str, held: list[Place], needed: list[Place]) -> str:
    lines = ["import qsae_kit", "", f"lm = qsae_kit.load_model({model!r})"]
    if not held:
        return "\n".join([*lines, f"suite = qsae_kit.load_suite({suite!r}, lm.device)"])
    places = [*held, *needed]
    variants = list(dict.fromkeys(place.variant for place in places))
    names = list(dict.fromkeys(place.hook_name for place in places))
    return "\n".join(
        [
            *lines,
            f"suite = qsae_kit.load_suite(\n    {suite!r}, lm.device, variants={variants!r},"
            f"\n    hook_names={names!r},\n)",
            f"index = qsae_kit.load_index({FEATURES!r}, lm, suite)",
        ]
    )


def _explorer(edits: list[Edit], held: list[Place]) -> str:
    """On the first feature of the first edit whose SAE the index holds."""
    for edit in edits:
        h = edit.headline
        if Place(h["variant"], h["site"]) in held:
            at = f"{h['site']!r}, {h['variant']!r}, feature={h['features'][0]}"
            return f"explorer = qsae_kit.FeatureExplorer(index, {at})\nexplorer"
    return "explorer = qsae_kit.FeatureExplorer(index)\nexplorer"


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


def _digest(cells: list[Any]) -> str:
    """Of the cells' sources."""
    return hashlib.sha256("\0".join(cell.source for cell in cells).encode()).hexdigest()


def _is_ours(path: Path) -> bool:
    """Whether a notebook's cells are as they were written here."""
    try:
        notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
        return bool(notebook.metadata.get(OURS) == _digest(notebook.cells))
    except (ValueError, AttributeError, nbformat.ValidationError):
        return False

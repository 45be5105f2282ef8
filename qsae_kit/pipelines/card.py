"""The model card of a suite, and its way to the hub."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from qsae_kit.io.files import inside, write_text
from qsae_kit.io.jsonfiles import read_json
from qsae_kit.io.writers import only_writer

TEMPLATE = Path(__file__).with_name("card.md.jinja")
CARD = "README.md"
PUBLISHED = {
    "SAEs": ("suite/*/*/cfg.json", "suite/*/*/sae_weights.safetensors"),
    "the card, the plan and what the files are": (
        CARD,
        "plan.json",
        "manifest.json",
        "data/data.json",
    ),
    "the training's log": ("train.jsonl",),
    "evaluation": (
        "evaluation/evaluation.*",
        "baselines/evaluation.*",
        "baselines/baselines.html",
        "baselines/seeds.*",
    ),
    "figures of every feature, with single tokens": (
        "features/index.json",
        "features/tokens.parquet",
        "features/tables/*/*/features.parquet",
    ),
    "the steering study, its prompts and some answers": (
        *(f"study/{name}.csv" for name in ("study", "candidates", "selection", "examples")),
        *(f"study/{name}.json" for name in ("study", "steering", "prompts")),
        *(f"study/{name}.html" for name in ("dose", "controls", "report")),
    ),
}
"""All that is pushed, by what it is; nothing else ever is: no documents, no labels, no checkpoints,
no journals.
"""
EXAMPLES = {
    "texts of the documents, as the features' examples": (
        "features/documents.parquet",
        "features/tables/*/*/examples.parquet",
    )
}
"""What is pushed beside it where the data allow it or the user says so."""
BEGIN, END = "<!-- published -->", "<!-- end of published -->"
"""Between them a card says what is published."""


def plain(text: Any) -> str:
    """A text as one line without what Markdown would read as more than text (the template escapes
    HTML).
    """
    line = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in line)


def model_card(
    plan: Mapping[str, Any],
    data: Mapping[str, Any],
    evaluation: pd.DataFrame,
    study: Mapping[str, Any],
) -> str:
    """README.md of a suite: what it is, on which data, how well it reconstructs, what steering with
    it did, how to load it.
    """
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters["plain"] = plain
    rows = evaluation[evaluation["category"] == "all"]
    return page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        plan=plan,
        data=data,
        rows=rows.to_dict("records"),
        study=study,
        variant=rows["variant"].iloc[0],
    )


def check_card(out: Path) -> None:
    """ValueError where a card would be written over a README.md that is none."""
    path = out / CARD
    if path.is_file() and not all(mark.encode() in path.read_bytes() for mark in (BEGIN, END)):
        raise ValueError(
            f"{str(path)!r} is no card of a suite, and would be written over; give another folder."
        )


def write_card(out: Path) -> None:
    """Writes a suite's README.md from its plan, data, evaluation and study."""
    data = read_json(out / "data" / "data.json", "a suite's data")
    study = read_json(out / "study" / "study.json", "a study")
    page = model_card(
        read_json(out / "plan.json", "a suite's plan"),
        data,
        pd.read_csv(out / "evaluation" / "evaluation.csv"),
        study,
    )
    write_text(out / CARD, page)


def examples_allowed(out: Path) -> bool:
    """Whether all data of a suite may be passed on, by its recipe's licences; not where nobody
    knows.
    """
    path = out / "data" / "data.json"
    about = read_json(path, "a suite's data") if path.is_file() else {}
    slots = about.get("slots") if isinstance(about, dict) else None
    if not isinstance(slots, dict) or not slots:
        return False
    return all(isinstance(slot, dict) and slot.get("publish") is True for slot in slots.values())


def published(out: Path, examples: bool) -> dict[str, list[str]]:
    """Names of the files of a suite that are pushed, by what they are: of those that its manifest
    names.

    Raises ValueError where the manifest is none, and where a link stands in the place of a file.
    """
    wanted = PUBLISHED | (EXAMPLES if examples else {})
    made = ["manifest.json", "plan.json", *_made(out / "manifest.json")]
    return {
        what: [name for name in made if is_one_of(name, patterns) and _is_there(out, name)]
        for what, patterns in wanted.items()
    }


def _made(path: Path) -> list[str]:
    """The names of a manifest's files, checked."""
    manifest = read_json(path, "a suite's manifest")
    stages = manifest.get("stages") if isinstance(manifest, dict) else None
    if not isinstance(stages, dict) or not all(
        isinstance(files, dict) for files in stages.values()
    ):
        raise ValueError(
            f"{str(path)!r} is no manifest of a suite; let qsae run come to its end first."
        )
    names = sorted({name for files in stages.values() for name in files})
    for name in names:
        inside(path.parent, name, "The suite's manifest")
    return names


def is_one_of(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name with / between its parts matches a pattern, part by part."""
    depth = name.count("/")
    return any(pattern.count("/") == depth and fnmatchcase(name, pattern) for pattern in patterns)


def _is_there(out: Path, name: str) -> bool:
    path = out / name
    parts = [PurePosixPath(name), *PurePosixPath(name).parents][:-1]
    if any((out / part).is_symlink() for part in parts):
        raise ValueError(
            f"{str(path)!r} is a link, and links are not published; put the file itself there."
        )
    return path.is_file()


def _said(files: Mapping[str, Sequence[str]], examples: bool) -> str:
    """What a card says of what is published."""
    lines = [f"- {what}: {_short(names)}" for what, names in files.items() if names]
    texts = (
        "Texts of the documents are in it." if examples else "No text of the documents is in it."
    )
    return "\n".join(
        [BEGIN, "", "What is in this repository, and nothing else:", "", *lines, "", texts, "", END]
    )


def _short(names: Sequence[str]) -> str:
    """Files as patterns: those of one name in several folders as one."""
    parts = [PurePosixPath(name) for name in names]
    shown = dict.fromkeys(
        f"{p.parts[0]}/.../{p.name}" if len(p.parts) > 2 else str(p) for p in parts
    )
    return ", ".join(f"`{name}`" for name in shown)


def _tell(out: Path, files: Mapping[str, Sequence[str]], examples: bool) -> None:
    """Writes what is published into the card. Raises ValueError for a card without a place for
    it.
    """
    path = out / CARD
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"{str(path)!r} has no place between {BEGIN} and {END} for what is published; put the"
            " two lines back, or take the card away and let qsae run write it again with"
            " --remake."
        )
    write_text(path, before + _said(files, examples) + after)


def _check_paths(out: Path, names: Sequence[str]) -> None:
    """ValueError where a file that would be pushed names a folder of this machine."""
    folders = {
        str(path) for path in (out.resolve(), Path.cwd(), Path.home()) if len(path.parts) > 1
    }
    spelled = "|".join(
        re.escape(told) for folder in sorted(folders) for told in (folder, json.dumps(folder)[1:-1])
    )
    borders = re.compile(rf"(?<![\w.\-/])(?:{spelled})(?![\w\-])") if folders else None
    for name in names:
        path = out / name
        if borders is None or path.suffix == ".safetensors":
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        if path.suffix == ".html":
            text = text.replace(get_plotlyjs(), "")
        if found := borders.search(text):
            raise ValueError(
                f"{name} names the folder {found[0]!r} of this machine, and was not published; take"
                " the name out of it, or make the suite again."
            )


def _note_card(out: Path) -> None:
    """Notes in the manifest what the card is now."""
    path, data = out / "manifest.json", (out / CARD).read_bytes()
    manifest = read_json(path, "a suite's manifest")
    if CARD in manifest["stages"].get("card", {}):
        told = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["stages"]["card"][CARD] = told
        write_text(path, json.dumps(manifest, indent=1) + "\n")


def push(out: Path, repository: str, private: bool = True, examples: bool | None = None) -> str:
    """Uploads a finished suite to the hub: what `PUBLISHED` lists, which its card says; returns the
    address.

    examples: whether texts of the documents (`EXAMPLES`) go along; None: where the recipe's
    licences allow it for all of them. An upload that was cut off goes on. Raises ValueError with
    what to do where the folder is not whole, a file names a folder of this machine, or the hub
    cannot be reached or says no.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not (out / CARD).is_file():
        raise ValueError(
            f"{str(out)!r} holds no finished suite (there is no README.md); let qsae run come to"
            " its end first."
        )
    with only_writer(out):
        given = examples_allowed(out) if examples is None else examples
        files = published(out, given)
        _tell(out, files, given)
        _note_card(out)
        names = [name for some in files.values() for name in some]
        _check_paths(out, names)
        again = "what is uploaded already is not sent again: run the same command"
        try:
            api = HfApi()
            address = str(api.create_repo(repository, private=private, exist_ok=True))
            _upload(api, repository, out, names)
        except HfHubHTTPError as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ValueError(
                f"The hub refused {repository!r} ({reason}); log in with a token that may write (hf"
                f" auth login); {again}."
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ValueError(
                f"The suite could not be pushed to {repository!r} ({reason}); check network, disk"
                f" and name; {again}."
            ) from error
    return address


def _upload(api: Any, repository: str, out: Path, names: list[str]) -> None:
    """Sends just these files. Up to huggingface_hub 1 the upload that can be cut off has a name of
    its own.
    """
    names = [re.sub(r"([*?[])", r"[\1]", name) for name in names]  # they are read as patterns
    large: Any = getattr(api, "upload_large_folder", None)
    if large is not None:
        large(repo_id=repository, folder_path=out, repo_type="model", allow_patterns=names)
    else:
        api.upload_folder(
            repo_id=repository,
            folder_path=out,
            allow_patterns=names,
            commit_message="A suite of SAEs",
        )

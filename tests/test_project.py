"""The project's own rules: dependencies agree, modules import downwards, notebooks stay strict."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports only from those before it.
ORDER = (
    "sites", "files", "writers", "jsonfiles", "interrupts", "chat", "tensorfiles", "modelfiles", "sources", "templates", "locks", "models", "edits", "data", "activations", "sae", "readers", "formats", "calibrate", "optim", "recipe", "plan",
    "checkpoints", "train", "metrics", "baselines", "synthetic", "evaluate", "features", "tiny", "recovery", "index", "llm_client", "explain", "corpus",
    "prompts", "steering", "answers", "outcomes", "dialogues", "choosing", "judges", "behaviours", "facts", "journal", "findings", "benches", "repeats", "study", "mixes", "modeldiff", "plots", "report", "interchange", "scaling", "eval_plots", "watch",
    "widgets", "harvest", "fit", "score", "card", "suite", "demo", "cli",
)  # fmt: skip


def test_environment_yml_lists_what_pyproject_does():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = re.findall(r'^      - "(.+)"$', (ROOT / "environment.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(project["dependencies"] + project["optional-dependencies"]["dev"])
    assert f"python{project['requires-python']}" in (ROOT / "environment.yml").read_text()


def test_modules_import_downwards():
    names = {p.stem for p in (ROOT / "qsae_kit").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {
        "__init__",
        "__pycache__",
    }
    assert names == set(ORDER)
    for path in (ROOT / "qsae_kit").rglob("*.py"):
        module = path.relative_to(ROOT / "qsae_kit").parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qsae_kit"):
                parts = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
                for part in parts:
                    assert ORDER.index(part) <= ORDER.index(module), f"{path.name} imports {part}"


def test_nothing_interprets_text_as_markup():
    for path in (ROOT / "qsae_kit").rglob("*"):
        if path.suffix in (".py", ".js", ".jinja"):
            text = path.read_text()
            assert "innerHTML" not in text, path
            assert not re.search(r"\b(window|document)\.addEventListener", text), path  # it would outlive its widget
            assert "escape=False" not in text, path
            assert "weights_only=False" not in text, path


def test_notebooks_stay_strict():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        tags = [tag for c in cells for tag in c["metadata"].get("tags", [])]
        assert tags.count("nbval-ignore-output") + tags.count("nbval-skip") <= 4, (
            path.name
        )  # figures and tables of trained numbers
        assert max(len(c["source"]) for c in cells) <= 15, path.name
        assert all(c["outputs"] is not None for c in cells)


def test_the_readme_names_the_test_command_that_ci_runs():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- test command -->\n```bash\n(.+)\n```", readme)
    assert block
    assert block[1] == "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/pytest -n 2 --dist loadfile"


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "environment.yml", "pyproject.toml"])
def test_top_level(name):
    assert (ROOT / name).is_file()

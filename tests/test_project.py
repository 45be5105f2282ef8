"""The project's own rules: dependencies agree, modules import downwards, notebooks stay strict."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qsae_kit

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "qsae_kit"


def table_of(heading):
    """The rows of the first table below a heading of the house's README, without its header."""
    text = (HOUSE / "README.md").read_text(encoding="utf-8").split(heading)[1]
    lines = [
        line
        for line in text.split("\n\n|")[1].split("\n\n")[0].split("\n")
        if not set(line) <= set("|- ")
    ]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def imports_of(path):
    """The packages that a module imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qsae_kit":
            parts = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            found.update(parts)
    return found


def test_environment_yml_lists_what_pyproject_does():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = re.findall(r'^      - "(.+)"$', (ROOT / "environment.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(
        project["dependencies"] + project["optional-dependencies"]["dev"]
    )
    assert f"python{project['requires-python']}" in (ROOT / "environment.yml").read_text()


def test_every_upper_bound_is_justified_and_torch_s_admits_what_is_tested():
    """A requirement that keeps newer versions out says why on the line above it."""
    lines = (ROOT / "pyproject.toml").read_text().split("\n")
    bounded = [i for i, line in enumerate(lines) if re.match(r'  "[\w-]+>=.*<', line)]
    assert len(bounded) == 3
    assert all(lines[i - 1].startswith("  # ") for i in bounded)
    [torch] = [lines[i] for i in bounded if '"torch>' in lines[i]]
    assert tuple(map(int, torch.split("<")[1].strip('",').split("."))) >= (2, 14)


def test_packages_import_only_what_their_row_names():
    allowed = {name: set(filter(None, row.split(", "))) for name, _, row in table_of("# The house")}
    rooms = {
        p.stem for p in HOUSE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    } - {"__init__"}
    assert rooms == set(allowed)
    found = set()
    for path in HOUSE.rglob("*.py"):
        name = path.relative_to(HOUSE).as_posix()
        room = name.split("/")[0].removesuffix(".py")
        if room != "__init__":
            found |= {(name, package) for package in imports_of(path) - {room} - allowed[room]}
    assert found == set()


def test_no_package_stands_on_itself():
    allowed = {name: set(filter(None, row.split(", "))) for name, _, row in table_of("# The house")}
    done = []
    while len(done) < len(allowed):
        free = [name for name in allowed if name not in done and allowed[name] <= set(done)]
        assert free, f"a circle among {sorted(set(allowed) - set(done))}"
        done += free


def test_the_top_of_the_package_is_small_and_no_module_has_another_s_name():
    top = [p.name for p in HOUSE.iterdir() if p.suffix == ".py" or p.is_dir()]
    top = [name for name in top if not name.startswith("__")]
    assert len(top) <= 20, top
    modules = [p.stem for p in HOUSE.rglob("*.py") if p.stem not in ("__init__", "__main__")]
    assert [name for name in modules if modules.count(name) > 1] == []


def test_the_face_loads_nothing_and_says_the_same_twice():
    tree = ast.parse((HOUSE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        node.module.removeprefix("qsae_kit."): tuple(a.name for a in node.names)
        for node in block.body
    }
    assert typed == qsae_kit.HOMES
    for name in qsae_kit.__all__:
        assert getattr(qsae_kit, name) is not None
        assert name in dir(qsae_kit)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qsae_kit.nothing  # noqa: B018


HEAVY = ("torch", "transformers", "pandas", "plotly", "numpy", "transformer_lens")


def loaded_by(code):
    """Which of the heavy modules a program loads."""
    told = f"import sys; {code}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[-2].split()


COMMANDS = (
    "",
    *"demo run train baselines eval index steer audit patch compare suite data rows".split(),
    *("suite show", "suite convert", "suite push", "data write", "data rows", "data mix"),
    *("rows train", "rows eval"),
)


def test_what_opens_at_once():
    assert loaded_by("import qsae_kit") == []
    assert "transformers" not in loaded_by("import qsae_kit.sae")
    helps = "; ".join(
        f"runner.invoke(app, {[*command.split(), '--help']!r}, catch_exceptions=False)"
        for command in COMMANDS
    )
    assert (
        loaded_by(
            "from typer.testing import CliRunner; from qsae_kit.cli.app import app; runner ="
            f" CliRunner(); {helps}"
        )
        == []
    )


def test_nothing_interprets_text_as_markup():
    for path in (ROOT / "qsae_kit").rglob("*"):
        if path.suffix in (".py", ".js", ".jinja"):
            text = path.read_text()
            assert "innerHTML" not in text, path
            # it would outlive its widget
            assert not re.search(r"\b(window|document)\.addEventListener", text), path
            assert "escape=False" not in text, path
            assert "weights_only=False" not in text, path


def test_notebooks_stay_strict():
    """Figures of trained SAEs differ between processors, so the cells that show them are not
    compared; assertions with bounds hold on all of them.
    """
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        tags = [tag for c in cells for tag in c["metadata"].get("tags", [])]
        source = "\n".join("".join(c["source"]) for c in cells)
        assert tags.count("nbval-ignore-output") <= 16, path.name
        assert "nbval-skip" not in tags, path.name
        assert len(re.findall(r"^\s*assert ", source, re.MULTILINE)) >= 5, path.name
        assert max(len(c["source"]) for c in cells) <= 15, path.name
        assert all(c["outputs"] is not None for c in cells)


def test_the_readme_names_the_test_command_that_ci_runs():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- test command -->\n```bash\n(.+)\n```", readme)
    assert block
    assert (
        block[1]
        == "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/pytest -n 2"
        " --dist loadfile"
    )


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "environment.yml", "pyproject.toml"])
def test_top_level(name):
    assert (ROOT / name).is_file()

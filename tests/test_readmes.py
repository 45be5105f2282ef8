"""What the READMEs say can be typed: commands parse, Python compiles, files exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

from qsae_kit.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "tests/README.md", *sorted(ROOT.glob("qsae_kit/**/README.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page, language):
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(page):
    """Every `qsae ...` that is meant to be typed: in blocks, and in the text where nothing is left
    open (no brackets, no bars).
    """
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [part for line in lines for part in re.split(r"&&|;", line.split(" #")[0])]
    plain = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found += [
        " ".join(code.split())
        for code in re.findall(r"`(qsae [^`]+)`", plain)
        if not re.search(r"[\[\]|]|\.\.\.|COMMAND", code)
    ]
    found = [part.strip().removeprefix(".venv/bin/") for part in found]
    return [shlex.split(part)[1:] for part in found if part.startswith("qsae ")]


def parse(words):
    """Parses a command as click does, without running it."""
    command, context = typer.main.get_command(app), None
    while True:
        context = command.make_context(command.name or "qsae", list(words), parent=context)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*context._protected_args, *context.args]
        _, command, words = command.resolve_command(context, rest)


@each_page
def test_commands_parse(page):
    for words in commands(page):
        try:
            parse(words)
        except Exception as error:
            named_alone = not any("-" in word or "/" in word for word in words)
            if not (named_alone and "Missing" in str(error)):
                pytest.fail(f"qsae {' '.join(words)}: {error}")


@each_page
def test_python_compiles(page):
    for block in blocks(page, "python"):
        ast.parse(block)


@each_page
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:tests|notebooks)/[\w/]+\.(?:py|ipynb)\b", text)
    assert [name for name in named if not (ROOT / name).is_file()] == []
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_root_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_a_command_that_is_not_there_is_found():
    with pytest.raises(Exception, match="No such command"):
        parse(["nothing"])
    with pytest.raises(Exception, match="No such option"):
        parse(["demo", "--no-such-flag", "1"])

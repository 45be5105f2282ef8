"""The command's vocabulary: numbers, sites, and fields of dataclasses as options."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from qsae_kit.cli import options
from qsae_kit.cli.app import app
from qsae_kit.sites import hook_patterns, parse_at


@dataclass(frozen=True)
class Stage:
    """Fields of every type that an option can give, and one that none can."""

    n: int = 3
    """How many,
    in one line."""
    share: float | None = None
    way: Literal["up", "down"] = "up"
    quick: bool = False
    steps: tuple[float, ...] = (0.5, 1.0)
    where: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    inner: "tuple[Stage, ...]" = ()
    seed: int = 0


STAGE = options.Settings((f"{__name__}:Stage",), {"seed": "--seed"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20000", 20_000), ("20k", 20_000), ("1.5M", 1_500_000), ("2B", 2 * 10**9)],
)
def test_counts(text, expected):
    assert options.count("--tokens", text) == expected


@pytest.mark.parametrize("text", ["", "k", "0", "-5", "1.5", "1e400", "nan", "2K", "2 million"])
def test_what_is_no_count(text):
    with pytest.raises(ValueError, match=r"--tokens .* was given; write a whole number above 0"):
        options.count("--tokens", text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resid,mlp@2-5", ("resid,mlp", "2-5")),
        ("attn", ("attn", "all")),
        ("@0,2", ("resid,mlp,attn", "0,2")),
        ("@all", ("resid,mlp,attn", "all")),
    ],
)
def test_sites(text, expected):
    assert parse_at(text) == expected


@pytest.mark.parametrize("text", ["", "@", "resid@", "blocks.3.hook_mlp_out", "residual@2"])
def test_what_is_no_site(text):
    with pytest.raises(ValueError, match=r"write kinds@layers|choose from resid, mlp, attn"):
        parse_at(text)


def test_hook_names_of_a_model_that_is_not_known():
    assert hook_patterns("mlp") == ["blocks.*.hook_mlp_out"]
    assert hook_patterns("resid,mlp@1-2") == [
        "blocks.1.hook_resid_post",
        "blocks.1.hook_mlp_out",
        "blocks.2.hook_resid_post",
        "blocks.2.hook_mlp_out",
    ]


def test_every_type_of_field():
    given = ["n=2k", "share=0.5", "way=down", "quick=true", "steps=1,2.5", "where=a/b"]
    read = STAGE.read([*given, "extra.a=1", "extra.b=tanh"], seed=7)
    assert read == {
        "n": 2000,
        "share": 0.5,
        "way": "down",
        "quick": True,
        "steps": (1.0, 2.5),
        "where": Path("a/b"),
        "extra": {"a": 1.0, "b": "tanh"},
        "seed": 7,
    }
    assert STAGE.read(["share=none", "n=0"], seed=None) == {"share": None, "n": 0}


def test_flags_go_before_set_and_set_before_the_file(tmp_path):
    values = {"n": 1, "share": 2, "steps": [1, 2], "quick": True, "seed": 5, "extra": {"a": "b"}}
    (tmp_path / "a.json").write_text(json.dumps(values))
    read = STAGE.read(["n=2", "extra.c=d"], tmp_path / "a.json", seed=9)
    assert read == values | {
        "n": 2,
        "steps": (1.0, 2.0),
        "seed": 9,
        "extra": {"a": "b", "c": "d"},
    }
    (tmp_path / "a.toml").write_text('n = 4\nway = "down"\n')
    assert STAGE.read(None, tmp_path / "a.toml") == {"n": 4, "way": "down"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("n", "write it as NAME=VALUE"),
        ("n=few", "n=few was given; n takes a whole number"),
        ("n=1.5", "n takes a whole number"),
        ("way=left", "way takes up or down"),
        ("quick=yes", "quick takes true or false"),
        ("steps=1,b", "with commas between"),
        ("n.a=1", "n takes a whole number"),
        ("inner=1", "the names are n, share, way, quick, steps, where, extra"),
        ("seed=1", "seed is what --seed gives"),
    ],
)
def test_what_set_does_not_take(given, message):
    with pytest.raises(ValueError, match=message):
        STAGE.read([given])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", "[1]", "holds no names"),
        ("a.json", '{"colour": 1}', "has colour; the names are n, "),
        ("a.json", '{"n": true}', "n takes a whole number"),
        ("a.json", '{"n": 1.5}', "n takes a whole number"),
        ("a.toml", "n = ", "cannot be read"),
        ("a.yaml", "n: 1", "give a .json or a .toml file"),
    ],
)
def test_what_no_file_of_fields_is(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        STAGE.read(None, tmp_path / name)


def test_the_names_are_listed_with_what_the_dataclass_says():
    assert options.documented(Stage) == {"n": "How many, in one line."}
    done = CliRunner().invoke(app, ["train", "--set", "help"])
    assert done.exit_code == 0
    assert "batch (a whole number; 2048): Rows a step." in done.stdout
    assert "tokens (" not in done.stdout  # has a flag
    for command in ("demo", "run", "index", "steer"):
        assert CliRunner().invoke(app, [command, "--set", "help"]).exit_code == 0


def commands(group, name=""):
    """Every command of a group and its groups, with its name."""
    for word, command in group.commands.items():
        told = f"{name} {word}".strip()
        if hasattr(command, "commands"):
            yield from commands(command, told)
        else:
            yield told, command


def test_every_commands_help_is_grouped_and_ends_in_an_example():
    found = dict(commands(typer.main.get_command(app)))
    assert len(found) >= 17
    for name, command in found.items():
        assert (command.epilog or "").startswith(f"Example: qsae {name} "), name
        given = [word for word in command.epilog.split() if word.startswith("--")]
        known = [option for one in command.params for option in one.opts]
        assert set(given) <= set(known), name  # the example's options are the command's
        for one in command.params:
            told = getattr(one, "help", None) or ""
            assert not re.search(r"\[[a-z_, ]+\]", told), (name, told)  # would be read as markup
            if one.opts[0] in ("--dtype", "--device"):
                assert one.rich_help_panel == "Machine", name

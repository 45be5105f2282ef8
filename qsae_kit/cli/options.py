"""The vocabulary: every option of the commands once, and those that are fields of a stage's
dataclass.
"""

import ast
import dataclasses
import inspect
import json
import textwrap
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer

SCALES = {"k": 1e3, "M": 1e6, "B": 1e9}
ON, FOLDER, MACHINE = "Data", "Output and settings", "Machine"
"""Groups of options in a command's help; the others come first."""
HELP = "help"
"""`--set help` lists the names."""

Model = Annotated[
    str,
    typer.Argument(
        help=(
            "tiny, smollm2, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b, a hub id such as"
            " Qwen/Qwen3-0.6B, or a local folder."
        )
    ),
]
Source = Annotated[
    str,
    typer.Argument(help="A folder of SAEs, or a release on the hub: see qsae suite show."),
]
OtherModel = Annotated[
    str | None,
    typer.Option("--model", help="Instead of the model that the suite names."),
]
Dtype = Annotated[
    str,
    typer.Option(
        help=(
            "Of the model's weights: float32, bfloat16, float16, or auto: on a CPU what it is"
            " faster in, on a GPU the checkpoint's own."
        ),
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda or cuda:1; a GPU where there is one by default.", rich_help_panel=MACHINE
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help=(
            "Chats or texts: a .jsonl, .json, .txt, .csv or .parquet file, a folder of them, or a"
            " data set's id, as NAME[:CONFIGURATION][:SPLIT][,column=NAME][,max_bad=SHARE]; tiny"
            " has its world."
        ),
        rich_help_panel=ON,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--data",
        help=(
            "Data recipe: qwen3-chat-v1, tiny-chat-v1, own-chat-v1 or a .json file; the model's own"
            " by default."
        ),
        rich_help_panel=ON,
    ),
]
Slots = Annotated[
    list[str] | None,
    typer.Option(
        "--slot",
        help="NAME=FILE: a file of your own in the place of a recipe's slot; may be given again.",
        rich_help_panel=ON,
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        help="Where downloaded data sets lie, each under its id, instead of the hub.",
        rich_help_panel=ON,
    ),
]
At = Annotated[
    str | None, typer.Option(help="Sites, as kinds@layers: resid,mlp@2-5, attn or @0,2.")
]
Places = Annotated[
    list[str] | None,
    typer.Option(
        "--at",
        help="Only these sites, as kinds@layers: resid,mlp@2-5, attn or @0,2; may be given again.",
    ),
]
Variants = Annotated[
    list[str] | None,
    typer.Option("--variant", help="Only this variant of the suite; may be given again."),
]
Arch = Annotated[
    str | None,
    typer.Option(help="jumprelu (the default), topk, batchtopk, matryoshka, standard or gated."),
]
L0 = Annotated[
    str | None,
    typer.Option(help="Features a token, the k of topk (the square root of d_model by default)."),
]
Expansion = Annotated[
    str | None, typer.Option(help="Width as a multiple of d_model (8 by default).")
]
Tokens = Annotated[str | None, typer.Option(help="Such as 20000, 200k or 2M.", rich_help_panel=ON)]
Seed = Annotated[int | None, typer.Option(help="Of everything drawn at random (0 by default).")]
Watch = Annotated[
    str | None, typer.Option(help="Log to tensorboard or wandb as well.", rich_help_panel=FOLDER)
]
Out = Annotated[Path, typer.Option(help="The folder to write to.", rich_help_panel=FOLDER)]
OutFile = Annotated[Path, typer.Option("--out", help="The file to write.", rich_help_panel=FOLDER)]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else.", rich_help_panel=FOLDER)
]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh", help="Start anew: a run that --out holds goes.", rich_help_panel=FOLDER
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A .json or .toml file with fields as --set takes them.",
        rich_help_panel=FOLDER,
    ),
]


def refuse(wrong: bool, message: str) -> None:
    """ValueError with a message where something is wrong."""
    if wrong:
        raise ValueError(message)


def count(flag: str, text: str) -> int:
    """20000 of "20000", "20k" or "0.02M". Raises ValueError for what is no positive number."""
    scale = SCALES.get(text[-1:], 1.0)
    try:
        value = float(text[:-1] if text[-1:] in SCALES else text) * scale
        whole = int(value) if value == int(value) else 0
    except (ValueError, OverflowError):
        whole = 0
    refuse(
        whole < 1,
        f"{flag} {text!r} was given; write a whole number above 0, such as 20000, 200k or 2M.",
    )
    return whole


def counts(flag: str, text: str | None) -> list[int]:
    """The numbers of "500k,2M"; none of None. Raises ValueError as `count`."""
    return [] if text is None else [count(flag, part.strip()) for part in text.split(",")]


def numbers(flag: str, text: str | None) -> list[float]:
    """The numbers of "8,16"; none of None. Raises ValueError for what is not above 0."""
    if text is None:
        return []
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    refuse(
        min(found) <= 0, f"{flag} {text!r} was given; write positive numbers with commas between."
    )
    return [int(value) if value.is_integer() else value for value in found]


def pairs(flag: str, entries: Sequence[str] | None) -> dict[str, str]:
    """{"name": value} of "name=value". Raises ValueError for what is written otherwise."""
    for entry in entries or ():
        refuse(
            not all(entry.partition("=")[::2]), f"{flag} {entry} was given; write it as NAME=VALUE."
        )
    return {name: value for name, _, value in (entry.partition("=") for entry in entries or ())}


def files(flag: str, entries: Sequence[str] | None) -> dict[str, str]:
    """`pairs` whose values are files, read as `data.readers.parse_source` says. Raises ValueError
    for one that is not there.
    """
    from qsae_kit.data.readers import parse_source

    given = pairs(flag, entries)
    for path in given.values():
        refuse(
            not parse_source(path).is_file, f"There is no file {path!r}; {flag} takes NAME=FILE."
        )
    return given


# --- fields of dataclasses


class Field(NamedTuple):
    """One field that `--set` takes."""

    name: str
    hint: Any
    default: str
    help: str


@dataclass(frozen=True)
class Settings:
    """The fields of dataclasses as `--set NAME=VALUE` and `--config FILE`; help, default and type
    are the dataclass's.
    """

    homes: tuple[str, ...]
    """Where the dataclasses are: "qsae_kit.train.recipe:TrainConfig"; loaded when asked for."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Field -> the flag that gives it, which `--set` then does not."""

    def option(self) -> Any:
        """The option `--set`, whose value help prints the names."""
        classes = " and ".join(home.partition(":")[2] for home in self.homes)
        return typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help=f"A field of {classes}; --set help lists them; may be given again.",
            callback=self._listed,
            is_eager=True,
            rich_help_panel=FOLDER,
        )

    def _listed(self, value: list[str] | None) -> list[str] | None:
        if HELP in (value or ()):
            for one in self.fields():
                if one.name not in self.flags:
                    told = f"{one.name} ({said(one.hint)}; {one.default})"
                    typer.echo(f"{told}: {one.help}" if one.help else told)
            raise typer.Exit
        return value

    def fields(self) -> Iterator[Field]:
        """Every field that an option can give."""
        for home in self.homes:
            module, _, name = home.partition(":")
            cls = getattr(import_module(module), name)
            hints, helps = get_type_hints(cls), documented(cls)
            for one in dataclasses.fields(cls):
                if said(hints[one.name]):
                    yield Field(one.name, hints[one.name], _default(one), helps.get(one.name, ""))

    def read(
        self, given: Sequence[str] | None, config: Path | None = None, **flags: Any
    ) -> dict[str, Any]:
        """Values by name: of the flags that are not None, else of --set, else of the file.

        Raises ValueError for a name that is none, a value of another type, and a file that cannot
        be read.
        """
        known = {one.name: one for one in self.fields()} if given or config else {}
        read: dict[str, Any] = {}
        for name, value in (_file_values(config) if config is not None else {}).items():
            _check_name(name, known, f"{str(config)!r} has {name}")
            read[name] = checked(name, known[name].hint, value)
        for entry, text in pairs("--set", given).items():
            name, _, part = entry.partition(".")
            flag = self.flags.get(name)
            refuse(flag is not None, f"--set {entry} was given; {name} is what {flag} gives.")
            mine = {n: one for n, one in known.items() if n not in self.flags}
            _check_name(name, mine, f"--set {entry} was given")
            mapped = bool(part) and _is_mapping(known[name].hint)
            refuse(
                bool(part) and not mapped,
                f"--set {entry} was given; {name} takes {said(known[name].hint)}.",
            )
            value = {**read.get(name, {}), part: plain(text)} if mapped else text
            read[name] = checked(name, known[name].hint, value)
        return read | {name: value for name, value in flags.items() if value is not None}


def of(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are fields of a dataclass."""
    names = {one.name for one in dataclasses.fields(cls)}
    return {name: value for name, value in given.items() if name in names}


def documented(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, in one line."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for above, below in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(above, ast.AnnAssign)
            and isinstance(above.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[above.target.id] = " ".join(str(below.value.value).split())
    return found


def said(hint: Any) -> str:
    """What a type takes, in words; "" for one that no option can give."""
    words = list(dict.fromkeys(_word(part) for part in _alternatives(hint)))
    return "" if "" in words else " or ".join(words)


def _word(part: Any) -> str:
    origin = get_origin(part)
    if origin is Literal:
        return " or ".join(str(value) or "nothing" for value in get_args(part))
    if origin is tuple and get_args(part)[1:] == (...,):
        inner = said(get_args(part)[0])
        return f"several of {inner}, with commas between" if inner else ""
    if _is_mapping(part):
        return ".NAME=VALUE"
    known = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        Path: "a path",
        type(None): "none",
    }
    return known.get(part, "")


def _alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [part for inner in get_args(hint) for part in _alternatives(inner)]
    return [hint]


def _is_mapping(hint: Any) -> bool:
    return any(
        inspect.isclass(get_origin(part)) and issubclass(get_origin(part), Mapping)
        for part in _alternatives(hint)
    )


def checked(name: str, hint: Any, value: Any) -> Any:
    """A value, or its text, as a field's type. Raises ValueError for another type."""
    for part in _alternatives(hint):
        try:
            return _as(part, value)
        except (ValueError, TypeError, LookupError, OverflowError):
            continue
    raise ValueError(f"{name}={value} was given; {name} takes {said(hint)}.")


def _as(part: Any, value: Any) -> Any:
    """A value as one type. Raises ValueError or TypeError where it is none."""
    origin = get_origin(part)
    if origin is Literal:
        if value in get_args(part):
            return value
    elif origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(checked("", get_args(part)[0], one) for one in parts)
    elif _is_mapping(part):
        if isinstance(value, Mapping):
            return dict(value)
    elif part is type(None):
        if value in (None, "none"):
            return None
    elif part is bool:
        return value if isinstance(value, bool) else {"true": True, "false": False}[value]
    elif part in (str, Path):
        if isinstance(value, str):
            return part(value)
    elif isinstance(value, bool):
        raise TypeError
    elif part is float:
        return float(value)
    elif part is int:
        return int(value) if isinstance(value, int) else _whole(value)
    raise ValueError


def _whole(text: Any) -> int:
    """0, negative numbers and `count`."""
    if not isinstance(text, str):
        raise TypeError
    digits = text.removeprefix("-")
    return int(text) if digits.isdecimal() else count("", text)


def plain(text: str) -> float | str:
    """A text that reads as a number as that number."""
    try:
        return float(text)
    except ValueError:
        return text


def _default(one: "dataclasses.Field[Any]") -> str:
    if one.default is dataclasses.MISSING:
        return "given by the command" if one.default_factory is dataclasses.MISSING else "none"
    if isinstance(one.default, tuple):
        return ",".join(map(str, one.default))
    if isinstance(one.default, bool):
        return str(one.default).lower()
    return {None: "none", "": "nothing"}.get(one.default, str(one.default))


def _check_name(name: str, known: Mapping[str, Field], given: str) -> None:
    refuse(name not in known, f"{given}; the names are {', '.join(known)}.")


def _file_values(path: Path) -> dict[str, Any]:
    """What a .json or .toml file says. Raises ValueError for one that cannot be read."""
    readers = {".json": json.loads, ".toml": tomllib.loads}
    refuse(path.suffix not in readers, f"--config {path} was given; give a .json or a .toml file.")
    try:
        values = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path} cannot be read ({error}); mend the file.") from error
    refuse(not isinstance(values, dict), f"--config {path} holds no names with values.")
    return dict(values)

"""What all pages share, of reports and of widgets: frame, styles, scripts, and how text gets there.

A page needs no network. Text of models, data and users is escaped by the template, or reaches the
page as JSON and is shown with `textContent`.
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

HERE = Path(__file__).parent
SCRIPT, STYLE = "common.js", "common.css"
"""Of tokens in a line, numbers and whatever else is drawn by the browser."""
SIGNS = str.maketrans({"\n": "\u23ce", "\r": "\u240d", "\t": "\u21e5"})


def part(name: str) -> str:
    """The text of a file that pages share."""
    return (HERE / name).read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """JSON that is safe inside a script element. Raises ValueError for NaN and infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def visible(text: str) -> str:
    """A token or label with signs for line breaks and tabs, which would not be seen."""
    return text.translate(SIGNS)


def template(path: Path) -> Template:
    """A page's template, which may extend `page.html.jinja` and take macros from
    `parts.html.jinja`; what it is given is escaped, and a name that is not given is an error.
    """
    environment = Environment(
        loader=FileSystemLoader([path.parent, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(path.name)

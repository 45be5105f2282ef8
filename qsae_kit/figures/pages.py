"""What all pages share, of reports and of widgets: frame, styles, scripts, and how text gets there.

A page needs no network. Text of models, data and users is escaped by the template, or reaches the
page as JSON and is shown with `textContent`.
"""

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

HERE = Path(__file__).parent
SCRIPT, STYLE = "common.js", "common.css"
"""Of tokens in a line, numbers and whatever else is drawn by the browser."""
SIGNS = {"\n": "\u23ce", "\r": "\u240d", "\t": "\u21e5"}
UNSEEN = re.compile(
    "[\\u0000-\\u001f\\u007f-\\u009f\\u00ad\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff]"
)
"""Characters that are not seen, or that turn what follows round; the same as in `SCRIPT`."""


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
    """A text with signs for what would not be seen: line breaks, tabs, control characters and those
    that turn the direction of writing.
    """
    return UNSEEN.sub(lambda found: SIGNS.get(found[0], f"\u27e8{ord(found[0]):04x}\u27e9"), text)


def _told(value: Any) -> Any:
    """What a page prints: text with signs as `visible`, lines and tabs left as they are."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return UNSEEN.sub(lambda found: found[0] if found[0] in "\n\t" else visible(found[0]), value)


def template(path: Path) -> Template:
    """A page's template, which may extend `page.html.jinja` and take macros from
    `parts.html.jinja`; what it is given is escaped, and a name that is not given is an error.
    """
    environment = Environment(
        loader=FileSystemLoader([path.parent, HERE]),
        autoescape=True,
        finalize=_told,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(path.name)

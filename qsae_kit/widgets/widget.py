"""What all widgets share: their files, a status line, and an HTML page that works without a kernel.

The JavaScript is what all pages share (`figures.pages`) and the widget's own module, put together
without a build step.
Whatever comes from a model, a data set or a user reaches the page as JSON and is shown with
`textContent`, so that it stays text.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anywidget
import traitlets as T
from IPython.core.getipython import get_ipython
from IPython.display import display

from qsae_kit.figures.pages import SCRIPT, STYLE, as_json, part
from qsae_kit.io.files import write_text

HERE = Path(__file__).parent


def source(*names: str) -> str:
    """A widget's script: what all pages share, then files beside this one."""
    own = [(HERE / name).read_text(encoding="utf-8") for name in names]
    return "\n".join([part(SCRIPT), *own])


_made: dict[str, tuple[str, list["View"]]] = {}
"""By notebook cell: the run of it, and the widgets that the run made."""


def _close_former(widget: "View") -> None:
    """Closes what earlier runs of the running cell made: ipywidgets keeps every widget, and the
    page its model, for ever.
    """
    shell = get_ipython()  # type: ignore[no-untyped-call]
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    cell, run = parent.get("metadata", {}).get("cellId"), parent.get("header", {}).get("msg_id", "")
    if parent.get("header", {}).get("msg_type") != "execute_request" or not cell:
        return
    former, widgets = _made.get(cell, (run, []))
    if former != run:
        for old in widgets:
            old.close()
        widgets = []
    _made[cell] = (run, [*widgets, widget])


class View(anywidget.AnyWidget):
    """A widget of this package. When its cell is run again, the new one takes its place and this
    one is closed.
    """

    _css = part(STYLE)
    status = T.Unicode("").tag(sync=True)
    """A line below the widget: what it is doing, or what went wrong."""

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        _close_former(self)
        # ipykernel (7.4) sends a page's messages to where the widget last spoke from, a cell that
        # runs, whatever the page asked for
        if hasattr(self.comm, "_reply_subshell_for"):
            self.comm._reply_subshell_for = self._arrived

    def close(self) -> None:
        """Ends the widget, and the layout that it alone has, which ipywidgets would keep."""
        layout = self.layout
        super().close()
        layout.close()

    def _arrived(self, data: Any, wanted: str | None) -> str | None:
        """Called as soon as a message of the page arrives, by the thread that receives it; gives
        the subshell that is to handle it: the one that the page wanted.
        """
        if isinstance(data, Mapping) and isinstance(content := data.get("content"), Mapping):
            self.hear(content)
        return wanted

    def hear(self, message: Mapping[str, Any]) -> None:
        """What cannot wait until a running cell has ended; `answer` is called for it later too."""

    def offline(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state of a page without a kernel, and its answers: {op: {argument as text:
        reply}}.
        """
        return {
            name: getattr(self, name)
            for name in self.trait_names(sync=True)
            if not name.startswith("_")
        }, {}

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """A page that needs neither kernel nor network: its text, or written to `path` its path."""
        page = self.page_text()
        if path is None:
            return page
        write_text(Path(path), page)
        return Path(path)

    def page_text(self) -> str:
        """The page of `to_html`."""
        state, answers = self.offline()
        kernel = (HERE / "offline.js").read_text(encoding="utf-8")
        hidden = {"layout", "tabbable", "tooltip"}
        payload = as_json(
            {"state": {k: v for k, v in state.items() if k not in hidden}, "answers": answers}
        )
        return "\n".join(
            [
                "<!doctype html>",
                '<html lang="en"><head><meta charset="utf-8">',
                (
                    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
                    " style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">"
                ),
                '<meta name="viewport" content="width=device-width">',
                f"<title>qsae_kit: {type(self).__name__}</title>",
                f"<style>{self._css}\nbody{{margin:1em}}</style></head><body><main></main>",
                f'<script type="application/json">{payload}</script>',
                f'<script type="module">{self._esm}\n{kernel}</script>',
                "</body></html>",
                "",
            ]
        )

    def fallback(self) -> str:
        """Plain HTML, all of it escaped, for where widgets do not run."""
        return ""

    def _ipython_display_(self) -> None:
        """The widget, and an output of its own for where a saved notebook is opened without it:
        hidden as long as there is the widget, which brings the style for it.
        """
        bundle = super()._repr_mimebundle_()
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        display(data, metadata=metadata, raw=True)
        if text := self.fallback():
            display({"text/html": f'<div class="qsae-fallback">{text}</div>'}, raw=True)

    def complain(self, error: Exception) -> None:
        """Says what is wrong below the widget; and answers, for the same words twice are no change
        that the page is told of.
        """
        expected = isinstance(error, ValueError)
        self.status = str(error) if expected else f"{type(error).__name__}: {error}"
        self.send({"op": "answered"})

    def answer(self, message: Mapping[str, Any]) -> None:
        """What the page asks for; errors go to the status line, where a cell would not show
        them.
        """
        try:
            if message.get("op") == "save":
                name = f"{type(self).__name__.lower()}.html"
                self.send({"op": "saved", "name": name, "text": self.page_text()})
            else:
                self.handle(message)
        except ValueError as error:
            self.complain(error)
        except Exception as error:  # which JupyterLab shows in its log alone
            self.complain(error)
            raise

    def handle(self, message: Mapping[str, Any]) -> None:
        """Answers one message of the page."""

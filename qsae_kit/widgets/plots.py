"""Plotly figures in a widget; the page fetches plotly.js from the kernel once, however many figures
it shows.
"""

import functools
import gzip
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly
import plotly.graph_objects as go
import traitlets as T

from qsae_kit.widgets.widget import View, source


@functools.cache
def library() -> bytes:
    """plotly.js, compressed."""
    return gzip.compress(
        (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_bytes(), 6
    )


class PlotView(View):
    """One or several figures. `figures` holds their JSON; `show` replaces them."""

    _esm = source("common.js", "plots.js")
    figures = T.List(T.Unicode()).tag(sync=True)

    def __init__(self, *figures: go.Figure, **traits: Any) -> None:
        self._figures = list(figures)
        super().__init__(figures=[figure.to_json() for figure in figures], **traits)
        self.on_msg(lambda _widget, message, _buffers: self.answer(message))

    def show(self, *figures: go.Figure) -> None:
        """Replaces the figures."""
        self._figures = list(figures)
        self.figures = [figure.to_json() for figure in figures]

    def handle(self, message: Mapping[str, Any]) -> None:
        if message.get("op") == "library":
            self.send({"op": "library"}, buffers=[library()])

    def to_html(self, path: str | Path | None = None) -> str:
        page = super().to_html()
        code = (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_text(
            encoding="utf-8"
        )
        page = page.replace("<main></main>", f"<main></main>\n<script>{code}</script>", 1)
        if path is not None:
            from qsae_kit.io.files import write_text

            write_text(Path(path), page)
        return page

    def fallback(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>"

    def __repr__(self) -> str:
        titles = [str(figure.layout.title.text or "") for figure in self._figures]
        return f"{type(self).__name__}({', '.join(titles)})"

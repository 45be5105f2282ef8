"""Plotly figures in a widget, which brings plotly.js along; the page reads it once, however many
figures it shows.
"""

import functools
import gzip
import html
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

    _esm = source("plots.js")
    figures = T.List(T.Unicode()).tag(sync=True)
    _library = T.Bytes().tag(sync=True)
    """plotly.js, compressed: it travels with the widget."""

    def __init__(self, *figures: go.Figure, **traits: Any) -> None:
        self._figures = list(figures)
        texts = [figure.to_json() for figure in figures]
        super().__init__(figures=texts, _library=library(), **traits)
        self.on_msg(lambda _widget, message, _buffers: self.answer(message))

    def show(self, *figures: go.Figure) -> None:
        """Replaces the figures."""
        self._figures = list(figures)
        self.figures = [figure.to_json() for figure in figures]

    def page_text(self) -> str:
        page = super().page_text()
        code = (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_text(
            encoding="utf-8"
        )
        return page.replace("<main></main>", f"<main></main>\n<script>{code}</script>", 1)

    def fallback(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>"

    def __repr__(self) -> str:
        titles = [str(figure.layout.title.text or "") for figure in self._figures]
        return f"{type(self).__name__}({', '.join(titles)})"

"""Progress: in a terminal tqdm's bars and lines on stderr; in a notebook, which shows stderr as an
error, bars that are widgets and leave nothing behind in the cell, and lines on stdout.

Threads have neither there, since both would come out below whatever cell runs just then: what does
its work in one, as a widget does, shows how it goes itself.
"""

import sys
import textwrap
import threading
from typing import Any

from tqdm.auto import tqdm as auto

IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in auto.__mro__)
"""Whether this is a notebook's kernel that has widgets."""
STEADY = 0.05
"""Weight of the newest pace in the time that is left; tqdm's own, 0.3, lets it jump."""
VIEW = "application/vnd.jupyter.widget-view+json"
GONE = {VIEW: {"version_major": 2, "version_minor": 0, "model_id": ""}}
"""What JupyterLab saves of a widget that was closed, and shows nothing for."""


class tqdm(auto):
    """tqdm's bar. In a notebook it goes when it is done, and stays, red, after an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not IN_NOTEBOOK:
            super().__init__(*args, **{"smoothing": STEADY, "dynamic_ncols": True} | kwargs)
            return
        if beside_a_cell():
            kwargs["disable"] = True
        super().__init__(*args, **{"smoothing": STEADY} | kwargs, display=False)
        if not self.disable:
            from IPython.display import display

            # without a text, which a saved notebook would show as a bar at 0 %
            view = {VIEW: self.container._repr_mimebundle_()[VIEW]}
            self.shown = display(view, raw=True, display_id=True)

    def stretch(self, total: float) -> None:
        """Says how long the bar is, where that is known better than before."""
        self.total = total
        if IN_NOTEBOOK and not self.disable:
            self.container.children[1].max = total
        self.refresh()

    def skip(self, n: float) -> None:
        """Moves the bar by what took no time, so that the pace does not count it."""
        self.n += n
        self.initial += n
        self.last_print_n += n
        self.refresh()

    def close(self) -> None:
        begun = not self.disable
        failed = sys.exc_info()[0] is not None
        super().close()
        if IN_NOTEBOOK and begun and not failed:
            self.container.close()
            self.shown.update(GONE, raw=True)


def beside_a_cell() -> bool:
    """Whether this is a thread of a notebook's kernel, not the one that runs cells."""
    return IN_NOTEBOOK and threading.current_thread() is not threading.main_thread()


WIDTH = 78
"""Characters of a line in a terminal."""


def say(text: str) -> None:
    """A sentence above a progress bar, in a terminal in lines that fit."""
    if IN_NOTEBOOK and not beside_a_cell():
        tqdm.write(text, file=sys.stdout)
    elif not IN_NOTEBOOK:
        wrapper = textwrap.TextWrapper(WIDTH, break_long_words=False, break_on_hyphens=False)
        tqdm.write("\n".join(map(wrapper.fill, text.splitlines())), file=sys.stderr)

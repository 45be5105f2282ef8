"""Progress in a notebook: widgets that leave nothing behind, lines that are not red."""

import nbclient
import nbformat
import pytest

from qsae_kit.io.progress import GONE, VIEW

CELLS = (
    """
from qsae_kit.io.progress import say, tqdm
with tqdm(total=5, desc="shorter than it was said") as bar:
    bar.update(3)
    say("a line")
for _ in tqdm(range(3)):
    pass
""",
    """
import threading
thread = threading.Thread(target=lambda: (list(tqdm(range(3))), say("a line")))
thread.start()
thread.join()
""",
    "for _ in tqdm(range(3), disable=True): pass",
    "for _ in tqdm(range(3)): 1 / 0",
)


@pytest.fixture(scope="module")
def outputs():
    """What each cell leaves in a saved notebook."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    client = nbclient.NotebookClient(book, allow_errors=True, kernel_name="python3")
    client.execute()
    return [cell["outputs"] for cell in book.cells]


def test_a_bar_is_gone_when_it_is_done(outputs):
    first, line, second = outputs[0]
    assert first["data"] == second["data"] == GONE
    assert line["name"] == "stdout"
    assert line["text"] == "a line\n"


def test_threads_and_silent_callers_show_nothing(outputs):
    assert outputs[1] == outputs[2] == []


def test_after_an_error_the_bar_stays(outputs):
    bar, error = outputs[3]
    assert bar["data"][VIEW]["model_id"]
    assert list(bar["data"]) == [VIEW]
    assert error["ename"] == "ZeroDivisionError"


def test_in_a_terminal_lines_go_to_stderr(capsys):
    from qsae_kit.io.progress import say, tqdm

    with tqdm(total=3, desc="here") as bar:
        bar.update(3)
    say("a line")
    out, err = capsys.readouterr()
    assert not out
    assert "here: 100%" in err
    assert err.endswith("a line\n")

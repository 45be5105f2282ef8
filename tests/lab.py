"""A JupyterLab of its own and a headless Chromium, for tests of what is on the screen."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
from axe_playwright_python.sync_playwright import Axe

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}
LOCAL = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:", "file:")


OTHERS = "jupyterlab-plotly/static"
"""Where the extension comes from that draws plotly's figures outside of widgets; what fails there
on a figure that is told anew while the page resizes is not of this package."""


class Seen:
    """A page, and what went wrong on it."""

    def __init__(self, page):
        self.page, self.errors, self.outside = page, [], []
        page.on("console", self._said)
        page.on("pageerror", lambda error: self._failed(f"{error.message}\n{error.stack}"))
        page.on(
            "request", lambda r: self.outside.append(r.url) if not r.url.startswith(LOCAL) else None
        )

    def _said(self, message):
        if message.type == "error" and OTHERS not in message.location.get("url", ""):
            self.errors.append(message.text)

    def _failed(self, error):
        if OTHERS not in error:
            self.errors.append(error)


def shot(seen, name):
    """A picture of the page, where QSAE_SCREENSHOTS names a folder for them."""
    if folder := os.environ.get("QSAE_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        seen.page.screenshot(path=str(Path(folder) / f"{name}.png"))


def serious(page, within=None):
    """Violations that keep people out, as axe-core tells them."""
    found = Axe().run(page, context=within).response["violations"]
    return [
        f"{one['id']}: {node['html'][:160]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@contextmanager
def browser(playwright, width=1200, height=1600, dark=False):
    """A page of a browser with a profile of its own. playwright: what `sync_playwright()` gives; a
    process has one.
    """
    with tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
        )
        try:
            yield Seen(context.pages[0] if context.pages else context.new_page())
        finally:
            context.close()


@contextmanager
def jupyter_lab(root, dark=False):
    """A server on a folder, with settings, workspaces and runtime files of its own; gives the
    address of a notebook.
    """
    with tempfile.TemporaryDirectory(prefix="lab-") as folder, socket.socket() as probe:
        own = Path(folder)
        settings = SETTINGS | (
            {"@jupyterlab/apputils-extension:themes": {"theme": "JupyterLab Dark"}} if dark else {}
        )
        for name, value in settings.items():
            extension, _, plugin = name.partition(":")
            path = own / "settings" / extension / f"{plugin}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value))
        probe.bind(("127.0.0.1", 0))
        port, token = probe.getsockname()[1], secrets.token_hex(16)
        probe.close()
        variables = {
            name: str(own / name.lower())
            for name in (
                "JUPYTER_CONFIG_DIR",
                "JUPYTER_RUNTIME_DIR",
                "IPYTHONDIR",
                "JUPYTERLAB_WORKSPACES_DIR",
            )
        }
        environment = (
            os.environ
            | variables
            | {
                "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
                "JUPYTER_PREFER_ENV_PATH": "1",
                "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            }
        )
        with (own / "log").open("w") as log:
            server = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "jupyterlab",
                    "--no-browser",
                    "--allow-root",
                    f"--ServerApp.root_dir={root}",
                    "--ServerApp.ip=127.0.0.1",
                    f"--ServerApp.port={port}",
                    "--ServerApp.port_retries=0",
                    f"--IdentityProvider.token={token}",
                    "--LabApp.expose_app_in_browser=True",
                    "--LabApp.extension_manager=readonly",
                    "--LabApp.news_url=None",
                    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
                ],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                for _ in range(600):
                    if server.poll() is not None:
                        raise RuntimeError((own / "log").read_text()[-2000:])
                    try:
                        urllib.request.urlopen(
                            f"http://127.0.0.1:{port}/api/status?token={token}", timeout=1
                        ).read()
                        break
                    except OSError:
                        time.sleep(0.1)
                yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}?reset&token={token}"
            finally:
                server.terminate()
                try:
                    server.wait(10)
                except subprocess.TimeoutExpired:
                    server.kill()


def write_notebook(path, cells):
    """A notebook of code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(notebook, path)


IDLE = """() => { const s = window.jupyterapp.shell.currentWidget?.sessionContext;
    const k = s?.session?.kernel;
    return !!(s && s.isReady && k && k.connectionStatus === 'connected' && k.status === 'idle') }"""
DONE = """() => { const nb = window.jupyterapp.shell.currentWidget.content;
    return nb.widgets
        .filter((c) => c.model.type === 'code' && c.model.sharedModel.getSource().trim())
        .every((c) => c.model.executionState === 'idle' && c.model.executionCount !== null) }"""


def open_notebook(page, address, timeout=90_000):
    """Opens a notebook and waits for its kernel (the toolbar says idle before there is one)."""
    page.goto(address, wait_until="domcontentloaded")
    page.wait_for_function("() => window.jupyterapp && window.jupyterapp.restored", timeout=timeout)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=timeout)
    page.wait_for_function(IDLE, timeout=timeout)


def run_all(page, timeout=180_000):
    """Runs all cells and waits for the last one."""
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    page.wait_for_function(DONE, timeout=timeout)


def run_cell(page, number, timeout=60_000):
    """Runs one cell again and waits for it."""
    count = (
        "() =>"
        f" window.jupyterapp.shell.currentWidget.content.widgets[{number}].model.executionCount"
    )
    before = page.evaluate(count)
    page.evaluate(
        "() => { const nb = window.jupyterapp.shell.currentWidget.content; nb.deselectAll();"
        f" nb.activeCellIndex = {number};"
        " window.jupyterapp.commands.execute('notebook:run-cell') }"
    )
    page.wait_for_function(
        f"({count})() !== {json.dumps(before)} && ({count})() !== null", timeout=timeout
    )
    page.wait_for_function(DONE, timeout=timeout)

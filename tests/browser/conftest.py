"""JupyterLab and Chromium for the tests that look at the page."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# JupyterLab that ends with the process that started it: its standard input closes when that one is killed.
SERVER = """
import os, signal, sys, threading

def follow():
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=follow, daemon=True).start()
from jupyterlab.labapp import main
sys.exit(main())
"""
PATIENCE = 60_000  # ms: how long a page may take before a test fails
# What a kernel imports while its page is still loading; polrl itself is for the notebook's cells to import.
LIBRARIES = "import anywidget, gymnasium, ipywidgets, matplotlib.pyplot, pandas, torch, torch.func, tsdownsample\n"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)


def find_chromium() -> str | None:
    """Return the path of a Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("POLRL_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def _absent(reason: str) -> None:
    if os.environ.get("POLRL_REQUIRE_BROWSER") == "1":
        pytest.fail(f"POLRL_REQUIRE_BROWSER=1, but {reason}", pytrace=False)
    pytest.skip(reason)


class JupyterServer:
    """A JupyterLab of its own: free port, token, homes and notebooks in a temporary folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.notebooks = folder / "notebooks"
        self.notebooks.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ending: list[threading.Thread] = []
        self.url, self.token = f"http://127.0.0.1:{port}", "polrl-tests"
        homes = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
        homes |= {name: str(folder / name.lower()) for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "HOME")}
        homes |= {name: str(folder / name.lower()) for name in ("JUPYTERLAB_WORKSPACES_DIR", "JUPYTERLAB_SETTINGS_DIR")}
        for path in homes.values():
            pathlib.Path(path).mkdir(exist_ok=True)
        quiet = pathlib.Path(homes["JUPYTERLAB_SETTINGS_DIR"], "@jupyterlab", "apputils-extension")
        quiet.mkdir(parents=True)
        (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
        startup = pathlib.Path(homes["IPYTHONDIR"], "profile_default", "startup")
        startup.mkdir(parents=True)
        (startup / "00-libraries.py").write_text(LIBRARIES)
        roots = [str(ROOT), str(ROOT / "widgets"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | homes | {"PYTHONPATH": os.pathsep.join(filter(None, roots))}
        self.log = (folder / "server.log").open("w")
        options = [
            "--no-browser",
            "--expose-app-in-browser",
            f"--port={port}",
            "--ServerApp.port_retries=0",
            "--allow-root",
        ]
        options += [f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={self.notebooks}"]
        options += [
            "--LabApp.news_url=None",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *options],
            stdin=subprocess.PIPE,
            cwd=self.notebooks,
            env={name: value for name, value in environment.items() if name != "POLRL_MODE"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self._wait()

    def _wait(self) -> None:
        for _ in range(300):
            if self.process.poll() is not None:
                break
            try:
                self.ask("kernels")
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
            else:
                return
        raise RuntimeError(f"JupyterLab did not start; see {self.log.name}")

    def ask(self, path: str, method: str = "GET", content: object = None) -> Any:
        """Call the server's REST interface."""
        headers = {"Authorization": f"token {self.token}", "Content-Type": "application/json"}
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.url}/api/{path}", data=body, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read() or b"null")

    def close(self) -> None:
        """Stop the server and its kernels."""
        for ending in self.ending:
            ending.join()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()

    def start_kernel(self, notebook: str) -> str:
        """Start the kernel that a notebook's page will find; return the session's id."""
        kernel = {"path": notebook, "name": notebook, "type": "notebook", "kernel": {"name": "python3"}}
        return self.ask("sessions", method="POST", content=kernel)["id"]

    def end_kernel(self, session: str) -> None:
        """End a session's kernel, which takes a while that nobody needs to wait for."""
        ending = threading.Thread(target=self.ask, args=(f"sessions/{session}", "DELETE"), daemon=True)
        ending.start()
        self.ending.append(ending)


class NotebookPage:
    """One notebook in JupyterLab: writes it, opens it, runs it.

    Attributes
    ----------
    page : playwright Page
    errors : list of str
        What the page wrote to its console as errors, and uncaught exceptions.
    received : list of int
        Sizes of the messages that came to the page.
    """

    def __init__(self, browser: Browser, server: JupyterServer, name: str, cells: Sequence[str]) -> None:
        self.server, self.name = server, name
        self.errors: list[str] = []
        path = server.notebooks / name
        path.write_text(json.dumps(_notebook(cells)))
        self.session = server.start_kernel(name)  # it gets ready while the page is loading
        self.count, self.has_scratch = len(cells), False
        self.context = browser.new_context(viewport={"width": 1366, "height": 900}, device_scale_factor=1)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._hear)
        self.received: list[int] = []
        self.page.on("websocket", lambda socket: socket.on("framereceived", self._receive))

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def _receive(self, frame: str | bytes) -> None:
        self.received.append(len(frame))

    def reload(self) -> NotebookPage:
        """Save the notebook and load the page again."""
        self.command("docmanager:save")
        self.page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty")
        self.page.reload()
        return self.wait_kernel()

    def open(self) -> NotebookPage:
        """Open the notebook alone, with no tab of an earlier test."""
        self.page.goto(f"{self.server.url}/lab/tree/{self.name}?reset&token={self.server.token}")
        return self.wait_kernel()

    def wait_kernel(self) -> NotebookPage:
        """Wait until the notebook is there and its kernel idle."""
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_function(
            "() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )
        return self

    def command(self, name: str, **arguments: object) -> None:
        """Run one of JupyterLab's commands."""
        script = "([name, args]) => window.jupyterapp.commands.execute(name, args)"
        self.page.evaluate(script, [name, arguments])

    def run_all(self) -> NotebookPage:
        """Run all cells and wait until the last has its number."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.page.wait_for_function(
            """count => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
                 .filter(prompt => /\\[\\d+\\]/.test(prompt.textContent)).length >= count""",
            arg=self.count,
        )
        return self

    def run_cell(self, place: int) -> NotebookPage:
        """Run one cell, counted from 0, and wait until it is done."""
        cell = self.page.locator(".jp-CodeCell").nth(place)
        prompt = cell.locator(".jp-InputPrompt")
        before = prompt.inner_text()
        cell.locator(".cm-content").click()
        self.command("notebook:run-cell")
        self.page.wait_for_function(
            "([e, before]) => /\\[\\d+\\]/.test(e.textContent) && e.textContent !== before",
            arg=[prompt.element_handle(), before],
        )
        return self

    def wait_lab(self) -> NotebookPage:
        """Wait until a lab is on the page; where none comes, say what the notebook shows instead."""
        from playwright.sync_api import TimeoutError as Late

        try:
            self.page.wait_for_selector(".polrl-lab .polrl-chart canvas")
        except Late:
            shown = [cell.inner_text() for cell in self.page.locator(".jp-CodeCell").all()]
            raise AssertionError(f"no lab came; the cells show {shown}, the console says {self.errors}") from None
        return self

    def wait_steps(self, least: int) -> None:
        """Wait until every run on the page shows at least so many steps."""
        self.page.wait_for_function(
            """least => { const shown = [...document.querySelectorAll('.polrl-step')];
                         return shown.length > 0 && shown.every(e => Number(e.dataset.value) >= least); }""",
            arg=least,
        )

    def type_value(self, knob: str, value: str, which: int = 0) -> None:
        """Type a knob's value, as a hand would; `which` counts the runs that have it."""
        box = self.page.locator(f".polrl-value-{knob} input").nth(which)
        box.fill(value)
        box.press("Enter")

    def read(self, expression: str) -> str:
        """Return what the kernel says an expression is."""
        return self.run_code(f"print({expression})")

    def run_code(self, code: str) -> str:
        """Run code in the notebook's kernel, in a cell after all others; return the text it prints."""
        cells = self.page.locator(".jp-CodeCell")
        if not self.has_scratch:
            self.has_scratch = True
            for _ in range(self.count):
                self.command("notebook:move-cursor-down")
            self.command("notebook:insert-cell-below")
            self.page.wait_for_function("n => document.querySelectorAll('.jp-CodeCell').length > n", arg=self.count)
        # A cell that is scrolled out of sight is not on the page at all.
        self.page.evaluate("place => window.jupyterapp.shell.currentWidget.content.scrollToItem(place)", self.count)
        cells.nth(self.count).locator(".cm-content").fill(code)
        self.run_cell(self.count)
        output = cells.nth(self.count).locator(".jp-OutputArea-output")
        return "\n".join(output.all_inner_texts()).strip()

    def text(self, selector: str) -> str:
        """Return the text of the first element that matches."""
        return self.page.locator(selector).first.inner_text()

    def wait_text(self, selector: str, text: str) -> None:
        """Wait until an element shows exactly this text."""
        self.page.wait_for_function(
            "([css, text]) => [...document.querySelectorAll(css)].some(e => e.textContent === text)",
            arg=[selector, text],
        )

    def close(self) -> None:
        """Close the page and end the notebook's kernel."""
        self.context.close()
        self.server.end_kernel(self.session)


def _notebook(cells: Sequence[str]) -> dict[str, object]:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    code = [
        {
            "cell_type": "code",
            "id": f"cell{i}",
            "metadata": {},
            "source": text,
            "outputs": [],
            "execution_count": None,
        }
        for i, text in enumerate(cells)
    ]
    return {"cells": code, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """A running JupyterLab."""
    server = JupyterServer(tmp_path_factory.mktemp("jupyter"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium; without one the test is skipped, or fails where POLRL_REQUIRE_BROWSER=1."""
    path = find_chromium()
    if path is None:
        _absent("no Chromium was found (set POLRL_CHROMIUM to its path)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _absent("playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def notebook_page(browser: Browser, jupyter: JupyterServer) -> Callable[[str, Sequence[str]], NotebookPage]:
    """A function that makes a notebook of a name and cells; whoever opens it closes it."""
    return functools.partial(NotebookPage, browser, jupyter)


@pytest.fixture(scope="module")
def shared(notebook_page: Callable[[str, Sequence[str]], NotebookPage], request: pytest.FixtureRequest) -> Iterator:
    """One notebook and kernel for the tests of a module that leave them whole: its CELLS, the first of them run."""
    opened = notebook_page(f"{request.module.__name__}.ipynb", request.module.CELLS).open()
    opened.run_cell(0)
    yield opened
    opened.close()


@pytest.fixture
def lab(shared: NotebookPage) -> NotebookPage:
    """A lab of its own in the shared notebook: its second cell is run again, which closes the one before."""
    shared.errors.clear()
    shared.run_cell(1)
    shared.wait_lab()
    shared.wait_text(".polrl-step", "0")
    return shared


@pytest.fixture
def open_notebook(browser: Browser, jupyter: JupyterServer, request: pytest.FixtureRequest) -> Iterator:
    """A function that writes a notebook with these cells, opens it and runs them: `open_notebook(cells)`."""
    opened: list[NotebookPage] = []

    def opener(cells: Sequence[str]) -> NotebookPage:
        name = f"{request.node.name}-{len(opened)}.ipynb".replace("[", "-").replace("]", "")
        notebook = NotebookPage(browser, jupyter, name, cells).open()
        opened.append(notebook)
        return notebook.run_all()

    yield opener
    for notebook in opened:
        notebook.close()

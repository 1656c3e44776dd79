"""A Chromium without a network, for the tests that open a page, and a JupyterLab for it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
#: What assistive technology calls the controls that hold a value.
CONTROLS = {"slider", "combobox", "listbox", "checkbox", "spinbutton", "textbox"}


class Page(NamedTuple):
    """An open page and what it did that it should not."""

    page: Any
    requests: list[str]  # all but the page itself
    errors: list[str]  # console errors and uncaught exceptions


@contextmanager
def chromium(allowed: str = "file://") -> Iterator[Page]:
    """A page whose every request outside `allowed` is blocked and noted.

    Without Chromium or playwright the test is skipped, unless PRESCOPE_REQUIRE_BROWSER=1 makes that a failure.
    """
    found = next(filter(None, map(shutil.which, NAMES)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        found = None
    if found is None:
        message = "needs playwright and a Chromium (apt-get install chromium fonts-dejavu-core)"
        if os.environ.get("PRESCOPE_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    requests: list[str] = []
    errors: list[str] = []

    def route(route: Any) -> None:
        url = route.request.url
        if url.startswith((allowed, "data:", "blob:")):
            route.continue_()
        else:
            requests.append(url)
            route.abort()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 2600})
        page.route("**/*", route)
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield Page(page, requests, errors)
        browser.close()


@contextmanager
def offline_page(path: Path) -> Iterator[Page]:
    """A file opened in a browser, its figures drawn."""
    with chromium(f"file://{path}") as opened:
        opened.page.goto(f"file://{path}", wait_until="load")
        yield opened


def count_plots(page: Any, expected: int) -> int:
    """Figures drawn, waiting until there are as many as expected (10 s at most)."""
    drawn = "document.querySelectorAll('.js-plotly-plot .main-svg').length"
    page.wait_for_function(f"{drawn} >= {expected}", timeout=10_000)
    return page.evaluate(
        "[...document.querySelectorAll('.js-plotly-plot')].filter(p => p.querySelector('.main-svg')).length"
    )


#: Texts that are seen in what a selector finds, whose contrast on what lies below them is less than WCAG's 4.5; what
#: is disabled may be faint. Marks of a figure are no ground here: tests/views/test_theme.py looks at those.
_FAINT = """
(selector) => {
  const parsed = (colour) => {
    const parts = colour.match(/[\\d.]+/g).map(Number);
    return [...parts.slice(0, 3), parts[3] ?? 1];
  };
  const over = ([r, g, b, alpha], below) => [r, g, b].map((one, i) => alpha * one + (1 - alpha) * below[i]);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((one) => (one /= 255) <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const around = (element) => {
    const all = [];
    for (let one = element; one; one = one.parentElement) all.push(getComputedStyle(one));
    return all;
  };
  const found = [];
  for (const one of document.querySelectorAll(`${selector} *`)) {
    const text = [...one.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()).join("");
    if (!text || !one.checkVisibility({ visibilityProperty: true }) || one.closest("[disabled], .ps-stale, style"))
      continue;
    const styles = around(one), ground = styles.reduceRight((below, s) => over(parsed(s.backgroundColor), below),
      [255, 255, 255]);
    const ink = parsed(one instanceof SVGElement ? styles[0].fill : styles[0].color);
    ink[3] *= styles.reduce((product, s) => product * s.opacity, 1);
    const [low, high] = [light(over(ink, ground)), light(ground)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) found.push(`${contrast.toFixed(2)}: ${text.slice(0, 40)}`);
  }
  return found;
}
"""


def faint(page: Any, selector: str) -> list[str]:
    """Texts below a selector that do not read on their ground."""
    return page.evaluate(_FAINT, selector)


def heard(page: Any, selector: str, what: str = "name") -> list[tuple[str, str]]:
    """What Chromium tells a screen reader of the first that a selector finds and of all in it that is not hidden: role
    and name, or description.
    """
    chromium = page.context.new_cdp_session(page)
    root = chromium.send("DOM.getDocument")["root"]["nodeId"]
    node = chromium.send("DOM.querySelector", {"nodeId": root, "selector": selector})
    nodes = chromium.send("Accessibility.queryAXTree", node)["nodes"]
    shown = [node for node in nodes if not node.get("ignored")]
    return [(node["role"]["value"], node.get(what, {}).get("value", "")) for node in shown]


@contextmanager
def jupyterlab(folder: Path, cells: list[str]) -> Iterator[str]:
    """JupyterLab's address, on a free port, with `panel.ipynb` of these cells; settings and history in the folder."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "panel.ipynb")
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    no_news = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(no_news))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    environment = {name: str(folder / kept) for name, kept in folders.items()}
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0",
        "--IdentityProvider.token=", "--LabApp.extension_manager=readonly", "--allow-root",
        f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    log = (folder / "lab.log").open("w")
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{url}/api", timeout=1).close()
            break
        except OSError:
            assert process.poll() is None, (folder / "lab.log").read_text()
            time.sleep(0.5)
    try:
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # its own session: Lab and its kernels, nobody else
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:  # a kernel that is just restarting keeps Lab waiting
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        log.close()


def choose_theme(page: Any, name: str) -> None:
    """Of JupyterLab, from the next time that the page is loaded."""
    page.evaluate(
        """async (theme) => fetch("/lab/api/settings/@jupyterlab/apputils-extension:themes", {
          method: "PUT", body: JSON.stringify({ raw: JSON.stringify({ theme }) }),
          headers: { "X-XSRFToken": document.cookie.match(/_xsrf=([^;]+)/)[1] } })""",
        name,
    )


def run_all(page: Any, lab: str) -> None:
    """Open the notebook of `jupyterlab` and run all of its cells."""
    page.goto(f"{lab}/lab/tree/panel.ipynb?reset")
    page.get_by_text("| Idle").wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

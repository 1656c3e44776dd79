"""A Chromium without a network, for the tests that open a page."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


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

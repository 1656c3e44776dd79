"""The README's pictures of the dashboard, taken from notebooks/01_where_does_time_go.ipynb in a real JupyterLab.

    PYTHONPATH=. python docs/make_images.py

Needs playwright and a Chromium, as the browser tests do.
"""

import argparse
import json
import tempfile
from pathlib import Path

import nbformat

from tests.support.browser import chromium, jupyterlab, run_all

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
NOTEBOOK = ROOT / "notebooks" / "01_where_does_time_go.ipynb"
#: The board has its figures, and the numbers their four rows.
READY = (
    "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 9"
    " && document.querySelectorAll('.ps-numbers tbody tr').length === 4"
)
NEW_TOKENS = 160
#: Around the board, pixels.
MARGIN = 8


def cells() -> list[str]:
    """The notebook's code up to the dashboard."""
    code = [c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
    end = next(i for i, source in enumerate(code) if "session.dashboard(" in source)
    return code[: end + 1]


def open_board(page, lab: str, width: int) -> None:
    """Run all cells in a window of this width, and wait for the board."""
    page.set_viewport_size({"width": width, "height": 2600})
    run_all(page, lab)
    page.wait_for_function(READY, timeout=180_000)
    page.locator(".ps-verdict").first.wait_for(timeout=30_000)
    page.wait_for_timeout(4_000)


def open_tab(page, name: str) -> None:
    """A tab of the board."""
    page.locator(".lm-TabBar-tab", has_text=name).last.click()
    page.wait_for_timeout(2_500)


def shoot(page, name: str, height: int) -> None:
    """The top of the board as a file."""
    page.mouse.move(2, 2)
    page.evaluate("document.activeElement.blur()")
    box = page.locator(".prescope").first.bounding_box()
    clip = {
        "x": box["x"] - MARGIN, "y": box["y"] - MARGIN, "width": box["width"] + 2 * MARGIN,
        "height": min(height, box["height"] + 2 * MARGIN),
    }  # fmt: skip
    page.screenshot(path=IMAGES / f"{name}.png", clip=clip)


def live_tuning(page, lab: str) -> None:
    """The opening state, wide."""
    open_board(page, lab, 1920)
    open_tab(page, "Live tuning")
    shoot(page, "live_tuning", 1150)


def will_it_run(page, lab: str) -> None:
    """A published model on the H200 with 24 GiB."""
    open_board(page, lab, 1280)
    open_tab(page, "Machine and model")
    fields = page.locator(".ps-field:visible")
    fields.filter(has_text="model").first.locator("select").select_option("qwen3-30b-a3b")
    page.wait_for_timeout(3_000)
    fields.filter(has_text="machine").first.locator("select").select_option("h200")
    page.wait_for_timeout(3_000)
    budget = fields.filter(has_text="budget").first.locator("input")
    budget.fill("24")
    budget.press("Tab")
    page.wait_for_timeout(1_000)
    page.wait_for_function("!document.body.innerText.includes('simulating …')", timeout=120_000)
    page.wait_for_timeout(3_000)
    shoot(page, "will_it_run", 1278)


def real_run(page, lab: str) -> None:
    """A run of the embedded model, on its way."""
    open_board(page, lab, 1280)
    page.get_by_role("button", name="Record a run here").click()
    page.locator("option", has_text="this session").first.wait_for(state="attached", timeout=60_000)
    page.wait_for_timeout(8_000)
    open_tab(page, "Run it for real")
    page.locator(".prescope input[type=number]:visible").first.fill(str(NEW_TOKENS))
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Run it for real").click()
    page.wait_for_function("document.querySelector('.ps-text')?.innerText.length > 500", timeout=90_000)
    shoot(page, "real_run", 1000)


def taken(take, is_dark: bool = False) -> None:
    """One picture, in a JupyterLab of its own."""
    with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(folder), cells()) as lab:
        if is_dark:
            themes = Path(folder) / "settings" / "@jupyterlab" / "apputils-extension"
            (themes / "themes.jupyterlab-settings").write_text(json.dumps({"theme": "JupyterLab Dark"}))
        with chromium(lab) as (page, requests, errors):
            take(page, lab)
        print(take.__name__, requests, errors)


def main() -> None:
    """All three, or those named."""
    parser = argparse.ArgumentParser(description="Take the README's pictures.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", default=["live_tuning", "will_it_run", "real_run"]
    )
    takes = {take.__name__: take for take in (live_tuning, will_it_run, real_run)}
    for name in parser.parse_args().names:
        taken(takes[name], is_dark=name == "real_run")


if __name__ == "__main__":
    main()

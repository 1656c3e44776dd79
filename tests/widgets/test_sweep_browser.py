"""A sweep in a real JupyterLab: started from the dashboard, brushed, clicked, its kernel killed, and gone on with."""

import os
import signal

import pytest

from tests.support.browser import chromium, jupyterlab, run_all

CELLS = [
    "import os, pathlib\n"
    "pathlib.Path('kernel.pid').write_text(str(os.getpid()))\n"
    "from prescope.session import Session\n"
    "session = Session(slots=32, device='cpu', link_gb_per_s=2.0)",
    "board = session.dashboard(['Once upon a time'], max_new_tokens=8)\nboard",
]
SWEEP = ".ps-sweep"
#: The status says more points than the first run had.
BEYOND_50 = """
() => { const said = /([0-9,]+) of 4,000 points/.exec(document.querySelector('.ps-sweep').innerText);
  return said && Number(said[1].replace(',', '')) > 50; }
"""
TABLE = f"{SWEEP} .ps-table tbody tr"


def open_tab(page, name):
    page.locator(".lm-TabBar-tab", has_text=name).last.click()


def field(page, name):
    return page.locator(f"{SWEEP} .ps-field", has=page.locator(f".ps-label >> text={name}")).first


def type_points(page, count):
    typed = field(page, "points").locator("input")
    typed.fill(str(count))
    typed.press("Tab")


def start(page, lab):
    run_all(page, lab)
    page.locator(".lm-TabBar-tab", has_text="Sweep").last.wait_for(timeout=150_000)
    page.wait_for_function("document.querySelectorAll('.ps-numbers tbody tr').length === 4", timeout=60_000)
    open_tab(page, "Sweep")
    page.locator(f"{SWEEP} button", has_text="Start").wait_for(timeout=60_000)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_start_brush_click_kill_and_go_on(tmp_path):
    with jupyterlab(tmp_path, CELLS) as lab, chromium(lab) as (page, requests, errors):
        page.set_viewport_size({"width": 1280, "height": 2600})
        start(page, lab)
        field(page, "workers").locator("input").fill("1")
        type_points(page, 40)
        page.locator(f"{SWEEP} button", has_text="Start").click()
        page.locator(SWEEP, has_text="done: 40 points").wait_for(timeout=120_000)
        page.wait_for_function(f"document.querySelectorAll('{TABLE}').length === 5", timeout=30_000)

        axis = (
            page.locator(f"{SWEEP} .parcoords .y-axis")
            .nth(1)
            .locator(".axis-brush .background")
            .bounding_box()
        )
        middle = axis["x"] + axis["width"] / 2
        page.mouse.move(middle, axis["y"] + 0.05 * axis["height"])
        page.mouse.down()
        page.mouse.move(middle, axis["y"] + 0.5 * axis["height"], steps=8)
        page.mouse.up()
        page.locator(SWEEP, has_text="that the brush leaves").wait_for(timeout=30_000)

        points = (
            page.locator(f"{SWEEP} .ps-pairs .js-plotly-plot").nth(3).locator(".scatterlayer .trace").first
        )
        dot = points.locator(".point").nth(3).bounding_box()
        page.mouse.move(dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2)
        page.wait_for_timeout(500)
        page.mouse.down()
        page.mouse.up()
        page.locator(".lm-TabBar-tab.lm-mod-current", has_text="Live tuning").wait_for(timeout=30_000)

        open_tab(page, "Sweep")
        type_points(page, 4000)
        page.locator(f"{SWEEP} button", has_text="Go on").click()
        page.wait_for_function(BEYOND_50, timeout=90_000)
        os.kill(int((tmp_path / "kernel.pid").read_text()), signal.SIGKILL)
        page.wait_for_timeout(3_000)

        start(page, lab)
        page.locator(f"{SWEEP} select", has=page.locator("option", has_text="sweep 1")).first.select_option(
            "sweep 1"
        )
        page.wait_for_function(f"document.querySelectorAll('{TABLE}').length === 5", timeout=60_000)
        told = page.locator(f"{SWEEP} b", has_text="simulated").first.locator("xpath=..").inner_text()
        count = int(told.split(":")[1].split()[0].replace(",", ""))
        assert 50 < count < 4000
        field(page, "workers").locator("input").fill("1")
        type_points(page, count + 60)
        page.locator(f"{SWEEP} button", has_text="Go on").click()
        page.locator(SWEEP, has_text="done:").wait_for(timeout=120_000)
        told = page.locator(f"{SWEEP} b", has_text="simulated").first.locator("xpath=..").inner_text()
        assert int(told.split(":")[1].split()[0].replace(",", "")) > count
        assert requests == []
        assert [one for one in errors if "prescope" in one.lower() or "plotly" in one.lower()] == []

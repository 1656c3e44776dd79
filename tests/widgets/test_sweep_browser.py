"""A sweep in a real JupyterLab: started, brushed, clicked, its kernel killed, gone on with; and its best proved."""

import json
import os
import re
import signal

import pytest

from prescope.views.numbers import formatted
from tests.support.browser import chromium, jupyterlab, run_all

CELLS = [
    "import os, pathlib\n"
    "pathlib.Path('kernel.pid').write_text(str(os.getpid()))\n"
    "from prescope.session import Session\n"
    "session = Session(slots=32, device='cpu', link_gb_per_s=2.0)",
    "board = session.dashboard(['Once upon a time'], max_new_tokens=8)\nboard",
]
#: A run recorded here, so that the device may prove what the simulator found. What the proof object holds goes to a
#: file as soon as the page is told of it.
PROVED = [
    "import json, pathlib\n"
    "from prescope.session import Session\n"
    "session = Session(slots=32, device='cpu', link_gb_per_s=2.0)",
    "panel = session.sweep_panel(prompts=['Once upon a time'], max_new_tokens=6)\n"
    "def note(_):\n"
    "    proof = panel.proof.proof\n"
    "    if proof is not None and proof.words in panel.proof.words.value:\n"
    "        told = {'words': proof.words, 'kept': proof.kept, 'notes': list(proof.notes),\n"
    "                'origin': proof.origin, 'best': proof.best.number,\n"
    "                'numbers': [one.number for one in proof.candidates],\n"
    "                'rows': json.loads(proof.table().to_json(orient='records')),\n"
    "                'runs': [len(one.default_ms) + len(one.candidate_ms) for one in proof.candidates]}\n"
    "        pathlib.Path('proof.json').write_text(json.dumps(told))\n"
    "panel.proof.words.observe(note, 'value')\n"
    "panel",
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


def shown_as(number):
    """A figure of the proof object as the page's tables write it."""
    return "" if number is None else formatted(number)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_says_of_a_proof_what_the_proof_says(tmp_path):
    """The verdict is what a person acts on: the button runs it, and each word and figure is the object's own."""
    with jupyterlab(tmp_path, PROVED) as lab, chromium(lab) as (page, requests, errors):
        page.set_viewport_size({"width": 1280, "height": 2600})
        run_all(page, lab)
        prove = page.locator(f"{SWEEP} button", has_text="Prove the best three")
        prove.wait_for(timeout=150_000)
        assert prove.is_disabled()
        field(page, "workers").locator("input").fill("1")
        type_points(page, 20)
        page.locator(f"{SWEEP} button", has_text="Start").click()
        page.locator(SWEEP, has_text="done: 20 points").wait_for(timeout=120_000)
        prove.click()
        page.locator(f"{SWEEP} button", has_text="End the proof").wait_for(timeout=30_000)
        page.locator(SWEEP, has_text=re.compile(r"run \d+ of 49, \d+ s left")).wait_for(timeout=120_000)
        verdict = page.locator(f"{SWEEP} .ps-verdict")
        verdict.wait_for(timeout=300_000)
        prove.wait_for()
        proof = json.loads((tmp_path / "proof.json").read_text())
        assert proof["runs"] == [16, 16, 16]
        assert proof["origin"] == "emulated"

        said = verdict.inner_text()
        assert said.startswith(proof["words"])
        assert "measured, link emulated" in said
        assert all(note in said for note in proof["notes"])
        is_good = verdict.locator(".ps-good").count() == 1
        assert is_good == proof["kept"]
        assert verdict.locator("b").first.inner_text() == proof["words"]
        table = page.locator(f"{SWEEP} .ps-table", has=page.locator("th", has_text="gain %")).first
        heads = table.locator("th").all_inner_texts()[1:]
        assert heads == list(proof["rows"][0])
        names = [row.locator("td").first.inner_text() for row in table.locator("tbody tr").all()]
        assert names == [f"point {number}" for number in proof["numbers"]]
        assert table.locator(".ps-first td").first.inner_text() == f"point {proof['best']}"
        for row, told in zip(table.locator("tbody tr").all(), proof["rows"], strict=True):
            cells = dict(zip(heads, row.locator("td").all_inner_texts()[1:], strict=True))
            for name in ("tokens/s", "gain %", "from %", "to %", "simulated gain %", "simulator off %"):
                assert cells[name] == shown_as(told[name]), name
            assert cells["kept"] == ("yes" if told["kept"] else "")
            assert cells["schedule"] == told["schedule"]
        assert requests == []
        assert [one for one in errors if "prescope" in one.lower() or "plotly" in one.lower()] == []

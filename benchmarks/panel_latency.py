"""From a key to the screen: how long a slider's move takes until its figures are drawn, in a real JupyterLab.

    PYTHONPATH=. python benchmarks/panel_latency.py --moves 20

Opens notebooks/01_where_does_time_go.ipynb in headless Chromium and presses an arrow on the slider of slots. Of each
move the time from the key's event to the frame after plotly's of a finished plot is taken, of each figure that changes
(one slot more may leave the lanes as they were), and of the last of them. Needs playwright and a Chromium. Browser,
server and kernel share the machine: run it on an idle one.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import nbformat

from prescope.core.machine import machine_facts
from tests.support.browser import chromium, jupyterlab, run_all

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "01_where_does_time_go.ipynb"
READY = (
    "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 9"
    " && document.querySelectorAll('.ps-numbers tbody tr').length === 4"
)
#: Of each figure the first drawing after a key counts: a later one brings what a rest finds.
WATCH = """
() => {
  const plots = [...document.querySelectorAll('.prescope .js-plotly-plot')];
  const of = words => plots.find(p => p.layout?.title?.text?.includes(words));
  window.move = { began: 0, drawn: {} };
  document.addEventListener('keydown', () => { window.move = { began: performance.now(), drawn: {} }; }, true);
  for (const [name, words] of Object.entries(%s)) {
    of(words).on('plotly_afterplot', () => requestAnimationFrame(() => {
      window.move.drawn[name] ??= performance.now() - window.move.began;
    }));
  }
}
"""
FIGURES = {"lanes": "Where does each", "steps": "How long does each", "outcomes": "Are the experts there"}
#: Between two moves: what a rest brings (the line of advice, the bound) is drawn by then.
REST_MS = 2_500


def main() -> None:
    """Move, and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moves", type=int, default=20)
    moves = parser.parse_args().moves
    code = [c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
    end = next(i for i, source in enumerate(code) if "session.dashboard(" in source)
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        jupyterlab(Path(folder), code[: end + 1]) as lab,
        chromium(lab) as (page, _, _),
    ):
        page.set_viewport_size({"width": 1280, "height": 2600})
        run_all(page, lab)
        page.wait_for_function(READY, timeout=180_000)
        page.wait_for_timeout(6_000)
        page.evaluate(WATCH % json.dumps(FIGURES))
        page.locator(".ps-field", has_text="slots").locator(".noUi-handle").first.focus()
        for i in range(moves):
            page.keyboard.press("ArrowRight" if i % 2 else "ArrowLeft")
            page.wait_for_function("Object.keys(window.move.drawn).length > 0", timeout=20_000)
            page.wait_for_timeout(REST_MS)
            found.append(page.evaluate("window.move.drawn"))
    print(machine_facts(), f"load: {os.getloadavg()[0]:.1f}", sep="\n")
    times = {name: [one[name] for one in found if name in one] for name in FIGURES}
    for name, ms in {**times, "last of them": [max(one.values()) for one in found]}.items():
        said = f"median {statistics.median(ms):.0f} ms, {min(ms):.0f} to {max(ms):.0f}" if ms else "not drawn"
        print(f"{name}: {said}, {len(ms)} of {len(found)} moves")


if __name__ == "__main__":
    main()

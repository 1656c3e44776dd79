"""The dashboard in a real JupyterLab: Run All leaves it usable, a reload shows what was there, a restart is told."""

import pytest

from tests.support.browser import chromium, jupyterlab, run_all

CELLS = [
    "from prescope.session import Session\n"
    "session = Session(slots=32, device='cpu', link_gb_per_s=2.0)\n"
    "run = session.run(['Once upon a time'], slots=33, max_new_tokens=12)",
    "board = session.dashboard(['Once upon a time'], scenarios=session.scenarios(run), max_new_tokens=12)\nboard",
    "run",
]
#: The lanes: of each bar trace with bars, how many x, how many y, and the distinct y.
LANES = """
() => [...document.querySelectorAll('.js-plotly-plot')]
  .find(p => p.layout?.title?.text.includes('Where does each')).data.filter(t => t.type === 'bar' && t.x.length)
  .map(t => [t.name ?? '', t.x.length, (t.y ?? []).length, [...new Set(t.y ?? [])].join()].join(':'))
"""
PLOTS = "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 9"
GONE = """
() => { const root = document.querySelector('.prescope');
  return getComputedStyle(root, '::before').content.includes('The session is gone'); }
"""


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_all_move_save_reload_and_restart(tmp_path):
    with jupyterlab(tmp_path, CELLS) as lab, chromium(lab) as (page, requests, errors):
        page.set_viewport_size({"width": 1280, "height": 2600})
        run_all(page, lab)
        page.wait_for_function(PLOTS, timeout=150_000)
        page.wait_for_function(
            "document.querySelectorAll('.ps-numbers tbody tr').length === 4", timeout=30_000
        )
        assert "Prediction" in page.locator(".ps-verdict").first.inner_text(timeout=30_000)
        for label in ("slots", "steps"):
            page.locator(".ps-field", has_text=label).locator(".noUi-handle").first.focus()
            page.keyboard.press("ArrowRight")
            page.wait_for_timeout(1_500)
        before = page.evaluate(LANES)
        assert before
        assert all(row.split(":")[1] == row.split(":")[2] for row in before), before
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1_500)
        page.reload()
        page.wait_for_function(PLOTS, timeout=60_000)
        page.wait_for_timeout(1_500)
        assert page.evaluate(LANES) == before
        page.get_by_role("menuitem", name="Kernel", exact=True).click()
        page.locator(".lm-Menu-item[data-command='kernelmenu:restart']").click()
        page.locator(".jp-Dialog .jp-mod-accept").click()
        page.wait_for_function(GONE, timeout=30_000)
        assert requests == []
        assert [error for error in errors if "prescope" in error.lower() or "plotly" in error.lower()] == []

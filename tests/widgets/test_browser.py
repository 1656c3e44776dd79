"""The dashboard in a real JupyterLab: Run All leaves it usable, a reload shows what was there, a restart is told."""

import pytest

from tests.support.browser import CONTROLS, choose_theme, chromium, faint, heard, jupyterlab, run_all

CELLS = [
    "from prescope.session import Session\n"
    "session = Session(slots=32, device='cpu', link_gb_per_s=2.0)\n"
    "run = session.run(['Once upon a time'], slots=33, max_new_tokens=12)",
    # The cell run twice: what the first one leaves behind must not keep the second from coming back after a reload.
    "board = session.dashboard(['Once upon a time'], scenarios=session.scenarios(run), max_new_tokens=12)\n"
    "board = session.dashboard(['Once upon a time'], scenarios=session.scenarios(run), max_new_tokens=12)\nboard",
    "run",
]
#: The lanes: of each bar trace with bars, how many x, how many y, and the distinct y.
LANES = """
() => [...document.querySelectorAll('.js-plotly-plot')]
  .find(p => p.layout?.title?.text.includes('Where does each'))?.data.filter(t => t.type === 'bar' && t.x.length)
  .map(t => [t.name ?? '', t.x.length, (t.y ?? []).length, [...new Set(t.y ?? [])].join()].join(':'))
"""
#: All that each drawn figure of the visible tab was given, by its title; what is nothing counts as not said.
FIGURES = """
() => {
  const plain = (v) => {
    if (ArrayBuffer.isView(v)) return Array.from(v);
    if (Array.isArray(v)) return v.map(plain);
    if (v === null || typeof v !== 'object') return v;
    const names = Object.keys(v).filter(name => name !== 'uid' && name[0] !== '_' && v[name] != null).sort();
    return Object.fromEntries(names.map(name => [name, plain(v[name])]));
  };
  return Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')]
    .filter(p => p.data?.length && p.offsetParent && p.layout?.title?.text)
    .map(p => [p.layout.title.text.split('<br>')[0], p.data.map(t => JSON.stringify(plain(t)))]));
}
"""
#: What has the focus, and how its ring is drawn.
FOCUS = """
() => { const now = document.activeElement, looks = getComputedStyle(now);
  return [now.closest('.modebar') ? 'modebar' : now.getAttribute('role') ?? now.tagName,
    `${looks.outlineWidth} ${looks.outlineStyle}`]; }
"""
#: Words of errors that are ours: of the panels, of plotly, of a widget that was closed under the page.
OURS = ("prescope", "plotly", "comm channel")
PLOTS = "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 9"
GONE = """
() => { const root = document.querySelector('.prescope');
  return getComputedStyle(root, '::before').content.includes('The session is gone'); }
"""


def drag_over_the_overview(page) -> None:
    """The steps between the ends of the drag are those whose lanes are drawn; the overview goes on showing all."""
    overview = page.locator(".js-plotly-plot:visible", has_text="How long does each token").first
    box = overview.locator(".nsewdrag").first.bounding_box()
    shown = page.locator(".ps-field", has_text="steps").locator(".widget-readout").first
    former, y = shown.inner_text(), box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.5 * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], y, steps=6)
    page.mouse.up()
    for _ in range(40):
        page.wait_for_timeout(250)
        if shown.inner_text() != former:
            break
    first, last = (int(part) for part in shown.inner_text().replace("–", " ").split())
    assert 4 <= first < last <= 11, shown.inner_text()
    page.wait_for_timeout(1_000)
    low, high = overview.evaluate("plot => plot.layout.xaxis.range")
    assert high - low > 10


def what_does_nothing_is_no_stop_of_tab(page) -> None:
    """On demand predicts nothing: the sliders of predictions are passed over, and still show where they stand."""
    schedule = page.locator(".ps-field:visible", has_text="schedule").locator("select").first
    former = schedule.input_value()
    schedule.select_option(label="On demand")
    page.wait_for_function("document.querySelectorAll('.ps-off .noUi-handle').length >= 2", timeout=20_000)
    schedule.focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate("!document.activeElement.closest('.ps-off')")
    drawn = "getComputedStyle(document.querySelector('.ps-off .noUi-origin'), '::after').content"
    assert page.evaluate(drawn) == '""'
    schedule.select_option(former)
    page.wait_for_timeout(1_500)


def focus_is_seen_at_every_stop(page) -> None:
    """By keyboard alone: Lab's sheet took the ring from sliders and menus."""
    page.locator(".prescope select:visible").first.focus()
    kinds = set()
    for _ in range(40):
        kind, ring = page.evaluate(FOCUS)
        assert ring == "2px solid", kind
        kinds.add(kind)
        page.keyboard.press("Tab")
        page.wait_for_timeout(50)
        if "modebar" in kind:
            break
    assert {"SELECT", "BUTTON", "slider", "tab"} <= kinds and any("modebar" in kind for kind in kinds), kinds


def every_control_has_a_name_and_every_text_reads(page) -> None:
    """In each tab; the last one that is opened is the one to go on with. White on Lab's blue was 2.7 in the dark."""
    for tab in ("Machine and model", "Run it for real", "Schedules", "Sweep", "Runs", "Live tuning"):
        page.locator(".lm-TabBar-tab", has_text=tab).last.click()
        page.locator(".prescope .ps-label:visible").nth(1).wait_for(timeout=20_000)
        page.wait_for_timeout(1_000)
        controls = [one for one in heard(page, ".prescope") if one[0] in CONTROLS]
        assert len(controls) >= 3 and all(name for _, name in controls), (tab, controls)
        assert faint(page, ".prescope") == [], tab


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
        every_control_has_a_name_and_every_text_reads(page)
        focus_is_seen_at_every_stop(page)
        drag_over_the_overview(page)
        what_does_nothing_is_no_stop_of_tab(page)
        for tab in ("Schedules", "Live tuning", "Schedules", "Live tuning"):
            page.locator(".lm-TabBar-tab", has_text=tab).last.click()
            page.wait_for_timeout(2_000)
            page.locator(".ps-field:visible .noUi-handle").first.focus()
            page.keyboard.press("ArrowRight")
            page.wait_for_timeout(1_000)
        page.wait_for_function(f"({LANES})()?.length", timeout=30_000)
        before = page.evaluate(LANES)
        assert all(row.split(":")[1] == row.split(":")[2] for row in before), before
        edited = page.evaluate(FIGURES)
        choose_theme(page, "JupyterLab Dark")
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1_500)
        page.reload()
        page.wait_for_function(PLOTS, timeout=60_000)
        page.wait_for_function(f"({LANES})()?.length", timeout=30_000)
        page.wait_for_timeout(1_500)
        assert page.evaluate(LANES) == before
        anew = page.evaluate(FIGURES)
        assert len(edited) >= 3 and edited.keys() == anew.keys()
        for title, traces in edited.items():
            assert traces == anew[title], f"what moves made of {title!r} is not what the kernel holds"
        every_control_has_a_name_and_every_text_reads(page)
        page.locator(".lm-TabBar-tab", has_text="Run it for real").last.click()
        page.locator(".prescope input[type=number]:visible").first.fill("1000")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Run it for real").click()
        page.wait_for_function("document.querySelector('.ps-text')?.innerText.includes('▍')", timeout=60_000)
        page.get_by_role("button", name="Cancel").dispatch_event("click")  # it moves while text comes
        page.locator(".ps-job:visible", has_text="cancelled").first.wait_for(timeout=30_000)
        page.get_by_role("menuitem", name="Kernel", exact=True).click()
        page.locator(".lm-Menu-item[data-command='kernelmenu:restart']").click()
        page.locator(".jp-Dialog .jp-mod-accept").click()
        page.wait_for_function(GONE, timeout=30_000)
        assert requests == []
        assert [error for error in errors if any(word in error.lower() for word in OURS)] == []

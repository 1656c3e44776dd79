"""What Chromium prints of a page: every layer and every token is on the paper, and nothing is cut."""

import re
from pathlib import Path

import pytest

from prescope.report import execute_notebook
from prescope.session import Session
from prescope.simulator import Scenario
from prescope.views.step_times import MOST_BARS
from prescope.views.theme import COLORS
from tests.support.browser import offline_page
from tests.support.pdf import PrintedPage, printed

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "01_where_does_time_go.ipynb"
#: Of each figure on the page: what its axis is called, and how many places its bars or stepped areas have.
DRAWN = """
() => [...document.querySelectorAll('.js-plotly-plot')].map(p => ({
  axis: p._fullLayout.xaxis.title.text,
  places: Math.max(0, ...p.data.filter(t => (t.type === 'bar' || t.stackgroup) && t.visible !== false)
    .map(t => (t.x ?? []).length)),
}))
"""


#: A4 between its margins, px.
A4_PX = round((210 - 24) / 25.4 * 96)
#: What of a page that is laid out for paper lies beyond its figure or the paper, and words that are cut in two.
AMISS = """
(width) => {
  const right = (one) => one.getBoundingClientRect().right, said = (one) => one.textContent.slice(0, 50);
  const lines = (one) => {
    const range = document.createRange();
    range.selectNodeContents(one);
    return new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size;
  };
  const all = (selector) => [...document.querySelectorAll(selector)].filter((one) => one.checkVisibility());
  return [
    ...all(".js-plotly-plot, table").filter((one) => right(one) > width).map((one) => `beyond the paper: ${said(one)}`),
    ...all(".main-svg text").filter((one) => right(one) > right(one.closest(".js-plotly-plot")) + 1)
      .map((one) => `beyond its figure: ${said(one)}`),
    ...all("td, th").filter((one) => !one.children.length && /^-?[^\\s-]+$/.test(one.textContent.trim()))
      .filter((one) => lines(one) > 1).map((one) => `cut in two: ${said(one)}`),
  ];
}
"""


def print_page(path: Path, folder: Path) -> tuple[list[PrintedPage], list[dict]]:
    with offline_page(path) as (page, _, _):
        page.wait_for_timeout(1_500)
        page.set_viewport_size({"width": A4_PX, "height": 1000})
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.wait_for_timeout(1_500)
        assert page.evaluate(AMISS, A4_PX) == []
        figures = page.evaluate(DRAWN)
        page.pdf(path=folder / "page.pdf", format="A4", prefer_css_page_size=True)
    return printed(folder / "page.pdf"), figures


def rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def nothing_is_cut(pages: list[PrintedPage]) -> None:
    for page in pages:
        left, right = 28, page.width - 28  # the page's margins are 12 mm
        assert all(left <= x <= right for _, x in page.texts), [
            t for t in page.texts if not left <= t[1] <= right
        ]
        solid = [color for color in COLORS.values() if color.startswith("#")]  # others let the page through
        ours = [fill for fill in page.fills if fill[0] in map(rgb, solid)]
        assert all(left <= low and high <= right for _, low, high in ours)


def bars_of(page: PrintedPage, meaning: str) -> int:
    return len({round(low, 1) for color, low, _ in page.fills if color == rgb(COLORS[meaning])})


def is_drawn_across(page: PrintedPage, meaning: str) -> bool:
    """Whether an area of a meaning's colour is half as wide as the page: more steps than bars are drawn of."""
    return any(
        high - low > page.width / 2 for color, low, high in page.fills if color == rgb(COLORS[meaning])
    )


@pytest.mark.browser
@pytest.mark.slow
def test_a_report_on_paper_has_every_layer_and_every_token(tmp_path):
    with Session(slots=32, device="cpu", link_gb_per_s=2.0) as session:
        board = session.dashboard(max_new_tokens=4)
        live = board.live
        live.choose(Scenario(schedule="presched", slots=128, machine=live.scenario.machine))
        path = session.report(tmp_path / "report.html", of=board)
        steps, layers = len(live.result.needs.steps), live.scenarios.trace.num_layers
    pages, figures = print_page(path, tmp_path)
    nothing_is_cut(pages)
    assert max(figure["places"] for figure in figures) == steps + 2 > MOST_BARS, (
        "an area has both its ends, too"
    )
    assert any(is_drawn_across(page, "dense") for page in pages)
    words = " ".join(text for page in pages for text, _ in page.texts)
    for layer in range(layers):
        assert re.search(rf"\b{layer}\b", words), f"layer {layer}"
    assert max(bars_of(page, "hit") for page in pages) == layers + 1
    assert "calibrate-seconds" in words.replace(" ", ""), "a long command is wrapped"


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_notebooks_page_on_paper_has_every_layer_and_every_token(tmp_path):
    path = execute_notebook(
        NOTEBOOK,
        tmp_path / "n.html",
        parameters={"max_new_tokens": 8, "device": "cpu"},
        log=lambda line: None,
    )
    pages, figures = print_page(path, tmp_path)
    nothing_is_cut(pages)
    assert max(figure["places"] for figure in figures if figure["axis"].startswith("decode step")) > MOST_BARS
    assert any(is_drawn_across(page, "dense") for page in pages)
    assert max(bars_of(page, "hit") for page in pages) == 8 + 1

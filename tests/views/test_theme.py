import re
from pathlib import Path

import pytest

import prescope.views
from prescope.views.lanes import MEANINGS, Bars, LanesInfo, Span, lanes_traces
from prescope.views.step_times import CAUSES, RING, StepTimesInfo, Times, step_times_traces
from prescope.views.theme import AMOUNT_SCALE, COLORS, GAIN_SCALE, LINE, TEXT, figures_css, titled
from tests.support.colors import closest, contrast, difference

#: Meanings that lie beside one another in one row, stack or bar of a figure.
TOGETHER = {
    "GPU lane": ["dense", "experts"],
    "PCIe lane": ["on_demand", "prefetch", "stream"],
    "waits": ["stall", "cpu_wait", "host_wait", "warm_up"],
    "a copy and the stall that it causes": ["on_demand", "stall"],  # one below the other in the lanes
    "outcomes": ["hit", "late", "miss", "on_cpu"],
    "where a step's time goes": ["dense", "experts", "stall", "cpu_wait", "host_wait", "warm_up", "other"],
    "sources": ["simulated", "measured"],
}


def on(ground: str, colour: str) -> str:
    """The colour as it is seen on a ground that shines through."""
    if colour.startswith("#"):
        return colour
    *parts, alpha = (float(part) for part in colour.removeprefix("rgba(").removesuffix(")").split(","))
    below = [int(ground[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(
        f"{round(alpha * a + (1 - alpha) * b):02x}" for a, b in zip(parts, below, strict=True)
    )


@pytest.mark.parametrize("meanings", TOGETHER.values(), ids=TOGETHER)
def test_colours_that_meet_are_told_apart_by_all_eyes(meanings):
    apart, *which = closest([COLORS[name] for name in meanings])
    assert apart >= 20, which


@pytest.mark.parametrize("line", ["measured", "bound"])
def test_a_line_over_the_causes_of_a_step_is_seen_on_each_of_them(line):
    """The measured line was 10 from the stalls that it crosses, and the bound went under: both have a light ring."""
    ring, drawn = on("#ffffff", RING), COLORS[line]
    assert closest([ring, drawn])[0] >= 20
    for cause in CAUSES:
        below = COLORS[cause]
        assert max(closest([drawn, below])[0], closest([ring, below])[0]) >= 20, cause
    times = Times((1, 2), (2.0, 3.0), 400.0, "simulated", {})
    info = StepTimesInfo(times, "", "", times._replace(source="measured"), bound_ms=1.0)
    *_, light, measured, bound = step_times_traces(info)
    assert light["line"]["color"] == RING and light["line"]["width"] > bound["line"]["width"]
    assert light["y"] == bound["y"] == [1.0, 1.0]
    assert measured["marker"]["line"]["color"] == RING
    assert not step_times_traces(info._replace(bound_ms=float("nan")))[-3]["visible"], (
        "where there is no bound"
    )


@pytest.mark.parametrize("ground", ["#111111", "#212121"])
def test_dark_fills_are_seen_on_a_dark_page(ground):
    """What is told from lighter colours by being dark must not go under on a dark page."""
    faint = {name: contrast(COLORS[name], ground) for name in ("cpu_wait", "warm_up", "stall")}
    assert min(faint.values()) >= 1.2, faint


@pytest.mark.parametrize("ground", ["#ffffff", "#111111", "#212121"])
def test_what_is_nothing_stands_back(ground):
    """Light grey was the brightest of all on a dark page."""
    seen = contrast(on(ground, COLORS["nothing"]), ground)
    assert 1.15 <= seen <= 2, seen


#: Grounds of pages, with the text that they have: white, a browser's dark, Lab's dark.
PAGES = {"#ffffff": "#212121", "#121212": "#ffffff", "#111111": "#ffffff", "#212121": "#ffffff"}


@pytest.mark.parametrize("ground", PAGES)
@pytest.mark.parametrize(
    "scale", [AMOUNT_SCALE, GAIN_SCALE[2:], GAIN_SCALE[1::-1]], ids=["amount", "better", "worse"]
)
def test_much_stands_out_and_little_does_not_on_every_page(scale, ground):
    """What was little was the brightest of all on a dark page. Numbers in the cells have the page's text colour."""
    little, much = (on(ground, colour) for _, colour in scale)
    assert 1.02 <= contrast(little, ground) <= 1.25
    assert contrast(much, ground) >= 3
    assert min(contrast(PAGES[ground], cell) for cell in (little, much)) >= 4.5


@pytest.mark.parametrize("ground", PAGES)
def test_better_and_worse_are_told_apart_by_all_eyes(ground):
    apart, *which = closest([on(ground, GAIN_SCALE[0][1]), on(ground, GAIN_SCALE[-1][1])])
    assert apart >= 20, which


def test_numbers_in_cells_have_the_pages_text_colour():
    assert "heatmap" not in figures_css(".page", "red"), "plotly's own goes by a white page"


@pytest.mark.parametrize("ground", PAGES)
def test_text_in_bars_reads_in_the_pages_colour(ground):
    """A grey that reads on white was 2.2 on a dark page's strip of layers, and 3.5 on a white one's."""
    layers = tuple(Span(1, layer, float(layer), 1.0) for layer in range(2))
    bars = {meaning: Bars(*[()] * 6) for meaning in MEANINGS}
    strip, *_ = lanes_traces(LanesInfo(bars, layers, layers[:1], 2.0, "decode", 0, "simulated", "", ""))
    assert "bartext" not in figures_css(".page", "red") and "color" not in strip["textfont"]
    grounds = {on(ground, colour) for colour in strip["marker"]["color"]}
    assert len(grounds) == 2 and min(contrast(PAGES[ground], one) for one in grounds) >= 4.5


def test_no_other_text_lies_on_a_colour_of_a_figures_own():
    views = {path.name: path.read_text("utf-8") for path in Path(prescope.views.__file__).parent.glob("*.py")}
    placed = {name: re.findall(r"""textposition["=: ]+"([a-z ]+)""", text) for name, text in views.items()}
    assert placed["lanes.py"] == ["inside"] and placed["savings.py"] == ["outside"]
    assert {one for name, all_of in placed.items() for one in all_of if name != "lanes.py"} <= {
        "outside",
        "bottom right",
    }


def test_every_heat_map_has_one_of_the_two_scales():
    views = Path(prescope.views.__file__).parent
    maps = {path.name: path.read_text("utf-8") for path in views.glob("*.py")}
    maps = {
        name: text for name, text in maps.items() if re.search("heatmap", text, re.I) and name != "theme.py"
    }
    assert len(maps) >= 3
    for name, text in maps.items():
        assert "AMOUNT_SCALE" in text and "colorscale=[" not in text, name


def test_text_reads_on_white():
    assert contrast(TEXT, "#ffffff") >= 4.5


def test_the_measure_of_difference_is_the_published_one():
    """Two pairs whose CIEDE2000 is known: equal colours, and black beside white (100 by definition of L*)."""
    assert difference("#123456", "#123456") == 0
    assert difference("#000000", "#ffffff") == pytest.approx(100, abs=0.01)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_a_long_subtitle_is_cut_into_lines_and_loses_nothing():
    words = [f"word{i}" for i in range(60)]
    text = titled("T", "<b>simulated</b>: " + " ".join(words))
    lines = text.split("<br>")[1:]
    assert len(lines) > 1
    assert all(len(line) <= LINE + 40 for line in lines)  # with tags
    assert all(word in text for word in words)

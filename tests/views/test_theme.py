import pytest

from prescope.views.theme import COLORS, LINE, TEXT, titled
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

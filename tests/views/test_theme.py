import pytest

from prescope.views.theme import COLORS, LINE, TEXT, titled
from tests.support.colors import closest, contrast, difference

#: Meanings that lie beside one another in one row, stack or bar of a figure.
TOGETHER = {
    "GPU lane": ["dense", "experts"],
    "PCIe lane": ["on_demand", "prefetch", "stream"],
    "waits": ["stall", "cpu_wait", "host_wait", "warm_up"],
    "outcomes": ["hit", "late", "miss", "on_cpu"],
    "where a step's time goes": ["dense", "experts", "stall", "cpu_wait", "host_wait", "warm_up", "other"],
    "sources": ["simulated", "measured"],
}


@pytest.mark.parametrize("meanings", TOGETHER.values(), ids=TOGETHER)
def test_colours_that_meet_are_told_apart_by_all_eyes(meanings):
    apart, *which = closest([COLORS[name] for name in meanings])
    assert apart >= 20, which


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

"""Curves over the load: each ends where its schedule no longer keeps pace."""

import math

import pytest

from prescope.errors import BadTrace
from prescope.simulator import Pace
from prescope.traces.arrivals import Arrivals
from prescope.views.waiting import plot_waiting, waiting, waiting_info

PACES = {
    "on demand": Pace(step_ms={1: 40.0, 8: 200.0}, prompt_ms=400.0),
    "best schedule": Pace(step_ms={1: 10.0, 8: 50.0}, prompt_ms=400.0),
}


@pytest.fixture(scope="module")
def info():
    return waiting_info(PACES, Arrivals.load(), told="made up", most=8)


def test_the_slower_waits_longer_and_ends_earlier(info):
    slow, fast = info.wait_s
    assert len(slow) < len(fast) <= len(info.loads)
    assert all(a >= b for a, b in zip(slow, fast, strict=False))
    assert info.most_per_s[0] < info.most_per_s[1]
    assert info.most_per_s[0] == info.loads[len(slow) - 1]
    assert all(p95 >= p50 > 0.399 for p50, p95 in zip(info.ttft_p50_s[1], info.ttft_p95_s[1], strict=True))


def test_the_figure_says_simulated_whose_arrivals_and_how_much_each_can_serve(info):
    fig = plot_waiting(info)
    title = fig.layout.title.text
    assert "<b>simulated</b>: made up" in title and "CC-BY-4.0" in title.replace("<br>", " ")
    names = [trace.name for trace in fig.data if trace.showlegend is not False]
    assert names[0].startswith("on demand: up to ") and len(names) == 2
    assert len(fig.data) == 6


def test_a_load_that_is_too_much_for_all_leaves_no_curve():
    info = waiting_info(PACES, Arrivals.load(), told="made up", most=2, loads=[1000.0])
    assert info.wait_s == ((), ()) and all(map(math.isnan, info.most_per_s))
    assert "at none of these loads" in plot_waiting(info).data[0].name


def test_no_schedule_is_refused():
    with pytest.raises(BadTrace, match="one at least"):
        waiting({}, Arrivals.load(), told="")

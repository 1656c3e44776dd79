from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest

from prescope import views
from prescope.errors import BadTrace
from prescope.traces.events import Event, event_frame
from prescope.views.hit_rate import HitRateInfo, hit_rate_info
from prescope.views.lanes import lanes_info
from prescope.views.latency import latency_info
from prescope.views.layers import layers_info
from prescope.views.load import load_info
from prescope.views.slots_curve import slots_curve_info
from prescope.views.theme import COLORS, NAMES
from tests.support.small_run import (
    LABEL,
    NUM_EXPERTS,
    NUM_LAYERS,
    TOP_K,
    small_run,
    small_trace,
    ten_events_run,
)

ORIGIN = f"{LABEL} · 4 slots (25 % of the experts) · lru · batch 2"
ALL_VIEWS = [views.timeline, views.layers, views.hit_rate, views.latency, views.load]


@pytest.fixture(scope="module")
def run():
    return small_run(steps=8)


@pytest.fixture(scope="module")
def ten():
    return ten_events_run()


@pytest.mark.parametrize("view", ALL_VIEWS, ids=lambda view: view.__name__)
def test_every_figure_has_a_title_its_origin_and_units(view, run):
    """A number without unit or origin is the first smell of style.md."""
    figure = view(run)
    layout = figure.layout
    assert type(figure) is go.Figure
    assert layout.title.text
    assert ("synthetic" if view is views.load else LABEL) in layout.title.text
    assert layout.xaxis.title.text
    assert layout.yaxis.title.text or layout.yaxis.ticktext  # a timeline's rows are lanes
    figure.to_json()


def test_a_meaning_has_one_colour_and_one_name():
    assert set(COLORS) - set(NAMES) == {"line", "bound"}
    shown = [COLORS[kind] for kind in ("dense", "experts", "on_demand", "prefetch", "stall", "host_wait")]
    assert len(set(shown)) == len(shown)


def test_ten_events_give_exactly_these_hits(ten):
    assert hit_rate_info(ten) == HitRateInfo(
        "decode", 2, hits=(5, 2), late=(1, 0), misses=(0, 2), origin=ORIGIN
    )
    assert hit_rate_info(ten, None).needed == (11, 4)
    assert hit_rate_info(ten).rates == pytest.approx((5 / 6, 0.5))


def test_ten_events_give_exactly_these_layers(ten):
    info = layers_info(ten)
    assert info.labels == ("0", "1", "head")
    assert info.num_steps == 2
    assert info.kind_us["dense"] == (125.0, 0.0, 0.0)
    assert info.kind_us["experts"] == (150.0, 0.0, 0.0)
    assert info.kind_us["stall"] == (0.0, 75.0, 0.0)
    assert info.link_us == (0.0, 200.0, 0.0)
    assert info.step_us == 400.0
    assert info.other_us == pytest.approx(50.0)


def test_ten_events_give_exactly_these_latencies(ten):
    info = latency_info(ten)
    assert info.steps == (1, 2)
    assert info.step_ms == pytest.approx((0.5, 0.3))
    assert (info.ttft_ms, info.p50_ms, info.p95_ms) == pytest.approx((1.0, 0.4, 0.49))
    assert info.cause_ms["stall"] == pytest.approx((0.15, 0.0))
    assert info.cause_ms["other"] == pytest.approx((0.1, 0.0))


def test_ten_events_give_exactly_these_bars(ten):
    info = lanes_info(ten, 0)
    found = {
        meaning: list(zip(bars.start_ms, bars.dur_ms, bars.nbytes, strict=True))
        for meaning, bars in info.bars.items()
        if bars.dur_ms
    }
    assert found == {
        "dense": [(0.0, 0.1, 0)],
        "experts": [(0.6, 0.4, 0)],
        "on_demand": [(0.0, 0.6, 6_000_000)],
        "host_wait": [(0.1, 0.02, 0)],
        "stall": [(0.12, 0.48, 0)],
    }
    assert (info.end_ms, info.num_events, info.phase, info.link_ms) == (1.0, 5, "prefill", 0.6)
    assert [span.moe_layer for span in info.layers] == [0]
    assert lanes_info(ten).steps[0].step == 1, "without a choice: decode steps"


def test_causes_of_a_step_add_up_to_it(run):
    info = latency_info(run)
    total = np.sum(list(info.cause_ms.values()), axis=0)
    np.testing.assert_allclose(total, info.step_ms)


def test_layers_and_other_add_up_to_the_mean_step(run):
    info = layers_info(run)
    assert info.other_us == pytest.approx(0.0, abs=1e-6)
    assert len(info.labels) == NUM_LAYERS + 1


def test_no_bar_is_lost_when_neighbours_are_merged(run):
    """Merging changes how many bars there are, never how long a lane was busy or how many bytes moved."""
    whole = lanes_info(run, range(8))
    few = lanes_info(run, range(8), max_bars=30)
    assert few.num_bars <= 30 < whole.num_bars
    for info in (whole, few):
        bars = info.bars.values()
        assert sum(sum(one.num_events) for one in bars) == len(run.events)
        assert sum(sum(one.busy_ms) for one in bars) == pytest.approx(run.events["dur_us"].sum() / 1e3)
        assert sum(sum(one.nbytes) for one in bars) == run.metrics.h2d_bytes


def test_a_long_stall_among_thousands_of_short_events_stays_visible():
    """Decimating by stride would hide what the figure is for."""
    rows = [Event("gpu", "dense", 0, "prefill", 0, -1, "", 0, 2.0 * i, 1.0) for i in range(20_000)]
    rows[7_777] = Event("stall", "stall", 0, "prefill", 0, -1, "", 0, 2.0 * 7_777, 900.0)
    run = ten_events_run()
    steps = run.steps.iloc[:1].assign(dur_us=40_000.0)
    info = lanes_info(replace(run, events=event_frame(rows), steps=steps), 0)
    assert info.num_bars <= 2_000
    assert info.bars["stall"].dur_ms == (0.9,)
    assert sum(sum(one.num_events) for one in info.bars.values()) == 20_000


def test_a_timeline_of_many_steps_stays_drawable():
    info = lanes_info(small_run(steps=400), range(400))
    assert info.num_bars <= 2_000
    assert len(info.steps) == 400, "no step is left out"


def test_load_counts_every_use_once():
    trace = small_trace(steps=5)
    info = load_info(trace)
    assert sum(map(sum, info.counts)) == len(trace) * NUM_LAYERS * TOP_K
    assert [sum(shares) for shares in info.share_pct] == pytest.approx([100.0] * NUM_LAYERS)
    assert len(info.counts[0]) == NUM_EXPERTS
    assert 25.0 <= info.top_quarter_pct <= 100.0
    assert load_info(trace, "prefill").num_tokens + load_info(trace, "decode").num_tokens == len(trace)


def test_the_slots_curve_is_sorted_and_groups_repeats():
    runs = [small_run(slots=slots, seed=seed) for slots in (24, 12) for seed in (0, 1, 2)]
    info = slots_curve_info(runs)
    assert [point.num_slots for point in info.points] == [12, 24]
    assert [point.num_runs for point in info.points] == [3, 3]
    for point in info.points:
        for least, median, most in (point.hit_rate_pct, point.tokens_per_s):
            assert least <= median <= most
    assert views.slots_curve(runs).data[0].y[1] >= views.slots_curve(runs).data[0].y[0]


@pytest.mark.parametrize("view", [views.timeline, views.layers], ids=lambda view: view.__name__)
def test_a_figure_that_needs_events_says_so(view, run):
    with pytest.raises(BadTrace, match="events=True"):
        view(replace(run, events=event_frame([])))


def test_without_events_latency_and_hit_rate_still_draw(run):
    blind = replace(run, events=event_frame([]))
    assert latency_info(blind).cause_ms == {}
    views.latency(blind)
    views.hit_rate(blind)


@pytest.mark.parametrize(
    "view", [views.layers, views.hit_rate, views.latency], ids=lambda view: view.__name__
)
def test_a_run_of_one_token_is_refused_with_the_remedy(view):
    with pytest.raises(BadTrace, match="more than one new token"):
        view(small_run(steps=1))


def test_what_is_not_there_is_named(run):
    with pytest.raises(BadTrace, match="there are 0 to 7"):
        views.timeline(run, 99)
    with pytest.raises(BadTrace, match="record_routing=True"):
        views.load(replace(run, trace=None))
    with pytest.raises(BadTrace, match="at least one run"):
        views.slots_curve([])
    assert views.timeline(small_run(steps=1)).data, "the prefill, if there is nothing else"

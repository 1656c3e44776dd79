"""The figures of the scheduling notebook."""

import re
from dataclasses import replace
from itertools import product

import numpy as np
import plotly.graph_objects as go
import pytest

from prescope import views
from prescope.errors import BadTrace, UnsupportedOption
from prescope.predictor import Frequency
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Machine, Recording, Scenario, Scenarios, hostile, machine_with_link, verdict
from prescope.traces.events import event_frame
from prescope.views.gpu_idle import gpu_idle_info
from prescope.views.lanes import MAX_BARS, MEANINGS, lanes_info, lanes_layout, lanes_traces
from prescope.views.link_use import link_use_info
from prescope.views.numbers import MORE_IS_BETTER, bound_numbers, change, formatted, numbers, numbers_text
from prescope.views.outcomes import outcomes_info, outcomes_layout, outcomes_traces, plot_outcomes
from prescope.views.recall_value import recall_value_info
from prescope.views.schedule_pair import schedule_pair_info, schedule_pair_traces
from prescope.views.step_times import (
    CAUSES,
    MOST_BARS,
    StepTimesInfo,
    Times,
    step_times_info,
    step_times_layout,
    step_times_traces,
)
from prescope.views.theme import NAMES
from prescope.views.threshold import threshold_info
from prescope.widgets import SlimFigureWidget
from tests.support.browser import offline_page
from tests.support.small_run import small_run, small_trace

COSTS = LayerCosts(
    link_us=60.0, gpu_us=12.0, rest_us=25.0, decide_us=6.0, cpu_us=(0.0, 40.0, 45.0, 50.0, 55.0), cpu_base_us=5.0,
    source="made for this test",
)  # fmt: skip
MACHINE = Machine("test", COSTS, 1_500_000, 30.0, 2)


@pytest.fixture(scope="module")
def scenarios():
    trace = small_trace(steps=9, batch=3)
    return Scenarios(trace, [MACHINE], [Frequency(trace, 2)])


@pytest.fixture(scope="module")
def results(scenarios):
    return scenarios.compare(Scenario(slots=12, machine="test"))


def test_every_figure_has_a_title_its_origin_and_units(results):
    figures = [
        views.lanes(results["presched"]),
        views.outcomes(results["presched"]),
        views.step_times(results["presched"]),
        views.schedule_pair(results["presched"], results["fate"]),
        views.link_use({name: results[name] for name in ("presched", "on-demand")}),
        views.gpu_idle(results),
    ]
    for figure in figures:
        assert type(figure) is go.Figure
        assert "<b>simulated</b>: costs: made for this test" in figure.layout.title.text
        assert figure.layout.xaxis.title.text
        assert (
            figure.layout.yaxis.title.text
            or figure.layout.yaxis.ticktext
            or figure.data[0].orientation == "h"
        )
        figure.to_json()


def test_what_was_measured_is_never_called_simulated(results):
    run = small_run(steps=9)
    for figure in (views.outcomes(results["presched"], run), views.step_times(results["presched"], run)):
        hovered = [trace for trace in figure.data if len(trace.y or ()) and trace.hoverinfo != "skip"]
        texts = {trace.hovertemplate for trace in hovered}
        assert any("simulated" in text for text in texts)
        assert any("measured, link emulated" in text for text in texts)
        assert not any("simulated" in text and "measured" in text for text in texts)
    assert "<b>measured, link emulated</b>" in views.lanes(run).layout.title.text
    assert (
        "others measured" in views.gpu_idle({"presched": results["presched"], "run": run}).layout.title.text
    )


def test_lanes_show_every_event_of_their_steps_once(results):
    """All of a step's time is on some lane, and each transfer says why it was made."""
    result = results["presched"]
    info = lanes_info(result, range(2, 4))
    assert set(info.bars) == set(MEANINGS)
    assert [span.step for span in info.steps] == [2, 3]
    begin, end = info.steps[0].start_ms, info.end_ms
    compute = sum(
        sum(info.bars[name].dur_ms) for name in ("dense", "experts", "stall", "cpu_wait", "host_wait")
    )
    assert compute == pytest.approx(end - begin)
    assert all("predicted for this layer" in text for text in info.bars["prefetch"].texts)
    assert all("token" in text for text in info.bars["on_demand"].texts + info.bars["prefetch"].texts)
    on_cpu = lanes_info(results["fiddler"]).bars["experts_cpu"].texts
    assert on_cpu
    assert all("sooner done where they lie" in text and "misses, those with" in text for text in on_cpu)
    assert "stream" in {name for name, bars in lanes_info(results["klotski"]).bars.items() if bars.texts}
    with pytest.raises(BadTrace, match="there are 1 to 8"):
        lanes_info(result, range(40, 42))


def test_too_many_bars_are_merged_and_the_figure_says_so():
    run = small_run(steps=400)
    info = lanes_info(run, range(1, 300))
    assert info.num_bars <= MAX_BARS
    assert len(info.steps) == 299
    assert "merged into neighbours" in views.lanes(run, range(1, 300)).layout.title.text


def test_the_links_bound_stands_in_its_lane(results):
    info = lanes_info(results["on-demand"], range(2, 4))
    assert info.link_ms == pytest.approx(sum(info.bars["on_demand"].dur_ms))
    line = lanes_layout(info)["shapes"][-1]
    assert (line["x0"], line["yref"]) == (info.link_ms, "y")


def test_a_steps_causes_add_up_to_it(results):
    for result in (results["presched"], small_run(steps=9)):
        times = step_times_info(result).times
        np.testing.assert_allclose(np.sum(list(times.cause_ms.values()), axis=0), times.step_ms, rtol=1e-6)


def test_no_simulated_mean_is_below_its_bound(results):
    for result in results.values():
        info = step_times_info(result)
        assert np.mean(info.times.step_ms) >= 0.999 * info.bound_ms
        assert step_times_info(result, with_bound=False).bound_ms != info.bound_ms


def test_the_table_of_numbers_is_that_of_the_results(results):
    result, run = results["presched"], small_run(steps=9)
    simulated, measured, bound = numbers(result), numbers(run), bound_numbers(result)
    assert (simulated.row, measured.row, bound.row) == ("simulated", "measured, link emulated", "bound")
    assert simulated.tokens_per_s == result.tokens_per_s <= bound.tokens_per_s * 1.001
    assert simulated.hit_pct == pytest.approx(100 * result.metrics.decode.hit_rate)
    assert simulated.link_pct == pytest.approx(100 * result.metrics.decode.link_use_frac)
    assert simulated.mb_per_token == pytest.approx(result.metrics.decode.h2d_bytes / result.num_tokens / 1e6)
    assert measured.p50_ms == pytest.approx(run.metrics.decode.step_p50_ms)
    assert measured.ttft_ms == pytest.approx(run.metrics.ttft_ms)
    assert change(simulated, simulated).tokens_per_s == 0
    table = numbers_text([simulated, measured])
    assert list(table.index) == ["simulated", "measured, link emulated"]
    assert table.loc["simulated", "tokens/s"] == formatted(result.tokens_per_s, field="tokens_per_s")


@pytest.mark.parametrize("kind", ["recorded", "cyclic"])
@pytest.mark.parametrize("link", [0.25, 1.0, 50.0])
def test_nothing_in_the_row_of_bounds_is_beaten_by_any_schedule(scenarios, kind, link):
    """An oracle's prefetches over a fast link hit 88 % where 51 % was called the bound, and where the slots overflow
    once in a while half of the steps were seven times as fast as "the bound" of the median, which was the mean's.
    """
    trace = scenarios.trace if kind == "recorded" else hostile(scenarios)[kind].trace
    there = Scenarios(trace, [machine_with_link(MACHINE, link)], label=kind)
    [machine] = there.machines
    beaten, total = [], there.num_experts
    for schedule, slots, cpu in product(SCHEDULES, (total // 4, total // 2, total - 1), (False, True)):
        scenario = Scenario(
            schedule=schedule, slots=slots, predictor="oracle", lookahead=2, width=8, machine=machine, cpu=cpu
        )
        result = there.run(scenario)
        found, bound = numbers(result), bound_numbers(result)
        assert bound.tokens_per_s > 0 and (cpu or bound.mb_per_token > 0)
        for field, is_more in (MORE_IS_BETTER | {"link_pct": False}).items():
            best, mine = getattr(bound, field), getattr(found, field)
            if best == best and (mine > 1.001 * best if is_more else mine < 0.999 * best):
                beaten.append((schedule, slots, cpu, field, mine, best))
    assert beaten == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), "-"),
        (0.0, "0.00"),
        (1234.5, "1,234"),
        (12.345, "12.3"),
        (1.2345, "1.23"),
        (0.00732, "0.0073"),
    ],
)
def test_numbers_are_written_as_people_read_them(value, text):
    assert formatted(value) == text


def test_small_memory_is_not_written_in_gib():
    assert formatted(0.00366, field="slots_gib") == "3.75 MiB"


def test_a_threshold_trades_recall_for_precision_as_scores_say(scenarios):
    info = threshold_info(scenarios, Scenario(slots=12, machine="test"), thresholds=(0.0, 0.2, 0.4, 0.8))
    assert list(info.recall_pct) == sorted(info.recall_pct, reverse=True)
    copied = [a + b for a, b in zip(info.useful_mb, info.wasted_mb, strict=True)]
    assert copied[0] >= copied[-1]
    assert all(0 <= value <= 100 for value in (*info.precision_pct, *info.recall_pct, *info.covered_pct))
    with pytest.raises(UnsupportedOption, match="nothing is predicted"):
        threshold_info(scenarios, Scenario(schedule="on-demand", slots=12, machine="test"))


def test_the_worth_of_recall_is_what_the_simulator_says_at_each_recall(scenarios):
    scenario = Scenario(slots=12, machine="test", predictor="frequency")
    info = recall_value_info(scenarios, scenario, recalls=(0.5, 0.8, 1.0))
    assert info.tokens_per_s[-1] == scenarios.run(replace(scenario, predictor="oracle")).tokens_per_s
    assert info.without == scenarios.run(replace(scenario, predictor="none")).tokens_per_s
    (frequency,) = info.real
    assert frequency.tokens_per_s == scenarios.run(scenario).tokens_per_s
    assert 0.0 < frequency.recall < 1.0
    assert info.pct_a_point == pytest.approx(2.0 * (info.tokens_per_s[-1] / info.tokens_per_s[0] - 1.0))
    figure = views.recall_value(scenarios, scenario, (0.5, 1.0))
    assert "no predictions" in figure.layout.title.text and figure.layout.xaxis.title.text
    with pytest.raises(UnsupportedOption, match="looks at no prediction"):
        views.recall_value(scenarios, replace(scenario, schedule="on-demand"))


@pytest.mark.parametrize("schedule", ["presched", "on-demand", "fiddler"])
def test_a_verdict_follows_its_numbers(scenarios, schedule):
    found = verdict(scenarios, Scenario(schedule=schedule, slots=12, machine="test"))
    assert found.perfect_gain >= found.gain
    assert found.with_it is not None
    assert found.gain == pytest.approx(found.with_it.tokens_per_s / found.without.tokens_per_s - 1)
    assert found.without.config["predictor"] == "none"
    word = {True: "pay", False: "does not pay", None: "nothing"}[found.pays]
    assert word in found.words
    assert f"{100 * found.gain:+.0f} %" in found.words


@pytest.mark.parametrize("has_lane", [True, False], ids=["CPU lane", "no CPU lane"])
@pytest.mark.parametrize(
    "schedule", [name for name, way in SCHEDULES.items() if way.predictor == "none"] + ["presched"]
)
def test_the_best_without_prediction_is_no_slower_than_what_is_shown_without(schedule, has_lane):
    """PreSched without predictions had 39.4 tokens/s, and the line below called on demand, 32.8, the best without."""
    trace = small_trace(steps=9, batch=3)
    costs = COSTS if has_lane else replace(COSTS, cpu_us=(0.0,))
    scenarios = Scenarios(trace, [MACHINE._replace(costs=costs)], [Frequency(trace, 2)])
    for cache in (None, "lfu"):
        scenario = Scenario(schedule=schedule, slots=24, machine="test", predictor="none", cache=cache)
        found = verdict(scenarios, scenario)
        assert found.without.tokens_per_s >= scenarios.run(scenario).tokens_per_s
        assert found.without.config["predictor"] == "none"


def test_outcomes_and_times_are_those_of_the_tables(results):
    result, run = results["presched"], small_run(steps=9)
    info = outcomes_info(result, run)
    steps = len(result.needs.steps)
    assert sum(map(sum, info.counts)) * steps == pytest.approx(result.counts.needed)
    assert sum(info.counts.on_cpu) * steps == pytest.approx(result.counts.on_cpu)
    assert info.measured is not None
    assert sum(info.measured.hit) * 8 == pytest.approx(run.metrics.decode.hits)
    times = step_times_info(result, run)
    assert times.times.tokens_per_s == pytest.approx(result.tokens_per_s)
    assert times.measured is not None
    assert times.measured.tokens_per_s == pytest.approx(run.metrics.tokens_per_s)
    assert times.error_pct == pytest.approx(100 * (result.tokens_per_s / run.metrics.tokens_per_s - 1))
    assert np.isnan(step_times_info(result).error_pct)
    with pytest.raises(BadTrace, match="more than one new token"):
        views.outcomes(small_run(steps=1))


def test_link_use_is_the_time_copies_took(results):
    info = link_use_info({"presched": results["presched"], "few bins": results["presched"]}, bins=64)
    assert [use.name for use in info.uses] == ["PreSched", "few bins"], "as in the figures beside it"
    decode = results["presched"].metrics.decode
    assert info.uses[0].mean_pct == pytest.approx(100 * decode.link_use_frac, rel=0.02)
    assert max(info.uses[0].busy_pct) <= 100.0 + 1e-9
    assert len(info.uses[0].busy_pct) == 8, "one a step"
    assert len(link_use_info(results, bins=5).uses[0].busy_pct) == 5


def test_busy_and_idle_add_up_to_the_step(results):
    info = gpu_idle_info(results)
    for i, step in enumerate(info.step_ms):
        assert sum(values[i] for values in info.ms.values()) == pytest.approx(step)
    assert list(info.step_ms) == sorted(info.step_ms)
    assert set(info.names) == {schedule.title for schedule in SCHEDULES.values()}
    assert info.bound_ms <= info.step_ms[0] * 1.001
    with pytest.raises(BadTrace, match="events=True"):
        gpu_idle_info({"blind": replace(small_run(), events=event_frame([]))})


@pytest.mark.parametrize(
    ("traces", "info"),
    [
        (lanes_traces, lanes_info),
        (outcomes_traces, outcomes_info),
        (step_times_traces, step_times_info),
    ],
)
def test_a_live_figure_swaps_numbers_and_equals_a_new_one(results, traces, info):
    first, second = info(results["presched"]), info(results["klotski"])
    widget = SlimFigureWidget(go.Figure(traces(first)))
    widget.show_parts(traces(first), {})
    widget.show_parts(traces(second), {"annotations": []})
    fresh = go.Figure(traces(second))
    mine = [{**one.to_plotly_json(), "uid": ""} for one in widget.data]
    assert mine == [{**one.to_plotly_json(), "uid": ""} for one in fresh.data]


def test_a_pair_has_each_meaning_once_in_the_legend(results):
    info = schedule_pair_info(results["klotski"], results["presched"])
    shown = [trace["name"] for trace in schedule_pair_traces(info) if trace.get("showlegend")]
    assert len(shown) == len(set(shown))
    assert info.end_ms == max(info.upper.end_ms, info.lower.end_ms)


@pytest.mark.parametrize(("count", "form"), [(MOST_BARS, "bar"), (MOST_BARS + 1, "scatter")])
def test_many_steps_are_areas_of_the_same_height_as_bars(count, form):
    steps = tuple(range(3, 3 + count))
    causes = dict.fromkeys(CAUSES, (0.0,) * count) | {"dense": (1.0,) * count, "stall": (0.5,) * count}
    info = StepTimesInfo(Times(steps, (1.5,) * count, 9.0, "simulated", causes), "", "", None, float("nan"))
    causes_drawn = step_times_traces(info)[: 2 * len(CAUSES)]
    filled = [trace for trace in causes_drawn if trace["x"]]
    assert {trace["type"] for trace in filled} == {form}
    assert [trace["name"] for trace in filled if trace["visible"]] == [NAMES["dense"], NAMES["stall"]]
    height = {x: sum(trace["y"][i] for trace in filled) for i, x in enumerate(filled[0]["x"])}
    assert {height[step] for step in steps} == {1.5}
    low, high = step_times_layout(info)["xaxis"]["range"]
    if form == "scatter":
        assert (min(height), max(height)) == (low, high), (
            "the first and the last step are as broad as the others"
        )


#: Where the text along a figure's y axis begins and ends, its title ends and its legend begins, in pixels from the top.
ALONG_Y = """
() => {
  const [text, title, legend] = [".ytitle", ".gtitle", ".legend"].map(
    (name) => document.querySelector(name).getBoundingClientRect());
  return [text.top, text.bottom, title.bottom, legend.top];
}
"""


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [700, 770, 1180])
def test_in_a_panel_the_text_along_the_axis_covers_no_other(results, tmp_path, width):
    """Beside the controls, at 1280 pixels, five names of the legend left less of the plot than the text is long."""
    run = small_run(steps=9, batch=3)
    for measured in (None, run):
        info = outcomes_info(results["presched"], measured)
        figure = (
            plot_outcomes(info).update_layout(outcomes_layout(info, brief=True)).update_layout(width=width)
        )
        for trace in figure.data:
            trace.showlegend = bool(trace.visible)  # the most that there can be
        figure.write_html(tmp_path / "figure.html")
        with offline_page(tmp_path / "figure.html") as (page, *_):
            top, bottom, title, legend = page.evaluate(ALONG_Y)
        assert title < top and bottom < legend


@pytest.mark.parametrize("draw", [views.lanes, views.outcomes, views.step_times])
def test_what_is_empty_is_not_drawn(results, draw):
    """A slider's move redraws every trace that is visible, and half of them hold nothing."""
    figure = draw(results["presched"])
    assert any(trace.visible is False for trace in figure.data)
    for trace in figure.data:
        values = trace.x if trace.orientation == "h" else trace.y
        assert (trace.visible is not False) == bool(len(values) and any(values)), trace.name


@pytest.mark.parametrize("slots", [8, 64, 128, 200])
@pytest.mark.parametrize("schedule", ["on-demand", "klotski", "presched"])
@pytest.mark.parametrize("batch", [1, 3])
def test_no_line_of_advice_gives_more_than_its_bound(slots, schedule, batch):
    """Perfect prediction would give 272, it said, and the bound is 157: with the CPU lane, and without."""
    scenarios = Recording.load("medium.b1").scenarios().at_batch(batch)
    found = verdict(scenarios, Scenario(schedule=schedule, slots=slots, machine=scenarios.first_machine))
    said = re.search(r"would give ([\d,.]+), the bound[a-zA-Z ]* is ([\d,.]+)", found.words)
    if said is not None:
        most, bound = (float(number.replace(",", "").rstrip(".")) for number in said.groups())
        assert most <= 1.01 * bound, found.words
    assert "would give" in found.words or "at most" in found.words

"""The figures of the scheduling notebook, and its panels without a browser, on the embedded model."""

import time
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest

from prescope import views
from prescope.core.machine import this_place
from prescope.errors import BadTrace, TransferFailed
from prescope.predictor import Frequency
from prescope.profile import HardwareProfile
from prescope.scheduler import SCHEDULES
from prescope.session import Session
from prescope.simulator import Scenario, Scenarios
from prescope.traces.events import event_frame
from prescope.views.gpu_idle import gpu_idle_info
from prescope.views.lanes import MAX_BARS, MEANINGS, lanes_info, lanes_traces
from prescope.views.link_use import link_use_info
from prescope.views.outcomes import outcomes_info, outcomes_traces
from prescope.views.schedule_pair import schedule_pair_info, schedule_pair_traces
from prescope.views.step_times import step_times_info, step_times_traces
from prescope.widgets import SlimFigureWidget, pair_panel, schedule_panel
from tests.simulator.test_scenarios import MACHINE, small_trace
from tests.support.browser import chromium, jupyterlab, run_all
from tests.support.small_run import small_run

PROMPTS = ["Once upon a time", "def add(a, b):"]
#: What a move of a slider may take here, all in Python: the limit for a person is 150 ms.
REDRAW_MS = 150.0


@pytest.fixture(scope="module")
def scenarios():
    trace = small_trace(steps=9, batch=3)
    return Scenarios(trace, [MACHINE], [Frequency(trace, 2)])


@pytest.fixture(scope="module")
def results(scenarios):
    return scenarios.compare(Scenario(slots=12))


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
        names = {trace.name for trace in figure.data if len(trace.y or ())}
        assert any("(simulated)" in name or name == "simulated" for name in names)
        assert any("measured, link emulated" in name for name in names)
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


def test_too_many_bars_show_fewer_steps_and_say_so():
    run = small_run(steps=400)
    info = lanes_info(run, range(1, 300))
    assert sum(len(bars.dur_ms) for bars in info.bars.values()) <= MAX_BARS
    assert info.left_out == 299 - len(info.steps) > 0
    assert f"{info.left_out} more" in views.lanes(run, range(1, 300)).layout.title.text


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


# -- panels --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session():
    with Session(slots=32, device="cpu", link_gb_per_s=2.0, record_inputs=True) as session:
        session.run(PROMPTS, max_new_tokens=2)
        session.run(PROMPTS, max_new_tokens=8)
        yield session


@pytest.fixture(scope="module")
def recorded(session):
    run = session.runs[1]
    profile = HardwareProfile.load("test_machine")
    # The CPU lane's times are another machine's, and good enough to choose by.
    profile = replace(profile, place=this_place(run.hardware))
    return session.scenarios(run, predictors=[Frequency(run.trace, 4)], profile=profile)


@pytest.fixture
def panel(session, recorded):
    panel = session.schedule_panel(recorded, PROMPTS, max_new_tokens=8)
    yield panel
    panel.close()


def test_a_move_is_answered_within_150_ms(panel):
    """Simulated, and all three figures drawn; the best of three tries each, for the machine is shared."""
    moves = [
        ("slots", (40, 64, 24)),
        ("lookahead", (3, 4, 1)),
        ("width", (2, 5, 1)),
        ("threshold", (0.5, 0.1, 0.9)),
        ("schedule", ("fate", "klotski", "presched")),
        ("cache", ("lfu", "score", "shallow")),
        ("cpu", (False, True, False)),
        ("recall", (0.5, 0.6, 0.7)),
        ("machine", (*panel.machine.options[:2], panel.machine.options[0])),
    ]
    panel.predictor.value = "noisy oracle"
    slowest = {}
    for name, values in moves:
        took = []
        for value in values:
            begin = time.perf_counter()
            getattr(panel, name).value = value
            took.append(1e3 * (time.perf_counter() - begin))
        slowest[name] = min(took)
    assert max(slowest.values()) < REDRAW_MS, slowest


def test_every_control_reaches_the_simulator_and_the_figures_in_place(panel):
    figures = dict(panel.figures)
    panel.slots.value, panel.cache.value, panel.width.value = 48, "lfu", 2
    config = panel.result.config
    assert (config["num_slots"], config["cache"], config["width"]) == (48, "lfu", 2)
    assert panel.figures == figures, "the same widgets"
    assert all("48 slots" in figure.layout.title.text for figure in panel.figures.values())
    assert "<b>38 %</b> = 48 of 128 experts" in panel.slots_label.value
    panel.schedule.value = "fiddler"
    own = SCHEDULES["fiddler"]
    assert panel.result.config["cache"] == own.cache, "a schedule comes with its own settings"
    assert panel.predictor.value == "none"
    panel.choose(Scenario(schedule="presched", slots=30, predictor="frequency", lookahead=2, cache="score"))
    assert panel.state()["slots"] == 30 and panel.result.config["predictor"] == "frequency"
    panel.step.value = 4
    assert panel.figures["lanes"].layout.annotations[0].text.startswith("step 4")


def test_run_for_real_lays_measured_over_simulated_while_the_settings_stay(panel, session):
    panel.choose(Scenario(schedule="presched", slots=40, predictor="frequency"))
    run = panel.start().result(60)
    state = panel.state()
    assert state["status"].startswith("done"), state["status"]
    assert run.tokens == session.runs[1].tokens, "a schedule changes no token"
    assert run.config["schedule"] == "presched" and run.config["num_slots"] == 40
    assert state["measured_tokens_per_s"] == pytest.approx(run.metrics.tokens_per_s)
    assert len(panel.figures["step_times"].data[1].y) == 7
    assert "measured, link emulated" in panel.figures["outcomes"].layout.title.text
    panel.slots.value = 41
    assert panel.measured is None
    assert "measured" not in panel.figures["outcomes"].layout.title.text
    panel.slots.value = 40
    assert panel.measured is run, "it is shown again where it belongs"


def test_without_prefetches_the_replay_counts_what_the_engine_counted(panel):
    panel.choose(Scenario(schedule="on-demand", slots=64))
    run = panel.start().result(60)
    counts, decode = panel.result.counts, run.metrics.decode
    assert (counts.hits, counts.misses, counts.needed) == (decode.hits, decode.misses, decode.needed)


def test_what_cannot_be_run_here_switches_the_button_off(panel):
    panel.predictor.value = "oracle"
    assert panel.run_button.disabled and "oracle" in panel.run_button.tooltip
    panel.predictor.value = "frequency"
    assert not panel.run_button.disabled
    panel.machine.value = panel.machine.options[1]
    assert panel.run_button.disabled and "simulated" in panel.run_button.tooltip


def test_cancel_and_a_failed_run_leave_the_simulation(panel, session, monkeypatch):
    job = panel.start()
    job.on_step(lambda job: panel.cancel_button.click() if job.num_tokens == 2 else None)
    job.result(60)
    assert "cancelled" in panel.state()["status"]

    def fail(*_args: object, **_keywords: object) -> None:
        raise TransferFailed("the cable <is> out")

    monkeypatch.setattr(session.engine, "generate", fail)
    panel.run_button.click()
    with pytest.raises(TransferFailed):
        panel.job.result(60)
    assert "the cable &lt;is&gt; out" in panel.status.value
    assert not panel.state()["running"] and panel.figures["lanes"].data


def test_a_pair_says_why_for_both(session, recorded):
    pair = session.pair_panel(recorded, Scenario(slots=32), "presched", "on-demand")
    upper = pair.explained()[0]
    assert (upper.step, upper.moe_layer) == (pair.step.value, pair.layer.value)
    assert "PreSched" in pair.tables.value and "On demand" in pair.tables.value
    former, pair.layer.value = pair.tables.value, 5
    assert pair.tables.value != former and "MoE layer 5" in pair.tables.value
    pair.lower.value = "fate"
    assert "Fate-like" in pair.tables.value
    assert any("Fate-like" in note.text for note in pair.figure.layout.annotations)
    second = session.pair_panel(recorded, Scenario(slots=32))
    assert pair.view.comm is None
    second.close()


def test_without_a_browser_the_panels_show_plain_figures(session, recorded, panel, monkeypatch):
    shown: list[object] = []
    monkeypatch.setattr(schedule_panel, "display", shown.append)
    monkeypatch.setattr(pair_panel, "display", shown.append)
    monkeypatch.setenv("PRESCOPE_HEADLESS", "1")
    panel._ipython_display_()
    assert [type(item) for item in shown[1:]] == [go.Figure] * 3
    shown.clear()
    session.pair_panel(recorded, Scenario(slots=32))._ipython_display_()
    assert type(shown[0]) is go.Figure
    monkeypatch.delenv("PRESCOPE_HEADLESS")
    panel._ipython_display_()
    assert shown[-1] is panel.view


LAB_CELLS = [
    "from prescope.workbench import Session\n"
    "session = Session(slots=32, device='cpu', link_gb_per_s=2.0)\n"
    "run = session.run(['Once upon a time'], max_new_tokens=24)",
    "panel = session.schedule_panel(session.replays(), ['Once upon a time'], max_new_tokens=24)\npanel",
]
#: Notes when a key went down and when the last of three titles followed.
WATCH = """
() => {
  const titles = () => [...document.querySelectorAll('.gtitle')].map(t => t.textContent).join('|');
  window.moves = [];
  window.addEventListener('keydown', (event) => {
    const begin = performance.now(), former = titles().match(/(\\d+) slots/)[1];
    const look = () => {
      const now = [...titles().matchAll(/(\\d+) slots/g)].map(m => m[1]);
      if (now.length >= 3 && now.every(n => n !== former)) window.moves.push(performance.now() - begin);
      else requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
  }, true);
}
"""


@pytest.mark.browser
@pytest.mark.slow
def test_in_jupyterlab_a_move_of_the_slider_is_seen_at_once(tmp_path):
    """From the key to the last of three figures drawn, with everything between: kernel, messages, browser."""
    with jupyterlab(tmp_path, LAB_CELLS) as lab, chromium(lab) as (page, requests, errors):
        run_all(page, lab)
        page.wait_for_function(
            "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 9", timeout=120_000
        )
        page.evaluate(WATCH)
        handle = page.locator(".widget-hslider", has_text="slots").locator(".noUi-handle")
        handle.focus()
        for i in range(6):
            page.keyboard.press("ArrowRight")
            page.wait_for_function(f"window.moves.length > {i}", timeout=30_000)
            page.wait_for_timeout(300)
        moves = sorted(page.evaluate("window.moves"))
        print("key to drawn, ms:", [round(ms) for ms in moves])
        # Twice the aim: Lab, browser and kernel share what cores there are; 149 ms on two idle ones, 202 on busy ones.
        assert moves[len(moves) // 2] < 2 * REDRAW_MS, moves
        for _ in range(10):
            page.keyboard.press("ArrowRight")
        title = "[...document.querySelectorAll('.gtitle')].map(t => t.textContent).join('|')"
        page.wait_for_function(
            f"({title}).split('48 slots').length === 4", timeout=30_000
        )  # the last one wins
        assert requests == []
        assert [error for error in errors if "prescope" in error.lower() or "plotly" in error.lower()] == []

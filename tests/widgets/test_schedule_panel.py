"""The panel of schedules, the pair, runs and the dashboard without a browser, on the embedded model."""

import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from types import SimpleNamespace

import plotly.graph_objects as go
import pytest

from prescope.core.machine import this_place
from prescope.engine.job import Job
from prescope.errors import TransferFailed, UnsupportedOption
from prescope.predictor import Frequency
from prescope.profile import HardwareProfile
from prescope.scheduler import SCHEDULES
from prescope.session import Session
from prescope.simulator import Recording, Scenario
from prescope.views.lanes import lanes_info, lanes_traces
from prescope.views.numbers import formatted
from prescope.views.step_times import step_times_info
from prescope.widgets import capacity_panel, pair_panel, schedule_panel, showing
from prescope.widgets.dashboard import TABS
from tests.support.speed import assert_within

PROMPTS = ["Once upon a time", "def add(a, b):"]
#: What a move of a slider may take here, all in Python: the limit for a person is 150 ms.
REDRAW_MS = 150.0


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


def test_a_move_is_simulated_and_drawn_within_150_ms(panel, monkeypatch):
    """The best of three values each; the line of advice comes when the slider rests."""
    own = SimpleNamespace(perf_counter=time.thread_time, monotonic=time.monotonic)
    monkeypatch.setattr(schedule_panel, "time", own)
    settings = panel.settings
    moves = [
        ("slots", (40, 64, 24)),
        ("lookahead", (3, 4, 1)),
        ("width", (2, 5, 1)),
        ("threshold", (0.5, 0.1, 0.9)),
        ("schedule", ("fate", "klotski", "presched")),
        ("cache", ("lfu", "score", "shallow")),
        ("recall", (0.5, 0.6, 0.7)),
        ("machine", (*settings.machine.options[:2], settings.machine.options[0])),
    ]
    settings.predictor.value = "noisy oracle"
    for name, values in moves:
        left = iter(values)

        def move(name=name, left=left):
            getattr(settings, name).value = next(left)
            return sum(panel.drawn)

        assert_within(REDRAW_MS, move, name, tries=len(values))


def test_every_control_reaches_the_simulator_and_the_figures_in_place(panel):
    figures, settings = dict(panel.figures), panel.settings
    settings.slots.value, settings.cache.value, settings.width.value = 48, "lfu", 2
    config = panel.result.config
    assert (config["num_slots"], config["cache"], config["width"]) == (48, "lfu", 2)
    assert panel.figures == figures, "the same widgets"
    assert settings.fields["slots"].note == "<b>38 %</b> of 128, 5.62 MiB"
    settings.schedule.value = "fiddler"
    assert panel.result.config["cache"] == SCHEDULES["fiddler"].cache, (
        "a schedule comes with its own settings"
    )
    assert settings.predictor.value == "none"
    panel.choose(Scenario(schedule="presched", slots=30, predictor="frequency", lookahead=2, cache="score"))
    assert panel.state()["slots"] == 30
    assert panel.result.config["predictor"] == "frequency"
    panel.steps.value = 4, 5
    assert panel.figures["lanes"].layout.annotations[0].text.startswith("step 4")


def test_controls_that_do_nothing_are_off_and_say_why(panel):
    panel.settings.schedule.value = "on-demand"
    for name in ("predictor", "lookahead", "width", "threshold", "cpu"):
        field = panel.settings.fields[name]
        assert field.control.disabled, name
        assert "On demand" in field.note, name
    panel.settings.schedule.value = "presched"
    panel.settings.predictor.value = "frequency"
    for name in ("predictor", "lookahead", "width", "threshold"):
        field = panel.settings.fields[name]
        assert not field.control.disabled, name
        assert not field.note, name
    assert panel.settings.recall.disabled
    assert all(field.control.tooltip for field in panel.settings.fields.values())


def test_the_page_is_told_exactly_what_the_builders_say(panel):
    """After a move a page's reload drew dense bars as a diagonal: the traces had lost their `y`."""
    lanes = panel.figures["lanes"]
    for step in (3, 2, 4):
        panel.steps.value = step, step + 1
        echo = [{"uid": trace.uid, "y": list(trace.y), "x": list(trace.x)} for trace in lanes.data]
        lanes.set_state(
            {"_js2py_traceDeltas": {"trace_deltas": echo, "trace_edit_id": lanes._last_trace_edit_id}}
        )
    expected = lanes_traces(lanes_info(panel.result, range(4, 6)))
    found = lanes.get_state()["_widget_data"]
    for mine, wanted in zip(found, expected, strict=True):
        assert {key: list(mine[key]) for key in ("x", "y", "base")} == {
            key: wanted[key] for key in ("x", "y", "base")
        }


def test_steps_and_layers_of_the_lanes_are_chosen(panel):
    lanes = panel.figures["lanes"]
    panel.steps.value = 2, 6
    assert lanes.layout.title.text.count("5 decode steps")
    assert tuple(lanes.layout.xaxis.range) == (0, pytest.approx(lanes_info(panel.result, range(2, 7)).end_ms))
    shape = panel.figures["step_times"].layout.shapes[0]
    assert (shape.x0, shape.x1) == (1.5, 6.5), "the overview marks them"
    panel.layers.value = 3, 4
    wanted = lanes_info(panel.result, range(2, 7), layers=range(3, 5))
    assert len(lanes.data[0].x) == len(wanted.layers) == 5 * 2
    assert "MoE layers 3 to 4" in lanes.layout.title.text
    assert not any("bound" in (note.text or "") for note in lanes.layout.annotations), (
        "of two layers' copies it is none"
    )
    panel.layers.value = panel.layers.min, panel.layers.max
    assert any("bound" in note.text for note in lanes.layout.annotations)


def test_dragging_over_the_overview_chooses_the_steps(panel):
    """As the page tells it: a zoom, that the overview itself does not keep."""
    overview = panel.figures["step_times"]
    moved = {"xaxis.range[0]": 2.6, "xaxis.range[1]": 5.4}
    overview.set_state({"_js2py_relayout": {"relayout_data": moved, "source_view_id": "v"}})
    assert panel.steps.value == (3, 5)
    assert tuple(overview.layout.xaxis.range) == (panel.steps.min - 0.5, panel.steps.max + 0.5), (
        "it shows all of them"
    )
    assert not overview.zoomed


def test_presets_put_the_controls_where_they_belong_and_pinned_comes_back(panel, recorded):
    buttons = panel.presets.buttons
    assert buttons["Pinned"].disabled
    panel.choose(Scenario(schedule="fate", slots=30, predictor="frequency", lookahead=2))
    pinned = panel.scenario
    panel.pin()
    for name, schedule in (("On demand", "on-demand"), ("Default", "presched")):
        buttons[name].click()
        assert panel.settings.schedule.value == schedule
        assert panel.settings.slots.value == 30
    default = panel.result.tokens_per_s
    buttons["Best found"].click()
    assert panel.result.tokens_per_s >= default
    rates = [result.tokens_per_s for result in recorded.compare(panel.scenario).values()]
    assert panel.result.tokens_per_s >= 0.999 * max(rates)
    buttons["Pinned"].click()
    assert panel.scenario == pinned


def test_the_code_that_is_copied_gives_what_is_shown(panel, recorded, session):
    panel.choose(Scenario(schedule="presched", slots=30, predictor="frequency", threshold=0.3))
    names = {"scenarios": recorded, "session": session, "prompts": PROMPTS}
    exec(panel.presets.copy.text, names)
    assert names["result"].step_us.tolist() == panel.result.step_us.tolist()
    assert names["run"].config["schedule"] == "presched"
    panel.settings.predictor.value = "oracle"
    assert "session.run" not in panel.presets.copy.text, "it can only be simulated"


def test_zoom_and_time_axis_outlive_every_move(panel):
    lanes = panel.figures["lanes"]
    axis = tuple(lanes.layout.xaxis.range)
    panel.settings.slots.value = 100
    assert tuple(lanes.layout.xaxis.range) == axis, "bars of two settings are compared on one axis"
    lanes.set_state(
        {
            "_js2py_relayout": {
                "relayout_data": {"xaxis.range[0]": 0.5, "xaxis.range[1]": 0.75},
                "source_view_id": "v",
            }
        }
    )
    panel.settings.slots.value = 20
    assert tuple(lanes.layout.xaxis.range) == (0.5, 0.75)
    panel.fit()
    assert tuple(lanes.layout.xaxis.range) == (
        0,
        pytest.approx(lanes_info(panel.result, panel.shown_steps).end_ms),
    )
    assert not lanes.zoomed


def test_numbers_are_always_there_and_say_whether_prediction_pays(panel):
    text = panel.numbers.text
    for row in ("simulated", "measured", "bound", "pinned"):
        assert row in text
    assert "Prediction" in text
    panel.pin()
    panel.settings.slots.value = 100
    assert "simulated against pinned" in panel.numbers.text
    assert "nan" not in panel.numbers.text.lower()


def test_run_for_real_lays_measured_over_simulated_while_the_settings_stay(panel, session):
    panel.choose(Scenario(schedule="presched", slots=40, predictor="frequency"))
    run = panel.start().result(60)
    state = panel.state()
    assert state["status"].startswith("done"), state["status"]
    assert run.tokens == session.runs[1].tokens, "a schedule changes no token"
    assert (run.config["schedule"], run.config["num_slots"]) == ("presched", 40)
    assert state["measured_tokens_per_s"] == pytest.approx(run.metrics.tokens_per_s)
    assert len(panel.figures["step_times"].data[-2].y) == 7
    assert "measured, link emulated" in panel.figures["outcomes"].layout.title.text
    assert panel.beside.data, "measured lanes under the simulated ones"
    assert "measured, link emulated" in panel.numbers.text
    panel.settings.slots.value = 41
    assert panel.measured is None
    assert "measured" not in panel.figures["outcomes"].layout.title.text
    assert not panel.state()["status"].startswith("done"), "a run of other settings is not this one's"
    panel.settings.slots.value = 40
    assert panel.measured is run, "it is shown again where it belongs"


def test_of_sequences_that_ended_early_tokens_are_counted_alike_and_it_is_said(panel, session, monkeypatch):
    """The table had 46.6 tokens/s, the figure 63.4: rows of ended sequences go on in the steps, and write nothing."""
    panel.choose(Scenario(schedule="presched", slots=44, predictor="frequency"))
    plain = panel.start().result(60)
    assert "ended early" not in panel.state()["status"]
    ends = plain.tokens[0][3]
    monkeypatch.setitem(panel.real._keywords, "eos_token_id", ends)
    monkeypatch.setitem(panel.real._keywords, "pad_token_id", 0)
    run = panel.start().result(60)
    assert sorted(map(len, run.tokens)) == [4, 8], "of the two only the first says that token"
    assert "1 of 2 sequences ended early" in panel.state()["status"]
    rate = step_times_info(panel.result, run).measured.tokens_per_s
    assert rate == pytest.approx(run.metrics.tokens_per_s)
    assert rate < sum(run.steps["tokens"][1:]) / (run.steps["dur_us"][1:].sum() / 1e6)


def test_text_rates_and_remaining_time_are_shown_while_a_run_goes_on(panel, session):
    panel.choose(Scenario(schedule="on-demand", slots=20))
    panel.real.tokens.value = 40
    shown: list[tuple[str, str, str]] = []
    told = panel.real._show_live

    def note(job: object) -> None:
        told(job)
        shown.append((panel.real.text.value, panel.real.live.value, panel.real.controls.status.value))

    panel.real._show_live = note
    run = panel.start().result(60)
    texts = [text for text, _, _ in shown if "▍" in text]
    assert texts, "nothing was shown before the end"
    assert any("hit rate so far" in live and "ms per token" in live for _, live, _ in shown)
    assert any("s left" in status for _, _, status in shown)
    for text in run.text:
        assert text[:200] in unescape(panel.real.text.value)
    first = unescape(texts[0]).split("… ")[1].split("▍")[0]
    assert run.text[0].startswith(first)


def test_controls_moved_during_a_run_are_not_called_done(panel):
    panel.choose(Scenario(schedule="on-demand", slots=24))
    job = panel.start()
    panel.settings.slots.value = 26
    job.result(60)
    assert "moved meanwhile" in panel.state()["status"]
    assert panel.measured is None


def test_a_run_that_ends_while_the_next_one_begins_is_of_its_own_settings(panel, session, monkeypatch):
    """The former run, ended by the next one's start, was kept as measured with the next one's settings."""
    jobs, prepare, is_amid, go_on = [], session.prepare, threading.Event(), threading.Event()

    def hold(job):
        if job.num_tokens >= 3:
            is_amid.set()
            assert go_on.wait(30)

    def prepared(*given, **keywords):
        job = prepare(*given, **keywords)
        if jobs:
            go_on.set()
            jobs[0].result(60)
        else:
            job.on_step(hold)
        jobs.append(job)
        return job

    monkeypatch.setattr(session, "prepare", prepared)
    panel.choose(Scenario(schedule="on-demand", slots=26))
    panel.start()
    assert is_amid.wait(60)
    panel.choose(Scenario(schedule="on-demand", slots=27))
    panel.start().result(60)
    assert [run.config["num_slots"] for run in panel.measured_runs] == [27]
    panel.choose(Scenario(schedule="on-demand", slots=26))
    assert [run.config["num_slots"] for run in panel.measured_runs] == [26]


def test_a_run_of_one_trace_is_not_laid_beside_another(panel, session, monkeypatch):
    panel.choose(Scenario(schedule="on-demand", slots=25))
    again, prepare, go_on = session.scenarios(session.runs[1]), session.prepare, threading.Event()

    def held(*given, **keywords):
        job = prepare(*given, **keywords)
        job.on_step(lambda _: go_on.wait(30))
        return job

    monkeypatch.setattr(session, "prepare", held)
    job = panel.start()
    panel.use(again, 25)
    panel.choose(Scenario(schedule="on-demand", slots=25))
    go_on.set()
    job.result(60)
    assert panel.measured is None
    assert "moved meanwhile" in panel.state()["status"]


def test_without_prefetches_the_replay_counts_what_the_engine_counted(panel):
    panel.choose(Scenario(schedule="on-demand", slots=64))
    run = panel.start().result(60)
    counts, decode = panel.result.counts, run.metrics.decode
    assert (counts.hits, counts.misses, counts.needed) == (decode.hits, decode.misses, decode.needed)


def test_what_cannot_be_run_here_switches_the_button_off_and_says_why_in_place(panel):
    controls = panel.real.controls
    panel.settings.predictor.value = "oracle"
    assert controls.run_button.disabled
    assert "oracle" in controls.reason.value
    panel.settings.predictor.value = "frequency"
    assert not controls.run_button.disabled
    assert not controls.reason.value
    panel.settings.machine.value = panel.settings.machine.options[1]
    assert controls.run_button.disabled
    assert "simulated" in controls.reason.value


def test_cancel_and_a_failed_run_leave_what_is_shown(panel, session, monkeypatch):
    job = panel.start()
    job.on_step(lambda job: panel.cancel() if job.num_tokens == 1 else None)
    job.result(60)
    assert "cancelled" in panel.state()["status"]
    assert panel.steps.max > panel.steps.min, "the steps can still be chosen"
    panel.steps.value = 5, 6

    def fail(*_args: object, **_keywords: object) -> None:
        raise TransferFailed("the cable <is> out")

    monkeypatch.setattr(session.engine, "generate", fail)
    panel.start()
    with pytest.raises(TransferFailed):
        panel.job.result(60)
    assert "the cable &lt;is&gt; out" in panel.state()["status"]
    assert not panel.state()["running"]
    assert panel.figures["lanes"].data


SPLIT = {
    "a\n---\nb": ["a", "b"],
    "a\r\n---\r\nb": ["a", "b"],
    "---\na \n --- \n\nb\n---\n": ["a ", "b"],
    "a -- b\n----\nc": ["a -- b\n----\nc"],
}


def test_another_batch_is_the_same_sequences_and_settings_stay(panel, recorded):
    panel.choose(Scenario(schedule="presched", slots=40, predictor="frequency", lookahead=1))
    assert panel.settings.batch.options == (1, 2)
    assert panel.settings.batch.value == 2
    both, before, steps = panel.result, panel.scenario, panel.steps.max
    panel.settings.batch.value = 1
    assert panel.scenario == before
    assert panel.result.batch == 1
    assert panel.result.num_tokens == both.num_tokens
    assert panel.steps.max > steps, "its steps can be chosen"
    assert any("those of batch 2" in note for note in panel.result.notes)
    panel.steps.value = panel.steps.max - 1, panel.steps.max
    panel.settings.batch.value = 2
    assert panel.scenarios is recorded
    assert panel.steps.max == steps
    assert panel.result.tokens_per_s == both.tokens_per_s


def test_what_was_measured_is_held_against_what_was_measured_alone(panel):
    """A setting simulated at +10 % stood at -31 % below a pinned run, by as much as the simulator was off."""
    panel.choose(Scenario(schedule="on-demand", slots=22))
    simulated = panel.result.tokens_per_s
    panel.start().result(60)
    panel.pin()
    assert "measured, link emulated against pinned" in panel.numbers.text
    assert panel.pinned.tokens_per_s == panel.measured.metrics.tokens_per_s
    panel.settings.slots.value = 60
    assert panel.pinned.tokens_per_s == simulated
    assert "simulated against pinned" in panel.numbers.text
    gain = 100 * (panel.result.tokens_per_s / simulated - 1)
    assert f"{formatted(gain, signed=True, field='tokens_per_s')} %" in panel.numbers.text
    panel.start().result(60)
    assert "measured, link emulated against pinned" in panel.numbers.text


def test_a_run_of_another_batch_is_not_laid_beside_what_is_simulated(panel):
    """One prompt of two was run, and its tokens/s stood below those of two as "simulated +80 %"."""
    panel.choose(Scenario(schedule="on-demand", slots=36))
    panel.real.prompts.value = "Once upon a time"
    run = panel.start().result(60)
    assert panel.measured is None
    assert "1 sequence, what is simulated has 2" in panel.state()["status"]
    panel.settings.batch.value = 1
    assert panel.measured is run, "there it belongs"


@pytest.mark.parametrize("typed", SPLIT, ids=repr)
def test_a_line_of_three_dashes_stands_between_two_prompts(panel, typed):
    panel.real.prompts.value = typed
    assert panel.real._what() == SPLIT[typed]


def test_what_is_run_is_what_the_field_shows(session, recorded):
    """A prompt given in code may hold dashes itself; an emptied field ran the given prompts and showed none."""
    given = {"yaml": "a: 1\n---\nb: 2\n", "story": "Once"}
    panel = session.schedule_panel(recorded, given, max_new_tokens=4)
    assert panel.real._what() is given
    panel.real.prompts.value = " \n---\n"
    assert panel.real._what() is given
    assert "b: 2" in panel.real.prompts.value
    panel.close()
    with pytest.raises(UnsupportedOption, match=r"session\.run"):
        session.schedule_panel(recorded, [[1, 2, 3]])


def test_of_a_run_without_a_result_nothing_seems_to_go_on(panel, session):
    panel.real.tokens.value = 50

    def hold() -> Job:
        job = panel.start()
        assert "warm up" in panel.real.live.value
        panel.cancel()
        return job

    job = session.engine.turn.run("something else", hold)
    with pytest.raises(CancelledError):
        job.result(60)
    assert panel.real.live.value == ""


def test_a_result_that_cannot_be_shown_is_told_and_the_panel_goes_on(panel, monkeypatch):
    panel.choose(Scenario(schedule="on-demand", slots=28))
    with monkeypatch.context() as broken:
        begin = panel.real._begin
        broken.setattr(panel.real, "_begin", lambda: (begin()[0], lambda run: 1 / 0))
        panel.start().result(60)
        assert "ZeroDivisionError" in panel.state()["status"]
        assert panel.real.controls.cancel_button.disabled
    panel.start().result(60)
    assert panel.state()["status"].startswith("done")


def test_a_pair_says_why_for_both(session, recorded):
    pair = session.pair_panel(recorded, Scenario(slots=32), "presched", "on-demand")
    upper = pair.explained()[0]
    assert (upper.step, upper.moe_layer) == (pair.step.value, pair.layer.value)
    assert "PreSched" in pair.tables.value
    assert "On demand" in pair.tables.value
    assert "NaN" not in pair.tables.value
    former, pair.layer.value = pair.tables.value, 5
    assert pair.tables.value != former
    assert "MoE layer 5" in pair.tables.value
    pair.lower.value = "fate"
    assert "Fate-like" in pair.tables.value
    second = session.pair_panel(recorded, Scenario(slots=32))
    assert pair.view.comm is None
    second.close()


def test_a_name_that_nothing_has_is_refused_by_every_panel(session, recorded):
    """A menu's own error says "value not found"; and another machine than was asked for would be shown in silence."""
    for call in (
        lambda: session.pair_panel(recorded, Scenario(slots=32), "fat"),
        lambda: session.pair_panel(recorded, Scenario(slots=32), "presched", "fat"),
        lambda: session.capacity_panel("fat"),
    ):
        with pytest.raises(UnsupportedOption, match="is 'fat'; choose one of '"):
            call()
    assert session.capacity_panel("h200").machine.value == "h200"


def test_without_a_browser_the_panels_show_plain_figures(session, recorded, panel, monkeypatch):
    shown: list[object] = []
    for module in (showing, pair_panel):
        monkeypatch.setattr(module, "display", shown.append)
    monkeypatch.setenv("PRESCOPE_HEADLESS", "1")
    panel._ipython_display_()
    assert [type(item) for item in shown[1:]] == [go.Figure] * 3
    shown.clear()
    session.pair_panel(recorded, Scenario(slots=32))._ipython_display_()
    assert type(shown[0]) is go.Figure


def test_a_panels_output_holds_the_live_form_and_one_for_pages_without_a_kernel(panel, monkeypatch):
    """Stock nbconvert has no widget state: with the live form alone it shows nothing."""
    shown: list[dict[str, object]] = []
    monkeypatch.setattr(showing, "display", lambda data, raw: shown.append(data))
    panel._ipython_display_()
    assert shown[0]["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.view.model_id
    html = shown[0]["text/html"]
    assert html.count("Plotly.newPlot(") == 3
    assert html.count("cdn.plot.ly") == 1
    assert "tokens/s" in html


def test_what_was_measured_where_the_trace_was_recorded_stands_beside_the_simulated(session):
    scenarios = Recording.load("medium.b1").scenarios()
    board = session.dashboard(PROMPTS, scenarios=scenarios, max_new_tokens=4)
    try:
        assert "measured there" in board.live.numbers.text, "it opens with a setting that was measured"
        assert "the 2 runs of this setting" in board.live.numbers.text
        board.tabs.selected_index = TABS.index("Schedules")
        assert "measured there, tokens/s" in board.schedules_table.value
        board.live.settings.slots.value -= 1
        assert "measured there" not in board.live.numbers.text
    finally:
        board.close()


# -- the dashboard -------------------------------------------------------------------------------------------


@pytest.fixture
def board(session, recorded, monkeypatch):
    # One of the profiles that come with prescope is of a machine like this one, perhaps: nothing is known of it here.
    monkeypatch.setattr(HardwareProfile, "_found", classmethod(lambda cls, place: None))
    board = session.dashboard(PROMPTS, scenarios=recorded, max_new_tokens=8)
    yield board
    board.close()


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def test_the_dashboard_opens_where_the_knobs_are(board, recorded):
    assert board.tabs.titles == TABS
    assert TABS[board.tabs.selected_index] == "Live tuning"
    assert board.live.scenarios is recorded
    assert "tokens/s" in board.live.numbers.text


@pytest.mark.parametrize("tab", ["Predictor", "Schedules"])
def test_a_tab_shows_the_settings_when_it_is_opened_and_follows_them(board, tab):
    board.live.choose(Scenario(schedule="presched", slots=30, predictor="frequency"))
    board.tabs.selected_index = TABS.index(tab)
    if tab == "Predictor":
        former = board.predictor_figure.layout.title.text
        assert "30 slots" in former
        board.live.settings.slots.value = 40
        assert "40 slots" in board.predictor_figure.layout.title.text
        board.live.settings.schedule.value = "on-demand"
        assert "nothing is predicted" in board.predictor_told.value
    else:
        for schedule in SCHEDULES.values():
            assert escape(schedule.title) in board.schedules_table.value
        assert "nan" not in board.schedules_table.value.lower()
        assert board.pair is not None


def test_the_pair_stays_where_it_was_put_when_the_settings_move(board):
    """It was made anew: step and layer went back, and the page's part of the former figure said "no comm channel"."""
    board.live.choose(Scenario(schedule="presched", slots=30, predictor="frequency"))
    board.tabs.selected_index = TABS.index("Schedules")
    pair, figure = board.pair, board.pair.figure
    assert (pair.upper.value, pair.lower.value) == ("presched", "on-demand")
    pair.step.value, pair.layer.value = 5, 6
    board.live.settings.slots.value = 40
    assert board.pair is pair
    assert (pair.figure, pair.step.value, pair.layer.value) == (figure, 5, 6)
    assert "40 slots" in str([note.text for note in figure.layout.annotations])
    board.live.settings.schedule.value = "on-demand"
    assert (pair.upper.value, pair.lower.value) == ("on-demand", "presched"), "it follows what is chosen"
    pair.upper.value = "fate"
    board.live.settings.schedule.value = "klotski"
    assert (pair.upper.value, pair.lower.value) == ("fate", "presched"), "one chosen here stays"
    board.live.settings.batch.value = 1
    assert pair.step.max > 14, "two sequences of seven decode steps, one after the other"
    pair.step.value = pair.step.max
    board.live.settings.batch.value = 2
    assert (pair.step.value, pair.step.max) == (7, 7)


def test_runs_are_kept_and_any_two_compared(board, session):
    board.live.choose(Scenario(schedule="on-demand", slots=48))
    board.live.start().result(60)
    board.tabs.selected_index = TABS.index("Runs")
    runs = board.runs
    assert len(runs.first.options) == sum(1 for run in session.runs if len(run.steps) > 1)
    assert "tokens/s" in runs.differences.value
    assert runs.figure.data
    runs.first.value = runs.second.value
    assert "+0.00 %" in runs.differences.value, "a run beside itself differs in nothing"


def test_a_run_is_saved_and_opened_again_and_what_cannot_be_read_is_told(board, session, tmp_path):
    board.live.choose(Scenario(schedule="on-demand", slots=50))
    run = board.live.start().result(60)
    board.tabs.selected_index = TABS.index("Runs")
    runs = board.runs
    runs.first.value = len(runs.first.options) - 1
    runs.folder.value = str(tmp_path / "kept")
    runs.save_button.click()
    assert "written to" in runs.told.value
    runs.open_button.click()
    assert "opened" in runs.told.value
    assert runs.opened[0].tokens == run.tokens
    whole = [one for one in session.runs if len(one.steps) > 1]  # others were cancelled at their first token
    assert len(runs.second.options) == len(runs._shown) == len([*whole, *runs.opened])
    runs.first.value, runs.second.value = len(runs._shown) - 2, len(runs._shown) - 1
    assert "Their settings are the same" in runs.differences.value
    runs.first.value = 0
    assert "num_slots" in runs.differences.value
    runs.folder.value = str(tmp_path / "nowhere")
    runs.open_button.click()
    assert "FileNotFoundError" in runs.told.value
    (tmp_path / "kept" / "run.json").write_text("{}")
    runs.folder.value = str(tmp_path / "kept")
    runs.open_button.click()
    assert "BadTrace" in runs.told.value


@pytest.mark.parametrize("work", ["record_button", "report_button"])
def test_an_error_of_any_kind_in_the_background_is_told(board, monkeypatch, work):
    """Lost in its thread, "recording a run on demand" stood there for ever."""
    for what in ("_record", "_report"):
        monkeypatch.setattr(board, what, lambda *given: [][1])
    getattr(board, work).click()
    wait_for(lambda: "IndexError" in board.told.value)


@pytest.mark.parametrize("button", ["record_button", "report_button"])
def test_a_double_click_does_it_once_and_the_button_can_be_used_again(board, recorded, monkeypatch, button):
    """Two clicks recorded two runs, one after the other, and wrote one file from two threads."""
    begun, go_on = [], threading.Event()

    def slow(*_):
        begun.append(button)
        assert go_on.wait(30)
        return recorded if button == "record_button" else Path("page.html")

    monkeypatch.setattr(board, {"record_button": "_record", "report_button": "_report"}[button], slow)
    one = getattr(board, button)
    for _ in range(3):
        one.click()
    assert one.disabled
    go_on.set()
    wait_for(lambda: not one.disabled)
    assert begun == [button]
    one.click()
    wait_for(lambda: begun == [button] * 2 and not one.disabled)


@pytest.mark.parametrize("folder", ["", "  ", "a" * 300, "/dev/null/run", "~"], ids=lambda text: text[:12])
def test_a_folder_that_cannot_be_is_told_in_the_panel(board, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    board.tabs.selected_index = TABS.index("Runs")
    board.runs.folder.value = folder
    for button in (board.runs.save_button, board.runs.open_button):
        board.runs.told.value = ""
        button.click()
        assert "ps-error" in board.runs.told.value


def test_a_folder_in_ones_home_is_saved_to_and_opened_again(board, session, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    board.tabs.selected_index = TABS.index("Runs")
    board.runs.folder.value = "~/kept"
    board.runs.save_button.click()
    assert (tmp_path / "kept" / "run.json").exists()
    board.runs.open_button.click()
    assert "opened" in board.runs.told.value


def test_a_machine_calibrated_meanwhile_has_its_cpu_lane_at_the_next_recording(session, monkeypatch):
    """The field said "calibrate it" to a person who just had: the dashboard alone did not look for the profile."""
    found: list[HardwareProfile] = []
    monkeypatch.setattr(
        HardwareProfile, "_found", classmethod(lambda cls, place: found[0] if found else None)
    )
    board = session.dashboard(PROMPTS, max_new_tokens=8)
    try:
        board.record()
        lane = board.live.settings.fields["cpu"]
        assert lane.control.disabled and "Measure this machine (tab" in lane.note
        alone = session.schedule_panel(session.scenarios(session.runs[-1]), PROMPTS)
        told = alone.settings.fields["cpu"].note
        assert "prescope.calibrate" in told and "tab" not in told, "a panel by itself has no tabs"
        profile = HardwareProfile.load("test_machine")
        found.append(replace(profile, place=this_place(session.engine.hardware())))
        board.record()
        assert not lane.control.disabled and not lane.note
        assert "CPU experts calibrated" in board._head.value
    finally:
        board.close()


def test_a_run_recorded_here_becomes_what_is_simulated(board, session):
    before = len(session.runs)
    board.record()
    assert len(session.runs) == before + 1
    assert session.last.config["schedule"] == "on-demand"
    assert board.live.scenarios.trace is session.last.trace
    assert next(iter(board.live.scenarios.machines.values())).is_here
    assert not board.live.real.controls.run_button.disabled


def test_the_model_tab_answers_from_the_engine_and_from_published_shapes(board):
    capacity = board.capacity
    advice = capacity.redraw()
    assert advice is not None
    assert advice.kind == "all on the GPU"
    assert "All on the GPU" in capacity.words.value
    assert capacity.figure.data
    capacity._is_quiet = True
    capacity.model.value, capacity.budget.value = "olmoe-1b-7b", 6.0
    capacity._is_quiet = False
    advice = capacity.redraw()
    assert advice.kind == "offload"
    assert advice.best.gpu_gib <= 6.0
    assert "budget" in capacity.figure.layout.annotations[-1].text


def test_the_model_tab_goes_by_the_sessions_own_routing_once_there_is_some(monkeypatch):
    monkeypatch.setattr(HardwareProfile, "_found", classmethod(lambda cls, place: None))
    with Session(slots=32, device="cpu", link_gb_per_s=2.0) as session:
        board = session.dashboard(PROMPTS, max_new_tokens=4)
        capacity = board.capacity

        def told() -> bool:
            board.tabs.selected_index = TABS.index("Machine and model")
            wait_for(lambda: capacity.words.value and "simulating" not in capacity.words.value)
            return "guessed" in capacity.words.value

        assert told()
        board.record()
        board.tabs.selected_index = TABS.index("Runs")
        assert not told(), "it was recorded meanwhile"


def test_a_number_typed_in_makes_the_machine_an_assumed_one(board):
    capacity = board.capacity
    assert capacity.spec().origin.startswith("measured")
    capacity.numbers["link_gb_per_s"].value = 12.0
    assert capacity.machine.value == "typed in"
    assert (capacity.spec().origin, capacity.spec().link_gb_per_s) == ("assumed", 12.0)
    wait_for(lambda: "typed in" in capacity.words.value and "simulating" not in capacity.words.value)


def test_a_number_typed_in_leaves_the_others_as_they_were_measured(session):
    capacity = session.capacity_panel()
    for machine in capacity.machine.options[:-1]:
        capacity._is_quiet = True
        capacity.machine.value = machine
        capacity._fill()
        measured = capacity.spec()
        capacity.machine.value = "typed in"
        for name in capacity.numbers:
            assert getattr(capacity.spec(), name) == pytest.approx(getattr(measured, name), rel=1e-3), name
    capacity.close()


def test_advice_that_fails_says_so_unless_something_was_moved_since(session, monkeypatch):
    """ "simulating" stood there for ever after an error that was not ours."""
    capacity = session.capacity_panel()
    monkeypatch.setattr(capacity_panel, "advise", lambda *given, **keywords: [][1])
    capacity.soon()
    wait_for(lambda: "IndexError" in capacity.words.value)

    def outrun(*given, **keywords):
        capacity._asked += 1
        raise UnsupportedOption("of settings that are no longer shown")

    monkeypatch.setattr(capacity_panel, "advise", outrun)
    capacity.redraw()
    assert "no longer shown" not in capacity.words.value
    capacity.close()


def test_advice_that_comes_after_the_panel_was_closed_is_shown_to_nobody(session, monkeypatch):
    """It went on in its thread and put figures into widgets that were gone."""
    capacity = session.capacity_panel()
    begun, may_go_on = threading.Event(), threading.Event()
    real = capacity_panel.advise

    def slow(*given, **keywords):
        begun.set()
        assert may_go_on.wait(30)
        return real(*given, **keywords)

    monkeypatch.setattr(capacity_panel, "advise", slow)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(capacity.redraw()))
    thread.start()
    assert begun.wait(30)
    capacity.close()
    may_go_on.set()
    thread.join(60)
    assert found == [None]
    assert capacity.advice is None

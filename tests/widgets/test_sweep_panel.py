"""The panel of sweeps without a browser: its controls by their traits, its figures by their data."""

import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import plotly.graph_objects as go
import pytest

from prescope.errors import BadSweep, UnsupportedOption
from prescope.predictor import Frequency
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Machine, Scenarios
from prescope.tuning import Choices, Range, SimulatorRunner, Space, load_sweep, open_sweep
from prescope.widgets import sweep_proof
from prescope.widgets.sweep_controls import SIDE_BY_SIDE
from prescope.widgets.sweep_panel import SweepPanel
from prescope.widgets.sweep_plan import TrialPlace
from prescope.widgets.sweep_studies import NEW
from prescope.widgets.tables import frame_html
from tests.support.small_run import small_trace

COSTS = LayerCosts(
    link_us=60.0, gpu_us=12.0, rest_us=25.0, decide_us=6.0, cpu_us=(0.0, 40.0, 45.0, 50.0, 55.0), cpu_base_us=5.0,
    source="made for this test",
)  # fmt: skip
REASON = "the trace was recorded on another machine"


class Opened:
    """Notes which settings were opened."""

    def __init__(self, figure: go.Figure | None) -> None:
        self.figure, self.settings = figure, []

    def __call__(self, settings):
        self.settings.append(dict(settings))
        return self.figure


@pytest.fixture(scope="module")
def runner():
    trace = small_trace(steps=9, batch=3)
    machine = Machine("test", COSTS, 1_500_000, 30.0, 2)
    return SimulatorRunner.of_scenarios(Scenarios(trace, [machine], [Frequency(trace, 2)], label="a test"))


def panel_of(runner, prover=REASON, shows=None, report=lambda *_: Path("page.html")):
    places = {
        "simulator": TrialPlace(runner, code="SimulatorRunner.of_scenarios(scenarios)"),
        "device": TrialPlace(None, REASON),
    }
    panel = SweepPanel(places, lambda: {"slots": 12, "width": 2}, shows or Opened(None), prover, report)
    panel.controls.workers.value = 1
    panel.controls.points.value = 12
    return panel


@pytest.fixture(scope="module")
def ran(runner, tmp_path_factory):
    """A panel whose sweep is done; tests leave it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("ran"))
        panel = panel_of(runner)
        panel.controls.method.value = "random"
        run(panel)
        yield panel
        panel.close()


@pytest.fixture
def make(runner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []

    def make(**given):
        made.append(panel_of(runner, **given))
        return made[-1]

    yield make
    for panel in made:
        panel.close()


def run(panel):
    panel.run.start_button.click()
    assert panel.run.job is not None, panel.run.status.value
    panel.run.job.result(60)
    return panel.state()


def test_it_opens_with_what_may_move_and_why_the_device_is_not_there(make):
    panel = make()
    assert list(panel.plan.space) == ["schedule", "slots", "lookahead"]
    assert panel.plan.objectives == ("tokens_per_s", "gpu_bytes")
    assert REASON in panel.controls.fields["where"].note
    assert panel.proof.button.disabled and panel.proof.button.tooltip == REASON
    assert panel.chosen.button.disabled and panel.report_button.disabled
    assert all("no point" in why or "needs" in why for why in panel.figures.why_not.values())


def test_a_tick_moves_a_setting_and_what_stays_is_fixed_at_what_it_is(make):
    panel = make()
    rows = panel.controls.space.rows
    rows["slots"].tick.value = False
    assert panel.plan.fixed == {"slots": 12}
    rows["threshold"].tick.value = True
    rows["threshold"].span.value = (0.1, 0.4)
    assert panel.plan.space["threshold"] == Range(0.1, 0.4, 0.05)
    rows["cache"].tick.value = True
    rows["cache"].span.value = (None, "lfu")
    assert panel.plan.space["cache"] == Choices(None, "lfu")


def test_where_schedules_are_compared_each_keeps_its_own_predictions(make):
    """Live's width of one schedule would be laid upon all of them."""
    panel = make()
    assert "width" not in panel.plan.fixed
    panel.controls.space.rows["schedule"].tick.value = False
    assert panel.plan.fixed["width"] == 2


def test_settings_that_do_nothing_cannot_be_ticked_and_say_why(make):
    panel = make()
    rows = panel.controls.space.rows
    rows["schedule"].span.value = ("on-demand",)
    assert rows["lookahead"].tick.disabled
    assert "looks at no predictions" in rows["lookahead"].view.children[1].children[2].value
    assert "lookahead" not in panel.plan.space
    assert rows["recall"].tick.disabled
    rows["schedule"].span.value = ("on-demand", "presched")
    rows["predictor"].tick.value = True
    rows["predictor"].span.value = ("noisy oracle",)
    assert not rows["recall"].tick.disabled


def test_nothing_that_moves_is_said_where_start_is(make):
    panel = make()
    for row in panel.controls.space.rows.values():
        row.tick.value = False
    assert panel.run.start_button.disabled
    assert "space is empty" in panel.run.reason.value
    assert panel.code.text == ""


def test_time_and_memory_are_said_before_it_starts(make):
    panel = make()
    panel.estimate.ask()
    assert "12 points of" in panel.estimate.text
    assert "memory" in panel.estimate.text
    panel.controls.points.value = 13
    assert panel.estimate.text == "", "what was said was about other controls"


class Alone:
    """Holds the one engine there is, which takes settings as the simulator does; notes when it got its own back."""

    is_here = True

    def __init__(self, simulator):
        self._simulator, self.has_own_settings = simulator, True

    def __getattr__(self, name):
        return getattr(self._simulator, name)

    def run(self, settings, seed=0, is_cancelled=lambda: False):
        self.has_own_settings = False
        return self._simulator.run(settings, seed, is_cancelled)

    def restore(self):
        self.has_own_settings = True


@pytest.fixture
def on_device(make, runner):
    """A panel that measures on an engine of this process, as a person comes to it."""
    panel, engine = make(), Alone(runner)
    panel.use({"simulator": panel._places["simulator"], "device": TrialPlace(engine, code="engine")}, REASON)
    panel.controls.workers.value = SIDE_BY_SIDE
    panel.controls.where.value = "device"
    panel.controls.points.value = 6
    return panel, engine


def test_on_the_device_one_worker_is_asked_for_as_it_can_be_no_more(on_device):
    """The field said 2, could not be changed, and Start refused 2."""
    panel, _ = on_device
    assert panel.controls.fields["workers"].note and panel.controls.workers.disabled
    assert panel.controls.workers.value == panel.controls.limits["workers"] == 1
    assert run(panel)["points"] == 6, panel.run.status.value
    panel.controls.where.value = "simulator"
    assert panel.controls.workers.value == SIDE_BY_SIDE


def test_how_long_it_takes_is_asked_without_leaving_settings_behind(on_device):
    """The engine went on with the settings of the last point that was tried for it: its slots, and its memory."""
    panel, engine = on_device
    panel.estimate.ask()
    assert "6 points of" in panel.estimate.text and "in this process" in panel.estimate.text
    assert engine.has_own_settings


def test_a_double_click_starts_one_run_that_can_still_be_cancelled(make):
    """The second one was refused in red, since the first held the study, and the first had no button any more."""
    panel = make()
    panel.controls.points.value = 5000
    for _ in range(2):
        panel.run.start_button.click()
    job = panel.run.job
    assert panel.start() is job and not job.is_done
    assert "ps-error" not in panel.run.status.value
    panel.run.cancel_button.click()
    job.result(60)
    assert job.is_cancelled and panel.run.status.value.startswith("cancelled")
    panel.controls.points.value = len(panel.sweep.points()) + 3
    assert run(panel)["status"].startswith("done"), "and afterwards it goes on"


def test_what_is_said_of_a_study_that_is_gone_on_with_is_of_the_points_it_lacks(make):
    panel = make()
    run(panel)
    panel.controls.points.value = 5
    panel.estimate.ask()
    assert "it has 12 points; ask for more" in panel.run.reason.value
    assert "points of" not in panel.estimate.text
    panel.controls.points.value = 20
    panel.estimate.ask()
    assert "8 points of" in panel.estimate.text
    panel.controls.seed.value += 1
    panel.estimate.ask()
    assert "20 points of" in panel.estimate.text, "another study has them all before it"
    panel.open(panel.sweep)
    assert panel.estimate.text == "", "it was said of what the controls were before"


def test_a_grid_is_not_said_to_have_more_points_than_it_has(make):
    panel = make()
    panel.controls.method.value = "grid"
    panel.controls.points.value = 100_000
    panel.estimate.ask()
    assert f"{panel.plan.space.size:,} points of" in panel.estimate.text


def test_a_sweep_fills_figures_table_and_menu(make):
    panel = make()
    state = run(panel)
    assert (state["points"], state["running"], state["study"]) == (12, False, "sweep 1")
    assert panel.figures.why_not == {}
    assert [trace.type for trace in panel.figures.figures["parallel"].data] == ["parcoords"]
    assert "best 5 so far" in panel.chosen.table.value
    assert panel.run.status.value.startswith("done: 12 points")
    assert "<b>simulated</b>: " in panel.told.value
    assert panel.run.start_button.disabled, "its points are there"
    assert "ask for more" in panel.run.reason.value
    panel.controls.points.value = 20
    assert panel.run.start_button.description == "Go on"
    assert run(panel)["points"] == 20
    assert panel.sweep.name == "sweep 1"


def test_a_changed_space_is_another_study(make):
    """A study is about one thing: its points could not be compared."""
    panel = make()
    run(panel)
    panel.controls.space.rows["cpu"].tick.value = True
    assert panel.run.start_button.description == "Start"
    assert run(panel)["study"] == "sweep 2"
    assert list(panel.study.options) == [NEW, "sweep 2", "sweep 1"]


def test_a_name_of_ones_own_is_the_study_s(make):
    panel = make()
    panel.controls.name.value = "my first"
    assert run(panel)["study"] == "my first"
    assert len(load_sweep("my first").points()) == 12


def test_an_existing_study_is_opened_with_its_points_and_settings(make):
    first = make()
    first.controls.space.rows["slots"].span.value = (0.3, 0.7)
    first.controls.second.value = "p95_ms"
    run(first)
    second = make()
    second.study.value = "sweep 1"
    assert second.state()["points"] == 12
    assert second.plan.space["slots"] == Range(0.3, 0.7, 0.05)
    assert second.plan.objectives == ("tokens_per_s", "p95_ms")
    second.controls.points.value = 15
    assert run(second)["study"] == "sweep 1"
    assert second.state()["points"] == 15
    second.study.value = NEW
    assert second.state()["points"] == 0
    with pytest.raises(BadSweep):
        second.open("nowhere")


def test_a_brush_filters_the_table_and_outlives_new_points(make):
    panel = make()
    run(panel)
    axes = panel.figures.figures["parallel"].data[0].dimensions
    place = [one.label for one in axes].index("tokens/s")
    values = sorted(axes[place].values)
    axes[place].constraintrange = [values[-3], values[-1]]
    assert len(panel.figures.kept) >= 3
    kept = panel.state()["kept"]
    assert kept < 12
    assert f"of the {kept} that the brush leaves" in panel.chosen.table.value
    assert len(panel.chosen.menu.options) == kept
    panel.controls.points.value = 14
    run(panel)
    brushed = panel.figures.figures["parallel"].data[0].dimensions[place].constraintrange
    assert list(brushed) == pytest.approx([values[-3], values[-1]])


@pytest.mark.parametrize("by", ["the sweep", "its name"])
@pytest.mark.parametrize(
    ("space", "settings"),
    [
        ({"slots": Range(0.1, 0.9, step=0.05), "lookahead": Range(1, 2)}, {"method": "tpe", "seed": 3}),
        ({"slots": Range(6, 12)}, {"method": "grid", "fixed": {"schedule": "on-demand"}}),
        ({"threshold": Range(0.02, 0.5, log=True), "slots": Choices(6, 12)}, {"method": "random"}),
        ({"schedule": Choices("on-demand", "klotski"), "most_in_flight": Range(1, 8)}, {"method": "nsga"}),
        ({"batch": Choices(1, 3), "slots": Choices(9, 10, 12)}, {"objectives": ("p95_ms",)}),
    ],
)
def test_a_study_that_code_made_goes_on_as_it_was_asked_for(make, runner, space, settings, by):
    """The notebook of sweeps says so: Go on was refused, for the controls give a range of whole numbers a step."""
    made = open_sweep("from code", Space(space), runner, **settings)
    made.run(points=2)
    panel = make()
    panel.open(made if by == "the sweep" else "from code")
    assert panel.run.start_button.description == "Go on"
    panel.controls.points.value = 5
    state = run(panel)
    assert state["status"].startswith("done"), state["status"]
    assert state["study"] == "from code"
    assert state["points"] == len(made.points()) == min(5, made.space.size or 5)
    names: dict = {}
    exec(panel.code.text.split("sweep = ")[0], names)
    assert names["space"] == made.space, "the code that is copied goes on with it too"


def test_a_study_goes_on_where_it_lies(make, runner, tmp_path):
    """A file of its own: a new study of the same name was begun in runs/sweeps."""
    made = open_sweep("elsewhere", Space(slots=Range(6, 12)), runner, storage=tmp_path / "mine.db")
    made.run(points=2)
    panel = make()
    panel.open(made)
    panel.controls.points.value = 4
    assert run(panel)["points"] == len(made.points()) == 4
    assert not list(Path("runs").rglob("elsewhere*"))


def test_the_commands_of_a_report_are_the_study_s_and_not_those_of_controls_moved_since(make):
    given = []
    panel = make(report=lambda *arguments: given.append(arguments) or Path("page.html"))
    run(panel)
    own = panel.plan.space
    panel.controls.space.rows["lookahead"].tick.value = False
    panel.controls.points.value = 5
    panel.write_report()
    sweep, _, code = given[-1]
    assert "lookahead=Range(" in code and f"points={len(sweep.points())}" in code
    assert sweep.space == own


def test_a_click_on_a_point_opens_its_settings(ran, monkeypatch):
    panel, shows = ran, Opened(None)
    monkeypatch.setattr(panel.chosen, "_shows", shows)
    history = panel.figures.figures["history"].data[0]
    panel.figures._on_point(history, Clicked([4]), None)
    assert shows.settings[-1] == panel.sweep.study.trials[4].params
    heat = panel.figures.figures["heat"].data[0]
    row, column = next(
        (i, j) for i, row in enumerate(heat.z) for j, best in enumerate(row) if best is not None
    )
    panel.figures._on_cell(heat, Clicked([], [heat.x[column]], [heat.y[row]]), None)
    assert shows.settings[-1] == panel.sweep.study.trials[heat.customdata[row][column]].params
    panel.chosen.button.click()
    assert len(shows.settings) == 3


class Clicked:
    def __init__(self, point_inds, xs=(), ys=()):
        self.point_inds, self.xs, self.ys = point_inds, xs, ys


def test_a_timeline_is_drawn_in_place_where_nobody_else_shows_it(ran, monkeypatch):
    panel = ran
    monkeypatch.setattr(panel.chosen, "_shows", Opened(go.Figure(go.Bar(y=[1]))))
    panel.chosen.clear()
    assert "ps-hidden" in panel.chosen.timeline._dom_classes
    panel.chosen.button.click()
    assert "ps-hidden" not in panel.chosen.timeline._dom_classes
    assert len(panel.chosen.lanes.data) == 1


def test_pause_begins_no_point_and_cancel_keeps_what_there_is(make, runner, monkeypatch):
    panel = make()
    gate = threading.Event()
    simulate = runner.run

    def slow(*arguments):
        gate.wait(0.05)
        return simulate(*arguments)

    monkeypatch.setattr(type(runner), "run", lambda _self, *arguments: slow(*arguments))
    panel.controls.points.value = 400
    panel.controls.method.value = "random"
    panel.run.start_button.click()
    wait_for(lambda: panel.run.job.status is not None and panel.run.job.status.done > 2)
    panel.run.pause_button.click()
    assert panel.run.pause_button.description == "Go on"
    wait_for(lambda: panel.run.job.status.is_paused and not panel.run.job.status.running)
    done = panel.run.job.status.done
    time.sleep(0.4)
    assert panel.run.job.status.done == done
    panel.run.pause_button.click()
    wait_for(lambda: panel.run.job.status.done > done)
    panel.run.cancel_button.click()
    panel.run.job.result(30)
    assert panel.run.status.value.startswith("cancelled")
    assert done < panel.state()["points"] < 400
    assert panel.run.start_button.description == "Go on"


def test_of_a_run_whose_study_is_not_shown_the_status_says_which_it_is(make, runner, monkeypatch):
    """ "12 of 100 points" stood beside the name of another study, or of none."""
    go_on, real = threading.Event(), type(runner).run

    def held(self, *given):
        assert go_on.wait(20)
        return real(self, *given)

    monkeypatch.setattr(type(runner), "run", held)
    panel = make()
    panel.run.start_button.click()
    wait_for(lambda: panel.run.status.value == "0 of 12 points")
    panel.study.value = NEW
    assert panel.run.status.value == "sweep 1: 0 of 12 points"
    go_on.set()
    panel.run.job.result(60)
    assert panel.run.status.value.startswith("sweep 1: done: 12 points")
    panel.study.value = "sweep 1"
    assert panel.run.status.value.startswith("done: 12 points")


def wait_for(is_so, seconds=20.0):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_code_makes_the_same_sweep(ran, runner):
    panel = ran
    code = panel.code.text.replace("'sweep 1'", "'again'").replace(panel._places["simulator"].code, "runner")
    names = {"runner": runner}
    exec(code.replace(", SimulatorRunner", ""), names)
    columns = ["slots", "schedule", "lookahead", "tokens_per_s"]
    pd.testing.assert_frame_equal(panel.sweep.points()[columns], names["sweep"].points()[columns])


class Proved:
    """What a prover returns: one point of the sweep and one setting of none."""

    kept, words, notes, origin, machine = (
        True,
        "+11 % (+9 to +13): keep it",
        ["a note <b>"],
        "measured",
        "H200",
    )
    candidates = best, _ = SimpleNamespace(number=4), SimpleNamespace(number=-1)

    def table(self):
        return pd.DataFrame({"gain %": [11.0, 2.0], "GPU memory": ["8.2 MiB", "12.8 MiB"]})


def test_a_proof_says_how_far_it_is_can_be_ended_and_leaves_its_verdict(make):
    seen = []

    def prover(sweep, *, on_progress, cancel):
        on_progress(1, 4)
        seen.append((sweep.name, panel.proof.words.value, panel.proof.button.description, cancel.is_set()))
        return Proved()

    panel = make(prover=prover)
    run(panel)
    panel.proof.run()
    [(name, words, label, is_ended)] = seen
    assert (name, label, is_ended) == ("sweep 1", "End the proof", False)
    assert words.startswith("<span class='ps-soft'>run 1 of 4")
    assert "+11 % (+9 to +13): keep it" in panel.proof.words.value
    assert "<b>measured</b> on H200" in panel.proof.words.value
    assert "a note &lt;b&gt;" in panel.proof.words.value
    assert "<tr class=ps-first><td class='ps-words'>point 4</td>" in panel.proof.words.value
    assert "<tr><td class='ps-words'>setting 2</td>" in panel.proof.words.value, "of no sweep"
    assert "<th>GPU memory</th>" in panel.proof.words.value, (
        "numbers with a unit stand below the right of their head"
    )
    assert panel.proof.button.description == sweep_proof.LABEL
    panel.study.value = NEW
    assert panel.proof.words.value == "", "another study's verdict"


def test_a_proof_is_of_the_study_that_it_was_begun_with_whatever_is_open_when_it_ends(make, monkeypatch):
    """The verdict of one study stood under another one, and went into its report."""
    told, go_on, given = threading.Event(), threading.Event(), []

    def prover(sweep, *, on_progress, cancel):
        on_progress(1, 4)
        told.set()
        assert go_on.wait(20)
        return Proved()

    panel = make(prover=prover)
    monkeypatch.setattr(panel, "_report", lambda *asked: given.append(asked[:2]) or Path("page.html"))
    run(panel)
    panel.proof.button.click()
    assert told.wait(20)
    panel.study.value = NEW
    panel.controls.seed.value = 1
    assert run(panel)["study"] == "sweep 2"
    go_on.set()
    wait_for(lambda: panel.proof.button.description == sweep_proof.LABEL)
    wait_for(lambda: "proof of sweep 1: done" in panel.proof.words.value)
    assert panel.proof.proof is None and not panel.proof.button.disabled
    panel.write_report()
    panel.study.value = "sweep 1"
    assert "+11 % (+9 to +13): keep it" in panel.proof.words.value, "it comes back with its study"
    panel.write_report()
    assert [(sweep.name, type(proof)) for sweep, proof in given] == [
        ("sweep 2", type(None)),
        ("sweep 1", Proved),
    ]


@pytest.mark.parametrize("part", ["proof", "report", "estimate"])
def test_an_error_of_any_kind_in_a_thread_is_told(make, monkeypatch, part):
    """A proof that ran out of a graphics card's memory said "run 3 of 13, 5 s left" for ever."""

    def fails(*_, **__):
        raise RuntimeError("CUDA out of <memory>")

    panel = make(prover=fails, report=fails)
    run(panel)
    said = {
        "proof": lambda: panel.proof.words.value,
        "report": lambda: panel.run.status.value,
        "estimate": lambda: panel.estimate.text,
    }[part]
    monkeypatch.setattr(panel.estimate, "_estimate", fails)
    {"proof": panel.proof, "report": SimpleNamespace(button=panel.report_button), "estimate": panel.estimate}[
        part
    ].button.click()
    wait_for(lambda: "CUDA out of &lt;memory&gt;" in said())
    wait_for(lambda: panel.proof.button.description == sweep_proof.LABEL)


def test_a_panel_closed_as_soon_as_a_proof_is_begun_ends_it(make):
    is_ended = threading.Event()

    def prover(sweep, *, on_progress, cancel):
        assert cancel.wait(20)
        is_ended.set()
        raise CancelledError

    panel = make(prover=prover)
    run(panel)
    panel.proof.button.click()
    panel.close()
    assert is_ended.wait(20)


def test_a_double_click_starts_one_proof_and_a_later_click_ends_it(make, monkeypatch):
    """The second click of a double click ended the proof that the first had begun, or began another one."""
    begun, ended = [], threading.Event()

    def prover(sweep, *, on_progress, cancel):
        begun.append(sweep.name)
        if not cancel.wait(20):
            return None
        ended.set()
        raise CancelledError

    panel = make(prover=prover)
    run(panel)
    for _ in range(3):
        panel.proof.button.click()
    assert not ended.wait(0.3)
    assert begun == ["sweep 1"]
    monkeypatch.setattr(sweep_proof, "DOUBLE_CLICK_S", 0.0)
    panel.proof.button.click()
    assert ended.wait(20)


def test_without_a_device_a_proof_says_why(ran):
    assert ran.proof.button.disabled
    with pytest.raises(UnsupportedOption, match="another machine"):
        ran.proof.run()


def test_the_report_gets_sweep_proof_and_commands(ran, monkeypatch):
    given = []
    monkeypatch.setattr(ran, "_report", lambda *arguments: given.append(arguments) or Path("page.html"))
    assert ran.write_report() == Path("page.html")
    [(sweep, proof, commands)] = given
    assert (sweep.name, proof) == ("sweep 1", None)
    assert "open_sweep(" in commands


def test_a_panel_without_a_kernel_shows_its_figures_plain(ran):
    assert [type(figure) for figure in ran.plain()] == [go.Figure] * 5


def test_heads_stand_above_what_they_are_of():
    html = frame_html(pd.DataFrame({"name": ["a"], "count": [3]}))
    assert "<th class=ps-words>name</th><th>count</th>" in html

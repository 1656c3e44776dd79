"""The model tab: advice on models that nobody has loaded, on machines that are known; the button that measures one."""

import threading
import time
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace

import pytest

from prescope.core.machine import this_place
from prescope.engine.job import Job
from prescope.errors import CannotWrite, PrescopeError
from prescope.profile import HardwareProfile
from prescope.session import Session
from prescope.simulator import HERE
from prescope.widgets import measure_machine
from prescope.widgets.capacity_panel import TYPED, CapacityPanel, _known_machines
from prescope.widgets.measure_machine import CalibrationProgress, measured_now, profile_words, reason_not


@pytest.mark.parametrize("noted", [{}, {"device_memory_gib": 23.5, "device_memory_gb_per_s": 1008}])
def test_it_opens_whether_or_not_the_profile_of_this_machine_notes_the_gpus_memory(noted, monkeypatch):
    """Older calibrations on most GPUs do not; the tab, and the dashboard with it, did not open there."""
    profile = HardwareProfile.load("h200")
    here = replace(profile, machine=profile.machine | {"device": "NVIDIA GeForce RTX 4090"} | noted)
    monkeypatch.setattr(HardwareProfile, "of_this_machine", classmethod(lambda cls, described=None: here))
    known = _known_machines("olmoe-1b-7b")
    assert (HERE in known) == bool(noted)
    assert {"h200", "h100"} <= known.keys()
    panel = CapacityPanel({"OLMoE": "olmoe-1b-7b"})
    assert panel.measure is None  # of a machine without an engine
    panel.close()


# -- the button ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session():
    with Session(slots=32, device="cpu", link_gb_per_s=2.0) as session:
        yield session


class Calibration:
    """Instead of `calibrate`: tells its points one after the other, each when it is let.

    Attributes:
        doubts: notes of its profile. fails_with: raised at the end.
    """

    def __init__(self, engine):
        self.engine, self.doubts, self.fails_with = engine, (), None
        self.seen: list[tuple[str, float]] = []
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, engine, *, seconds, on_progress):
        assert engine is self.engine and seconds == 45
        for what, share in [("tiny-moe, batch 1", 0.0), ("h2d 0.123 MB", 0.0), ("h2d 0.5 MB", 0.5)]:
            on_progress(what, share)
        self.began.set()
        while not self.go.wait(0.02):
            on_progress("h2d 1.5 MB", 0.75)  # raises once it is cancelled
        if self.fails_with is not None:
            raise self.fails_with
        on_progress("done", 1.0)
        profile = HardwareProfile.load("test_machine")
        notes = ("rest of a layer: tiny-moe", *self.doubts)
        place = this_place(engine.hardware())
        profile = replace(profile, place=place, measured="2026-11-30", notes=notes)
        profile.save()
        return profile


@pytest.fixture
def calibration(session, monkeypatch, tmp_path):
    """The machine was never measured, and no profile that comes with prescope is of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("prescope.profile.profile.shipped_files", list)
    monkeypatch.setattr(measure_machine, "LOOK_S", 0.02)
    monkeypatch.setattr(measure_machine, "SHOW_S", 0.02)
    fake = Calibration(session.engine)
    monkeypatch.setattr(measure_machine, "calibrate", fake)
    return fake


@pytest.fixture
def panel(session, calibration):
    panel = CapacityPanel({"tiny-moe": session.engine, "olmoe-1b-7b": "olmoe-1b-7b"})
    yield panel
    calibration.go.set()
    panel.close()


def wait_until(holds, most_s=10.0):
    end = time.monotonic() + most_s
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def looking() -> int:
    """Panels that look whether their engine is free."""
    return sum(thread.name == "prescope-measure" for thread in threading.enumerate())


@contextmanager
def run_under_way(session):
    """Somebody has the engine."""
    begun, end = threading.Event(), threading.Event()
    job = Job(lambda on_step: (begun.set(), end.wait(10)), session.engine.turn, {}).start()
    assert begun.wait(10)
    try:
        yield
    finally:
        end.set()
        job.result(10)


def test_before_it_is_measured_the_machines_that_come_with_prescope_are_said_to_be_others(panel):
    controls = panel.measure.controls
    assert (
        controls.run_button.description == "Measure this machine (up to 45 s)"
        and not controls.run_button.disabled
    )
    assert "Not measured yet" in panel.measure.words.value
    assert HERE not in panel.machine.options
    assert panel._machine_field.note == "shipped with prescope"
    panel.numbers["cores"].value += 1
    assert panel.machine.value == TYPED and panel._machine_field.note == "your numbers"


def test_measured_the_machine_is_offered_and_chosen_and_advised_by(panel, calibration):
    calibration.doubts = ("the machine was busy: others ran",)
    controls = panel.measure.controls
    controls.run_button.click()
    assert calibration.began.wait(10)
    wait_until(lambda: "copies to the GPU 1.5 MB" in controls.status.value)
    assert controls.run_button.disabled and not controls.cancel_button.disabled
    assert 0.5 <= controls.bar.value < 1 and "s left" in controls.status.value
    calibration.go.set()
    controls.job.result(10)
    wait_until(lambda: controls.status.value.startswith("done"))
    assert panel.machine.options[0] == panel.machine.value == HERE and panel._machine_field.note == ""
    words = panel.measure.words.value
    assert "Measured <b>2026-11-30</b>: link 2" in words and "differ by" in words
    assert "The machine was busy: others ran." in words and "rest of a layer" not in words
    assert controls.bar.bar_style == "warning" and "doubt" in controls.status.value
    assert controls.run_button.description == "Measure again (up to 45 s)"
    wait_until(lambda: panel.advice is not None and not panel.words.value.startswith("<p class='ps-soft'>"))
    assert dict(panel.advice.facts()) and panel.spec().profile is not None
    wait_until(lambda: not controls.run_button.disabled)


def test_a_machine_that_was_measured_before_says_so(panel, session, calibration):
    calibration.go.set()
    panel.measure.start().result(10)
    again = CapacityPanel({"tiny-moe": session.engine})
    assert again.measure.controls.run_button.description == "Measure again (up to 45 s)"
    assert "Measured <b>2026-11-30</b>:" in again.measure.words.value and again.machine.value == HERE
    again.close()


def test_while_the_engine_runs_the_button_is_grey_and_says_why(panel, session):
    controls = panel.measure.controls
    with run_under_way(session):
        wait_until(lambda: controls.run_button.disabled)
        assert "a run is under way" in controls.reason.value
        assert panel.measure.start() is None and controls.job is None
    wait_until(lambda: not controls.run_button.disabled)
    assert controls.reason.value == ""


def test_while_it_measures_a_run_waits(panel, session, calibration):
    panel.measure.start()
    assert calibration.began.wait(10)
    assert session.is_running and session.engine.turn.holder.what == "the measurement of this machine"
    run = session.job("Once", max_new_tokens=2)
    time.sleep(0.1)
    assert run.num_tokens == 0 and not run.is_done
    calibration.go.set()
    assert len(run.result(30).steps) == 2


def test_cancelled_it_ends_and_nothing_is_changed(panel, calibration):
    controls = panel.measure.controls
    job = panel.measure.start()
    assert calibration.began.wait(10)
    controls.cancel_button.click()
    with pytest.raises(CancelledError):
        job.result(10)
    wait_until(lambda: controls.status.value.startswith("cancelled"))
    assert "goes on from here" in controls.status.value
    assert "Not measured yet" in panel.measure.words.value and HERE not in panel.machine.options
    wait_until(lambda: not controls.run_button.disabled)
    assert (
        controls.cancel_button.disabled
        and controls.run_button.description == "Measure this machine (up to 45 s)"
    )


def test_an_error_stands_where_the_progress_stood(panel, calibration):
    calibration.fails_with = CannotWrite("no space left")
    calibration.go.set()
    with pytest.raises(PrescopeError):
        panel.measure.start().result(10)
    status = panel.measure.controls.status
    wait_until(lambda: "ps-error" in status.value)
    assert "<b>CannotWrite</b>: no space left" in status.value and "stands" in status.value
    wait_until(lambda: not panel.measure.controls.run_button.disabled)


def test_closed_while_it_measures_it_ends_and_shows_nothing(panel, session, calibration):
    job = panel.measure.start()
    assert calibration.began.wait(10)
    status, num_looking = panel.measure.controls.status.value, looking()
    panel.close()
    with pytest.raises(CancelledError):
        job.result(10)
    assert not session.is_running
    wait_until(lambda: looking() < num_looking)
    assert panel.measure.controls.status.value == status


def test_a_saved_profile_that_cannot_be_read_is_told_and_can_be_measured_anew(panel, session, calibration):
    calibration.go.set()
    panel.measure.start().result(10)
    file = measure_machine.own_file(this_place(session.engine.hardware()))
    file.write_text(file.read_text()[:400])
    again = CapacityPanel({"tiny-moe": session.engine})
    assert "BadProfile" in again.measure.words.value and HERE not in again.machine.options
    assert not again.measure.controls.run_button.disabled
    again.close()


def test_the_bar_goes_by_time_while_layers_run_and_by_points_then():
    """Layers are 40 % of the time at most, and are not counted: the bar stood still, then jumped."""
    pace = CalibrationProgress(50.0)
    pace.at(0.0, 10.0)
    assert (pace.share, pace.left_s) == (0.2, 40.0)
    pace.at(0.5, 20.0)
    assert pace.share == pytest.approx(0.6) and pace.left_s == pytest.approx(10.0)
    pace.at(1.0, 31.0)
    assert pace.share == 1.0 and pace.left_s == 0.0


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("h2d 9.44 MB", "copies to the GPU 9.44 MB"),
        ("cpu: 4 experts of 9.44 MB, 2 tokens", "CPU: 4 experts of 9.44 MB, 2 tokens"),
        ("tiny-moe, batch 8", "tiny-moe, batch 8"),
    ],
)
def test_what_is_measured_is_said_in_a_persons_words(what, words):
    assert measured_now(what) == words


def test_words_of_a_profile_name_its_date_its_rates_and_its_spread():
    words = profile_words(HardwareProfile.load("test_machine"), is_own=False)
    assert "for prescope, on a machine like this: link " in words
    assert "GB/s" in words and "differ by" in words and "ps-error" not in words


def test_a_closed_engine_measures_nothing():
    assert reason_not("", is_closed=True) == "the engine is closed"
    assert reason_not("a proof", is_closed=False).startswith("a proof is under way")

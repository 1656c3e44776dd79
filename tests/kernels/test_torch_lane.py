"""The lane without a compiler, called by compiled code: what a signal's handler raises in a callback is not lost."""

import ctypes
import gc
import random
import signal
import time
from types import SimpleNamespace

import pytest

from prescope.core.jit import jit
from prescope.core.native import call
from prescope.kernels.cpu import LaneFunctions
from prescope.kernels.cpu.with_torch import TorchLane

RUNNING_JOB = 1


@pytest.fixture
def lane():
    opened = TorchLane([], threads=1)
    yield opened
    opened.close()


@pytest.fixture
def functions(lane) -> LaneFunctions:
    """Of a lane with one job that does not end."""
    made = lane.functions()
    made._jobs[RUNNING_JOB] = SimpleNamespace(done=lambda: False, cancel=lambda: None)
    return made


@jit
def poll(state, job, times):
    """The highest state that a job had."""
    highest = 0
    for _ in range(times):
        highest = max(highest, call(state, (job,)))
    return highest


class Struck(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_what_a_handler_raises_in_a_callback_is_raised_when_the_call_is_over(functions, capfd):
    poll(functions.addresses.state, RUNNING_JOB, 1)  # compiled before
    counts = {"struck": 0, "seen": 0}
    is_armed = False

    def strike(*_):
        if is_armed:
            counts["struck"] += 1
            raise Struck

    former, rng = signal.signal(signal.SIGALRM, strike), random.Random(0)
    gc.disable()  # what strikes in a callback of the collector (hypothesis has one) is lost to everybody
    try:
        for _ in range(1500):
            try:
                is_armed = True
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 1e-3))
                if functions.serving(poll, functions.addresses.state, RUNNING_JOB, 400) == 2:
                    functions.explain()
                is_armed = False
            except Struck:
                counts["seen"] += 1
            is_armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        gc.enable()
    assert counts["struck"] > 100 and counts["seen"] == counts["struck"]
    assert "ignored" not in capfd.readouterr().err


def test_other_reports_of_what_cannot_be_raised_go_where_they_went(functions, monkeypatch):
    reported = []
    monkeypatch.setattr("sys.unraisablehook", lambda report: reported.append(report.exc_value))

    class Fails:
        def __del__(self):
            raise Struck("in a finalizer")

    functions.serving(Fails)
    assert [str(error) for error in reported] == ["in a finalizer"]
    # ... and afterwards callbacks of others do too.
    ctypes.CFUNCTYPE(None)(lambda: 1 / 0)()
    assert isinstance(reported[1], ZeroDivisionError)


def test_a_job_whose_submission_was_interrupted_is_over_before_its_memory_is_used_again(lane, functions):
    written = []
    lane._leader.submit(lambda: (time.sleep(0.3), written.append(1)))
    functions.settle(0)
    assert written == [1]


def test_a_reason_is_told_once(functions):
    functions._error = Struck("the first")
    with pytest.raises(Struck, match="the first"):
        functions.explain()
    with pytest.raises(RuntimeError, match="without a reason"):
        functions.explain()

"""Waits end: in a result, or in an error that says what was waited for."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prescope.core import worker
from prescope.core.worker import Latch, Worker, despite_interrupts
from prescope.errors import ForkedProcess, NotAttached, WaitTimedOut

ROOT = Path(__file__).resolve().parents[2]


def test_all_who_wait_for_a_latch_go_on():
    latch, passed = Latch(), []
    threads = [threading.Thread(target=lambda: passed.append(latch.wait(10.0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert not latch.wait(0.01) and not passed
    latch.set()
    for thread in threads:
        thread.join(10.0)
    assert passed == [True] * 4 and latch.is_set and latch.wait(0.0)


def test_jobs_run_in_their_order_and_behind_them_the_thread_ends():
    done: list[int] = []
    thread = Worker("prescope-test", begin=lambda: done.append(-1))
    for number in range(50):
        thread.submit(lambda number=number: done.append(number))
    thread.drain("the jobs")
    assert done == [-1, *range(50)]
    thread.close("the end")
    thread.close("the end, a second time")
    assert thread.has_ended


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_wait_for_a_thread_that_is_gone_says_what_was_waited_for():
    def broken() -> None:
        raise ArithmeticError("not caught by the job")

    thread, never = Worker("prescope-test"), Latch()
    thread.submit(broken)
    with pytest.raises(WaitTimedOut, match="a copy will not come"):
        thread.wait(never, "a copy")
    with pytest.raises(TimeoutError):
        thread.drain("what comes after it")


def test_a_wait_ends_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE_S", 0.3)
    thread, gate = Worker("prescope-test"), Latch()
    thread.submit(lambda: gate.wait(20.0))
    started = time.perf_counter()
    with pytest.raises(WaitTimedOut, match="its answer did not come within 1 s"):
        thread.drain("its answer", work_s=0.3)
    assert 0.5 < time.perf_counter() - started < 5.0
    gate.set()
    thread.close("the end")


FORKED = """
import os, sys
from prescope.core.worker import Latch, Worker, process_id
from prescope.errors import ForkedProcess

thread, parent = Worker("prescope-test"), process_id()
child = os.fork()
if child == 0:
    calls = [lambda: thread.submit(print), lambda: thread.wait(Latch(), "a copy"), lambda: thread.drain("all")]
    said = 0
    for call in calls:
        try:
            call()
        except ForkedProcess as error:
            said += f"belongs to process {parent}" in str(error) and "spawn" in str(error)
    thread.close("the end")
    mine = Worker("its own")
    mine.drain("a child's own thread works")
    os._exit(0 if said == 3 and process_id() == os.getpid() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_is_told_that_the_thread_stayed_behind():
    """Formerly it waited for ever."""
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], cwd=ROOT, timeout=60, capture_output=True
    )
    assert child.returncode == 0, child.stderr.decode()
    assert issubclass(ForkedProcess, NotAttached)


@pytest.mark.parametrize(
    ("errors", "calls"),
    [
        ([], 1),
        ([KeyboardInterrupt, KeyboardInterrupt, SystemExit], 4),
        ([TimeoutError], 2),
        ([TimeoutError, KeyboardInterrupt], 3),
        ([OSError, OSError], 2),
        ([WaitTimedOut], 1),
    ],
)
def test_what_an_interrupt_left_half_done_is_finished(errors, calls):
    """An error of its own is raised when it comes again, or at once where it is one that says what was waited for."""
    left, done = list(errors), []

    def work():
        done.append(len(done))
        if left:
            raise left.pop(0)

    if errors:
        with pytest.raises(errors[-1]):
            despite_interrupts(work)
    else:
        despite_interrupts(work)
    assert len(done) == calls

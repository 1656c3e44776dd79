"""Waiting for a job: as long as the run lasts, and never for one that cannot come."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from prescope.engine.job import Job
from prescope.engine.turn import Turn
from prescope.errors import ForkedProcess, WaitTimedOut


def job_of(run) -> Job:
    return Job(run, Turn(), {})


def slow(seconds: float):
    return lambda on_step: time.sleep(seconds) or SimpleNamespace(tokens=[[1]])


def test_the_wait_lasts_as_long_as_the_run_and_a_limit_is_kept():
    job = job_of(slow(0.5)).start()
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        job.result(0.15)
    assert 0.15 <= time.monotonic() - begun < 0.45
    assert job.result().tokens == [[1]] and job.result(0).tokens == [[1]]


def test_a_job_that_was_not_started_says_so_instead_of_waiting():
    with pytest.raises(WaitTimedOut, match="start"):
        job_of(slow(0.0)).result()


def test_a_viewer_that_waits_for_the_result_does_not_keep_it_for_ever(monkeypatch):
    monkeypatch.setattr("prescope.engine.job.LAST_SHOW_S", 0.2)

    def run(on_step):
        on_step(1)
        time.sleep(0.1)  # the viewer has begun to wait
        return SimpleNamespace(tokens=[[1]])

    job, seen = job_of(run), []
    job.on_progress(lambda job: seen.append(job.result(20).tokens))
    assert job.start().result(10).tokens == [[1]]
    job._viewing.join(10)
    assert seen == [[[1]]]


def test_a_thread_that_is_gone_without_a_result_is_noticed(monkeypatch):
    monkeypatch.setattr(Job, "_work", lambda self: None)
    job = job_of(slow(0.0)).start()
    with pytest.raises(WaitTimedOut, match="ended without a result"):
        job.result()


@pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="no interval timer here to raise interrupts with"
)
def test_an_interrupt_ends_the_wait_and_not_the_run():
    job = job_of(slow(0.6)).start()
    former = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            job.result()
    finally:
        signal.signal(signal.SIGALRM, former)
    assert not job.is_done and job.result().tokens == [[1]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_its_parents_thread():
    job = job_of(slow(0.4)).start()
    pid = os.fork()
    if pid == 0:
        try:
            job.result()
        except ForkedProcess:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert job.result().tokens == [[1]]

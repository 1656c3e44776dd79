"""Several processes and a dask cluster as workers: nothing is lost or counted twice, whoever dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from distributed import Client, LocalCluster

from prescope.errors import BadSweep, UnsupportedOption
from prescope.tuning import Choices, Range, Space, load_sweep, open_sweep
from tests.support.sweep_runners import Hill

ROOT = Path(__file__).resolve().parents[2]
SPACE = Space(slots=Range(1, 80), schedule=Choices("slow", "fast"))


@pytest.fixture(scope="module")
def client():
    """Two processes: the start of a worker takes seconds, as many as it takes to import torch."""
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address=None,
            silence_logs="CRITICAL",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_workers_find_what_this_process_finds(client, tmp_path):
    """Each point is tried once, in another process, and is the same there."""
    runner = Hill(log=tmp_path / "log")
    sweep = open_sweep("by workers", SPACE, runner, method="grid")
    assert sweep.run(client=client).done == 160
    processes = {line.split()[1] for line in Path(runner.log).read_text("utf-8").splitlines()}
    assert len(runner.tries()) == 160
    assert len(processes) == 2 and str(os.getpid()) not in processes
    here = open_sweep("here", SPACE, Hill(), method="grid")
    here.run()
    columns = ["number", "state", "reason", "seed", "slots", "schedule", "tokens_per_s"]
    pd.testing.assert_frame_equal(sweep.points()[columns], here.points()[columns])


def test_workers_killed_in_the_middle_of_a_point_lose_none_and_count_none_twice(client, tmp_path):
    """Four points kill their worker when they are first tried: they are tried again, all others are told once."""
    (tmp_path / "kills").mkdir()
    deadly = (7, 33, 50, 71)
    runner = Hill(log=tmp_path / "log", kills=tmp_path / "kills", deadly=deadly)
    sweep = open_sweep("a", Space(slots=Range(1, 80)), runner, method="grid")
    done = sweep.run(client=client)
    points = sweep.points()
    assert (done.done, done.failed, done.infeasible) == (80, 0, 3)
    assert sorted(points["slots"]) == list(range(1, 81))
    tries = runner.tries()
    assert all(tries.count(slots) >= 2 for slots in deadly)
    assert set(tries) == set(range(1, 81))
    assert (points.query("slots >= 4")["state"] == "finished").all()


def test_a_point_that_kills_whoever_tries_it_is_failed_and_named(client, tmp_path):
    """Or one setting that needs too much memory would take down the whole night's sweep."""
    sweep = open_sweep("a", Space(slots=Range(20, 23)), Hill(fatal=[22]), method="grid")
    done = sweep.run(client=client)
    assert (done.finished, done.failed) == (3, 1)
    failed = sweep.points().query("state == 'failed'")
    assert list(failed["slots"]) == [22]
    assert "its worker died" in failed["reason"].iloc[0]


def test_an_engine_of_this_process_cannot_go_to_others(client):
    class Bound(Hill):
        is_here = True

    sweep = open_sweep("a", SPACE, Bound())
    for arguments in ({"workers": 2}, {"client": client}):
        with pytest.raises(UnsupportedOption, match="EngineRunner"):
            sweep.run(points=3, **arguments)


def test_a_sweep_of_a_killed_process_goes_on_where_it_was(tmp_path):
    """kill -9 in the middle: what was told stays as it is, what was begun is tried again under its own number."""
    log = tmp_path / "log"
    code = (
        "from prescope.tuning import Range, Space, open_sweep\n"
        "from tests.support.sweep_runners import Hill\n"
        f"sweep = open_sweep('a', Space(slots=Range(1, 100)), Hill(log={str(log)!r}, last=40), method='grid')\n"
        "sweep.run()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        while not log.exists() or len(log.read_text("utf-8").splitlines()) < 40:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.01)
        with pytest.raises(BadSweep, match=f"process {process.pid}"):
            open_sweep("a", Space(slots=Range(1, 100)), Hill(), method="grid").run()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = load_sweep("a")
    assert not there.is_running
    before = there.points()
    assert 0 < len(before) < 100 and "running" not in set(before["state"])
    begun = [trial.number for trial in there.study.get_trials() if not trial.state.is_finished()]
    assert begun, "some were handed out and not told"
    sweep = open_sweep("a", Space(slots=Range(1, 100)), Hill(), method="grid")
    assert sweep.run().done == 100
    after = sweep.points()
    assert sorted(after["slots"]) == list(range(1, 101))
    pd.testing.assert_frame_equal(
        after[after["number"].isin(before["number"])].reset_index(drop=True), before
    )


@pytest.mark.slow
def test_processes_of_this_machine_are_started_and_ended(tmp_path):
    runner = Hill(log=tmp_path / "log")
    sweep = open_sweep("a", SPACE, runner, method="tpe")
    assert sweep.run(points=50, workers=2).done == 50
    processes = {int(line.split()[1]) for line in Path(runner.log).read_text("utf-8").splitlines()}
    assert os.getpid() not in processes
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)

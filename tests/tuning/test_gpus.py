"""A GPU for each worker, with GPUs that are not there: which process sees which."""

import os
from pathlib import Path

import pytest
import torch

from prescope.device import visible_gpus
from prescope.errors import UnsupportedOption
from prescope.tuning import EngineRunner, Range, SimulatorRunner, Space, open_sweep, pools
from prescope.tuning.gpus import OneGpuEach, require_gpus_apart
from tests.support.sweep_runners import Hill, OnGpu

NAMES = ["4", "GPU-1a2b"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [
        (None, 3, ["0", "1", "2"]),
        ("4, GPU-1a2b", 2, NAMES),
        ("", 0, []),
        ("4,5", 0, []),
        ("1,-1,0", 1, ["1"]),
    ],
)
def test_gpus_have_the_names_that_a_child_process_is_given(monkeypatch, named, count, expected):
    """Numbers count from the first that this process sees: a child told "0" would take another one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == expected


def test_who_measures_takes_a_gpu_and_who_simulates_does_not():
    assert EngineRunner.takes_gpu and not SimulatorRunner.takes_gpu


def test_more_workers_than_gpus_are_refused_before_any_is_started(monkeypatch):
    """Two on one GPU would measure each other."""
    monkeypatch.setattr(pools, "visible_gpus", lambda: NAMES)
    sweep = open_sweep("a", Space(slots=Range(10, 20)), OnGpu())
    with pytest.raises(
        UnsupportedOption, match=r"workers=3, but this process sees 2 GPUs \(4, GPU-1a2b\).*use workers=2"
    ):
        sweep.run(points=3, workers=3)
    assert len(sweep.points()) == 0


def test_a_simulator_s_workers_need_none(monkeypatch):
    monkeypatch.setattr(pools, "visible_gpus", lambda: pytest.fail("nobody asks for GPUs"))
    with pools.pool_of(pools.SweepTask(Hill(), {}, ("tokens_per_s",)), 1, None, lambda: False) as pool:
        assert isinstance(pool, pools.Here)


class Workers:
    """A client of workers that see these GPUs, by address."""

    def __init__(self, gpus):
        self._gpus = gpus

    def run(self, asked):
        assert asked is visible_gpus
        return self._gpus


@pytest.mark.parametrize(
    "gpus",
    [
        {"tcp://a:1": ["0"], "tcp://a:2": ["1"]},
        {"tcp://a:1": ["0"], "tcp://b:1": ["0"]},
        {"tcp://a:1": [], "tcp://a:2": []},
        {"tcp://a:1": ["0", "1"]},
    ],
)
def test_workers_with_a_gpu_each_or_none_at_all_are_taken(gpus):
    require_gpus_apart(Workers(gpus))


@pytest.mark.parametrize("second", [["0"], ["0", "1"]])
def test_two_workers_that_would_load_onto_one_gpu_are_refused(second):
    """A worker that sees all GPUs takes the first, as all others do that see them."""
    with pytest.raises(UnsupportedOption, match="would both measure on GPU 0"):
        require_gpus_apart(Workers({"tcp://a:1": ["0", "1"], "tcp://a:2": second}))


def test_a_worker_in_place_of_one_that_is_gone_gets_its_gpu():
    cluster = OneGpuEach.__new__(OneGpuEach)  # none is started
    cluster._gpus, cluster._i = NAMES, 0
    cluster.new_spec = {"cls": None, "options": {"nthreads": 1}}
    cluster.worker_spec = {}
    for _ in NAMES:
        cluster.worker_spec.update(cluster.new_worker_spec())
    seen = [spec["options"]["env"]["CUDA_VISIBLE_DEVICES"] for spec in cluster.worker_spec.values()]
    assert seen == NAMES
    del cluster.worker_spec[0]
    [spec] = cluster.new_worker_spec().values()
    assert spec["options"] == {"nthreads": 1, "env": {"CUDA_VISIBLE_DEVICES": "4"}}


@pytest.mark.slow
def test_each_process_sees_one_gpu_and_after_a_kill_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(pools, "visible_gpus", lambda: NAMES)
    (tmp_path / "kills").mkdir()
    runner = OnGpu(log=tmp_path / "log", kills=tmp_path / "kills", deadly=[7, 33], seconds=0.05)
    sweep = open_sweep("a", Space(slots=Range(4, 60)), runner, method="grid")
    assert sweep.run(workers=2).finished == 57
    seen = [line.split() for line in Path(f"{runner.log}.gpus").read_text("utf-8").splitlines()]
    by_process = {process: {gpu for _, other, gpu in seen if other == process} for _, process, _ in seen}
    assert all(len(gpus) == 1 for gpus in by_process.values())
    assert set.union(*by_process.values()) == set(NAMES)
    assert len(by_process) >= 3 and str(os.getpid()) not in by_process, "killed ones are started again"

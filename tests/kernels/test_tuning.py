"""Kernels are tuned once, by graphs that disturb no other thread's work on the GPU."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from prescope.kernels import tuning
from prescope.kernels.base import CannotLaunch

GPU = torch.device("cuda", 1)
#: Milliseconds of a run by candidate; None has no room on the GPU.
TOOK_MS = {(16, 4): 0.25, (32, 4): 0.125, (64, 8): None, (128, 8): 0.5}


class Gpu:
    """A clock that runs and replays advance."""

    def __init__(self, took_ms) -> None:
        self.now_ms, self.is_capturing, self.launched, self.captured = 0.0, False, [], []
        self.took_ms = took_ms

    def run(self, candidate) -> None:
        if self.took_ms[candidate] is None:
            raise CannotLaunch("out of resource: shared memory")
        self.launched.append(candidate)
        if not self.is_capturing:
            self.now_ms += self.took_ms[candidate]

    def capture_graph(self, device, run):
        assert device == GPU and self.launched, "what is captured was compiled before"
        self.is_capturing, first = True, len(self.launched)
        run()
        self.is_capturing = False
        launches = self.launched[first:]
        self.captured.append(launches)

        def replay() -> None:
            self.now_ms += sum(self.took_ms[candidate] for candidate in launches)

        return replay, None

    def event(self, enable_timing: bool):
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at_ms = gpu, -1.0

    def record(self) -> None:
        assert not self.gpu.is_capturing
        self.at_ms = self.gpu.now_ms

    def synchronize(self) -> None:
        """It is over."""

    def elapsed_time(self, end: "Event") -> float:
        return end.at_ms - self.at_ms


CANDIDATES = list(TOOK_MS)


@pytest.fixture
def tuned_here(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_loaded", {})
    monkeypatch.setattr(tuning, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")

    def tune(took_ms=TOOK_MS) -> Gpu:
        gpu = Gpu(took_ms)
        monkeypatch.setattr(tuning, "capture_graph", gpu.capture_graph)
        monkeypatch.setattr(torch.cuda, "Event", gpu.event)
        tuning.tune(GPU, "a shape", list(took_ms), gpu.run)
        return gpu

    return tune, tuning._file(GPU)


def new_process() -> None:
    """Another process knows what the file says."""
    tuning._loaded.clear()


def test_the_fastest_candidate_is_kept_and_asked_for_once(tuned_here):
    tune, file = tuned_here
    gpu = tune()
    assert [launches[0] for launches in gpu.captured] == [(16, 4), (32, 4), (128, 8)]
    assert [len(launches) for launches in gpu.captured] == [20, 40, 10], "graphs take 5 ms"
    assert json.loads(file.read_text()) == {"a shape": [32, 4]}
    for _ in range(2):
        assert tuning.tuned(GPU, "a shape", CANDIDATES) == (32, 4)
        assert tuning.tuned(torch.device("cpu"), "a shape", CANDIDATES) is None
        assert tuning.tuned(GPU, "another", CANDIDATES) is None
        assert not tune().launched, "it is known"
        new_process()


def test_what_the_clock_cannot_see_is_run_often(tuned_here):
    tune, _ = tuned_here
    gpu = tune({(1, 1): 0.0})
    assert [len(launches) for launches in gpu.captured] == [tuning.MOST_RUNS]


def test_where_no_candidate_has_room_none_is_kept(tuned_here):
    """Whoever launches the default is told why."""
    tune, file = tuned_here
    tune({(64, 8): None})
    assert tuning.tuned(GPU, "a shape", CANDIDATES) is None and not file.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[1, 2]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"a shape": null}', b'{"a shape": [32]}',
        b'{"a shape": [32, 4, 1]}', b'{"a shape": [32, "4"]}', b'{"a shape": {"32": 4}}', b'{"a shape": [48, 4]}',
        b'{"a shape": 32}',
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_tuned_for_anew(tuned_here, content):
    """Formerly every run on that GPU failed, until somebody found the file."""
    tune, file = tuned_here
    file.parent.mkdir()
    file.write_bytes(content)
    assert tuning.tuned(GPU, "a shape", CANDIDATES) is None
    assert tune().launched
    new_process()
    assert tuning.tuned(GPU, "a shape", CANDIDATES) == (32, 4)


def test_a_cache_folder_that_cannot_be_written_ends_no_run(tuned_here):
    tune, file = tuned_here
    file.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="tuned again in the next process: .*cannot be written"):
        tune()
    assert tuning.tuned(GPU, "a shape", CANDIDATES) == (32, 4)
    assert not tune().launched, "this process knows"

"""Memory that the system refuses, captures that do not end as they should: said, and everything works afterwards."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import prescope
from prescope.device import CudaDevice, EmulatedLinkDevice, cuda, driver
from prescope.errors import NotEnoughMemory, UnsupportedOption, WaitTimedOut
from tests.support.models import plain_tokens, prompt, tiny_moe


class RefusesToPin(EmulatedLinkDevice):
    """A device whose host may lock two layers' rows and no more, by the real device's own words."""

    def __init__(self) -> None:
        super().__init__(50.0)
        self.pinned = 0

    def pin(self, row: torch.Tensor) -> bool:
        if self.pinned == 2:
            return CudaDevice.pin(self, row)  # type: ignore[arg-type]
        self.pinned += 1
        return True

    def unpin(self, row: torch.Tensor) -> None:
        self.pinned -= 1


def test_pinning_that_is_refused_gives_the_model_back_and_says_what_to_do(monkeypatch):
    """As ulimit -l on a laptop, or WSL: formerly "failed with cudaError.???", and the experts half moved."""
    model, ids = tiny_moe(), prompt()
    expected = plain_tokens(model, ids)
    device = RefusesToPin()
    monkeypatch.setattr("prescope.engine.engine.open_device", lambda *_: device)
    monkeypatch.setattr("torch.cuda.device", lambda _: nullcontext())
    monkeypatch.setattr(
        "torch.cuda.cudart", lambda: SimpleNamespace(cudaHostRegister=lambda address, nbytes, flags: 2)
    )
    with pytest.raises(NotEnoughMemory, match=r"KiB of host memory be pinned.*ulimit -l.*WSL.*device='cpu'"):
        prescope.attach(model, slots=5, device="cpu")
    assert device.pinned == 0, "what was pinned before is unpinned"
    monkeypatch.undo()
    assert plain_tokens(model, ids) == expected
    with prescope.attach(model, slots=5, device="cpu", link_gb_per_s=50.0) as engine:
        assert engine.generate(ids, max_new_tokens=12).tokens == expected


class InterruptedUnpinning(EmulatedLinkDevice):
    """Ctrl-C comes the first time a layer is unpinned, before the driver has done it or behind."""

    def __init__(self, is_done: bool) -> None:
        super().__init__(50.0)
        self.pinned, self.num_calls, self.is_done = set(), 0, is_done

    def pin(self, row: torch.Tensor) -> bool:
        self.pinned.add(row.data_ptr())
        return True

    def unpin(self, row: torch.Tensor) -> None:
        self.num_calls += 1
        if self.num_calls == 2:
            if self.is_done:
                self.pinned.remove(row.data_ptr())
            raise KeyboardInterrupt
        self.pinned.discard(row.data_ptr())


@pytest.mark.parametrize("is_done", [False, True])
def test_ctrl_c_while_memory_is_unpinned_leaves_none_pinned(monkeypatch, is_done):
    """Pinned memory that was given back: whoever gets its pages next can pin nothing there."""
    model, ids = tiny_moe(), prompt()
    expected, device = plain_tokens(model, ids), InterruptedUnpinning(is_done)
    monkeypatch.setattr("prescope.engine.engine.open_device", lambda *_: device)
    engine = prescope.attach(model, slots=5, device="cpu")
    assert len(device.pinned) == 3
    with pytest.raises(KeyboardInterrupt):
        engine.detach()
    engine.detach()
    assert not device.pinned and device.num_calls == 4
    assert plain_tokens(model, ids) == expected


def test_pinning_that_does_not_end_is_said(monkeypatch):
    release = threading.Event()

    class Stuck(EmulatedLinkDevice):
        def pin(self, row: torch.Tensor) -> bool:
            release.wait(20.0)
            return False

    monkeypatch.setattr("prescope.engine.engine.open_device", lambda *_: Stuck(50.0))
    monkeypatch.setattr("prescope.hf.attach.MOST_PIN_S", 0.1)
    monkeypatch.setattr("prescope.core.worker.PATIENCE_S", 0.3)
    try:
        with pytest.raises(WaitTimedOut, match=r"pinning|pinned memory for MoE layer 0"):
            prescope.attach(tiny_moe(), slots=5, device="cpu")
    finally:
        release.set()


class Captures:
    """torch's functions around a capture, and the state that they leave; something goes wrong at `at`."""

    def __init__(self, monkeypatch, at: str, error: BaseException) -> None:
        self.current, self.is_open, self.num_ends, self.at, self.error = "the user's", False, 0, at, error
        self.modes = []
        outer = self

        class Graph:
            """As torch.cuda.graph: its way out is not gone when the end of the capture raises."""

            def __init__(self, graph, pool, stream, capture_error_mode):
                outer.modes.append(capture_error_mode)
                self.graph, self.stream = graph, stream

            def __enter__(self):
                self.former, outer.current = outer.current, self.stream
                outer.is_open = True
                outer.reach("begun")

            def __exit__(self, *_):
                outer.reach("ending")
                self.graph.capture_end()
                outer.current = self.former

        for name, value in {
            "graph": Graph, "CUDAGraph": lambda: self, "Stream": lambda device: "a capture's",
            "current_stream": lambda device=None: self.current, "set_stream": self.set_stream,
            "is_current_stream_capturing": lambda: self.is_open and self.current == "a capture's",
            "synchronize": lambda device=None: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value, raising=False)
        cuda._capture_stream.cache_clear()

    def reach(self, place: str) -> None:
        if place == self.at:
            self.at = ""
            raise self.error

    def set_stream(self, stream: str) -> None:
        self.current = stream

    def capture_end(self) -> None:
        assert self.is_open and self.current == "a capture's"
        self.is_open, self.num_ends = False, self.num_ends + 1
        self.reach("ended")

    def replay(self) -> None:
        """Nothing."""


@pytest.mark.parametrize(("platform", "name"), [("win32", "nvcuda.dll"), ("linux", "libcuda.so.1")])
def test_the_driver_is_looked_for_by_its_name_here_and_said_to_be_missing(monkeypatch, platform, name):
    """Formerly by Linux's name alone, and the error named a setting that engines do not have."""
    asked = []

    def missing(library: str):
        asked.append(library)
        raise OSError("no such file")

    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("ctypes.CDLL", missing)
    with pytest.raises(UnsupportedOption, match=rf"{name}.*no such file.*device='cpu'"):
        driver.open_driver.__wrapped__()
    assert asked == [name]


@pytest.fixture
def forgotten_stream():
    yield
    cuda._capture_stream.cache_clear()


@pytest.mark.usefixtures("forgotten_stream")
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("operation not permitted when capturing")]
)
@pytest.mark.parametrize("at", ["begun", "run", "ending", "ended"])
def test_whatever_ends_a_capture_the_thread_goes_on_where_it_was(monkeypatch, at, error):
    """Formerly on the capture's stream; interrupted on the way in or out, that stream was captured for ever."""
    captures = Captures(monkeypatch, at, error)

    def run() -> int:
        captures.reach("run")
        return 7

    with pytest.raises(type(error)):
        cuda.capture_graph(torch.device("cuda", 0), run)
    assert not captures.is_open and captures.num_ends == 1
    assert captures.current == "the user's"
    assert cuda.capture_graph(torch.device("cuda", 0), run) == (captures.replay, 7)
    assert captures.current == "the user's" and set(captures.modes) == {"thread_local"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_refusal_leaves_no_error_for_the_next_kernel():
    """CUDA remembers the error of a call that failed, and torch reports it at the next launch, whoever made it."""
    device = CudaDevice()
    row = torch.zeros(1 << 20, dtype=torch.uint8)
    assert device.pin(row)
    try:
        with pytest.raises(NotEnoughMemory):
            device.pin(row)  # pinned already, which the runtime refuses too
        assert int(torch.ones(8, device=device.torch_device).sum()) == 8
    finally:
        device.unpin(row)
    device.unpin(row)  # as after an interrupt
    assert int(torch.ones(8, device=device.torch_device).sum()) == 8

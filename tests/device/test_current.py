"""One GPU of several: whatever is done with a device is done while it is the current one of the thread that does it."""

import sys
import threading
from contextlib import contextmanager

import pytest
import torch

import prescope
from prescope.calibration import calibrate
from prescope.device import EmulatedLinkDevice
from tests.support.models import plain_tokens, prompt, tiny_moe

WATCHED = {
    "allocate_slots", "copy", "mark", "wait", "is_done", "read", "send", "open_events", "capture", "clock", "is_idle",
    "synchronize", "recover",
}  # fmt: skip


def watched(kind: type) -> type:
    """A device that takes down what is done with it while it is not current: CUDA would do it on another GPU."""

    class Watched(kind):
        def __init__(self, *args) -> None:
            self.depth, self.outside, self.inside = threading.local(), [], set()
            super().__init__(*args)

        @contextmanager
        def as_current(self):
            self.depth.value = getattr(self.depth, "value", 0) + 1
            try:
                yield
            finally:
                self.depth.value -= 1

        def __getattribute__(self, name):
            if name in WATCHED:
                if getattr(self.depth, "value", 0) == 0:
                    self.outside.append((name, threading.current_thread().name))
                else:
                    self.inside.add(name)
            return super().__getattribute__(name)

    return Watched


def use(model, ids, opened: list, **settings) -> None:
    expected = plain_tokens(model, ids)
    with prescope.attach(model, slots=10, **settings) as engine:
        assert engine.generate(ids, max_new_tokens=12).tokens == expected
        assert plain_tokens(model, ids) == expected
        with engine.record() as results:
            model(ids)
        assert results[0].metrics.needed > 0
        model.model.layers[1].mlp(torch.zeros(1, 1, 32))  # a layer called alone
        engine.configure(slots=12)
        engine.clear_cache()
        with pytest.raises(ZeroDivisionError), engine.record():
            model(ids)
            _ = 1 / 0
        in_thread = threading.Thread(target=lambda: engine.generate(ids, max_new_tokens=2))
        in_thread.start()
        in_thread.join()
        engine.check_integrity()
        engine.recover()
    (device,) = opened
    assert not device.outside and {"copy", "mark", "wait", "read", "synchronize"} <= device.inside


def test_an_engine_uses_its_device_only_while_it_is_current(monkeypatch):
    opened = []
    monkeypatch.setattr(
        "prescope.engine.engine.open_device",
        lambda *_: opened.append(watched(EmulatedLinkDevice)(50.0)) or opened[-1],
    )
    use(tiny_moe(), prompt(), opened, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreted GPU")
@pytest.mark.parametrize("decode", ["host-driven", "copy-engine"])
def test_captured_steps_too(gpu, monkeypatch, decode):
    from tests.support.interpreted_gpu import InterpretedGpu

    opened, model, ids = [], tiny_moe(num_hidden_layers=1), prompt()
    monkeypatch.setattr(
        "prescope.engine.engine.open_device",
        lambda *_: opened.append(watched(InterpretedGpu)()) or opened[-1],
    )
    expected = plain_tokens(model, ids, 4)
    with prescope.attach(model, slots=6, decode=decode, **gpu) as engine:
        assert engine.generate(ids, max_new_tokens=4).tokens == expected
        assert engine.reasons["decode"].startswith(decode)
    (device,) = opened
    assert not device.outside and "capture" in device.inside


def test_calibration_too(monkeypatch):
    """Its threads as well, which keep the link busy."""
    opened = []
    monkeypatch.setattr(
        sys.modules[calibrate.__module__], "open_device",
        lambda *_: opened.append(watched(EmulatedLinkDevice)(5.0)) or opened[-1],
    )  # fmt: skip
    calibrate((64, 32), device="cpu", seconds=0.2, save=False, link_gb_per_s=5.0, on_progress=lambda *_: None)
    (device,) = opened
    assert not device.outside and {"copy", "is_done"} <= device.inside


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("decode", ["layered", "gpu-driven", "copy-engine", "host-driven"])
def test_the_second_gpu_serves_while_the_first_is_current(decode):
    """Also after the first GPU has captured, whose stream torch would take for the second one's graphs."""
    ids, rest = prompt(), {"decode": decode, "slots": 10}
    models = [tiny_moe(dtype=torch.bfloat16) for _ in range(2)]
    with prescope.attach(models[0], device="cuda:0", **rest) as first:
        expected = first.generate(ids, max_new_tokens=24).tokens
        used = torch.cuda.memory_allocated(0)
        with prescope.attach(models[1], device="cuda:1", **rest) as second:
            assert second.generate(ids, max_new_tokens=24).tokens == expected
            assert torch.cuda.current_device() == 0
            assert second.reasons["decode"].startswith(decode)
            assert torch.cuda.memory_allocated(0) == used, "nothing of it is on the first GPU"
            assert models[1](ids.to("cuda:1")).logits.device == torch.device("cuda:1")
            second.check_integrity()
        assert first.generate(ids, max_new_tokens=24).tokens == expected


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_the_second_gpu_is_calibrated_while_the_first_is_current():
    profile = calibrate((2048, 768), device="cuda:1", seconds=2.0, save=False, on_progress=lambda *_: None)
    assert {point.of.kind for point in profile.points} >= {"h2d", "gpu", "message"}
    assert torch.cuda.current_device() == 0

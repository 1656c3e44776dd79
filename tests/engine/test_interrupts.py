"""Close, fork and interrupts at any moment: never a hang, never another text, and a clear error afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import prescope
from prescope.core import machine
from prescope.errors import ForkedProcess, NotAttached, NotEnoughMemory, SlotPoolTooLarge, UnsupportedOption
from prescope.scheduler.costs import LayerCosts
from tests.support.interrupted_lines import ENGINE_FILES, interrupted, is_interrupted
from tests.support.models import EXPERTS, LAYERS, plain_tokens, prompt, tiny_moe

ROOT = Path(__file__).resolve().parents[2]
LINK = {"device": "cpu", "link_gb_per_s": 50.0}


@pytest.fixture
def model():
    return tiny_moe()


def uses(engine):
    """Everything that needs an engine which is attached."""
    return {
        "generate": lambda: engine.generate(prompt(), max_new_tokens=2),
        "configure": lambda: engine.configure(slots=4),
        "clear_cache": engine.clear_cache,
        "recover": engine.recover,
        "check_integrity": engine.check_integrity,
        "force_routing": lambda: engine.force_routing(None),
        "record": lambda: engine.record().__enter__(),
    }


def test_after_close_everything_says_so_and_close_does_nothing(model):
    ids = prompt()
    expected = plain_tokens(model, ids)
    engine = prescope.attach(model, slots=5, **LINK)
    assert engine.generate(ids, max_new_tokens=12).tokens == expected
    engine.close()
    engine.close()
    for name, use in uses(engine).items():
        started = time.perf_counter()
        with pytest.raises(NotAttached, match="make a new one"):
            use()
        assert time.perf_counter() - started < 1.0, name
    assert "detached" in repr(engine)
    assert plain_tokens(model, ids) == expected


@pytest.mark.parametrize("way", ["returns", "raises"])
def test_close_in_a_callback_ends_the_run_and_then_gives_the_model_back(model, way):
    ids = prompt()
    expected = plain_tokens(model, ids)
    engine = prescope.attach(model, slots=5, **LINK)

    def on_step(tokens: int) -> None:
        if tokens == 3:
            engine.close()
            if way == "raises":
                raise KeyboardInterrupt

    if way == "raises":
        with pytest.raises(KeyboardInterrupt):
            engine.generate(ids, max_new_tokens=12, on_step=on_step)
    else:
        run = engine.generate(ids, max_new_tokens=12, on_step=on_step)
        assert run.tokens == [row[:3] for row in expected] and any("cancelled" in note for note in run.notes)
    with pytest.raises(NotAttached):
        engine.generate(ids)
    assert plain_tokens(model, ids) == expected
    with prescope.attach(model, slots=5, **LINK) as again:
        assert again.generate(ids, max_new_tokens=12).tokens == expected


def test_close_in_another_thread_waits_for_the_run_and_gives_the_model_back(model):
    ids = prompt()
    expected = plain_tokens(model, ids)
    engine = prescope.attach(model, slots=5, **LINK)
    begun, seen = threading.Event(), {}

    def closer() -> None:
        begun.wait(20.0)
        engine.close()
        seen["is plain"] = not any("_prescope" in module.__dict__ for module in model.modules())

    thread = threading.Thread(target=closer)
    thread.start()
    run = engine.generate(
        ids, max_new_tokens=5000, on_step=lambda n: (begun.set(), time.sleep(0.005) if n > 2 else None)
    )
    thread.join(30.0)
    assert not thread.is_alive() and seen["is plain"]
    assert 2 <= len(run.tokens[0]) < 5000 and run.tokens[0][:12] == expected[0][: len(run.tokens[0])]
    assert plain_tokens(model, ids) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_that_uses_the_engine_gets_an_error():
    """Its threads stayed behind: formerly it waited for them for ever. The parent's engine goes on."""
    code = "from tests.support.forked_engine import main; main()"
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stdout + child.stderr[-3000:]
    assert issubclass(ForkedProcess, NotAttached)


@pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="no interval timer here to raise interrupts with"
)
@pytest.mark.parametrize("times", [12, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", ["on-demand", "presched"])
def test_after_any_interrupt_the_next_text_is_right(schedule, times):
    code = f"from tests.support.interrupted_calls import runs; runs({times}, {schedule!r})"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert child.returncode == 0, f"ended with {child.returncode}: {child.stderr[-3000:]}"
    assert f"{times} survived" in child.stdout


def test_host_memory_that_is_too_small_is_refused_before_anything_is_moved(model, monkeypatch):
    ids = prompt()
    expected = plain_tokens(model, ids)
    monkeypatch.setattr("prescope.weights.host_pool.available_memory_bytes", lambda: 1000)
    with pytest.raises(NotEnoughMemory, match=r"take .* of host memory.* 1000 B are free"):
        prescope.attach(model, slots=5, **LINK)
    assert plain_tokens(model, ids) == expected
    monkeypatch.undo()
    assert machine.available_memory_bytes() > 1 << 20


def test_new_slots_that_cannot_be_had_leave_the_former_ones(model, monkeypatch):
    """The estimate of free memory may be too high: then the allocation fails, when the former slots are gone."""
    ids = prompt()
    expected = plain_tokens(model, ids)
    with prescope.attach(model, slots=5, **LINK) as engine:
        allocate = engine._device.allocate_slots

        def refuse(num_slots: int, row_bytes: int):
            if num_slots > 5:
                raise SlotPoolTooLarge("no memory")
            return allocate(num_slots, row_bytes)

        monkeypatch.setattr(engine._device, "allocate_slots", refuse)
        with pytest.raises(SlotPoolTooLarge):
            engine.configure(slots=9)
        assert engine.num_slots == 5 and engine.describe()["num_slots"] == 5
        assert engine.generate(ids, max_new_tokens=12).tokens == expected
        engine.check_integrity()


@pytest.mark.parametrize(
    "settings", [{"assistant_early_exit": 1}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}]
)
def test_a_run_interrupted_in_any_forward_leaves_the_whole_model(model, settings):
    """transformers takes layers away while a draft is made, and an interrupt keeps it from giving them back."""
    ids, passes = prompt().clamp(min=1), 0
    expected = plain_tokens(model, ids)

    def interrupt(layer, args):
        nonlocal passes
        passes -= 1
        if not passes:
            raise KeyboardInterrupt

    model.model.layers[0].register_forward_pre_hook(interrupt)
    with prescope.attach(model, slots=6, **LINK) as engine:
        for at in range(1, 7):
            passes = at
            with pytest.raises(KeyboardInterrupt):
                engine.generate(ids, max_new_tokens=8, **settings)
            passes = 0
            assert engine.generate(ids, max_new_tokens=12).tokens == expected
            assert plain_tokens(model, ids) == expected


CHANGES = {
    "more slots": lambda engine: engine.configure(slots=9),
    "another cache": lambda engine: engine.configure(cache="lfu"),
    "another schedule": lambda engine: engine.configure(schedule="fiddler", cpu_threads=0),
    "empty slots": lambda engine: engine.clear_cache(),
    "a forward": lambda engine: engine.model(prompt()),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(TimeoutError, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_interrupted_at_any_line_leaves_an_engine_that_works(model, change, error):
    """Formerly it could be left without slots, or with slots for which no copy came any more."""
    ids = prompt()
    expected = plain_tokens(model, ids, 4)
    settings = {
        "slots": 6, "device": "null", "schedule": "static-split", "cpu_threads": 0,
        "frequencies": np.arange(LAYERS * EXPERTS).reshape(LAYERS, EXPERTS),
        "costs": LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=200.0, source="made up for a test"),
    }  # fmt: skip
    with prescope.attach(model, **settings) as engine, interrupted(set(), ENGINE_FILES) as lines:
        CHANGES[change](engine)
    raised = []
    for at in range(1, lines[0], max(1, lines[0] // 8)):
        with prescope.attach(model, **settings) as engine:
            raised.append(is_interrupted({at}, lambda one=engine: CHANGES[change](one), error, ENGINE_FILES))
            assert engine.generate(ids, max_new_tokens=4).tokens == expected
            engine.check_integrity()
    assert sum(raised) > 0.8 * len(raised) > 3
    assert plain_tokens(model, ids, 4) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_closing_interrupted_at_any_line_gives_the_model_back_at_the_next_call(model, error):
    """Formerly an interrupt before the last step was prepared had the other steps done, and that one never."""
    ids = prompt()
    expected = plain_tokens(model, ids, 4)
    with interrupted(set(), ENGINE_FILES) as lines:
        prescope.attach(model, slots=6, device="null").close()
    whole = lines[0]
    engine = prescope.attach(model, slots=6, device="null")
    with interrupted(set(), ENGINE_FILES) as lines:
        engine.close()
    assert 20 < lines[0] < whole
    for at in range(1, lines[0]):
        engine = prescope.attach(model, slots=6, device="null")
        is_interrupted({at}, engine.close, error, ENGINE_FILES)
        engine.close()
        assert not any("_prescope" in module.__dict__ for module in model.modules())
        assert all(parameter.data.abs().sum() > 0 for parameter in model.parameters())
    assert plain_tokens(model, ids, 4) == expected


def test_a_recording_that_an_interrupt_left_open_is_ended_by_recover(model):
    """Ctrl-C between a `with` and its block: Python then does not come to the block's end."""
    ids = prompt()
    expected = plain_tokens(model, ids, 4)
    with prescope.attach(model, slots=6, **LINK) as engine:
        left_open = engine.record()
        left_open.__enter__()
        for use in (lambda: engine.generate(ids, max_new_tokens=4), lambda: engine.configure(slots=7)):
            with pytest.raises(UnsupportedOption, match=r"recover\(\)"):
                use()
        engine.recover()
        engine.configure(slots=7)
        run = engine.generate(ids, max_new_tokens=4, on_step=lambda n: engine.recover())
        assert run.tokens == expected and len(run.steps) == 4
        del left_open

"""An engine with all its threads, used in a process that was forked meanwhile; run in a process of its own."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import prescope
from prescope.device import EmulatedLinkDevice
from prescope.errors import ForkedProcess
from prescope.scheduler.costs import LayerCosts
from tests.support.models import plain_tokens, prompt, tiny_moe

#: By which about half of the experts are computed on the CPU.
COSTS = LayerCosts(
    link_us=100.0, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, 80.0, 120.0), source="made up for a test"
)


def as_current_of(owner: int) -> Callable[[EmulatedLinkDevice], AbstractContextManager[None]]:
    """What a GPU does in a process that was forked from the one that opened it."""

    def as_current(device: EmulatedLinkDevice) -> AbstractContextManager[None]:
        if os.getpid() != owner:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        return nullcontext()

    return as_current


def recorded(engine: prescope.Engine) -> None:
    """A forward in a recording."""
    with engine.record():
        plain_tokens(engine.model, prompt(), new=1)


def child(engine: prescope.Engine) -> int:
    """How many of the uses did not end in the error, at once."""
    schedule_runner = engine.runner.schedule_runner
    uses = [
        lambda: engine.generate(prompt(), max_new_tokens=4),
        lambda: plain_tokens(engine.model, prompt(), new=4),
        lambda: recorded(engine),
        engine.check_integrity,
        engine.recover,
        engine.clear_cache,
        lambda: engine.force_routing(None),
        lambda: engine.configure(slots=4),
        engine.close,
        lambda: schedule_runner.cpu.awake().__enter__(),
        lambda: engine._device.synchronize(),
    ]
    wrong = 0
    for number, use in enumerate(uses):
        started = time.perf_counter()
        try:
            use()
        except ForkedProcess as error:
            wrong += "spawn" not in str(error) or time.perf_counter() - started > 2.0
        else:
            may_pass = number == len(uses) - 2  # without cores to spare nothing is kept awake
            wrong += not may_pass
            print("no error by use", number) if not may_pass else None
    return wrong


def main() -> None:
    EmulatedLinkDevice.as_current = as_current_of(os.getpid())
    model, ids = tiny_moe(), prompt()
    expected = plain_tokens(model, ids)
    with prescope.attach(
        model, slots=5, device="cpu", link_gb_per_s=50.0, schedule="presched", costs=COSTS, cpu_threads=1
    ) as engine:
        assert engine.generate(ids, max_new_tokens=12).tokens == expected
        engine.clear_cache()
        pid = os.fork()
        if pid == 0:
            signal.alarm(
                60
            )  # ends a child that hangs; faulthandler's watchdog is a thread, and stayed behind
            wrong = child(engine)
            sys.stdout.flush()
            if wrong == 0:
                sys.exit(0)  # the ordinary way out: through `__exit__`, finalizers and joins
            os._exit(wrong)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 0, f"{code} uses went wrong in the child"
        assert engine.generate(ids, max_new_tokens=12).tokens == expected
        engine.check_integrity()
    assert plain_tokens(model, ids) == expected

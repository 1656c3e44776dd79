"""A GPU for machines without one: Triton's interpreter runs a captured step in a thread beside the host."""

import ctypes
import queue
import random
import threading
import time
from functools import cache

import numba
import numpy as np
import torch
from triton.runtime import interpreter

from prescope.core.jit import IS_COMPILED
from prescope.core.native import address_of, call, clock_address
from prescope.device import LinkFunctions
from prescope.device.emulated import EmulatedLinkDevice

_int64 = ctypes.c_int64


def _restore(executor, args_dev, args_hst, kwargs, kwargs_hst) -> None:
    """Nothing: the arguments lie where the kernel has worked. The interpreter copies each of them onto itself, and
    what the host had written meanwhile would be lost.
    """
    for tensor in (*args_dev, *kwargs.values()):
        assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "cpu"


interpreter.GridExecutor._restore_args_dev = _restore


@ctypes.CFUNCTYPE(_int64, _int64, _int64, _int64, _int64)
def _memcpy(target: int, source: int, nbytes: int, stream: int) -> int:
    ctypes.memmove(target, source, nbytes)
    return 0


@ctypes.CFUNCTYPE(_int64, _int64, _int64)
def _create_event(place: int, flags: int) -> int:
    _int64.from_address(place).value = 1
    return 0


@ctypes.CFUNCTYPE(_int64, _int64, _int64)
def _record_event(event: int, stream: int) -> int:
    return 0


@ctypes.CFUNCTYPE(_int64, _int64)
def _query_event(event: int) -> int:
    return 0


#: How long the host sleeps between two looks for a message, and its address as a `timespec`. It would spin beside a
#: real GPU; beside an interpreted one it takes the interpreter's time, and another test's core.
LOOK_NS = 200_000
_LOOK = np.array([0, LOOK_NS])
_LOOK_AT, _NANOSLEEP, _CLOCK = _LOOK.ctypes.data, address_of(ctypes.CDLL(None).nanosleep), clock_address()


@cache
def sleepy_clock_address() -> int:
    """`clock_address` of a clock that sleeps at each look."""
    if not IS_COMPILED:
        return clock_address()

    @numba.cfunc("int64(int64, int64)")
    def look(kind, words):
        call(_NANOSLEEP, (_LOOK_AT, 0))
        return call(_CLOCK, (kind, words))

    return look.address


class LateLink:
    """A link that copies in order, some time after it was told to, as a copy engine does.

    Args:
        most_s: longest delay of a copy; how long each takes is drawn.
    """

    NOT_READY = 600

    def __init__(self, seed: int, most_s: float = 4e-3) -> None:
        self._draw, self._most_s = random.Random(seed), most_s
        self._jobs: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self.issued = self.done = self.asked_too_early = 0
        self._marks: dict[int, int] = {}
        kinds = [(_int64,) * 4, (_int64,) * 2, (_int64,) * 2, (_int64,)]
        calls = [self._memcpy, self._create_event, self._record_event, self._query_event]
        self._calls = [ctypes.CFUNCTYPE(_int64, *kind)(call) for kind, call in zip(kinds, calls, strict=True)]
        self.functions = LinkFunctions(*map(address_of, self._calls), stream=0, repeats=1)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            time.sleep(self._draw.random() * self._most_s)
            ctypes.memmove(*job)
            self.done += 1

    def _memcpy(self, target: int, source: int, nbytes: int, stream: int) -> int:
        self.issued += 1
        self._jobs.put((target, source, nbytes))
        return 0

    def _create_event(self, place: int, flags: int) -> int:
        _int64.from_address(place).value = len(self._marks) + 1
        self._marks[len(self._marks) + 1] = 0
        return 0

    def _record_event(self, event: int, stream: int) -> int:
        self._marks[event] = self.issued
        return 0

    def _query_event(self, event: int) -> int:
        is_early = self.done < self._marks[event]
        self.asked_too_early += is_early
        return self.NOT_READY if is_early else 0

    def drain(self) -> None:
        while self.done < self.issued:
            time.sleep(1e-3)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()


class _Events:
    def __init__(self) -> None:
        self.handles = np.zeros(0, dtype=np.int64)

    def reserve(self, count: int) -> None:
        self.handles = np.concatenate([self.handles, np.zeros(max(0, count - len(self.handles)), np.int64)])


class InterpretedGpu(EmulatedLinkDevice):
    """The CPU device with "graphs": launches taken down as a function, replayed in a thread, one after the other."""

    kind = "cuda"
    captures_steps = small_copies_are_slow = True

    def __init__(self, late: LateLink | None = None) -> None:
        super().__init__(50.0)
        self.late = late
        self.thread = threading.Thread(target=lambda: None)
        self.thread.start()
        self.error: BaseException | None = None

    def capture(self, run, shares_memory=False):
        result = torch.empty(0)

        def replay() -> None:
            former = self.thread

            def work() -> None:
                former.join()
                try:
                    with torch.no_grad():
                        value = run()
                        result.resize_(value.shape).copy_(value)
                except BaseException as error:  # noqa: BLE001 - shown by the test that waits
                    self.error = error

            self.thread = threading.Thread(target=work)
            self.thread.start()

        return replay, result

    def link_functions(self) -> LinkFunctions:
        if self.late is not None:
            return self.late.functions
        functions = map(address_of, (_memcpy, _create_event, _record_event, _query_event))
        return LinkFunctions(*functions, stream=0, repeats=1)

    def open_events(self, timed: bool) -> _Events:
        assert not timed, "nothing here keeps the time of compiled code's copies"
        return _Events()

    def graph_mark(self):
        return self.mark(True)

    def read(self, tensor):
        self.thread.join()
        return super().read(tensor)

    def clock(self, stamp):
        return self.mark(True), 0

    def is_idle(self) -> bool:
        self.thread.join(LOOK_NS / 1e9)
        return not self.thread.is_alive()

    def synchronize(self) -> None:
        self.thread.join()
        if self.late is not None:
            self.late.drain()
        super().synchronize()

    def recover(self) -> None:
        self.thread.join()
        super().recover()

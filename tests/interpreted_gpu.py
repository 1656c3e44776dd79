"""A GPU for machines without one: Triton's interpreter runs a captured step in a thread beside the host."""

import ctypes
import threading

import numpy as np
import torch
from triton.runtime import interpreter

from prescope.device import LinkFunctions
from prescope.device.emulated import EmulatedLinkDevice
from prescope.raw import address_of

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


class _Events:
    def __init__(self) -> None:
        self.handles = np.zeros(0, dtype=np.int64)

    def reserve(self, count: int) -> None:
        self.handles = np.concatenate([self.handles, np.zeros(max(0, count - len(self.handles)), np.int64)])


class InterpretedGpu(EmulatedLinkDevice):
    """The CPU device with "graphs": launches taken down as a function, replayed in a thread, one after the other."""

    kind = "cuda"

    def __init__(self) -> None:
        super().__init__(50.0)
        self.thread = threading.Thread(target=lambda: None)
        self.thread.start()
        self.error: BaseException | None = None

    def copy(self, *arguments, **keywords):
        # The interpreter copies every argument onto itself behind a kernel: bytes that arrive meanwhile would be lost.
        issued = super().copy(*arguments, **keywords)
        self._drain()
        return issued

    def capture(self, run):
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
        functions = map(address_of, (_memcpy, _create_event, _record_event, _query_event))
        return LinkFunctions(*functions, stream=0, repeats=1)

    def open_events(self, timed: bool) -> _Events:
        assert not timed, "nothing here keeps the time of compiled code's copies"
        return _Events()

    def clock(self, stamp):
        return self.mark(True), 0

    def is_idle(self) -> bool:
        return not self.thread.is_alive()

    def synchronize(self) -> None:
        self.thread.join()
        super().synchronize()

    def recover(self) -> None:
        self.thread.join()
        super().recover()

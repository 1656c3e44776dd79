"""A GPU for machines without one: Triton's interpreter runs a captured step in a thread beside the host."""

import threading

import torch

from prescope.device.emulated import EmulatedLinkDevice


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

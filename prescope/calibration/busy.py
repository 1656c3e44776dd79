"""Keep one lane at work while another is measured."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..core.worker import Latch, Worker
from ..device import Device, Mark

#: Batches of copies given to the link at a time; one is on the wire while the other waits.
BATCHES_AHEAD = 2
POLL_S = 1e-4


@contextmanager
def repeating(run: Callable[[], None]) -> Iterator[None]:
    """Call `run` over and over in a thread of its own, from the first one's end until the block is left.

    Raises:
        WaitTimedOut: a call took longer than a minute.
        Exception: whatever a call raised, when the block is left.
    """
    is_over, begun = False, Latch()
    failures: list[BaseException] = []

    def loop() -> None:
        try:
            while not is_over:
                run()
                if not begun.is_set:
                    begun.set()
        except Exception as error:  # noqa: BLE001 - raised in the thread that waits for it
            failures.append(error)
        finally:
            if not begun.is_set:
                begun.set()

    worker = Worker("prescope-calibration")
    worker.submit(loop)
    try:
        worker.wait(begun, "the first round of work that keeps the other lane busy")
        yield
    finally:
        is_over = True
        worker.close("the last round of work that kept the other lane busy")
    if failures:
        raise failures[0]


def copying(device: Device, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
    """A step for `repeating` that keeps the link busy with copies of `pairs`; the host only looks after it."""
    on_wire: deque[Mark] = deque()
    # A thread of CUDA needs its context before the driver is called past torch; torch makes it with the first tensor.
    made_in: set[int] = set()

    def step() -> None:
        with device.as_current():
            if threading.get_ident() not in made_in:
                torch.zeros(1, dtype=torch.float32, device=device.torch_device)
                made_in.add(threading.get_ident())
            look_after()

    def look_after() -> None:
        while on_wire and device.is_done(on_wire[0]):
            on_wire.popleft()
        if len(on_wire) < BATCHES_AHEAD:
            _, ready = device.copy(pairs, [], timed=False, each=False)
            on_wire.append(ready[-1])
        else:
            time.sleep(POLL_S)

    return step

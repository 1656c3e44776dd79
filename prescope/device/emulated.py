"""The CPU with an emulated link: a real copy in a thread, paced to a bandwidth, so that everything runs on a laptop.

The CPU stands in for the GPU: compute is synchronous, a mark on the compute lane is the host's clock, and waiting for
a copy blocks. What it shows are the *relations* (what waits for what, what a miss costs at that bandwidth); its
times are those of an emulation and are labelled so everywhere.
"""

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray

from ..core.machine import available_memory_bytes
from ..errors import TransferFailed
from .base import WithoutGraphs

#: Emulated link when the user names none: one expert takes a millisecond, so that, as on a real machine, moving an
#: expert takes longer than computing with it; at most PCIe 4 x16.
EMULATED_EXPERT_US = 1000.0
EMULATED_MOST_GB_PER_S = 26.0


def emulated_link_gb_per_s(row_bytes: int) -> float:
    """Bandwidth of the emulated link for experts of `row_bytes`, when the user names none; two digits."""
    return float(f"{min(EMULATED_MOST_GB_PER_S, row_bytes / EMULATED_EXPERT_US / 1e3):.2g}")


class HostMark:
    """A mark whose time is the host's clock; set by the lane that reaches it."""

    __slots__ = ("_event", "error", "time_us")

    def __init__(self, time_us: float | None = None) -> None:
        self.time_us = time_us
        self.error: BaseException | None = None
        self._event = None if time_us is not None else threading.Event()

    def set(self, time_us: float) -> None:
        self.time_us = time_us
        if self._event is not None:
            self._event.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.set(_now_us())

    @property
    def done(self) -> bool:
        return self._event is None or self._event.is_set()

    def wait(self) -> None:
        if self._event is not None:
            self._event.wait()


class _Job(NamedTuple):
    slot: torch.Tensor
    row: torch.Tensor
    start: HostMark | None
    ready: HostMark


class EmulatedLinkDevice(WithoutGraphs):
    """The CPU as compute device behind a link of `gb_per_s` GB/s.

    Args:
        gb_per_s: bandwidth of the link; a transfer never ends earlier than bytes / bandwidth after its start.
    """

    kind = "cpu"
    captures_steps = small_copies_are_slow = False

    def __init__(self, gb_per_s: float) -> None:
        self.torch_device = torch.device("cpu")
        self._bytes_per_us = gb_per_s * 1e3
        self._gb_per_s = gb_per_s
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prescope-h2d", daemon=True)
        self._thread.start()

    def describe(self) -> dict[str, Any]:
        return {
            "device": "CPU (standing in for the GPU)",
            "link": "emulated",
            "link_gb_per_s": self._gb_per_s,
            "label": f"emulated link of {self._gb_per_s:g} GB/s, CPU standing in for the GPU",
        }

    def free_bytes(self) -> int:
        return available_memory_bytes()

    def allocate_slots(self, num_slots: int, row_bytes: int) -> torch.Tensor:
        return torch.empty((num_slots, row_bytes), dtype=torch.uint8)

    def pin(self, row: torch.Tensor) -> bool:
        return False

    def unpin(self, row: torch.Tensor) -> None:
        pass

    def copy(
        self,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        after: Sequence[HostMark],
        timed: bool,
        each: bool = True,
    ) -> tuple[HostMark, list[HostMark]]:
        self._raise_failure()
        # Marks of the compute lane have passed when they are made: compute is synchronous here.
        assert all(mark.done for mark in after), "a compute mark of the CPU is pending"
        start = HostMark()
        ready = []
        for i, (slot, row) in enumerate(pairs):
            job = _Job(slot, row, start if i == 0 else None, HostMark())
            ready.append(job.ready)
            self._jobs.put(job)
        return start, ready

    def _run(self) -> None:
        free_at_us = 0.0
        while (job := self._jobs.get()) is not None:
            now = _now_us()
            # Sleeping overshoots by some 60 us, so the link keeps its own clock: a transfer that follows at once
            # starts where the last one should have ended.
            start_us = max(now, free_at_us) if now - free_at_us > 200.0 else free_at_us
            if job.start is not None:
                job.start.set(start_us)
            try:
                job.slot.copy_(job.row)
            except Exception as error:  # noqa: BLE001 - handed to whoever waits for this copy, see `wait` and `copy`
                self._failure = error
                job.ready.fail(error)
                continue
            free_at_us = start_us + job.row.nbytes / self._bytes_per_us
            if (left_us := free_at_us - _now_us()) > 0:
                time.sleep(left_us / 1e6)
            job.ready.set(max(free_at_us, _now_us()))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise TransferFailed(f"the transfer thread failed: {self._failure}") from self._failure

    def mark(self, timed: bool) -> HostMark:
        return HostMark(_now_us())

    def wait(self, mark: HostMark) -> None:
        mark.wait()
        self._raise_failure()

    def is_done(self, mark: HostMark) -> bool:
        if mark.error is not None:
            self._raise_failure()
        return mark.done

    def elapsed_us(self, start: HostMark, end: HostMark) -> float:
        assert start.time_us is not None and end.time_us is not None, "a mark has not passed"
        return end.time_us - start.time_us

    def read(self, tensor: torch.Tensor) -> NDArray[Any]:
        return tensor.numpy()

    def synchronize(self) -> None:
        self._drain()
        self._raise_failure()

    def recover(self) -> None:
        self._drain()
        self._failure = None

    def _drain(self) -> None:
        # An empty copy behind all others: when it is ready, everything before it is.
        nothing = torch.empty(0, dtype=torch.uint8)
        last = _Job(nothing, nothing, None, HostMark())
        self._jobs.put(last)
        last.ready.wait()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()


def _now_us() -> float:
    return time.perf_counter() * 1e6

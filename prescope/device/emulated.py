"""The CPU with an emulated link: a real copy in a thread, paced to a bandwidth, so that everything runs on a laptop.

The CPU stands in for the GPU: compute is synchronous, a mark on the compute lane is the host's clock, and waiting for
a copy blocks. What it shows are the *relations* (what waits for what, what a miss costs at that bandwidth); its
times are those of an emulation and are labelled so everywhere.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..core.machine import CPU_DEVICE, available_memory_bytes
from ..core.units import format_bytes
from ..core.worker import Latch, Worker
from ..errors import NotAttached, SlotPoolTooLarge, TransferFailed
from .base import OnCpu

#: Emulated link when the user names none: one expert takes a millisecond, so that, as on a real machine, moving an
#: expert takes longer than computing with it; at most PCIe 4 x16.
EMULATED_EXPERT_US = 1000.0
EMULATED_MOST_GB_PER_S = 26.0


def emulated_link_gb_per_s(row_bytes: int) -> float:
    """Bandwidth of the emulated link for experts of `row_bytes`, when the user names none; two digits."""
    return float(f"{min(EMULATED_MOST_GB_PER_S, row_bytes / EMULATED_EXPERT_US / 1e3):.2g}")


class HostMark(Latch):
    """A mark whose time is the host's clock; set by the lane that reaches it."""

    __slots__ = ("error", "time_us")

    def __init__(self) -> None:
        super().__init__()
        self.time_us = 0.0
        self.error: BaseException | None = None

    def reach(self, time_us: float) -> None:
        self.time_us = time_us
        self.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.reach(_now_us())


class PassedMark(HostMark):
    """A mark of the compute lane, which has passed when it is made: compute is synchronous here."""

    __slots__ = ()

    def __init__(self) -> None:
        self.time_us = _now_us()
        self.error = None
        self._is_set = True


class EmulatedLinkDevice(OnCpu):
    """The CPU as compute device behind a link of `gb_per_s` GB/s.

    Args:
        gb_per_s: bandwidth of the link; a transfer never ends earlier than bytes / bandwidth after its start.
    """

    kind = "cpu"

    def __init__(self, gb_per_s: float) -> None:
        self.torch_device = torch.device("cpu")
        self._bytes_per_us = gb_per_s * 1e3
        self._gb_per_s = gb_per_s
        self._failure: BaseException | None = None
        self._is_closed = False
        self._free_at_us = 0.0  # the link's own clock, of the thread
        self._due_us = 0.0  # when the link will have carried all that was handed to it
        self._link = Worker("prescope-h2d")

    def describe(self) -> dict[str, Any]:
        return {
            "device": CPU_DEVICE,
            "link": "emulated",
            "link_gb_per_s": self._gb_per_s,
            "label": f"emulated link of {self._gb_per_s:g} GB/s, CPU standing in for the GPU",
        }

    def free_bytes(self) -> int:
        return available_memory_bytes()

    def allocate_slots(self, num_slots: int, row_bytes: int) -> torch.Tensor:
        try:
            return torch.empty((num_slots, row_bytes), dtype=torch.uint8, device="cpu")
        except RuntimeError as error:  # what torch's CPU allocator raises
            raise SlotPoolTooLarge(
                f"{num_slots} slots of {format_bytes(row_bytes)} do not fit into host memory, of which "
                f"{format_bytes(self.free_bytes())} are free; use fewer slots"
            ) from error

    def copy(
        self,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        after: Sequence[HostMark],
        timed: bool,
        each: bool = True,
    ) -> tuple[HostMark, list[HostMark]]:
        self._raise_failure()
        assert all(mark.is_set for mark in after), "a compute mark of the CPU is pending"
        start = HostMark()
        ready = []
        for i, (slot, row) in enumerate(pairs):
            mark = HostMark()
            ready.append(mark)
            self._due_us = max(self._due_us, _now_us()) + row.nbytes / self._bytes_per_us
            self._link.submit(partial(self._carry, slot, row, start if i == 0 else None, mark))
        return start, ready

    def _carry(self, slot: torch.Tensor, row: torch.Tensor, start: HostMark | None, ready: HostMark) -> None:
        """In the link's thread."""
        now = _now_us()
        # Sleeping overshoots by some 60 us, so the link keeps its own clock: a transfer that follows at once
        # starts where the last one should have ended.
        start_us = max(now, self._free_at_us) if now - self._free_at_us > 200.0 else self._free_at_us
        if start is not None:
            start.reach(start_us)
        try:
            if self._is_closed:
                raise NotAttached("the device was closed before this copy began")
            slot.copy_(row)
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for this copy, see `wait` and `copy`
            self._failure = error
            ready.fail(error)
            return
        self._free_at_us = start_us + row.nbytes / self._bytes_per_us
        if (left_us := self._free_at_us - _now_us()) > 0:
            time.sleep(left_us / 1e6)
        ready.reach(max(self._free_at_us, _now_us()))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise TransferFailed(f"the transfer thread failed: {self._failure}") from self._failure

    def _work_s(self) -> float:
        """What the link still has to carry."""
        return max(0.0, self._due_us - _now_us()) / 1e6

    def mark(self, timed: bool) -> HostMark:
        return PassedMark()

    def wait(self, mark: HostMark) -> None:
        self._link.wait(mark, "the copy of an expert to its slot", self._work_s())
        self._raise_failure()

    def is_done(self, mark: HostMark) -> bool:
        if mark.error is not None:
            self._raise_failure()
        return mark.is_set

    def elapsed_us(self, start: HostMark, end: HostMark) -> float:
        assert start.is_set and end.is_set, "a mark has not passed"
        return end.time_us - start.time_us

    def synchronize(self) -> None:
        self._drain()
        self._raise_failure()

    def recover(self) -> None:
        self._drain()
        self._failure = None

    def _drain(self) -> None:
        self._link.drain("the end of all copies on the emulated link", self._work_s())

    def close(self) -> None:
        work_s = self._work_s()
        self._is_closed = True  # copies that have not begun are dropped
        self._link.close("the end of the emulated link", work_s)


def _now_us() -> float:
    return time.perf_counter() * 1e6

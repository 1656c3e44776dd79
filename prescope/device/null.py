"""A device with a virtual clock that completes copies in any order the protocol allows. For tests.

Compute runs on the CPU, but time is counted, not measured: every compute mark takes `compute_us`, every copy takes
bytes / bandwidth on a serial link. A pending copy poisons its slot at once and lands at a random later moment, at the
latest when somebody waits for it: whoever reads a slot without waiting, or gives away one still in use, gets NaN.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

from .base import OnCpu

POISON = 0xFF  # all bits set is NaN in every float format


class VirtualMark:
    """A mark with a virtual time; pending while its copy has not landed."""

    __slots__ = ("pending", "time_us")

    def __init__(self, time_us: float, pending: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        self.time_us = time_us
        self.pending = pending


class NullDevice(OnCpu):
    """Virtual clock; `seed` decides the order in which copies land."""

    kind = "null"

    def __init__(self, gb_per_s: float = 10.0, compute_us: float = 50.0, seed: int = 0) -> None:
        self.torch_device = torch.device("cpu")
        self.now_us = 0.0
        self._link_free_us = 0.0
        self._gb_per_s = gb_per_s
        self._compute_us = compute_us
        self._random = random.Random(seed)
        self._in_flight: list[VirtualMark] = []

    def describe(self) -> dict[str, Any]:
        return {
            "device": "null device",
            "link": "virtual",
            "link_gb_per_s": self._gb_per_s,
            "label": "virtual clock (null device)",
        }

    def free_bytes(self) -> int:
        return 1 << 40

    def allocate_slots(self, num_slots: int, row_bytes: int) -> torch.Tensor:
        return torch.full((num_slots, row_bytes), POISON, dtype=torch.uint8, device="cpu")

    def copy(
        self,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        after: Sequence[VirtualMark],
        timed: bool,
        each: bool = True,
    ) -> tuple[VirtualMark, list[VirtualMark]]:
        earliest = max([self.now_us, self._link_free_us, *(mark.time_us for mark in after)])
        start = VirtualMark(earliest)
        ready = []
        for slot, row in pairs:
            earliest += row.nbytes / (self._gb_per_s * 1e3)
            slot.fill_(POISON)
            ready.append(VirtualMark(earliest, (slot, row)))
        self._link_free_us = earliest
        self._in_flight.extend(ready)
        self._land_some()
        return start, ready

    def _land_some(self) -> None:
        for mark in self._random.sample(self._in_flight, self._random.randint(0, len(self._in_flight))):
            self._land(mark)

    def _land(self, mark: VirtualMark) -> None:
        if mark.pending is not None:
            slot, row = mark.pending
            slot.copy_(row)
            mark.pending = None
            self._in_flight.remove(mark)

    def mark(self, timed: bool) -> VirtualMark:
        self.now_us += self._compute_us
        return VirtualMark(self.now_us)

    def wait(self, mark: VirtualMark) -> None:
        self._land(mark)
        self._land_some()
        self.now_us = max(self.now_us, mark.time_us)

    def is_done(self, mark: VirtualMark) -> bool:
        return mark.pending is None and mark.time_us <= self.now_us

    def elapsed_us(self, start: VirtualMark, end: VirtualMark) -> float:
        return end.time_us - start.time_us

    def synchronize(self) -> None:
        for mark in list(self._in_flight):
            self._land(mark)
        self.now_us = max(self.now_us, self._link_free_us)

    def recover(self) -> None:
        self.synchronize()

    def close(self) -> None:
        self.synchronize()

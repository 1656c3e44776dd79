"""Move experts from host rows into slots, with a ready and a released mark per slot.

`ready` is passed once the bytes are in the slot: the compute lane waits for it. `released` is passed once the last
use of the slot is over: the H2D lane waits for it before overwriting. The host waits for neither (on CUDA).
"""

from typing import NamedTuple

import numpy as np
import torch

from .core import Reason
from .device import Device, Mark
from .host_pool import HostPool
from .residency import IntArray, ResidencyTable


class Transfer(NamedTuple):
    """One expert's copy, for the event table."""

    moe_layer: int
    expert: int
    reason: Reason
    nbytes: int
    start: Mark
    end: Mark


class Loader:
    """Issues copies and keeps the marks of each slot.

    Args:
        device: its H2D lane does the copying.
        host: where experts come from.
        residency: told which slots are in flight and which have landed.
        row_bytes: bytes of a slot, the largest row of all layers.
    """

    def __init__(self, device: Device, host: HostPool, residency: ResidencyTable, row_bytes: int) -> None:
        self._device = device
        self._host = host
        self._residency = residency
        self.pool = device.allocate_slots(residency.num_slots, row_bytes)
        # Arrays of marks or None, so that a layer's slots are looked up and set in one step.
        self._ready = np.full(residency.num_slots, None, dtype=object)
        self._released = np.full(residency.num_slots, None, dtype=object)

    def load(
        self, moe_layer: int, experts: IntArray, slots: IntArray, reason: Reason, timed: bool
    ) -> list[Transfer]:
        """Issue the copies of `experts` (n,) into `slots` (n,), which `ResidencyTable.take` gave them."""
        nbytes = self._host.layers[moe_layer].layout.row_bytes
        pairs, after = [], {}
        for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
            pairs.append((self.pool[slot, :nbytes], self._host.row(moe_layer, expert)))
            released = self._released[slot]
            if released is not None:
                after[id(released)] = (
                    released  # many slots share one mark: a layer releases all of its own at once
                )
                self._released[slot] = None
        start, ready = self._device.copy(pairs, list(after.values()), timed)
        transfers = []
        for expert, slot, mark in zip(experts.tolist(), slots.tolist(), ready, strict=True):
            self._ready[slot] = mark
            transfers.append(Transfer(moe_layer, expert, reason, nbytes, start, mark))
            start = mark
        return transfers

    def wait(self, slots: IntArray) -> bool:
        """The compute lane waits until the bytes of `slots` (n,) are there; returns whether it had to be told to."""
        pending = [ready for ready in self._ready[slots] if ready is not None]
        if not pending:
            return False
        for ready in pending:
            self._device.wait(ready)
        # Everything the compute lane does from here on comes after these copies.
        self._ready[slots] = None
        self._residency.landed(slots)
        return True

    def poll(self) -> None:
        """Find out which copies in flight have completed meanwhile, so that needing them counts as a hit."""
        in_flight = np.flatnonzero(self._residency.in_flight)
        landed = [slot for slot in in_flight.tolist() if self._is_landed(slot)]
        if landed:
            self._residency.landed(np.asarray(landed))

    def _is_landed(self, slot: int) -> bool:
        ready = self._ready[slot]
        return ready is None or self._device.is_done(ready)

    def release(self, slots: IntArray, mark: Mark) -> None:
        """The last use of `slots` (n,) is over at `mark`."""
        self._released[slots] = mark

    def clear(self) -> None:
        """Forget all marks; both lanes must be idle."""
        self._ready[:] = None
        self._released[:] = None

    def close(self) -> None:
        """Give the slots back."""
        self.pool = torch.empty(0, dtype=torch.uint8)

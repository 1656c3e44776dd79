"""Move experts from host rows into slots, with a ready and a released mark per slot.

The compute lane waits for the ready mark: behind it the bytes are in the slot. The H2D lane waits for the released mark
before it overwrites a slot: behind it the last use is over. The host waits for neither (on CUDA).

One queue with two levels. What a layer needs now is issued at once (`load`). Prefetches wait on the host, without a
slot (`cache.prefetch`), and are given to the H2D lane only while few of them are on it (`pump`): a copy on the link
cannot be overtaken, so this bounds what is ahead of the next on-demand copy, and one not yet issued costs nothing to
drop.
"""

from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from ..cache.prefetch import NUM_WAITING, Waiting, most_on_wire, want
from ..cache.residency import ResidencyTable
from ..core.types import IntArray, Reason
from ..device import Device, Mark
from .host_pool import HostPool
from .layout import Run, adjacent_runs

#: Copies below this are joined where rows and slots allow: PCIe 5 gave 53 GB/s at 4 MiB, 48 at 1 MiB, 30 at 256 KiB.
MIN_COPY_BYTES = 4 << 20


class Transfer(NamedTuple):
    """One expert's copy, for the event table."""

    moe_layer: int
    expert: int
    reason: Reason
    nbytes: int
    start: Mark
    end: Mark


class OnWire(NamedTuple):
    """A prefetch that was issued and is not known to be complete."""

    ready: Mark
    slots: IntArray


class Loader:
    """Issues copies and keeps the marks of each slot.

    Args:
        device: its H2D lane does the copying.
        host: where experts come from.
        residency: told which slots are in flight and which have landed.
        row_bytes: bytes of a slot, the largest row of all layers.
        pool: memory of the slots that was there before; by default the device gives it.

    Attributes:
        pool: (S, row_bytes) of uint8, the slots.
        most_on_wire: prefetches on the link at most, since an on-demand copy waits for them (`prefetch.most_on_wire`).
    """

    def __init__(
        self,
        device: Device,
        host: HostPool,
        residency: ResidencyTable,
        row_bytes: int,
        pool: torch.Tensor | None = None,
    ) -> None:
        self._device = device
        self._host = host
        self._residency = residency
        self.pool = device.allocate_slots(residency.num_slots, row_bytes) if pool is None else pool
        self._slot_views = list(self.pool.unbind(0))
        # Arrays of marks or None, so that a layer's slots are looked up and set in one step.
        self._ready = np.full(residency.num_slots, None, dtype=object)
        self._released = np.full(residency.num_slots, None, dtype=object)
        self._waiting = Waiting.none(residency.shape.total_experts)
        self._why = Reason.PREFETCH
        self.most_on_wire = most_on_wire(row_bytes, residency.num_slots)
        self._on_wire: list[OnWire] = []

    # -- copies ------------------------------------------------------------------------------------------------

    def load(
        self, moe_layer: int, experts: IntArray, slots: IntArray, reason: Reason, timed: bool
    ) -> list[Transfer]:
        """Issue the copies of `experts` (n,) into `slots` (n,), which the residency table gave them, at once.

        Prefetches of them that still wait come to nothing: each expert is copied once.
        """
        nbytes = self._host.layers[moe_layer].layout.row_bytes
        # Many slots share one mark: a layer releases all of its own at once.
        after = {id(mark): mark for mark in self._released[slots] if mark is not None}
        self._released[slots] = None
        # Joined prefetches land together: where small copies have the link's rate that is later than need be.
        is_small = self._device.small_copies_are_slow and nbytes < MIN_COPY_BYTES
        joinable = is_small and nbytes == self.pool.shape[1]
        most = -(-MIN_COPY_BYTES // nbytes) if joinable else 1
        runs = adjacent_runs(experts.tolist(), slots.tolist(), most)
        pairs = [self._pair(moe_layer, run, nbytes) for run in runs]
        # A layer waits for all that it loads on demand: such copies need no marks of their own, two calls less.
        each = timed or reason is not Reason.ON_DEMAND
        start, ready = self._device.copy(pairs, list(after.values()), timed, each)
        transfers = []
        for run, mark in zip(runs, ready, strict=True):
            self._ready[run.slot : run.slot + run.num] = mark
            if reason is not Reason.ON_DEMAND:
                of_run = np.arange(run.slot, run.slot + run.num)
                self._on_wire.append(OnWire(mark, of_run))
            for expert in range(run.expert, run.expert + run.num):
                transfers.append(Transfer(moe_layer, expert, reason, nbytes, start, mark))
                start = mark  # of joined experts the first has the copy's time: a sum counts it once
        return transfers

    def slot(self, slot: int, nbytes: int) -> torch.Tensor:
        """The first `nbytes` of a slot."""
        view = self._slot_views[slot]
        return view if nbytes == self.pool.shape[1] else view[:nbytes]

    def _pair(self, moe_layer: int, run: Run, nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        if run.num > 1:
            rows = self._host.layers[moe_layer].rows
            return self.pool[run.slot : run.slot + run.num], rows[run.expert : run.expert + run.num]
        return self.slot(run.slot, nbytes), self._host.row(moe_layer, run.expert)

    # -- prefetches --------------------------------------------------------------------------------------------

    def hold(self, keys: IntArray, keep: IntArray, reason: Reason, timed: bool) -> list[Transfer]:
        """Want `keys` (n,) instead of whatever waits, the most wanted first.

        Args:
            keep: keys that prefetches evict last.

        They get their slots when they are issued, so that a prefetch that is dropped evicts nothing. Experts
        that are in a slot or on their way are left as they are.

        Returns: what `pump` could issue at once.
        """
        want(self._waiting, keys, keep)
        self._why = reason
        return self.pump(timed)

    def pump(self, timed: bool) -> list[Transfer]:
        """Issue what waits while fewer than `most_on_wire` prefetches are on the link and slots can be had.

        Call it once per layer or oftener, after the layer's own copies, where each slot in use is protected or its
        release is marked: this evicts.

        Raises:
            TransferFailed: an earlier or this copy failed; the engine then recovers as after any failed copy.
        """
        transfers: list[Transfer] = []
        if not self.num_held:
            return transfers
        self._on_wire = [copy for copy in self._on_wire if not self._has_landed(copy)]
        num_experts = self._residency.shape.num_experts
        # Experts of one layer that follow each other are handed over together: small ones are joined.
        for moe_layer, pairs in groupby(self._taken(), key=lambda pair: pair[0] // num_experts):
            keys, slots = np.array(list(pairs), dtype=np.int64).T
            transfers += self.load(moe_layer, keys - moe_layer * num_experts, slots, self._why, timed)
        return transfers

    def _taken(self) -> list[tuple[int, int]]:
        """Keys and slots of the prefetches that the link has room for."""
        num_on_wire, pairs = sum(len(copy.slots) for copy in self._on_wire), []
        while (pair := self._residency.take_prefetch(self._waiting, num_on_wire, self.most_on_wire))[0] >= 0:
            pairs.append(pair)
            num_on_wire += 1
        return pairs

    def _has_landed(self, copy: OnWire) -> bool:
        if not self._device.is_done(copy.ready):
            return False
        # Only slots that nobody waited for: others may be in flight again, for another expert.
        self._residency.landed(copy.slots[[self._ready[slot] is copy.ready for slot in copy.slots]])
        return True

    def cancel(self) -> None:
        """Drop the prefetches that wait: they own no slot. Those on the link are not interrupted."""
        self._waiting.counts[:] = 0

    @property
    def held(self) -> IntArray:
        """Keys (n,) of the prefetches that wait, the most wanted first."""
        return self._waiting.keys[: self.num_held][::-1].copy()

    @property
    def num_held(self) -> int:
        """Prefetches that wait."""
        return int(self._waiting.counts[NUM_WAITING])

    # -- marks -------------------------------------------------------------------------------------------------

    def wait(self, slots: IntArray) -> bool:
        """The compute lane waits until the bytes of `slots` (n,) are there; returns whether it had to be told to.

        Raises:
            TransferFailed: one of their copies failed.
        """
        pending = {id(ready): ready for ready in self._ready[slots] if ready is not None}
        if not pending:
            return False
        for ready in pending.values():
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
        """Forget all marks and drop all prefetches; both lanes must be idle."""
        self._ready[:] = None
        self._released[:] = None
        self.cancel()
        self._on_wire.clear()

    def close(self) -> None:
        """Give the slots back."""
        self.clear()
        self._slot_views = []
        self.pool = torch.empty(0, dtype=torch.uint8, device="cpu")

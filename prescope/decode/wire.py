"""The H2D lane as a captured step under a schedule uses it: numbered batches of copies, prefetches when there is room.

Leaner than `loader.Loader`, whose marks the GPU waits for one by one: here a batch's number is copied behind its bytes,
and the GPU waits for the number. So the host makes one mark at most for a batch, to know when a prefetch has landed.
"""

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..core import Reason
from ..device import Mark
from ..loader import Transfer
from ..residency import IntArray
from ..scheduler.decide import take_slots
from ..serving import Serving

if TYPE_CHECKING:
    from ..kernels.captured import CapturedStep


class Prefetch(NamedTuple):
    """One that is on the wire."""

    landed: Mark
    slot: int


class Wire:
    """Copies of one run.

    Args:
        serving: its device, host rows, slots and table.
        most_in_flight: prefetches under way at most.
    """

    def __init__(self, serving: Serving, most_in_flight: int) -> None:
        self._serving, self._most = serving, most_in_flight
        self._table, self._loader = serving.residency, serving.loader
        #: By slot: number of the batch that brings its bytes.
        self.copy_of = np.zeros(self._table.num_slots, dtype=np.int64)
        self._batches = 0
        self._on_wire: deque[Prefetch] = deque()
        self._held: list[int] = []  # keys, the most wanted last
        self._keep = np.empty(0, dtype=np.int64)
        self._one = np.empty(1, dtype=np.int64)

    def load(
        self, captured: "CapturedStep", moe_layer: int, experts: IntArray, slots: IntArray, is_last: bool
    ) -> None:
        """Issue on-demand copies (n,) at once; a layer's last ones carry its number."""
        if len(experts):
            self._send(captured, moe_layer, experts.tolist(), slots.tolist(), Reason.ON_DEMAND, is_last)

    def _send(
        self,
        captured: "CapturedStep",
        moe_layer: int,
        experts: list[int],
        slots: list[int],
        reason: Reason,
        is_numbered: bool,
    ) -> None:
        serving, host = self._serving, self._serving.host
        recorder = serving.recorder
        timed = recorder is not None and recorder.timed
        nbytes = serving.layers[moe_layer].layout.row_bytes
        pairs = (
            (self._loader.slot(slot, nbytes), host.row(moe_layer, e))
            for e, slot in zip(experts, slots, strict=True)
        )
        last = None
        if is_numbered:
            self._batches += 1
            last = captured.landing(self._batches)
        self.copy_of[slots] = self._batches + (0 if is_numbered else 1)
        is_ahead = reason is not Reason.ON_DEMAND
        begin, end = serving.device.send(pairs, last, begin=timed, end=timed or is_ahead, timed=timed)
        if is_ahead:
            assert end is not None
            self._on_wire.extend(Prefetch(end, slot) for slot in slots)
        if recorder is not None and timed:
            share = len(experts)
            recorder.copied([Transfer(moe_layer, e, reason, nbytes, begin, end) for e in experts], share)

    # -- prefetches --------------------------------------------------------------------------------------------

    def hold(self, keys: IntArray, keep: IntArray) -> None:
        """Want these, the most wanted first, instead of whatever was wanted; `keep` are evicted last."""
        self._held, self._keep = keys[::-1].tolist(), keep

    def land(self) -> None:
        """Prefetches whose bytes are there are resident."""
        wire, device = self._on_wire, self._serving.device
        while wire and device.is_done(wire[0].landed):
            self._table.in_flight[wire.popleft().slot] = False

    def pump(self, captured: "CapturedStep", reason: Reason) -> int:
        """Issue what is wanted while there is room; returns how many. Cheap when there is none: it is called while
        a message is awaited.
        """
        issued = 0
        table = self._table
        while self._held:
            if len(self._on_wire) >= self._most:
                if not self._serving.device.is_done(self._on_wire[0].landed):
                    break
                self.land()
            key = self._held.pop()
            if table.slot_of[key] >= 0:
                continue
            self._one[0] = key
            fixed = table.protected | table.in_flight
            slots = take_slots(self._one, table.key_of, table.slot_of, fixed, self._keep, table.policy.scores)
            if len(slots) == 0:
                self._held.clear()
                break
            table.in_flight[slots[0]] = True
            moe_layer, expert = divmod(key, table.shape.num_experts)
            self._send(captured, moe_layer, [expert], [int(slots[0])], reason, True)
            issued += 1
        return issued

    def close(self) -> None:
        """Nothing is wanted any more, and what is on the wire has landed."""
        self._held.clear()
        self._on_wire.clear()
        self._serving.device.synchronize()
        self._table.in_flight[:] = False
        self._table.protected[:] = False
        self._table.versions += 1  # copies of the table's rows are stale

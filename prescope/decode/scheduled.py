"""The host's part of a captured step under a schedule: every layer asks, and is answered.

Per layer: the choice arrives, everything is decided by one call of compiled code, on-demand copies are handed to the
link and the CPU's experts to their threads, and the GPU is told the changes of the slot table and what to wait for.
While the next choice is awaited, prefetches are handed to the link as it has room. A layer's slots are safe until the
next layer has asked: then the GPU is done with them.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import Need
from ..cpu_experts import Flag, Lot
from ..hf import MoELayer
from ..kernels import StepLog
from ..planner import most_in_flight
from ..residency import NOTHING, IntArray, LayerNeed, prefetch_slots
from ..scheduling import CpuWork, Predicted, Scheduling
from ..serving import Serving
from .wire import Wire

if TYPE_CHECKING:
    from ..kernels.captured import CapturedStep

#: A number that no batch of copies has: all layers that wait go on.
MOST_COPIES = 2**31 - 1


class ScheduledStep:
    """Serves captured steps by the engine's schedule.

    Args:
        serving: slots, link and schedule.
        await_: polls a message of the GPU, doing something else in between.
    """

    def __init__(
        self, serving: Serving, await_: Callable[[Callable[[], Any], Callable[[], None]], Any]
    ) -> None:
        self._serving, self._await = serving, await_
        self._sent: IntArray = NOTHING  # the slot table as the GPU has it
        self._counted: list[LayerNeed] = []  # of the last step
        self._work: tuple[CpuWork, int] | None = None  # of the layer before, and the step it belongs to
        self._done: list[CpuWork] = []  # of the step at hand
        self._wire: Wire | None = None

    def begin(self) -> None:
        """Steps follow; the GPU has the table as it is now, and nothing is on the link."""
        serving = self._serving
        if serving.scheduling is not None:
            serving.loader.cancel()
            serving.device.synchronize()
            serving.loader.poll()
            serving.residency.unprotect()
            most = most_in_flight(serving.device.kind, serving.shape.row_bytes)
            self._wire = Wire(serving, min(most, prefetch_slots(serving.residency.num_slots)))
            self._sent = serving.residency.slot_of.copy()

    def end(self) -> None:
        """No step follows: nothing is wanted, nothing is in use."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None
            self._collect(self._work)
            self._work = None

    def learn(self, log: StepLog) -> None:
        """What a step says about this machine: its jobs on the CPU, and its stamps, if there is a timeline."""
        scheduling = self._serving.scheduling
        if scheduling is None:
            return
        scheduling.saw(self._done)
        self._done.clear()
        if not log.stamps_ns.any():
            return
        routed, decided, done = log.stamps_ns[:, 0], log.stamps_ns[:, 1], log.stamps_ns[:, 3]
        before = np.concatenate([[log.begin_ns], done[:-1]])
        scheduling.planner.saw_step(
            float(np.median(routed - before)) / 1e3, float(np.median(decided - routed)) / 1e3
        )

    def undo(self) -> None:
        """The last step never was, nor what the CPU did in its last layer; all of it is over."""
        for need in self._counted:
            self._count(need, -1)
        if self._work is not None:
            self._work[0].job.wait()
            self._work = None

    def run(self, captured: "CapturedStep", number: int) -> None:
        """Serve all layers of a step that is running."""
        self._counted = []
        assert self._serving.scheduling is not None and self._wire is not None
        for layer in self._serving.layers:
            self._layer(captured, number, layer, self._serving.scheduling, self._wire)

    def _layer(
        self, captured: "CapturedStep", number: int, layer: MoELayer, scheduling: Scheduling, wire: Wire
    ) -> None:
        serving, moe_layer = self._serving, layer.moe_layer
        table, recorder = serving.residency, serving.recorder
        pump = partial(self._pump, captured, scheduling, wire)
        ids, weights = self._await(partial(captured.choice, moe_layer, number), pump)
        sums = serving.weight_sums(layer, ids, weights)
        predicted = self._predictions(captured, moe_layer, number, pump)
        wire.land()
        decision = scheduling.planner.decide(
            moe_layer, layer.num_experts, ids, sums, table, time.perf_counter() * 1e6, predicted
        )
        found, plan, slots = decision.need, decision.plan, decision.slots
        here = found.num_hits + found.num_late
        load, cold = found.experts[here : here + plan.num_load], found.experts[here + plan.num_load :]
        assert len(slots) == len(load), f"{len(load)} experts to copy, {len(slots)} slots for them"
        # The first copy runs while the host prepares what follows: the link is idle until it is issued.
        wire.load(captured, moe_layer, load[:1], slots[:1], len(load) == 1)
        former, self._work = self._work, None
        if len(cold):
            pairs = decision.lot_pairs
            lot = Lot(cold, decision.lot_first, pairs // captured.top_k, pairs)
            flag = Flag(*captured.cpu_flag(moe_layer, number))
            inputs, outputs = captured.inputs[moe_layer], captured.cpu_pairs[moe_layer]
            work = scheduling.submit_lot(moe_layer, lot, inputs, flag, outputs)
            self._work = work, recorder.num_steps - 1 if recorder is not None else -1
        wire.load(captured, moe_layer, load[1:], slots[1:], True)
        late = table.slots_for(moe_layer, found.experts[found.num_hits : here])
        last_copy = int(wire.copy_of[np.concatenate([late, slots])].max(initial=0))
        keys = np.flatnonzero(table.slot_of != self._sent)
        self._sent[keys] = table.slot_of[keys]
        captured.reply(moe_layer, number, keys, self._sent[keys], last_copy, len(cold))
        # -- the GPU has what it needs: what follows is not waited for
        scheduling.issued(len(load))
        wire.hold(plan.prefetch, plan.keep)
        pump()
        self._collect(former)
        need = LayerNeed(moe_layer, found.experts, found.tokens, int(found.num_hits), int(found.num_late))
        self._counted.append(need)
        self._count(need, 1)
        if recorder is not None:
            recorder.need(need, 1, captured.num_tokens, len(cold))

    def _count(self, need: LayerNeed, sign: int) -> None:
        counts = ((Need.HIT, need.num_hits), (Need.LATE, need.num_late), (Need.MISS, need.num_misses))
        for kind, num in counts:
            self._serving.needs[kind] += sign * num

    def _predictions(
        self, captured: "CapturedStep", moe_layer: int, number: int, pump: Callable[[], None]
    ) -> Predicted | None:
        assert captured.scheduled is not None
        if captured.scheduled.scores is None:
            return None
        values = self._await(partial(captured.predicted, moe_layer, number), pump)
        return values[:, 0], values[:, 1]

    def _pump(self, captured: "CapturedStep", scheduling: Scheduling, wire: Wire) -> None:
        if issued := wire.pump(captured, scheduling.reason):
            scheduling.issued(issued)

    def _collect(self, former: tuple[CpuWork, int] | None) -> None:
        """The CPU's part of an earlier layer is over, since the GPU waited for it; raises what went wrong there."""
        if former is None:
            return
        work, step = former
        work.job.wait()
        self._done.append(work)
        if self._serving.recorder is not None:
            self._serving.recorder.on_cpu(work, step)

    def abandon(self, captured: "CapturedStep", number: int) -> None:
        """Let a step that is still waiting run to its end, with whatever weights there are."""
        has_cpu = captured.scheduled is not None and captured.scheduled.has_cpu
        self._work = None
        # For a layer that was answered before and waits for bytes.
        self._serving.device.send([captured.landing(MOST_COPIES)], None)
        for layer in self._serving.layers:
            captured.reply(layer.moe_layer, number, NOTHING, NOTHING, last_copy=0, num_on_cpu=0)
            if has_cpu:
                word, value = captured.cpu_flag(layer.moe_layer, number)
                word.fill_(value)

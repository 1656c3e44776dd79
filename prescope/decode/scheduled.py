"""The host's part of a captured step under a schedule: every layer asks, and is answered.

Per layer: the choice arrives, the plan is made, on-demand copies are handed to the link, the CPU's experts to their
threads, and the GPU is told the changes of the slot table and what to wait for. While the next choice is awaited,
prefetches are handed to the link as it has room. A layer's slots are safe until the next layer has asked: then the
GPU is done with them.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import Need, Reason
from ..cpu_experts import Flag
from ..hf import MoELayer
from ..loader import Transfer
from ..residency import NOTHING, IntArray, LayerNeed
from ..scheduling import CpuWork, Predicted, Scheduling
from ..serving import Serving

if TYPE_CHECKING:
    from ..kernels.captured import CapturedStep


#: A number that no copy has: all layers that wait go on.
MOST_COPIES = 2**31 - 1


class ScheduledStep:
    """Serves captured steps by the engine's schedule.

    Args:
        serving: slots, loader and schedule.
        await_: polls a message of the GPU, doing something else in between.
    """

    def __init__(
        self, serving: Serving, await_: Callable[[Callable[[], Any], Callable[[], None]], Any]
    ) -> None:
        self._serving, self._await = serving, await_
        self._sent: IntArray = NOTHING  # the slot table as the GPU has it
        self._counted: list[LayerNeed] = []  # of the last step
        self._work: CpuWork | None = None  # of the layer before
        self._copies = 0  # given to the link since `begin`
        self._copy_of: IntArray = NOTHING  # by slot: number of the copy that brings its bytes

    def begin(self) -> None:
        """Steps follow; the GPU has the table as it is now, and nothing is on the link."""
        if self._serving.scheduling is not None:
            self._serving.loader.cancel()
            self._serving.device.synchronize()
            self._serving.loader.poll()
            self._serving.residency.unprotect()
        self._sent = self._serving.residency.slot_of.copy()
        self._copies, self._copy_of = 0, np.zeros(self._serving.residency.num_slots, dtype=np.int64)

    def end(self) -> None:
        """No step follows: nothing is wanted, nothing is in use."""
        serving = self._serving
        if serving.scheduling is not None:
            serving.loader.cancel()
            serving.residency.unprotect()
            self._collect()

    def undo(self) -> None:
        """The last step never was."""
        for need in self._counted:
            for kind, num in (
                (Need.HIT, need.num_hits),
                (Need.LATE, need.num_late),
                (Need.MISS, need.num_misses),
            ):
                self._serving.needs[kind] -= num

    def run(self, captured: "CapturedStep", number: int) -> None:
        """Serve all layers of a step that is running."""
        self._counted = []
        assert self._serving.scheduling is not None
        for layer in self._serving.layers:
            self._layer(captured, number, layer, self._serving.scheduling)

    def _layer(self, captured: "CapturedStep", number: int, layer: MoELayer, scheduling: Scheduling) -> None:
        serving, moe_layer = self._serving, layer.moe_layer
        table, recorder = serving.residency, serving.recorder
        timed = recorder is not None and recorder.timed
        ids, weights = self._poll(captured, partial(captured.choice, moe_layer, number), timed)
        self._collect()
        need = serving.find(layer, ids, serving.weight_sums(layer, ids, weights))
        self._counted.append(need)
        plan = scheduling.plan(need, table, self._predictions(captured, moe_layer, number, timed))
        here = need.num_hits + need.num_late
        load, cold = need.experts[here : here + plan.num_load], need.experts[here + plan.num_load :]
        table.unprotect()  # the GPU is done with the layer before
        table.protect(table.slots_for(moe_layer, need.experts[:here]))
        slots = table.take(moe_layer, load, plan.keep) if len(load) else NOTHING
        table.protect(slots)
        # The first copy runs while the host prepares what follows: the link is idle until it is issued.
        self._load(moe_layer, load[:1], slots[:1], scheduling, timed)
        if len(cold):
            flag = Flag(*captured.cpu_flag(moe_layer, number))
            self._work = scheduling.submit(
                moe_layer, cold, ids.reshape(captured.num_tokens, -1), captured.inputs[moe_layer], flag,
                captured.cpu_pairs[moe_layer],
            )  # fmt: skip
        self._load(moe_layer, load[1:], slots[1:], scheduling, timed)
        self._number(captured, slots)
        late = table.slots_for(moe_layer, need.experts[need.num_hits : here])
        last_copy = int(self._copy_of[np.concatenate([late, slots])].max(initial=0))
        keys = np.flatnonzero(table.slot_of != self._sent)
        self._sent[keys] = table.slot_of[keys]
        captured.reply(moe_layer, number, keys, self._sent[keys], last_copy, len(cold))
        table.landed(slots)  # before the next layer asks
        if recorder is not None:
            recorder.need(need, 1, captured.num_tokens, len(cold))
        self._prefetched(captured, scheduling.hold(plan, serving.loader, timed))

    def _number(self, captured: "CapturedStep", slots: IntArray) -> None:
        """The copies into these slots, issued last, get a number, which lands behind them."""
        if len(slots):
            self._copies += 1
            self._copy_of[slots] = self._copies
            self._serving.device.send([captured.landing(self._copies)], None)

    def _prefetched(self, captured: "CapturedStep", transfers: list[Transfer]) -> None:
        if transfers:
            table = self._serving.residency
            first = table.shape.num_experts
            keys = np.asarray([t.moe_layer * first + t.expert for t in transfers], dtype=np.int64)
            self._number(captured, table.slot_of[keys])
            self._serving.recorded(transfers)

    def _load(
        self, moe_layer: int, experts: IntArray, slots: IntArray, scheduling: Scheduling, timed: bool
    ) -> None:
        if len(experts):
            loader = self._serving.loader
            self._serving.recorded(loader.load(moe_layer, experts, slots, Reason.ON_DEMAND, timed))
            scheduling.issued(len(experts))

    def _predictions(
        self, captured: "CapturedStep", moe_layer: int, number: int, timed: bool
    ) -> Predicted | None:
        assert captured.scheduled is not None
        if captured.scheduled.scores is None:
            return None
        values = self._poll(captured, partial(captured.predicted, moe_layer, number), timed)
        return values[:, 0], values[:, 1]

    def _poll(self, captured: "CapturedStep", poll: Callable[[], Any], timed: bool) -> Any:
        return self._await(poll, partial(self._pump, captured, timed))

    def _pump(self, captured: "CapturedStep", timed: bool) -> None:
        serving = self._serving
        if serving.loader.num_held and serving.scheduling is not None:
            self._prefetched(captured, serving.scheduling.pump(serving.loader, timed))

    def _collect(self) -> None:
        """The CPU's part of the layer before is over, since the GPU waited for it; raises what went wrong there."""
        if self._work is not None:
            work, self._work = self._work, None
            work.job.wait()
            if self._serving.recorder is not None:
                self._serving.recorder.on_cpu(work)

    def abandon(self, captured: "CapturedStep", number: int) -> None:
        """Let a step that is still waiting run to its end, with whatever weights there are."""
        has_cpu = captured.scheduled is not None and captured.scheduled.has_cpu
        self._work = None
        self._serving.device.send(
            [captured.landing(MOST_COPIES)], None
        )  # for a layer that was answered before
        for layer in self._serving.layers:
            captured.reply(layer.moe_layer, number, NOTHING, NOTHING, last_copy=0, num_on_cpu=0)
            if has_cpu:
                word, value = captured.cpu_flag(layer.moe_layer, number)
                word.fill_(value)

"""Keep what a schedule knows from layer to layer, and ask it about each layer.

Shapes: n experts needed, E experts of a layer, L MoE layers, d layers ahead.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache.residency import LayerNeed, ResidencyTable
from ..core.types import FloatArray, IntArray, MoEShape
from .layer import Decision, decide_layer, learn_layer, prefetch_layer
from .prompt import copies_of_prompt
from .types import Costs, Memory, Prefetches, ScheduleSettings

#: Weight of the newest step, and of the newest job, in the planner's own measurements.
NEWEST = 0.2
#: The CPU is believed to be this many times faster or slower than calibrated at most: a job may be interrupted.
MOST_CPU_FACTOR = 4.0
#: The median of this many steps' jobs is believed: those of a step that was interrupted say nothing.
CPU_STEPS = 3
#: A step without jobs moves the believed speed of the CPU this much towards the calibrated one. Otherwise a schedule
#: that once found the CPU slow would never try it again: in one cell the Fiddler-like copied every expert, at 124
#: tokens/s where 219 were simulated (H200).
FORGOTTEN = 0.05
#: The same for the link. One H100 machine's gave 13 GB/s where another's gave 55; believing 55, PreSched lost 43 % to a
#: schedule that uses the CPU alone (docs/log/scheduler.md).
MOST_LINK_FACTOR = 8.0
#: The CPU makes the link this many times slower at most, since both read the same memory: 1.15 to 1.37 as calibrated on
#: H200 machines, 1.8 where it computed most of eight experts a layer. A copy beside the CPU that takes even longer says
#: that the link itself is slower.
MOST_CONTENTION = 2.0


class Decided(NamedTuple):
    """What a layer's prefetches are decided by."""

    decision: Decision
    backlog_us: float
    memory: Memory
    tokens_dE: FloatArray  # as the decision left them
    used_dE: FloatArray


class Planner:
    """One engine's decisions. Its costs begin as calibrated and follow what its own steps show.

    Args:
        settings: of the schedule.
        costs: of this machine and model.
        shape: of the model's MoE part.
        predicts: layers ahead that a predictor answers for; 0 without one.
    """

    def __init__(self, settings: ScheduleSettings, costs: Costs, shape: MoEShape, predicts: int) -> None:
        self.settings, self.costs, self._shape = settings, costs, shape
        self._calibrated = costs
        self.cpu_factor = 1.0  # what the CPU takes, of what it was calibrated to take
        self._cpu_ratios: deque[float] = deque(maxlen=CPU_STEPS)  # the same, of the last steps
        self.predicts = predicts
        self._link_free_us = 0.0  # by the caller's clock: when the link will be done with what it was given
        self._nothing = np.zeros((0, shape.num_experts))
        self._former: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None
        self._decided: Decided | None = None  # of the last layer
        self.restart()

    def restart(self) -> None:
        """Forget what was predicted and how far that could be trusted."""
        shape = self._shape
        self.memory = Memory.fresh(self.predicts, shape.num_layers, shape.num_experts)

    def decide(
        self,
        moe_layer: int,
        experts: IntArray,
        tokens: IntArray,
        weights: FloatArray,
        table: ResidencyTable,
        now_us: float,
        predicted: tuple[NDArray[np.floating], NDArray[np.floating]] | None,
    ) -> tuple[Decision, int]:
        """Decide what serves a layer; the table's cache policy learns what it needs.

        Args:
            experts: (n,) distinct, ascending; `tokens` (n,) of each, `weights` (n,) what the policy weighs them by.
            now_us: by any clock that goes on.
            predicted: made at this layer: expected tokens and probability of use, (d, E) each, for the layers after
                it; rows beyond the last layer hold zeros. With a lag of 1 they are for `prefetches`, and for the next
                layer's decision.

        Returns: the decision, and what `learn_layer` returns.
        """
        former, self._former = self._former, predicted
        if predicted is not None and self.settings.lag:
            # Those of the layer before; the first layer has none.
            predicted = former if moe_layer else (np.zeros_like(predicted[0]), np.zeros_like(predicted[1]))
        memory = self.memory
        if predicted is None:
            memory = memory._replace(predicted_dLE=memory.predicted_dLE[:0])
        tokens_dE, used_dE = (self._nothing, self._nothing) if predicted is None else predicted
        # No more can be left than prefetches under way; the errors of what copies are believed to take would add up.
        under_way = now_us + int(table.in_flight.sum()) * self.costs.link_busy_us
        self._link_free_us = min(self._link_free_us, under_way)
        backlog_us = max(0.0, self._link_free_us - now_us)
        tokens_dE, used_dE = np.array(tokens_dE, dtype=np.float64), np.array(used_dE, dtype=np.float64)
        decision = decide_layer(
            self.settings,
            self.costs,
            moe_layer,
            experts,
            tokens,
            backlog_us,
            table.arrays,
            memory,
            tokens_dE,
            used_dE,
        )
        policy = table.policy
        policy.tick += 1
        num_prefetched = learn_layer(
            self.settings,
            policy.kind,
            policy.tick,
            moe_layer,
            decision,
            experts,
            weights,
            table.arrays,
            memory,
        )
        self._decided = Decided(decision, backlog_us, memory, tokens_dE, used_dE)
        return decision, num_prefetched

    def copies_of_prompt(self, need: LayerNeed, table: ResidencyTable) -> int:
        """How many misses of a prompt's layer are copied. By costs as calibrated: those learned are of decode steps."""
        return copies_of_prompt(self.settings, self._calibrated, need, table.free_share(need.moe_layer))

    def prefetches(self, moe_layer: int, table: ResidencyTable) -> Prefetches:
        """What the link copies ahead, now that the copies of the layer decided last have their slots."""
        assert self._decided is not None, "no layer was decided"
        decision, backlog_us, memory, tokens_dE, used_dE = self._decided
        own, is_own = self._former, False
        if own is not None and self.settings.lag > 0 and moe_layer + 1 < self._shape.num_layers:
            # With a lag the layer was decided without its own predictions.
            tokens_dE, used_dE = (np.array(part, dtype=np.float64) for part in own)
            is_own = True
        # Copies that the layer itself waits for are as good as there, as for captured steps and for the simulator.
        need, in_flight = decision.need, table.in_flight.copy()
        here = need.num_hits + need.num_late
        copied = table.slots_for(moe_layer, need.experts[here : here + decision.num_load])
        in_flight[copied[copied >= 0]] = False
        slots = table.arrays._replace(in_flight=in_flight)
        return prefetch_layer(
            self.settings, self.costs, moe_layer, decision, backlog_us, slots, memory, tokens_dE, used_dE, is_own
        )  # fmt: skip

    def calibrated_cpu(self) -> tuple[float, FloatArray]:
        """What the CPU was calibrated to take: for a submission, and for one expert by its tokens."""
        return self._calibrated.cpu_base_us, self._calibrated.cpu_us

    def saw_step(self, rest_us: float, decide_us: float | None, gpu_us: float) -> None:
        """Learn from a step: what its layers took without their experts, and from the router's choice to the answer
        (None: no layer waited for one), medians; and one expert on the GPU, its share of the launches included.
        """
        old = self.costs
        decide_us = old.decide_us if decide_us is None else decide_us
        self.costs = old._replace(
            rest_us=old.rest_us + NEWEST * (rest_us - old.rest_us),
            decide_us=old.decide_us + NEWEST * (decide_us - old.decide_us),
            gpu_us=old.gpu_us + NEWEST * (gpu_us - old.gpu_us),
        )

    def saw_link(self, took_us: Sequence[float], has_cpu: bool) -> None:
        """Learn what copies of one expert took on the link in a step, and whether the CPU computed any meanwhile."""
        calibrated = self._calibrated
        each_us = calibrated.link_busy_us if has_cpu else calibrated.link_us
        if not took_us or calibrated.link_us == 0.0 or each_us == 0.0:
            return
        alone_us, busy_us = self.costs.link_us, self.costs.link_busy_us
        contention = max(MOST_CONTENTION, calibrated.link_busy_us / calibrated.link_us)
        took = each_us * _within(median(took_us) / each_us, MOST_LINK_FACTOR)
        if has_cpu:
            busy_us += NEWEST * (took - busy_us)
            alone_us = max(min(alone_us, busy_us), busy_us / contention)
        else:
            alone_us += NEWEST * (took - alone_us)
            busy_us = min(max(busy_us, alone_us), contention * alone_us)
        self.costs = self.costs._replace(link_us=alone_us, link_busy_us=busy_us)

    def saw_cpu(self, took_us: float, calibrated_us: float) -> None:
        """Learn what a step's submissions to the CPU took, and should have taken as calibrated; zeros for none."""
        if calibrated_us > 0.0:
            self._cpu_ratios.append(_within(took_us / calibrated_us, MOST_CPU_FACTOR))
            self.cpu_factor += NEWEST * (median(self._cpu_ratios) - self.cpu_factor)
        else:
            self.cpu_factor += FORGOTTEN * (1.0 - self.cpu_factor)
        factor, costs = self.cpu_factor, self._calibrated
        self.costs = self.costs._replace(
            cpu_us=factor * costs.cpu_us,
            cpu_alone_us=factor * costs.cpu_alone_us,
            cpu_base_us=factor * costs.cpu_base_us,
        )

    def issued(self, num_copies: int, now_us: float) -> None:
        """Count experts that were given to the link."""
        self._link_free_us = max(self._link_free_us, now_us) + num_copies * self.costs.link_us


def _within(ratio: float, most: float) -> float:
    return float(min(max(ratio, 1.0 / most), most))

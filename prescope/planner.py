"""Keeps what a schedule knows from layer to layer, and asks it what to do about each.

Shapes: n experts needed, E experts of a layer, L MoE layers, d layers ahead.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cache import learn
from .core import MoEShape
from .jit import jit
from .residency import NOTHING, LayerNeed, ResidencyTable
from .scheduler.decide import (
    discount,
    learn_reuse,
    learn_trust,
    plan,
    reuse_lasts,
    sort_need,
    take_slots,
    use_prefetched,
)
from .scheduler.terms import Costs, FloatArray, IntArray, Knobs, Memory, Need, Plan

#: Copies below this do not reach the link's rate: PCIe 5 gave 53 GB/s at 4 MiB, 48 at 1 MiB (benchmarks/async_io.py).
LEAST_BYTES_UNDER_WAY = 4 << 20


def most_in_flight(device_kind: str, row_bytes: int) -> int:
    """Prefetches under way at most: one on the wire and one behind it, so that demand waits for no more.

    On CUDA as many more as small experts need to keep the link at its rate.
    """
    return max(2, LEAST_BYTES_UNDER_WAY // row_bytes) if device_kind == "cuda" else 2


@jit
def plan_layer(
    knobs: Knobs,
    costs: Costs,
    moe_layer: int,
    need: Need,
    backlog_us: float,
    slot_of: IntArray,
    key_of: IntArray,
    scores: FloatArray,
    memory: Memory,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
) -> Plan:
    """One layer's plan; predictions count for as much as those for this layer were worth.

    Args:
        key_of, scores: as `scheduler.decide.plan`.
        memory: changed.
        tokens_dE, used_dE: as predicted `knobs.lag` layers ago, for the layers behind that one; changed.
    """
    d, num_layers, E = memory.predicted_dLE.shape
    num_absent = 0
    for expert in range(E):
        num_absent += slot_of[moe_layer * E + expert] < 0
    num_misses = len(need.experts) - need.num_hits - need.num_late
    learn_reuse(memory.reuse, memory.former_LE[moe_layer], need.experts, num_misses, num_absent)
    if d:
        counts_E = np.zeros(E, np.int64)
        for i in range(len(need.experts)):
            counts_E[need.experts[i]] = need.tokens[i]
        learn_trust(memory.trust, moe_layer, counts_E, memory.predicted_dLE, knobs.threshold)
    take_down(memory, moe_layer, knobs.lag, tokens_dE, used_dE)
    lag = min(knobs.lag, d)
    return plan(
        knobs, costs, moe_layer, num_layers, need, backlog_us, slot_of, tokens_dE[lag:], used_dE[lag:], key_of, scores,
        reuse_lasts(memory.reuse),
    )  # fmt: skip


@jit
def reconsider(
    knobs: Knobs,
    costs: Costs,
    moe_layer: int,
    need: Need,
    num_load: int,
    backlog_us: float,
    slot_of: IntArray,
    key_of: IntArray,
    scores: FloatArray,
    memory: Memory,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
) -> Plan:
    """A layer's prefetches once more, when the predictions made at it come: with a lag it was decided without them.

    Args:
        need, num_load, backlog_us: as it was decided. The rest as `plan_layer`, as it is now.
        tokens_dE, used_dE: as predicted at this layer; changed.
    """
    take_down(memory, moe_layer, 0, tokens_dE, used_dE)
    num_layers = memory.predicted_dLE.shape[1]
    return plan(
        knobs, costs, moe_layer, num_layers, need, backlog_us, slot_of, tokens_dE, used_dE, key_of, scores,
        reuse_lasts(memory.reuse), num_load,
    )  # fmt: skip


@jit
def take_down(memory: Memory, moe_layer: int, lag: int, tokens_dE: FloatArray, used_dE: FloatArray) -> None:
    """Keep what was predicted `lag` layers before the one at hand, of the layers behind that, and let it count for as
    much as such predictions were worth.
    """
    made_at = moe_layer - lag
    predicted_dLE = memory.predicted_dLE
    d, num_layers, E = predicted_dLE.shape
    for ahead in range(1, d + 1):
        is_layer = made_at >= 0 and made_at + ahead < num_layers
        factor = discount(memory.trust, ahead) if is_layer else 0.0
        for e in range(E):
            if is_layer and ahead > lag:  # what the layer at hand used has been held against it
                predicted_dLE[ahead - 1, made_at + ahead, e] = used_dE[ahead - 1, e]
            used_dE[ahead - 1, e] *= factor
            tokens_dE[ahead - 1, e] *= factor


class Decision(NamedTuple):
    """All that is decided about one layer, its slots taken; compiled code makes it in one go."""

    need: Need
    num_prefetched: int  # as in `residency.LayerNeed`
    plan: Plan
    slots: IntArray  # (k,) of the misses that are copied, in their order
    #: (m + 1,): the pairs of the i-th expert on the CPU are lot_pairs[lot_first[i] : lot_first[i + 1]].
    lot_first: IntArray
    lot_pairs: IntArray  # (p,) pairs (t * K + k) of the experts on the CPU


class Slots(NamedTuple):
    """The arrays of a residency table and its policy, as compiled code changes them."""

    slot_of: IntArray
    key_of: IntArray
    in_flight: NDArray[np.bool_]
    prefetched: NDArray[np.bool_]
    protected: NDArray[np.bool_]
    scores: FloatArray


@jit
def decide_layer(
    knobs: Knobs,
    costs: Costs,
    policy: int,
    tick: int,
    moe_layer: int,
    num_experts: int,
    ids: IntArray,
    sums_E: FloatArray,
    slots: Slots,
    backlog_us: float,
    memory: Memory,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
) -> Decision:
    """What `ResidencyTable.need`, `plan_layer` and `ResidencyTable.take` do one after the other for a layer's choice.

    For layers that are served in one round, whose last layer's slots are free again. Copies of the misses are not
    marked as in flight: the layer waits for them before the next one asks.

    Args:
        policy: kind of the cache policy. `tick`: layers it has learned from, this one too.
        num_experts: of this layer. `ids`: (P,) chosen experts, others are nobody's.
        sums_E: sums of router weights, or (0,) where the policy does not look at them.
    """
    E = memory.former_LE.shape[1]
    first = moe_layer * E
    counts = np.zeros(num_experts, np.int64)
    for expert in ids:
        if 0 <= expert < num_experts:
            counts[expert] += 1
    experts = np.flatnonzero(counts).astype(np.int64)
    tokens = counts[experts]
    of_experts = slots.slot_of[first + experts]
    need = sort_need(experts, tokens, of_experts, slots.in_flight)
    num_prefetched = use_prefetched(slots.prefetched, of_experts)
    weights = sums_E[experts] if len(sums_E) else tokens.astype(np.float64)
    learn(policy, slots.scores, tick, moe_layer, E, experts, weights)
    chosen = plan_layer(
        knobs, costs, moe_layer, need, backlog_us, slots.slot_of, slots.key_of, slots.scores, memory, tokens_dE,
        used_dE,
    )  # fmt: skip
    here = need.num_hits + need.num_late
    slots.protected[:] = False
    for expert in need.experts[:here]:
        slots.protected[slots.slot_of[first + expert]] = True
    keys = first + need.experts[here : here + chosen.num_load]
    fixed = slots.protected | slots.in_flight
    taken = take_slots(keys, slots.key_of, slots.slot_of, fixed, chosen.keep, slots.scores)
    for slot in taken:
        slots.protected[slot], slots.prefetched[slot] = True, False
    # The pairs of the experts on the CPU, expert by expert.
    cold = need.experts[here + chosen.num_load :]
    lot_first, place = np.zeros(len(cold) + 1, np.int64), np.full(num_experts, -1)
    for i in range(len(cold)):
        lot_first[i + 1] = lot_first[i] + counts[cold[i]]
        place[cold[i]] = lot_first[i]
    lot_pairs = np.empty(lot_first[-1], np.int64)
    for pair in range(len(ids)):
        expert = ids[pair]
        if 0 <= expert < num_experts and place[expert] >= 0:
            lot_pairs[place[expert]] = pair
            place[expert] += 1
    return Decision(need, num_prefetched, chosen, taken, lot_first, lot_pairs)


#: Weight of the newest step, and of the newest job, in what the planner makes of its own measurements.
NEWEST = 0.2
#: The CPU is believed to be so many times faster or slower than calibrated at most: a job may be interrupted.
MOST_CPU_FACTOR = 4.0
#: Of so many steps' jobs the middle one is believed: those of a step that was interrupted say nothing.
CPU_STEPS = 3
#: A step without jobs takes what is believed of the CPU so much nearer to what was calibrated. Else a schedule that
#: leaves an expert to the CPU or not would never try again, once the CPU seemed slow: one of the Fiddler-like's cells
#: copied every expert, at 124 tokens/s where 219 were simulated (H200).
FORGOTTEN = 0.05
#: The same of the link. One H100 machine's gave 13 GB/s where another's gave 55; believing 55, PreSched lost 43 % to a
#: schedule that uses the CPU alone (LOG.md).
MOST_LINK_FACTOR = 8.0
#: The CPU makes the link so many times slower at most, since both read the same memory: 1.15 to 1.37 as calibrated on
#: H200 machines, 1.8 where it computed most of eight experts a layer. What is seen beside it says no more of the link
#: alone.
MOST_CONTENTION = 2.0


class Planner:
    """One engine's decisions. Costs follow what its own steps show, from the calibrated ones on.

    Args:
        knobs: the schedule and its settings.
        costs: of this machine and model.
        shape: of the model's MoE part.
        predicts: layers ahead that a predictor answers for; 0 without one.
    """

    def __init__(self, knobs: Knobs, costs: Costs, shape: MoEShape, predicts: int) -> None:
        self.knobs, self.costs, self._shape = knobs, costs, shape
        self._calibrated = costs
        self.cpu_factor = 1.0  # what the CPU takes, of what it was calibrated to take
        self._cpu_ratios: deque[float] = deque(maxlen=CPU_STEPS)  # the same, of the last steps
        self.predicts = predicts
        self._link_free_us = 0.0  # by the caller's clock: when the link will be done with what it was given
        self._nothing = np.zeros((0, shape.num_experts))
        self._former: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None
        self._decided = Need(NOTHING, NOTHING, 0, 0), 0.0  # of the last layer: its need, and the backlog
        self.restart()

    def restart(self) -> None:
        """Forget what was predicted and how far that could be trusted."""
        shape = self._shape
        self.memory = Memory.fresh(self.predicts, shape.num_layers, shape.num_experts)

    def plan(
        self,
        need: LayerNeed,
        table: ResidencyTable,
        now_us: float,
        predicted: tuple[NDArray[np.floating], NDArray[np.floating]] | None,
    ) -> Plan:
        """What to do about a layer's needs.

        Args:
            now_us: by any clock that goes on.
            predicted: made at this layer: expected tokens and probability of use, (d, E) each, for the layers behind
                it; rows beyond the last layer hold zeros. With a lag of 1 they are for `reconsider`, and for the next
                layer's plan.
        """
        former, self._former = self._former, predicted
        if predicted is not None and self.knobs.lag:
            # Those of the layer before; the first layer has none.
            predicted = (
                former if need.moe_layer else (np.zeros_like(predicted[0]), np.zeros_like(predicted[1]))
            )
        tokens_dE, used_dE = (self._nothing, self._nothing) if predicted is None else predicted
        # No more can be left than prefetches under way; the errors of what copies are believed to take would add up.
        under_way = now_us + int(table.in_flight.sum()) * self.costs.link_busy_us
        self._link_free_us = min(self._link_free_us, under_way)
        of_layer = Need(need.experts, need.tokens, need.num_hits, need.num_late)
        backlog_us = max(0.0, self._link_free_us - now_us)
        self._decided = of_layer, backlog_us
        return plan_layer(
            self.knobs,
            self.costs,
            need.moe_layer,
            of_layer,
            backlog_us,
            table.slot_of,
            table.key_of,
            table.policy.scores,
            self.memory
            if predicted is not None
            else self.memory._replace(predicted_dLE=self.memory.predicted_dLE[:0]),
            np.array(tokens_dE, dtype=np.float64),
            np.array(used_dE, dtype=np.float64),
        )

    def reconsider(self, moe_layer: int, plan: Plan, table: ResidencyTable) -> Plan:
        """The plan of the layer decided last, with the prefetches that its own predictions ask for, if it was decided
        without them.
        """
        if not self.knobs.lag or self._former is None or moe_layer + 1 == self._shape.num_layers:
            return plan
        need, backlog_us = self._decided
        tokens_dE, used_dE = (np.array(part, dtype=np.float64) for part in self._former)
        again = reconsider(
            self.knobs, self.costs, moe_layer, need, plan.num_load, backlog_us, table.slot_of, table.key_of,
            table.policy.scores, self.memory, tokens_dE, used_dE,
        )  # fmt: skip
        return plan._replace(prefetch=again.prefetch, keep=again.keep)

    def calibrated_cpu(self) -> tuple[float, FloatArray]:
        """What the CPU was calibrated to take: for a submission, and for one expert by its tokens."""
        return self._calibrated.cpu_base_us, self._calibrated.cpu_us

    def saw_step(self, rest_us: float, decide_us: float | None, gpu_us: float) -> None:
        """What a step's layers took besides their experts, and from the router's choice to the answer (None: no layer
        waited for one); medians. And one expert on the GPU, all of a layer's together and its share of their launches.
        """
        old = self.costs
        decide_us = old.decide_us if decide_us is None else decide_us
        self.costs = old._replace(
            rest_us=old.rest_us + NEWEST * (rest_us - old.rest_us),
            decide_us=old.decide_us + NEWEST * (decide_us - old.decide_us),
            gpu_us=old.gpu_us + NEWEST * (gpu_us - old.gpu_us),
        )

    def saw_link(self, took_us: Sequence[float], has_cpu: bool) -> None:
        """What copies of one expert took on the link in a step, and whether the CPU computed any in it."""
        calibrated = self._calibrated
        each_us = calibrated.link_busy_us if has_cpu else calibrated.link_us
        if not took_us or each_us == 0.0:
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
        """What a step's submissions to the CPU took together, and should have taken as calibrated; zeros for none."""
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
        """The link was given so many experts more."""
        self._link_free_us = max(self._link_free_us, now_us) + num_copies * self.costs.link_us


def _within(ratio: float, most: float) -> float:
    return float(min(max(ratio, 1.0 / most), most))

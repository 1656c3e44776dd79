"""All that is decided about one layer: its plan, its slots, its prefetches; the code that engine and simulator share.

Shapes: n experts needed, E experts of a layer, L MoE layers, d layers ahead.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache.policies import learn
from ..cache.slots import SortedNeed, sort_need, take_slots, use_prefetched
from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from .learn import discount, learn_reuse, learn_trust, reuse_lasts
from .plan import plan
from .types import Costs, Memory, Plan, ScheduleSettings


@jit
def plan_layer(
    settings: ScheduleSettings,
    costs: Costs,
    moe_layer: int,
    need: SortedNeed,
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
        tokens_dE, used_dE: as predicted `settings.lag` layers ago, for the layers behind that one; changed.
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
        learn_trust(memory.trust, moe_layer, counts_E, memory.predicted_dLE, settings.threshold)
    take_down(memory, moe_layer, settings.lag, tokens_dE, used_dE)
    lag = min(settings.lag, d)
    return plan(
        settings, costs, moe_layer, num_layers, need, backlog_us, slot_of, tokens_dE[lag:], used_dE[lag:], key_of,
        scores, reuse_lasts(memory.reuse),
    )  # fmt: skip


@jit
def reconsider(
    settings: ScheduleSettings,
    costs: Costs,
    moe_layer: int,
    need: SortedNeed,
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
        settings, costs, moe_layer, num_layers, need, backlog_us, slot_of, tokens_dE, used_dE, key_of, scores,
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

    need: SortedNeed
    num_prefetched: int  # as in `residency.LayerNeed`
    plan: Plan
    slots: IntArray  # (k,) of the misses that are copied, in their order
    #: (m + 1,): the pairs of the i-th expert on the CPU are lot_pairs[lot_first[i] : lot_first[i + 1]].
    cpu_first: IntArray
    cpu_pairs: IntArray  # (p,) pairs (t * K + k) of the experts on the CPU


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
    settings: ScheduleSettings,
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
        settings, costs, moe_layer, need, backlog_us, slots.slot_of, slots.key_of, slots.scores, memory, tokens_dE,
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
    cpu_first, place = np.zeros(len(cold) + 1, np.int64), np.full(num_experts, -1)
    for i in range(len(cold)):
        cpu_first[i + 1] = cpu_first[i] + counts[cold[i]]
        place[cold[i]] = cpu_first[i]
    cpu_pairs = np.empty(cpu_first[-1], np.int64)
    for pair in range(len(ids)):
        expert = ids[pair]
        if 0 <= expert < num_experts and place[expert] >= 0:
            cpu_pairs[place[expert]] = pair
            place[expert] += 1
    return Decision(need, num_prefetched, chosen, taken, cpu_first, cpu_pairs)

"""Everything that is decided about one layer; engine and simulator call the same functions, in this order.

`decide_layer` says what serves the layer, as soon as its router has chosen: the GPU, the link and the CPU wait for
that. `learn_layer` comes before the layer's copies take their slots, and `prefetch_layer` behind that, while the layer
computes.

Shapes: n experts needed, E experts of a layer, L MoE layers, d layers ahead.
"""

from typing import NamedTuple

import numpy as np

from ..cache.policies import learn
from ..cache.slots import Slots, SortedNeed, by_landing, renew_bound, sort_need, use_prefetched
from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from .fill import KnownUses
from .learn import discount, gain_of_swap, learn_reuse, learn_swaps, learn_trust, reuse_lasts
from .plan import PRESCHED, Situation, keys_to_keep, make_plan, make_prefetches
from .types import Costs, Memory, Plan, Prefetches, ScheduleSettings


class Decision(NamedTuple):
    """What serves one layer."""

    found: SortedNeed  # as its experts were found
    need: SortedNeed  # as they are served: late ones that are not waited for are misses, behind those that are copied
    num_load: int  # misses that are copied, the first ones; the CPU computes the others
    keep: IntArray  # keys that are evicted last for these copies


@jit
def decide_layer(
    settings: ScheduleSettings,
    costs: Costs,
    moe_layer: int,
    experts: IntArray,
    tokens: IntArray,
    backlog_us: float,
    slots: Slots,
    memory: Memory,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
) -> Decision:
    """Decide what serves a layer, now that its router has chosen.

    What the layer itself teaches is for the next one (`learn_layer`): nobody waits for it.

    Args:
        experts: (n,) distinct, ascending; `tokens` (n,) of each.
        backlog_us: until the link is done with what is on it. `memory`: changed.
        tokens_dE, used_dE: as predicted `settings.lag` layers ago, for the layers after that one; changed: weighed by
            how good earlier predictions were.
    """
    E = memory.former_LE.shape[1]
    found = sort_need(experts, tokens, slots.slot_of[moe_layer * E + experts], slots.in_flight)
    by_landing(found, moe_layer * E, slots)
    take_down(memory, moe_layer, settings.lag, tokens_dE, used_dE)
    now = _situation(
        settings, costs, moe_layer, found, -1, backlog_us, slots, memory, tokens_dE, used_dE, settings.lag
    )
    plan = make_plan(now)
    keep = keys_to_keep(now) if plan.num_load > 0 else np.empty(0, np.int64)
    return Decision(found, as_served(found, plan), plan.num_load, keep)


@jit
def learn_layer(
    settings: ScheduleSettings,
    policy: int,
    tick: int,
    moe_layer: int,
    decision: Decision,
    experts: IntArray,
    weights: FloatArray,
    slots: Slots,
    memory: Memory,
) -> int:
    """Learn from what a layer needs; call before its copies take their slots.

    Args:
        policy: kind of the cache policy. `tick`: layers it has learned from, this one too.
        experts: (n,) distinct, ascending; `weights` (n,) what the cache policy weighs them by.
        memory: changed.

    Returns: as in `residency.LayerNeed`: experts in slots that a prefetch brought, and that were not used since.
    """
    E, found, need = memory.former_LE.shape[1], decision.found, decision.need
    learn(policy, slots.scores, tick, moe_layer, E, experts, weights, slots.slot_of)
    renew_bound(slots, moe_layer)
    if settings.schedule == PRESCHED:  # the others do not ask for habits
        _learn_habits(memory, moe_layer, found, slots.slot_of)
    if len(memory.predicted_dLE):
        counts_E, needed, tokens = np.zeros(E, np.int64), found.experts, found.tokens
        for i in range(len(needed)):
            counts_E[needed[i]] = tokens[i]
        learn_trust(memory.trust, moe_layer, counts_E, memory.predicted_dLE, settings.threshold)
    here = need.experts[: need.num_hits + need.num_late]
    return use_prefetched(slots.prefetched, slots.slot_of[moe_layer * E + here])


@jit
def prefetch_layer(
    settings: ScheduleSettings,
    costs: Costs,
    moe_layer: int,
    decision: Decision,
    backlog_us: float,
    slots: Slots,
    memory: Memory,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
    is_own: bool,
) -> Prefetches:
    """Decide what the link copies ahead, now that a layer's own copies have their slots.

    Args:
        decision, backlog_us: as it was decided.
        tokens_dE, used_dE: predictions, changed. `is_own`: made at this layer and not looked at before; if not, as
            `decide_layer` left them.
    """
    lag = settings.lag
    if is_own:
        lag = 0
        take_down(memory, moe_layer, 0, tokens_dE, used_dE)
    now = _situation(
        settings, costs, moe_layer, decision.need, decision.num_load, backlog_us, slots, memory, tokens_dE, used_dE,
        lag,
    )  # fmt: skip
    return make_prefetches(now)


@jit
def _situation(
    settings: ScheduleSettings,
    costs: Costs,
    moe_layer: int,
    need: SortedNeed,
    num_load: int,
    backlog_us: float,
    slots: Slots,
    memory: Memory,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
    lag: int,
) -> Situation:
    """Predictions of `lag` layers ago say something about the layers after this one only."""
    lag = min(lag, len(used_dE))
    return Situation(
        settings, costs, moe_layer, memory.former_LE.shape[0], need, backlog_us, slots, tokens_dE[lag:], used_dE[lag:],
        _habits(memory), num_load,
    )  # fmt: skip


@jit
def _learn_habits(memory: Memory, moe_layer: int, need: SortedNeed, slot_of: IntArray) -> None:
    former_E, num_absent = memory.former_LE[moe_layer], 0
    first, end = moe_layer * len(former_E), (moe_layer + 1) * len(former_E)
    for key in range(first, end):
        num_absent += slot_of[key] < 0
    num_misses = len(need.experts) - need.num_hits - need.num_late
    learn_reuse(memory.reuse, former_E, need.experts, num_misses, num_absent)
    learn_swaps(
        memory.swaps, memory.credit[first:end], memory.copied[first:end], slot_of[first:end], len(memory.former_LE),
        need.experts,
    )  # fmt: skip


@jit
def _habits(memory: Memory) -> KnownUses:
    return KnownUses(
        reuse_lasts(memory.reuse), gain_of_swap(memory.swaps), memory.swaps, memory.credit, memory.copied
    )


@jit
def take_down(memory: Memory, moe_layer: int, lag: int, tokens_dE: FloatArray, used_dE: FloatArray) -> None:
    """Keep the predictions that were made `lag` layers before this one, for the layers after it, and scale them by
    how good such predictions were.
    """
    made_at = moe_layer - lag
    predicted_dLE = memory.predicted_dLE
    d, num_layers, E = predicted_dLE.shape
    for ahead in range(1, d + 1):
        tokens_E, used_E = tokens_dE[ahead - 1], used_dE[ahead - 1]
        of = made_at + ahead
        if made_at < 0 or of >= num_layers:
            tokens_E[:], used_E[:] = 0.0, 0.0
            continue
        factor = discount(memory.trust, ahead)
        for e in range(E):
            # Predictions from hidden states that are not finite say nothing, and would spoil trust for good.
            is_finite = (abs(used_E[e]) < np.inf) & (abs(tokens_E[e]) < np.inf)
            used_E[e] = used_E[e] if is_finite else 0.0
            tokens_E[e] = factor * tokens_E[e] if is_finite else 0.0
        if ahead > lag:  # this layer's own were compared with what it used
            predicted_dLE[ahead - 1, of] = used_E
        used_E *= factor


@jit
def as_served(need: SortedNeed, plan: Plan) -> SortedNeed:
    """A need with the late ones that are not waited for behind the misses that are copied."""
    begin = need.num_hits + plan.num_wait
    late = need.num_late - plan.num_wait
    if late == 0:
        return need
    experts, tokens = need.experts.copy(), need.tokens.copy()
    for one, other in ((need.experts, experts), (need.tokens, tokens)):
        other[begin : begin + plan.num_load] = one[begin + late : begin + late + plan.num_load]
        other[begin + plan.num_load : begin + plan.num_load + late] = one[begin : begin + late]
    return SortedNeed(experts, tokens, need.num_hits, plan.num_wait)


@jit
def count_experts(ids: IntArray, num_experts: int) -> tuple[IntArray, IntArray]:
    """Distinct experts (n,) of a layer's choice (P,), ascending, and their tokens (n,); other ids are left out."""
    counts = np.zeros(num_experts, np.int64)
    for expert in ids:
        if 0 <= expert < num_experts:
            counts[expert] += 1
    experts = np.flatnonzero(counts).astype(np.int64)
    return experts, counts[experts]

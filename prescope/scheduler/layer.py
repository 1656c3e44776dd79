"""Everything that is decided about one layer; engine and simulator call the same functions.

Shapes: n experts needed, E experts of a layer, L MoE layers, d layers ahead.
"""

from typing import NamedTuple

import numpy as np

from ..cache.policies import learn
from ..cache.slots import Slots, SortedNeed, by_landing, renew_bound, sort_need, use_prefetched
from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from .fill import Habits
from .learn import (
    discount,
    learn_returns,
    learn_reuse,
    learn_trust,
    learn_uses,
    misses_return,
    reuse_lasts,
    share_lasts,
)
from .plan import PRESCHED, Situation, make_plan
from .types import Costs, Memory, Plan, ScheduleSettings


@jit
def plan_layer(
    settings: ScheduleSettings,
    costs: Costs,
    moe_layer: int,
    need: SortedNeed,
    backlog_us: float,
    slots: Slots,
    memory: Memory,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
    is_revised: bool,
) -> Plan:
    """Plan one layer; predictions are weighed by how good earlier ones were.

    Args:
        memory: changed.
        tokens_dE, used_dE: as predicted `settings.lag` layers ago, for the layers after that one; changed.
        is_revised: see `decide_layer`.
    """
    d, num_layers, E = memory.predicted_dLE.shape
    if settings.schedule == PRESCHED:  # the others do not ask for habits
        _learn_habits(memory, moe_layer, need, slots.slot_of)
    if d:
        counts_E, experts, tokens = np.zeros(E, np.int64), need.experts, need.tokens
        for i in range(len(experts)):
            counts_E[experts[i]] = tokens[i]
        learn_trust(memory.trust, moe_layer, counts_E, memory.predicted_dLE, settings.threshold)
    take_down(memory, moe_layer, settings.lag, tokens_dE, used_dE)
    lag = min(settings.lag, d)
    return make_plan(Situation(
        settings, costs, moe_layer, num_layers, need, backlog_us, slots, tokens_dE[lag:], used_dE[lag:],
        _habits(memory), -1, is_revised,
    ))  # fmt: skip


@jit
def reconsider(
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
) -> Plan:
    """Decide a layer's prefetches again, when its own predictions have come: with a lag it was decided without them.

    Args:
        need, num_load, backlog_us: as it was decided. The rest as `plan_layer`, as it is now.
        tokens_dE, used_dE: as predicted at this layer; changed.
    """
    take_down(memory, moe_layer, 0, tokens_dE, used_dE)
    num_layers = memory.predicted_dLE.shape[1]
    return make_plan(Situation(
        settings, costs, moe_layer, num_layers, need, backlog_us, slots, tokens_dE, used_dE, _habits(memory),
        num_load, False,
    ))  # fmt: skip


@jit
def _learn_habits(memory: Memory, moe_layer: int, need: SortedNeed, slot_of: IntArray) -> None:
    former_E, num_absent = memory.former_LE[moe_layer], 0
    first = moe_layer * len(former_E)
    for key in range(first, first + len(former_E)):
        num_absent += slot_of[key] < 0
    num_misses = len(need.experts) - need.num_hits - need.num_late
    learn_uses(memory.shares, memory.uses_LE, former_E, slot_of, moe_layer, need.experts)
    learn_reuse(memory.reuse, former_E, need.experts, num_misses, num_absent)
    learn_returns(memory.returns, memory.missed_LE[moe_layer], need)


@jit
def _habits(memory: Memory) -> Habits:
    return Habits(
        reuse_lasts(memory.reuse),
        misses_return(memory.returns, memory.reuse),
        memory.uses_LE.ravel(),
        share_lasts(memory.shares),
        1.0 / max(1.0, memory.shares[0]),
        memory.uses_LE.shape[1],
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
        is_layer = made_at >= 0 and made_at + ahead < num_layers
        factor = discount(memory.trust, ahead) if is_layer else 0.0
        for e in range(E):
            # Predictions from hidden states that are not finite say nothing, and would spoil trust for good.
            if not (np.isfinite(used_dE[ahead - 1, e]) and np.isfinite(tokens_dE[ahead - 1, e])):
                used_dE[ahead - 1, e] = tokens_dE[ahead - 1, e] = 0.0
            if is_layer and ahead > lag:  # this layer's own were compared with what it used
                predicted_dLE[ahead - 1, made_at + ahead, e] = used_dE[ahead - 1, e]
            used_dE[ahead - 1, e] *= factor
            tokens_dE[ahead - 1, e] *= factor


class Decision(NamedTuple):
    """What is decided about one layer."""

    need: SortedNeed  # late ones that are not waited for are misses, behind those that are copied
    num_prefetched: int  # as in `residency.LayerNeed`
    plan: Plan


@jit
def decide_layer(
    settings: ScheduleSettings,
    costs: Costs,
    policy: int,
    tick: int,
    moe_layer: int,
    experts: IntArray,
    tokens: IntArray,
    weights: FloatArray,
    backlog_us: float,
    slots: Slots,
    memory: Memory,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
    is_revised: bool = False,
) -> Decision:
    """Decide about one layer, now that its router has chosen; the cache policy learns what it needs.

    Args:
        policy: kind of the cache policy. `tick`: layers it has learned from, this one too.
        experts: (n,) distinct, ascending; `tokens` (n,) of each, `weights` (n,) what the cache policy weighs them by.
        backlog_us: until the link is done with what is on it. `memory`: changed.
        tokens_dE, used_dE: as predicted `settings.lag` layers ago, for the layers after that one; changed.
        is_revised: `reconsider` will say what is prefetched, or nothing is: the plan may name none.
    """
    E = memory.former_LE.shape[1]
    of_experts = slots.slot_of[moe_layer * E + experts]
    need = sort_need(experts, tokens, of_experts, slots.in_flight)
    by_landing(need, moe_layer * E, slots)
    learn(policy, slots.scores, tick, moe_layer, E, experts, weights, slots.slot_of)
    renew_bound(slots, moe_layer)
    plan = plan_layer(
        settings, costs, moe_layer, need, backlog_us, slots, memory, tokens_dE, used_dE, is_revised
    )
    need = _as_served(need, plan)
    here = need.experts[: need.num_hits + need.num_late]
    return Decision(need, use_prefetched(slots.prefetched, slots.slot_of[moe_layer * E + here]), plan)


@jit
def _as_served(need: SortedNeed, plan: Plan) -> SortedNeed:
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

"""Make a layer's plan by any schedule; engine and simulator call the same functions.

Plain loops over arrays, compiled by numba; no clock, no bytes, no objects. Shapes: n experts needed, E experts of a
layer, L MoE layers, S slots, d layers ahead. Keys are flat: moe_layer * E + expert.
"""

import numpy as np

from ..cache.slots import Slots, SortedNeed
from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from .baselines import artefact, fiddler, hybrimoe, static_split
from .impact import by_impact
from .presched import split
from .types import Costs, Plan, ScheduleSettings, cpu_time

(
    ON_DEMAND, STREAMING, KLOTSKI, FATE, FIDDLER, HYBRIMOE, MOE_INFINITY, PRESCHED, STATIC_SPLIT, ARTEFACT
) = range(10)  # fmt: skip
#: Sequences of a step above which the artefact prefetches.
ARTEFACT_BATCH = 16

#: Share by which the planned time may be wrong: experts that are almost certain to be used are prefetched for so much
#: more link time. They are copied only while the link is idle, and dropped when the next router has chosen.
#: Without, costs that make plans too short by a half lose 10 to 15 %; where costs are right it loses 0.3 %
#: (docs/log/scheduler.md).
ERROR_MARGIN = 0.3
#: Least probability of use of an expert that is almost certain. With 0.75 an inverted predictor cost 6 % at batch 64,
#: with 0.85 it costs 2 %.
CERTAIN = 0.85
#: An expert that the CPU computed saves its time so many times once it is in a slot, weighed by `reuse_lasts`; below
#: the second number it is not copied. 1.5 loses up to 14 % at batch 1 of tiny-moe's own text without a predictor, 2.5
#: another 1 % at batch 4; a fixed bound of 0.35, as it was, lost a third at batch 1 (simulated, docs/log/scheduler.md).
REUSES_OF_A_COPY, LEAST_LASTING = 2.0, 0.05
#: From this `reuse_lasts` on, experts predicted with less than the first probability are copied after those that the
#: CPU computed, and with less than the second not at all: the experts in slots are likelier to be used.
LONG_LASTING = 0.35
LIKELY, LEAST_BESIDE_REUSE = 0.5, 0.3


@jit
def wanted(
    settings: ScheduleSettings, moe_layer: int, slot_of: IntArray, tokens_E: FloatArray, used_E: FloatArray
) -> IntArray:
    """Keys of a coming layer that are worth prefetching: absent, likely enough, most tokens first."""
    E = len(tokens_E)
    first = moe_layer * E
    found, negative = np.empty(E, np.int64), np.empty(E)
    count = 0
    for expert in range(E):
        if used_E[expert] >= settings.threshold and used_E[expert] > 0 and slot_of[first + expert] < 0:
            found[count], negative[count] = first + expert, -tokens_E[expert]
            count += 1
    order = np.argsort(negative[:count], kind="mergesort")
    return found[order[: settings.width]]


@jit
def likely(settings: ScheduleSettings, moe_layer: int, num_layers: int, used_dE: FloatArray) -> IntArray:
    """Keys of coming layers that are likely to be used there, be they in slots or still to come."""
    d, E = used_dE.shape
    found = np.empty(d * E, np.int64)
    count = 0
    for ahead in range(1, min(settings.lookahead, d, num_layers - 1 - moe_layer) + 1):
        first = (moe_layer + ahead) * E
        for expert in range(E):
            if used_dE[ahead - 1, expert] >= settings.threshold and used_dE[ahead - 1, expert] > 0:
                found[count] = first + expert
                count += 1
    return found[:count]


@jit
def is_worth_copying(costs: Costs, tokens: IntArray, layer_us: float, lasting: float) -> bool:
    """Whether to copy experts that the CPU computes, with their tokens (n,), while the link is idle.

    A copy saves the CPU's time when the expert is used again, and slows the CPU down meanwhile: both read the same
    memory.

    Args:
        layer_us: until the next router has chosen. `lasting`: see `reuse_lasts`.
    """
    n = len(tokens)
    if n == 0 or lasting < LEAST_LASTING:
        return False
    cpu_us = costs.cpu_base_us
    for i in range(n):
        cpu_us += cpu_time(costs.cpu_us, tokens[i])
    slower = 1.0 - costs.cpu_alone_us[1] / max(costs.cpu_us[1], 1e-9)
    lost_us = cpu_us / max(cpu_us, layer_us, 1e-9) * costs.link_us * slower
    return lasting * REUSES_OF_A_COPY * cpu_us / n >= lost_us


@jit
def worth_a_slot(keys: IntArray, most: int, slots: Slots) -> IntArray:
    """Of experts (n,) without a slot, at most `most` that the cache rates above its lowest ones, the best first.

    The i-th best must be better than the i-th least of those in slots.
    """
    most = min(most, len(keys))
    least = np.full(most, np.inf)
    for key in slots.key_of:
        score = -np.inf if key < 0 else slots.scores[key]
        at = most
        while at > 0 and least[at - 1] > score:
            if at < most:
                least[at] = least[at - 1]
            at -= 1
        if at < most:
            least[at] = score
    order = np.argsort(-slots.scores[keys], kind="mergesort")
    count = 0
    while count < most and slots.scores[keys[order[count]]] > least[count]:
        count += 1
    return keys[order[:count]]


@jit
def make_plan(
    settings: ScheduleSettings,
    costs: Costs,
    moe_layer: int,
    num_layers: int,
    need: SortedNeed,
    backlog_us: float,
    slots: Slots,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
    lasting: float,
    num_load: int = -1,
) -> Plan:
    """Decide about one layer, when its router has chosen.

    Args:
        need: of this layer. `backlog_us`: until the link is done with what is on the wire.
        tokens_dE, used_dE: predictions for the d layers after this one: expected number of tokens that use an expert,
            and probability that any does; rows beyond the last layer hold zeros.
        lasting: see `reuse_lasts`.
        num_load: how many misses are copied, if that is decided and only prefetches are asked for (PreSched).
    """
    nothing = np.empty(0, np.int64)
    here = need.num_hits + need.num_late
    missing = need.tokens[here:]
    n = len(missing)
    d, E = used_dE.shape
    ahead = min(settings.lookahead, d, num_layers - 1 - moe_layer)
    if settings.schedule == ON_DEMAND or settings.schedule == FIDDLER:
        k = fiddler(costs, missing) if settings.schedule == FIDDLER else n
        return Plan(k, nothing, nothing)
    if settings.schedule == STATIC_SPLIT:
        return Plan(static_split(costs, missing), nothing, nothing)
    if settings.schedule == STREAMING or settings.schedule == KLOTSKI:
        if moe_layer + 1 == num_layers:
            return Plan(n, nothing, nothing)
        row = np.zeros(E)
        if settings.schedule == KLOTSKI and d > 0:  # hottest first
            row[:] = tokens_dE[0]
        whole = ScheduleSettings(settings.schedule, 1, E, 0.0)
        first = (moe_layer + 1) * E
        return Plan(
            n, wanted(whole, moe_layer + 1, slots.slot_of, row, np.ones(E)), np.arange(first, first + E)
        )
    candidates = nothing
    if ahead > 0:
        candidates = wanted(settings, moe_layer + 1, slots.slot_of, tokens_dE[0], used_dE[0])
    # Under any schedule, what was prefetched, or is there and predicted, makes no room for the next prefetch: in an
    # LRU order it would be the first to go (docs/log/scheduler.md: the others gain 2 to 10 % by it, PreSched 0.5 %).
    keep = likely(settings, moe_layer, num_layers, used_dE)
    if settings.schedule == FATE or settings.schedule == MOE_INFINITY:
        return Plan(n, candidates, keep)
    if settings.schedule == HYBRIMOE:
        k = hybrimoe(costs, missing, here, backlog_us)
        gains = by_impact(
            settings, costs, moe_layer, need, k, backlog_us, slots, tokens_dE[:ahead], used_dE[:ahead]
        )
        return Plan(k, gains, keep)
    if settings.schedule == ARTEFACT:
        k = artefact(costs, missing)
        is_batch = need.tokens.sum() > ARTEFACT_BATCH * settings.top_k
        return Plan(k, candidates, keep) if is_batch else Plan(k, nothing, nothing)
    first = (moe_layer + 1) * E
    is_lasting, others, least = lasting >= LONG_LASTING, nothing, settings.threshold
    if is_lasting:
        least = max(least, LEAST_BESIDE_REUSE)
    likelier = ScheduleSettings(settings.schedule, settings.lookahead, settings.width, least, settings.lag)
    if is_lasting and ahead > 0:
        next_E = used_dE[0][candidates - first]
        others = candidates[(next_E < LIKELY) & (next_E >= least)]
        candidates = candidates[next_E >= LIKELY]
    m = len(candidates)
    next_tokens, next_used = np.empty(m), np.empty(m)
    # The next layer serves the same tokens. A predictor that expects more of them errs by that factor, and the CPU
    # would seem so slow that everything is prefetched: an inverted one cost 43 % at batch 64 before
    # (docs/log/scheduler.md).
    scale = min(1.0, need.tokens.sum() / max(1e-9, tokens_dE[0].sum())) if m > 0 else 1.0
    for j in range(m):
        next_tokens[j] = scale * tokens_dE[0, candidates[j] - first]
        next_used[j] = used_dE[0, candidates[j] - first]
    k, p, window_us, done_us, free_us = split(
        costs, missing, here, need.num_late, backlog_us, next_tokens, next_used, num_load
    )
    most = min(m, p + int(ERROR_MARGIN * window_us / costs.link_us))
    end = p
    while end < most and next_used[end] >= CERTAIN:
        end += 1
    prefetch = candidates[:end]
    left = free_us - m * costs.link_us
    if p < m or left <= 0:
        return Plan(k, prefetch, keep)
    # What the CPU computes would never come into the slots, however often it is used again: 7 to 44 points of hits
    # behind LRU on demand, on traces whose tokens mostly choose what the one before chose (simulated,
    # docs/log/cache.md).
    cold = moe_layer * E + need.experts[here + k :]
    layer_us = done_us + costs.rest_us + costs.decide_us
    room = int(left / costs.link_us) if is_worth_copying(costs, missing[k:], layer_us, lasting) else 0
    again = worth_a_slot(cold, room, slots)
    others = others[: max(0, int(left / costs.link_us) - len(again))]
    left -= (len(again) + len(others)) * costs.link_us
    prefetch = np.concatenate((prefetch, again, others))
    # Link time that the next layer has no use for goes to the layers after it.
    for further in range(2, ahead + 1):
        if left <= 0:
            break
        more = wanted(
            likelier, moe_layer + further, slots.slot_of, tokens_dE[further - 1], used_dE[further - 1]
        )
        more = more[: int(left / costs.link_us) + 1]
        left -= len(more) * costs.link_us
        prefetch = np.concatenate((prefetch, more))
    return Plan(k, prefetch, keep)

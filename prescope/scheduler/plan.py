"""Make a layer's plan by any schedule; engine and simulator call the same functions.

Plain loops over arrays, compiled by numba; no clock, no bytes, no objects. Shapes: n experts needed, E experts of a
layer, L MoE layers, S slots, d layers ahead. Keys are flat: moe_layer * E + expert.
"""

from typing import NamedTuple

import numpy as np

from ..cache.slots import Slots, SortedNeed, landing_us, slots_to_give
from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from .baselines import artefact, fiddler, hybrimoe, static_split
from .fill import KnownUses, cpu_of, pays, price_us, watch_demand, worth_a_copy
from .impact import by_impact
from .presched import NOTHING_LATER, Later, split
from .types import Costs, Plan, Prefetches, ScheduleSettings, cpu_time

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
#: From this `reuse_lasts` on, experts predicted with less than the first probability are copied after those that the
#: CPU computed, and with less than the second not at all: the experts in slots are likelier to be used.
LONG_LASTING = 0.35
LIKELY, LEAST_BESIDE_REUSE = 0.5, 0.3


class Situation(NamedTuple):
    """What a plan is made of: a layer whose router has chosen, and what is expected of the next ones."""

    settings: ScheduleSettings
    costs: Costs
    moe_layer: int
    num_layers: int
    need: SortedNeed  # of this layer, late ones by when they land
    backlog_us: float  # until the link is done with what is on the wire
    slots: Slots
    tokens_dE: FloatArray  # for the d layers after this one: expected number of tokens that use an expert
    used_dE: FloatArray  # probability that any does; rows beyond the last layer hold zeros in both
    habits: KnownUses  # for PreSched
    num_load: int = -1  # how many misses are copied, once that is decided: for `make_prefetches`


@jit
def wanted(
    settings: ScheduleSettings, moe_layer: int, slot_of: IntArray, tokens_E: FloatArray, used_E: FloatArray
) -> IntArray:
    """Keys of a coming layer that are worth prefetching: absent, likely enough, most tokens first."""
    E = len(tokens_E)
    first = moe_layer * E
    found, negative = np.empty(E + 1, np.int64), np.empty(E + 1)
    count = 0
    for expert in range(E):  # without branches, which nobody could foresee
        found[count], negative[count] = first + expert, -tokens_E[expert]
        count += (used_E[expert] >= settings.threshold) & (used_E[expert] > 0) & (slot_of[first + expert] < 0)
    order = np.argsort(negative[:count], kind="mergesort")
    return found[order[: settings.width]]


@jit
def likely(settings: ScheduleSettings, moe_layer: int, num_layers: int, used_dE: FloatArray) -> IntArray:
    """Keys of coming layers that are likely to be used there, be they in slots or still to come."""
    d, E = used_dE.shape
    found = np.empty(d * E + 1, np.int64)
    count = 0
    for ahead in range(1, min(settings.lookahead, d, num_layers - 1 - moe_layer) + 1):
        first = (moe_layer + ahead) * E
        for expert in range(E):
            found[count], used = first + expert, used_dE[ahead - 1, expert]
            count += (used >= settings.threshold) & (used > 0)
    return found[:count]


@jit
def keys_to_keep(now: Situation) -> IntArray:
    """Keys that are evicted last while a layer's copies and prefetches take their slots.

    Under any schedule, what was prefetched, or is there and predicted, makes no room for the next prefetch: in an LRU
    order it would be the first to go (docs/log/scheduler.md: the others gain 2 to 10 % by it, PreSched 0.5 %).
    """
    settings, moe_layer, num_layers, used_dE = now.settings, now.moe_layer, now.num_layers, now.used_dE
    schedule = settings.schedule
    if schedule in (STREAMING, KLOTSKI):
        first, E = (moe_layer + 1) * used_dE.shape[1], used_dE.shape[1]
        return np.arange(first, first + (E if moe_layer + 1 < num_layers else 0))
    if schedule in (ON_DEMAND, FIDDLER, STATIC_SPLIT):
        return np.empty(0, np.int64)
    if schedule == ARTEFACT and not _is_batch(now):
        return np.empty(0, np.int64)
    return likely(settings, moe_layer, num_layers, used_dE)


@jit
def _is_batch(now: Situation) -> bool:
    return now.need.tokens.sum() > ARTEFACT_BATCH * now.settings.top_k


@jit
def make_plan(now: Situation) -> Plan:
    """Decide what serves one layer: which misses are copied, and which the CPU computes."""
    settings, costs, need = now.settings, now.costs, now.need
    here = need.num_hits + need.num_late
    missing = need.tokens[here:]
    num_load = len(missing)
    if settings.schedule == PRESCHED:
        linked = _window(now).linked
        return Plan(min(linked, need.num_late), max(0, linked - need.num_late))
    if settings.schedule == FIDDLER:
        num_load = fiddler(costs, missing)
    elif settings.schedule == STATIC_SPLIT:
        num_load = static_split(costs, missing)
    elif settings.schedule == HYBRIMOE:
        num_load = hybrimoe(costs, missing, here, now.backlog_us)
    elif settings.schedule == ARTEFACT:
        num_load = artefact(costs, missing)
    return Plan(need.num_late, num_load)


@jit
def make_prefetches(now: Situation) -> Prefetches:
    """Decide what the link copies ahead, now that a layer is served; `num_load` of its misses are copied."""
    settings, slots, moe_layer = now.settings, now.slots, now.moe_layer
    tokens_dE, used_dE, schedule = now.tokens_dE, now.used_dE, settings.schedule
    nothing, keep = np.empty(0, np.int64), keys_to_keep(now)
    d, E = used_dE.shape
    if schedule == PRESCHED:
        return Prefetches(_presched(now, keep), keep)
    if schedule in (STREAMING, KLOTSKI):
        if moe_layer + 1 == now.num_layers:
            return Prefetches(nothing, keep)
        row = np.zeros(E)
        if schedule == KLOTSKI and d > 0:  # hottest first
            row[:] = tokens_dE[0]
        whole = ScheduleSettings(schedule, 1, E, 0.0)
        return Prefetches(wanted(whole, moe_layer + 1, slots.slot_of, row, np.ones(E)), keep)
    ahead = _layers_ahead(now)
    if schedule == HYBRIMOE:
        gains = by_impact(
            settings, now.costs, moe_layer, now.need, now.num_load, now.backlog_us, slots, tokens_dE[:ahead],
            used_dE[:ahead],
        )  # fmt: skip
        return Prefetches(gains, keep)
    looks = schedule in (FATE, MOE_INFINITY) or (schedule == ARTEFACT and _is_batch(now))
    if not looks or ahead == 0:
        return Prefetches(nothing, keep)
    return Prefetches(wanted(settings, moe_layer + 1, slots.slot_of, tokens_dE[0], used_dE[0]), keep)


@jit
def _layers_ahead(now: Situation) -> int:
    """Layers that predictions are looked at for."""
    return min(now.settings.lookahead, len(now.used_dE), now.num_layers - 1 - now.moe_layer)


class Window(NamedTuple):
    """PreSched's optimum over a layer and the next one."""

    linked: int  # of the late ones and the misses, how many come over the link
    num_prefetched: int  # of the candidates
    window_us: float
    done_us: float  # the layer
    free_us: float  # of the link, before any prefetch; below 0: what it owes
    candidates: IntArray  # (m,) keys of the next layer, the most wanted first
    next_tokens: FloatArray  # (m,) expected of them
    next_used: FloatArray  # (m,) probability of use
    others: IntArray  # keys of the next layer that are less likely used than those in slots
    least: float  # probability of use from which on an expert is prefetched


@jit
def _window(now: Situation) -> Window:
    """The window's optimum; with `num_load`, if that is decided."""
    settings, costs, need, slots = now.settings, now.costs, now.need, now.slots
    moe_layer, tokens_dE, used_dE = now.moe_layer, now.tokens_dE, now.used_dE
    first = (moe_layer + 1) * used_dE.shape[1]
    candidates, least = np.empty(0, np.int64), settings.threshold
    is_ahead = _layers_ahead(now) > 0
    if is_ahead:
        candidates = wanted(settings, moe_layer + 1, slots.slot_of, tokens_dE[0], used_dE[0])
    others = candidates[:0]
    if now.habits.lasting >= LONG_LASTING:
        least = max(least, LEAST_BESIDE_REUSE)
        if is_ahead:
            next_E = used_dE[0][candidates - first]
            others = candidates[(next_E < LIKELY) & (next_E >= least)]
            candidates = candidates[next_E >= LIKELY]
    next_tokens, next_used = _of_next(need.tokens, candidates - first, tokens_dE, used_dE)
    late_us = landing_us(need, moe_layer * used_dE.shape[1], slots, now.backlog_us, costs.link_busy_us)
    linked, p, window_us, done_us, free_us = split(
        costs, need.tokens[need.num_hits :], need.num_hits, late_us, now.backlog_us, next_tokens, next_used,
        -1 if now.num_load < 0 else need.num_late + now.num_load, now.habits.gain, _later(now),
    )  # fmt: skip
    return Window(linked, p, window_us, done_us, free_us, candidates, next_tokens, next_used, others, least)


@jit
def _later(now: Situation) -> Later:
    """What the link's debts delay in the layer after the next one."""
    costs = now.costs
    if _layers_ahead(now) < 2 or len(costs.cpu_us) < 2:
        return NOTHING_LATER
    tokens_E, used_E, slot_of = now.tokens_dE[1], now.used_dE[1], now.slots.slot_of
    first = (now.moe_layer + 2) * len(used_E)
    tokens, used, lacking = 0.0, 0.0, 0.0
    for expert in range(len(used_E)):
        if slot_of[first + expert] < 0:
            lacking += used_E[expert]
            if tokens_E[expert] > tokens:
                tokens, used = tokens_E[expert], used_E[expert]
    if used <= 0.0:
        return NOTHING_LATER
    scale = min(1.0, now.need.tokens.sum() / tokens_E.sum())  # as in `_of_next`
    cpu_us = cpu_time(costs.cpu_us, max(1.0, scale * tokens / used))
    return Later(used, cpu_us, (lacking - used) * cpu_us)


@jit
def _presched(now: Situation, keep: IntArray) -> IntArray:
    """Keys that the window's optimum prefetches, and what the link copies while it has nothing else to do.

    Args:
        keep: see `keys_to_keep`.
    """
    settings, costs, need, slots, habits = now.settings, now.costs, now.need, now.slots, now.habits
    moe_layer, tokens_dE, used_dE = now.moe_layer, now.tokens_dE, now.used_dE
    window = _window(now)
    candidates, next_tokens, next_used = window.candidates, window.next_tokens, window.next_used
    others, p, m, own = window.others, window.num_prefetched, len(candidates), moe_layer * used_dE.shape[1]
    has_cpu = len(costs.cpu_us) > 1
    begin, is_copied = need.num_hits + need.num_late, habits.copied
    for i in range(begin, begin + now.num_load):
        is_copied[own + need.experts[i]] = 1
    cold = need.experts[need.num_hits + window.linked :]
    cpu_us = cpu_of(costs, need.tokens[need.num_hits + window.linked :])
    layer_us = window.done_us + costs.rest_us + costs.decide_us
    price = price_us(costs, cpu_us, layer_us)
    end, most = p, min(m, p + _copies_in(ERROR_MARGIN * window.window_us, costs))
    while end < most and next_used[end] >= CERTAIN and pays(costs, next_tokens[end], next_used[end], price):
        end += 1
    prefetch = candidates[:end]
    # While the CPU computes whatever is missing, a copy that is under way when the next router has chosen is in
    # nobody's way, however long it takes.
    is_free = has_cpu and now.num_load == 0 and (len(cold) > 0 or costs.cpu_us[1] <= costs.link_us)
    left = window.free_us - (p if is_free else m) * costs.link_us
    has_room = left > 0 and (p == m or is_free)
    # Link time that the next layer has no use for goes to the layers after it: a use that is foreseen is worth more
    # than the uses that a swap gains on average (up to 9 % where a copy takes longer than a layer, simulated:
    # docs/log/scheduler.md).
    likelier = ScheduleSettings(
        settings.schedule, settings.lookahead, settings.width, window.least, settings.lag
    )
    for further in range(2, _layers_ahead(now) + 1 if has_room else 2):
        if left <= 0:
            break
        more = _further(
            likelier, costs, moe_layer, further, left, layer_us, price, slots.slot_of, tokens_dE[further - 1],
            used_dE[further - 1],
        )  # fmt: skip
        left -= len(more) * costs.link_us
        prefetch = np.concatenate((prefetch, more))
    # What the CPU computes would never come into the slots, however often it is used again: 7 to 44 points of hits
    # behind LRU on demand, on traces whose tokens mostly choose what the one before chose (simulated,
    # docs/log/cache.md).
    absent = _absent(own, cold, slots.slot_of)  # late ones come without a further copy
    has_room = has_room and left > 0
    room = min(len(absent), _copies_in(left, costs) + (1 if is_free else 0)) if has_room else 0
    victims = slots_to_give(min(len(absent), max(1, room)), slots.in_flight, keep, slots)
    watch_demand(absent, victims, habits, slots)
    if not has_room:
        return prefetch
    again = worth_a_copy(absent, cpu_us / max(1, len(cold)), price, victims[:room], habits, slots)
    others = others[: max(0, _copies_in(left, costs) - len(again))]
    return np.concatenate((prefetch, again, others))


@jit
def _absent(first: int, experts: IntArray, slot_of: IntArray) -> IntArray:
    """Keys of a layer's experts (n,) that have no slot; `first`: key of its expert 0."""
    found, count = np.empty(len(experts), np.int64), 0
    for expert in experts:
        found[count] = first + expert
        count += slot_of[first + expert] < 0
    return found[:count]


@jit
def _copies_in(us: float, costs: Costs) -> int:
    """Whole copies that a time has room for; more than anybody wants where they take none."""
    return int(us / max(costs.link_us, 1e-6))


@jit
def _of_next(
    tokens: IntArray, candidates: IntArray, tokens_dE: FloatArray, used_dE: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Expected tokens and probability of use of the next layer's candidates (m,); `tokens` of what this layer needs."""
    m = len(candidates)
    if m == 0:
        return np.empty(0), np.empty(0)
    # The next layer serves the same tokens. A predictor that expects more of them errs by that factor, and the CPU
    # would seem so slow that everything is prefetched: an inverted one cost 43 % at batch 64 before
    # (docs/log/scheduler.md).
    scale = min(1.0, tokens.sum() / max(1e-9, tokens_dE[0].sum()))
    return scale * tokens_dE[0][candidates], used_dE[0][candidates]


@jit
def _further(
    settings: ScheduleSettings,
    costs: Costs,
    moe_layer: int,
    further: int,
    left_us: float,
    layer_us: float,
    price: float,
    slot_of: IntArray,
    tokens_E: FloatArray,
    used_E: FloatArray,
) -> IntArray:
    """Keys of a layer `further` layers ahead that land before it asks, and save more than their copies cost.

    Args:
        left_us: link time before the next router has chosen; one copy may outlast it. `layer_us`: of one layer.
    """
    layer = moe_layer + further
    more = wanted(settings, layer, slot_of, tokens_E, used_E)
    in_time = _copies_in(left_us + (further - 1) * layer_us, costs)
    most, count = min(len(more), _copies_in(left_us, costs) + 1, in_time), 0
    while count < most:
        expert = more[count] - layer * len(used_E)
        if not pays(costs, tokens_E[expert], used_E[expert], price):
            break
        count += 1
    return more[:count]

"""Decode steps on a virtual clock: the decisions are the engine's, only the time is made up of costs.

Compiled as one loop. Shapes: S steps, L MoE layers, E experts, d layers ahead. Keys are flat: moe_layer * E + expert.
Times are microseconds.

The machine it walks: one link that serves one copy at a time and interrupts none; the GPU; the CPU lane; and a host
that hears of each router's choice `decide_us` later, hands on-demand copies to the link at once and prefetches only
while fewer than `most_in_flight` copies of them are under way. The slots of a layer are safe until the next router
has spoken.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache import learn
from ..jit import jit
from ..scheduler.decide import discount, learn_trust, plan, sort_need, take_slots
from ..scheduler.terms import Costs, FloatArray, IntArray, Knobs, cpu_time

#: Columns of `Log.times_us`: the layer begins (the one before is done), its router has spoken, the host has decided,
#: the bytes are there, the GPU is done, the CPU is done (NaN without), the layer is done.
BEGIN, ROUTED, DECIDED, FETCHED, GPU_DONE, CPU_DONE, DONE = range(7)
#: Columns of `Log.counts`.
NEEDED, HITS, LATE, MISSES, ON_CPU = range(5)
#: Columns of `Log.copies`; the last is the rank of a `core.Reason`.
STEP, AT_LAYER, KEY, REASON = range(4)


class State(NamedTuple):
    """Slots and what the cache policy knows; changed by a replay."""

    slot_of: IntArray  # (L * E,)
    key_of: IntArray  # (slots,)
    scores: FloatArray  # (L * E,)
    tick: IntArray  # (1,)
    trust: FloatArray  # (d, 2), see `scheduler.decide.learn_trust`


class Demand(NamedTuple):
    """What each step needs, and what was predicted of it."""

    tokens_SLE: NDArray[np.int32]
    weights_SLE: NDArray[
        np.float32
    ]  # sums of router weights; (0, 0, 0) when the cache policy does not look at them
    #: Predictions for layer l made `a + 1` layers before it, zeros where there is no such layer; (0, ...) for none.
    expected_dSLE: NDArray[np.float32]  # tokens
    used_dSLE: NDArray[np.float32]  # probability that any token uses it


class Log(NamedTuple):
    """What happened."""

    times_us: FloatArray  # (S, L, 7)
    counts: IntArray  # (S, L, 5)
    step_end_us: FloatArray  # (S,)
    copies: IntArray  # (n, 4)
    copy_us: FloatArray  # (n, 2) start and end


@jit
def replay(
    knobs: Knobs,
    costs: Costs,
    policy: int,
    most_in_flight: int,
    step_us: float,
    start_us: float,
    state: State,
    demand: Demand,
) -> Log:
    """Run all steps from `start_us` on; `step_us` is what a step takes besides its layers.

    Args:
        policy: kind of the cache policy. `most_in_flight`: prefetches under way at most; 0 forbids them.
    """
    S, L, E = demand.tokens_SLE.shape
    d = len(demand.used_dSLE)
    slots = len(state.key_of)
    times = np.full((S, L, 7), np.nan)
    counts = np.zeros((S, L, 5), np.int64)
    step_end = np.zeros(S)
    copies, copy_us, num_copies = np.empty((1024, 4), np.int64), np.empty((1024, 2)), 0
    in_flight, protected = np.zeros(slots, np.bool_), np.zeros(slots, np.bool_)
    # Prefetches under way, as a queue: the link ends them in order. On-demand copies are waited for by their layer.
    wire_slot, wire_end = np.empty(E * L + 8, np.int64), np.empty(E * L + 8)
    wire_first = wire_last = 0
    held, held_next, held_since = np.empty(0, np.int64), 0, 0.0
    keep = np.empty(0, np.int64)
    one = np.empty(1, np.int64)
    no_weights = np.empty(0)
    tokens_dE, used_dE = np.zeros((d, E)), np.zeros((d, E))
    predicted_dLE = np.zeros((d, L, E))
    now = link_free = start_us
    for s in range(S):
        for layer in range(L):
            routed = now + costs.rest_us
            decided = routed + costs.decide_us
            # -- the link meanwhile: held prefetches are issued as earlier ones land
            while held_next < len(held):
                under_way = wire_last - wire_first
                issue = held_since
                if under_way >= most_in_flight:
                    issue = max(issue, wire_end[wire_last - most_in_flight]) if most_in_flight else np.inf
                if issue > decided:
                    break
                while wire_first < wire_last and wire_end[wire_first] <= issue:
                    in_flight[wire_slot[wire_first]] = False
                    wire_first += 1
                key = held[held_next]
                held_next += 1
                if state.slot_of[key] >= 0:
                    continue
                one[0] = key
                taken = take_slots(
                    one, state.key_of, state.slot_of, protected | in_flight, keep, state.scores
                )
                if len(taken) == 0:
                    break
                begin = max(issue, link_free)
                link_free = begin + costs.link_us
                in_flight[taken[0]] = True
                if wire_last == len(wire_end):  # move the queue to the front
                    rest = wire_last - wire_first
                    wire_slot[:rest], wire_end[:rest] = (
                        wire_slot[wire_first:wire_last],
                        wire_end[wire_first:wire_last],
                    )
                    wire_first, wire_last = 0, rest
                wire_slot[wire_last], wire_end[wire_last] = taken[0], link_free
                wire_last += 1
                if num_copies == len(copies):
                    copies, copy_us = _grown(copies, copy_us)
                copies[num_copies, 0], copies[num_copies, 1] = s, key // E
                copies[num_copies, 2], copies[num_copies, 3] = key, 1
                copy_us[num_copies, 0], copy_us[num_copies, 1] = begin, link_free
                num_copies += 1
            while wire_first < wire_last and wire_end[wire_first] <= decided:
                in_flight[wire_slot[wire_first]] = False
                wire_first += 1
            # -- the decision
            protected[:] = False
            tokens_E = demand.tokens_SLE[s, layer]
            experts = np.flatnonzero(tokens_E).astype(np.int64)
            first = layer * E
            need = sort_need(
                experts, tokens_E[experts].astype(np.int64), state.slot_of[first + experts], in_flight
            )
            state.tick[0] += 1
            weights = no_weights
            if len(demand.weights_SLE):
                weights = demand.weights_SLE[s, layer][need.experts].astype(np.float64)
            learn(policy, state.scores, state.tick[0], layer, E, need.experts, weights)
            if d:
                learn_trust(state.trust, layer, tokens_E, predicted_dLE, knobs.threshold)
            for ahead in range(1, d + 1):
                if layer + ahead < L:
                    factor = discount(state.trust, ahead)
                    for e in range(E):
                        used = demand.used_dSLE[ahead - 1, s, layer + ahead, e]
                        predicted_dLE[ahead - 1, layer + ahead, e] = used
                        used_dE[ahead - 1, e] = factor * used
                        tokens_dE[ahead - 1, e] = (
                            factor * demand.expected_dSLE[ahead - 1, s, layer + ahead, e]
                        )
                else:
                    used_dE[ahead - 1], tokens_dE[ahead - 1] = 0.0, 0.0
            backlog = max(0.0, link_free - decided)
            chosen = plan(knobs, costs, layer, L, need, backlog, state.slot_of, tokens_dE, used_dE)
            held, held_next, held_since, keep = chosen.prefetch, 0, decided, chosen.keep
            here = need.num_hits + need.num_late
            n = len(need.experts)
            k = chosen.num_load
            for expert in need.experts[:here]:
                protected[state.slot_of[first + expert]] = True
            on_cpu = n - here - k
            copy = costs.link_busy_us if on_cpu else costs.link_us
            if k:
                keys = first + need.experts[here : here + k]
                taken = take_slots(
                    keys, state.key_of, state.slot_of, protected | in_flight, keep, state.scores
                )
                for i in range(len(taken)):
                    protected[taken[i]] = True
                    begin = max(decided, link_free)
                    link_free = begin + copy
                    if num_copies == len(copies):
                        copies, copy_us = _grown(copies, copy_us)
                    copies[num_copies, 0], copies[num_copies, 1] = s, layer
                    copies[num_copies, 2], copies[num_copies, 3] = keys[i], 0
                    copy_us[num_copies, 0], copy_us[num_copies, 1] = begin, link_free
                    num_copies += 1
            # -- the clock. The layer waits for all that was on the link when it asked: copies land in order.
            fetched = max(decided, link_free) if k or need.num_late else decided
            computed = fetched + (here + k) * costs.gpu_us
            done = computed
            if on_cpu:
                busy = costs.cpu_base_us
                for i in range(here + k, n):
                    busy += cpu_time(costs.cpu_us, need.tokens[i])
                times[s, layer, 5] = decided + busy
                done = max(done, decided + busy)
            times[s, layer, 0], times[s, layer, 1], times[s, layer, 2] = now, routed, decided
            times[s, layer, 3], times[s, layer, 4], times[s, layer, 6] = fetched, computed, done
            counts[s, layer, 0], counts[s, layer, 1], counts[s, layer, 2] = n, need.num_hits, need.num_late
            counts[s, layer, 3], counts[s, layer, 4] = n - here, on_cpu
            now = done
        now += step_us
        step_end[s] = now
    return Log(times, counts, step_end, copies[:num_copies], copy_us[:num_copies])


@jit
def _grown(copies: IntArray, copy_us: FloatArray) -> tuple[IntArray, FloatArray]:
    """Twice the room, with what is there."""
    more, more_us = np.empty((2 * len(copies), 4), np.int64), np.empty((2 * len(copies), 2))
    more[: len(copies)], more_us[: len(copies)] = copies, copy_us
    return more, more_us

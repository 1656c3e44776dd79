"""Decode steps on a virtual clock: the decisions are the engine's, the times are computed from costs.

Compiled. Shapes: S steps, L MoE layers, E experts, d layers ahead; slots are counted by `len(key_of)`. Keys are flat:
moe_layer * E + expert. Times are microseconds.

The machine has one link, which makes one copy at a time and interrupts none, the GPU, the CPU lane and a host. The host
looks at what has landed when a router's choice reaches it, or after its last decision, and has decided `decide_us`
later. It then gives on-demand copies to the link, and prefetches only while it is not deciding and fewer than
`most_in_flight` of them are under way. It hands over one copy after the other, and none begins before that
(`handed_over`, `_prefetch`): the first one on demand comes before the answer, the others behind it, and of prefetches
it looks for the next layer's question between two. A layer whose experts are all in slots does not wait for the host.
The slots of a layer are safe until the next router has chosen. A layer that does not fit into the slots is served in
rounds, as the engine serves it (`rounds.walk`).

Where the host launches each layer (`is_layered`) rounds serve a layer that misses many too, and the host has no time to
watch the link: it gives prefetches to it twice a layer, behind the copies of the layer's last round and when its
experts are computed, when their slots are safe no more.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache.prefetch import NUM_WAITING, Waiting, next_prefetch, on_the_way, want
from ..cache.residency import ROUND_EXPERTS
from ..cache.slots import Slots, SortedNeed, take_slots
from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from ..scheduler.layer import decide_layer, learn_layer, prefetch_layer
from ..scheduler.presched import cpu_done, share_alone
from ..scheduler.types import Costs, Memory, ScheduleSettings, cpu_time

#: Columns of `Log.times_us`: the layer begins (the one before is done), its router has chosen, the host has decided or
#: is not waited for, all waits for bytes are over (with rounds: put before all compute), the GPU is done, the CPU is
#: done (NaN without), the layer is done; and when the host looked at what had landed, to decide.
BEGIN, ROUTED, DECIDED, FETCHED, GPU_DONE, CPU_DONE, DONE, LOOKED = range(8)
#: Columns of `Log.counts`.
NEEDED, HITS, LATE, MISSES, ON_CPU, ROUNDS, PREFETCHED = range(7)
#: Columns of `Log.copies`: the layer is the one that uses it, the reason one of the two below.
STEP, AT_LAYER, KEY, REASON = range(4)
ON_DEMAND, AHEAD = range(2)


class State(NamedTuple):
    """Slots and what the cache policy knows; changed by a replay."""

    slots: Slots
    tick: IntArray  # (1,)
    memory: Memory
    waiting: Waiting


class Demand(NamedTuple):
    """What some steps need, and what was predicted of them; see `prepare.Needs`."""

    first: IntArray  # (S * L + 1,)
    experts: NDArray[np.int32]  # (n,)
    tokens: NDArray[np.int32]  # (n,)
    weights: NDArray[
        np.float32
    ]  # (n,) sums of router weights; (0,) when the cache policy does not look at them
    #: Predictions for layer l made `a + 1` layers before it, zeros where there is no such layer; (0, ...) for none.
    expected_dSLE: NDArray[np.float32]  # tokens
    used_dSLE: NDArray[np.float32]  # probability that any token uses it


class Log(NamedTuple):
    """What happened."""

    times_us: FloatArray  # (S, L, 8)
    counts: IntArray  # (S, L, 7)
    step_end_us: FloatArray  # (S,)
    copies: NDArray[np.int32]  # (n, 4)
    copy_us: FloatArray  # (n, 2) start and end


#: Places in the clock: a layer begins, its predictions are there, the host has decided and handed over what the layer
#: waits for, and prefetches are wanted.
NOW, FORESEEN, HANDED_OVER, WANTED = range(4)


class Wire(NamedTuple):
    """The link and what is on it. On-demand copies are waited for by their layer, so only prefetches are in flight."""

    ready_us: FloatArray  # (slots,) when the bytes are there
    queue: IntArray  # slots of prefetches in the order of issue, a ring
    ends: IntArray  # (2,) how many left the queue, how many entered it
    free_us: FloatArray  # (1,) the link is done with all it was given
    cpu_us: FloatArray  # (1,) the CPU is done
    copies: NDArray[np.int32]  # (n, 4) as `Log`, of the steps that are replayed together
    copy_us: FloatArray  # (n, 2)
    num_copies: IntArray  # (1,)


def begin(num_slots: int, most_in_flight: int, start_us: float) -> tuple[FloatArray, Wire]:
    """Clock and link, all idle, for the steps that follow a prompt."""
    wire = Wire(
        np.zeros(num_slots),
        np.empty(most_in_flight + 1, np.int64),
        np.zeros(2, np.int64),
        np.full(1, start_us),
        np.full(1, start_us),
        np.empty((1024, 4), np.int32),
        np.empty((1024, 2)),
        np.zeros(1, np.int64),
    )
    return np.full(4, start_us), wire


@jit
def replay(
    settings: ScheduleSettings,
    costs: Costs,
    believed: Costs,
    policy: int,
    most_in_flight: int,
    is_layered: bool,
    step_us: float,
    state: State,
    demand: Demand,
    clock: FloatArray,
    wire: Wire,
) -> Log:
    """Run some steps, which may be followed by others; `step_us` is what a step takes besides its layers.

    Args:
        costs: of the clock. `believed`: what decisions go by.
        policy: kind of the cache policy. `most_in_flight`: prefetches under way at most; 0 forbids them.
        is_layered: the host launches each layer (`LayerCosts.is_layered`).
        clock, wire: as `begin` makes them, or the steps before left them; changed.
    """
    L, E = state.memory.former_LE.shape
    S = (len(demand.first) - 1) // L
    expected_dSLE, used_dSLE = demand.expected_dSLE, demand.used_dSLE
    d = len(used_dSLE)
    slots = state.slots
    times, counts = np.full((S, L, LOOKED + 1), np.nan), np.zeros((S, L, PREFETCHED + 1), np.int64)
    step_end = np.zeros(S)
    wire.num_copies[0] = 0
    tokens_dE, used_dE = np.zeros((d, E)), np.zeros((d, E))
    now, foreseen, handed_us, wanted_us = clock
    for s in range(S):
        for layer in range(L):
            if wire.num_copies[0] + E * (d + 2) > len(wire.copies):
                wire = _with_room(wire, E * (d + 2))
            routed = now + costs.rest_us
            foreseen = max(routed, foreseen) + costs.predict_us
            looked = max(routed if settings.lag else foreseen, handed_us)
            if is_layered:
                _land(looked, state, wire)
            else:
                looked = _prefetch(wanted_us, looked, s, most_in_flight, E, costs, state, wire)
            decided = looked + costs.decide_us
            # -- the decision
            slots.protected[:] = False
            begin, end = demand.first[s * L + layer], demand.first[s * L + layer + 1]
            experts = demand.experts[begin:end].astype(np.int64)
            tokens = demand.tokens[begin:end].astype(np.int64)
            state.tick[0] += 1
            weights = tokens.astype(np.float64)
            if len(demand.weights):
                weights = demand.weights[begin:end].astype(np.float64)
            _read(expected_dSLE, used_dSLE, s, layer - settings.lag, tokens_dE, used_dE)
            backlog = max(0.0, wire.free_us[0] - looked)
            decision = decide_layer(
                settings, believed, layer, experts, tokens, backlog, slots, state.memory, tokens_dE, used_dE
            )
            counts[s, layer, PREFETCHED] = learn_layer(
                settings, policy, state.tick[0], layer, decision, experts, weights, slots, state.memory
            )
            need = decision.need
            # -- the clock
            here, n, k = need.num_hits + need.num_late, len(need.experts), decision.num_load
            beside, by_itself = 0.0, 0.0  # time on the CPU, the link being busy or idle
            if here + k < n:
                beside = by_itself = costs.cpu_base_us
                cpu_us, cpu_alone_us, cold = costs.cpu_us, costs.cpu_alone_us, need.tokens[here + k :]
                for i in range(len(cold)):
                    beside += cpu_time(cpu_us, cold[i])
                    by_itself += cpu_time(cpu_alone_us, cold[i])
                wire.cpu_us[0] = decided + beside
            goes_on = decided
            if (
                not is_layered
                and need.num_hits == n
                and _all_there(routed, layer * E + need.experts, state, wire)
            ):
                goes_on = routed
            computed, rounds, served = _serve(
                layer, s, goes_on, k, need, E, is_layered, costs, state, wire, decision.keep
            )
            # -- what is prefetched: by what the layer itself predicts, when its own copies have their slots
            handed_us = handed_over(costs, decided, k)
            wanted_us, is_own = handed_us, settings.lag > 0 and d > 0 and layer + 1 < L
            if is_own:
                _read(expected_dSLE, used_dSLE, s, layer, tokens_dE, used_dE)
                wanted_us = max(handed_us, foreseen)
            ahead = prefetch_layer(
                settings, believed, layer, decision, backlog, slots, state.memory, tokens_dE, used_dE, is_own
            )
            want(state.waiting, ahead.keys, ahead.keep)
            if is_layered:
                _prefetch(served, served, s, most_in_flight, E, costs, state, wire)
                slots.protected[:] = False
                _prefetch(computed, computed, s, most_in_flight, E, costs, state, wire)
            if beside > 0.0:
                # Prefetches follow on the link, while the CPU computes, where any may be under way.
                num_ahead = len(ahead.keys) if most_in_flight > 0 else 0
                link_us = max(decided, wire.free_us[0]) + num_ahead * costs.link_busy_us
                wire.cpu_us[0] = decided + cpu_done(beside, share_alone(beside, by_itself), link_us - decided)
                times[s, layer, CPU_DONE] = wire.cpu_us[0]
            done = max(computed, wire.cpu_us[0])
            times[s, layer, BEGIN], times[s, layer, ROUTED], times[s, layer, DECIDED] = now, routed, goes_on
            times[s, layer, FETCHED] = max(goes_on, computed - (here + k) * costs.gpu_us)
            times[s, layer, GPU_DONE], times[s, layer, DONE] = computed, done
            times[s, layer, LOOKED] = looked
            counts[s, layer, NEEDED], counts[s, layer, HITS], counts[s, layer, LATE] = (
                n,
                need.num_hits,
                need.num_late,
            )
            counts[s, layer, MISSES], counts[s, layer, ON_CPU], counts[s, layer, ROUNDS] = (
                n - here,
                n - here - k,
                rounds,
            )
            now = done
        now += step_us
        step_end[s] = now
    clock[NOW], clock[FORESEEN], clock[HANDED_OVER], clock[WANTED] = now, foreseen, handed_us, wanted_us
    count = wire.num_copies[0]
    return Log(times, counts, step_end, wire.copies[:count].copy(), wire.copy_us[:count].copy())


@jit
def _read(
    expected_dSLE: NDArray[np.float32],
    used_dSLE: NDArray[np.float32],
    s: int,
    made_at: int,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
) -> None:
    """Fill in what was predicted in a step at a layer for those after it; nothing for layers that there are not."""
    for a in range(len(used_dE)):
        of = made_at + a + 1
        tokens_E, used_E = tokens_dE[a], used_dE[a]
        if made_at >= 0 and of < expected_dSLE.shape[2]:
            tokens_E[:], used_E[:] = expected_dSLE[a, s, of], used_dSLE[a, s, of]
        else:
            tokens_E[:], used_E[:] = 0.0, 0.0


@jit
def _prefetch(
    wanted_us: float,
    until_us: float,
    step: int,
    most_in_flight: int,
    E: int,
    costs: Costs,
    state: State,
    wire: Wire,
) -> float:
    """Give waiting prefetches to the link as earlier ones land, from `wanted_us` until the next layer's question at
    `until_us`; what landed is not in flight. Returns when the host sees that question: one hand-over may outlast it.
    """
    issue, seen_us = wanted_us, until_us
    _land(min(wanted_us, until_us), state, wire)
    while most_in_flight > 0 and state.waiting.counts[NUM_WAITING] > 0:
        if wire.ends[1] - wire.ends[0] >= most_in_flight:
            issue = max(issue, wire.ready_us[wire.queue[wire.ends[0] % len(wire.queue)]])
        if issue > until_us:
            break
        _land(issue, state, wire)
        key, slot, _ = next_prefetch(state.waiting, state.slots, wire.ends[1] - wire.ends[0], most_in_flight)
        if key < 0:
            break
        on_the_way(state.slots, slot)
        issue += costs.handover_us
        seen_us = max(until_us, issue)
        _copy(key, key // E, slot, AHEAD, step, issue, True, costs, wire)
        wire.queue[wire.ends[1] % len(wire.queue)] = slot
        wire.ends[1] += 1
    _land(seen_us, state, wire)
    return seen_us


@jit
def handed_over(costs: Costs, decided: float, num_load: int) -> float:
    """When the host has handed over a layer's on-demand copies: the first one before it answers, at `decided`; behind
    that the others, a batch with one number.
    """
    return decided + ((num_load - 2) * costs.copy_us + costs.handover_us if num_load > 1 else 0.0)


@jit
def _all_there(at_us: float, keys: IntArray, state: State, wire: Wire) -> bool:
    """Whether the bytes of experts in slots were there at a time."""
    ready_us, slot_of = wire.ready_us, state.slots.slot_of
    for key in keys:  # noqa: SIM110 - compiled code has no generators
        if ready_us[slot_of[key]] > at_us:
            return False
    return True


@jit
def _land(until_us: float, state: State, wire: Wire) -> None:
    """Prefetches whose bytes are there leave the queue; the link ends them in order."""
    while wire.ends[0] < wire.ends[1]:
        slot = wire.queue[wire.ends[0] % len(wire.queue)]
        if wire.ready_us[slot] > until_us:
            break
        state.slots.in_flight[slot] = False
        wire.ends[0] += 1


@jit
def _copy(
    key: int,
    layer: int,
    slot: int,
    reason: int,
    step: int,
    ask_us: float,
    ends_batch: bool,
    costs: Costs,
    wire: Wire,
) -> None:
    """One copy, after all others; slower while the CPU reads the same memory."""
    begin = max(ask_us, wire.free_us[0])
    end = begin + (costs.link_busy_us if begin < wire.cpu_us[0] else costs.link_us)
    if ends_batch:
        end += costs.batch_us
    wire.free_us[0] = wire.ready_us[slot] = end
    i, copies = wire.num_copies[0], wire.copies
    copies[i, STEP], copies[i, AT_LAYER], copies[i, KEY], copies[i, REASON] = step, layer, key, reason
    wire.copy_us[i, 0], wire.copy_us[i, 1] = begin, end
    wire.num_copies[0] += 1


@jit
def _serve(
    layer: int,
    step: int,
    decided: float,
    num_load: int,
    need: SortedNeed,
    E: int,
    is_layered: bool,
    costs: Costs,
    state: State,
    wire: Wire,
    keep: IntArray,
) -> tuple[float, int, float]:
    """Copy a layer's first `num_load` misses and compute them and what is here, in the order of `rounds.walk`: when the
    GPU is done, the rounds, and when the host came to the last one. From a graph it is one round wherever all fit.
    """
    here, first = need.num_hits + need.num_late, layer * E
    slots, late_us = state.slots, decided
    slot_of, protected, experts, there_us = slots.slot_of, slots.protected, need.experts, wire.ready_us
    for i in range(here):
        slot = slot_of[first + experts[i]]
        protected[slot] = True
        if i >= need.num_hits:
            late_us = max(late_us, there_us[slot])
    if num_load == 0:
        return late_us + here * costs.gpu_us, 1, decided
    capacity = len(slots.key_of) - (wire.ends[1] - wire.ends[0] - need.num_late)  # of those on the link
    is_one = (num_load <= ROUND_EXPERTS or not is_layered) and here + num_load <= capacity
    chunk = num_load if is_one else max(1, min(ROUND_EXPERTS, capacity // 2))
    # Of the misses the first `end` have slots; what is here is a round of its own, unless there is one only.
    keys = first + experts[: here + num_load]
    begin, end = 0, here if here and not is_one else here + chunk
    computed, rounds = decided, 0
    ready_us = max(late_us, _load(keys[here:end], layer, step, decided, costs, state, wire, keep))
    while True:
        asked, then = computed, min(end + chunk, len(keys))
        is_early = end < then <= end + len(slots.key_of) - (protected | slots.in_flight).sum()
        next_us = ready_us
        if is_early:
            next_us = _load(keys[end:then], layer, step, computed, costs, state, wire, keep)
        computed = max(computed, ready_us) + (end - begin) * costs.gpu_us
        rounds += 1
        if then == end:
            return computed, rounds, asked
        _land(computed, state, wire)
        for key in keys[begin:end]:
            protected[slot_of[key]] = False
        if not is_early:
            next_us = _load(keys[end:then], layer, step, computed, costs, state, wire, keep)
        begin, end, ready_us = end, then, next_us


@jit
def _load(
    keys: IntArray,
    layer: int,
    step: int,
    ask_us: float,
    costs: Costs,
    state: State,
    wire: Wire,
    keep: IntArray,
) -> float:
    """Slots and copies on demand for experts that are missing, keys (n,): when the last one is there."""
    slots = state.slots
    if len(keys) == 0:
        return ask_us
    taken = take_slots(keys, slots.protected | slots.in_flight, keep, slots)
    for i in range(len(keys)):
        # The host hands over the first one before it answers, the others behind that.
        ends_batch = i == 0 or i == len(keys) - 1
        _copy(keys[i], layer, taken[i], ON_DEMAND, step, ask_us + i * costs.copy_us, ends_batch, costs, wire)
        slots.protected[taken[i]], slots.prefetched[taken[i]] = True, False
    return wire.free_us[0]


@jit
def _with_room(wire: Wire, more: int) -> Wire:
    """Room for so many copies more, where there is none."""
    count, size = wire.num_copies[0], len(wire.copies)
    copies, copy_us = np.empty((2 * size + more, 4), np.int32), np.empty((2 * size + more, 2))
    copies[:count], copy_us[:count] = wire.copies[:count], wire.copy_us[:count]
    return Wire(
        wire.ready_us,
        wire.queue,
        wire.ends,
        wire.free_us,
        wire.cpu_us,
        copies,
        copy_us,
        wire.num_copies,
    )

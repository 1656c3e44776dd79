"""The host's part of one captured step that it decides, as one call of compiled code.

Per layer: the choice arrives, it is decided what serves it, the CPU's experts are handed to their threads and on-demand
copies to the link, and the GPU is told the layer's slots and what to wait for. What the layer teaches and what is
prefetched is worked out behind that, and while the next choice is awaited, prefetches are handed to the link as it has
room. A layer's slots are safe until the next layer has asked: then the GPU is done
with them.

A layer that sees all of its experts in `Addresses.shown` goes on without an answer, so the GPU may be layers ahead of
what is decided here. An expert is shown while its bytes are there, and known to be: those of on-demand copies when the
next layer has asked. A slot is given up for a prefetch only if, after hiding its expert, that expert's layer has not
looked (`graph_kernels._look`).

Written as the same in Python, a layer of Qwen3-30B-A3B's shape took 200 us at batch 1 and 320 us at batch 8 from the
choice's arrival to the answer (H100 machine, docs/log/engine.md): more than a third of a token's time at batch 1.

Shapes: L MoE layers, E experts, P pairs (token, choice), S slots, d layers ahead. Times are microseconds.
"""

import numpy as np

from ...cache.prefetch import NUM_WAITING, want
from ...cache.slots import Slots, take_slots
from ...core.jit import jit
from ...core.native import call, now_us, store_int32
from ...core.types import FloatArray, IntArray
from ...scheduler.layer import Decision, count_experts, decide_layer, learn_layer, prefetch_layer
from .host_cpu import calibrated_us, collect, compute, pairs_of
from .host_link import hide, issued, land, pump, send, show
from .host_messages import has_all, read_predictions, reply, wait
from .host_state import (
    ASKED,
    BATCHES,
    CPU_FAILED,
    FORESEEN,
    JOB,
    JOB_CALIBRATED,
    JOB_LAYER,
    JOB_STEP,
    LAYER,
    LEFT,
    LINK_FAILED,
    LINK_FREE,
    LOADED,
    NOBODY_ASKED,
    NUMBER,
    PATIENCE_US,
    PAUSED,
    SERVED,
    TICK,
    WAIT_US,
    WIRE_COUNT,
    Addresses,
    Functions,
    HostState,
    PlannerState,
)


@jit
def has_time(side_tasks: int, left: int, is_busy: bool) -> bool:
    """Whether the interpreter had better do one of its side tasks now: behind a layer that keeps the GPU busy, with
    copies or the CPU's experts, and behind each layer when no more are left than side tasks.
    """
    return side_tasks > 0 and left > 0 and (is_busy or left <= side_tasks)


@jit
def take_for_layer(here: IntArray, load: IntArray, keep: IntArray, slots: Slots) -> IntArray:
    """Slots of the misses that are copied, keys (k,); no other slot is protected afterwards but the layer's own.

    They are not marked as in flight: the layer waits for their copies before the next one asks.

    Args:
        here: keys of what the layer needs and has. `keep`: keys that are evicted last.
    """
    slots.protected[:] = False
    for key in here:
        slots.protected[slots.slot_of[key]] = True
    if len(load) == 0:
        return load
    taken = take_slots(load, slots.protected | slots.in_flight, keep, slots)
    for slot in taken:
        slots.protected[slot], slots.prefetched[slot] = True, False
    return taken


@jit
def want_ahead(
    planner: PlannerState,
    slots: Slots,
    state: HostState,
    layer: int,
    decision: Decision,
    backlog_us: float,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
    is_own: bool,
) -> None:
    """Let what is worth it wait for the link, instead of whatever did; see `prefetch_layer`."""
    ahead = prefetch_layer(
        planner.settings, planner.costs, layer, decision, backlog_us, slots, planner.memory, tokens_dE, used_dE, is_own
    )  # fmt: skip
    want(state.waiting, ahead.keys, ahead.keep)


@jit
def serve(
    functions: Functions,
    addresses: Addresses,
    state: HostState,
    planner: PlannerState,
    slots: Slots,
    step: int,
    number: int,
    row: int,
    side_tasks: int,
) -> int:
    """Serve the layers of a running step from `counts[LAYER]` on; call again if nobody asked.

    Args:
        step: since the buffers' restart; `number`: the same in messages. `row`: the step in the recording.
        side_tasks: so many things the interpreter has to do beside; it comes back for one as `has_time` says.

    Returns: SERVED and so on.
    """
    counts, times = state.counts, state.times
    counts[NUMBER] = number
    L, P = addresses.ask.shape
    E = len(slots.slot_of) // L
    d = len(planner.memory.predicted_dLE)
    ids = np.empty(P, np.int64)
    tokens_dE, used_dE = np.zeros((d, E)), np.zeros((d, E))
    while counts[LAYER] < L:
        layer = counts[LAYER]
        nobody = addresses.ask[layer][:0]
        code = wait(
            functions, addresses, state, planner, slots, addresses.ask[layer], addresses.ask_shift, number, WAIT_US,
            nobody,
        )  # fmt: skip
        if code != SERVED:
            return code
        made_at = layer - planner.settings.lag
        is_foreseen = False
        if d > 0 and made_at >= 0 and functions.bell != 0:
            is_foreseen = has_all(addresses.scores[made_at], addresses.scores_shift, number)
        elif d > 0 and made_at >= 0:
            most_us = PATIENCE_US if planner.settings.lag else WAIT_US
            code = wait(
                functions, addresses, state, planner, slots, addresses.scores[made_at], addresses.scores_shift, number,
                most_us, nobody,
            )  # fmt: skip
            is_foreseen = code == SERVED
            if code == LINK_FAILED or (code == NOBODY_ASKED and planner.settings.lag == 0):
                return code
        num_experts = addresses.num_experts_L[layer]
        sums_E = np.zeros(num_experts)
        pair_weights = addresses.ask[layer].view(np.float32)[::2]  # the lower halves
        for pair in range(P):
            ids[pair] = (addresses.ask[layer, pair] >> 32) & 0xFFFF  # 0xFFFF is nobody
            if ids[pair] < num_experts and addresses.uses_weights:
                sums_E[ids[pair]] += pair_weights[pair]
        if is_foreseen:
            read_predictions(addresses.scores[made_at], tokens_dE, used_dE)
        else:
            tokens_dE[:], used_dE[:] = 0.0, 0.0
        for slot in state.loaded[: counts[LOADED]]:  # the layer before has waited for them
            show(addresses, state, slots.key_of[slot], slot)
        if not land(functions, addresses, state, slots):
            return LINK_FAILED
        counts[TICK] += 1
        # Of what was on the link no more can be left than prefetches under way: the layers before have waited for the
        # rest. While the link is never idle, the errors of what copies are believed to take would add up.
        now = now_us(functions.clock, state.words)
        times[LINK_FREE] = min(times[LINK_FREE], now + counts[WIRE_COUNT] * planner.costs.link_busy_us)
        backlog_us = max(0.0, times[LINK_FREE] - now)
        experts, tokens = count_experts(ids, num_experts)
        decision = decide_layer(
            planner.settings, planner.costs, layer, experts, tokens, backlog_us, slots, planner.memory, tokens_dE,
            used_dE,
        )  # fmt: skip
        need, num_load = decision.need, decision.num_load
        here = need.num_hits + need.num_late
        load, cold = need.experts[here : here + num_load], need.experts[here + num_load :]
        # A layer that has asked is done with the CPU's part of the one before.
        if not collect(functions, state):
            return CPU_FAILED
        if len(cold):
            first, pairs = pairs_of(ids, cold, need.tokens[here + num_load :], num_experts)
            # Kept before anything else may fail: whoever gives up has to wait for it.
            counts[JOB], counts[JOB_LAYER], counts[JOB_STEP] = (
                compute(functions, addresses, state, layer, step + 1, cold, first, pairs),
                layer,
                row,
            )
            if counts[JOB] == 0:
                return CPU_FAILED
            times[JOB_CALIBRATED] = calibrated_us(planner, first)
        if num_load == 0:  # the GPU waits for no slots
            last_copy = 0
            for expert in need.experts[need.num_hits : here]:
                last_copy = max(last_copy, state.copy_of[slots.slot_of[layer * E + expert]])
            reply(addresses, layer, step, slots.slot_of, last_copy, cold)
        weights = sums_E[experts] if addresses.uses_weights else tokens.astype(np.float64)
        num_prefetched = learn_layer(
            planner.settings,
            addresses.policy,
            counts[TICK],
            layer,
            decision,
            experts,
            weights,
            slots,
            planner.memory,
        )
        taken = take_for_layer(layer * E + need.experts[:here], layer * E + load, decision.keep, slots)
        for slot in taken:
            hide(addresses, state, slot)
        counts[LOADED] = len(taken)
        state.loaded[: len(taken)] = taken
        if num_load:
            # The first copy runs while what follows is prepared: the link is idle until it is issued.
            if not send(
                functions, addresses, state, layer, load[:1], taken[:1], addresses.on_demand, num_load == 1
            ):
                return LINK_FAILED
            last_copy = counts[BATCHES] + (1 if num_load > 1 else 0)  # all of this layer's are one batch
            reply(addresses, layer, step, slots.slot_of, last_copy, cold)
        # -- the GPU knows what to wait for: what follows is not waited for
        counts[FORESEEN] += is_foreseen
        counts[ASKED] = layer + 1
        if functions.bell != 0:
            call(functions.ring, (functions.bell,))
        if not send(
            functions, addresses, state, layer, load[1:], taken[1:], addresses.on_demand, num_load > 1
        ):
            return LINK_FAILED
        if num_load:
            each = planner.costs.link_busy_us if len(cold) else planner.costs.link_us
            issued(functions, state, num_load * each)
        state.needs[layer, :] = (
            len(need.experts), need.num_hits, need.num_late, len(cold), num_prefetched
        )  # fmt: skip
        state.waiting.counts[NUM_WAITING] = 0
        counts[LAYER] += 1
        # What is prefetched is not urgent: the layer's own predictions are better than those it was decided by. Those
        # made beside the graph may never come.
        is_beside = functions.bell != 0
        if d > 0 and layer + 1 < L and (planner.settings.lag > 0 or is_beside):
            if is_beside:
                want_ahead(planner, slots, state, layer, decision, backlog_us, tokens_dE, used_dE, False)
            most_us = 0.0 if is_beside and side_tasks > 0 else WAIT_US
            code = wait(
                functions, addresses, state, planner, slots, addresses.scores[layer], addresses.scores_shift, number,
                most_us, addresses.ask[layer + 1],
            )  # fmt: skip
            if code == LINK_FAILED:
                return code
            if code == SERVED:
                counts[FORESEEN] += not is_foreseen
                read_predictions(addresses.scores[layer], tokens_dE, used_dE)
                want_ahead(planner, slots, state, layer, decision, backlog_us, tokens_dE, used_dE, True)
        else:
            want_ahead(planner, slots, state, layer, decision, backlog_us, tokens_dE, used_dE, False)
        if not pump(functions, addresses, state, planner, slots):
            return LINK_FAILED
        if has_time(side_tasks, L - counts[LAYER], num_load + len(cold) > 0):
            times[LEFT] = now_us(functions.clock, state.words)
            return PAUSED
    store_int32(addresses.served.ctypes.data, np.int32(step + 1))
    times[LEFT] = now_us(functions.clock, state.words)
    return SERVED

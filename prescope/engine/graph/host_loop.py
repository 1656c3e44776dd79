"""The host's part of one captured step that it decides, as one call of compiled code.

Per layer: the choice arrives, everything is decided, on-demand copies are handed to the link and the CPU's experts to
their threads, and the GPU is told the layer's slots and what to wait for. While the next choice is awaited, prefetches
are handed to the link as it has room. A layer's slots are safe until the next layer has asked: then the GPU is done
with them.

A layer that sees all of its experts in `Addresses.shown` goes on without an answer, so the GPU may be layers ahead of
what is decided here. An expert is shown while its bytes are there, and known to be: those of on-demand copies when the
next layer has asked. A slot is given up for a prefetch only if, after hiding its expert, that expert's layer has not
looked (`graph_kernels._look`).

Written as the same in Python, a layer of Qwen3-30B-A3B's shape took 200 us at batch 1 and 320 us at batch 8 from the
choice's arrival to the answer (H100 machine, LOG.md): more than a third of a token's time at batch 1.

Shapes: L MoE layers, E experts, P pairs (token, choice), S slots, d layers ahead. Times are microseconds.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...cache.slots import take_slots
from ...core.jit import jit
from ...core.native import call, load_int64, now_us, store_int32, store_int64, swap_int32
from ...core.types import FloatArray, IntArray
from ...device import LinkFunctions
from ...kernels.cpu import LaneAddresses
from ...scheduler.layer import Slots, decide_layer, reconsider
from ...scheduler.types import Costs, Memory, Plan, ScheduleSettings, cpu_time

#: What `serve` returns: all layers are served; nobody has asked for WAIT_US; a function of the driver, or the CPU lane,
#: failed (the code is in `counts[FAILURE]`); there is time for a chore. And `wait`: the next layer has asked before.
SERVED, NOBODY_ASKED, LINK_FAILED, CPU_FAILED, PAUSED, NEXT_ASKED = range(6)
#: So long a message is awaited before the interpreter is asked for signals, and whether the GPU still runs.
WAIT_US = 20_000.0
#: So long a decision waits for predictions that were made a layer before. They are there, unless the GPU was busy; and
#: nothing promises that it makes them while a layer waits for the host.
PATIENCE_US = 50.0

#: Places in `HostState.counts`.
(
    LAYER, TICK, BATCHES, FAILURE, HELD, KEPT, WIRE_FIRST, WIRE_COUNT, EVENTS, NUM_COPIES, NUM_JOBS, JOB, JOB_LAYER,
    JOB_STEP, NUMBER, LOADED, NUM_COUNTS,
) = range(17)  # fmt: skip
#: Places in `HostState.times`: when the link is free; what the CPU's jobs took, and were calibrated to take; the same
#: the job under way.
LINK_FREE, CPU_TOOK, CPU_CALIBRATED, JOB_CALIBRATED, NUM_TIMES = range(5)
#: Columns of the log (`recorder`): of each layer's needs, of each copy, of each job.
NEEDED, HITS, LATE, ON_CPU, PREFETCHED, NEED_COLUMNS = range(6)
COPY_COLUMNS, JOB_COLUMNS = 7, 4
#: Words of the CPU lane's `ExpertBatch` (native.py).
LOT_WORDS = 11
#: Events of a layer's on-demand copies at most: before and behind the first one, before and behind the rest.
EVENTS_OF_LAYER = 4
#: cuEventQuery: not yet.
NOT_READY = 600
_EVENT_WITHOUT_TIME = 2
_JOB_RUNS = 0


class Functions(NamedTuple):
    """Addresses of C functions, and what they are called with."""

    link: LinkFunctions
    lane: LaneAddresses
    clock: int  # as `raw.clock_address`


class Addresses(NamedTuple):
    """Where things lie in memory; constant while a run's steps are decided."""

    # As `kernels.captured.Messages`.
    ask: IntArray  # (L, P) step << 48 | expert << 32 | bits of the router weight
    scores: IntArray  # (L, d * 2 * E) step << 32 | bits of the prediction; d may be 0
    answers: IntArray
    shown: NDArray[np.int32]
    looked: IntArray
    served: NDArray[np.int32]
    numbers: NDArray[np.int32]  # sources of the copies that follow each batch
    landed: int  # where these numbers are copied to
    head: int  # words in front of an answer's row
    num_experts_L: IntArray
    row_bytes_L: IntArray
    rows_L: IntArray  # addresses of the host rows
    inputs_L: IntArray  # addresses of (T, D), 0 without a CPU lane
    outputs_L: IntArray  # of (P, D)
    flags_L: IntArray
    cpu_layers_L: IntArray
    top_k: int
    width: int  # D
    pool: int  # address of the slots
    slot_bytes: int
    uses_weights: int  # whether the cache policy looks at router weights
    policy: int  # its kind
    most_on_wire: int  # prefetches under way at most
    on_demand: int  # reason of a copy, by its rank
    prefetch: int  # the same
    timed: int
    # Constants in a call of compiled code would have the function compiled once more for each.
    ask_shift: int
    scores_shift: int


class HostState(NamedTuple):
    """What changes from layer to layer."""

    counts: IntArray  # (NUM_COUNTS,)
    times: FloatArray  # (NUM_TIMES,)
    shown_in: IntArray  # (S,) key that is shown to be in a slot, -1 for none
    loaded: IntArray  # (E,) slots whose bytes the layer decided last waits for
    copy_of: IntArray  # (S,) number of the batch that brings a slot's bytes
    held: IntArray  # (L * E,) keys to prefetch, the most wanted last
    keep: IntArray  # (d * E and more,) keys that are evicted last
    wire_slot: IntArray  # (most_on_wire,) ring of prefetches under way
    wire_event: IntArray
    events: IntArray  # handles
    needs: IntArray  # (L, NEED_COLUMNS)
    copies: IntArray  # (N, COPY_COLUMNS)
    jobs: IntArray  # (L + 1, JOB_COLUMNS)
    expert_batch: IntArray  # (LOT_WORDS,)
    indices: IntArray  # of a lot
    words: IntArray  # (4,) for functions that write their results


class PlannerState(NamedTuple):
    """What the planner knows; its arrays are changed."""

    settings: ScheduleSettings
    costs: Costs
    cpu_base_us: float  # as calibrated, as `cpu_us`
    cpu_us: FloatArray
    memory: Memory


@jit
def check(state: HostState, code: int) -> bool:
    """Whether the driver is content; its code is kept if not."""
    code &= 0xFFFFFFFF
    if code != 0:
        state.counts[FAILURE] = code
    return code == 0


@jit
def mark(functions: Functions, addresses: Addresses, state: HostState) -> int:
    """Leave an event on the H2D stream; returns its place among the handles, -1 if the driver refused."""
    events, counts = state.events, state.counts
    # Events that know their time are read when the run is over; the others are asked whether they have passed.
    place = counts[EVENTS] if addresses.timed else counts[EVENTS] % len(events)
    if events[place] == 0:
        flags = 0 if addresses.timed else _EVENT_WITHOUT_TIME
        if not check(state, call(functions.link.create_event, (events.ctypes.data + 8 * place, flags))):
            return -1
    counts[EVENTS] += 1
    if not check(state, call(functions.link.record_event, (events[place], functions.link.stream))):
        return -1
    return place


@jit
def send(
    functions: Functions,
    addresses: Addresses,
    state: HostState,
    layer: int,
    experts: IntArray,
    slots: IntArray,
    reason: int,
    is_numbered: bool,
) -> bool:
    """Hand copies (n,) of a layer's experts to the link; a batch that is numbered ends with its number."""
    counts, copies, n = state.counts, state.copies, len(experts)
    if n == 0:
        return True
    begin = mark(functions, addresses, state) if addresses.timed else 0
    nbytes = addresses.row_bytes_L[layer]
    for i in range(n):
        target = addresses.pool + slots[i] * addresses.slot_bytes
        source = addresses.rows_L[layer] + experts[i] * nbytes
        for _ in range(functions.link.repeats):
            if not check(state, call(functions.link.memcpy, (target, source, nbytes, functions.link.stream))):
                return False
    batch = counts[BATCHES] + 1
    if is_numbered:
        counts[BATCHES] = batch
        place = batch % len(addresses.numbers)
        addresses.numbers[place] = batch  # the one before it in this place landed long ago
        source = addresses.numbers.ctypes.data + 4 * place
        if not check(
            state, call(functions.link.memcpy, (addresses.landed, source, 4, functions.link.stream))
        ):
            return False
    for slot in slots:
        state.copy_of[slot] = batch
    end = begin
    if addresses.timed or reason != addresses.on_demand:
        end = mark(functions, addresses, state)
    if begin < 0 or end < 0:
        return False
    if reason != addresses.on_demand:
        last = (counts[WIRE_FIRST] + counts[WIRE_COUNT]) % len(state.wire_slot)
        state.wire_slot[last], state.wire_event[last] = slots[0], end
        counts[WIRE_COUNT] += 1
    if addresses.timed:
        for i in range(n):
            copies[counts[NUM_COPIES], :] = (layer, experts[i], reason, begin, end, i, n)
            counts[NUM_COPIES] += 1
    return True


@jit
def show(addresses: Addresses, state: HostState, key: int, slot: int) -> None:
    """Layers that need an expert find it in a slot, from now on."""
    state.shown_in[slot] = key
    store_int32(addresses.shown.ctypes.data + 4 * key, np.int32(slot))


@jit
def hide(addresses: Addresses, state: HostState, slot: int) -> int:
    """Layers do not find in a slot what was there; returns its key, -1 if nothing was shown."""
    key = state.shown_in[slot]
    state.shown_in[slot] = -1
    if key >= 0:
        swap_int32(addresses.shown.ctypes.data + 4 * key, np.int32(-1))
    return key


@jit
def may_be_in_use(addresses: Addresses, state: HostState, key: int, num_experts: int) -> bool:
    """Whether a key that was just hidden may have been found before: its layer has looked, and was not decided yet."""
    layer, counts = key // num_experts, state.counts
    if layer < counts[LAYER]:  # what the last layer uses is protected, those before it are done
        return False
    return load_int64(addresses.looked.ctypes.data + 8 * layer) == counts[NUMBER]


@jit
def land(functions: Functions, addresses: Addresses, state: HostState, slots: Slots) -> bool:
    """Prefetches whose bytes are there are resident."""
    counts = state.counts
    while counts[WIRE_COUNT] > 0:
        first = counts[WIRE_FIRST]
        code = call(functions.link.query_event, (state.events[state.wire_event[first]],)) & 0xFFFFFFFF
        if code == NOT_READY:
            return True
        if not check(state, code):
            return False
        slot = state.wire_slot[first]
        slots.in_flight[slot] = False
        show(addresses, state, slots.key_of[slot], slot)
        counts[WIRE_FIRST] = (first + 1) % len(state.wire_slot)
        counts[WIRE_COUNT] -= 1
    return True


@jit
def pump(
    functions: Functions, addresses: Addresses, state: HostState, planner: PlannerState, slots: Slots
) -> bool:
    """Hand to the link what is wanted, while it has room. Cheap when there is none."""
    counts = state.counts
    if counts[HELD] == 0:  # most often: it is called at every look for a message
        return True
    E = len(slots.slot_of) // len(addresses.num_experts_L)
    one = np.empty(1, np.int64)
    while counts[HELD] > 0:
        if counts[WIRE_COUNT] >= addresses.most_on_wire:
            if not land(functions, addresses, state, slots):
                return False
            if counts[WIRE_COUNT] >= addresses.most_on_wire:
                break
        if addresses.timed and not has_room(state, len(addresses.num_experts_L), len(slots.slot_of)):
            break
        counts[HELD] -= 1
        key = state.held[counts[HELD]]
        if slots.slot_of[key] >= 0:
            continue
        one[0] = key
        fixed = slots.protected | slots.in_flight
        keep = state.keep[: counts[KEPT]]
        taken = take_slots(one, slots.key_of, slots.slot_of, fixed, keep, slots.scores)
        if len(taken) == 0:
            counts[HELD] = 0
            break
        former = hide(addresses, state, taken[0])
        if former >= 0 and may_be_in_use(addresses, state, former, E):
            slots.slot_of[key], slots.slot_of[former], slots.key_of[taken[0]] = -1, taken[0], former
            show(addresses, state, former, taken[0])
            counts[HELD] = 0  # until that layer is decided the next one would have to take the same slot
            break
        slots.in_flight[taken[0]] = slots.prefetched[taken[0]] = True
        one[0] = key % E
        if not send(functions, addresses, state, key // E, one, taken, addresses.prefetch, len(taken) > 0):
            return False
        issued(functions, state, planner.costs.link_busy_us if counts[JOB] else planner.costs.link_us)
    return True


@jit
def has_room(state: HostState, num_layers: int, num_experts: int) -> bool:
    """Whether the log takes one more prefetch, and all on-demand copies that may still come."""
    counts = state.counts
    copies, events = len(state.copies) - counts[NUM_COPIES], len(state.events) - counts[EVENTS]
    return copies > num_experts and events >= EVENTS_OF_LAYER * num_layers + 2


@jit
def issued(functions: Functions, state: HostState, link_us: float) -> None:
    """The link was given so much more."""
    times = state.times
    times[LINK_FREE] = max(times[LINK_FREE], now_us(functions.clock, state.words)) + link_us


@jit
def collect(functions: Functions, state: HostState) -> bool:
    """The CPU's part of an earlier layer is over, since the GPU waited for it: take down its time."""
    counts, times, words, jobs = state.counts, state.times, state.words, state.jobs
    job = counts[JOB]
    if job == 0:
        return True
    job_state = call(functions.lane.state, (job,)) & 0xFFFFFFFF
    while job_state == _JOB_RUNS:  # it tells the GPU first
        job_state = call(functions.lane.state, (job,)) & 0xFFFFFFFF
    call(functions.lane.span, (job, words.ctypes.data, words.ctypes.data + 8))
    row = counts[NUM_JOBS]
    jobs[row, :] = (counts[JOB_LAYER], counts[JOB_STEP], words[0], words[1])
    times[CPU_TOOK] += (words[1] - words[0]) * 1e-3
    times[CPU_CALIBRATED] += times[JOB_CALIBRATED]
    counts[NUM_JOBS] += 1
    call(functions.lane.free, (job,))
    counts[JOB] = 0
    if job_state != 1:
        counts[FAILURE] = job_state
    return job_state == 1


@jit
def compute(
    functions: Functions,
    addresses: Addresses,
    state: HostState,
    layer: int,
    number: int,
    experts: IntArray,
    first: IntArray,
    pairs: IntArray,
) -> int:
    """Hand experts (n,) to the CPU; returns the job, 0 if it was refused. `first`, `pairs`: as in `Decision`."""
    expert_batch, indices, n, m = state.expert_batch, state.indices, len(experts), len(pairs)
    indices[:n] = experts
    indices[n : 2 * n + 1] = first
    indices[2 * n + 1 : 2 * n + 1 + m] = pairs // addresses.top_k
    indices[2 * n + 1 + m : 2 * n + 1 + 2 * m] = pairs
    P = addresses.ask.shape[1]
    expert_batch[0], expert_batch[1] = addresses.inputs_L[layer], addresses.outputs_L[layer]
    expert_batch[2], expert_batch[3] = addresses.width, addresses.width
    expert_batch[4], expert_batch[5], expert_batch[6], expert_batch[7] = P // addresses.top_k, P, n, m
    expert_batch[8], expert_batch[9], expert_batch[10] = indices.ctypes.data, addresses.flags_L[layer], number
    return call(
        functions.lane.submit, (functions.lane.lane, addresses.cpu_layers_L[layer], expert_batch.ctypes.data)
    )


@jit
def calibrated_us(planner: PlannerState, first: IntArray) -> float:
    """What a job was calibrated to take; `first` as in `Decision.cpu_first`."""
    total = planner.cpu_base_us
    for i in range(len(first) - 1):
        total += cpu_time(planner.cpu_us, float(first[i + 1] - first[i]))
    return total


@jit
def has_all(words: IntArray, shift: int, number: int) -> bool:
    """Whether every word of a message carries the step's number. The last one is looked at first: it is most often
    the one that is missing.
    """
    address = words.ctypes.data
    for i in range(len(words) - 1, -1, -1):  # noqa: SIM110 - compiled code has no generators
        if load_int64(address + 8 * i) >> shift != number:
            return False
    return True


@jit
def wait(
    functions: Functions,
    addresses: Addresses,
    state: HostState,
    planner: PlannerState,
    slots: Slots,
    words: IntArray,
    shift: int,
    number: int,
    most_us: float,
    asked: IntArray,
) -> int:
    """Wait for a message, prefetching meanwhile; not if the next layer has `asked` before, words of its question."""
    begin = now_us(functions.clock, state.words)
    while not has_all(words, shift, number):
        if len(asked) and has_all(asked, addresses.ask_shift, number):
            return NEXT_ASKED
        if not land(functions, addresses, state, slots) or not pump(
            functions, addresses, state, planner, slots
        ):
            return LINK_FAILED
        if now_us(functions.clock, state.words) - begin > most_us:
            return NOBODY_ASKED
    return SERVED


@jit
def has_time(side_tasks: int, left: int, is_busy: bool) -> bool:
    """Whether the interpreter had better do one of its chores now: behind a layer that keeps the GPU busy, with copies
    or the CPU's experts, and behind each layer when no more are left than chores.
    """
    return side_tasks > 0 and left > 0 and (is_busy or left <= side_tasks)


@jit
def read_predictions(message: IntArray, tokens_dE: FloatArray, used_dE: FloatArray) -> None:
    """Read a layer's predictions from its message (d * 2 * E,)."""
    d, E = used_dE.shape
    predictions = message.view(np.float32)[::2]  # the lower halves
    for ahead in range(d):
        first = 2 * E * ahead
        tokens_dE[ahead] = predictions[first : first + E]
        used_dE[ahead] = predictions[first + E : first + 2 * E]


@jit
def want(state: HostState, plan: Plan) -> None:
    """Prefetch what a plan says, and nothing else."""
    counts = state.counts
    counts[HELD], counts[KEPT] = len(plan.prefetch), len(plan.keep)
    state.held[: len(plan.prefetch)] = plan.prefetch[::-1]
    state.keep[: len(plan.keep)] = plan.keep


@jit
def reply(
    addresses: Addresses,
    layer: int,
    step: int,
    slot_of: IntArray,
    last_copy: int,
    num_on_cpu: int,
) -> None:
    """Let a layer go on: its slots, the batch of copies to wait for, the CPU's part."""
    message, head = addresses.answers[layer], addresses.head
    E = len(message) - head
    number = (step + 1) << 32
    for expert in range(E):
        message[head + expert] = number | (slot_of[layer * E + expert] & 0xFFFFFFFF)
    message[1] = number | num_on_cpu
    # Whatever the order in which they arrive; but none may be kept back.
    store_int64(message.ctypes.data, number | last_copy)


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
        chores: so many things the interpreter has to do beside; it comes back for one as `has_time` says.

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
        if d > 0 and made_at >= 0:
            most_us = PATIENCE_US if planner.settings.lag else WAIT_US
            code = wait(
                functions, addresses, state, planner, slots, addresses.scores[made_at], addresses.scores_shift, number,
                most_us, nobody,
            )  # fmt: skip
            is_foreseen = code == SERVED
            if code == LINK_FAILED or (code == NOBODY_ASKED and planner.settings.lag == 0):
                return code
        num_experts = addresses.num_experts_L[layer]
        sums_E = np.zeros(num_experts if addresses.uses_weights else 0)
        weights = addresses.ask[layer].view(np.float32)[::2]  # the lower halves
        for pair in range(P):
            ids[pair] = (addresses.ask[layer, pair] >> 32) & 0xFFFF  # 0xFFFF is nobody
            if ids[pair] < num_experts and addresses.uses_weights:
                sums_E[ids[pair]] += weights[pair]
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
        decision = decide_layer(
            planner.settings, planner.costs, addresses.policy, counts[TICK], layer, num_experts, ids, sums_E, slots,
            backlog_us, planner.memory, tokens_dE, used_dE,
        )  # fmt: skip
        need, plan, taken = decision.need, decision.plan, decision.slots
        here = need.num_hits + need.num_late
        load, cold = need.experts[here : here + plan.num_load], need.experts[here + plan.num_load :]
        for slot in taken:
            hide(addresses, state, slot)
        counts[LOADED] = len(taken)
        state.loaded[: len(taken)] = taken
        # The first copy runs while what follows is prepared: the link is idle until it is issued.
        if not send(
            functions, addresses, state, layer, load[:1], taken[:1], addresses.on_demand, len(load) == 1
        ):
            return LINK_FAILED
        # A layer that has asked is done with the CPU's part of the one before.
        if not collect(functions, state):
            return CPU_FAILED
        if len(cold):
            # Kept before anything else may fail: whoever gives up has to wait for it.
            counts[JOB], counts[JOB_LAYER], counts[JOB_STEP] = (
                compute(
                    functions, addresses, state, layer, step + 1, cold, decision.cpu_first, decision.cpu_pairs
                ),
                layer,
                row,
            )
            if counts[JOB] == 0:
                return CPU_FAILED
            times[JOB_CALIBRATED] = calibrated_us(planner, decision.cpu_first)
        last_copy = counts[BATCHES] + (1 if len(load) > 1 else 0)  # all of this layer's are one batch
        if len(load) == 0:
            last_copy = 0
            for expert in need.experts[need.num_hits : here]:
                last_copy = max(last_copy, state.copy_of[slots.slot_of[layer * E + expert]])
        reply(addresses, layer, step, slots.slot_of, last_copy, len(cold))
        # -- the GPU knows what to wait for: what follows is not waited for
        if not send(
            functions, addresses, state, layer, load[1:], taken[1:], addresses.on_demand, len(load) > 1
        ):
            return LINK_FAILED
        if len(load):
            each = planner.costs.link_busy_us if len(cold) else planner.costs.link_us
            issued(functions, state, len(load) * each)
        state.needs[layer, :] = (
            len(need.experts), need.num_hits, need.num_late, len(cold), decision.num_prefetched
        )  # fmt: skip
        counts[HELD] = 0
        counts[LAYER] += 1
        if d > 0 and planner.settings.lag and layer + 1 < L:
            # What is prefetched is not urgent: the layer's own predictions are better than those it was decided by.
            code = wait(
                functions, addresses, state, planner, slots, addresses.scores[layer], addresses.scores_shift, number,
                WAIT_US, addresses.ask[layer + 1],
            )  # fmt: skip
            if code == LINK_FAILED:
                return code
            if code == SERVED:
                read_predictions(addresses.scores[layer], tokens_dE, used_dE)
                plan = reconsider(
                    planner.settings, planner.costs, layer, need, plan.num_load, backlog_us, slots.slot_of,
                    slots.key_of, slots.scores, planner.memory, tokens_dE, used_dE,
                )  # fmt: skip
                want(state, plan)
        else:
            want(state, plan)
        if not pump(functions, addresses, state, planner, slots):
            return LINK_FAILED
        if has_time(side_tasks, L - counts[LAYER], len(load) + len(cold) > 0):
            return PAUSED
    store_int32(addresses.served.ctypes.data, np.int32(step + 1))
    return SERVED

"""The link in captured steps that the host decides: copies, their marks, and prefetches as it has room."""

import numpy as np

from ...cache.prefetch import NUM_WAITING, give_back, next_prefetch, on_the_way
from ...cache.slots import Slots
from ...core.jit import jit
from ...core.native import call, load_int64, now_us, store_int32, swap_int32
from ...core.types import IntArray
from .host_state import (
    BATCHES,
    EVENTS,
    EVENTS_OF_LAYER,
    FAILURE,
    JOB,
    LAYER,
    LINK_FREE,
    NOT_READY,
    NUM_COPIES,
    NUMBER,
    WIRE_COUNT,
    WIRE_FIRST,
    Addresses,
    Functions,
    HostState,
    PlannerState,
)

_EVENT_WITHOUT_TIME = 2


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
    """Hand to the link the next of what is wanted, if it has room. Cheap when there is none.

    One at a time: handing one over takes several microseconds, and the next layer may have asked meanwhile.
    """
    counts, waiting = state.counts, state.waiting
    if waiting.counts[NUM_WAITING] == 0:  # most often: it is called at every look for a message
        return True
    E = len(slots.slot_of) // len(addresses.num_experts_L)
    if counts[WIRE_COUNT] >= addresses.most_on_wire and not land(functions, addresses, state, slots):
        return False
    if addresses.timed and not has_room(state, len(addresses.num_experts_L), len(slots.slot_of)):
        return True
    key, slot, evicted = next_prefetch(waiting, slots, counts[WIRE_COUNT], addresses.most_on_wire)
    if key < 0:
        if counts[WIRE_COUNT] < addresses.most_on_wire:
            waiting.counts[NUM_WAITING] = 0  # no slot can be had: not asked again at every look
        return True
    shown = hide(addresses, state, slot)
    if shown >= 0 and may_be_in_use(addresses, state, shown, E):
        give_back(slots, key, slot, evicted)
        show(addresses, state, shown, slot)
        # Until that layer is decided the next one would have to take the same slot.
        waiting.counts[NUM_WAITING] = 0
        return True
    on_the_way(slots, slot)
    one, where = np.empty(1, np.int64), np.empty(1, np.int64)
    one[0], where[0] = key % E, slot
    if not send(functions, addresses, state, key // E, one, where, addresses.prefetch, True):
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

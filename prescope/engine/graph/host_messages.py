"""Messages between a captured step and the host that decides it: waiting for one, reading it, answering."""

import numpy as np

from ...cache.slots import Slots
from ...core.jit import jit
from ...core.native import load_int64, now_us, store_int64
from ...core.types import FloatArray, IntArray
from .host_link import land, pump
from .host_state import (
    LINK_FAILED,
    NEXT_ASKED,
    NOBODY_ASKED,
    SERVED,
    Addresses,
    Functions,
    HostState,
    PlannerState,
)


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
def read_predictions(message: IntArray, tokens_dE: FloatArray, used_dE: FloatArray) -> None:
    """Read a layer's predictions from its message (d * 2 * E,)."""
    d, E = used_dE.shape
    predictions = message.view(np.float32)[::2]  # the lower halves
    for ahead in range(d):
        first = 2 * E * ahead
        tokens_dE[ahead] = predictions[first : first + E]
        used_dE[ahead] = predictions[first + E : first + 2 * E]


@jit
def reply(
    addresses: Addresses,
    layer: int,
    step: int,
    slot_of: IntArray,
    last_copy: int,
    cold: IntArray,
) -> None:
    """Let a layer go on: its slots, the batch of copies to wait for, and what the CPU computes, experts (n,): they have
    no slot for the layer, also where a copy is on its way.
    """
    message, head = addresses.answers[layer], addresses.head
    E = len(message) - head
    number = (step + 1) << 32
    row = slot_of[layer * E : (layer + 1) * E].copy()
    row[cold] = -1
    for expert in range(E):  # each word once: one that carries the number is taken as it is
        message[head + expert] = number | (row[expert] & 0xFFFFFFFF)
    message[1] = number | len(cold)
    # Whatever the order in which they arrive; but none may be kept back.
    store_int64(message.ctypes.data, number | last_copy)

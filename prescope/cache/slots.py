"""Who gets a slot: a layer's needs sorted by where its experts are, and slots given by a policy's scores.

Compiled; engine and simulator call the same functions. Shapes: n experts, S slots, L MoE layers, E experts of a layer.
Keys are flat: moe_layer * E + expert.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.jit import jit
from ..core.types import FloatArray, IntArray


class SortedNeed(NamedTuple):
    """A layer's distinct experts, by where they are, then by tokens."""

    experts: IntArray  # (n,) hits, late ones, misses
    tokens: IntArray  # (n,)
    num_hits: int
    num_late: int


@jit
def sort_need(
    experts: IntArray, tokens: IntArray, slots: IntArray, in_flight: NDArray[np.bool_]
) -> SortedNeed:
    """Experts (n,) with their tokens and slots: hits before late ones before misses, each by tokens, descending.

    Args:
        in_flight: (S,) by slot.
    """
    n = len(experts)
    order = np.argsort(-tokens, kind="mergesort")  # stable: the expert's number breaks ties
    sorted_experts, sorted_tokens = np.empty(n, np.int64), np.empty(n, np.int64)
    counts = np.zeros(3, np.int64)
    place = 0
    for rank in range(3):
        for i in order:
            slot = slots[i]
            mine = 2 if slot < 0 else (1 if in_flight[slot] else 0)
            if mine == rank:
                sorted_experts[place], sorted_tokens[place] = experts[i], tokens[i]
                place += 1
                counts[rank] += 1
    return SortedNeed(sorted_experts, sorted_tokens, counts[0], counts[1])


@jit
def use_prefetched(prefetched: NDArray[np.bool_], slots: IntArray) -> int:
    """Of a layer's experts, how many a prefetch brought and nobody has used since: from now on somebody has.

    Args:
        prefetched: (S,) by slot; changed. `slots`: (n,) of the experts, -1 for none.
    """
    count = 0
    for slot in slots:
        if slot >= 0 and prefetched[slot]:
            prefetched[slot] = False
            count += 1
    return count


@jit
def take_slots(
    keys: IntArray,
    key_of: IntArray,
    slot_of: IntArray,
    fixed: NDArray[np.bool_],
    keep: IntArray,
    scores: FloatArray,
) -> IntArray:
    """Give a slot (n,) to each key: free ones first, then those whose experts have the lowest scores.

    Args:
        fixed: (S,) slots that are never given up. `keep`: keys whose slots are given up last.
        scores: (L * E,) of the cache policy.

    Returns: slots; fewer than keys if there are not enough. `key_of` (S,) and `slot_of` (L * E,) are changed.
    """
    kept = np.zeros(len(key_of), np.bool_)
    for key in keep:
        if slot_of[key] >= 0:
            kept[slot_of[key]] = True
    slots, rank = np.empty(len(keys), np.int64), np.empty(len(keys))
    count = _lowest(slots, rank, 0, key_of, fixed, kept, False, scores)
    if count < len(keys) and len(keep):
        count = _lowest(slots, rank, count, key_of, fixed, kept, True, scores)
    for i in range(count):
        slot = slots[i]
        if key_of[slot] >= 0:
            slot_of[key_of[slot]] = -1
        key_of[slot], slot_of[keys[i]] = keys[i], slot
    return slots[:count]


@jit
def _lowest(
    slots: IntArray,
    rank: FloatArray,
    begin: int,
    key_of: IntArray,
    fixed: NDArray[np.bool_],
    kept: NDArray[np.bool_],
    of_kept: bool,
    scores: FloatArray,
) -> int:
    """Fill slots[begin:] with the lowest scores of those kept, or of the others, ascending; returns the end.

    One pass with an insertion into the few that are wanted: 3 us for 30 of 512 slots, a sort of all takes 48.
    """
    n, count = len(slots), begin
    if begin == n:
        return begin
    for slot in range(len(key_of)):
        if fixed[slot] or kept[slot] != of_kept:
            continue
        score = -np.inf if key_of[slot] < 0 else scores[key_of[slot]]
        if count == n and score >= rank[n - 1]:
            continue
        at = min(count, n - 1)
        while at > begin and rank[at - 1] > score:  # among equals the slot of the lower number comes first
            rank[at], slots[at] = rank[at - 1], slots[at - 1]
            at -= 1
        rank[at], slots[at] = score, slot
        count = min(count + 1, n)
    return count

"""Who gets a slot: a layer's needs sorted by where its experts are, and slots given by a policy's scores.

Compiled; engine and simulator call the same functions. Arrays are taken out of a NamedTuple before a loop: inside one,
numba counts a reference at each access, a fifth of a replay. Shapes: n experts, S slots, L MoE layers, E experts of a
layer. Keys are flat: moe_layer * E + expert.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.jit import jit
from ..core.types import FloatArray, IntArray

NO_BOUNDS = np.empty(0)


class SortedNeed(NamedTuple):
    """A layer's distinct experts, by where they are, then by tokens."""

    experts: IntArray  # (n,) hits, late ones, misses; each by tokens, or late ones by `by_landing`
    tokens: IntArray  # (n,)
    num_hits: int
    num_late: int


class Slots(NamedTuple):
    """The arrays of a residency table and its policy, as compiled code changes them."""

    slot_of: IntArray  # (L * E,) slot of each key, -1 for none
    key_of: IntArray  # (S,) key in each slot, -1 for none
    in_flight: NDArray[np.bool_]  # (S,) its bytes are on the way
    prefetched: NDArray[np.bool_]  # (S,) brought by a prefetch, and not used since
    protected: NDArray[np.bool_]  # (S,) in use: not given up
    scores: FloatArray  # (L * E,) and more, as the cache policy has them
    order: IntArray  # (S + 1,) number of each slot's last prefetch; behind them, how many there were
    #: (L + 1,) see `bounds_of`; empty: each eviction looks at every slot.
    lowest: FloatArray = NO_BOUNDS


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
def by_landing(need: SortedNeed, first: int, slots: Slots) -> None:
    """Put a need's late ones into the order in which they land: the link makes one copy after the other.

    Args:
        need: changed. `first`: key of its layer's expert 0.
    """
    if need.num_late < 2:
        return
    begin, experts, tokens, slot_of = need.num_hits, need.experts, need.tokens, slots.slot_of
    for i in range(begin + 1, begin + need.num_late):
        expert, its_tokens = experts[i], tokens[i]
        order, at = slots.order[slot_of[first + expert]], i
        while at > begin and slots.order[slot_of[first + experts[at - 1]]] > order:
            experts[at], tokens[at] = experts[at - 1], tokens[at - 1]
            at -= 1
        experts[at], tokens[at] = expert, its_tokens


@jit
def landing_us(need: SortedNeed, first: int, slots: Slots, backlog_us: float, link_us: float) -> FloatArray:
    """When each of a need's late ones (n,) lands: as much before the link is free as there are copies behind it.

    Args:
        need: as `by_landing` left it. `backlog_us`: until the link is free; `link_us`: one copy.
    """
    found = np.zeros(need.num_late)
    if need.num_late == 0:
        return found
    late, order, in_flight = need.experts[need.num_hits :], slots.order, slots.in_flight
    for other in range(len(in_flight)):
        if in_flight[other]:  # few are
            for i in range(len(found)):
                found[i] += order[other] > order[slots.slot_of[first + late[i]]]
    for i in range(len(found)):
        found[i] = max(0.0, backlog_us - found[i] * link_us)
    return found


@jit
def use_prefetched(prefetched: NDArray[np.bool_], slots: IntArray) -> int:
    """Count the layer's experts that a prefetch brought and that were not used since; from now on they count as used.

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
def take_slots(keys: IntArray, fixed: NDArray[np.bool_], keep: IntArray, slots: Slots) -> IntArray:
    """Give a slot (n,) to each key: free ones first, then those whose experts have the lowest scores.

    Args:
        fixed: (S,) slots that are never given up. `keep`: keys whose slots are given up last.

    Returns: slots; fewer than keys if there are not enough. `slots.key_of` and `slots.slot_of` are changed.
    """
    key_of, slot_of = slots.key_of, slots.slot_of
    found = slots_to_give(len(keys), fixed, keep, slots)
    for i in range(len(found)):
        was_free = key_of[found[i]] < 0
        if not was_free:
            slot_of[key_of[found[i]]] = -1
        key_of[found[i]], slot_of[keys[i]] = keys[i], found[i]
        keep_bound(slots, keys[i], was_free)
    return found


@jit
def slots_to_give(count: int, fixed: NDArray[np.bool_], keep: IntArray, slots: Slots) -> IntArray:
    """The `count` slots that would be given up next, in this order, or fewer; see `take_slots`."""
    if count == 1 and len(slots.lowest) == 0:
        slot = _next_to_give(fixed, slots)
        if slot >= 0 and not (keep == slots.key_of[slot]).any():
            return np.full(1, slot)
    kept, slot_of = np.zeros(len(slots.key_of), np.bool_), slots.slot_of
    for key in keep:
        if slot_of[key] >= 0:
            kept[slot_of[key]] = True
    found, rank = np.empty(count, np.int64), np.empty(count)
    if len(slots.lowest) and slots.lowest[-1] == 0.0:
        end = _lowest_by_layer(found, rank, 0, fixed, kept, False, slots)
        if end < count and len(keep):
            end = _lowest_by_layer(found, rank, end, fixed, kept, True, slots)
        return found[:end]
    end = _lowest(found, rank, 0, slots.key_of, fixed, kept, False, slots.scores)
    if end < count and len(keep):
        end = _lowest(found, rank, end, slots.key_of, fixed, kept, True, slots.scores)
    return found[:end]


@jit
def _next_to_give(fixed: NDArray[np.bool_], slots: Slots) -> int:
    """As `_lowest` for one slot, whoever is kept; -1 if all are fixed: 0.65 us for 1,536 slots, `_lowest` takes 1.1."""
    key_of, scores = slots.key_of, slots.scores
    found, least = -1, np.inf
    for slot in range(len(key_of)):
        score = -np.inf if key_of[slot] < 0 else scores[key_of[slot]]
        if score < least and not fixed[slot]:
            found, least = slot, score
    return found


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
        score = -np.inf if key_of[slot] < 0 else scores[key_of[slot]]
        if count == n and score >= rank[n - 1]:  # most of them, so it is asked first
            continue
        if fixed[slot] or kept[slot] != of_kept:
            continue
        at = min(count, n - 1)
        while at > begin and rank[at - 1] > score:  # among equals the slot of the lower number comes first
            rank[at], slots[at] = rank[at - 1], slots[at - 1]
            at -= 1
        rank[at], slots[at] = score, slot
        count = min(count + 1, n)
    return count


# -- many slots ------------------------------------------------------------------------------------------------


def bounds_of(slots: Slots, num_layers: int) -> FloatArray:
    """What keeps an eviction from looking at every slot: for each layer a number (L,) that none of its experts in
    slots scores below, and last how many slots are free.

    For policies whose scores of a layer change when that layer is learned alone; whoever changes them calls
    `renew_bound`. In a model of 94 layers of 512 experts a quarter of them are 12,000 slots.
    """
    lowest = np.full(num_layers + 1, np.inf)
    keys = slots.key_of[slots.key_of >= 0]
    num_experts = len(slots.slot_of) // num_layers
    np.minimum.at(lowest, keys // num_experts, slots.scores[keys])
    lowest[-1] = len(slots.key_of) - len(keys)
    return lowest


@jit
def renew_bound(slots: Slots, moe_layer: int) -> None:
    """A layer's scores have changed."""
    if len(slots.lowest) == 0:
        return
    slot_of, scores = slots.slot_of, slots.scores
    E = len(slot_of) // (len(slots.lowest) - 1)
    least = np.inf
    for key in range(moe_layer * E, (moe_layer + 1) * E):
        if slot_of[key] >= 0:
            least = min(least, scores[key])
    slots.lowest[moe_layer] = least


@jit
def keep_bound(slots: Slots, key: int, was_free: bool) -> None:
    """An expert has come into a slot."""
    if len(slots.lowest) == 0:
        return
    layer = key // (len(slots.slot_of) // (len(slots.lowest) - 1))
    slots.lowest[layer] = min(slots.lowest[layer], slots.scores[key])
    if was_free:
        slots.lowest[-1] -= 1.0


@jit
def _lowest_by_layer(
    found: IntArray,
    rank: FloatArray,
    begin: int,
    fixed: NDArray[np.bool_],
    kept: NDArray[np.bool_],
    of_kept: bool,
    slots: Slots,
) -> int:
    """As `_lowest`, by the layers' bounds: layers whose experts all score higher than what was found are left out."""
    slot_of, scores, lowest = slots.slot_of, slots.scores, slots.lowest
    n, count, L = len(found), begin, len(lowest) - 1
    E = len(slot_of) // L
    is_seen = np.zeros(L, np.bool_)
    for _ in range(L):
        if begin == n:
            break
        layer, bound = -1, np.inf
        for other in range(L):
            if not is_seen[other] and lowest[other] < bound:
                layer, bound = other, lowest[other]
        if layer < 0 or (count == n and bound > rank[n - 1]):
            break
        is_seen[layer] = True
        least = np.inf
        for key in range(layer * E, (layer + 1) * E):
            slot = slot_of[key]
            if slot < 0:
                continue
            score = scores[key]
            least = min(least, score)
            if fixed[slot] or kept[slot] != of_kept:
                continue
            if count == n and (score > rank[n - 1] or (score == rank[n - 1] and slot > found[n - 1])):
                continue
            at = min(count, n - 1)
            while at > begin and (rank[at - 1] > score or (rank[at - 1] == score and found[at - 1] > slot)):
                rank[at], found[at] = rank[at - 1], found[at - 1]
                at -= 1
            rank[at], found[at] = score, slot
            count = min(count + 1, n)
        lowest[layer] = least
    return count

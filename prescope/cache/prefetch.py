"""What waits for the link: experts worth copying ahead, and the slot that the next of them gets.

Loader, captured steps and simulator ask the same functions, and each makes the copy in its own way. An expert that
waits has no slot, so a prefetch that is dropped evicts nothing.

Shapes: n experts, S slots, L MoE layers, E experts of a layer. Keys are flat: moe_layer * E + expert.
"""

from typing import NamedTuple

import numpy as np

from ..core.jit import jit
from ..core.types import IntArray
from .slots import Slots, keep_bound, slots_to_give

#: Copies below this do not reach the link's rate: PCIe 5 gave 53 GB/s at 4 MiB, 48 at 1 MiB (benchmarks/async_io.py).
LEAST_BYTES_ON_WIRE = 4 << 20
#: Bytes of prefetches on the link at most, one expert at least: a miss waits for no more, 0.6 ms at 55 GB/s. With two
#: of Mixtral's experts (352 MB) on the link instead of one, streaming lost 27 % at batch 1 and PreSched 6 %; at batch 8
#: both lost 0 to 2 % (H200, benchmarks/results/house_h200_2026-11-29.md).
MOST_BYTES_ON_WIRE = 32 << 20
#: Places in `Waiting.counts`: experts that wait, and keys that are kept.
NUM_WAITING, NUM_KEPT = range(2)


def most_on_wire(row_bytes: int, num_slots: int, least_bytes: int = LEAST_BYTES_ON_WIRE) -> int:
    """Prefetches on the link at most: one under way and one behind it, since an on-demand copy waits for them all.

    More of small experts, as many as keep the link at its rate; fewer where they would take the slots that on-demand
    copies need.

    Args:
        row_bytes: of one expert. `least_bytes`: on the link, for its full rate; 0 where copies of any size have it.
    """
    wanted = max(2, least_bytes // row_bytes)
    return min(wanted, max(1, MOST_BYTES_ON_WIRE // row_bytes), prefetch_slots(num_slots))


def prefetch_slots(num_slots: int) -> int:
    """Slots that prefetches on the link may hold at most: the others are left to on-demand copies."""
    return min(max(1, num_slots // 4), num_slots - 1)


class Waiting(NamedTuple):
    """Prefetches that wait for the link."""

    keys: IntArray  # (L * E,) the most wanted last
    keep: IntArray  # (L * E,) keys that are evicted last
    counts: IntArray  # (2,) how many of them there are

    @classmethod
    def none(cls, total_experts: int) -> "Waiting":
        """Nothing waits."""
        return cls(
            np.zeros(total_experts, np.int64), np.zeros(total_experts, np.int64), np.zeros(2, np.int64)
        )


@jit
def want(waiting: Waiting, keys: IntArray, keep: IntArray) -> None:
    """Let `keys` (n,), the most wanted first, wait instead of whatever did; `keep` (m,) are evicted last meanwhile."""
    waiting.counts[NUM_WAITING], waiting.counts[NUM_KEPT] = len(keys), len(keep)
    waiting.keys[: len(keys)] = keys[::-1]
    waiting.keep[: len(keep)] = keep


@jit
def next_prefetch(waiting: Waiting, slots: Slots, num_on_wire: int, most: int) -> tuple[int, int, int]:
    """The most wanted expert that is not there, its slot, and the key that gave it up (-1: it was free).

    The slot belongs to it from now on; after issuing the copy, call `on_the_way`. Experts that came by another way
    meanwhile wait no longer.

    Args:
        num_on_wire: prefetches on the link; `most`: of them at most.

    Returns: (-1, -1, -1) if none waits, the link has no room, or no slot can be had; nothing is changed then.
    """
    counts, keys, slot_of = waiting.counts, waiting.keys, slots.slot_of
    while counts[NUM_WAITING] > 0 and num_on_wire < most:
        key = keys[counts[NUM_WAITING] - 1]
        if slot_of[key] >= 0:
            counts[NUM_WAITING] -= 1
            continue
        keep = waiting.keep[: counts[NUM_KEPT]]
        found = slots_to_give(1, slots.protected | slots.in_flight, keep, slots)
        if len(found) == 0:
            break
        slot, counts[NUM_WAITING] = found[0], counts[NUM_WAITING] - 1
        evicted = slots.key_of[slot]
        if evicted >= 0:
            slot_of[evicted] = -1
        slots.key_of[slot], slot_of[key] = key, slot
        keep_bound(slots, key, evicted < 0)
        return key, slot, evicted
    return -1, -1, -1


@jit
def on_the_way(slots: Slots, slot: int) -> None:
    """The copy of a prefetch into its slot is issued."""
    slots.in_flight[slot] = slots.prefetched[slot] = True
    slots.order[-1] += 1
    slots.order[slot] = slots.order[-1]


@jit
def give_back(slots: Slots, key: int, slot: int, evicted: int) -> None:
    """Undo a `next_prefetch` that is not on the way yet: the expert that was evicted is in use after all."""
    slots.slot_of[key], slots.key_of[slot] = -1, evicted
    if evicted >= 0:
        slots.slot_of[evicted] = slot

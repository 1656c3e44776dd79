"""Bounds no cache can beat on a recorded trace: Belady's misses, the best fixed set's. Pure numpy, compiled."""

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.jit import jit
from .routing import RoutingTrace


class BoundCounts(NamedTuple):
    """Needs and the fewest misses possible, by phase."""

    needed_prefill: int
    misses_prefill: int
    needed_decode: int
    misses_decode: int


def belady_misses(
    trace: RoutingTrace, num_slots: int, before: RoutingTrace | None = None, *, bypass: bool = False
) -> BoundCounts:
    """Fewest misses of any cache with `num_slots` slots that loads on demand.

    It starts empty, or, to compare with a run on warm slots, with what the needs of the trace `before` left.

    Evicts the expert whose next need is farthest away (L. A. Belady, IBM Systems Journal 5(2), 1966), which is
    optimal for experts of equal size. The experts of one layer are needed one after the other, as in rounds.

    Args:
        bypass: what is missed need not be kept, as where the CPU computes it: a cache then misses less.
    """
    keys, phases = _needs(trace)
    first = 0
    if before is not None:
        earlier, _ = _needs(before)
        first, keys = len(earlier), np.concatenate([earlier, keys])
    misses = _belady(keys, _next_use(keys), trace.num_layers * trace.num_experts, num_slots, bypass)
    decode, misses = phases == 1, misses[first:]
    return BoundCounts(
        int((~decode).sum()), int(misses[~decode].sum()), int(decode.sum()), int(misses[decode].sum())
    )


def static_misses(trace: RoutingTrace, num_slots: int) -> BoundCounts:
    """Misses of the best fixed set of `num_slots` experts, chosen in hindsight for each phase; filling it is free."""
    keys, phases = _needs(trace)
    counts = []
    for phase in (0, 1):
        uses = np.bincount(keys[phases == phase], minlength=trace.num_layers * trace.num_experts)
        kept = np.sort(uses)[::-1][:num_slots]
        counts += [int(uses.sum()), int(uses.sum() - kept.sum())]
    return BoundCounts(*counts)


@jit
def _belady(
    keys: NDArray[np.int64], following: NDArray[np.int64], num_keys: int, num_slots: int, bypass: bool
) -> NDArray[np.bool_]:
    """Which of the needs (n,) miss."""
    next_use = np.full(num_keys, -1)  # of those that are resident
    # (-next use, key), the farthest first; entries of keys that were used or evicted since are stale.
    farthest = [(np.int64(0), np.int64(0)) for _ in range(0)]
    misses = np.zeros(len(keys), np.bool_)
    resident = 0
    for i in range(len(keys)):
        key = keys[i]
        if next_use[key] < 0:
            misses[i] = True
            resident += 1
            if not bypass:  # room is made before it comes, so it stays for a while
                resident = _evict(next_use, farthest, resident, num_slots)
        next_use[key] = following[i]
        heapq.heappush(farthest, (-following[i], key))
        resident = _evict(next_use, farthest, resident, num_slots)
    return misses


@jit
def _evict(
    next_use: NDArray[np.int64], farthest: list[tuple[np.int64, np.int64]], resident: int, num_slots: int
) -> int:
    """Give up those whose next use is farthest away until `num_slots` are left; returns how many are."""
    while resident > num_slots:
        use, candidate = heapq.heappop(farthest)
        if next_use[candidate] == -use:
            next_use[candidate] = -1
            resident -= 1
    return resident


def _needs(trace: RoutingTrace) -> tuple[np.ndarray, np.ndarray]:
    """Flat expert key of every need in order, and its phase (0 prefill, 1 decode)."""
    keys, phases = [], []
    first_row = np.searchsorted(trace.step, trace.steps)
    for step, row in zip(trace.steps, first_row.tolist(), strict=True):
        for need in trace.needed(step):
            keys.append(need.moe_layer * trace.num_experts + need.experts)
            phases.append(np.full(len(need.experts), trace.phase[row]))
    return np.concatenate(keys), np.concatenate(phases)


def _next_use(keys: np.ndarray) -> np.ndarray:
    """Index of the next need of the same key, len(keys) if there is none."""
    following = np.full(len(keys), len(keys), dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    same = keys[order[:-1]] == keys[order[1:]]
    following[order[:-1][same]] = order[1:][same]
    return following

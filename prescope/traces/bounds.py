"""Bounds no cache can beat on a recorded trace: Belady's misses, the best fixed set's. Pure numpy, compiled."""

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.jit import jit
from .events import DECODE, PREFILL
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
    optimal for experts of equal size. The experts of one layer are needed one after the other, by their numbers.

    Args:
        bypass: what is missed need not be kept, as where the CPU computes it: a cache then misses less.
    """
    keys, phases, _ = _needs(trace)
    first = 0
    if before is not None:
        earlier, _, _ = _needs(before)
        first, keys = len(earlier), np.concatenate([earlier, keys])
    each = np.arange(1, len(keys) + 1)
    misses = _belady(keys, each, np.zeros(len(keys), np.bool_), _size(trace), num_slots, bypass)
    decode, misses = phases == DECODE, misses[first:]
    return BoundCounts(
        int((~decode).sum()), int(misses[~decode].sum()), int(decode.sum()), int(misses[decode].sum())
    )


def decode_misses(
    trace: RoutingTrace,
    num_slots: int,
    *,
    bypass: bool = False,
    placed: bool = False,
    sure_share: float = np.inf,
) -> int:
    """Fewest misses of the decode steps alone, on a clock that prompts are not on: what they load costs nothing.

    With one prompt as `belady_misses`, but for layers that need more experts than there are slots: those are served in
    rounds, in the order that misses least. With several prompts, a cache does not keep for one what that can load
    again, nor need it keep what a prompt loads.

    Args:
        bypass: as of `belady_misses`.
        placed: any experts may be in slots behind each prompt, and before the first step.
        sure_share: share of a layer's experts from which on a prompt that needs them may bring any of the next layer.
    """
    keys, phases, groups = _needs(trace)
    is_free = phases == PREFILL
    if sure_share <= 1.0 or placed:
        keys, is_free, groups = _with_brought(trace, keys, is_free, groups, placed, sure_share)
    misses = _belady(keys, _ends(groups, num_slots), is_free, _size(trace), num_slots, bypass)
    return int(misses[~is_free].sum())


def _with_brought(
    trace: RoutingTrace,
    keys: NDArray[np.int64],
    is_free: NDArray[np.bool_],
    groups: NDArray[np.int64],
    placed: bool,
    sure_share: float,
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """Needs with those of experts that come with a prompt without being needed there."""
    L, E = trace.num_layers, trace.num_experts
    # Behind group g: 2 * g + 1. Groups are numbered by step and layer, and those before the first step are -1.
    more_keys, more_groups = [], []
    sizes = np.bincount(groups, minlength=L * len(trace.steps))
    prompt_groups = np.unique(groups[is_free])
    for group in prompt_groups[sizes[prompt_groups] >= sure_share * E].tolist():
        layer = group % L
        if layer + 1 < L:
            more_keys.append((layer + 1) * E + np.arange(E))
            more_groups.append(np.full(E, 2 * group + 1))
    if placed:
        decoded = np.unique(keys[~is_free])
        for group in {-1, *(group // L * L + L - 1 for group in prompt_groups.tolist())}:
            more_keys.append(decoded)
            more_groups.append(np.full(len(decoded), 2 * group + 1))
    if not more_keys:
        return keys, is_free, groups
    all_groups = np.concatenate([2 * groups, *more_groups])
    order = np.argsort(all_groups, kind="stable")
    all_free = np.concatenate([is_free, np.ones(len(all_groups) - len(groups), np.bool_)])
    return np.concatenate([keys, *more_keys])[order], all_free[order], all_groups[order]


def static_misses(trace: RoutingTrace, num_slots: int) -> BoundCounts:
    """Misses of the best fixed set of `num_slots` experts, chosen in hindsight for each phase; filling it is free."""
    keys, phases, _ = _needs(trace)
    counts = []
    for phase in (PREFILL, DECODE):
        uses = np.bincount(keys[phases == phase], minlength=_size(trace))
        kept = np.sort(uses)[::-1][:num_slots]
        counts += [int(uses.sum()), int(uses.sum() - kept.sum())]
    return BoundCounts(*counts)


@jit
def _belady(
    keys: NDArray[np.int64],
    ends: NDArray[np.int64],
    is_free: NDArray[np.bool_],
    num_keys: int,
    num_slots: int,
    bypass: bool,
) -> NDArray[np.bool_]:
    """Which of the needs (n,) miss; those of a group in another order, `_in_order`.

    Args:
        ends: of the groups: needs that come in any order.
        is_free: groups whose misses cost nothing, and need not be kept whatever `bypass` says.
    """
    keys, following = _in_order(keys, ends, is_free, num_keys)
    next_use = np.full(num_keys, -1)  # of those that are resident
    # (-next use, key), the farthest first; entries of keys that were used or evicted since are stale.
    farthest = [(np.int64(0), np.int64(0)) for _ in range(0)]
    misses = np.zeros(len(keys), np.bool_)
    resident, begin = 0, 0
    for end in ends:
        for i in range(begin, end):
            misses[i] = next_use[keys[i]] < 0
            if not misses[i]:
                next_use[keys[i]] = following[i]
                heapq.heappush(farthest, (-following[i], keys[i]))
        for i in range(begin, end):
            if not misses[i]:
                continue
            key = keys[i]
            resident += 1
            if not bypass and not is_free[i]:  # room is made before it comes, so it stays for a while
                resident = _evict(next_use, farthest, resident, num_slots)
            next_use[key] = following[i]
            heapq.heappush(farthest, (-following[i], key))
            resident = _evict(next_use, farthest, resident, num_slots)
        begin = end
    return misses


@jit
def _in_order(
    keys: NDArray[np.int64], ends: NDArray[np.int64], is_free: NDArray[np.bool_], num_keys: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys with those of each group in the order that misses least, and when each is needed next.

    What is missed last is kept for a while, so that is what is needed again soonest. Needed next is len(keys) if it
    never is, or first where that costs nothing: it is not kept for that.
    """
    ordered, following = keys.copy(), np.full(len(keys), len(keys))
    next_use = np.full(num_keys, len(keys))
    for group in range(len(ends) - 1, -1, -1):
        begin, end = ends[group - 1] if group > 0 else 0, ends[group]
        here = keys[begin:end]
        order = np.argsort(-next_use[here], kind="mergesort")
        ordered[begin:end], following[begin:end] = here[order], next_use[here][order]
        for i in range(begin, end):
            next_use[ordered[i]] = len(keys) if is_free[i] else i
    return ordered, following


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


def _size(trace: RoutingTrace) -> int:
    return trace.num_layers * trace.num_experts


def _needs(trace: RoutingTrace) -> tuple[NDArray[np.int64], NDArray[np.int8], NDArray[np.int64]]:
    """Flat expert key of every need in order, its phase (0 prefill, 1 decode), and which needs come together: those of
    one step and layer, by their rank.
    """
    keys, phases, groups = [], [], []
    first_row = np.searchsorted(trace.step, trace.steps)
    for rank, (step, row) in enumerate(zip(trace.steps, first_row.tolist(), strict=True)):
        for need in trace.needed(step):
            keys.append(need.moe_layer * trace.num_experts + need.experts)
            phases.append(np.full(len(need.experts), trace.phase[row]))
            groups.append(np.full(len(need.experts), rank * trace.num_layers + need.moe_layer))
    return np.concatenate(keys), np.concatenate(phases), np.concatenate(groups)


def _ends(groups: NDArray[np.int64], num_slots: int) -> NDArray[np.int64]:
    """Where each group of needs that come in any order ends: those of a layer that all slots do not hold.

    Of a layer that they hold none is evicted before all are served, so that no cache misses less than in a fixed order.
    """
    _, of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    is_end = np.append(np.diff(groups) != 0, True) | (sizes[of] <= num_slots)
    return np.flatnonzero(is_end) + 1

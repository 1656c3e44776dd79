"""Statistics of a routing trace, eight numbers and a curve: what a generator is fitted to and judged by.

Pure numpy. Padding is left out everywhere but in the hit rates, where it needs experts like any token.

Shapes: R rows, L MoE layers, E experts, K top-k, S sequences.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.types import FloatArray
from ...errors import BadTrace, UnsupportedOption
from ..events import DECODE
from ..routing import RoutingTrace, used_mask

BoolArray = NDArray[np.bool_]

#: Transitions are counted on every other block of so many positions and judged on the blocks between, so that one
#: sequence is enough, and few tokens are judged by their direct neighbours.
BLOCK_TOKENS = 8
#: Weight of the prior of a counted transition, in tokens.
PRIOR_TOKENS = 1.0


class Overlaps(NamedTuple):
    """Share of a token's experts, layer by layer, that another token used too; NaN where there is no such pair."""

    next: float  # the next token of its sequence: persistence shows here
    sequence: float  # any other token of its sequence: the popularity within a sequence
    others: float  # a token of another sequence: what of the popularity all sequences share


class Habits(NamedTuple):
    """What a trace's routing is like. Shares and rates in [0, 1]; NaN where the trace cannot tell."""

    popularity_E: FloatArray  # (E,) share of uses, most used expert of a layer first, mean over layers
    overlaps: Overlaps
    transition_recall: float  # recall@K, one layer ahead, of transitions counted on other tokens of the trace
    lru_quarter: float  # decode hit rate of LRU with slots for 25 % of the experts, see `lru_hit_rate`
    lru_half: float  # the same with 50 %


def habits_of(trace: RoutingTrace) -> Habits:
    """All these statistics of a trace.

    Raises:
        BadTrace: no token of it used an expert.
    """
    used_RLE = used_rows(trace)
    return Habits(
        popularity_curve(used_RLE),
        overlaps(trace, used_RLE),
        transition_recall(trace, used_RLE),
        lru_hit_rate(trace, 0.25),
        lru_hit_rate(trace, 0.5),
    )


def used_rows(trace: RoutingTrace) -> BoolArray:
    """(R, L, E) which experts each row used, none for padding.

    Raises:
        BadTrace: nothing was used at all.
    """
    used_RLE = used_mask(trace.expert_ids, trace.num_experts)
    used_RLE[trace.position < 0] = False
    if not used_RLE.any():
        raise BadTrace(f"the trace of {trace.model} has no token that used an expert; record a longer run")
    return used_RLE


def popularity_curve(used_RLE: BoolArray) -> FloatArray:
    """(E,) as `Habits.popularity_E`; layers that used nothing are left out."""
    counts_LE = used_RLE.sum(axis=0)
    counts_LE = -np.sort(-counts_LE[counts_LE.sum(axis=1) > 0], axis=1)
    curve: FloatArray = (counts_LE / counts_LE.sum(axis=1, keepdims=True)).mean(axis=0)
    return curve


def overlaps(trace: RoutingTrace, used_RLE: BoolArray) -> Overlaps:
    """How alike tokens are; sums over all layers and pairs of tokens, then shares."""
    order, sequence = _in_sequences(trace)
    follows = sequence[1:] == sequence[:-1]
    earlier, later = used_RLE[order[:-1][follows]], used_RLE[order[1:][follows]]
    starts = np.flatnonzero(np.r_[True, ~follows])
    tokens_S = np.diff(np.r_[starts, len(order)])
    uses_SLE = np.add.reduceat(used_RLE[order], starts, axis=0, dtype=np.int64)
    uses_S = uses_SLE.sum(axis=(1, 2))
    same = (uses_SLE * (uses_SLE - 1)).sum()
    total_LE = uses_SLE.sum(axis=0)
    other = (total_LE**2).sum() - (uses_SLE**2).sum()
    return Overlaps(
        _ratio((earlier & later).sum(), later.sum()),
        _ratio(same, ((tokens_S - 1) * uses_S).sum()),
        _ratio(other, ((len(order) - tokens_S) * uses_S).sum()),
    )


def transition_recall(trace: RoutingTrace, used_RLE: BoolArray) -> float:
    """Recall@K one layer ahead of counts "expert i here, expert j there"; as the transition predictor combines them."""
    L = used_RLE.shape[1]
    real = trace.position >= 0
    half = trace.position // BLOCK_TOKENS % 2 == 0
    hits = used = 0
    for counted, judged in ((real & half, real & ~half), (real & ~half, real & half)):
        if not counted.any() or not judged.any():
            continue
        for layer in range(L - 1):
            here, there = used_RLE[:, layer], used_RLE[:, layer + 1]
            scores = _transition_scores(here[counted], there[counted], here[judged])
            best = np.argpartition(-scores, trace.top_k - 1, axis=1)[:, : trace.top_k]
            hits += int(np.take_along_axis(there[judged], best, axis=1).sum())
            used += int(there[judged].sum())
    return _ratio(hits, used)


def _transition_scores(here_RE: BoolArray, there_RE: BoolArray, judged_RE: BoolArray) -> NDArray[np.float32]:
    """Logit of each expert's rate, and what the experts used here add to it, as if they were independent."""
    here, there = here_RE.astype(np.float32), there_RE.astype(np.float32)
    prior = there.sum() / max(len(there), 1) / there.shape[1]
    rate = (there.sum(0) + PRIOR_TOKENS * prior) / (len(there) + PRIOR_TOKENS)
    given = (here.T @ there + PRIOR_TOKENS * rate) / (here.sum(0)[:, None] + PRIOR_TOKENS)
    evidence = _logit(given) - _logit(rate)
    scores: NDArray[np.float32] = _logit(rate) + judged_RE.astype(np.float32) @ evidence
    return scores


def lru_hit_rate(trace: RoutingTrace, slots_frac: float) -> float:
    """Hits over the distinct experts needed per layer and step, in decode steps, of LRU slots shared by all layers.

    The slots start empty and prefill steps fill them, uncounted. A layer's experts are looked up together, then
    loaded on demand; those used last by (step, layer, expert) stay. Where a layer needs more than all slots the
    engine serves it in rounds, which may hit a little more. NaN without decode steps.

    Args:
        slots_frac: slots as a share of all L * E experts, rounded, at least one.

    Raises:
        UnsupportedOption: it lies outside (0, 1].
    """
    if not 0.0 < slots_frac <= 1.0:
        raise UnsupportedOption(f"slots_frac is {slots_frac}; it is a share of all experts, in (0, 1]")
    num_slots = max(1, round(slots_frac * trace.num_layers * trace.num_experts))
    resident: dict[int, None] = {}  # the least recently used first
    hits = needed = 0
    for step in trace.steps:
        is_decode = trace.phase[np.searchsorted(trace.step, step)] == DECODE
        for need in trace.needed(step):
            keys = (need.moe_layer * trace.num_experts + need.experts).tolist()
            if is_decode:
                needed += len(keys)
                hits += sum(key in resident for key in keys)
            for key in keys:
                resident.pop(key, None)
                resident[key] = None
            while len(resident) > num_slots:
                del resident[next(iter(resident))]
    return _ratio(hits, needed)


def _in_sequences(trace: RoutingTrace) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Rows that are no padding, sequence by sequence and in order, and the sequence of each."""
    real = np.flatnonzero(trace.position >= 0)
    order = real[np.argsort(trace.sequence[real], kind="stable")]
    return order, trace.sequence[order]


def _logit(p: NDArray[np.float32]) -> NDArray[np.float32]:
    kept = np.clip(p, 1e-6, 1.0 - 1e-6)
    values: NDArray[np.float32] = np.log(kept) - np.log1p(-kept)
    return values


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole > 0 else float("nan")

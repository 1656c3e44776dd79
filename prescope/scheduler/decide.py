"""What is done about a layer, by any schedule: the code that engine and simulator share.

Plain loops over arrays, compiled by numba; no clock, no bytes, no objects. Shapes: n experts needed, E experts of a
layer, L MoE layers, S slots, d layers ahead. Keys are flat: moe_layer * E + expert.
"""

import numpy as np
from numpy.typing import NDArray

from ..jit import jit
from .baselines import fiddler, hybrimoe
from .presched import split
from .terms import FORMER_STEPS, Costs, FloatArray, IntArray, Knobs, Need, Plan, cpu_time

ON_DEMAND, STREAMING, KLOTSKI, FATE, FIDDLER, HYBRIMOE, MOE_INFINITY, PRESCHED = range(8)

#: Share of the planned time by which it may be wrong: experts that are all but certain to be used are held in
#: prefetches for so much link time more. They are given to an idle link only, and dropped when the next router speaks.
#: Without, costs that make plans too short by a half lose 10 to 15 %; where costs are right it loses 0.3 % (LOG.md).
ERROR_MARGIN = 0.3
#: Least probability of use of an expert that is all but certain. With 0.75 an inverted predictor cost 6 % at batch 64,
#: with 0.85 it costs 2 %.
SURE = 0.85
#: So often what the CPU computed saves its time again, by `reuse_lasts`, once it is in a slot; and what lasts less is
#: left out. 1.5 loses up to 14 % at batch 1 of tiny-moe's own text without a predictor, 2.5 another 1 % at batch 4; a
#: fixed bound of 0.35, as it was, lost a third at batch 1 (simulated, LOG.md).
REUSES, LEAST_LASTING = 2.0, 0.05
#: From here on predictions of less than the first are copied behind what the CPU computed, and of less than the second
#: not at all: what is there is likelier.
LASTING = 0.35
UNLIKELY, HARDLY = 0.5, 0.3
#: Weight of the past in `learn`, per layer of a step: remembers about a hundred layers.
TRUST_DECAY = 0.99


@jit
def sort_need(experts: IntArray, tokens: IntArray, slots: IntArray, in_flight: NDArray[np.bool_]) -> Need:
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
    return Need(sorted_experts, sorted_tokens, counts[0], counts[1])


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


@jit
def wanted(
    knobs: Knobs, moe_layer: int, slot_of: IntArray, tokens_E: FloatArray, used_E: FloatArray
) -> IntArray:
    """Keys of a coming layer that are worth prefetching: absent, likely enough, most tokens first."""
    E = len(tokens_E)
    first = moe_layer * E
    found, negative = np.empty(E, np.int64), np.empty(E)
    count = 0
    for expert in range(E):
        if used_E[expert] >= knobs.threshold and used_E[expert] > 0 and slot_of[first + expert] < 0:
            found[count], negative[count] = first + expert, -tokens_E[expert]
            count += 1
    order = np.argsort(negative[:count], kind="mergesort")
    return found[order[: knobs.width]]


@jit
def likely(knobs: Knobs, moe_layer: int, num_layers: int, used_dE: FloatArray) -> IntArray:
    """Keys of coming layers that are likely to be used there, be they in slots or still to come."""
    d, E = used_dE.shape
    found = np.empty(d * E, np.int64)
    count = 0
    for ahead in range(1, min(knobs.lookahead, d, num_layers - 1 - moe_layer) + 1):
        first = (moe_layer + ahead) * E
        for expert in range(E):
            if used_dE[ahead - 1, expert] >= knobs.threshold and used_dE[ahead - 1, expert] > 0:
                found[count] = first + expert
                count += 1
    return found[:count]


@jit
def is_worth_copying(costs: Costs, tokens: IntArray, layer_us: float, lasting: float) -> bool:
    """Whether experts that the CPU computes, with their tokens (n,), had better be copied too while the link is idle.

    Reuse saves the CPU's time for an expert. A copy makes the CPU slower, as far as it computes meanwhile: both read
    the same memory.

    Args:
        layer_us: until the next router speaks. `lasting`: see `reuse_lasts`.
    """
    n = len(tokens)
    if n == 0 or lasting < LEAST_LASTING:
        return False
    cpu_us = costs.cpu_base_us
    for i in range(n):
        cpu_us += cpu_time(costs.cpu_us, tokens[i])
    slower = 1.0 - costs.cpu_alone_us[1] / max(costs.cpu_us[1], 1e-9)
    lost_us = cpu_us / max(cpu_us, layer_us, 1e-9) * costs.link_us * slower
    return lasting * REUSES * cpu_us / n >= lost_us


@jit
def worth_a_slot(
    keys: IntArray, most: int, slot_of: IntArray, key_of: IntArray, scores: FloatArray
) -> IntArray:
    """Of experts (n,) that are not there the `most` that the cache would rather have than its least, the best first.

    The i-th best must be better than the i-th least of those in slots.
    """
    most = min(most, len(keys))
    least = np.full(most, np.inf)
    for key in key_of:
        score = -np.inf if key < 0 else scores[key]
        at = most
        while at > 0 and least[at - 1] > score:
            if at < most:
                least[at] = least[at - 1]
            at -= 1
        if at < most:
            least[at] = score
    order = np.argsort(-scores[keys], kind="mergesort")
    count = 0
    while count < most and scores[keys[order[count]]] > least[count]:
        count += 1
    return keys[order[:count]]


@jit
def plan(
    knobs: Knobs,
    costs: Costs,
    moe_layer: int,
    num_layers: int,
    need: Need,
    backlog_us: float,
    slot_of: IntArray,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
    key_of: IntArray,
    scores: FloatArray,
    lasting: float,
    num_load: int = -1,
) -> Plan:
    """Decide about one layer, after its router has spoken.

    Args:
        need: of this layer. `backlog_us`: until the link is done with what is on the wire.
        slot_of: (L * E,) slot of each key, -1 for those that have none.
        tokens_dE, used_dE: predictions for the d layers behind this one: expected number of tokens that use an expert,
            and probability that any does; rows beyond the last layer hold zeros.
        key_of: (S,) key in each slot, -1 for none. `scores`: (L * E,) of the cache policy.
        lasting: see `reuse_lasts`.
        num_load: how many misses are copied, if that is decided and only prefetches are asked for (PreSched).
    """
    nothing = np.empty(0, np.int64)
    here = need.num_hits + need.num_late
    missing = need.tokens[here:]
    n = len(missing)
    d, E = used_dE.shape
    ahead = min(knobs.lookahead, d, num_layers - 1 - moe_layer)
    if knobs.schedule == ON_DEMAND or knobs.schedule == FIDDLER:
        k = fiddler(costs, missing) if knobs.schedule == FIDDLER else n
        return Plan(k, nothing, nothing)
    if knobs.schedule == STREAMING or knobs.schedule == KLOTSKI:
        if moe_layer + 1 == num_layers:
            return Plan(n, nothing, nothing)
        row = np.zeros(E)
        if knobs.schedule == KLOTSKI and d > 0:  # hottest first
            row[:] = tokens_dE[0]
        whole = Knobs(knobs.schedule, 1, E, 0.0)
        first = (moe_layer + 1) * E
        return Plan(n, wanted(whole, moe_layer + 1, slot_of, row, np.ones(E)), np.arange(first, first + E))
    candidates = nothing
    if ahead > 0:
        candidates = wanted(knobs, moe_layer + 1, slot_of, tokens_dE[0], used_dE[0])
    # What was prefetched, or is there and predicted, makes no room for the next prefetch, whoever decides: in an LRU
    # order it would be the first to go (LOG.md: the others gain 2 to 10 % by it, PreSched 0.5 %).
    keep = likely(knobs, moe_layer, num_layers, used_dE)
    if knobs.schedule == FATE or knobs.schedule == MOE_INFINITY:
        return Plan(n, candidates, keep)
    if knobs.schedule == HYBRIMOE:
        return Plan(hybrimoe(costs, missing, here, backlog_us), candidates, keep)
    first = (moe_layer + 1) * E
    is_lasting, others, least = lasting >= LASTING, nothing, knobs.threshold
    if is_lasting:
        least = max(least, HARDLY)
    likelier = Knobs(knobs.schedule, knobs.lookahead, knobs.width, least, knobs.lag)
    if is_lasting and ahead > 0:
        next_E = used_dE[0][candidates - first]
        others = candidates[(next_E < UNLIKELY) & (next_E >= least)]
        candidates = candidates[next_E >= UNLIKELY]
    m = len(candidates)
    next_tokens, next_used = np.empty(m), np.empty(m)
    # The next layer serves the same tokens. A predictor that expects more of them errs by that factor, and the CPU
    # would seem so slow that everything is prefetched: an inverted one cost 43 % at batch 64 before (LOG.md).
    scale = min(1.0, need.tokens.sum() / max(1e-9, tokens_dE[0].sum())) if m > 0 else 1.0
    for j in range(m):
        next_tokens[j] = scale * tokens_dE[0, candidates[j] - first]
        next_used[j] = used_dE[0, candidates[j] - first]
    k, p, window_us, done_us, free_us = split(
        costs, missing, here, need.num_late, backlog_us, next_tokens, next_used, num_load
    )
    most = min(m, p + int(ERROR_MARGIN * window_us / costs.link_us))
    end = p
    while end < most and next_used[end] >= SURE:
        end += 1
    prefetch = candidates[:end]
    left = free_us - m * costs.link_us
    if p < m or left <= 0:
        return Plan(k, prefetch, keep)
    # What the CPU computes would never come into the slots, however often it is used again: 7 to 44 points of hits
    # behind LRU on demand, on traces whose tokens mostly choose what the one before chose (simulated, LOG.md).
    cold = moe_layer * E + need.experts[here + k :]
    layer_us = done_us + costs.rest_us + costs.decide_us
    room = int(left / costs.link_us) if is_worth_copying(costs, missing[k:], layer_us, lasting) else 0
    again = worth_a_slot(cold, room, slot_of, key_of, scores)
    others = others[: max(0, int(left / costs.link_us) - len(again))]
    left -= (len(again) + len(others)) * costs.link_us
    prefetch = np.concatenate((prefetch, again, others))
    # Link time that the next layer has no use for goes to those behind it.
    for further in range(2, ahead + 1):
        if left <= 0:
            break
        more = wanted(likelier, moe_layer + further, slot_of, tokens_dE[further - 1], used_dE[further - 1])
        more = more[: int(left / costs.link_us) + 1]
        left -= len(more) * costs.link_us
        prefetch = np.concatenate((prefetch, more))
    return Plan(k, prefetch, keep)


@jit
def learn_trust(
    trust: FloatArray,
    moe_layer: int,
    counts_E: IntArray,
    predicted_dLE: FloatArray,
    threshold: float,
) -> None:
    """Hold what was predicted for a layer against what it used.

    Of each prediction the likeliest experts count, those at least half as likely as the first: they are prefetched
    first. Over all that are a little likely even an order turned upside down is right on average, and that cost 24 %.

    Args:
        trust: (d, 2) decayed sums of the probabilities given to the likeliest experts, and of how many were used.
        counts_E: tokens of each expert. `predicted_dLE`: the last probability of use, by lookahead; the layer's are
            forgotten, so that none counts twice where the next ones come too late.
    """
    for ahead in range(min(len(trust), moe_layer)):
        row = predicted_dLE[ahead, moe_layer]
        if row.max() <= 0.0:
            continue
        least = max(threshold, 0.5 * row.max())
        expected, found = 0.0, 0.0
        for expert in range(len(counts_E)):
            if row[expert] >= least:
                expected += row[expert]
                found += 1.0 if counts_E[expert] > 0 else 0.0
        trust[ahead, 0] = TRUST_DECAY * trust[ahead, 0] + expected
        trust[ahead, 1] = TRUST_DECAY * trust[ahead, 1] + found
        row[:] = 0.0


@jit
def learn_reuse(
    reuse: FloatArray, former_E: IntArray, experts: IntArray, num_misses: int, num_absent: int
) -> None:
    """Hold what a layer needs, experts (n,), against what it needed in the steps before.

    Args:
        reuse: (FORMER_STEPS + 4,) decayed sums of experts: needed, missing, absent, there, and of those needed, by how
            many steps ago, in which they were needed too.
        former_E: bit m: needed m + 1 steps ago; changed.
        num_misses: of `experts`. `num_absent`: of the layer's experts, those that have no slot.
    """
    reuse *= TRUST_DECAY
    reuse[0] += len(experts)
    reuse[1] += num_misses
    reuse[2] += num_absent
    reuse[3] += len(former_E) - num_absent
    for expert in experts:
        for m in range(FORMER_STEPS):
            reuse[4 + m] += former_E[expert] >> m & 1
    for expert in range(len(former_E)):
        former_E[expert] = (former_E[expert] << 1) & ((1 << FORMER_STEPS) - 1)
    for expert in experts:
        former_E[expert] |= 1


@jit
def reuse_lasts(reuse: FloatArray) -> float:
    """How much likelier an expert is needed that was needed a certain number of steps ago, the number that says most,
    than one that has no slot, as an evicted one will have none, or than one that has, if those are needed less: then
    the slots hold what nobody wants any more. In a large batch hardly. `reuse`: see `learn_reuse`.
    """
    absent = reuse[1] / max(1.0, reuse[2])
    there = (reuse[0] - reuse[1]) / max(1.0, reuse[3])
    return reuse[4:].max() / max(1.0, reuse[0]) - min(absent, there)


@jit
def discount(trust: FloatArray, ahead: int) -> float:
    """Factor for probabilities given `ahead` layers before the use (1: the next layer); 1 until something is known."""
    expected, found = trust[ahead - 1]
    return 1.0 if expected <= 0.0 else min(1.0, found / expected)

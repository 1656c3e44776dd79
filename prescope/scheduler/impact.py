"""The HybriMoE-like's prefetches: those that save the coming layers more than their copies cost.

The gain of a prefetch is what its layer's greedy split takes less when the expert is there, by the probability that it
is used. Its cost is what it does to the layer at hand, whose CPU is slower beside a busy link, and what is left of the
copy when the next router has chosen, which on-demand copies then wait for. Nothing here is tuned: times are costs.

Shapes: E experts of a layer, L MoE layers, d layers ahead, n experts that a coming layer is expected to miss.
"""

import numpy as np

from ..cache.slots import Slots, SortedNeed
from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from .baselines import hybrimoe
from .presched import cpu_done, share_alone
from .types import Costs, ScheduleSettings, cpu_time


@jit
def by_impact(
    settings: ScheduleSettings,
    costs: Costs,
    moe_layer: int,
    need: SortedNeed,
    num_load: int,
    backlog_us: float,
    slots: Slots,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
) -> IntArray:
    """Keys to prefetch for coming layers, the greatest gain first, until one would gain less than it costs.

    Args:
        need: of this layer, `num_load` of whose misses are copied. `backlog_us`: rest of what is on the wire.
        tokens_dE, used_dE: predictions for the layers after this one, as many as are looked at.
    """
    d, E = used_dE.shape
    keys, tokens = np.empty((d, E), np.int64), np.empty((d, E))
    counts, num_here, at = np.zeros(d, np.int64), np.zeros(d, np.int64), np.zeros(d, np.int64)
    takes, saves = np.zeros(d), np.zeros(d)
    # The next layers serve the same tokens, whatever a predictor believes.
    for a in range(d):
        scale = min(1.0, need.tokens.sum() / max(1e-9, tokens_dE[a].sum()))
        num_here[a], counts[a] = _expected(
            settings,
            (moe_layer + 1 + a) * E,
            slots.slot_of,
            scale * tokens_dE[a],
            used_dE[a],
            keys[a],
            tokens[a],
        )
        takes[a] = split_us(costs, tokens[a, : counts[a]], num_here[a])
    found = np.empty(int(counts.sum()), np.int64)
    count = 0
    so_far = delay_us(costs, need, num_load, backlog_us, 0)
    for a in range(d):
        saves[a] = _gain(costs, takes[a], tokens[a, : counts[a]], num_here[a], 0)
    while count < len(found):
        best = -1
        for a in range(d):
            if at[a] < min(counts[a], settings.width):
                gain = saves[a] * used_dE[a, keys[a, at[a]] % E]
                if best < 0 or gain > saves[best] * used_dE[best, keys[best, at[best]] % E]:
                    best = a
        if best < 0:
            break
        after = delay_us(costs, need, num_load, backlog_us, count + 1)
        if saves[best] * used_dE[best, keys[best, at[best]] % E] < after - so_far:
            break
        found[count], so_far = keys[best, at[best]], after
        count, at[best] = count + 1, at[best] + 1
        takes[best] -= saves[best]
        saves[best] = _gain(costs, takes[best], tokens[best, : counts[best]], num_here[best], at[best])
    return found[:count]


@jit
def delay_us(costs: Costs, need: SortedNeed, num_load: int, backlog_us: float, num_prefetched: int) -> float:
    """When this layer is done, and how long the link is busy beyond the next router's choice, together, if so many
    prefetches follow its own copies.
    """
    here, n = need.num_hits + need.num_late, len(need.experts)
    link = backlog_us + num_load * (costs.link_busy_us if here + num_load < n else costs.link_us)
    gpu = (here + num_load) * costs.gpu_us + (link if num_load > 0 or need.num_late > 0 else 0.0)
    beside = alone = 0.0
    if here + num_load < n:
        beside = alone = costs.cpu_base_us
        for i in range(here + num_load, n):
            beside += cpu_time(costs.cpu_us, need.tokens[i])
            alone += cpu_time(costs.cpu_alone_us, need.tokens[i])
    cpu = cpu_done(beside, share_alone(beside, alone), link + num_prefetched * costs.link_busy_us)
    done = max(gpu, cpu)
    # Copies beside the CPU are slower, the others are not.
    slow = min(float(num_prefetched), max(0.0, cpu - link) / max(costs.link_busy_us, 1e-9))
    copies = slow * costs.link_busy_us + (num_prefetched - slow) * costs.link_us
    return done + max(0.0, link + copies - done - costs.rest_us - costs.decide_us)


@jit
def split_us(costs: Costs, tokens: FloatArray, num_here: int) -> float:
    """Time of a layer that misses experts with so many tokens (n,), descending, by HybriMoE's greedy split."""
    k = hybrimoe(costs, tokens, num_here, 0.0)
    gpu = k * costs.link_us + (num_here + k) * costs.gpu_us
    cpu = costs.cpu_base_us if k < len(tokens) else 0.0
    for i in range(k, len(tokens)):
        cpu += cpu_time(costs.cpu_us, tokens[i])
    return max(gpu, cpu)


@jit
def _gain(costs: Costs, takes_us: float, tokens: FloatArray, num_here: int, at: int) -> float:
    """What a layer takes less when the next of its candidates is there too; `at`: candidates that are."""
    if at >= len(tokens):
        return 0.0
    return max(0.0, takes_us - split_us(costs, tokens[at + 1 :], num_here + at + 1))


@jit
def _expected(
    settings: ScheduleSettings,
    first: int,
    slot_of: IntArray,
    tokens_E: FloatArray,
    used_E: FloatArray,
    keys: IntArray,
    tokens: FloatArray,
) -> tuple[int, int]:
    """Experts of a coming layer that are expected to be used: how many have slots, and how many have none.

    Args:
        first: key of its first expert. `keys`, `tokens`: (E,), filled with those without a slot, most tokens first, and
            of as many the likeliest; tokens are of an expert that is used.
    """
    E = len(used_E)
    found, many = np.empty(E, np.int64), np.empty(E)
    here = count = 0
    for expert in range(E):
        if used_E[expert] < settings.threshold or used_E[expert] <= 0:
            continue
        if slot_of[first + expert] >= 0:
            here += 1
        else:
            # Rounded: at batch 1 all are 1 but for what a division leaves.
            found[count], many[count] = expert, max(1.0, round(tokens_E[expert] / used_E[expert], 6))
            count += 1
    # The probability weighs less than the last digit.
    order = np.argsort(-many[:count] - 1e-7 * used_E[found[:count]], kind="mergesort")
    for i in range(count):
        keys[i], tokens[i] = first + found[order[i]], many[order[i]]
    return here, count

"""PreSched: the exact optimum over two layers, by one scan (arXiv 2509.23638 as we re-implement it).

The router of layer l has chosen its experts. R of them are in slots. Of the others the link brings, in this order,
those that are on their way (late ones, by when they land) and those that are copied on demand (by token count): v_1,
v_2, ... The layer waits for the first k of v, the rest are computed on the CPU; late ones among these land later, for
later steps. V are predicted for layer l + 1 and have no slot; p of them are prefetched:

    F(k) = d + k' * t_io                         link done with what it owes: d from before, k' on demand among the k
    W(k)                                         the k-th of v is there: as it lands, or F(k) if copied on demand
    G(k) = W(k) + (R + k) * t_g                  GPU done (no wait for the link when nothing comes)
    C(k, p) = sum of c(v_j), j > k               CPU done: slower until the link is, at F(k) + p * t_io (`cpu_done`)
    T(k, p) = max(G(k), C(k, p))                 layer l done
    S(k, p) = T(k, p) + A - F(k)                 link time that is free before router l + 1 has chosen; less of it
                                                 beside the CPU, where copies are slower; below 0: still owed then
    d'   = max(0, p * t_io - S(k, p))
    N(s) = max(d' + copies of V_p+1..V_s + t_g, CPU time of the rest)   (t_g if bytes are waited for)
    M(s) = what layer l + 2 takes longer since its first copy waits for all of these (`Later`, `late_us_of`)

and (k, p, s) minimises T(k, p) + FORECAST * (N(s) + FORECAST * M(s)) - k' * w, where w is what a copy on demand is
worth behind this layer, since it stays in place of another expert (`worth_behind`; below 0: it pushes out a better
one). Six things differ from the paper. N has a weight; w and M are new. G was max(R * t_g, F(k)) + t_g, but our engine
computes a layer's experts together, when all of them are there. Link and CPU read the same memory, so a copy slows the
CPU down. And a late copy is waited for only if that is sooner than computing its expert on the CPU. Prefetches beyond
S(k, p) only move work from one layer to the next, so p ends with the first prefetch that finds no free time. An expert
of V that is not prefetched costs its time by the probability of its use; a prefetch costs its whole time.
"""

from typing import NamedTuple

import numpy as np

from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from .fill import price_us
from .types import Costs, cpu_time

#: Weight of the next layer's time. When link and CPU are both busy, moving an expert from the link to the CPU makes
#: room for one more prefetch, so T + N hardly depends on k, and errors of the forecast would decide. With a little less
#: weight, the end of the present layer decides. 0.6 to 0.9 are alike; 1 is 1 % slower on average, 2 % at batch 64, and
#: up to 14 % where t_g is known less well (docs/log/scheduler.md).
FORECAST = 0.8


class Later(NamedTuple):
    """Of layer l + 2, the expert that it wants most and lacks: its copy is the first that the link's debts delay.

    Without it, copies that each saved the next layer a little kept the link so busy that every layer of Mixtral's shape
    at batch 64 waited for a late one (docs/log/scheduler.md).
    """

    used: float  # probability of use; 0: there is none, or no CPU lane
    cpu_us: float  # the CPU's time for it
    rest_us: float  # and for all others that the layer lacks: a copy that lands meanwhile is not late


#: Nothing is known of layer l + 2.
NOTHING_LATER = Later(0.0, 0.0, 0.0)


@jit
def share_alone(beside_us: float, alone_us: float) -> float:
    """Share of the CPU's time beside a busy link that it takes while the link is idle."""
    return min(1.0, alone_us / beside_us) if beside_us > 0.0 else 1.0


@jit
def cpu_done(beside_us: float, share: float, link_us: float) -> float:
    """When a CPU is done that needs `beside_us` beside a busy link and `share` of that beside an idle one; the link is
    busy until `link_us`.
    """
    return beside_us if beside_us <= link_us else link_us + share * (beside_us - link_us)


@jit
def split(
    costs: Costs,
    tokens: IntArray,
    num_hits: int,
    late_us: FloatArray,
    backlog_us: float,
    next_tokens: FloatArray,
    next_used: FloatArray,
    num_linked: int = -1,
    gain: float = 0.0,
    later: Later = NOTHING_LATER,
) -> tuple[int, int, float, float, float]:
    """Best (k, p), its T + FORECAST * N (without M and w), T itself, and the link's free time S before any
    prefetch, us (below 0: what it owes).

    Args:
        tokens: (n,) of v: the late ones, the first to land first, then the missing ones, descending.
        num_hits: experts in slots. `late_us`: (l,) when the late ones land.
        backlog_us: rest of what is on the wire.
        next_tokens, next_used: (m,) of the candidates of layer l + 1, the most wanted first.
        num_linked: k, if that is decided. `gain`: uses that a swap of experts gains, see `learn.gain_of_swap`.
    """
    n, m = len(tokens), len(next_tokens)
    cpu_us, cpu_alone_us = costs.cpu_us, costs.cpu_alone_us
    has_cpu = len(cpu_us) > 1
    # Sums from the end: CPU time of u_k+1..u_n, and of V_p+1..V_m by probability; beside the link, and the share of it
    # that it takes alone.
    cpu_rest, share_rest = np.zeros(n + 1), np.ones(n + 1)
    link_next, cpu_next, share_next = np.zeros(m + 1), np.zeros(m + 1), np.ones(m + 1)
    for j in range(m):
        link_next[j + 1] = link_next[j] + next_used[j] * costs.link_us
    # N if nothing is owed and nothing follows, once it is known: the least that it can be.
    next_us = np.full(m + 1, -1.0)
    any_next, alone_us = 0.0, 0.0
    if has_cpu:
        for j in range(n - 1, -1, -1):
            # The cost of a submission is there as soon as there is one.
            submit = costs.cpu_base_us if j == n - 1 else 0.0
            cpu_rest[j] = cpu_rest[j + 1] + submit + cpu_time(cpu_us, tokens[j])
            alone_us += submit + cpu_time(cpu_alone_us, tokens[j])
            share_rest[j] = share_alone(cpu_rest[j], alone_us)
        alone_us = 0.0
        for j in range(m - 1, -1, -1):
            each = max(1.0, next_tokens[j] / max(next_used[j], 1e-6))
            # As soon as any of them is used.
            submit = (min(1.0, any_next + next_used[j]) - min(1.0, any_next)) * costs.cpu_base_us
            any_next += next_used[j]
            cpu_next[j] = cpu_next[j + 1] + submit + next_used[j] * cpu_time(cpu_us, each)
            alone_us += submit + next_used[j] * cpu_time(cpu_alone_us, each)
            share_next[j] = share_alone(cpu_next[j], alone_us)
    best_k, best_p, best_us, best_window, best_done, best_free = n, 0, np.inf, np.inf, 0.0, 0.0
    most = n if num_linked < 0 else num_linked
    least = most if num_linked >= 0 or not has_cpu else 0
    slower = 1.0 - costs.link_us / max(costs.link_busy_us, 1e-9)
    # The k that has this layer done soonest is looked at before all, for a bound: most others need no closer look. What
    # is beyond the bound is not chosen, so the choice is the same.
    first, first_us, late = most, np.inf, len(late_us)
    for k in range(most, least - 1, -1):
        link, gpu = _lanes(costs, k, n, num_hits, late_us, backlog_us)
        done = max(gpu, cpu_done(cpu_rest[k], share_rest[k], link))
        if done < first_us:
            first, first_us = k, done
    worth_us = 0.0
    if has_cpu and num_linked < 0 and n > late and gain != 0.0:
        worth_us = worth_behind(costs, gain, first_us, n, cpu_rest[late], n - late)
    bound_us = np.inf
    for turn in range(most + 1, least - 1, -1):
        k = turn if turn <= most else first
        link, gpu = _lanes(costs, k, n, num_hits, late_us, backlog_us)
        worth = max(0, k - late) * worth_us
        for p in range(m + 1):
            cpu = cpu_done(cpu_rest[k], share_rest[k], link + p * costs.link_busy_us)
            done = max(gpu, cpu)
            # What follows costs something too, and a further prefetch more.
            ends = done - worth
            if ends >= min(best_us, bound_us):
                break
            free = done + costs.rest_us + costs.decide_us - link
            free -= slower * max(0.0, min(free, cpu - link))
            owed = max(0.0, p * costs.link_us - free)
            if next_us[p] < 0.0:
                next_us[p], _ = _next_layer(
                    costs, has_cpu, p, 0.0, 0.0, NOTHING_LATER, link_next, cpu_next, share_next
                )
            # Fewer prefetches, and fewer experts on the CPU, unless more are better by something.
            window = total = ends + FORECAST * next_us[p]
            if total < min(best_us, bound_us) - 1e-9 and (
                owed > 0.0 or later.used > 0.0
            ):  # it can only be more
                # Where nothing comes for layer l + 1, the link goes on with layer l + 2 at once.
                idle_us = p * costs.link_us - free if p == m or k <= late else 0.0
                following, behind = _next_layer(
                    costs, has_cpu, p, owed, idle_us, later, link_next, cpu_next, share_next
                )
                window = ends + FORECAST * following
                total = window + FORECAST**2 * behind
            if turn > most:
                bound_us = min(bound_us, total + 1e-6)
            elif total < best_us - 1e-9:
                best_k, best_p, best_us, best_window, best_done, best_free = k, p, total, window, done, free
            if owed > 0.0:
                break
    return best_k, best_p, best_window + max(0, best_k - late) * worth_us, best_done, best_free


@jit
def worth_behind(
    costs: Costs, gain: float, layer_us: float, num_linked: int, cpu_us: float, num_missing: int
) -> float:
    """What one copy on demand is worth behind its layer, us; below 0: what it costs.

    A use saves what this layer takes for each expert that the link brings or the CPU computes. It is no more than the
    price of a copy for reuse where that pays: the expert would come then too, while nobody waits for it. Without that
    bound, batch 1 was up to 18 % slower (docs/log/scheduler.md).

    Args:
        gain: see `learn.gain_of_swap`. `layer_us`: the layer's least time without prefetches.
        num_linked: late ones and misses. `cpu_us`: of the misses, all of them on the CPU.
    """
    worth = gain * layer_us / num_linked
    price = price_us(costs, cpu_us, max(layer_us, cpu_us) + costs.rest_us + costs.decide_us)
    return min(worth, price) if gain * cpu_us / num_missing > price else worth


@jit
def late_us_of(costs: Costs, later: Later, link_us: float, next_us: float) -> float:
    """Expected time that layer l + 2 takes longer for the expert that it wants most: its copy comes late, or the CPU
    computes it, whichever is sooner.

    Args:
        link_us: when the link can begin that copy, from the choice of router l + 1 on; below 0: before it.
        next_us: layer l + 1 takes so long for its experts.
    """
    late_us = link_us + costs.link_us - next_us - costs.rest_us - costs.decide_us - later.rest_us
    return later.used * max(0.0, min(later.cpu_us, late_us))


@jit
def _lanes(
    costs: Costs, k: int, n: int, num_hits: int, late_us: FloatArray, backlog_us: float
) -> tuple[float, float]:
    """F(k) and G(k): when the link is done with what it owes, and the GPU with the layer's share."""
    on_demand = max(0, k - len(late_us))
    link = backlog_us + on_demand * (costs.link_busy_us if k < n else costs.link_us)
    gpu = (num_hits + k) * costs.gpu_us
    if k > 0:
        gpu += link if on_demand > 0 else late_us[k - 1]
    return link, gpu


@jit
def _next_layer(
    costs: Costs,
    has_cpu: bool,
    p: int,
    owed_us: float,
    idle_us: float,
    later: Later,
    link_next: FloatArray,
    cpu_next: FloatArray,
    share_next: FloatArray,
) -> tuple[float, float]:
    """N and M: expected times of what layer l + 1 will miss when the first p candidates were prefetched, and of what
    layer l + 2 takes longer.

    Args:
        owed_us: by the link, when router l + 1 has chosen.
        idle_us: since when the link is idle if it owes and copies nothing; 0 or below.
    """
    m = len(link_next) - 1
    if p == m:  # what comes late is computed late
        ends = owed_us + costs.gpu_us if owed_us > 0.0 and p > 0 else 0.0
        return ends, late_us_of(costs, later, owed_us if owed_us > 0.0 else idle_us, ends)
    if not has_cpu:
        link = owed_us + link_next[m] - link_next[p]
        ends = link + costs.gpu_us
        return ends, late_us_of(costs, later, link, ends)
    # Not only where link and CPU end together: a CPU that is fast while the link is idle had better do all.
    best, best_ends, best_behind = np.inf, np.inf, 0.0
    for s in range(p, m + 1):
        link = owed_us + link_next[s] - link_next[p]
        # The last prefetch is waited for; what the link owes before all of them is not.
        gpu = link + costs.gpu_us if s > p or (p > 0 and owed_us > 0.0) else 0.0
        if gpu >= best:
            break
        ends = max(gpu, cpu_done(cpu_next[s], share_next[s], link))
        if ends < best:
            behind = late_us_of(costs, later, link if link > 0.0 else idle_us, ends)
            if ends + FORECAST * behind < best:
                best, best_ends, best_behind = ends + FORECAST * behind, ends, behind
    return best_ends, best_behind

"""PreSched: the exact optimum of a two-layer window, by one scan (arXiv 2509.23638 as we re-implement it).

At layer l, after its router: R experts are here, u_1 >= u_2 >= ... are missing, by token count; V are predicted for
layer l + 1 and absent. The first k of u are copied, the rest computed on the CPU, and p of V are prefetched:

    F(k) = d + k * t_io                          the link is done with what it owes, d of it from before
    G(k) = F(k) + (R + k) * t_g                  GPU done (no wait for the link when nothing comes)
    C(k) = sum of c(u_j), j > k                  CPU done
    T(k) = max(G(k), C(k))                       layer l done
    S(k) = T(k) + A - F(k)                       link time that is free before router l + 1 has spoken
    d'   = max(0, p * t_io - S(k))
    N    = min over s of max(d' + copies of V_p+1..V_s + t_g, CPU time of the rest)   (t_g if bytes are waited for)

and (k, p) minimises T(k) + FORECAST * N. Two things differ from the paper's sum: the weight of N, and G, where it has
max(R * t_g, F(k)) + t_g: the engine computes a layer's experts together, when all of them are there. Prefetches beyond
S(k) shift work from one layer to the next and win nothing, so only p = floor(S / t_io) and one more need a look. V is
weighed by the probability of its use: what is not prefetched costs its time by that probability, a prefetch costs its
whole time.
"""

import numpy as np

from ..jit import jit
from .terms import Costs, FloatArray, IntArray, cpu_time

#: Weight of the next layer's time. When link and CPU are both busy, what is moved from the link to the CPU here makes
#: room for as many prefetches, so T + N hardly depends on k: a plateau, on which errors of the forecast decide. With a
#: little less weight the sooner end of the layer at hand decides. 0.6 to 0.9 are alike; 1 is 1 % slower on average, 2 %
#: at batch 64, and up to 14 % where t_g is known less well (LOG.md).
FORECAST = 0.8


@jit
def split(
    costs: Costs,
    tokens: IntArray,
    num_here: int,
    num_late: int,
    backlog_us: float,
    next_tokens: FloatArray,
    next_used: FloatArray,
    num_load: int = -1,
) -> tuple[int, int, float, float]:
    """Best (k, p), its time T(k) + FORECAST * N in us, and the link's free time S(k) behind it.

    Args:
        tokens: (n,) of the missing experts, descending.
        num_here: experts that are in slots or in flight, `num_late` of them in flight.
        backlog_us: rest of what is on the wire.
        next_tokens, next_used: (m,) of the candidates of layer l + 1, the most wanted first.
        num_load: k, if that is decided.
    """
    n, m = len(tokens), len(next_tokens)
    has_cpu = len(costs.cpu_us) > 1
    # Sums from the end: CPU time of u_k+1..u_n, and of V_p+1..V_m by probability.
    cpu_rest = np.zeros(n + 1)
    link_next, cpu_next = np.zeros(m + 1), np.zeros(m + 1)
    for j in range(m):
        link_next[j + 1] = link_next[j] + next_used[j] * costs.link_us
    any_next = 0.0
    if has_cpu:
        for j in range(n - 1, -1, -1):
            cpu_rest[j] = cpu_rest[j + 1] + cpu_time(costs.cpu_us, tokens[j])
        for j in range(m - 1, -1, -1):
            each = max(1.0, next_tokens[j] / max(next_used[j], 1e-6))
            # The cost of a submission is there as soon as any of them is used.
            submit = (min(1.0, any_next + next_used[j]) - min(1.0, any_next)) * costs.cpu_base_us
            any_next += next_used[j]
            cpu_next[j] = cpu_next[j + 1] + submit + next_used[j] * cpu_time(costs.cpu_us, each)
    best_k, best_p, best_us, best_slack = n, 0, np.inf, 0.0
    most = n if num_load < 0 else num_load
    least = most if num_load >= 0 or not has_cpu else 0
    for k in range(most, least - 1, -1):
        copy_us = costs.link_busy_us if k < n else costs.link_us
        link = backlog_us + k * copy_us
        gpu = (num_here + k) * costs.gpu_us
        if k > 0 or num_late > 0:
            gpu += link
        done = gpu if k == n else max(gpu, costs.cpu_base_us + cpu_rest[k])
        if done >= best_us:  # what follows costs something too
            continue
        slack = max(0.0, done + costs.rest_us + costs.decide_us - link)
        first = min(m, int(slack / costs.link_us))
        for p in range(first, min(m, first + 1) + 1):
            owed = max(0.0, p * costs.link_us - slack)
            total = done + FORECAST * _next_layer(costs, has_cpu, p, owed, link_next, cpu_next)
            # Fewer prefetches, and fewer experts on the CPU, unless more are better by something.
            if total < best_us - 1e-9:
                best_k, best_p, best_us, best_slack = k, p, total, slack
    return best_k, best_p, best_us, best_slack


@jit
def _next_layer(
    costs: Costs, has_cpu: bool, p: int, owed_us: float, link_next: FloatArray, cpu_next: FloatArray
) -> float:
    """Expected time of what layer l + 1 will miss when the first p candidates were prefetched."""
    m = len(link_next) - 1
    late_us = costs.gpu_us if owed_us > 0.0 else 0.0  # what comes late is computed late
    if p == m:
        return owed_us + late_us
    if not has_cpu:
        return owed_us + link_next[m] - link_next[p] + costs.gpu_us
    # Copying more of them takes the link longer and the CPU less: the best split is where the two cross.
    low, high = p, m
    while low < high:
        middle = (low + high) // 2
        if owed_us + link_next[middle] - link_next[p] + costs.gpu_us < cpu_next[middle]:
            low = middle + 1
        else:
            high = middle
    best = np.inf
    for s in range(max(p, low - 1), low + 1):
        link = owed_us + link_next[s] - link_next[p] + (costs.gpu_us if s > p else late_us)
        best = min(best, max(link, cpu_next[s]))
    return best

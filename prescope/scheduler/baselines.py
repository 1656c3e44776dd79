"""How the systems that PreSched is compared with split a layer's misses, as we re-implement them.

Each answers how many of the misses, hottest first, are copied; the rest goes to the CPU. What is the same as
published, and what is not known, stands beside each name in `scheduler.SCHEDULES`.
"""

from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from .types import Costs, cpu_time


@jit
def fiddler(costs: Costs, tokens: IntArray) -> int:
    """Each expert for itself: copied if the CPU would take longer than copying and computing it."""
    if len(costs.cpu_us) < 2:
        return len(tokens)
    k = 0
    while k < len(tokens) and cpu_time(costs.cpu_us, tokens[k]) > costs.link_us + costs.gpu_us:
        k += 1
    return k


@jit
def hybrimoe(costs: Costs, tokens: IntArray | FloatArray, num_here: int, backlog_us: float) -> int:
    """Greedy from both ends: the link takes the hottest, the CPU the coldest; whichever ends sooner takes the next."""
    if len(costs.cpu_us) < 2:
        return len(tokens)
    link, cpu = backlog_us, costs.cpu_base_us
    k, end = 0, len(tokens)
    while k < end:
        # Computed together with what is here, as the engine does.
        by_link = link + costs.link_us + (num_here + k + 1) * costs.gpu_us
        by_cpu = cpu + cpu_time(costs.cpu_us, tokens[end - 1])
        if by_cpu < by_link:
            cpu, end = by_cpu, end - 1
        else:
            link, k = link + costs.link_us, k + 1
    return k


@jit
def static_split(costs: Costs, tokens: IntArray) -> int:
    """Nothing is copied; without a CPU lane everything is."""
    return len(tokens) if len(costs.cpu_us) < 2 else 0


@jit
def artefact(costs: Costs, tokens: IntArray) -> int:
    """Hottest first: copied while it is sooner on the GPU, behind the copies before it, than the CPU is done with it
    and all that follow.
    """
    if len(costs.cpu_us) < 2:
        return len(tokens)
    left = 0.0
    for i in range(len(tokens)):
        left += cpu_time(costs.cpu_us, tokens[i])
    k = 0
    while k < len(tokens) and (1 + k) * costs.link_us + costs.gpu_us < left:
        left -= cpu_time(costs.cpu_us, tokens[k])
        k += 1
    return k

"""Which experts a cache would not have: the pairs of token and expert that a schedule pays for.

Shapes: R rows, L MoE layers, E experts.
"""

import numpy as np
from numpy.typing import NDArray

from ..scheduler.costs import LayerCosts
from ..scheduler.schedules import SCHEDULES
from ..simulator import SimResult, Simulator, as_decode
from ..simulator.replay import AT_LAYER, KEY, ON_DEMAND, REASON, STEP
from ..traces.routing import RoutingTrace, used_mask

#: Which copies a cache makes on demand does not depend on what they cost.
_ANY_COSTS = LayerCosts(link_us=1.0, gpu_us=0.0, rest_us=0.0, source="of no account")


def missed_by_cache(on_demand: SimResult) -> NDArray[np.bool_]:
    """(S, L, E) what a replay without prefetches and CPU experts copied: what its cache missed in each of S steps."""
    needs = on_demand.needs.tokens_SLE
    missed = np.zeros_like(needs, dtype=bool)
    copies = on_demand.log.copies
    copies = copies[copies[:, REASON] == ON_DEMAND]
    missed[copies[:, STEP], copies[:, AT_LAYER], copies[:, KEY] % needs.shape[2]] = True
    return missed


def absent_pairs(trace: RoutingTrace, *, slots: float, cache: str | None = None) -> NDArray[np.bool_]:
    """(R, L, E) which experts have no slot when a row's token comes to a layer, its prompts decoded one after another.

    An expert that a token uses is absent exactly if the cache misses it. One that it does not use counts as there if
    its next use will be a hit: a copy of it would be useless. Padding is False.

    Args:
        slots: share of all experts. `cache`: policy; PreSched's when not given.
    """
    cache = SCHEDULES["presched"].cache if cache is None else cache
    simulator = Simulator(as_decode(trace), _ANY_COSTS, row_bytes=1)
    missed_SLE = missed_by_cache(simulator.run("on-demand", slots=slots, cache=cache))
    # `as_decode` at batch 1: a step a row, sequence by sequence.
    rows = np.flatnonzero(trace.position >= 0)
    rows = rows[np.lexsort((trace.position[rows], trace.sequence[rows]))]
    used_SLE = used_mask(trace.expert_ids[rows], trace.num_experts)
    absent_SLE = np.ones(used_SLE.shape, dtype=bool)
    later_LE = np.ones(used_SLE.shape[1:], dtype=bool)  # what is not used any more need not be there
    for step in range(len(rows) - 1, -1, -1):
        later_LE = np.where(used_SLE[step], missed_SLE[step], later_LE)
        absent_SLE[step] = later_LE
    absent_RLE = np.zeros((len(trace), *absent_SLE.shape[1:]), dtype=bool)
    absent_RLE[rows] = absent_SLE
    return absent_RLE

"""Time of steps whose experts are copied: a link that serves one copy at a time beside the GPU.

Shapes: S steps, E experts, L MoE layers, W prefetch width.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..scheduler.costs import LayerCosts

Times = NDArray[np.float64]
Mask = NDArray[np.bool_]


class StepTimes(NamedTuple):
    """What a walk through the layers of each step found."""

    total_us: Times  # (S,)
    stall_us: Times  # (S,) of these: waited for copies
    demanded: NDArray[np.int64]  # (S,) copies issued after the router's choice
    prefetched: NDArray[np.int64]  # (S,) copies begun on a prediction
    useful: NDArray[np.int64]  # (S,) of these: needed in the end


def step_times(
    needed_SLE: Mask,
    resident_LE: Mask,
    costs: LayerCosts,
    wanted_SLW: NDArray[np.int64] | None = None,
    lookahead: int = 1,
) -> StepTimes:
    """Time of each step when experts that are not in slots are copied, on demand or ahead.

    Every step starts with an idle link and the same residents; what was copied is not kept for the next one.

    Args:
        needed_SLE: experts each step needs. `resident_LE`: those that are in slots all the time.
        wanted_SLW: experts of each layer to prefetch, best first, -1 for none, decided `lookahead` layers before it;
            None predicts nothing, and costs no `predict_us`.
    """
    S, L, E = needed_SLE.shape
    width = 0 if wanted_SLW is None else wanted_SLW.shape[2]
    compute_us = costs.rest_us + (costs.predict_us if wanted_SLW is not None else 0.0)
    clock, link, stall = np.zeros(S), np.zeros(S), np.zeros(S)
    done_SLE = np.full((S, L, E), np.inf)  # when each prefetched expert is there
    demanded, rows = np.zeros(S, dtype=np.int64), np.arange(S)
    for layer in range(L):
        missing = needed_SLE[:, layer] & ~resident_LE[layer]
        begun = np.isfinite(done_SLE[:, layer])
        count = (missing & ~begun).sum(1)
        # A prefetch under way is not interrupted: on-demand copies wait for it, whether it is needed or not.
        link = np.where(count > 0, np.maximum(link, clock) + count * costs.link_us, link)
        arrived = np.where(missing & begun, done_SLE[:, layer], 0.0).max(1, initial=0.0)
        wait = np.maximum(np.maximum(arrived, np.where(count > 0, link, 0.0)) - clock, 0.0)
        following = clock + wait + needed_SLE[:, layer].sum(1) * costs.gpu_us + compute_us
        stall, demanded = stall + wait, demanded + count
        targets = range(layer + 1, min(layer + lookahead, L - 1) + 1) if wanted_SLW is not None else ()
        for target, rank in ((t, r) for t in targets if t >= lookahead for r in range(width)):
            assert wanted_SLW is not None
            expert = wanted_SLW[:, target, rank]
            begin = np.maximum(link, clock)
            starts = (expert >= 0) & (begin < following) & np.isinf(done_SLE[rows, target, expert])
            starts &= ~resident_LE[target, expert]
            link = np.where(starts, begin + costs.link_us, link)
            done_SLE[rows[starts], target, expert[starts]] = link[starts]
        clock = following
    begun = np.isfinite(done_SLE)
    return StepTimes(
        clock, stall, demanded, begun.sum((1, 2)), (begun & needed_SLE & ~resident_LE).sum((1, 2))
    )

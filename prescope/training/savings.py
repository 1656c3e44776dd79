"""Does a predictor pay? Milliseconds it saves per token by the cost model, after its own cost.

Answered on a recorded trace for any predictor, so also for the oracle and the early router before one is trained.
The most frequent experts of the trace, a fixed share of each layer, are taken to stay in slots: caches are left to the
simulator. A predictor that costs more than it saves gets a negative figure; predicting nothing is 0.

Shapes: R rows, S steps, E experts, L MoE layers, W prefetch width.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedOption
from ..predictor.base import Predictor, used_mask
from ..scheduler.costs import LayerCosts
from ..traces.routing import RoutingTrace
from .step_times import StepTimes, step_times

#: Rows a cost is estimated on, spread over the trace: the mean moves by less than a percent beyond.
WORTH_ROWS = 4096


class Savings(NamedTuple):
    """What prefetching by a predictor does to a token's time; times in ms per step of `batch` tokens."""

    predictor: str
    lookahead: int
    width: int  # experts prefetched for a layer at most
    batch: int
    resident_frac: float
    without_ms: float  # all on demand
    with_ms: float
    stall_without_ms: float
    stall_with_ms: float
    useful_frac: float  # of the prefetches begun, those needed
    predict_us: float  # cost of one prediction, per layer
    source: str  # of the costs

    @property
    def saved_ms(self) -> float:
        return self.without_ms - self.with_ms


def savings(
    predictor: Predictor,
    trace: RoutingTrace,
    costs: LayerCosts,
    *,
    lookahead: int = 1,
    width: int | None = None,
    resident_frac: float = 0.25,
    batch: int = 1,
) -> Savings:
    """Milliseconds per step with and without a predictor; `costs.predict_us` is what this one costs in each layer.

    Args:
        width: experts to prefetch for a layer, those resident left out; K for each token when not given.
        resident_frac: share of each layer's experts that stay in slots, the most frequent ones.
        batch: tokens of a step, of different sequences where the trace has them.
    """
    if not 0.0 <= resident_frac <= 1.0 or batch < 1:
        raise UnsupportedOption("resident_frac lies in [0, 1] and batch is at least 1")
    E = trace.num_experts
    width = min(E, trace.top_k * batch if width is None else width)
    real = np.flatnonzero(trace.position >= 0)
    order = real[np.lexsort((trace.sequence[real], trace.position[real]))]
    steps = max(1, min(len(order), WORTH_ROWS) // batch)
    first = np.linspace(0, len(order) - batch, steps).astype(int) if len(order) >= batch else np.zeros(1, int)
    rows = order[np.minimum(first[:, None] + np.arange(batch), len(order) - 1)]  # (S, batch)
    used = used_mask(trace.expert_ids, E)
    resident = residents(used[real], resident_frac)
    needed: NDArray[np.bool_] = np.asarray(used[rows].any(axis=1))
    scores = predictor.replay(trace, lookahead)[rows].sum(axis=1, dtype=np.float32)
    wanted = wanted_experts(scores, resident, width, lookahead)
    without = step_times(needed, resident, costs)
    with_it = step_times(needed, resident, costs, wanted, lookahead)
    return Savings(
        predictor.name, lookahead, width, batch, resident_frac, *_both(without, with_it),
        float(with_it.useful.sum() / max(with_it.prefetched.sum(), 1)), costs.predict_us, costs.source,
    )  # fmt: skip


def residents(used_RLE: NDArray[np.bool_], frac: float) -> NDArray[np.bool_]:
    """(L, E): the most frequent share of each layer's experts."""
    counts = used_RLE.sum(axis=0)
    keep = round(frac * counts.shape[1])
    mask = np.zeros(counts.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(-counts, axis=1, kind="stable")[:, :keep], True, axis=1)
    return mask


def wanted_experts(
    scores: NDArray[np.float32], resident_LE: NDArray[np.bool_], width: int, lookahead: int
) -> NDArray[np.int64]:
    """(S, L, W) experts to prefetch for each layer, best first, -1 for none; scores (S, L - lookahead, E) are for
    the layers from `lookahead` on. An expert that scores 0 is not wanted.
    """
    S, _, E = scores.shape
    absent = np.where(resident_LE[lookahead:], 0.0, scores)
    best = np.argsort(-absent, axis=-1, kind="stable")[..., :width]
    best = np.where(np.take_along_axis(absent, best, axis=-1) > 0, best, -1)
    return np.concatenate([np.full((S, lookahead, min(width, E)), -1), best], axis=1)


def _both(without: StepTimes, with_it: StepTimes) -> tuple[float, float, float, float]:
    times = (without.total_us, with_it.total_us, without.stall_us, with_it.stall_us)
    first, second, third, fourth = (float(t.mean()) / 1e3 for t in times)
    return first, second, third, fourth

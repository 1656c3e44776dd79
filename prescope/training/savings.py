"""Does a predictor pay? Milliseconds it saves per token by the cost model, after its own cost.

Answered on a recorded trace for any predictor, so also for the oracle and the early router before one is trained: the
simulator replays the trace by PreSched without the CPU, with the predictions and without any. A share of each layer's
experts, the most frequent ones of the trace, is in slots at the beginning, and stays where nothing else needs the slot.
A prediction delays prefetches, and where the host launches each layer (`LayerCosts.is_layered`) the layers as well; one
that costs more than it saves gets a negative figure; predicting nothing is 0.

Shapes: R rows, E experts, L MoE layers.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.numbers import is_number, require_count
from ..errors import UnsupportedOption
from ..predictor.base import Predictor
from ..scheduler.costs import LayerCosts
from ..simulator import SimResult, Simulator, as_decode
from ..traces.routing import RoutingTrace, used_mask
from .prepare import spread

#: Tokens that are replayed at least, of whole prompts spread over the trace: the mean moves by less than a percent
#: beyond.
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
    useful_frac: float  # of the prefetches, those needed before they gave up their slot; 0 without any
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
        lookahead: layers ahead that are prefetched for at most.
        width: experts to prefetch for a layer, those resident left out; K for each token when not given.
        resident_frac: share of each layer's experts that slots are there for, and hold at first, the most frequent
            ones; there are always slots for a layer's needs and as many prefetches.
        batch: tokens of a step, of different sequences.

    Raises:
        UnsupportedOption: a setting out of its range. BadTrace: no tokens, or none of the inputs the predictor reads.
    """
    require_count("batch", batch)
    if width is not None:
        require_count("width", width, 0)
    if not is_number(resident_frac) or not 0.0 <= resident_frac <= 1.0:
        raise UnsupportedOption(f"resident_frac is {resident_frac!r}; it lies in [0, 1]")
    E, L = trace.num_experts, trace.num_layers
    width = min(E, trace.top_k * batch if width is None else width)
    real = trace.position >= 0
    used_LE = used_mask(trace.expert_ids[real], E).sum(axis=0)
    resident = residents(used_LE, resident_frac)
    step = min(E, trace.top_k * batch)
    simulator = Simulator(
        as_decode(some_prompts(trace, WORTH_ROWS, batch), batch),
        costs,
        row_bytes=1,
        predictor=predictor,
        lookahead=lookahead,
    )

    def replayed(ahead: int) -> SimResult:
        return simulator.run(
            "presched",
            slots=min(E * L, max(int(resident.sum()), step + min(E, width) + 1)),
            cache="static",
            frequencies=_ranks(used_LE).astype(np.float64),
            lookahead=ahead,
            width=width,
            cpu=False,
            resident=resident,
        )

    without, with_it = replayed(0), replayed(lookahead)
    counts = with_it.counts
    steps = len(simulator.needs.steps)
    return Savings(
        predictor.name, lookahead, width, batch, resident_frac, without.step_ms, with_it.step_ms,
        without.stall_ms / steps, with_it.stall_ms / steps, counts.prefetched / max(counts.prefetches, 1),
        costs.predict_us, costs.source,
    )  # fmt: skip


def some_prompts(trace: RoutingTrace, least: int, batch: int) -> RoutingTrace:
    """Whole sequences, evenly spaced, of `least` rows in all or the whole trace; a multiple of `batch` sequences."""
    sequences, rows = np.unique(trace.sequence, return_counts=True)
    count = int(np.ceil(least / rows.mean() / batch)) * batch if len(rows) else 0
    if count >= len(sequences):
        return trace
    return trace.take(np.isin(trace.sequence, spread(sequences, count)))


def residents(used_LE: NDArray[np.integer], frac: float) -> NDArray[np.bool_]:
    """(L, E): the most frequent share of each layer's experts."""
    return _ranks(used_LE) >= used_LE.shape[1] - round(frac * used_LE.shape[1])


def _ranks(used_LE: NDArray[np.integer]) -> NDArray[np.int64]:
    """(L, E): each expert's place in its layer, 0 for the least frequent; so that no layer's go before another's."""
    return np.argsort(np.argsort(used_LE, axis=1, kind="stable"), axis=1, kind="stable")

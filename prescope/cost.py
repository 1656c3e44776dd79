"""What copying, computing and predicting cost, and what they add up to when the link works beside the GPU.

Pure: numbers in, numbers out; measured by others and handed in with their origin. The timeline that `step_times`
walks is the simplest true one: one link that serves one copy at a time and never interrupts it, demand before
prefetch, the most urgent prefetch first. Units are microseconds.

Shapes: S steps, E experts, L MoE layers, W prefetch width.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import BadTrace, UnsupportedOption
from .result import RunResult

Times = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Costs of one MoE layer of one model on one machine, microseconds.

    Args:
        link_us: one expert over the link, host to device, with nothing beside it.
        link_busy_us: the same while the CPU computes experts: both read the same memory. None: as `link_us`.
        gpu_us: one expert computed on the device, with the tokens of a step.
        rest_us: the rest of a layer: attention, router, launches.
        predict_us: one prediction. It is made beside the layer; a decision waits for it if its schedule has no lag.
        cpu_us: `cpu_us[n]`: one expert with n tokens on the CPU while the link is busy, when several are submitted
            together; index 0 is 0.0. Beyond its end whoever reads it goes on in a straight line. Empty: no CPU lane.
        cpu_base_us: one submission of CPU experts, however many, and merging its result.
        cpu_alone_us: as `cpu_us`, while the link is idle: both read the same memory. For the clock of the simulator;
            decisions reckon with a busy link. Empty: as `cpu_us`.
        decide_us: from the router's choice on the device until the host has decided and the first copy can start. A
            layer whose experts are all there does not wait for it.
        batch_us: what copies handed over together take on the link besides their bytes: the number that says they
            are there, and marks. Each prefetch is one, a layer's on-demand copies are one or two. For the clock of
            the simulator; decisions reckon with copies as they were seen, with it.
        copy_us: host time to enqueue one copy.
        is_layered: the host launches each layer, so that its decisions and predictions are in every layer's way.
        source: where the numbers come from, in words.
    """

    link_us: float
    link_busy_us: float | None = None
    gpu_us: float
    rest_us: float
    predict_us: float = 0.0
    cpu_us: tuple[float, ...] = ()
    cpu_base_us: float = 0.0
    cpu_alone_us: tuple[float, ...] = ()
    decide_us: float = 0.0
    batch_us: float = 0.0
    copy_us: float = 0.0
    is_layered: bool = False
    source: str

    def __post_init__(self) -> None:
        times = (
            self.link_us, self.link_busy_us or 0.0, self.batch_us, self.gpu_us, self.rest_us, self.predict_us
        )  # fmt: skip
        if min(*times, *self.cpu_us, *self.cpu_alone_us, self.cpu_base_us, self.decide_us, self.copy_us) < 0:
            raise UnsupportedOption("costs are times in microseconds; none is negative")
        if self.cpu_alone_us and len(self.cpu_alone_us) != len(self.cpu_us):
            raise UnsupportedOption(
                f"cpu_alone_us has {len(self.cpu_alone_us)} times, cpu_us {len(self.cpu_us)}; "
                f"give one for each number of tokens, or none"
            )
        if self.cpu_us and self.cpu_us[0] != 0.0:
            raise UnsupportedOption("cpu_us[0] is the time of an expert without tokens: 0.0")

    def with_predictor(self, predict_us: float) -> "LayerCosts":
        """The same machine with a predictor of this cost in each layer."""
        return replace(self, predict_us=predict_us)


def costs_of_run(run: RunResult) -> LayerCosts:
    """Mean costs of the decode steps of a run with a timeline.

    Raises:
        BadTrace: it has no timeline, no decode step or copied nothing.
    """
    decode, layers = run.metrics.decode, int(run.layers["moe_layer"].max()) + 1
    copies = decode.on_demand_transfers + decode.prefetch_transfers
    if not decode.num_steps or not copies or not decode.dense_gpu_ms > 0:
        raise BadTrace(
            "costs are read from a run's decode steps with events=True that copied experts; "
            "generate two tokens or more with fewer slots than experts"
        )
    return LayerCosts(
        link_us=1e3 * decode.h2d_busy_ms / copies,
        gpu_us=1e3 * decode.experts_gpu_ms / decode.needed,
        rest_us=1e3 * decode.dense_gpu_ms / (decode.num_steps * layers),
        source=f"means of {decode.num_steps} decode steps, {run.label}",
    )


class StepTimes(NamedTuple):
    """What a walk through the layers of each step found."""

    total_us: Times  # (S,)
    stall_us: Times  # (S,) of these: waited for copies
    demanded: NDArray[np.int64]  # (S,) copies nobody had asked for before the router spoke
    prefetched: NDArray[np.int64]  # (S,) copies begun on a prediction
    useful: NDArray[np.int64]  # (S,) of these: needed in the end


def step_times(
    needed_SLE: Mask,
    resident_LE: Mask,
    costs: LayerCosts,
    wanted_SLW: NDArray[np.int64] | None = None,
    lookahead: int = 1,
) -> StepTimes:
    """Time of each step when experts that are not resident are copied, after the router spoke or before.

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
        # An in-flight prefetch is not interrupted: demand waits for it, be it needed or not.
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

"""What copying, computing and predicting cost, microseconds.

Pure: numbers in, numbers out; measured by others and handed in with their origin.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..core.numbers import is_number
from ..errors import BadTrace, UnsupportedOption
from ..traces.result import RunResult
from .types import Costs


class Spread(NamedTuple):
    """By how much times vary, as shares of themselves: t lies between t / (1 + share) and t * (1 + share)."""

    link: float = 0.0
    gpu: float = 0.0  # experts there
    cpu: float = 0.0  # experts there
    rest: float = 0.0  # of layers and steps; decisions and predictions too


#: Of a layer on a machine where none was seen to wait for its host: 20 to 40 us at batch 1 on H200 machines, 108 at
#: batch 8 (docs/log/simulator.md).
DECIDE_US = 40.0
#: Of a prefetch's hand-over where it was not measured: 4.8 and 5.5 us on two H200 machines (docs/log/simulator.md).
HANDOVER_US = 5.0
ASSUMED_HANDOVER = f"handing over a copy is assumed to take the host {HANDOVER_US:.0f} us"
#: Stated times, and such whose spread nobody knows.
EXACT = Spread()


def _times(name: str, given: Any) -> tuple[Any, ...]:
    """A list or array of numbers as a tuple of Python's own. Raises UnsupportedOption if it is none."""
    if isinstance(given, np.ndarray) and given.ndim == 1:
        return tuple(given.tolist())
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise UnsupportedOption(f"{name} of costs is a {type(given).__name__}; it is a list of numbers")
    return tuple(given)


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Costs of one MoE layer of one model on one machine, microseconds.

    Args:
        link_us: one expert over the link, host to device, while the CPU computes none.
        link_busy_us: the same while the CPU computes experts: both read the same memory. None: as `link_us`.
        gpu_us: one expert computed on the device, with the tokens of a step.
        rest_us: the rest of a layer: attention, router, launches.
        predict_us: one prediction, made while the layer computes; decisions of a schedule without lag wait for it.
        cpu_us: `cpu_us[n]`: one expert with n tokens on the CPU while the link is busy, when several are submitted
            together; index 0 is 0.0. Beyond its end it continues in a straight line. Empty: no CPU lane.
        cpu_base_us: one submission of CPU experts, however many, and merging its result.
        cpu_alone_us: as `cpu_us`, while the link is idle: both read the same memory. For the clock of the simulator;
            decisions assume a busy link. Empty: as `cpu_us`.
        decide_us: from the router's choice on the device until the host has decided and the first copy can start. A
            layer whose experts are all there does not wait for it.
        batch_us: what copies handed over together take on the link besides their bytes: the number that says they
            are there, and marks. Each prefetch is one, a layer's on-demand copies are one or two. For the clock of
            the simulator; decisions use copy times as measured, which include it.
        copy_us: host time to enqueue one copy. For the clock of the simulator: of a layer's on-demand copies the host
            answers behind the first one, whose hand-over `decide_us` holds.
        handover_us: host time to hand over one copy with its number and mark, as each prefetch is. For the clock of the
            simulator: a copy begins no earlier, and the host sees the next layer's question no earlier.
        is_layered: the host launches each layer, so that its decisions and predictions are in every layer's way.
        spread: how far they vary on this machine: the simulator says of its tokens/s what follows from it.
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
    handover_us: float = 0.0
    is_layered: bool = False
    spread: Spread = EXACT
    source: str

    def __post_init__(self) -> None:
        for name in ("spread", "cpu_us", "cpu_alone_us"):  # a file has plain lists, who measures has arrays
            object.__setattr__(self, name, _times(name, getattr(self, name)))
        if len(self.spread) > len(EXACT) or not all(map(is_number, self.spread)):
            raise UnsupportedOption(
                f"spread of costs is {self.spread!r:.60}; it is {len(EXACT)} numbers at most"
            )
        object.__setattr__(self, "spread", Spread(*self.spread))
        if min(self.spread) < 0:
            raise UnsupportedOption(f"{self.spread}: a share of a time is not negative")
        times = (
            self.link_us, self.link_busy_us or 0.0, self.batch_us, self.gpu_us, self.rest_us, self.predict_us
        )  # fmt: skip
        whole = (
            *times, *self.cpu_us, *self.cpu_alone_us, self.cpu_base_us, self.decide_us, self.copy_us,
            self.handover_us,
        )  # fmt: skip
        if wrong := [us for us in whole if not (is_number(us) and 0 <= us < math.inf)]:
            raise UnsupportedOption(
                f"costs are times in microseconds, {wrong[0]!r} is none; none is negative"
            )
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

    def at_worst(self) -> "LayerCosts":
        """All times as long as they may be, by their spread."""
        return self._scaled(*(1.0 + share for share in self.spread))

    def at_best(self) -> "LayerCosts":
        """All times as short as they may be, by their spread."""
        return self._scaled(*(1.0 / (1.0 + share) for share in self.spread))

    def drifting(self, others: Iterable["LayerCosts"]) -> "LayerCosts":
        """The same, with a spread that reaches what other runs took: the steps of one run do not show how far a machine
        drifts from run to run.

        Args:
            others: of the same layers on this machine; from runs, so nothing is said of the CPU's experts.
        """
        widest = self.spread
        for other in others:
            widest = widest._replace(
                link=max(widest.link, _beyond(self.link_us, other.link_us)),
                gpu=max(widest.gpu, _beyond(self.gpu_us, other.gpu_us)),
                rest=max(widest.rest, _beyond(self.rest_us, other.rest_us)),
            )
        return replace(self, spread=widest)

    def _scaled(self, link: float, gpu: float, cpu: float, rest: float) -> "LayerCosts":
        return replace(
            self,
            link_us=link * self.link_us,
            link_busy_us=None if self.link_busy_us is None else link * self.link_busy_us,
            batch_us=link * self.batch_us,
            gpu_us=gpu * self.gpu_us,
            rest_us=rest * self.rest_us,
            predict_us=rest * self.predict_us,
            decide_us=rest * self.decide_us,
            copy_us=rest * self.copy_us,
            handover_us=rest * self.handover_us,
            cpu_us=tuple(cpu * us for us in self.cpu_us),
            cpu_alone_us=tuple(cpu * us for us in self.cpu_alone_us),
            cpu_base_us=cpu * self.cpu_base_us,
        )


def _beyond(one_us: float, other_us: float) -> float:
    """By what share the longer of two times is longer; 0.0 where one is not known."""
    return max(one_us, other_us) / min(one_us, other_us) - 1.0 if min(one_us, other_us) > 0 else 0.0


def costs_of_run(run: RunResult) -> LayerCosts:
    """Costs of the decode steps of a run with a timeline: medians, since one interrupted step says nothing of the rest.

    Raises:
        BadTrace: it has no timeline, no decode step or copied nothing.
    """
    copies, rest = _copies_and_rest(run)
    if not has_times(run):
        raise BadTrace(
            "costs are read from a run's decode steps with events=True that copied experts; "
            "generate two tokens or more with fewer slots than experts"
        )
    num_layers = int(run.layers["moe_layer"].max()) + 1
    experts = _expert_us(run)
    return LayerCosts(
        link_us=float(copies.median()),
        gpu_us=float(experts.median()) if len(experts) else 0.0,
        rest_us=float(rest.median()) / num_layers,
        spread=Spread(
            link=spread_of(copies), gpu=spread_of(experts.groupby("step").median()), rest=spread_of(rest)
        ),
        source=f"medians of {run.metrics.decode.num_steps} decode steps, {run.label}",
    )


def decide_us_of(run: RunResult) -> float:
    """Wait for the host of a layer that waits for it, microseconds: the median of the decode steps; 0.0 if none waits.

    From a graph a layer whose experts are all in slots waits for nobody; layer by layer all do.
    """
    layers = run.layers[run.layers["phase"] == "decode"]
    if run.driver != "layered":
        layers = layers[layers["hits"] < layers["needed"]]
    events = run.events[(run.events["phase"] == "decode") & (run.events["kind"] == "host_wait")]
    waits = events[events["moe_layer"] >= 0].groupby("step")["dur_us"].sum()
    num_waiting = layers.groupby("step").size()
    each = waits.reindex(num_waiting.index).fillna(0.0) / num_waiting
    return float(each.median()) if len(each) else 0.0


def has_times(run: RunResult) -> bool:
    """Whether a run's decode steps say what its layers and copies took."""
    copies, rest = _copies_and_rest(run)
    return len(copies) > 0 and bool(rest.median() > 0)


def _copies_and_rest(run: RunResult) -> tuple[pd.Series, pd.Series]:
    """Microseconds of each copy of the decode steps, and of each step's layers without their experts."""
    events = run.events[run.events["phase"] == "decode"]
    copies = events.loc[events["kind"] == "transfer", "dur_us"]
    return copies, events[events["kind"] == "dense"].groupby("step")["dur_us"].sum()


def _expert_us(run: RunResult) -> pd.Series:
    """Of each layer and decode step: the device's time for experts by how many it computed."""
    keys = ["step", "moe_layer"]
    events = run.events[(run.events["lane"] == "gpu") & (run.events["kind"] == "experts")]
    layers = run.layers[run.layers["phase"] == "decode"].set_index(keys)
    computed = (layers["needed"].astype("int64") - layers["on_cpu"]).rename("computed")
    each = pd.concat([events.groupby(keys)["dur_us"].sum(), computed], axis=1, join="inner")
    each = each[each["computed"] > 0]
    return each["dur_us"] / each["computed"]


def spread_of(times: pd.Series) -> float:
    """Half of the range in which nine of ten lie, by the median."""
    low, middle, high = times.quantile([0.05, 0.5, 0.95]) if len(times) else (0.0, 0.0, 0.0)
    return float((high - low) / 2 / middle) if middle > 0 else 0.0


def compiled_costs(costs: LayerCosts, *, cpu: bool, predicts: bool) -> Costs:
    """Costs as the decisions read them.

    Args:
        cpu: with the CPU lane. `predicts`: a predictor runs in every layer.
    """
    predict_us, decide_us = float(costs.predict_us) if predicts else 0.0, float(costs.decide_us)
    in_the_way = predict_us + decide_us if costs.is_layered else 0.0
    return Costs(
        link_us=float(costs.link_us),
        link_busy_us=float(costs.link_us if costs.link_busy_us is None else costs.link_busy_us),
        gpu_us=float(costs.gpu_us),
        rest_us=float(costs.rest_us) + in_the_way,
        predict_us=0.0 if costs.is_layered else predict_us,
        decide_us=0.0 if costs.is_layered else decide_us,
        cpu_base_us=float(costs.cpu_base_us),
        cpu_us=np.array(costs.cpu_us if cpu else (), dtype=np.float64),
        cpu_alone_us=np.array((costs.cpu_alone_us or costs.cpu_us) if cpu else (), dtype=np.float64),
        batch_us=float(costs.batch_us),
        # Layer by layer a copy's hand-over is part of what was measured around it.
        copy_us=0.0 if costs.is_layered else float(costs.copy_us),
        handover_us=0.0 if costs.is_layered else float(costs.handover_us),
    )

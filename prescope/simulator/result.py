"""What a replay returns: cheap numbers at once, tables and metrics when they are asked for."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..core.units import digits
from ..traces.metrics import Metrics, compute_metrics
from ..traces.perfetto import write_perfetto
from ..traces.routing import RoutingTrace
from .prepare import Needs
from .replay import DECIDED, FETCHED, HITS, LATE, MISSES, NEEDED, ON_CPU, PREFETCHED, REASON, Log
from .tables import event_table, layer_table, step_table


class Counts(NamedTuple):
    """Sums over the decode steps and MoE layers of a replay."""

    needed: int  # distinct experts; hits + late + misses
    hits: int
    late: int
    misses: int
    on_cpu: int  # of the misses, those the CPU computed
    on_demand: int  # copies issued after the router's choice: the other misses
    prefetches: int  # copies issued before it
    prefetched: int  # of hits and late ones, those first used since a prefetch brought them

    @property
    def hit_rate(self) -> float:
        """hits / needed."""
        return self.hits / max(1, self.needed)


class Bounds(NamedTuple):
    """What no schedule can beat on this trace with these costs; misses of the decode steps, ms per step.

    Caches start empty before the trace's first prompt, or with experts that a schedule had placed there. Prompts are
    not on the clock: what they load, and what is placed again behind them, costs nothing.
    """

    belady_misses: int  # of any cache that loads on demand and keeps what it loads
    bypass_misses: (
        int  # of any cache that may leave an expert out, as the CPU lane allows: copies and CPU experts
    )
    static_misses: int  # of the best fixed set
    link_ms: float  # Belady's misses over the link, nothing else
    link_cpu_ms: float  # the fewest misses over link and CPU together, nothing else; NaN without a CPU lane
    gpu_ms: float  # everything that the GPU does, no copy waited for
    step_ms: float  # the longer of the two: no step of a mean over this trace is shorter
    tokens_per_s: float  # at `step_ms`


class Interval(NamedTuple):
    """What tokens/s are to be expected of a real run. Meant for nine of ten; of 44 settings on a link of stated time,
    on a shared machine of two cores, it held 33 (docs/log/simulator.md).
    """

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SimResult:
    """One replay. Looks like a `RunResult` to figures: events, layers, steps, metrics, config, label.

    Attributes:
        log: what happened, as the loop wrote it (see `replay.Log`).
        config: settings as resolved. `label`: where the costs come from; always begins with "simulated".
        trace: what was replayed.
        batch: tokens of a step, the most of any.
        row_bytes: of one expert.
        notes: what a reader of the numbers must know.
    """

    log: Log
    config: dict[str, Any]
    label: str
    trace: RoutingTrace
    batch: int
    row_bytes: int
    notes: list[str] = field(default_factory=list)
    needs: Needs
    streams: bool
    find_bounds: Callable[[], Bounds]
    find_interval: Callable[[], Interval]

    def __repr__(self) -> str:
        config, counts = self.config, self.counts
        return (
            f"<SimResult {config['schedule']}, {config['num_slots']} slots, {config['cache']}, batch {self.batch}: "
            f"{self.speed}, hit {counts.hit_rate:.3f}, {self.label}>"
        )

    # -- numbers that cost nothing -----------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens of all decode steps."""
        return int(self.needs.tokens_S.sum())

    @property
    def total_us(self) -> float:
        """Of all decode steps."""
        return float(self.log.step_end_us[-1])

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sequences over the time of the decode steps."""
        return 1e6 * self.num_tokens / self.total_us

    @cached_property
    def interval(self) -> Interval:
        """Tokens/s between which a real run is to be expected: two more replays, all times as long and as short as the
        spread of the costs makes them, and what the simulator itself may be wrong by (`simulator.LEAST_OFF`).
        """
        return self.find_interval()

    @property
    def speed(self) -> str:
        """Tokens/s as a person reads them: with their interval."""
        return f"{digits(self.tokens_per_s)} tokens/s ({digits(self.interval.low)} to {digits(self.interval.high)})"

    @property
    def step_us(self) -> NDArray[np.float64]:
        """(S,) time of each decode step."""
        return np.diff(self.log.step_end_us, prepend=0.0)

    @property
    def step_ms(self) -> float:
        """Mean time of a decode step."""
        return self.total_us / len(self.log.step_end_us) / 1e3

    @cached_property
    def counts(self) -> Counts:
        """Hits, late ones, misses and copies."""
        sums = self.log.counts.sum(axis=(0, 1))
        prefetches = int((self.log.copies[:, REASON] != 0).sum())
        return Counts(
            int(sums[NEEDED]),
            int(sums[HITS]),
            int(sums[LATE]),
            int(sums[MISSES]),
            int(sums[ON_CPU]),
            len(self.log.copies) - prefetches,
            prefetches,
            int(sums[PREFETCHED]),
        )

    @property
    def stall_ms(self) -> float:
        """Time that layers waited for bytes, all steps."""
        return float((self.log.times_us[..., FETCHED] - self.log.times_us[..., DECIDED]).sum() / 1e3)

    @cached_property
    def bounds(self) -> Bounds:
        """Belady, the best static set, and the time that link and GPU need at least."""
        return self.find_bounds()

    @property
    def hardware(self) -> dict[str, Any]:
        """As of a run: where the numbers come from."""
        return {"label": self.label, "device": "virtual clock", "link": "simulated"}

    # -- tables, made when asked for ---------------------------------------------------------------------------

    @cached_property
    def events(self) -> pd.DataFrame:
        """The event table (see `prescope.traces.events`); time 0 is the first decode step's start."""
        return event_table(self.log, self.needs, self.row_bytes, self.streams)

    @cached_property
    def layers(self) -> pd.DataFrame:
        """The layer table."""
        return layer_table(self.log, self.needs)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """The step table: decode steps alone."""
        return step_table(self.log, self.needs)

    @cached_property
    def metrics(self) -> Metrics:
        """The same figures as of a run; what needs the prefill (TTFT) is NaN."""
        metrics = compute_metrics(
            self.events, self.layers, self.steps, batch=self.batch, output_tokens=self.num_tokens + self.batch
        )
        # Its definition subtracts the TTFT, which is not known here; the decode steps' mean is the same.
        return replace(metrics, tpot_ms=metrics.decode.wall_ms / metrics.decode.num_steps)

    def save_perfetto(self, path: str | Path) -> Path:
        """As `RunResult.save_perfetto`."""
        return write_perfetto(self, path)

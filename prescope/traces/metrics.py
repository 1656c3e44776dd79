"""Summary figures of a run, computed from its three tables and nothing else (see `prescope.traces.events`).

Every figure's formula and unit stand in `METRIC_DEFINITIONS`. A figure that cannot be known is NaN, never 0:
those that need the event table when it is empty (events=False), and TPOT when there was no decode step.
Engine and simulator are measured by this same code.
"""

import math
from dataclasses import dataclass, fields
from html import escape
from typing import NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..core.types import FloatArray, IntArray, Lane, Reason
from ..core.units import digits, format_bytes, gb_per_s
from .events import DECODE, KINDS, LANES, PREFILL, REASONS, codes_of

NAN = float("nan")

#: name -> formula and unit. Docs, tooltips and the report quote these.
METRIC_DEFINITIONS: dict[str, str] = {
    "ttft_ms": "time to first token: run start to end of the last prefill step, without warm-up, ms",
    "tpot_ms": "time per output token: (end-to-end - TTFT) / (output tokens of the longest sequence - 1), "
    "ms; where nobody counted tokens, a decode step stands for one. NaN without decode steps",
    "tokens_per_s": "tokens of all sequences produced in the decode phase / wall time of that phase without warm-up, "
    "1/s; the first token of each sequence comes from the prefill and is not counted",
    "end_to_end_s": "run start to end of the last step, without warm-up, s",
    "batch": "sequences generated together",
    "output_tokens": "tokens generated, all sequences, first tokens included",
    "wall_ms": "wall time of the phase's steps, ms",
    "num_steps": "forward passes",
    "step_p50_ms": "median wall time of a step, ms",
    "step_p95_ms": "95th percentile of the wall time of a step, ms (linear interpolation)",
    "needed": "distinct experts needed, summed over MoE layers and steps",
    "hits": "needed experts that were resident when needed",
    "late": "needed experts whose copy was in flight when needed, and was waited for; neither hit nor miss",
    "misses": "needed experts that were absent when needed, or in flight and not waited for: the CPU was done sooner",
    "hit_rate": "hits / needed (distinct experts per MoE layer and step)",
    "late_rate": "late / needed (distinct experts per MoE layer and step)",
    "miss_rate": "misses / needed (distinct experts per MoE layer and step)",
    "on_cpu": "of the misses, those computed on the CPU instead of copied",
    "prefetched": "of hits and late, those that a prefetch brought and nobody had used since: misses avoided",
    "prefetch_accuracy": "prefetched / prefetch_transfers; NaN when nothing was prefetched. Of a phase: one issued at "
    "its end may be used in the next",
    "prefetch_coverage": "prefetched / (prefetched + misses): misses avoided, of those there would have been",
    "prefetch_timeliness": "(prefetched - late) / prefetched: those there when needed; NaN when none was used",
    "stall_ms": "time the compute lane waited for bytes, ms",
    "cpu_wait_ms": "time the compute lane waited for experts on the CPU, ms",
    "stall_frac": "stall time / wall time of the phase",
    "host_wait_ms": "time the compute lane waited for the host to read the routing and decide, ms",
    "warm_up_ms": "time the compute lane waited for what is done once: compiling, recording graphs, ms. "
    "In the phases' wall times, not in the run's own; without events it is not known, and is in all of them",
    "dense_gpu_ms": "compute lane: attention, router and all that is no expert, ms",
    "experts_gpu_ms": "compute lane: experts, ms",
    "experts_cpu_ms": "experts computed on the CPU lane, ms",
    "h2d_bytes": "bytes copied from host memory to slots",
    "h2d_busy_ms": "time at least one copy was running on the link (union of intervals), ms",
    "link_gb_per_s": "h2d_bytes / h2d_busy_ms, GB/s (10^9 bytes); NaN when nothing was copied",
    "link_use_frac": "h2d_busy_ms / wall time of the phase",
    "overlap_frac": "share of h2d_busy_ms during which the compute lane was computing (exact intersection); "
    "NaN when nothing was copied",
    "on_demand_transfers": "copies issued after a miss",
    "prefetch_transfers": "copies issued before the need was known",
}


class Intervals(NamedTuple):
    """Disjoint time intervals in ascending order, microseconds."""

    starts: np.ndarray  # (n,) float64
    ends: np.ndarray  # (n,) float64

    @property
    def total_us(self) -> float:
        return float((self.ends - self.starts).sum())

    def before_us(self, times: np.ndarray) -> np.ndarray:
        """How much of them lies before each of some times: linear between their boundaries."""
        if len(self.starts) == 0:
            return np.zeros(len(times))
        boundaries = np.stack((self.starts, self.ends), axis=1).ravel()
        lengths = self.ends - self.starts
        before = np.stack((np.cumsum(lengths) - lengths, np.cumsum(lengths)), axis=1).ravel()
        return np.interp(times, boundaries, before)


def union(starts: np.ndarray, ends: np.ndarray) -> Intervals:
    """Union of any intervals, microseconds; touching ones become one."""
    if len(starts) == 0:
        return Intervals(np.empty(0), np.empty(0))
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    first = np.concatenate(([True], starts[1:] > reach[:-1]))
    last = np.concatenate((first[1:], [True]))
    return Intervals(starts[first], reach[last])


def overlap_us(a: Intervals, b: Intervals) -> float:
    """Exact length of the intersection of two unions, microseconds."""
    shared = b.before_us(a.ends) - b.before_us(a.starts)
    return float(np.maximum(shared, 0.0).sum())  # where they only touch, rounding takes it below 0


@dataclass(frozen=True, kw_only=True)
class PhaseMetrics:
    """Figures of one phase, or of a whole run; units and formulas in `METRIC_DEFINITIONS`."""

    wall_ms: float
    num_steps: int
    step_p50_ms: float
    step_p95_ms: float
    needed: int
    hits: int
    late: int
    misses: int
    on_cpu: int
    prefetched: int
    prefetch_coverage: float
    prefetch_timeliness: float
    hit_rate: float
    late_rate: float
    miss_rate: float
    stall_ms: float
    stall_frac: float
    cpu_wait_ms: float
    host_wait_ms: float
    warm_up_ms: float
    dense_gpu_ms: float
    experts_gpu_ms: float
    experts_cpu_ms: float
    h2d_bytes: float  # NaN without events, else an int
    h2d_busy_ms: float
    link_gb_per_s: float
    link_use_frac: float
    overlap_frac: float
    on_demand_transfers: float  # NaN without events, else an int
    prefetch_transfers: float
    prefetch_accuracy: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers by name; nested phases are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if not isinstance(value, PhaseMetrics)}


@dataclass(frozen=True, kw_only=True)
class Metrics(PhaseMetrics):
    """Figures of a run: those of `PhaseMetrics` over all steps, the run's own, and the same by phase."""

    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    end_to_end_s: float
    batch: int
    output_tokens: int
    prefill: PhaseMetrics
    decode: PhaseMetrics

    def to_frame(self) -> pd.DataFrame:
        """Figures by phase: one row a figure, columns run, prefill, decode, definition."""
        rows = [
            {
                "metric": name,
                "run": value,
                "prefill": self.prefill.to_dict().get(name, NAN),
                "decode": self.decode.to_dict().get(name, NAN),
                "definition": METRIC_DEFINITIONS[name],
            }
            for name, value in self.to_dict().items()
        ]
        return pd.DataFrame(rows).set_index("metric")

    def __str__(self) -> str:
        head = (
            f"TTFT {_number(self.ttft_ms)} ms · TPOT {_number(self.tpot_ms)} ms · "
            f"{_number(self.tokens_per_s)} tokens/s decode (batch {self.batch}) · "
            f"{_number(self.end_to_end_s)} s end to end"
        )
        width = max(len(label) for label, _ in _ROWS)
        lines = [head, " " * width + f"{'prefill':>12}{'decode':>12}{'run':>12}"]
        lines += [
            f"{label:<{width}}" + "".join(f"{text:>12}" for text in texts)
            for label, _, texts in self._cells()
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cell = "padding:2px 12px;text-align:right;font-variant-numeric:tabular-nums"
        rows = "".join(
            f'<tr title="{escape(METRIC_DEFINITIONS[name])}"><td style="padding:2px 12px 2px 0;'
            f'text-align:left">{escape(label)}</td>'
            + "".join(f'<td style="{cell}">{text}</td>' for text in texts)
            + "</tr>"
            for label, name, texts in self._cells()
        )
        head = "".join(f'<th style="{cell}">{name}</th>' for name in ("prefill", "decode", "run"))
        big = "".join(
            f'<div title="{escape(METRIC_DEFINITIONS[name])}"><div style="font-size:1.5em;font-weight:600">'
            f'{_number(getattr(self, name))}<span style="font-size:.55em;font-weight:400;opacity:.7"> {unit}'
            f'</span></div><div style="opacity:.7;font-size:.85em">{label}</div></div>'
            for label, name, unit in _HEADLINES
        )
        return (
            f'<div style="display:flex;gap:2.2em;margin:.3em 0 .6em">{big}</div>'
            f'<table style="border-collapse:collapse"><tr><th></th>{head}</tr>{rows}</table>'
        )

    def _cells(self) -> list[tuple[str, str, list[str]]]:
        return [
            (label, name, [_text(name, getattr(p, name)) for p in self._phases()]) for label, name in _ROWS
        ]

    def _phases(self) -> tuple[PhaseMetrics, ...]:
        return self.prefill, self.decode, self


_HEADLINES = [
    ("to first token", "ttft_ms", "ms"),
    ("per output token", "tpot_ms", "ms"),
    ("decode, all sequences", "tokens_per_s", "tokens/s"),
    ("end to end", "end_to_end_s", "s"),
]
_ROWS = [
    ("wall time", "wall_ms"),
    ("dense on the GPU", "dense_gpu_ms"),
    ("experts on the GPU", "experts_gpu_ms"),
    ("stall", "stall_ms"),
    ("stall share", "stall_frac"),
    ("waited for the CPU", "cpu_wait_ms"),
    ("host wait", "host_wait_ms"),
    ("warm-up", "warm_up_ms"),
    ("experts needed", "needed"),
    ("hit rate", "hit_rate"),
    ("late rate", "late_rate"),
    ("miss rate", "miss_rate"),
    ("computed on the CPU", "on_cpu"),
    ("prefetches used", "prefetch_accuracy"),
    ("misses avoided", "prefetch_coverage"),
    ("used ones on time", "prefetch_timeliness"),
    ("copied H2D", "h2d_bytes"),
    ("link bandwidth", "link_gb_per_s"),
    ("link in use", "link_use_frac"),
    ("copy hidden", "overlap_frac"),
]


def compute_metrics(
    events: pd.DataFrame,
    layers: pd.DataFrame,
    steps: pd.DataFrame,
    batch: int,
    output_tokens: int,
    longest: int | None = None,
) -> Metrics:
    """Summarise a run from its event, layer and step tables.

    Args:
        events: event table; empty when none was recorded, which makes the figures that need it NaN.
        layers, steps: layer and step tables; may be empty too.
        batch: sequences generated together.
        output_tokens: tokens generated, summed over the sequences, first tokens included.
        longest: tokens of the longest sequence; by default one for each decode step, and the first.
    """
    spans, starts_us, steps_us = _Spans.of(events), steps["start_us"].to_numpy(), steps["dur_us"].to_numpy()
    ends, phases, counts = starts_us + steps_us, codes_of(steps, "phase"), _counts_of(layers)
    warm_up = spans.only(spans.key == _key(Lane.HOST, "warm_up"))
    end_us = _without(warm_up, ends.max()) if len(ends) else NAN
    ttft_us = _without(warm_up, ends[phases == PREFILL].max()) if PREFILL in phases else NAN
    gpu = _lane_union(spans, Lane.GPU)
    total = _phase_metrics(spans, counts, steps_us, gpu, not events.empty)
    of_layers = codes_of(layers, "phase")
    prefill, decode = (
        _phase_metrics(
            spans.only(spans.phase == phase),
            counts[of_layers == phase],
            steps_us[phases == phase],
            gpu,
            not events.empty,
        )
        for phase in (PREFILL, DECODE)
    )
    decode_ms = decode.wall_ms - float(warm_up.dur_us[warm_up.phase == DECODE].sum()) / 1e3
    after_first = decode.num_steps if longest is None else longest - 1
    return Metrics(
        **total.to_dict(),  # type: ignore[arg-type]  # ints stay ints
        ttft_ms=float(ttft_us / 1e3),
        tpot_ms=float((end_us - ttft_us) / 1e3 / after_first) if decode.num_steps and after_first else NAN,
        tokens_per_s=_ratio(output_tokens - batch, decode_ms / 1e3) if decode.num_steps else NAN,
        end_to_end_s=float(end_us / 1e6),
        batch=batch,
        output_tokens=output_tokens,
        prefill=prefill,
        decode=decode,
    )


class _Spans(NamedTuple):
    """Events as arrays (n,): pandas takes a millisecond for a few groups and sums, and 17 for all of a run's."""

    key: IntArray  # lane and kind, see `_key`
    phase: IntArray
    reason: IntArray
    nbytes: IntArray
    start_us: FloatArray
    dur_us: FloatArray

    @classmethod
    def of(cls, events: pd.DataFrame) -> Self:
        return cls(
            codes_of(events, "lane") * len(KINDS) + codes_of(events, "kind"),
            codes_of(events, "phase"),
            codes_of(events, "reason"),
            events["bytes"].to_numpy(),
            events["start_us"].to_numpy(),
            events["dur_us"].to_numpy(),
        )

    def only(self, is_one: NDArray[np.bool_]) -> Self:
        return self._replace(**{name: column[is_one] for name, column in self._asdict().items()})


def _counts_of(layers: pd.DataFrame) -> IntArray:
    """(m, 6): needed, hits, late, misses, prefetched, on_cpu."""
    names = ("needed", "hits", "late", "misses", "prefetched", "on_cpu")
    return np.stack([layers[name].to_numpy(np.int64) for name in names], axis=1)


def _key(lane: Lane, kind: str) -> int:
    """A lane and a kind of event as one number."""
    return LANES.index(str(lane)) * len(KINDS) + KINDS.index(kind)


def _without(warm_up: _Spans, at_us: float) -> float:
    """The time from the run's start to a moment, without what was warm-up."""
    return float(at_us - warm_up.dur_us[warm_up.start_us < at_us].sum())


def _phase_metrics(
    spans: _Spans, counts: IntArray, steps_us: FloatArray, gpu: Intervals, has_events: bool
) -> PhaseMetrics:
    """Figures of some of a run's rows.

    Args:
        gpu: when the compute lane was computing in all of the run; `has_events`: whether it recorded any.
    """
    needed, hits, late, misses, prefetched, on_cpu = counts.sum(axis=0).tolist()
    assert hits + late + misses == needed, f"hits {hits} + late {late} + misses {misses} != needed {needed}"
    step_ms = steps_us / 1e3
    wall_ms = float(step_ms.sum())
    p50, p95 = np.percentile(step_ms, [50, 95]).tolist() if len(step_ms) else (NAN, NAN)
    found = _event_metrics(spans, gpu, wall_ms, prefetched)
    return PhaseMetrics(
        wall_ms=wall_ms,
        num_steps=len(step_ms),
        step_p50_ms=p50,
        step_p95_ms=p95,
        needed=needed,
        hits=hits,
        late=late,
        misses=misses,
        on_cpu=on_cpu,
        prefetched=prefetched,
        prefetch_coverage=_ratio(prefetched, prefetched + misses),
        prefetch_timeliness=_ratio(prefetched - late, prefetched),
        hit_rate=_ratio(hits, needed),
        late_rate=_ratio(late, needed),
        miss_rate=_ratio(misses, needed),
        **(found if has_events else dict.fromkeys(found, NAN)),
    )


def _event_metrics(spans: _Spans, gpu: Intervals, wall_ms: float, prefetched: int) -> dict[str, float]:
    """Figures that need events. A copy may end in the next phase, so its overlap is taken with the compute of both."""
    times_us = np.bincount(spans.key, weights=spans.dur_us, minlength=len(LANES) * len(KINDS))
    copies = spans.only(_is_of(spans, Lane.H2D))
    busy = _lane_union(copies, Lane.H2D)
    busy_ms, nbytes = busy.total_us / 1e3, int(copies.nbytes.sum())
    counts = dict(zip(REASONS, np.bincount(copies.reason, minlength=len(REASONS)).tolist(), strict=True))
    prefetches = counts[str(Reason.PREFETCH)] + counts[str(Reason.STREAM)]

    def time_ms(lane: Lane, kind: str) -> float:
        return float(times_us[_key(lane, kind)] / 1e3)

    return {
        "stall_ms": time_ms(Lane.STALL, "stall"),
        "stall_frac": _ratio(time_ms(Lane.STALL, "stall"), wall_ms),
        "cpu_wait_ms": time_ms(Lane.STALL, "cpu_wait"),
        "host_wait_ms": time_ms(Lane.HOST, "host_wait"),
        "warm_up_ms": time_ms(Lane.HOST, "warm_up"),
        "dense_gpu_ms": time_ms(Lane.GPU, "dense"),
        "experts_gpu_ms": time_ms(Lane.GPU, "experts"),
        "experts_cpu_ms": time_ms(Lane.CPU, "experts"),
        "h2d_bytes": nbytes,
        "h2d_busy_ms": busy_ms,
        "link_gb_per_s": gb_per_s(nbytes, busy.total_us) if nbytes else NAN,
        "link_use_frac": _ratio(busy_ms, wall_ms),
        "overlap_frac": _ratio(overlap_us(busy, gpu) / 1e3, busy_ms),
        "on_demand_transfers": counts[str(Reason.ON_DEMAND)],
        "prefetch_transfers": prefetches,
        "prefetch_accuracy": _ratio(prefetched, prefetches),
    }


def _is_of(spans: _Spans, lane: Lane) -> NDArray[np.bool_]:
    return spans.key // len(KINDS) == LANES.index(str(lane))


def _lane_union(spans: _Spans, lane: Lane) -> Intervals:
    one = spans.only(_is_of(spans, lane))
    return union(one.start_us, one.start_us + one.dur_us)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else NAN


def _text(name: str, value: float) -> str:
    if math.isnan(value):
        return "–"
    if name.endswith(("_rate", "_frac", "_accuracy", "_coverage", "_timeliness")):
        return f"{100 * value:.1f} %"
    if name.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, int):
        return f"{value:,}"
    unit = {"ms": " ms", "per_s": " GB/s" if name == "link_gb_per_s" else " 1/s"}
    return _number(value) + next((text for end, text in unit.items() if name.endswith(end)), "")


def _number(value: float) -> str:
    """Three significant digits without an exponent; a dash for what is not known."""
    if math.isnan(value):
        return "–"
    return digits(value)

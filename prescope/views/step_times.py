"""Latency of every token: bars by cause, as measured over them where a run is given, and the bound as a line."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from prescope.core.units import digits
from prescope.simulator import SimResult
from prescope.traces.events import COMPUTE_LANES, KINDS
from prescope.traces.result import RunResult

from .lanes import OUTLINES
from .theme import COLORS, NAMES, decode_steps, settings_of, source_of, style, titled, told_of

#: More steps than this are stepped areas instead of bars: seven shapes, which a browser draws at once, instead of
#: over a thousand, which took most of the time of a slider's move.
MOST_BARS = 64
#: Around what is drawn over the causes: the measured line was hardly seen on stalls, the bound not at all.
RING = "rgba(255,255,255,.9)"
CAUSES = ("dense", "experts", "stall", "cpu_wait", "host_wait", "warm_up", "other")


class Times(NamedTuple):
    """Decode steps of one result."""

    steps: tuple[int, ...]
    step_ms: tuple[float, ...]
    tokens_per_s: float
    source: str
    cause_ms: dict[str, tuple[float, ...]]  # all of CAUSES, sums to step_ms; empty without events

    @property
    def p50_ms(self) -> float:
        return float(np.median(self.step_ms))


class StepTimesInfo(NamedTuple):
    """One or two results; the second was measured."""

    times: Times
    settings: str
    told: str
    measured: Times | None = None
    bound_ms: float = float("nan")  # no mean step is shorter; of a simulation

    @property
    def error_pct(self) -> float:
        """Simulated tokens/s against measured; NaN without a run."""
        if self.measured is None:
            return float("nan")
        return 100 * (self.times.tokens_per_s / self.measured.tokens_per_s - 1)


def step_times(result: RunResult | SimResult, measured: RunResult | None = None) -> go.Figure:
    """Latency of every decode step.

    Raises:
        BadTrace: no decode step.
    """
    return plot_step_times(step_times_info(result, measured))


def step_times_info(
    result: RunResult | SimResult, measured: RunResult | None = None, *, with_bound: bool = True
) -> StepTimesInfo:
    """As numbers; `with_bound`: of a simulation, which takes some 100 ms for slots that nobody asked about before."""
    bound_ms = result.bounds.step_ms if with_bound and isinstance(result, SimResult) else float("nan")
    return StepTimesInfo(
        _times(result),
        settings_of(result),
        told_of(result),
        None if measured is None else _times(measured),
        bound_ms,
    )


def _times(result: RunResult | SimResult) -> Times:
    decode = decode_steps(result.steps)
    us = decode["dur_us"].to_numpy()
    # As the table of numbers has it: rows of sequences that have ended go on in the steps, and write nothing.
    rate = result.tokens_per_s if isinstance(result, SimResult) else result.metrics.tokens_per_s
    steps = decode["step"].to_numpy()
    causes = causes_ms(result, steps, us / 1e3)
    return Times(tuple(steps.tolist()), tuple((us / 1e3).tolist()), rate, source_of(result), causes)


def causes_ms(
    result: RunResult | SimResult, steps: np.ndarray, step_ms: np.ndarray
) -> dict[str, tuple[float, ...]]:
    """Compute-lane time of each step by cause; "other" is what no event explains."""
    events = result.events
    if events.empty:
        return {}
    kind, us = events["kind"].cat.codes.to_numpy(), events["dur_us"].to_numpy()
    place = events["step"].to_numpy() - steps[0]
    compute = events["lane"].isin(COMPUTE_LANES).to_numpy() & (place >= 0) & (place <= steps[-1] - steps[0])
    found, rest = {}, step_ms
    for cause in CAUSES[:-1]:
        mine = compute & (kind == KINDS.index(cause))
        by_step = (
            np.bincount(place[mine], us[mine], minlength=steps[-1] - steps[0] + 1)[steps - steps[0]] / 1e3
        )
        found[cause], rest = tuple(by_step.tolist()), rest - by_step
    return {**found, "other": tuple(np.maximum(rest, 0.0).tolist())}


def step_times_traces(info: StepTimesInfo) -> list[dict[str, Any]]:
    """Always as many: each cause as bars and as a stepped area, of which one is empty ("other" is all where causes are
    not known), then what is light below the bound, the measured line and the bound: both lie on colours of all kinds.
    What is not visible has no place in the legend either.
    """
    measured = info.measured or Times((), (), 0.0, "measured", {})
    line = {"color": COLORS["measured"], "width": 2}
    steps, source = list(info.times.steps), info.times.source
    causes = info.times.cause_ms or {**dict.fromkeys(CAUSES, ()), "other": info.times.step_ms}
    are_many = len(steps) > MOST_BARS
    bars = [_cause(cause, steps, causes[cause], source, are_many, as_area=False) for cause in CAUSES]
    # From the middle of the first step to that of the last a line would go: half a step is added at both ends.
    ends = [steps[0] - 0.5, *steps, steps[-1] + 0.5]
    values = {name: [*ms[:1], *ms, *ms[-1:]] for name, ms in causes.items()}
    areas = [_cause(cause, ends, values[cause], source, not are_many, as_area=True) for cause in CAUSES]
    has_bound = info.bound_ms == info.bound_ms
    bound = {
        "type": "scatter", "x": [steps[0] - 0.5, steps[-1] + 0.5] if has_bound else [],
        "y": [info.bound_ms] * 2 if has_bound else [], "mode": "lines", "visible": has_bound,
    }  # fmt: skip
    return [
        *bars,
        *areas,
        {**bound, "line": {"color": RING, "width": 5}, "hoverinfo": "skip", "showlegend": False},
        {
            "type": "scatter", "x": list(measured.steps), "y": list(measured.step_ms), "name": measured.source,
            "mode": "lines+markers", "line": line,
            "marker": {"size": 6, "color": COLORS["measured"], "line": {"width": 1, "color": RING}},
            "hovertemplate": f"%{{y:.3f}} ms, {measured.source}<extra></extra>",
            "visible": info.measured is not None,
        },
        {
            **bound, "name": "bound of the mean step",
            "line": {"color": COLORS["bound"], "width": 2.5, "dash": "dash"},
            "hovertemplate": "%{y:.3f} ms: no mean step is shorter<extra></extra>",
        },
    ]  # fmt: skip


def _cause(
    cause: str, x: Sequence[float], ms: Sequence[float], source: str, is_empty: bool, *, as_area: bool
) -> dict[str, Any]:
    """One cause of all steps; empty where the other form shows them."""
    line = OUTLINES.get(cause, {"width": 0})
    looks: dict[str, Any] = (
        {"type": "scatter", "mode": "lines", "stackgroup": "causes", "fillcolor": COLORS[cause],
            "line": {**line, "shape": "hvh"}}
        if as_area
        else {"type": "bar", "marker": {"color": COLORS[cause], "line": line}}
    )  # fmt: skip
    return {
        **looks, "x": [] if is_empty else list(x), "y": [] if is_empty else list(ms), "name": NAMES[cause],
        "hovertemplate": f"%{{y:.3f}} ms {NAMES[cause]}, {source}<extra></extra>",
        "visible": not is_empty and any(ms),  # what is empty costs a redraw as much as what is not
    }  # fmt: skip


def step_times_layout(
    info: StepTimesInfo, *, brief: bool = False, chosen: range | None = None
) -> dict[str, Any]:
    """What of the layout depends on the numbers.

    Args:
        brief: beside controls that say the settings already.
        chosen: steps that are marked.
    """
    lines = [_rate(info.times), info.told, info.settings]
    if info.measured is not None:
        lines[1] = f"{_rate(info.measured)} · the simulator says {info.error_pct:+.1f} % of its tokens/s"
    if brief:
        lines = lines[: 1 + (info.measured is not None)]
    looks: dict[str, Any] = {"margin": {"t": 70}, "height": 280} if brief else {}
    looks["shapes"] = [] if chosen is None else [_band(chosen)]
    looks["xaxis"] = {"range": [info.times.steps[0] - 0.5, info.times.steps[-1] + 0.5]}
    return {"title": {"text": titled("How long does each token take?", "<br>".join(lines))}, **looks}


def _band(chosen: range) -> dict[str, Any]:
    """Behind the bars of the steps that are chosen."""
    return {
        "type": "rect", "xref": "x", "yref": "paper", "x0": chosen[0] - 0.5, "x1": chosen[-1] + 0.5, "y0": 0, "y1": 1,
        "fillcolor": "rgba(128,128,128,.20)", "line": {"width": 0}, "layer": "below",
    }  # fmt: skip


def _rate(times: Times) -> str:
    return f"<b>{times.source}</b>: {digits(times.tokens_per_s)} tokens/s, median {digits(times.p50_ms)} ms per step"


def plot_step_times(info: StepTimesInfo) -> go.Figure:
    """Bars by cause, lines for what was measured and for the bound."""
    fig = go.Figure(step_times_traces(info))
    style(fig, title="", subtitle="", height=380, top=126)
    fig.update_layout(step_times_layout(info))
    fig.update_layout(barmode="stack", bargap=0.12, barcornerradius=0, hovermode="x unified", uirevision=None)
    fig.update_xaxes(title_text="decode step (one token of each sequence)", showgrid=False)
    fig.update_yaxes(title_text="ms per step", rangemode="tozero")
    return fig

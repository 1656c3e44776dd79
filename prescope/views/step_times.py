"""Latency of every token: simulated as bars, and as measured over them where a run is given."""

from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from prescope.errors import BadTrace
from prescope.simulator import SimResult
from prescope.traces.result import RunResult

from .theme import COLORS, settings_of, source_of, style, titled, told_of


class Times(NamedTuple):
    """Decode steps of one result."""

    steps: tuple[int, ...]
    step_ms: tuple[float, ...]
    tokens_per_s: float
    source: str

    @property
    def p50_ms(self) -> float:
        return float(np.median(self.step_ms))


class StepTimesInfo(NamedTuple):
    """One or two results; the second was measured."""

    times: Times
    settings: str
    told: str
    measured: Times | None = None

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


def step_times_info(result: RunResult | SimResult, measured: RunResult | None = None) -> StepTimesInfo:
    """As numbers."""
    return StepTimesInfo(
        _times(result), settings_of(result), told_of(result), None if measured is None else _times(measured)
    )


def _times(result: RunResult | SimResult) -> Times:
    decode = result.steps[result.steps["phase"] == "decode"]
    if decode.empty:
        raise BadTrace(
            "there are no decode steps; ask for more than one new token (max_new_tokens=2 or more)"
        )
    us = decode["dur_us"].to_numpy()
    rate = 1e6 * float(decode["tokens"].sum()) / float(us.sum())
    return Times(tuple(decode["step"].tolist()), tuple((us / 1e3).tolist()), rate, source_of(result))


def step_times_traces(info: StepTimesInfo) -> list[dict[str, Any]]:
    """Always two: bars, and a line (empty without a run)."""
    measured = info.measured or Times((), (), 0.0, "measured")
    line = {"color": COLORS["measured"], "width": 2}
    return [
        {
            "type": "bar", "x": list(info.times.steps), "y": list(info.times.step_ms), "name": info.times.source,
            "marker": {"color": COLORS["simulated"], "line": {"width": 0}},
            "hovertemplate": f"%{{y:.3f}} ms, {info.times.source}<extra></extra>",
        },
        {
            "type": "scatter", "x": list(measured.steps), "y": list(measured.step_ms), "name": measured.source,
            "mode": "lines+markers", "line": line, "marker": {"size": 6, "color": COLORS["measured"]},
            "hovertemplate": f"%{{y:.3f}} ms, {measured.source}<extra></extra>",
            "showlegend": info.measured is not None,
        },
    ]  # fmt: skip


def step_times_layout(info: StepTimesInfo) -> dict[str, Any]:
    """What of the layout depends on the numbers."""
    lines = [_rate(info.times), info.told, info.settings]
    if info.measured is not None:
        lines[1] = f"{_rate(info.measured)} · the simulator says {info.error_pct:+.1f} % of its tokens/s"
    title = "How long does each token take?"
    return {"title": {"text": titled(title, "<br>".join(lines))}}


def _rate(times: Times) -> str:
    return f"<b>{times.source}</b>: {times.tokens_per_s:.3g} tokens/s, median {times.p50_ms:.3g} ms per step"


def plot_step_times(info: StepTimesInfo) -> go.Figure:
    """Bars simulated, line measured."""
    fig = go.Figure(step_times_traces(info))
    style(fig, title="", subtitle="", height=350, top=108)
    fig.update_layout(step_times_layout(info))
    fig.update_layout(bargap=0.15, barcornerradius=0, hovermode="x unified", uirevision=None)
    fig.update_xaxes(title_text="decode step (one token of each sequence)", showgrid=False)
    fig.update_yaxes(title_text="ms per step", rangemode="tozero")
    return fig

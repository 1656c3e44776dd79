"""Latency of every token: decode steps split by cause, TTFT, median and 95th percentile."""

from typing import NamedTuple

import plotly.graph_objects as go

from prescope.core.units import count_of
from prescope.traces.result import RunResult

from .step_times import causes_ms
from .theme import COLORS, NAMES, TEXT, decode_steps, origin, style


class LatencyInfo(NamedTuple):
    """Milliseconds of each decode step, whole and by cause."""

    steps: tuple[int, ...]
    step_ms: tuple[float, ...]
    cause_ms: dict[str, tuple[float, ...]]  # sums to step_ms; empty without events
    ttft_ms: float
    p50_ms: float
    p95_ms: float
    origin: str


def latency(run: RunResult) -> go.Figure:
    """Latency of every token.

    Raises:
        BadTrace: the run has no decode step.
    """
    return plot_latency(latency_info(run))


def latency_info(run: RunResult) -> LatencyInfo:
    """Decode steps of a run by cause.

    Raises:
        BadTrace: the run has no decode step.
    """
    decode = decode_steps(run.steps)
    step_ms = decode["dur_us"].to_numpy() / 1e3
    return LatencyInfo(
        steps=tuple(decode["step"].tolist()),
        step_ms=tuple(step_ms.tolist()),
        cause_ms=causes_ms(run, decode["step"].to_numpy(), step_ms),
        ttft_ms=run.metrics.ttft_ms,
        p50_ms=run.metrics.decode.step_p50_ms,
        p95_ms=run.metrics.decode.step_p95_ms,
        origin=origin(run),
    )


def plot_latency(info: LatencyInfo) -> go.Figure:
    """Bars stacked by cause, one a token; a line instead when the causes are not known."""
    fig = go.Figure()
    for cause, values in info.cause_ms.items():
        if any(values):
            fig.add_bar(
                x=info.steps,
                y=values,
                name=NAMES[cause],
                marker={"color": COLORS[cause], "line": {"width": 0}},
                hovertemplate="%{y:.3f} ms",
            )
    fig.add_scatter(
        x=info.steps,
        y=info.step_ms,
        name="whole step",
        mode="lines",
        line={"color": TEXT, "width": 1.2, "shape": "hvh"},
        showlegend=not info.cause_ms,
        hovertemplate="%{y:.3f} ms",
    )
    for value, name, dash, side in (
        (info.p50_ms, "p50", "dash", "top"),
        (info.p95_ms, "p95", "dot", "bottom"),
    ):
        fig.add_hline(y=value, line={"color": TEXT, "width": 1.2, "dash": dash})
        fig.add_annotation(
            text=f"{name} {value:.3g} ms",
            x=1,
            xref="paper",
            xanchor="left",
            xshift=4,
            y=value,
            yanchor=side,
            showarrow=False,
            font={"size": 12},
        )
    p50, p95 = f"{info.p50_ms:.3g}", f"{info.p95_ms:.3g}"
    style(
        fig,
        title="How long does each token take?",
        subtitle=f"first token after {info.ttft_ms:.3g} ms (TTFT), then p50 {p50} ms, p95 {p95} ms over "
        f"{count_of(len(info.steps), 'decode step')}<br>{info.origin}",
        height=390,
    )
    fig.update_layout(barmode="stack", bargap=0.1, barcornerradius=0, hovermode="x unified", margin_r=92)
    fig.update_xaxes(title_text="decode step (one token of each sequence)", showgrid=False)
    fig.update_yaxes(title_text="ms per step", rangemode="tozero")
    return fig

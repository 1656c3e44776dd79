"""GPU busy and idle time by schedule, and what the GPU waits for while it is idle."""

from collections.abc import Mapping
from typing import NamedTuple

import plotly.graph_objects as go

from prescope.simulator import SimResult
from prescope.traces.result import RunResult

from .theme import COLORS, NAMES, require_decode_events, style, title_of, told_of_several

BUSY = ("dense", "experts")
IDLE = ("stall", "cpu_wait", "host_wait", "warm_up", "other")


class GpuIdleInfo(NamedTuple):
    """Mean ms per decode step by schedule, as given."""

    names: tuple[str, ...]
    ms: dict[str, tuple[float, ...]]  # by cause, BUSY and IDLE
    step_ms: tuple[float, ...]
    bound_ms: float  # no schedule's mean step is shorter; NaN if not known
    told: str

    @property
    def idle_pct(self) -> tuple[float, ...]:
        """Share of the time in which the GPU computes nothing."""
        idle = (sum(self.ms[cause][i] for cause in IDLE) for i in range(len(self.names)))
        return tuple(100 * value / step for value, step in zip(idle, self.step_ms, strict=True))


def gpu_idle(results: Mapping[str, RunResult | SimResult]) -> go.Figure:
    """Where a step's time goes, by schedule, the fastest at the top.

    Raises:
        BadTrace: no results, or one without decode events.
    """
    return plot_gpu_idle(gpu_idle_info(results))


def gpu_idle_info(results: Mapping[str, RunResult | SimResult]) -> GpuIdleInfo:
    """As numbers."""
    require_decode_events("gpu_idle", results)
    rows = sorted((_row(name, result) for name, result in results.items()), key=lambda row: row[1])
    bounds = [result.bounds.step_ms for result in results.values() if isinstance(result, SimResult)]
    return GpuIdleInfo(
        tuple(title_of(name) for name, _, _ in rows),
        {cause: tuple(ms[cause] for _, _, ms in rows) for cause in (*BUSY, *IDLE)},
        tuple(step for _, step, _ in rows),
        min(bounds, default=float("nan")),
        told_of_several(results),
    )


def _row(name: str, result: RunResult | SimResult) -> tuple[str, float, dict[str, float]]:
    decode = result.metrics.decode
    step = decode.wall_ms / decode.num_steps
    ms = {
        "dense": decode.dense_gpu_ms,
        "experts": decode.experts_gpu_ms,
        "stall": decode.stall_ms,
        "cpu_wait": decode.cpu_wait_ms,
        "host_wait": decode.host_wait_ms,
        "warm_up": decode.warm_up_ms,
    }
    each = {cause: value / decode.num_steps for cause, value in ms.items()}
    return name, step, each | {"other": max(0.0, step - sum(each.values()))}


def plot_gpu_idle(info: GpuIdleInfo) -> go.Figure:
    """Stacked horizontal bars; the dotted line is the bound."""
    fig = go.Figure()
    for cause in (*BUSY, *IDLE):
        if any(info.ms[cause]):
            fig.add_bar(
                x=info.ms[cause], y=info.names, orientation="h",
                name=NAMES[cause] if cause != "other" else "other (between steps)",
                marker={"color": COLORS[cause], "line": {"width": 0}},
                hovertemplate=f"{NAMES[cause]}: %{{x:.3f}} ms per step<extra></extra>",
            )  # fmt: skip
    for name, step, idle in zip(info.names, info.step_ms, info.idle_pct, strict=True):
        fig.add_annotation(
            x=step, y=name, text=f"{step:.3g} ms, GPU idle {idle:.0f} %", showarrow=False, xanchor="left", xshift=5,
            font={"size": 12},
        )  # fmt: skip
    if info.bound_ms == info.bound_ms:
        fig.add_vline(x=info.bound_ms, line={"dash": "dot", "width": 1.5})
        fig.add_annotation(
            x=info.bound_ms, y=1, yref="paper", yanchor="bottom", showarrow=False, text=f"bound {info.bound_ms:.3g} ms",
            font={"size": 12},
        )  # fmt: skip
    style(
        fig,
        title="When does the GPU idle?",
        subtitle=f"mean of all decode steps, the fastest schedule at the top<br>{info.told}",
        height=230 + 34 * len(info.names),
        top=104,
    )
    fig.update_layout(barmode="stack", bargap=0.3, hovermode="closest", margin_r=40)
    fig.update_xaxes(title_text="ms per decode step", range=[0, 1.3 * max(info.step_ms)])
    fig.update_yaxes(showgrid=False, autorange="reversed")
    return fig

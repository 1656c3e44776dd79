"""Where a step's time goes, layer by layer: mean microseconds of each MoE layer, stacked by cause."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from prescope.core.types import Phase
from prescope.core.units import count_of
from prescope.errors import BadTrace
from prescope.traces.events import COMPUTE_LANES
from prescope.traces.result import RunResult

from .theme import COLORS, NAMES, add_line, origin, style

_KINDS = ["dense", "experts", "stall", "cpu_wait", "host_wait", "warm_up"]


class LayersInfo(NamedTuple):
    """Mean microseconds per step of each MoE layer; the last entry is what follows the last layer."""

    phase: Phase
    num_steps: int
    labels: tuple[str, ...]  # "0", "1", ..., "head"
    kind_us: dict[str, tuple[float, ...]]  # dense, experts, stall, cpu_wait, host_wait, warm_up
    link_us: tuple[float, ...]  # the link was busy for this layer's experts
    step_us: float  # mean wall time of a step
    origin: str

    @property
    def other_us(self) -> float:
        """Mean time of a step that no event explains: Python between the forwards, sampling."""
        return self.step_us - sum(sum(values) for values in self.kind_us.values())


def layers(run: RunResult, phase: Phase = "decode") -> go.Figure:
    """Where a step's time goes, layer by layer.

    Raises:
        BadTrace: the run has no events of this phase.
    """
    return plot_layers(layers_info(run, phase))


def layers_info(run: RunResult, phase: Phase = "decode") -> LayersInfo:
    """Mean time by layer and cause over the steps of a phase.

    Raises:
        BadTrace: the run has no events of this phase.
    """
    events = run.events[run.events["phase"] == phase]
    steps = run.steps[run.steps["phase"] == phase]
    if events.empty or steps.empty:
        raise BadTrace(f"the run has no {phase} events; run it with events=True and more than one new token")
    num_layers = int(run.layers["moe_layer"].max()) + 1
    compute = events[events["lane"].isin(COMPUTE_LANES)]
    kind_us = {kind: _by_layer(compute[compute["kind"] == kind], num_layers, len(steps)) for kind in _KINDS}
    return LayersInfo(
        phase=phase,
        num_steps=len(steps),
        labels=(*(str(layer) for layer in range(num_layers)), "head"),
        kind_us=kind_us,
        link_us=_by_layer(events[events["lane"] == "h2d"], num_layers, len(steps)),
        step_us=float(steps["dur_us"].mean()),
        origin=origin(run),
    )


def _by_layer(rows: pd.DataFrame, num_layers: int, num_steps: int) -> tuple[float, ...]:
    """Mean microseconds per step by layer; layer -1, what follows the last one, comes last."""
    layer = rows["moe_layer"].to_numpy().astype(int)
    index = np.where(layer < 0, num_layers, layer)
    total = np.bincount(index, weights=rows["dur_us"].to_numpy(), minlength=num_layers + 1)
    return tuple((total / num_steps).tolist())


def plot_layers(info: LayersInfo) -> go.Figure:
    """Stacked bars by layer, with the link's busy time as a line."""
    fig = go.Figure()
    for kind, values in info.kind_us.items():
        if any(values):
            fig.add_bar(
                x=info.labels,
                y=values,
                name=NAMES[kind],
                marker={"color": COLORS[kind], "line": {"width": 0}},
                hovertemplate="%{y:,.0f} µs",
            )
    if any(info.link_us):
        add_line(
            fig,
            COLORS["line"],
            x=info.labels[:-1],
            y=info.link_us[:-1],
            name="link busy",
            hovertemplate="%{y:,.0f} µs",
        )
    shares = [
        f"{NAMES[k].split(' (')[0]} {100 * sum(v) / info.step_us:.0f} %"
        for k, v in info.kind_us.items()
        if k != "warm_up" or any(v)
    ]
    mean = f"mean of {count_of(info.num_steps, f'{info.phase} step')}: "
    shares.append(f"other {100 * max(0.0, info.other_us) / info.step_us:.0f} %")
    mean += f"{info.step_us / 1e3:.3g} ms = {', '.join(shares)}"
    style(
        fig,
        title=f"Where a {info.phase} step's time goes, layer by layer",
        subtitle=f"{mean}<br>{info.origin}",
        height=400,
    )
    fig.update_layout(barmode="stack", bargap=0.25, hovermode="x unified")
    fig.update_xaxes(title_text="MoE layer (head: after the last one)", type="category", showgrid=False)
    fig.update_yaxes(title_text="µs per step", rangemode="tozero", tickformat=",")
    return fig

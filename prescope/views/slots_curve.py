"""What do more slots buy? Hit rate and tokens/s against the share of experts with a slot."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from prescope.core.units import GIB, format_bytes
from prescope.errors import BadTrace
from prescope.traces.result import RunResult

from .theme import COLORS, style


class SlotsPoint(NamedTuple):
    """All runs with one number of slots: median and range."""

    num_slots: int
    share_pct: float  # of all experts of the model
    memory_gib: float
    num_runs: int
    hit_rate_pct: tuple[
        float, float, float
    ]  # least, median, most; decode, distinct experts per layer and step
    tokens_per_s: tuple[float, float, float]  # decode, all sequences


class SlotsCurveInfo(NamedTuple):
    """The curve, by rising number of slots."""

    points: tuple[SlotsPoint, ...]
    origin: str


def slots_curve(runs: Iterable[RunResult]) -> go.Figure:
    """Hit rate and speed against slots, from runs that differ in `slots`.

    Raises:
        BadTrace: no runs.
    """
    return plot_slots_curve(slots_curve_info(runs))


def slots_curve_info(runs: Iterable[RunResult]) -> SlotsCurveInfo:
    """Runs grouped by number of slots.

    Raises:
        BadTrace: no runs.
    """
    groups: dict[int, list[RunResult]] = {}
    labels: dict[str, None] = {}  # more than one where machines, links or forms of experts differ
    for run in runs:
        groups.setdefault(int(run.config["num_slots"]), []).append(run)
        labels[run.label] = None
    if not groups:
        raise BadTrace("the slots curve needs at least one run")
    last = next(reversed(groups.values()))[-1]
    return SlotsCurveInfo(
        points=tuple(_point(slots, groups[slots]) for slots in sorted(groups)),
        origin=f"{' and '.join(labels)} · {last.config.get('cache', '')} · batch {last.metrics.batch}",
    )


def _point(num_slots: int, runs: list[RunResult]) -> SlotsPoint:
    config = runs[0].config
    return SlotsPoint(
        num_slots=num_slots,
        share_pct=100 * config["slots_frac"],
        memory_gib=config["slots_gib"],
        num_runs=len(runs),
        hit_rate_pct=_spread([100 * run.metrics.decode.hit_rate for run in runs]),
        tokens_per_s=_spread([run.metrics.tokens_per_s for run in runs]),
    )


def _spread(values: list[float]) -> tuple[float, float, float]:
    return min(values), float(np.median(values)), max(values)


def plot_slots_curve(info: SlotsCurveInfo) -> go.Figure:
    """Two rows over one x-axis; every point says its count and memory."""
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.09)
    x = [point.share_pct for point in info.points]
    customdata = [(p.num_slots, format_bytes(p.memory_gib * GIB), p.num_runs) for p in info.points]
    rows = [
        ("hit rate", "hit", [point.hit_rate_pct for point in info.points], "%{y:.1f} %"),
        ("decode speed", "experts", [point.tokens_per_s for point in info.points], "%{y:,.1f} tokens/s"),
    ]
    for row, (name, color, spreads, text) in enumerate(rows, 1):
        fig.add_scatter(
            x=x,
            y=[median for _, median, _ in spreads],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [most - median for _, median, most in spreads],
                "arrayminus": [median - least for least, median, _ in spreads],
                "width": 3,
                "thickness": 1.2,
            },
            customdata=customdata,
            name=name,
            mode="lines+markers",
            line={"color": COLORS[color], "width": 2.2},
            marker={"size": 8},
            hovertemplate=text + ", %{customdata[0]} slots = %{customdata[1]}, "
            "%{customdata[2]} run(s)<extra></extra>",
            row=row,
            col=1,
        )
    style(
        fig,
        title="What do more slots buy?",
        subtitle=f"median and range of the runs at each number of slots<br>{info.origin}",
        height=460,
    )
    ticks = [
        f"{p.share_pct:.0f} %<br>{p.num_slots} slots<br>{format_bytes(p.memory_gib * GIB)}"
        for p in info.points
    ]
    fig.update_layout(hovermode="x unified", showlegend=False)
    if len(x) <= 12:  # more labels would run into one another
        fig.update_xaxes(tickmode="array", tickvals=x, ticktext=ticks)
    fig.update_xaxes(title_text="experts that have a slot, share of all · memory of the slots", row=2, col=1)
    fig.update_yaxes(title_text="hit rate, %", range=[-4, 106], row=1, col=1)
    fig.update_yaxes(title_text="decode tokens/s", rangemode="tozero", row=2, col=1)
    return fig

"""What the link's time goes to: copies on demand, prefetches used and for nothing; hidden, or waited for."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import plotly.graph_objects as go

from prescope.core.types import Reason
from prescope.simulator import SimResult
from prescope.traces.result import RunResult

from .theme import COLORS, NAMES, require_decode_events, style, title_of, told_of_several

By = Literal["purpose", "overlap"]
#: Part -> its colour and what it means.
PARTS: dict[By, dict[str, tuple[str, str]]] = {
    "purpose": {
        "on_demand": ("on_demand", "copied on demand"),
        "used": ("prefetch", "prefetched and used"),
        "wasted": ("prefetch", "prefetched for nothing"),
        "idle": ("nothing", NAMES["nothing"]),
    },
    "overlap": {
        "hidden": ("prefetch", "while the GPU computes"),
        "exposed": ("stall", "while the GPU does not"),
        "idle": ("nothing", NAMES["nothing"]),
    },
}
TITLES: dict[By, str] = {
    "purpose": "What does the link's time go to?",
    "overlap": "How much of the copying is hidden?",
}


class LinkTimeInfo(NamedTuple):
    """Mean ms per decode step by result, as given."""

    names: tuple[str, ...]
    ms: dict[str, tuple[float, ...]]  # by part
    step_ms: tuple[float, ...]
    by: By
    told: str


def link_time(results: Mapping[str, RunResult | SimResult], by: By = "purpose") -> go.Figure:
    """The link's time in a decode step, a row for each result.

    A prefetch is used if its expert is needed before it gives up its slot; the time of all prefetches is shared out by
    that number, for an event does not know its future.

    Args:
        by: "purpose": why something was copied; "overlap": what the GPU did meanwhile.

    Raises:
        BadTrace: no results, or one without decode events.
    """
    return plot_link_time(link_time_info(results, by))


def link_time_info(results: Mapping[str, RunResult | SimResult], by: By = "purpose") -> LinkTimeInfo:
    """As numbers."""
    require_decode_events("link_time", results)
    rows = [_row(result, by) for result in results.values()]
    steps = tuple(sum(row.values()) for row in rows)
    return LinkTimeInfo(
        tuple(title_of(name) for name in results),
        {part: tuple(row[part] for row in rows) for part in PARTS[by]},
        steps,
        by,
        told_of_several(results),
    )


def _row(result: RunResult | SimResult, by: By) -> dict[str, float]:
    decode = result.metrics.decode
    busy, step = decode.h2d_busy_ms / decode.num_steps, decode.wall_ms / decode.num_steps
    if by == "overlap":
        hidden = busy * decode.overlap_frac if busy else 0.0
        parts = {"hidden": hidden, "exposed": busy - hidden}
    else:
        on_demand, used, wasted = _purposes(result)
        total = on_demand + used + wasted or 1.0
        parts = {
            "on_demand": busy * on_demand / total,
            "used": busy * used / total,
            "wasted": busy * wasted / total,
        }
    # A copy that the last step asked for may end after it.
    return parts | {"idle": max(0.0, step - busy)}


def _purposes(result: RunResult | SimResult) -> tuple[float, float, float]:
    """Time of the decode phase's copies, any unit: on demand, prefetched and used, prefetched for nothing."""
    events, decode = result.events, result.metrics.decode
    copies = events[(events["lane"] == "h2d") & (events["phase"] == "decode")]
    is_demand = copies["reason"] == str(Reason.ON_DEMAND)
    ahead = float(copies.loc[~is_demand, "dur_us"].sum())
    used = min(1.0, decode.prefetch_accuracy) if ahead else 0.0
    return float(copies.loc[is_demand, "dur_us"].sum()), used * ahead, (1 - used) * ahead


def plot_link_time(info: LinkTimeInfo) -> go.Figure:
    """Stacked horizontal bars as long as a step."""
    fig = go.Figure()
    for part, (color, words) in PARTS[info.by].items():
        fig.add_bar(
            x=info.ms[part], y=info.names, orientation="h", name=words,
            marker={
                "color": COLORS[color], "line": {"width": 0},
                "pattern": {"shape": "/" if part == "wasted" else "", "size": 6},
            },
            hovertemplate=f"{words}: %{{x:.3g}} ms per step<extra>%{{y}}</extra>",
        )  # fmt: skip
    for i, (name, step) in enumerate(zip(info.names, info.step_ms, strict=True)):
        fig.add_annotation(
            x=step, y=name, text=_said(info, i), showarrow=False, xanchor="left", xshift=5, font={"size": 12}
        )
    style(
        fig, title=TITLES[info.by], subtitle=f"mean of all decode steps; a bar is as long as a step<br>{info.told}",
        height=200 + 34 * len(info.names), top=100,
    )  # fmt: skip
    fig.update_layout(barmode="stack", bargap=0.3, hovermode="closest", margin_r=40)
    fig.update_xaxes(title_text="ms per decode step", range=[0, 1.55 * max(info.step_ms)])
    fig.update_yaxes(showgrid=False, autorange="reversed", type="category")
    return fig


def _said(info: LinkTimeInfo, i: int) -> str:
    """A row in words."""
    busy = info.step_ms[i] - info.ms["idle"][i]
    share = f"link {100 * busy / info.step_ms[i]:.0f} % busy"
    if info.by == "overlap":
        return f"{share}, {100 * info.ms['hidden'][i] / busy:.0f} % of that hidden" if busy else share
    return f"{share}, {info.ms['wasted'][i]:.2g} ms for nothing" if info.ms["wasted"][i] else share

"""Two schedules on the same steps of the same trace, lane above lane, on one time axis."""

from typing import Any, NamedTuple

import plotly.graph_objects as go

from prescope.core.units import count_of
from prescope.simulator import SimResult
from prescope.traces.result import RunResult

from .lanes import MEANINGS, ROWS, LanesInfo, lanes_info, lanes_traces, upright
from .theme import TEXT, style, titled

#: How far the upper one is raised: an empty space lies between the two.
_UP = len(ROWS) + 1.4


class SchedulePairInfo(NamedTuple):
    """The upper and the lower one; milliseconds since each began the first step."""

    upper: LanesInfo
    lower: LanesInfo

    @property
    def end_ms(self) -> float:
        return max(self.upper.end_ms, self.lower.end_ms)


def schedule_pair(
    upper: RunResult | SimResult, lower: RunResult | SimResult, steps: range | None = None
) -> go.Figure:
    """Lanes of two results, one above the other.

    Raises:
        BadTrace: one has no events, or no such step.
    """
    return plot_schedule_pair(schedule_pair_info(upper, lower, steps))


def schedule_pair_info(
    upper: RunResult | SimResult, lower: RunResult | SimResult, steps: range | None = None
) -> SchedulePairInfo:
    """As numbers."""
    return SchedulePairInfo(lanes_info(upper, steps), lanes_info(lower, steps))


def _raise(trace: dict[str, Any], by: float) -> dict[str, Any]:
    return {**trace, "y": [y + by for y in trace["y"]]}


def schedule_pair_traces(info: SchedulePairInfo) -> list[dict[str, Any]]:
    """The lanes of the upper one, then those of the lower one; a meaning stands once in the legend."""
    upper = [_raise(trace, _UP) for trace in lanes_traces(info.upper)]
    lower = lanes_traces(info.lower)
    for meaning, above, below in zip(("", *MEANINGS), upper, lower, strict=True):
        for trace in (above, below):
            trace["legendgroup"] = meaning
        below["showlegend"] = below["showlegend"] and not above["showlegend"]
    return [*upper, *lower]


def schedule_pair_layout(info: SchedulePairInfo) -> dict[str, Any]:
    """What of the layout depends on the numbers."""
    shapes, annotations = [], []
    for one, base in ((info.upper, _UP), (info.lower, 0.0)):
        top = base + len(ROWS) - 0.4
        annotations.append(
            {
                "x": 0, "xref": "x", "y": top + 0.42, "yref": "y", "xanchor": "left", "yanchor": "bottom",
                "showarrow": False, "text": f"<b>{one.settings}</b>: {one.end_ms:.3g} ms", "font": {"size": 12.5},
            }
        )  # fmt: skip
        for span in (*one.steps, None):
            at = one.end_ms if span is None else span.start_ms
            shapes.append(upright(at, base - 0.5, top, "y", TEXT, "dot"))
            if span is not None:
                annotations.append(
                    {
                        "x": at, "xref": "x", "y": top - 0.1, "yref": "y", "xanchor": "left", "yanchor": "bottom",
                        "showarrow": False, "text": f"step {span.step}", "font": {"size": 11.5},
                    }
                )  # fmt: skip
    subtitle = (
        f"{count_of(len(info.lower.steps), 'decode step')}; the lower one takes "
        f"{info.lower.end_ms / info.upper.end_ms:.2f} times as long<br>"
        f"{info.upper.told}"
    )
    if info.lower.source != info.upper.source:
        subtitle += f" · lower: <b>{info.lower.source}</b>"
    return {
        "title": {"text": titled(_title(info), subtitle)},
        "xaxis": {"range": [0, info.end_ms * 1.01]},
        "shapes": shapes,
        "annotations": annotations,
    }


def _title(info: SchedulePairInfo) -> str:
    """What the two are to each other."""
    if (info.upper.settings, info.upper.source) != (info.lower.settings, info.lower.source):
        same = info.upper.settings == info.lower.settings
        return (
            "Does the engine do what was simulated?"
            if same
            else "What do two schedules do with the same steps?"
        )
    return "What do two runs do with the same steps?"


def plot_schedule_pair(info: SchedulePairInfo) -> go.Figure:
    """Two blocks of lanes."""
    fig = go.Figure(schedule_pair_traces(info))
    style(fig, title="", subtitle="", height=640, top=106)
    fig.update_layout(schedule_pair_layout(info))
    fig.update_layout(barmode="overlay", hovermode="closest", barcornerradius=0, uirevision=None)
    places = [len(ROWS) - 1 - i + base for base in (_UP, 0.0) for i in range(len(ROWS))]
    fig.update_xaxes(title_text="ms since the first step shown began")
    fig.update_yaxes(
        tickvals=places,
        ticktext=[*ROWS, *ROWS],
        range=[-0.6, _UP + len(ROWS) + 0.8],
        fixedrange=True,
        showgrid=False,
    )
    return fig

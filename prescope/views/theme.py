"""What all figures share: colours with a fixed meaning, fonts, grid, title with the run's origin.

Colours start from those of Okabe and Ito (https://jfly.uni-koeln.de/color/), moved apart until any two that meet in one
row, stack or bar, and a copy and the stall that it causes, differ by 20 (CIEDE2000) for normal, protan, deutan and
tritan eyes: tests/views/test_theme.py measures it.
Backgrounds are transparent and text is a grey that reads on white; panels and pages set it to their theme's own colour.
"""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from prescope.core.units import count_of
from prescope.errors import BadTrace
from prescope.scheduler import SCHEDULES
from prescope.simulator import SimResult
from prescope.traces.result import RunResult

#: meaning -> colour, in every figure the same.
COLORS: dict[str, str] = {
    "dense": "#929697",
    "experts": "#0176bc",
    "experts_cpu": "#56b4e9",
    "on_demand": "#ca8900",
    "prefetch": "#00735c",
    "stream": "#ffea05",
    "stall": "#aa3514",
    "cpu_wait": "#352764",
    "host_wait": "#f2a7f6",
    "warm_up": "#4e222a",
    "hit": "#007666",
    "late": "#f0c35a",
    "miss": "#b23b00",
    "on_cpu": "#56b4e9",
    "simulated": "#8da0cb",
    "measured": "#b15928",
    "other": "#eeedea",
    "nothing": "rgba(128,128,128,.28)",  # stands back on a dark page too, where "other" is the brightest
    "line": "#7c6fb0",
    "bound": "#c2185b",
}
#: meaning -> words of the legend.
NAMES: dict[str, str] = {
    "dense": "dense (attention, router)",
    "experts": "experts",
    "experts_cpu": "experts on the CPU",
    "on_demand": "copy on demand",
    "prefetch": "prefetch",
    "stream": "whole layer streamed",
    "stall": "stall (waits for bytes)",
    "cpu_wait": "waits for the CPU's experts",
    "host_wait": "host wait (reads routing)",
    "warm_up": "warm-up (compiling, once)",
    "hit": "hit",
    "late": "late",
    "miss": "miss",
    "on_cpu": "miss, computed on the CPU",
    "simulated": "simulated",
    "measured": "measured",
    "other": "other",
    "nothing": "nothing to copy",
}
#: Heat maps, from little to much: the ground shines through what is little, and what is much stands out from it, on a
#: white page and on a dark one. Some shines through the strongest too, so that the page's text colour reads there.
AMOUNT_SCALE = [[0.0, "rgba(10,132,208,.12)"], [1.0, "rgba(10,132,208,.9)"]]
#: The same from worse to better, equal in the middle: two hues that all eyes tell apart.
GAIN_SCALE = [
    [0.0, "rgba(212,98,10,.86)"], [0.499, "rgba(212,98,10,.05)"], [0.501, "rgba(10,132,208,.05)"],
    [1.0, "rgba(10,132,208,.9)"],
]  # fmt: skip
#: Predictors whose names people write otherwise than code does.
_WRITTEN = {"llapor": "LLaPor"}
TEXT = "#6b7280"
GRID = "rgba(128,128,128,.18)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"
#: Of every figure: no logo, no buttons that do nothing here, and none that uploads the figure to its makers ("Share
#: chart...", which plotly.js 4.1 shows unless told otherwise).
CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "showSendToCloud": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}


def figures_css(scope: str, text: str) -> str:
    """Rules that give figures the page's own text colour, light or dark; in hover labels, whose ground is a mark's own
    colour, plotly sees to it. Text in bars has the page's too: what has some is a grey through which the page shines.

    Args:
        scope: selector of what holds the figures; "" for the whole page. text: a CSS colour.
    """
    svg = f"{scope} .js-plotly-plot .main-svg".strip()
    return (
        f"{svg} text:not(.hoverlayer *) {{ fill: {text} !important; }}\n"
        f"{svg} .parcoords .domain, {svg} .parcoords .tick line {{ stroke: {text} !important; }}\n"
    )


def origin(run: RunResult) -> str:
    """Where a run's figures come from, in one line: machine or emulation, slots, cache, batch."""
    parts = [run.label]
    slots = run.config.get("num_slots", run.config.get("slots"))
    if slots is not None:
        share = run.config.get("slots_frac")
        parts.append(
            f"{slots} slots" + (f" ({100 * share:.0f} % of the experts)" if share is not None else "")
        )
    if "cache" in run.config:
        parts.append(str(run.config["cache"]))
    parts.append(f"batch {run.metrics.batch}")
    return " · ".join(parts)


#: What a result's times are, by its link; never mixed in one name.
SOURCES = {
    "measured": "measured",
    "emulated": "measured, link emulated",
    "simulated": "simulated",
    "virtual": "simulated",
}


def source_of(result: RunResult | SimResult) -> str:
    """Whether times were measured, measured over an emulated link, or simulated."""
    return SOURCES.get(str(result.hardware.get("link")), "origin unknown")


def told_of(result: RunResult | SimResult) -> str:
    """Source and machine in one line, for subtitles."""
    source, label = source_of(result), result.label.removeprefix("simulated, ")
    return f"<b>{source}</b>: {label}"


def told_of_several(results: Mapping[str, RunResult | SimResult]) -> str:
    """Source and machine of the first, and the sources of those that have another."""
    first = next(iter(results.values()))
    others = {source_of(result) for result in results.values()} - {source_of(first)}
    return " · others ".join([told_of(first), *sorted(others)])


def decode_steps(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of decode steps.

    Raises:
        BadTrace: there are none.
    """
    rows = table[table["phase"] == "decode"]
    if rows.empty:
        raise BadTrace(
            "there are no decode steps; ask for more than one new token (max_new_tokens=2 or more)"
        )
    return rows


def require_decode_events(figure: str, results: Mapping[str, RunResult | SimResult]) -> None:
    """Make sure that a figure has results to compare.

    Raises:
        BadTrace: no results, or one without decode events.
    """
    if not results:
        raise BadTrace(f"{figure} compares results; give one at least")
    for name, result in results.items():
        if result.events.empty or not (result.steps["phase"] == "decode").any():
            raise BadTrace(
                f"{name} has no decode events; run it with events=True and more than one new token"
            )


def written(predictor: str) -> str:
    """A predictor's name as people write it."""
    return _WRITTEN.get(predictor, predictor)


def title_of(name: str) -> str:
    """A schedule's title; any other name as it is."""
    return SCHEDULES[name].title if name in SCHEDULES else name


def settings_of(result: RunResult | SimResult) -> str:
    """Schedule, slots, cache and CPU lane in one line; the predictor where it is known."""
    config = result.config
    name = str(config.get("schedule", "on-demand"))
    parts = [title_of(name)]
    parts.append(f"{config['num_slots']} slots ({100 * config['slots_frac']:.0f} % of the experts)")
    parts.append(str(config["cache"]))
    if config.get("predictor", "none") != "none":
        parts.append(f"{written(config['predictor'])}, {count_of(config['lookahead'], 'layer')} ahead")
    if config.get("cpu"):
        parts.append("CPU lane")
    return " · ".join(parts)


#: Characters of a subtitle's line that a cell of 850 px has room for.
LINE = 112
_TAG = re.compile(r"<[^>]*>")


def titled(title: str, subtitle: str) -> str:
    """A title and, below, in lines that a narrow cell does not cut, a subtitle: where the numbers come from."""
    lines = [line for part in subtitle.split("<br>") for line in _wrapped(part)]
    return f"<b>{title}</b><br><span style='font-size:12.5px'>{'<br>'.join(lines)}</span>"


def _wrapped(text: str) -> list[str]:
    lines, length = [""], 0
    for word in text.split(" "):
        width = len(_TAG.sub("", word))
        if length and length + 1 + width > LINE:
            lines, length = [*lines, word], width
        else:
            lines[-1] += f" {word}" if length else word
            length += width + bool(length)
    return lines


def add_line(fig: go.Figure, color: str, **trace: Any) -> None:
    """A line with a light halo, so that it is seen on top of bars of any colour."""
    halo = {"x": trace["x"], "y": trace["y"], "yaxis": trace.get("yaxis", "y"), "mode": "lines"}
    fig.add_scatter(
        **halo, line={"color": "rgba(255,255,255,.75)", "width": 5}, hoverinfo="skip", showlegend=False
    )
    marker = {"size": 7, "color": color, "line": {"color": "white", "width": 1.5}}
    fig.add_scatter(**trace, mode="lines+markers", line={"color": color, "width": 2}, marker=marker)


def style(
    fig: go.Figure, *, title: str, subtitle: str, height: int, top: int = 90, bottom: int = 90
) -> go.Figure:
    """Give a figure the common looks; the caller sets the axis titles (with units).

    The subtitle is part of the title's text: plotly places its own subtitle below the title as measured, which is
    nothing in a widget that is drawn before it is shown. The legend stands below the plot and pushes the
    margin, so that it covers nothing when a narrow page wraps it.
    """
    fig.update_layout(
        title={
            "text": titled(title, subtitle),
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 20, "l": 12},
            "font": {"size": 17},
        },
        height=height,
        autosize=True,
        margin={"l": 66, "r": 24, "t": top, "b": bottom},
        font={"family": FONT, "size": 13, "color": TEXT},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"font": {"family": FONT, "size": 12.5}, "align": "left"},
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
            "traceorder": "normal",
            "font": {"size": 12.5},
            "bgcolor": "rgba(0,0,0,0)",
        },
        barcornerradius=2,
        uirevision=title,  # zoom survives an update with another run
        template="none",
    )
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "automargin": True, "ticks": ""}
    title_font = {"font": {"size": 12.5}, "standoff": 8}
    fig.update_xaxes(**axis, title=title_font)
    fig.update_yaxes(**axis, title=title_font)
    return fig

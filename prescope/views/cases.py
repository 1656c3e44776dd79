"""Cases in rows, variants as marks: how long a step takes in each, or how many times as fast as the first variant."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from prescope.errors import BadTrace
from prescope.simulator import SimResult
from prescope.traces.result import RunResult

from .theme import COLORS, style, titled, told_of

#: Colour and symbol of variants.
MARKS = (
    ("on_demand", "circle"),
    ("prefetch", "diamond"),
    ("bound", "cross"),
    ("experts", "square"),
    ("dense", "triangle-up"),
)
#: Variants that look the same in every figure, by place in MARKS; "perfect prediction" wherever the name holds it.
KNOWN = {"on demand": 0, "PreSched": 1, "LLaPor": 1, "best schedule": 1, "chance": 4}
PERFECT = "perfect prediction"
#: From this ratio of the largest number to the least on, the axis is logarithmic.
WIDE = 20.0


class CasesInfo(NamedTuple):
    """Numbers by case and variant; NaN where there is none."""

    cases: tuple[str, ...]
    variants: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]  # by variant, then case
    low: tuple[tuple[float, ...], ...]  # ends of intervals, empty without
    high: tuple[tuple[float, ...], ...]
    title: str
    told: str
    axis: str


def cases(
    values: pd.DataFrame,
    *,
    title: str,
    told: str,
    axis: str = "ms per decode step",
    relative: bool = False,
    ends: tuple[pd.DataFrame, pd.DataFrame] | None = None,
) -> go.Figure:
    """One row a case, one mark a variant.

    Args:
        values: index: cases; columns: variants, five at most; such as `steps_ms` makes it.
        title: the question. told: what the numbers are, and of which machine.
        axis: what is counted, with its unit.
        relative: times are shown as how many times as fast as the first variant a case is; hover says both.
        ends: of intervals, as `values`.

    Raises:
        BadTrace: no case, or more variants than there are marks.
    """
    return plot_cases(
        cases_info(values, title=title, told=told, axis=axis, relative=relative, ends=ends), relative
    )


def cases_info(
    values: pd.DataFrame,
    *,
    title: str,
    told: str,
    axis: str = "ms per decode step",
    relative: bool = False,
    ends: tuple[pd.DataFrame, pd.DataFrame] | None = None,
) -> CasesInfo:
    """As numbers."""
    if values.empty or len(values.columns) > len(MARKS):
        raise BadTrace(
            f"cases shows one case at least and {len(MARKS)} variants at most; these are {len(values)} with "
            f"{len(values.columns)}"
        )
    first = values.iloc[:, 0]
    shown = values.rdiv(first, axis=0) if relative else values

    def columns(frame: pd.DataFrame) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(frame[name].astype(float)) for name in frame)

    low, high = ((), ()) if ends is None else (columns(ends[0]), columns(ends[1]))
    return CasesInfo(
        tuple(map(str, values.index)),
        tuple(map(str, values.columns)),
        columns(shown),
        low,
        high,
        title,
        told,
        f"times as fast as {values.columns[0]}" if relative else axis,
    )


def steps_ms(results: Mapping[str, Mapping[str, RunResult | SimResult]]) -> pd.DataFrame:
    """Mean time of a decode step, ms: index: cases; columns: variants, as given.

    Raises:
        BadTrace: a run without decode steps.
    """
    return pd.DataFrame(
        {case: {name: _step_ms(one) for name, one in row.items()} for case, row in results.items()}
    ).T


def _step_ms(result: RunResult | SimResult) -> float:
    if isinstance(result, SimResult):
        return result.step_ms
    decode = result.metrics.decode
    if not decode.num_steps:
        raise BadTrace("a run has no decode steps; ask for more than one new token")
    return decode.wall_ms / decode.num_steps


def told_of_all(results: Mapping[str, Mapping[str, RunResult | SimResult]]) -> str:
    """What all these results are, once each, for a figure's subtitle."""
    return " · ".join(dict.fromkeys(told_of(one) for row in results.values() for one in row.values()))


def marks_of(variants: Sequence[str]) -> list[tuple[str, str]]:
    """Colour and symbol of each: its own, or one that no other has."""
    own = [2 if PERFECT in name else KNOWN.get(name) for name in variants]
    free = [i for i in (3, 4, 2, 1, 0) if i not in own]
    return [MARKS[free.pop(0) if place is None else place] for place in own]


def plot_cases(info: CasesInfo, relative: bool = False) -> go.Figure:
    """Marks on a line a case."""
    fig = go.Figure()
    by_case = np.array(info.values, dtype=float)
    for case, column in zip(info.cases, by_case.T, strict=True):
        there = column[~np.isnan(column)]
        if len(there):
            fig.add_scatter(
                x=[there.min(), there.max()], y=[case, case], mode="lines", hoverinfo="skip", showlegend=False,
                line={"color": "rgba(128,128,128,.45)", "width": 2},
            )  # fmt: skip
    marks = marks_of(info.variants)
    for i, (name, numbers) in enumerate(zip(info.variants, info.values, strict=True)):
        color, symbol = marks[i]
        bars = (
            {
                "type": "data", "symmetric": False, "thickness": 1.5, "color": COLORS[color],
                "array": [h - v for h, v in zip(info.high[i], numbers, strict=True)],
                "arrayminus": [v - low for low, v in zip(info.low[i], numbers, strict=True)],
            }
            if info.low
            else None
        )  # fmt: skip
        unit = "times" if relative else info.axis
        fig.add_scatter(
            x=numbers, y=info.cases, mode="markers", name=name, error_x=bars,
            marker={"color": COLORS[color], "symbol": symbol, "size": 12, "line": {"color": "white", "width": 1}},
            hovertemplate=f"{name}: %{{x:.3g}} {unit}<extra>%{{y}}</extra>",
        )  # fmt: skip
    lines = titled(info.title, info.told).count("<br>")
    style(
        fig, title=info.title, subtitle=info.told, height=164 + 20 * lines + 30 * len(info.cases), top=64 + 20 * lines,
        bottom=96,
    )  # fmt: skip
    there = by_case[~np.isnan(by_case)]
    fig.update_layout(hovermode="closest", margin_r=40)
    fig.update_yaxes(autorange="reversed", showgrid=False, type="category")
    fig.update_xaxes(title_text=info.axis)
    if there.min() > 0 and there.max() > WIDE * there.min():
        ticks = [m * 10.0**p for p in range(-3, 7) for m in (1, 2, 5)]
        shown = [one for one in ticks if there.min() / 2.5 < one < 2.5 * there.max()]
        fig.update_xaxes(type="log", tickvals=shown, ticktext=[f"{one:,g}" for one in shown])
    elif there.min() >= 0:
        fig.update_xaxes(rangemode="tozero")
    return fig

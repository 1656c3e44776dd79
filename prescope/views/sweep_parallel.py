"""All settings and objectives of a sweep's points side by side: one line a point, brushed on any axis."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from .sweep_points import (
    Axis,
    finished,
    moved_in,
    objective_axis,
    objectives_in,
    require_objective,
    setting_axis,
    told_of_points,
)
from .theme import style

#: Worst to best. As light as each other, so that both read on white and on black; colour grows with the worth.
WORTH_SCALE = [[0.0, "#8b929b"], [0.5, "#a8804f"], [1.0, "#d55e00"]]


#: Numbers of so few values have a tick for each, and a brush takes whole ones; where the ticks are so far apart, as a
#: share of the axis, that they can be read.
MOST_TICKS, LEAST_APART = 8, 0.07
#: Pixels of the narrowest cell, of half a letter of a head, and between two heads that are read as two.
CELL_PX, HALF_LETTER_PX, APART_PX = 850, 3.7, 8


class SweepParallelInfo(NamedTuple):
    """One line a point, in the order of `numbers`."""

    numbers: tuple[int, ...]
    axes: tuple[Axis, ...]  # settings that were moved, then objectives
    objective: Axis  # gives the colour
    more_is_better: bool
    told: str


def sweep_parallel(points: pd.DataFrame, objective: str = "tokens_per_s") -> go.Figure:
    """Parallel coordinates of the finished points.

    Args:
        points: as `Sweep.points()`. objective: gives the lines their colour.

    Raises:
        UnsupportedOption: no finished point, or no such objective.
    """
    return plot_sweep_parallel(sweep_parallel_info(points, objective))


def sweep_parallel_info(points: pd.DataFrame, objective: str = "tokens_per_s") -> SweepParallelInfo:
    """As numbers; arguments and errors as `sweep_parallel`."""
    rows = finished(points)
    found = require_objective(points, objective)
    settings = [setting_axis(rows, name) for name in moved_in(rows)]
    reached = [objective_axis(rows, name) for name in objectives_in(points)]
    return SweepParallelInfo(
        tuple(int(number) for number in rows["number"]),
        (*settings, *reached),
        objective_axis(rows, objective),
        found.more_is_better,
        told_of_points(points),
    )


def brushed(info: SweepParallelInfo, ranges: Mapping[int, Sequence[Any]]) -> tuple[int, ...]:
    """Numbers of the points that a brush leaves.

    Args:
        ranges: axis -> the range [low, high] that is brushed on it, or several such; axes without one let all pass.
    """
    kept = set(info.numbers)
    for place, given in ranges.items():
        spans = [given] if given and not isinstance(given[0], list | tuple) else list(given)
        if spans:
            values = zip(info.numbers, info.axes[place].values, strict=True)
            kept &= {number for number, value in values if any(low <= value <= high for low, high in spans)}
    return tuple(number for number in info.numbers if number in kept)


def plot_sweep_parallel(info: SweepParallelInfo, *, brief: bool = False) -> go.Figure:
    """Axes from left to right, the best lines in the strongest colour.

    Args:
        brief: beside a table that says what the points are.
    """
    lines = {
        "color": info.objective.values, "colorscale": WORTH_SCALE, "reversescale": not info.more_is_better,
        "showscale": False,
    }  # fmt: skip
    # A head lies over the middle of its axis, names to the left of it: about 7 px a letter.
    longest = max((len(name) for name in info.axes[0].names), default=0)
    half = [HALF_LETTER_PX * len(axis.label) for axis in info.axes]
    left, right = max(70, 24 + 7 * longest, 8 + half[0]), max(70, 8 + half[-1])
    between = (CELL_PX - left - right) / max(1, len(half) - 1)
    is_upright = all(a + b + APART_PX <= between for a, b in pairwise(half))
    no_shadow = {
        "shadow": "none"
    }  # plotly's is the paper's contrast, which is not known on a transparent one
    parallel = go.Parcoords(
        dimensions=[_dimension(axis) for axis in info.axes], line=lines, labelside="top",
        labelangle=0 if is_upright else -14, labelfont={"size": 12.5, **no_shadow}, tickfont={"size": 12, **no_shadow},
        rangefont={"size": 11, **no_shadow}, unselected={"line": {"opacity": 0.08}},
    )  # fmt: skip
    fig = go.Figure(parallel)
    what = f"one line a point, strongest colour: best {info.objective.label} · drag along an axis to brush it"
    top = 64 if is_upright else 84
    style(
        fig,
        title="Which settings go together?",
        subtitle=what if brief else f"{what}<br>{info.told}",
        height=380 if brief else 430,
        top=top + (34 if brief else 62),
        bottom=34,
    )
    fig.update_layout(margin={"l": left, "r": right})
    return fig


def _dimension(axis: Axis) -> dict[str, Any]:
    low, high = min(axis.values), max(axis.values)
    if axis.names:
        places = list(range(len(axis.names)))
        return {
            "label": axis.label, "values": axis.values, "tickvals": places, "ticktext": list(axis.names),
            "range": [-0.3, max(0.3, len(places) - 0.7)],
        }  # fmt: skip
    is_whole = all(value.is_integer() for value in axis.values)
    shown = {"label": axis.label, "values": axis.values, "tickformat": ",d" if is_whole else ",.4~r"}
    if low == high:
        return {**shown, "range": [low - 0.5, high + 0.5], "tickvals": [low]}
    few = sorted(set(axis.values))
    are_apart = all(b - a >= LEAST_APART * (high - low) for a, b in pairwise(few))
    is_short = len(few) <= MOST_TICKS and are_apart
    return {**shown, "range": [low, high], **({"tickvals": few} if is_short else {})}

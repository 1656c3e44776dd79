"""Any two settings of a sweep against each other: the best that was reached in each cell."""

from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from prescope.errors import UnsupportedOption

from .numbers import formatted
from .sweep_points import (
    BRIEF_HEIGHT,
    BRIEF_TOP,
    cells_of,
    finished,
    objective_axis,
    require_objective,
    require_setting,
    setting_axis,
    told_of_points,
)
from .theme import AMOUNT_SCALE, style

#: Columns with a number in each cell at most; more are too narrow for it.
MOST_NUMBERS = 16


class HeatCell(NamedTuple):
    """What is known of one pair of values."""

    x: int
    y: int
    best: float | None  # of the finished points; None: there is none
    number: int  # of the best point; of one that came to nothing where none was finished
    num_points: int  # finished ones
    reason: str  # why there is none


class SweepHeatInfo(NamedTuple):
    """Cells that have been tried."""

    x_label: str
    y_label: str
    x_names: tuple[str, ...]
    y_names: tuple[str, ...]
    cells: tuple[HeatCell, ...]
    objective: str  # head with unit
    more_is_better: bool
    told: str


def sweep_heat(points: pd.DataFrame, x: str, y: str, objective: str = "tokens_per_s") -> go.Figure:
    """The best of each pair of values of two settings, whatever the others were.

    Args:
        points: as `Sweep.points()`. x, y: settings. objective: what the best is judged by.

    Raises:
        UnsupportedOption: no finished point, no such setting or objective, or twice the same setting.
    """
    return plot_sweep_heat(sweep_heat_info(points, x, y, objective))


def sweep_heat_info(points: pd.DataFrame, x: str, y: str, objective: str = "tokens_per_s") -> SweepHeatInfo:
    """As numbers; arguments and errors as `sweep_heat`."""
    finished(points)
    found = require_objective(points, objective)
    for name in (x, y):
        require_setting(points, name)
    if x == y:
        raise UnsupportedOption(f"both settings are {x!r}; choose two")
    rows = points[points["state"] != "running"]
    across, up = setting_axis(rows, x), setting_axis(rows, y)
    (x_names, x_cells), (y_names, y_cells) = cells_of(across), cells_of(up)
    values = objective_axis(rows, objective).values
    groups: dict[tuple[int, int], list[int]] = {}
    for index, place in enumerate(zip(x_cells, y_cells, strict=True)):
        groups.setdefault(place, []).append(index)
    sign = 1 if found.more_is_better else -1
    cells = []
    for (i, j), members in sorted(groups.items()):
        there = [k for k in members if rows["state"].iloc[k] == "finished"]
        best = max(there, key=lambda k: sign * values[k]) if there else members[0]
        cells.append(
            HeatCell(
                i, j, values[best] if there else None, int(rows["number"].iloc[best]), len(there),
                "" if there else f"{rows['state'].iloc[best]}: {rows['reason'].iloc[best]}",
            )
        )  # fmt: skip
    return SweepHeatInfo(
        across.label, up.label, x_names, y_names, tuple(cells), found.head, found.more_is_better,
        told_of_points(points),
    )  # fmt: skip


def plot_sweep_heat(info: SweepHeatInfo, *, brief: bool = False) -> go.Figure:
    """The strongest colour is best; a cross is a pair that came to nothing, and says why.

    Args:
        brief: beside words that say what it is.
    """
    width, height = len(info.x_names), len(info.y_names)
    best: list[list[float | None]] = [[None] * width for _ in range(height)]
    numbers: list[list[int | None]] = [[None] * width for _ in range(height)]
    text, hover = ([[""] * width for _ in range(height)] for _ in range(2))
    for cell in info.cells:
        best[cell.y][cell.x], numbers[cell.y][cell.x] = cell.best, cell.number
        text[cell.y][cell.x] = "" if cell.best is None else formatted(cell.best)
        hover[cell.y][cell.x] = _words_of(cell, info)
    bar = {
        "thickness": 10, "outlinewidth": 0, "ypad": 0,
        "title": {"text": info.objective, "side": "top", "font": {"size": 12}},
    }  # fmt: skip
    heat = go.Heatmap(
        z=best, x=list(info.x_names), y=list(info.y_names), text=text, customdata=numbers, hovertext=hover,
        texttemplate="%{text}" if width <= MOST_NUMBERS // (2 if brief else 1) else "", textfont={"size": 12},
        hovertemplate="%{hovertext}<extra></extra>", hoverongaps=False, xgap=2, ygap=2, colorscale=AMOUNT_SCALE,
        reversescale=not info.more_is_better, colorbar=bar,
    )  # fmt: skip
    fig = go.Figure(heat)
    nothing = [cell for cell in info.cells if cell.best is None]
    fig.add_scatter(
        x=[info.x_names[cell.x] for cell in nothing], y=[info.y_names[cell.y] for cell in nothing], mode="markers",
        marker={"symbol": "x-thin", "size": 10, "line": {"width": 2, "color": "#929697"}}, showlegend=False,
        customdata=[cell.number for cell in nothing],
        hovertext=[hover[cell.y][cell.x] for cell in nothing], hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip
    crosses = " · a cross: infeasible or failed" if nothing else ""
    what = f"best {info.objective} of each pair, whatever the other settings{crosses}"
    style(
        fig,
        title="Which pairs of values are best?",
        subtitle="" if brief else f"{what}<br>{info.told}",
        height=BRIEF_HEIGHT if brief else 188 + 30 * max(5, len(info.y_names)),
        top=BRIEF_TOP if brief else 96,
        bottom=62,
    )
    fig.update_xaxes(title_text=info.x_label, type="category", showgrid=False)
    fig.update_yaxes(title_text=info.y_label, type="category", showgrid=False)
    fig.update_xaxes(categoryorder="array", categoryarray=list(info.x_names))
    fig.update_yaxes(categoryorder="array", categoryarray=list(info.y_names))
    return fig


def _words_of(cell: HeatCell, info: SweepHeatInfo) -> str:
    where = f"{info.x_label}: {info.x_names[cell.x]}<br>{info.y_label}: {info.y_names[cell.y]}"
    if cell.best is None:
        return f"{where}<br>{cell.reason}"
    return f"{where}<br>{formatted(cell.best)} {info.objective}: the best of {cell.num_points}, point {cell.number}"

"""A sweep's points in the order in which they were tried, and the best so far."""

from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from .sweep_points import (
    BRIEF_HEIGHT,
    BRIEF_TOP,
    HOVER,
    finished,
    moved_in,
    objective_axis,
    require_objective,
    settings_in_words,
    told_of_points,
)
from .theme import COLORS, style


class SweepHistoryInfo(NamedTuple):
    """Finished points by number, and those that came to nothing."""

    numbers: tuple[int, ...]
    values: tuple[float, ...]
    best: tuple[float, ...]  # so far
    settings: tuple[str, ...]
    nothing: tuple[tuple[int, str], ...]  # number and why
    objective: str  # head with unit
    told: str


def sweep_history(points: pd.DataFrame, objective: str = "tokens_per_s") -> go.Figure:
    """Points by number and the best so far.

    Args:
        points: as `Sweep.points()`.

    Raises:
        UnsupportedOption: no finished point, or no such objective.
    """
    return plot_sweep_history(sweep_history_info(points, objective))


def sweep_history_info(points: pd.DataFrame, objective: str = "tokens_per_s") -> SweepHistoryInfo:
    """As numbers; arguments and errors as `sweep_history`."""
    rows = finished(points).sort_values("number")
    found = require_objective(points, objective)
    values = objective_axis(rows, objective).values
    so_far = pd.Series(values).cummax() if found.more_is_better else pd.Series(values).cummin()
    moved = moved_in(rows)
    lost = points[points["state"].isin(["infeasible", "failed"])].sort_values("number")
    return SweepHistoryInfo(
        tuple(int(number) for number in rows["number"]), values, tuple(so_far.tolist()),
        tuple(settings_in_words(row, moved) for _, row in rows.iterrows()),
        tuple((int(row["number"]), f"{row['state']}: {row['reason']}") for _, row in lost.iterrows()),
        found.head, told_of_points(points),
    )  # fmt: skip


def plot_sweep_history(info: SweepHistoryInfo, *, brief: bool = False) -> go.Figure:
    """Dots, a line of the best so far, crosses for what came to nothing; `brief`: beside words that say what it is."""
    fig = go.Figure()
    told = [f"point {number}: {words}" for number, words in zip(info.numbers, info.settings, strict=True)]
    fig.add_scatter(
        x=info.numbers, y=info.values, mode="markers", name="points", text=told, customdata=info.numbers,
        marker={"size": 6, "color": COLORS["dense"], "opacity": 0.7},
        hovertemplate=f"%{{y:,.4g}} {info.objective}<br>%{{text}}<extra></extra>",
    )  # fmt: skip
    fig.add_scatter(
        x=info.numbers, y=info.best, mode="lines", name="best so far",
        line={"color": COLORS["stall"], "width": 2.2, "shape": "hv"},
        hovertemplate=f"best so far: %{{y:,.4g}} {info.objective}<extra></extra>",
    )  # fmt: skip
    floor = min(info.values)
    fig.add_scatter(
        x=[number for number, _ in info.nothing], y=[floor] * len(info.nothing), mode="markers",
        name="infeasible or failed", text=[why for _, why in info.nothing], showlegend=bool(info.nothing),
        customdata=[number for number, _ in info.nothing],
        marker={"size": 9, "symbol": "x-thin", "line": {"width": 2, "color": COLORS["miss"]}},
        hovertemplate="point %{x}, %{text}<extra></extra>",
    )  # fmt: skip
    style(
        fig,
        title="Does it still get better?",
        subtitle="" if brief else info.told,
        height=BRIEF_HEIGHT if brief else 380,
        top=BRIEF_TOP if brief else 88,
    )
    fig.update_layout(hovermode="closest", hoverlabel=HOVER)
    few = {"dtick": 1} if len(info.numbers) < 9 else {}  # there is no point 0.5
    fig.update_xaxes(title_text="point, in the order in which they were tried", **few)
    fig.update_yaxes(title_text=info.objective)
    return fig

"""Two objectives of a sweep against each other, and the points that none beats in both: the Pareto front."""

from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from prescope.errors import UnsupportedOption

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


class SweepFrontInfo(NamedTuple):
    """One entry a finished point, in the order of `numbers`."""

    numbers: tuple[int, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    settings: tuple[str, ...]
    front: tuple[int, ...]  # places of the points that no other beats in both, from left to right
    x_label: str
    y_label: str
    more_x: bool
    more_y: bool
    told: str


def sweep_front(points: pd.DataFrame, x: str = "gpu_bytes", y: str = "tokens_per_s") -> go.Figure:
    """Every finished point, and the front.

    Args:
        points: as `Sweep.points()`. x, y: objectives.

    Raises:
        UnsupportedOption: no finished point, no such objective, or twice the same.
    """
    return plot_sweep_front(sweep_front_info(points, x, y))


def sweep_front_info(points: pd.DataFrame, x: str = "gpu_bytes", y: str = "tokens_per_s") -> SweepFrontInfo:
    """As numbers; arguments and errors as `sweep_front`."""
    rows = finished(points)
    if x == y:
        raise UnsupportedOption(f"both objectives are {x!r}; choose two")
    across, up = require_objective(points, x), require_objective(points, y)
    xs, ys = objective_axis(rows, x).values, objective_axis(rows, y).values
    moved = moved_in(rows)
    return SweepFrontInfo(
        tuple(int(number) for number in rows["number"]), xs, ys,
        tuple(settings_in_words(row, moved) for _, row in rows.iterrows()),
        _front(xs, ys, across.more_is_better, up.more_is_better), across.head, up.head, across.more_is_better,
        up.more_is_better, told_of_points(points),
    )  # fmt: skip


def _front(
    xs: tuple[float, ...], ys: tuple[float, ...], more_x: bool, more_y: bool
) -> tuple[int, ...]:  # fmt: skip
    """Places of the points that no other beats in one without losing in the other, by x."""
    sign_x, sign_y = 1 if more_x else -1, 1 if more_y else -1
    order = sorted(range(len(xs)), key=lambda i: (-sign_x * xs[i], -sign_y * ys[i]))
    kept: list[int] = []
    for i in order:
        if not kept or sign_y * ys[i] > sign_y * ys[kept[-1]]:
            kept.append(i)
    return tuple(sorted(kept, key=lambda i: xs[i]))


def plot_sweep_front(info: SweepFrontInfo, *, brief: bool = False) -> go.Figure:
    """All points small, those of the front large and joined by steps; `brief`: beside words that say what they are."""
    fig = go.Figure()
    told = [f"point {number}: {words}" for number, words in zip(info.numbers, info.settings, strict=True)]
    hover = f"%{{y:,.4g}} {info.y_label}<br>%{{x:.4g}} {info.x_label}<br>%{{text}}<extra></extra>"
    fig.add_scatter(
        x=info.x, y=info.y, mode="markers", name="points", text=told, customdata=info.numbers, hovertemplate=hover,
        marker={"size": 6, "color": COLORS["dense"], "opacity": 0.6},
    )  # fmt: skip
    front = info.front
    fig.add_scatter(
        x=[info.x[i] for i in front], y=[info.y[i] for i in front], mode="lines+markers", name="front",
        text=[told[i] for i in front], customdata=[info.numbers[i] for i in front], hovertemplate=hover,
        line={"color": COLORS["stall"], "width": 2, "shape": "vh" if info.more_x == info.more_y else "hv"},
        marker={"size": 10, "color": COLORS["stall"], "symbol": "diamond", "line": {"width": 1, "color": "white"}},
    )  # fmt: skip
    words = ["more is better" if more else "less is better" for more in (info.more_x, info.more_y)]
    share = f"{len(front)} of {len(info.numbers):,} points lie on the front"
    style(
        fig,
        title="Which points are unbeaten?",
        subtitle="" if brief else f"{info.y_label} against {info.x_label}: {share}<br>{info.told}",
        height=BRIEF_HEIGHT if brief else 420,
        top=BRIEF_TOP if brief else 104,
    )
    fig.update_layout(hovermode="closest", hoverlabel=HOVER)
    fig.update_xaxes(title_text=f"{info.x_label} ({words[0]})")
    fig.update_yaxes(title_text=f"{info.y_label} ({words[1]})")
    return fig

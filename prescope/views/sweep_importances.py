"""How much of the difference between a sweep's points is due to each setting."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from prescope.errors import UnsupportedOption

from .sweep_points import BRIEF_HEIGHT, BRIEF_TOP, require_objective, told_of_points
from .theme import COLORS, style


class SweepImportancesInfo(NamedTuple):
    """One entry a setting, the most important first; shares in percent."""

    settings: tuple[str, ...]
    shares_pct: tuple[float, ...]
    objective: str  # head with unit
    told: str


def sweep_importances(
    points: pd.DataFrame, importances: Mapping[str, float], objective: str = "tokens_per_s"
) -> go.Figure:
    """Bars by setting.

    Args:
        points: as `Sweep.points()`. importances: as `Sweep.importances()`: setting -> share. objective: of which.

    Raises:
        UnsupportedOption: nothing is known yet, or no such objective.
    """
    return plot_sweep_importances(sweep_importances_info(points, importances, objective))


def sweep_importances_info(
    points: pd.DataFrame, importances: Mapping[str, float], objective: str = "tokens_per_s"
) -> SweepImportancesInfo:
    """As numbers; arguments and errors as `sweep_importances`."""
    head = require_objective(points, objective).head
    total = sum(importances.values())
    if not total > 0:
        raise UnsupportedOption(
            "importances need finished points that differ; let the sweep move two settings and go on"
        )
    order = sorted(importances, key=lambda name: (-importances[name], name))
    return SweepImportancesInfo(
        tuple(name.replace("_", " ") for name in order),
        tuple(100 * float(importances[name]) / total for name in order),
        head,
        told_of_points(points),
    )


def plot_sweep_importances(info: SweepImportancesInfo, *, brief: bool = False) -> go.Figure:
    """Bars to the right, the longest on top; `brief`: beside words that say what the points are."""
    fig = go.Figure(
        go.Bar(
            x=info.shares_pct, y=info.settings, orientation="h", text=[f"{share:.0f} %" for share in info.shares_pct],
            textposition="outside", cliponaxis=False,
            marker={"color": COLORS["experts"], "line": {"width": 0}, "opacity": 0.85},
            hovertemplate="%{y}: %{x:.1f} %<extra></extra>",
        )
    )  # fmt: skip
    style(
        fig,
        title="Which settings matter?",
        subtitle="" if brief else f"of the variance of {info.objective} (PED-ANOVA)<br>{info.told}",
        height=BRIEF_HEIGHT if brief else 164 + 30 * len(info.settings),
        top=BRIEF_TOP if brief else 92,
        bottom=52,
    )
    fig.update_layout(showlegend=False, bargap=0.35)
    share = f"share of the differences in {info.objective}, %"
    fig.update_xaxes(title_text=share, range=[0, 1.12 * max(info.shares_pct)])
    fig.update_yaxes(title_text="setting", showgrid=False, autorange="reversed", type="category")
    return fig

"""Milliseconds per token that each predictor would save, by the cost model."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from prescope.errors import BadTrace

from .theme import COLORS, style


class SavingsInfo(NamedTuple):
    """One entry per predictor, the best first; times in ms per token."""

    names: tuple[str, ...]
    saved_ms: tuple[float, ...]
    stall_ms: tuple[float, ...]
    predict_us: tuple[float, ...]
    without_ms: float
    stall_without_ms: float
    setting: str
    source: str


def savings(table: pd.DataFrame) -> go.Figure:
    """From the table of `TrainedPredictor.savings`, or rows of `prescope.training.savings` of one setting."""
    return plot_savings(savings_info(table))


def savings_info(table: pd.DataFrame) -> SavingsInfo:
    """As numbers.

    Raises:
        BadTrace: the rows are of different settings, so they cannot be compared.
    """
    setting = ["lookahead", "width", "batch", "resident_frac", "source"]
    if table.empty or len(table[setting].drop_duplicates()) != 1:
        raise BadTrace("savings compares predictors at one lookahead, width, batch and share of residents")
    table = table.sort_values("saved_ms", ascending=False)
    first = table.iloc[0]
    return SavingsInfo(
        tuple(table["predictor"]),
        _floats(table["saved_ms"]),
        _floats(table["stall_with_ms"]),
        _floats(table["predict_us"]),
        float(first["without_ms"]),
        float(first["stall_without_ms"]),
        f"lookahead {first['lookahead']}, {first['width']} experts prefetched per layer, batch {first['batch']}, "
        f"the {100 * first['resident_frac']:.0f} % most frequent experts resident",
        str(first["source"]),
    )


def plot_savings(info: SavingsInfo) -> go.Figure:
    """Bars to the right save, bars to the left cost."""
    colors = [COLORS["prefetch"] if saved > 0 else COLORS["stall"] for saved in info.saved_ms]
    fig = go.Figure(
        go.Bar(
            x=info.saved_ms,
            y=info.names,
            orientation="h",
            marker={"color": colors, "line": {"width": 0}, "opacity": 0.85},
            text=[f"{saved:+.2f} ms" for saved in info.saved_ms],
            textposition="outside",
            cliponaxis=False,
            customdata=list(zip(info.stall_ms, info.predict_us, strict=True)),
            hovertemplate="%{x:+.3f} ms per token<br>still stalled %{customdata[0]:.3f} ms<br>"
            "one prediction %{customdata[1]:.0f} us per layer<extra></extra>",
        )
    )
    style(
        fig,
        title="Would a predictor pay?",
        subtitle=f"without one {info.without_ms:.2f} ms per token, {info.stall_without_ms:.2f} of it stalled · "
        f"{info.setting}<br>cost model with {info.source}",
        height=190 + 32 * len(info.names),
        bottom=52,
        top=104,
    )
    fig.update_layout(bargap=0.3, showlegend=False)
    low, high = min(0.0, *info.saved_ms), max(0.0, *info.saved_ms)
    room = 0.14 * (high - low or 1.0)  # for the words at a bar's end, which plotly leaves none
    fig.update_xaxes(
        title_text="saved per token, ms (its own cost counted)", zeroline=True, zerolinewidth=1,
        range=[low - room, high + room],
    )  # fmt: skip
    fig.update_yaxes(title_text="predictor", showgrid=False, autorange="reversed")
    return fig


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)

"""What does GPU memory buy? Tokens/s and hit rate against the memory that slots and model take, simulated."""

from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from prescope.advice import INTERVAL, Advice
from prescope.core.units import digits

from .theme import COLORS, TEXT, style

#: Field of a point -> its name, colour and dash.
LINES = {
    "perfect": ("with perfect prediction", "bound", "dash"),
    "tokens_per_s": ("best schedule", "experts", "solid"),
    "without": ("best without prediction", "on_cpu", "solid"),
    "on_demand": ("on demand", "on_demand", "dot"),
}


class CapacityInfo(NamedTuple):
    """The curve of an `Advice`."""

    gpu_gib: tuple[float, ...]
    rates: dict[str, tuple[float, ...]]  # all of LINES, tokens/s
    hit_pct: tuple[float, ...]
    texts: tuple[str, ...]
    cliff_gib: float
    budget_gib: float
    best_gib: float  # NaN without a choice
    best_rate: float
    title: str
    told: str


def capacity(advice: Advice) -> go.Figure:
    """Tokens/s and hit rate against GPU memory, with the cliff and the budget."""
    return plot_capacity(capacity_info(advice))


def capacity_info(advice: Advice) -> CapacityInfo:
    """As numbers."""
    points, nan = advice.points, float("nan")
    guessed = any("guessed" in note for note in advice.assumptions)
    return CapacityInfo(
        tuple(p.gpu_gib for p in points),
        {name: tuple(getattr(p, name) for p in points) for name in LINES},
        tuple(100 * p.hit_rate for p in points),
        tuple(
            f"{p.slots:,} slots, {100 * p.share:.0f} %: {p.schedule}; {p.limit} {100 * p.limit_frac:.0f} %"
            for p in points
        ),
        advice.cliff_gib,
        advice.budget_gib,
        nan if advice.best is None else advice.best.gpu_gib,
        nan if advice.best is None else advice.best.tokens_per_s,
        f"{advice.model.name} · batch {advice.batch} · {advice.machine.name}",
        f"<b>simulated</b>, machine {advice.machine.origin}, routing {'<b>guessed</b>' if guessed else 'recorded'}",
    )


def plot_capacity(info: CapacityInfo) -> go.Figure:
    """Two rows over one axis of memory."""
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.64, 0.36])
    best = np.array(info.rates["tokens_per_s"])
    fig.add_scatter(
        x=[*info.gpu_gib, *info.gpu_gib[::-1]], y=[*(best * (1 + INTERVAL)), *(best * (1 - INTERVAL))[::-1]],
        mode="lines", fill="toself", fillcolor="rgba(1,118,188,.10)", line={"width": 0}, hoverinfo="skip", row=1, col=1,
        name=f"good to {100 * INTERVAL:.0f} %",
    )  # fmt: skip
    for name, (words, color, dash) in LINES.items():
        fig.add_scatter(
            x=info.gpu_gib, y=info.rates[name], name=words, mode="lines+markers", text=info.texts,
            line={"color": COLORS[color], "width": 2.2, "dash": dash}, marker={"size": 6},
            hovertemplate="%{y:,.3g} tokens/s, " + words + "<br>%{text}<extra></extra>", row=1, col=1,
        )  # fmt: skip
    has_best = info.best_gib == info.best_gib  # a NaN in a list is no JSON: the notebook would warn in red
    fig.add_scatter(
        x=[info.best_gib] if has_best else [], y=[info.best_rate] if has_best else [], name="advised",
        mode="markers", hoverinfo="skip",
        marker={"size": 14, "symbol": "star", "color": COLORS["stall"], "line": {"width": 1, "color": "white"}}, row=1,
        col=1, showlegend=has_best,
    )  # fmt: skip
    fig.add_scatter(
        x=info.gpu_gib, y=info.hit_pct, name="hit rate", mode="lines+markers", showlegend=False,
        line={"color": COLORS["hit"], "width": 2.2}, hovertemplate="%{y:.1f} % hits<extra></extra>", row=2, col=1,
    )  # fmt: skip
    style(
        fig,
        title="What does GPU memory buy?",
        subtitle=f"{info.title}<br>{info.told}",
        height=490,
        top=118,
    )
    left = info.gpu_gib[0] - 0.04 * (info.gpu_gib[-1] - info.gpu_gib[0])
    right = info.gpu_gib[-1] + 0.04 * (info.gpu_gib[-1] - info.gpu_gib[0])
    if left < info.cliff_gib < right:
        fig.add_vrect(x0=left, x1=info.cliff_gib, fillcolor="rgba(213,94,0,.14)", line_width=0)
        fig.add_annotation(
            x=info.cliff_gib, y=1, xref="x", yref="paper",
            xanchor="left" if info.cliff_gib < (left + right) / 2 else "right", yanchor="bottom", showarrow=False,
            text="← cliff: slots hold less than one step needs", font={"size": 12},
        )  # fmt: skip
    if left < info.budget_gib < right:
        fig.add_vline(x=info.budget_gib, line={"color": TEXT, "width": 2, "dash": "dot"})
        fig.add_annotation(
            x=info.budget_gib, y=1, xref="x", yref="paper", xanchor="left", yanchor="bottom", showarrow=False,
            text=f"budget {digits(info.budget_gib)} GiB", font={"size": 12},
        )  # fmt: skip
    fig.update_layout(hovermode="x unified")
    fig.update_xaxes(range=[left, right])
    fig.update_xaxes(
        title_text="GPU memory, GiB: slots, the rest of the model, keys and values, work space", row=2, col=1
    )
    fig.update_yaxes(title_text="tokens/s", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(title_text="hit rate, %", range=[0, 104], row=2, col=1)
    return fig

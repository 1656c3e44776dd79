"""Recall along a stream of text that changes half-way, as trained and with online tuning."""

from typing import NamedTuple

import plotly.graph_objects as go

from prescope.training.failures import Shift

from .theme import COLORS, TEXT, style


class TextShiftInfo(NamedTuple):
    """Recall@K of each window of tokens, at the token in the middle of it."""

    token: tuple[int, ...]
    fixed: tuple[float, ...]
    tuned: tuple[float, ...]
    shift_at: int
    window: int
    lookahead: int
    summary: str


def text_shift(shift: Shift, before: str = "before", after: str = "after") -> go.Figure:
    """Two curves and the place where the text changes; `before` and `after` name the texts."""
    return plot_text_shift(text_shift_info(shift, before, after), before, after)


def text_shift_info(shift: Shift, before: str = "before", after: str = "after") -> TextShiftInfo:
    """As numbers, with what happened in words."""
    num_before = shift.shift_at // shift.window
    starts = [
        i * shift.window if i < num_before else shift.shift_at + (i - num_before) * shift.window
        for i in range(len(shift.fixed))
    ]
    recovery = (
        f"half of the drop made up after {shift.recovery_tokens:,} tokens"
        if shift.recovery_tokens is not None
        else "half of the drop not made up in this stream"
    )
    mean_ms = shift.tuning_ms / shift.cycles if shift.cycles else 0.0
    return TextShiftInfo(
        tuple(start + shift.window // 2 for start in starts),
        tuple(shift.fixed.tolist()),
        tuple(shift.tuned.tolist()),
        shift.shift_at,
        shift.window,
        shift.lookahead,
        f"{before} {shift.before:.3f}, {after} {shift.after_fixed:.3f} as trained, {shift.after_tuned:.3f} tuned "
        f"(last half); {recovery}<br>{shift.cycles} tuning cycles of {mean_ms:.1f} ms on this machine",
    )


def plot_text_shift(info: TextShiftInfo, before: str = "before", after: str = "after") -> go.Figure:
    """Grey as trained, green tuned, a line where the text changes."""
    fig = go.Figure()
    for name, values, color in (
        ("as trained", info.fixed, COLORS["dense"]),
        ("tuned online", info.tuned, COLORS["prefetch"]),
    ):
        fig.add_scatter(
            x=info.token, y=values, name=name, mode="lines", line={"color": color, "width": 2.5},
            hovertemplate="%{y:.3f}",
        )  # fmt: skip
    fig.add_vline(x=info.shift_at, line={"color": COLORS["stall"], "width": 1.5, "dash": "dash"})
    for text, anchor in ((f"{before} ", "right"), (f" {after}", "left")):
        fig.add_annotation(
            x=info.shift_at, y=1, yref="paper", yanchor="bottom", xanchor=anchor, text=text, showarrow=False,
            font={"size": 12, "color": TEXT},
        )  # fmt: skip
    style(
        fig,
        title="What happens when the text changes in mid-stream?",
        subtitle=f"lookahead {info.lookahead} · {info.summary}",
        height=400,
        top=116,
    )
    fig.update_layout(hovermode="x unified")
    fig.update_xaxes(title_text="tokens of the stream", showgrid=False)
    fig.update_yaxes(title_text=f"recall@K, windows of {info.window} tokens")
    return fig

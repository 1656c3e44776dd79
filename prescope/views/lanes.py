"""Lanes of a few steps under a schedule, each transfer and each expert on the CPU with its reason.

For results of the simulator and of the engine alike. The traces are always the same, in the same order, so that a live
figure only swaps their numbers. `timeline` is the view for long ranges.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from prescope.core.types import Lane, Reason
from prescope.core.units import gb_per_s
from prescope.errors import BadTrace
from prescope.simulator import SimResult
from prescope.traces.events import KINDS, LANES, REASONS
from prescope.traces.result import RunResult
from prescope.traces.routing import RoutingTrace

from .theme import COLORS, GRID, NAMES, TEXT, settings_of, source_of, style, titled, told_of

#: More bars than this draw too slowly; fewer steps are shown then.
MAX_BARS = 2000
#: From top to bottom.
ROWS = ("MoE layer", "GPU", "PCIe", "CPU", "waits")
MEANINGS = (
    "dense", "experts", "experts_cpu", "on_demand", "prefetch", "stream", "stall", "cpu_wait", "host_wait",
    "warm_up",
)  # fmt: skip
_ROW_OF = {
    "dense": "GPU", "experts": "GPU", "experts_cpu": "CPU", "on_demand": "PCIe", "prefetch": "PCIe", "stream": "PCIe",
    "stall": "waits", "cpu_wait": "waits", "host_wait": "waits", "warm_up": "waits",
}  # fmt: skip
_COMPUTE = [LANES.index(lane) for lane in (Lane.GPU, Lane.STALL, Lane.HOST)]


class Bars(NamedTuple):
    """Bars of one meaning; milliseconds since the first step shown began."""

    start_ms: tuple[float, ...]
    dur_ms: tuple[float, ...]
    texts: tuple[str, ...]  # what it is, and why


class Span(NamedTuple):
    """A step (moe_layer -1) or one MoE layer of a step."""

    step: int
    moe_layer: int
    start_ms: float
    dur_ms: float


class LanesInfo(NamedTuple):
    """What the figure draws."""

    bars: dict[str, Bars]  # by meaning, all of MEANINGS
    layers: tuple[Span, ...]
    steps: tuple[Span, ...]
    end_ms: float
    left_out: int  # steps that were asked for and did not fit
    source: str  # "simulated", "measured", ...
    settings: str
    told: str  # source and machine


def lanes(result: RunResult | SimResult, steps: range | None = None) -> go.Figure:
    """Lanes of some decode steps, the first two unless told.

    Raises:
        BadTrace: the result has no events, or no such step.
    """
    return plot_lanes(lanes_info(result, steps))


def lanes_info(result: RunResult | SimResult, steps: range | None = None) -> LanesInfo:
    """Bars and spans; arguments and errors as `lanes`."""
    if result.events.empty:
        raise BadTrace("the run has no events; run it with events=True")
    shown = _steps_shown(result.steps, steps)
    events, left_out = _window(result.events, shown)
    first_us = float(shown["start_us"].iloc[0])
    shown = shown.iloc[: len(shown) - left_out]
    spans = tuple(
        Span(int(step), -1, (start - first_us) / 1e3, dur / 1e3)
        for step, start, dur in zip(shown["step"], shown["start_us"], shown["dur_us"], strict=True)
    )
    return LanesInfo(
        _bars(events, first_us, _Uses(_tokens(result.trace, spans), _on_cpu(result.layers, spans))),
        _layer_spans(events, {span.step for span in spans}, first_us),
        spans,
        spans[-1].start_ms + spans[-1].dur_ms,
        left_out,
        source_of(result),
        settings_of(result),
        told_of(result),
    )


def _steps_shown(steps: pd.DataFrame, wanted: range | None) -> pd.DataFrame:
    decode = steps[steps["phase"] == "decode"]
    first = int(decode["step"].iloc[0]) if len(decode) else 0
    wanted = range(first, first + 2) if wanted is None else wanted
    shown = steps[steps["step"].isin(list(wanted))]
    if shown.empty:
        raise BadTrace(
            f"there is no step of {wanted}; there are {steps['step'].min()} to {steps['step'].max()}"
        )
    return shown


def _window(events: pd.DataFrame, steps: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Events of the steps, and how many of the last steps were left out."""
    start, dur = events["start_us"].to_numpy(), events["dur_us"].to_numpy()
    begin, ends = steps["start_us"].iloc[0], (steps["start_us"] + steps["dur_us"]).to_numpy()
    for left_out, end in enumerate(ends[::-1]):
        rows = np.flatnonzero((start < end) & (start + dur > begin))
        if len(rows) <= MAX_BARS:
            return events.iloc[rows], left_out
    longest = rows[np.argsort(-dur[rows], kind="stable")[:MAX_BARS]]
    return events.iloc[np.sort(longest)], len(ends) - 1


def _meanings(events: pd.DataFrame) -> np.ndarray:
    """Index into MEANINGS of each event."""
    lane, kind = events["lane"].cat.codes.to_numpy(), events["kind"].cat.codes.to_numpy()
    reason = events["reason"].cat.codes.to_numpy()
    is_copy = kind == KINDS.index("transfer")
    by_kind = [MEANINGS.index(name) if name in MEANINGS else 0 for name in KINDS]
    by_reason = [
        MEANINGS.index(name) if name in MEANINGS else MEANINGS.index("on_demand") for name in REASONS
    ]
    found = np.where(is_copy, np.array(by_reason)[reason], np.array(by_kind)[kind])
    on_cpu = (lane == LANES.index(Lane.CPU)) & (kind == KINDS.index("experts"))
    return np.where(on_cpu, MEANINGS.index("experts_cpu"), found)


def _bars(events: pd.DataFrame, first_us: float, uses: "_Uses") -> dict[str, Bars]:
    meanings = _meanings(events)
    columns = [
        events[name].to_numpy() for name in ("step", "moe_layer", "expert", "bytes", "start_us", "dur_us")
    ]
    bars = {}
    for i, meaning in enumerate(MEANINGS):
        rows = np.flatnonzero(meanings == i)
        step, layer, expert, nbytes, start, dur = (column[rows].tolist() for column in columns)
        texts = tuple(
            _text(meaning, *where, uses) for where in zip(step, layer, expert, nbytes, dur, strict=True)
        )
        bars[meaning] = Bars(
            tuple((at - first_us) / 1e3 for at in start), tuple(us / 1e3 for us in dur), texts
        )
    return bars


def _tokens(trace: RoutingTrace | None, steps: tuple[Span, ...]) -> dict[tuple[int, int, int], int]:
    """(step, layer, expert) -> tokens that use it."""
    found = {}
    for span in steps if trace is not None else ():
        for need in trace.needed(span.step) if trace is not None else ():
            for expert, count in zip(need.experts.tolist(), need.tokens.tolist(), strict=True):
                found[span.step, need.moe_layer, expert] = count
    return found


class _Uses(NamedTuple):
    """What the texts of transfers and CPU experts say of them."""

    tokens: dict[tuple[int, int, int], int]  # (step, layer, expert) -> tokens that use it
    on_cpu: dict[tuple[int, int], tuple[int, int]]  # (step, layer) -> of its misses on the CPU, misses


def _on_cpu(layers: pd.DataFrame, steps: tuple[Span, ...]) -> dict[tuple[int, int], tuple[int, int]]:
    columns = [layers[name].to_numpy() for name in ("step", "moe_layer", "on_cpu", "misses")]
    rows = np.flatnonzero(np.isin(columns[0], [span.step for span in steps]) & (columns[2] > 0))
    values = (column[rows].tolist() for column in columns)
    return {(step, layer): (done, misses) for step, layer, done, misses in zip(*values, strict=True)}


def _text(
    meaning: str,
    step: int,
    layer: int,
    expert: int,
    nbytes: int,
    us: float,
    uses: _Uses,
) -> str:
    where = f"step {step}, MoE layer {layer}" if layer >= 0 else f"step {step}, after the last MoE layer"
    who = f", expert {expert}" if expert >= 0 else ""
    text = f"<b>{NAMES[meaning]}</b><br>{where}{who}<br>{us:,.1f} us"
    if nbytes and us:
        text += f", {nbytes / 1e6:.3g} MB, {gb_per_s(nbytes, us):.3g} GB/s"
    if meaning in _REASONS:
        text += f"<br>{_REASONS[meaning]}"
    if meaning == "experts_cpu" and (step, layer) in uses.on_cpu:
        done, misses = uses.on_cpu[step, layer]
        text += f"; {done} of {misses} misses, those with the fewest tokens"
    elif expert >= 0 and uses.tokens:
        count = uses.tokens.get((step, layer, expert), 0)
        text += f"; {count} token{'s' if count > 1 else ''} needed it" if count else "; no token needed it"
    return text


_REASONS = {
    "experts_cpu": "absent, and sooner done where they lie",
    str(Reason.ON_DEMAND): "the router named it and it was absent",
    str(Reason.PREFETCH): "predicted for this layer before its router chose",
    str(Reason.STREAM): "its whole layer is copied, whatever is predicted",
}


def _layer_spans(events: pd.DataFrame, steps: set[int], first_us: float) -> tuple[Span, ...]:
    """From a layer's first dense work to the end of its experts."""
    layer = events["moe_layer"].to_numpy()
    step = events["step"].to_numpy()
    mine = np.isin(events["lane"].cat.codes.to_numpy(), _COMPUTE) & (layer >= 0) & np.isin(step, list(steps))
    start = events["start_us"].to_numpy()[mine]
    end = start + events["dur_us"].to_numpy()[mine]
    keys, which = np.unique(np.stack([step[mine], layer[mine]]), axis=1, return_inverse=True)
    first, last = np.full(keys.shape[1], np.inf), np.full(keys.shape[1], -np.inf)
    np.minimum.at(first, which, start)
    np.maximum.at(last, which, end)
    return tuple(
        Span(int(s), int(a), (b - first_us) / 1e3, (e - b) / 1e3)
        for s, a, b, e in zip(*keys.tolist(), first.tolist(), last.tolist(), strict=True)
    )


def lanes_traces(info: LanesInfo) -> list[dict[str, Any]]:
    """The figure's traces, always as many and in the same order: layers, then MEANINGS."""
    wide = [span.dur_ms > 0.014 * info.end_ms for span in info.layers]
    strip = {
        "type": "bar", "orientation": "h", "width": 0.5, "showlegend": False, "hoverinfo": "text",
        "base": [span.start_ms for span in info.layers],
        "x": [span.dur_ms for span in info.layers],
        "y": [_y("MoE layer")] * len(info.layers),
        "marker": {"color": [("rgba(128,128,128,.28)", GRID)[span.moe_layer % 2] for span in info.layers]},
        "text": [str(span.moe_layer) if show else "" for span, show in zip(info.layers, wide, strict=True)],
        "textposition": "inside", "insidetextanchor": "middle", "textangle": 0, "textfont": {"size": 11, "color": TEXT},
        "hovertext": [f"step {s.step}, MoE layer {s.moe_layer}: {1e3 * s.dur_ms:,.0f} us" for s in info.layers],
    }  # fmt: skip
    return [strip, *(_bar_trace(meaning, info.bars[meaning]) for meaning in MEANINGS)]


def _bar_trace(meaning: str, bars: Bars) -> dict[str, Any]:
    return {
        "type": "bar", "orientation": "h", "width": 0.72, "name": NAMES[meaning], "hoverinfo": "text",
        "base": list(bars.start_ms),
        "x": list(bars.dur_ms),
        "y": [_y(_ROW_OF[meaning])] * len(bars.start_ms),
        "marker": {"color": COLORS[meaning], "line": {"width": 0}},
        "hovertext": list(bars.texts),
        "showlegend": bool(bars.start_ms),
    }  # fmt: skip


def _y(row: str) -> int:
    return len(ROWS) - 1 - ROWS.index(row)


def lanes_layout(info: LanesInfo) -> dict[str, Any]:
    """What of the layout depends on the numbers."""
    fewer = f", {info.left_out} more would be too many bars" if info.left_out else ""
    many = "s" if len(info.steps) > 1 else ""
    subtitle = f"{len(info.steps)} decode step{many}{fewer} · {info.settings}<br>{info.told}"
    title = "Where does each expert come from?"
    return {
        "title": {"text": titled(title, subtitle)},
        "xaxis": {"range": [0, info.end_ms]},
        "shapes": [
            {
                "type": "line", "xref": "x", "yref": "paper", "x0": span.start_ms, "x1": span.start_ms, "y0": 0,
                "y1": 1, "line": {"color": TEXT, "width": 1, "dash": "dot"},
            }
            for span in info.steps
        ],
        "annotations": [
            {
                "x": span.start_ms, "y": 1, "xref": "x", "yref": "paper", "yanchor": "bottom", "xanchor": "left",
                "showarrow": False, "text": f"step {span.step}: {span.dur_ms:.3g} ms", "font": {"size": 12},
            }
            for span in info.steps
        ],
    }  # fmt: skip


def plot_lanes(info: LanesInfo) -> go.Figure:
    """Horizontal bars by lane; the legend turns meanings on and off."""
    fig = go.Figure(lanes_traces(info))
    style(fig, title="", subtitle="", height=202 + 50 * len(ROWS), top=112)
    fig.update_layout(lanes_layout(info))
    fig.update_layout(barmode="overlay", hovermode="closest", barcornerradius=0, uirevision=None)
    fig.update_xaxes(title_text="ms since the first step shown began")
    fig.update_yaxes(
        tickvals=[_y(row) for row in ROWS], ticktext=list(ROWS), range=[-0.6, len(ROWS) - 0.4], fixedrange=True,
        showgrid=False,
    )  # fmt: skip
    return fig

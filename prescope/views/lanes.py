"""The timeline: lanes of GPU, PCIe, CPU and waits for some steps, the MoE layers above them, each bar with its reason.

For results of the simulator and of the engine alike. The traces are always the same ones in the same order, so that a
live figure only swaps their numbers. A browser draws some 2000 bars well: where there are more, neighbours shorter than
a pixel become one bar that says how many it holds; what is longer stays as it is, so no long stall can be hidden.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from prescope.core.types import Lane, Reason
from prescope.core.units import count_of, digits, gb_per_s
from prescope.errors import BadTrace
from prescope.simulator import SimResult
from prescope.traces.events import COMPUTE_LANES, KINDS, LANES, REASONS
from prescope.traces.result import RunResult
from prescope.traces.routing import RoutingTrace

from .theme import COLORS, GRID, NAMES, TEXT, settings_of, source_of, style, titled, told_of

#: More bars than this draw too slowly; neighbours are merged then.
MAX_BARS = 2000
WIDTH_PX = 1100
#: Steps whose names have room above the lanes.
MOST_NAMED = 6
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


class Bars(NamedTuple):
    """Bars of one meaning; milliseconds since the first step shown began."""

    start_ms: tuple[float, ...]
    dur_ms: tuple[float, ...]  # first start to last end
    texts: tuple[str, ...]  # what it is, and why
    busy_ms: tuple[float, ...]  # sum of the events' durations
    num_events: tuple[int, ...]  # 1, or how many neighbours too short to be seen apart
    nbytes: tuple[int, ...]


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
    phase: str  # of the first step
    num_events: int
    source: str  # "simulated", "measured", ...
    settings: str
    told: str  # source and machine
    only: str = ""  # which layers, if not all

    @property
    def num_bars(self) -> int:
        return sum(len(bars.dur_ms) for bars in self.bars.values())

    @property
    def link_ms(self) -> float:
        """What the copies shown took together: no link is done with them sooner."""
        return sum(sum(self.bars[name].busy_ms) for name in MEANINGS if _ROW_OF[name] == "PCIe")


def lanes(
    result: RunResult | SimResult, steps: int | range | None = None, *, max_bars: int = MAX_BARS
) -> go.Figure:
    """Lanes of some steps.

    Args:
        steps: one step, or a range of them; None takes two decode steps, the first of median length (the prefill if
            there is nothing else).
        max_bars: neighbours are merged until no more bars than this are left.

    Raises:
        BadTrace: the result has no events, or no such step.
    """
    return plot_lanes(lanes_info(result, steps, max_bars=max_bars))


def lanes_info(
    result: RunResult | SimResult,
    steps: int | range | None = None,
    *,
    max_bars: int = MAX_BARS,
    layers: range | None = None,
) -> LanesInfo:
    """Bars and spans; arguments and errors as `lanes`.

    Args:
        layers: MoE layers whose bars are shown; None: all, and what belongs to none.
    """
    if result.events.empty:
        raise BadTrace("the run has no events; run it with events=True")
    shown = _steps_shown(result.steps, steps)
    first_us = float(shown["start_us"].iloc[0])
    end_us = float((shown["start_us"] + shown["dur_us"]).iloc[-1])
    events = _window(result.events, first_us, end_us)
    if layers is not None:
        events = events[events["moe_layer"].isin(layers)]
    spans = tuple(
        Span(int(step), -1, (start - first_us) / 1e3, dur / 1e3)
        for step, start, dur in zip(shown["step"], shown["start_us"], shown["dur_us"], strict=True)
    )
    uses = _Uses(_tokens(result.trace, spans), _on_cpu(result.layers, spans))
    return LanesInfo(
        _bars(events, first_us, end_us, max_bars, uses),
        _layer_spans(events, {span.step for span in spans}, first_us),
        spans,
        (end_us - first_us) / 1e3,
        str(shown["phase"].iloc[0]),
        len(events),
        source_of(result),
        settings_of(result),
        told_of(result),
        "" if layers is None else f"MoE layers {layers[0]} to {layers[-1]}",
    )


def _steps_shown(steps: pd.DataFrame, wanted: int | range | None) -> pd.DataFrame:
    chosen = _chosen(steps, wanted)
    shown = steps[steps["step"].isin(list(chosen))]
    if shown.empty:
        asked = f"step {chosen[0]}" if len(chosen) == 1 else f"step of {chosen}"
        raise BadTrace(f"there is no {asked}; there are {steps['step'].min()} to {steps['step'].max()}")
    return shown


def _chosen(steps: pd.DataFrame, wanted: int | range | None) -> range:
    if isinstance(wanted, range):
        return wanted
    if wanted is not None:
        return range(wanted, wanted + 1)
    decode = steps[steps["phase"] == "decode"]
    if decode.empty:
        return range(int(steps["step"].iloc[0]), int(steps["step"].iloc[0]) + 1)
    nearest = int((decode["dur_us"] - decode["dur_us"].median()).abs().to_numpy().argmin())
    first = int(decode["step"].iloc[min(nearest, max(0, len(decode) - 2))])
    return range(first, first + 2)


def _window(events: pd.DataFrame, begin_us: float, end_us: float) -> pd.DataFrame:
    """Events that any part of the time sees."""
    start, dur = events["start_us"].to_numpy(), events["dur_us"].to_numpy()
    return events.iloc[np.flatnonzero((start < end_us) & (start + dur > begin_us))]


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


def _bars(
    events: pd.DataFrame, first_us: float, end_us: float, max_bars: int, uses: "_Uses"
) -> dict[str, Bars]:
    meanings = _meanings(events)
    order = np.lexsort((events["start_us"].to_numpy(), meanings))
    columns = {
        name: events[name].to_numpy()[order]
        for name in ("step", "moe_layer", "expert", "bytes", "start_us", "dur_us")
    }
    meanings = meanings[order]
    group = _groups(meanings, columns["start_us"], columns["dur_us"], end_us - first_us, max_bars)
    first = np.flatnonzero(np.diff(group, prepend=-1))
    count = np.diff(np.append(first, len(group)))
    ends = np.maximum.reduceat(columns["start_us"] + columns["dur_us"], first) if len(first) else np.zeros(0)
    busy, nbytes = (
        np.add.reduceat(columns[name], first) if len(first) else np.zeros(0) for name in ("dur_us", "bytes")
    )
    bars = {}
    for i, meaning in enumerate(MEANINGS):
        rows = np.flatnonzero(meanings[first] == i)
        at = first[rows]
        step, layer, expert = (columns[name][at].tolist() for name in ("step", "moe_layer", "expert"))
        begin = columns["start_us"][at]
        many, spent, moved = count[rows].tolist(), busy[rows].tolist(), nbytes[rows].tolist()
        texts = tuple(
            _text(meaning, at_step, at_layer, one, size, us, number, uses)
            for at_step, at_layer, one, size, us, number in zip(
                step, layer, expert, moved, spent, many, strict=True
            )
        )
        bars[meaning] = Bars(
            tuple(((begin - first_us) / 1e3).tolist()),
            tuple(((ends[rows] - begin) / 1e3).tolist()),
            texts,
            tuple(us / 1e3 for us in spent),
            tuple(many),
            tuple(map(int, moved)),
        )
    return bars


def _groups(
    meanings: np.ndarray, start: np.ndarray, dur: np.ndarray, whole_us: float, max_bars: int
) -> np.ndarray:
    """Number of the bar that each event goes to, by meaning and start: its own unless there would be too many."""
    if len(start) <= max_bars:
        return np.arange(len(start))
    pixel_us = whole_us / WIDTH_PX
    while True:
        is_long = dur >= pixel_us
        gap = start[1:] - (start + dur)[:-1] >= pixel_us
        new = gap | is_long[1:] | is_long[:-1] | (meanings[1:] != meanings[:-1])
        group = np.concatenate(([0], np.cumsum(new)))
        if group[-1] < max_bars or pixel_us >= whole_us:
            return group
        pixel_us *= 2


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
    many: int,
    uses: _Uses,
) -> str:
    where = f"step {step}, MoE layer {layer}" if layer >= 0 else f"step {step}, after the last MoE layer"
    who = f", expert {expert}" if expert >= 0 else ""
    if many > 1:
        where, who, expert = f"from {where}: {many} events, each shorter than a pixel", "", -1
    text = f"<b>{NAMES[meaning]}</b><br>{where}{who}<br>{us:,.1f} us"
    if nbytes and us:
        text += f", {digits(nbytes / 1e6)} MB, {gb_per_s(nbytes, us):.3g} GB/s"
    if many > 1:
        return text
    if meaning in _REASONS:
        text += f"<br>{_REASONS[meaning]}"
    if meaning == "experts_cpu" and (step, layer) in uses.on_cpu:
        done, misses = uses.on_cpu[step, layer]
        text += f"; {done} of {misses} misses, those with the fewest tokens"
    elif expert >= 0 and uses.tokens:
        count = uses.tokens.get((step, layer, expert), 0)
        text += f"; {count_of(count, 'token')} needed it" if count else "; no token needed it"
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
    mine = events["lane"].isin(COMPUTE_LANES).to_numpy() & (layer >= 0) & np.isin(step, list(steps))
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
        "textposition": "inside", "insidetextanchor": "middle", "textangle": 0, "textfont": {"size": 11},
        "hovertext": [f"step {s.step}, MoE layer {s.moe_layer}: {1e3 * s.dur_ms:,.0f} us" for s in info.layers],
    }  # fmt: skip
    return [strip, *(_bar_trace(meaning, info.bars[meaning]) for meaning in MEANINGS)]


def _bar_trace(meaning: str, bars: Bars) -> dict[str, Any]:
    return {
        "type": "bar", "orientation": "h", "width": 0.64, "name": NAMES[meaning], "hoverinfo": "text",
        "base": list(bars.start_ms),
        "x": list(bars.dur_ms),
        "y": [_y(_ROW_OF[meaning])] * len(bars.start_ms),
        "marker": {"color": COLORS[meaning], "line": OUTLINES.get(meaning, {"width": 0})},
        "hovertext": list(bars.texts),
        "showlegend": bool(bars.start_ms),
        "visible": bool(bars.start_ms),  # what is empty costs a redraw as much as what is not
    }  # fmt: skip


#: So that the darkest are seen on a dark page too.
OUTLINES = {name: {"width": 0.8, "color": "rgba(150,150,180,.9)"} for name in ("cpu_wait", "warm_up")}


def _y(row: str) -> int:
    return len(ROWS) - 1 - ROWS.index(row)


def lanes_layout(info: LanesInfo, end_ms: float | None = None, *, brief: bool = False) -> dict[str, Any]:
    """What of the layout depends on the numbers.

    Args:
        end_ms: of the time axis; by default where the steps end.
        brief: beside controls that say the settings already.
    """
    merged = info.num_events - info.num_bars
    note = f", {merged:,} shorter than a pixel merged into neighbours" if merged else ""
    what = f"{count_of(len(info.steps), f'{info.phase} step')}{', ' * bool(info.only)}{info.only}{note}"
    subtitle = f"<b>{info.source}</b> · {what}" if brief else f"{what} · {info.settings}<br>{info.told}"
    shapes = [upright(span.start_ms, 0, 1, "paper", TEXT, "dot") for span in info.steps]
    annotations = [
        {
            "x": span.start_ms, "y": 1, "xref": "x", "yref": "paper", "yanchor": "bottom", "xanchor": "left",
            "showarrow": False, "text": f"{_name_of(span, info)}: {span.dur_ms:.3g} ms", "font": {"size": 12},
        }
        for span in info.steps[:: -(-len(info.steps) // MOST_NAMED)]  # more would lie on top of one another
    ]  # fmt: skip
    if info.link_ms and not info.only:  # of all copies, or it is no bound
        row = _y("PCIe")
        shapes.append(upright(info.link_ms, row - 0.46, row + 0.46, "y", COLORS["bound"], "solid", 3))
        annotations.append(
            {
                "x": info.link_ms, "y": row + 0.5, "xref": "x", "yref": "y", "yanchor": "middle",
                "xanchor": "right" if info.link_ms > 0.7 * info.end_ms else "left", "showarrow": False,
                "text": f"bound of the link: {info.link_ms:.3g} ms of copies", "font": {"size": 11.5},
            }
        )  # fmt: skip
    return {
        "title": {"text": titled("Where does each token's time go?", subtitle)},
        "xaxis": {"range": [0, info.end_ms if end_ms is None else end_ms]},
        "shapes": shapes,
        "annotations": annotations,
        **({"margin": {"t": 92}, "height": 182 + 50 * len(ROWS)} if brief else {}),
    }


def _name_of(span: Span, info: LanesInfo) -> str:
    return "prefill" if info.phase == "prefill" and span is info.steps[0] else f"step {span.step}"


def upright(
    x: float, low: float, high: float, yref: str, color: str, dash: str, width: float = 1
) -> dict[str, Any]:
    """A line at one time, from one height of `yref` to another."""
    line = {"color": color, "width": width, "dash": dash}
    return {"type": "line", "xref": "x", "yref": yref, "x0": x, "x1": x, "y0": low, "y1": high, "line": line}


def plot_lanes(info: LanesInfo) -> go.Figure:
    """Horizontal bars by lane; the legend turns meanings on and off."""
    fig = go.Figure(lanes_traces(info))
    style(fig, title="", subtitle="", height=222 + 50 * len(ROWS), top=132)
    fig.update_layout(lanes_layout(info))
    fig.update_layout(barmode="overlay", hovermode="closest", barcornerradius=0, uirevision=None)
    fig.update_xaxes(title_text="ms since the first step shown began")
    fig.update_yaxes(
        tickvals=[_y(row) for row in ROWS], ticktext=list(ROWS), range=[-0.6, len(ROWS) - 0.4], fixedrange=True,
        showgrid=False,
    )  # fmt: skip
    return fig

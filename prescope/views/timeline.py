"""The timeline: lanes of GPU, PCIe, CPU and waits for a range of steps, with the MoE layers above them.

A browser draws about 3000 bars well. Longer ranges merge neighbours shorter than a pixel into one bar that
says how many it holds; whatever is longer than a pixel stays as it is, so no long stall can be hidden.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from prescope.core.units import format_bytes, gb_per_s
from prescope.errors import BadTrace
from prescope.traces.result import RunResult

from .theme import COLORS, GRID, NAMES, TEXT, origin, style

MAX_BARS = 3000
WIDTH_PX = 1100
#: Lanes from top to bottom.
ROWS = ["MoE layer", "GPU", "PCIe", "CPU", "waits"]
_ROW_OF_LANE = {"gpu": "GPU", "h2d": "PCIe", "cpu": "CPU", "stall": "waits", "host": "waits"}
_ORDER = [
    "dense", "experts", "experts_cpu", "on_demand", "prefetch", "stream", "stall", "cpu_wait", "host_wait",
    "warm_up",
]  # fmt: skip


class Bar(NamedTuple):
    """One bar: an event, or neighbours of one kind too short to be seen apart."""

    row: str
    kind: str  # key of theme.COLORS
    start_us: float
    dur_us: float  # first start to last end
    busy_us: float  # sum of the events' durations
    num_events: int
    step: int  # of the first event, and so are layer and expert
    moe_layer: int
    expert: int
    nbytes: int


class Span(NamedTuple):
    """A step (moe_layer -1) or one MoE layer of a step."""

    step: int
    moe_layer: int
    start_us: float
    dur_us: float


class TimelineInfo(NamedTuple):
    """What the figure draws; times in microseconds since the run's start."""

    bars: tuple[Bar, ...]
    layers: tuple[Span, ...]
    steps: tuple[Span, ...]
    phase: str  # of the first step
    start_us: float
    end_us: float
    num_events: int
    origin: str


def timeline(run: RunResult, steps: int | range | None = None, *, max_bars: int = MAX_BARS) -> go.Figure:
    """Lanes of some steps of a run.

    Args:
        steps: one step, or a range of them; None takes two decode steps, the first of median length (the
            prefill if there is nothing else).
        max_bars: neighbours are merged until no more bars than this are left.

    Raises:
        BadTrace: the run has no events, or no such step.
    """
    return plot_timeline(timeline_info(run, steps, max_bars=max_bars))


def timeline_info(
    run: RunResult, steps: int | range | None = None, *, max_bars: int = MAX_BARS
) -> TimelineInfo:
    """Bars and spans of some steps; arguments and errors as `timeline`."""
    if run.events.empty:
        raise BadTrace("the run has no events; run it with events=True")
    chosen = _choose_steps(run.steps, steps)
    table = run.steps[run.steps["step"].isin(list(chosen))]
    if table.empty:
        raise BadTrace(f"the run has no step of {steps}; its steps are 0 to {int(run.steps['step'].max())}")
    columns = (table[name].tolist() for name in ("step", "start_us", "dur_us"))
    spans = [Span(step, -1, start, dur) for step, start, dur in zip(*columns, strict=True)]
    start_us, end_us = spans[0].start_us, spans[-1].start_us + spans[-1].dur_us
    events = run.events
    ends = events["start_us"] + events["dur_us"]
    events = events[(events["start_us"] < end_us) & (ends > start_us)]
    return TimelineInfo(
        bars=tuple(_bars(events, start_us, end_us, max_bars)),
        layers=tuple(_layer_spans(events, chosen)),
        steps=tuple(spans),
        phase=str(table["phase"].iloc[0]),
        start_us=start_us,
        end_us=end_us,
        num_events=len(events),
        origin=origin(run),
    )


def _choose_steps(steps: pd.DataFrame, wanted: int | range | None) -> range:
    if isinstance(wanted, range):
        return wanted
    if wanted is not None:
        return range(wanted, wanted + 1)
    decode = steps[steps["phase"] == "decode"]
    if decode.empty:
        return range(1)
    nearest = int((decode["dur_us"] - decode["dur_us"].median()).abs().to_numpy().argmin())
    first = int(decode["step"].iloc[min(nearest, max(0, len(decode) - 2))])
    return range(first, first + 2)


def _layer_spans(events: pd.DataFrame, steps: range) -> list[Span]:
    """From a layer's first dense work to the end of its experts."""
    mine = events["lane"].isin(["gpu", "stall", "host"]) & (events["moe_layer"] >= 0)
    rows = events[mine & events["step"].isin(list(steps))]
    rows = rows.assign(end_us=rows["start_us"] + rows["dur_us"])
    spans = rows.groupby(["step", "moe_layer"]).agg(start=("start_us", "min"), end=("end_us", "max"))
    return [
        Span(int(step), int(layer), float(start), float(end - start))
        for (step, layer), start, end in zip(spans.index, spans["start"], spans["end"], strict=True)
    ]


def _bars(events: pd.DataFrame, start_us: float, end_us: float, max_bars: int) -> list[Bar]:
    kinds = events["kind"].astype(str).to_numpy()
    lanes = events["lane"].astype(str)
    kinds = np.where(kinds == "transfer", events["reason"].astype(str), kinds)
    kinds = np.where((lanes == "cpu") & (kinds == "experts"), "experts_cpu", kinds)
    table = events.assign(
        row=lanes.map(_ROW_OF_LANE), color=kinds, end_us=events["start_us"] + events["dur_us"]
    )
    table = table.sort_values(["row", "color", "start_us"], kind="stable", ignore_index=True)
    pixel_us = (end_us - start_us) / WIDTH_PX
    groups = _groups(table, pixel_us)
    while groups[-1] >= max_bars and pixel_us < end_us - start_us:
        pixel_us *= 2
        groups = _groups(table, pixel_us)
    merged = table.groupby(groups).agg(
        row=("row", "first"),
        kind=("color", "first"),
        start_us=("start_us", "first"),
        end_us=("end_us", "max"),
        busy_us=("dur_us", "sum"),
        num_events=("dur_us", "size"),
        step=("step", "first"),
        moe_layer=("moe_layer", "first"),
        expert=("expert", "first"),
        nbytes=("bytes", "sum"),
    )
    merged.insert(3, "dur_us", merged.pop("end_us") - merged["start_us"])
    return [Bar(*row) for row in merged.astype(object).itertuples(index=False, name=None)]


def _groups(table: pd.DataFrame, pixel_us: float) -> np.ndarray:
    """Bar each event goes to: a new one after a gap, a change of kind, or beside a visible event."""
    starts, ends = table["start_us"].to_numpy(), table["end_us"].to_numpy()
    visible = table["dur_us"].to_numpy() >= pixel_us
    kind = (table["row"] + table["color"]).to_numpy()
    new = (starts[1:] - ends[:-1] >= pixel_us) | visible[1:] | visible[:-1] | (kind[1:] != kind[:-1])
    return np.concatenate(([0], np.cumsum(new)))


def plot_timeline(info: TimelineInfo) -> go.Figure:
    """Horizontal bars by lane; the legend turns kinds on and off."""
    rows = [row for row in ROWS if row != "CPU" or any(bar.row == "CPU" for bar in info.bars)]
    y_of = {row: len(rows) - 1 - i for i, row in enumerate(rows)}
    fig = go.Figure()
    _add_layers(fig, info, y_of["MoE layer"])
    for kind in _ORDER:
        bars = [bar for bar in info.bars if bar.kind == kind]
        if bars:
            fig.add_bar(
                orientation="h",
                base=[(bar.start_us - info.start_us) / 1e3 for bar in bars],
                x=[bar.dur_us / 1e3 for bar in bars],
                y=[y_of[bar.row] for bar in bars],
                width=0.72,
                name=NAMES[kind],
                marker={"color": COLORS[kind], "line": {"width": 0}},
                hovertext=[_hover(bar) for bar in bars],
                hoverinfo="text",
            )
    for span in info.steps:
        at = (span.start_us - info.start_us) / 1e3
        fig.add_vline(x=at, line={"color": TEXT, "width": 1, "dash": "dot"})
        name = "prefill" if span.step == 0 else f"step {span.step}"
        fig.add_annotation(
            x=at, y=1, yref="paper", yanchor="bottom", xanchor="left", showarrow=False,
            text=f"{name}: {span.dur_us / 1e3:.3g} ms", font={"size": 12},
        )  # fmt: skip
    _style(fig, info, y_of)
    return fig


def _style(fig: go.Figure, info: TimelineInfo, y_of: dict[str, int]) -> None:
    merged = info.num_events - len(info.bars)
    note = f", {merged:,} shorter than a pixel merged into neighbours" if merged else ""
    style(
        fig,
        title="Where does each token's time go?",
        subtitle=f"{len(info.steps)} {info.phase} step{'s' if len(info.steps) > 1 else ''}, "
        f"{info.num_events:,} events{note}<br>{info.origin}",
        height=202 + 50 * len(y_of),
        top=112,
    )
    fig.update_layout(barmode="overlay", hovermode="closest", barcornerradius=0)
    fig.update_xaxes(
        title_text="ms since the start of the first step shown",
        range=[0, (info.end_us - info.start_us) / 1e3],
    )
    fig.update_yaxes(
        tickvals=list(y_of.values()), ticktext=list(y_of), range=[-0.6, len(y_of) - 0.4], fixedrange=True,
        showgrid=False,
    )  # fmt: skip


def _add_layers(fig: go.Figure, info: TimelineInfo, y: int) -> None:
    """The strip of MoE layers, in two greys so that neighbours are told apart."""
    wide = [span.dur_us > 0.014 * (info.end_us - info.start_us) for span in info.layers]
    fig.add_bar(
        orientation="h",
        base=[(span.start_us - info.start_us) / 1e3 for span in info.layers],
        x=[span.dur_us / 1e3 for span in info.layers],
        y=[y] * len(info.layers),
        width=0.5,
        marker={"color": [("rgba(128,128,128,.28)", GRID)[span.moe_layer % 2] for span in info.layers]},
        text=[str(span.moe_layer) if show else "" for span, show in zip(info.layers, wide, strict=True)],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        textfont={"size": 11, "color": TEXT},
        hovertext=[f"step {s.step}, MoE layer {s.moe_layer}: {s.dur_us:,.0f} µs" for s in info.layers],
        hoverinfo="text",
        showlegend=False,
    )


def _hover(bar: Bar) -> str:
    where = f"step {bar.step}" + (
        f", MoE layer {bar.moe_layer}" if bar.moe_layer >= 0 else ", after the last MoE layer"
    )
    if bar.num_events > 1:
        where = f"from {where}: {bar.num_events} events"
    expert = f", expert {bar.expert}" if bar.expert >= 0 and bar.num_events == 1 else ""
    text = f"<b>{NAMES[bar.kind]}</b><br>{where}{expert}<br>{bar.busy_us:,.1f} µs"
    if bar.nbytes:
        text += f", {format_bytes(bar.nbytes)}, {gb_per_s(bar.nbytes, bar.busy_us):.3g} GB/s"
    return text

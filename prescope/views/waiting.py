"""How many requests can be served? Waiting in line and the time to the first token against the requests per second."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from prescope.errors import BadTrace
from prescope.simulator import Pace, Served, serve
from prescope.simulator.waiting import MOST
from prescope.traces.arrivals import Arrivals

from .cases import MARKS, marks_of
from .numbers import formatted
from .theme import COLORS, style

#: Requests that are drawn for each load.
COUNT = 1000
#: Loads shown, as shares of what the fastest could serve if every batch were full.
SHARES = (0.02, 0.05, *(share / 20 for share in range(2, 22)))


class WaitingInfo(NamedTuple):
    """Seconds by schedule and load; a schedule's curve ends where it no longer keeps pace."""

    loads: tuple[float, ...]  # requests/s
    schedules: tuple[str, ...]
    wait_s: tuple[tuple[float, ...], ...]  # mean time in line, by schedule, then load
    ttft_p50_s: tuple[tuple[float, ...], ...]
    ttft_p95_s: tuple[tuple[float, ...], ...]
    batch: tuple[tuple[float, ...], ...]  # mean sequences of a request's batch
    most_per_s: tuple[float, ...]  # the highest load that each keeps pace with; NaN: with none of them
    arrivals: str
    most: int
    told: str


def waiting(
    paces: Mapping[str, Pace],
    arrivals: Arrivals,
    *,
    told: str,
    most: int = MOST,
    loads: Sequence[float] | None = None,
) -> go.Figure:
    """One curve a schedule.

    Args:
        paces: by schedule, five at most. told: whose they are.
        most: sequences of one batch. loads: requests per second; by default up to what can be served.

    Raises:
        BadTrace: no schedule, or more than there are marks.
    """
    return plot_waiting(waiting_info(paces, arrivals, told=told, most=most, loads=loads))


def waiting_info(
    paces: Mapping[str, Pace],
    arrivals: Arrivals,
    *,
    told: str,
    most: int = MOST,
    loads: Sequence[float] | None = None,
) -> WaitingInfo:
    """As numbers; arguments and errors as `waiting`."""
    if not 0 < len(paces) <= len(MARKS):
        raise BadTrace(f"waiting shows {len(MARKS)} schedules at most, one at least; these are {len(paces)}")
    if loads is None:
        crowd = arrivals.draw(COUNT)
        at_once = crowd._replace(arrive_s=np.zeros(COUNT))
        fastest = max(COUNT / serve(at_once, pace, most).free_s for pace in paces.values())
        loads = [share * fastest for share in SHARES]
    rows = {
        name: [serve(arrivals.draw(COUNT, rate_per_s=load), pace, most) for load in loads]
        for name, pace in paces.items()
    }
    kept = {name: _while_keeping_pace(row) for name, row in rows.items()}

    def each(number: object) -> tuple[tuple[float, ...], ...]:
        assert callable(number)
        return tuple(tuple(float(number(one)) for one in row) for row in kept.values())

    return WaitingInfo(
        tuple(loads), tuple(paces),
        each(lambda one: one.wait_s.mean()),
        each(lambda one: np.percentile(one.ttft_s, 50)),
        each(lambda one: np.percentile(one.ttft_s, 95)),
        each(lambda one: one.batch.mean()),
        tuple(loads[len(row) - 1] if row else float("nan") for row in kept.values()),
        f"{arrivals.name}, in bursts of a coefficient of variation of {arrivals.cv:.2g}: {arrivals.source}", most, told,
    )  # fmt: skip


def _while_keeping_pace(row: Sequence[Served]) -> list[Served]:
    """Up to the first load that is too much."""
    ends = [one.keeps_pace for one in row]
    return list(row[: ends.index(False)] if False in ends else row)


def plot_waiting(info: WaitingInfo) -> go.Figure:
    """First token above, time in line below, over one logarithmic axis of loads."""
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.6, 0.4])
    marks = marks_of(info.schedules)
    for i, name in enumerate(info.schedules):
        color, symbol = COLORS[marks[i][0]], marks[i][1]
        x = list(info.loads[: len(info.wait_s[i])])
        most = info.most_per_s[i]
        ends = f"up to {formatted(most)}/s" if x else "at none of these loads"
        hover = [
            f"{name}, {formatted(load)} requests/s: first token after {formatted(p50)} s (half of them), "
            f"{formatted(p95)} s (95 of 100)<br>in line {formatted(wait)} s, {formatted(batch)} sequences a batch"
            for load, p50, p95, wait, batch in zip(
                x, info.ttft_p50_s[i], info.ttft_p95_s[i], info.wait_s[i], info.batch[i], strict=True
            )
        ]
        looks = {"x": x, "hovertext": hover, "hoverinfo": "text", "legendgroup": name}
        marker = {"symbol": symbol, "size": 7, "color": color}
        fig.add_scatter(
            **looks, y=info.ttft_p50_s[i], name=f"{name}: {ends}", mode="lines+markers", marker=marker,
            line={"color": color, "width": 2.2}, row=1, col=1,
        )  # fmt: skip
        fig.add_scatter(
            **looks, y=info.ttft_p95_s[i], name=name, mode="lines", line={"color": color, "width": 1.6, "dash": "dot"},
            showlegend=False, row=1, col=1,
        )  # fmt: skip
        fig.add_scatter(
            **looks, y=info.wait_s[i], name=name, mode="lines+markers", marker=marker, showlegend=False,
            line={"color": color, "width": 2.2}, row=2, col=1,
        )  # fmt: skip
    style(
        fig,
        title="How many requests can be served?",
        subtitle=f"<b>simulated</b>: {info.told}<br>batches of up to {info.most}, each until its longest text is done; "
        f"solid: half of the requests, dotted: 95 of 100<br>arrivals and lengths drawn as of {info.arrivals}",
        height=540,
        top=124,
        bottom=92,
    )
    ticks = [m * 10.0**p for p in range(-4, 4) for m in (1, 2, 5)]
    shown = [one for one in ticks if info.loads[0] / 1.2 < one < info.loads[-1] * 1.2]
    fig.update_layout(hovermode="closest")
    fig.update_xaxes(type="log", tickvals=shown, ticktext=[f"{one:g}" for one in shown])
    fig.update_xaxes(title_text="requests per second", row=2, col=1)
    fig.update_yaxes(title_text="first token after, s", type="log", dtick=1, row=1, col=1)
    fig.update_yaxes(title_text="mean time in line, s", type="log", dtick=1, row=2, col=1)
    return fig

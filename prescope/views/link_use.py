"""PCIe use over time, a line for each result."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from prescope.core.units import digits
from prescope.simulator import SimResult
from prescope.traces.metrics import union
from prescope.traces.result import RunResult

from .theme import require_decode_events, style, title_of, told_of_several

#: Points of a line at most; with fewer steps, one a step.
BINS = 64
#: Of Okabe and Ito, and a dash each: told apart in print too.
LINES = (("#0072b2", "solid"), ("#d55e00", "dash"), ("#009e73", "dot"), ("#cc79a7", "dashdot"))


class Use(NamedTuple):
    """The link of one result, by decode steps, or by bins of as many as a line can show."""

    name: str
    at_ms: tuple[float, ...]  # middle of each bin, since the first decode step began
    busy_pct: tuple[float, ...]  # of the bin, the time that a copy was on the link
    mean_pct: float
    gb_per_s: float  # bytes copied over all of the time
    num_bytes: int


class LinkUseInfo(NamedTuple):
    """Several results."""

    uses: tuple[Use, ...]
    told: str


def link_use(results: Mapping[str, RunResult | SimResult], bins: int = BINS) -> go.Figure:
    """How busy the link is over time, a line for each result.

    Raises:
        BadTrace: no results, or one without decode events.
    """
    return plot_link_use(link_use_info(results, bins))


def link_use_info(results: Mapping[str, RunResult | SimResult], bins: int = BINS) -> LinkUseInfo:
    """As numbers."""
    require_decode_events("link_use", results)
    uses = tuple(_use(name, result, bins) for name, result in results.items())
    return LinkUseInfo(uses, told_of_several(results))


def _use(name: str, result: RunResult | SimResult, bins: int) -> Use:
    decode = result.steps[result.steps["phase"] == "decode"]
    ends = (decode["start_us"] + decode["dur_us"]).to_numpy()
    begin, end = float(decode["start_us"].iloc[0]), float(ends[-1])
    copies = result.events[result.events["lane"] == "h2d"]
    start = np.clip(copies["start_us"].to_numpy(), begin, end)
    stop = np.clip((copies["start_us"] + copies["dur_us"]).to_numpy(), begin, end)
    edges = np.array([begin, *ends]) if len(ends) <= bins else np.linspace(begin, end, bins + 1)
    used = np.diff(union(start, stop).before_us(edges))
    inside = stop > start
    num_bytes = int(copies["bytes"].to_numpy()[inside].sum())
    return Use(
        title_of(name),
        tuple(((edges[:-1] + edges[1:]) / 2 - begin) / 1e3),
        tuple(100 * used / np.diff(edges)),
        100 * float(used.sum()) / (end - begin),
        num_bytes / (end - begin) / 1e3,
        num_bytes,
    )


def plot_link_use(info: LinkUseInfo) -> go.Figure:
    """One stepped line for each result; it ends with the result's last token."""
    fig = go.Figure()
    for i, use in enumerate(info.uses):
        color, dash = LINES[i % len(LINES)]
        fig.add_scatter(
            x=use.at_ms, y=use.busy_pct, mode="lines", line={"color": color, "dash": dash, "width": 2, "shape": "hvh"},
            name=f"{use.name}: {use.mean_pct:.0f} % of its time, {digits(use.num_bytes / 1e6)} MB",
            hovertemplate=f"{use.name}: %{{y:.0f}} %<extra></extra>",
        )  # fmt: skip
    style(
        fig,
        title="How busy is PCIe?",
        subtitle=f"the same tokens by each schedule; a line ends with the last token<br>{info.told}",
        height=360,
    )
    fig.update_layout(hovermode="x unified")
    fig.update_xaxes(title_text="ms since the first decode step began", rangemode="tozero")
    fig.update_yaxes(title_text="link in use, % of the time", range=[0, 105])
    return fig

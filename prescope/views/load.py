"""How evenly the router uses the experts: tokens by MoE layer and expert as a heat map."""

from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from prescope.core.types import Phase
from prescope.core.units import count_of
from prescope.errors import BadTrace
from prescope.traces.result import RunResult
from prescope.traces.routing import RoutingTrace

from .theme import AMOUNT_SCALE, style

_COLORBAR = {
    "title": {"text": "% of uses", "side": "right", "font": {"size": 12.5}},
    "thickness": 12,
    "outlinewidth": 0,
}


class LoadInfo(NamedTuple):
    """Tokens each expert of each MoE layer was used by, and the share of the layer's uses."""

    counts: tuple[tuple[int, ...], ...]  # L rows of E
    share_pct: tuple[tuple[float, ...], ...]
    num_unused: int  # experts no token used
    top_quarter_pct: (
        float  # share of uses that go to the busiest quarter of each layer's experts, mean over layers
    )
    num_tokens: int
    model: str


def load(source: RunResult | RoutingTrace, phase: Phase | None = None) -> go.Figure:
    """Heat map of expert load, from a run or a trace; `phase=None` takes all tokens.

    Raises:
        BadTrace: the run kept no routing, or the trace has no token of the phase.
    """
    return plot_load(load_info(source, phase))


def load_info(source: RunResult | RoutingTrace, phase: Phase | None = None) -> LoadInfo:
    """Counts and shares by layer and expert.

    Raises:
        BadTrace: the run kept no routing, or the trace has no token of the phase.
    """
    trace = source.trace if isinstance(source, RunResult) else source
    if trace is None:
        raise BadTrace("the run kept no routing; run it with record_routing=True")
    trace = trace if phase is None else trace.select(phase=phase)
    if len(trace) == 0:
        raise BadTrace(f"the trace has no {phase or ''} tokens")
    counts_LE = trace.expert_counts()
    share_LE = 100 * counts_LE / np.maximum(counts_LE.sum(axis=1, keepdims=True), 1)
    busiest = np.sort(share_LE, axis=1)[:, ::-1][:, : max(1, counts_LE.shape[1] // 4)]
    return LoadInfo(
        counts=tuple(map(tuple, counts_LE.tolist())),
        share_pct=tuple(map(tuple, share_LE.tolist())),
        num_unused=int((counts_LE == 0).sum()),
        top_quarter_pct=float(busiest.sum(axis=1).mean()),
        num_tokens=len(trace),
        model=trace.model,
    )


def plot_load(info: LoadInfo) -> go.Figure:
    """Layers from top to bottom, experts from left to right, colour = share of the layer's uses."""
    num_layers, num_experts = len(info.counts), len(info.counts[0])
    fig = go.Figure(
        go.Heatmap(
            z=info.share_pct,
            customdata=info.counts,
            colorscale=AMOUNT_SCALE,
            zmin=0,
            xgap=1 if num_experts <= 64 else 0,
            ygap=1 if num_layers <= 64 else 0,
            colorbar=_COLORBAR,
            hovertemplate="layer %{y}, expert %{x}<br>%{z:.1f} % of the layer's uses, %{customdata:,} tokens"
            "<extra></extra>",
        )
    )
    quarter = max(1, num_experts // 4)
    style(
        fig,
        title="Which experts do the tokens use?",
        subtitle=f"the busiest {quarter} of {num_experts} experts of a layer get "
        f"{info.top_quarter_pct:.0f} % of its uses (even load: {100 * quarter / num_experts:.0f} %), "
        f"{count_of(info.num_unused, 'expert')} unused<br>"
        f"{count_of(info.num_tokens, 'token')} through {info.model}",
        height=min(900, 150 + 26 * num_layers),
        bottom=52,
    )
    fig.update_xaxes(title_text="expert", showgrid=False, dtick=1 if num_experts <= 32 else None)
    fig.update_yaxes(
        title_text="MoE layer", showgrid=False, autorange="reversed", dtick=1 if num_layers <= 32 else None
    )
    return fig

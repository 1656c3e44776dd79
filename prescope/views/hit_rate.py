"""Hits, late ones and misses by MoE layer, with the hit rate of each."""

from typing import NamedTuple

import plotly.graph_objects as go

from prescope.core.types import Phase
from prescope.errors import BadTrace
from prescope.traces.result import RunResult

from .theme import COLORS, NAMES, add_line, origin, style


class HitRateInfo(NamedTuple):
    """Counts of each MoE layer, summed over steps; the denominator is distinct experts per layer and step."""

    phase: Phase | None
    num_steps: int
    hits: tuple[int, ...]
    late: tuple[int, ...]
    misses: tuple[int, ...]
    origin: str

    @property
    def needed(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(self.hits, self.late, self.misses, strict=True)))

    @property
    def rates(self) -> tuple[float, ...]:
        """Hits / needed of each layer; 0.0 where nothing was needed."""
        return tuple(hit / need if need else 0.0 for hit, need in zip(self.hits, self.needed, strict=True))


def hit_rate(run: RunResult, phase: Phase | None = "decode") -> go.Figure:
    """Hits, late ones and misses by MoE layer; `phase=None` takes prefill and decode together.

    Raises:
        BadTrace: the run has no step of this phase.
    """
    return plot_hit_rate(hit_rate_info(run, phase))


def hit_rate_info(run: RunResult, phase: Phase | None = "decode") -> HitRateInfo:
    """Counts by layer.

    Raises:
        BadTrace: the run has no step of this phase.
    """
    table = run.layers if phase is None else run.layers[run.layers["phase"] == phase]
    if table.empty:
        raise BadTrace(
            f"the run has no {phase or ''} steps; ask for more than one new token, or for another phase"
        )
    columns = ["hits", "late", "misses"]
    sums = table.astype(dict.fromkeys(columns, "int64")).groupby("moe_layer")[columns].sum()
    sums = sums.reindex(range(int(run.layers["moe_layer"].max()) + 1), fill_value=0)
    hits, late, misses = (tuple(sums[name].tolist()) for name in columns)
    return HitRateInfo(phase, int(table["step"].nunique()), hits, late, misses, origin(run))


def plot_hit_rate(info: HitRateInfo) -> go.Figure:
    """Stacked mean counts per step, hit rate as a line on the right axis."""
    fig = go.Figure()
    layers = list(range(len(info.hits)))
    for name, counts in (("hit", info.hits), ("late", info.late), ("miss", info.misses)):
        if any(counts) or name != "late":
            fig.add_bar(
                x=layers,
                y=[count / info.num_steps for count in counts],
                customdata=list(zip(counts, info.needed, strict=True)),
                name=NAMES[name],
                marker={"color": COLORS[name], "line": {"width": 0}, "opacity": 0.85},
                hovertemplate="%{y:.2f} per step (%{customdata[0]:,} of %{customdata[1]:,})",
            )
    add_line(
        fig,
        COLORS["line"],
        x=layers,
        y=[100 * rate for rate in info.rates],
        yaxis="y2",
        name="hit rate (right axis)",
        hovertemplate="%{y:.1f} %",
    )
    needed = sum(info.needed)
    parts = {"hits": sum(info.hits), "late": sum(info.late), "misses": sum(info.misses)}
    shares = ", ".join(f"{name} {100 * count / max(needed, 1):.1f} %" for name, count in parts.items())
    phase = f"{info.phase}: " if info.phase else "prefill and decode: "
    style(
        fig,
        title="Are the experts there when a layer needs them?",
        subtitle=f"{phase}{shares} of {needed:,} needed (distinct per layer and step)<br>{info.origin}",
        height=390,
    )
    fig.update_layout(barmode="stack", bargap=0.25, hovermode="x unified", margin_r=66)
    fig.update_layout(yaxis2={"overlaying": "y", "side": "right", "range": [0, 105], "tickmode": "auto"})
    fig.update_layout(yaxis2={"showgrid": False, "zeroline": False, "ticks": ""})
    fig.update_layout(yaxis2_title={"text": "hit rate, %", "font": {"size": 12.5}})
    fig.update_xaxes(title_text="MoE layer", showgrid=False, dtick=1 if len(layers) <= 32 else None)
    fig.update_yaxes(title_text="distinct experts per step", rangemode="tozero", selector=0)
    return fig

"""Hit, late, miss or on the CPU by MoE layer: simulated, and beside it as measured where a run is given."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from prescope.simulator import SimResult
from prescope.traces.result import RunResult

from .theme import COLORS, NAMES, decode_steps, settings_of, source_of, style, titled, told_of

OUTCOMES = ("hit", "late", "miss", "on_cpu")
#: Names of the two that a bar is drawn of where "miss" is split.
_WORDS = {**NAMES, "miss": "miss, copied"}


class OutcomeCounts(NamedTuple):
    """Distinct experts per decode step of each MoE layer; a miss here is one that was copied."""

    hit: tuple[float, ...]
    late: tuple[float, ...]
    miss: tuple[float, ...]
    on_cpu: tuple[float, ...]

    @property
    def shares_pct(self) -> dict[str, float]:
        """Of all needed experts, by outcome."""
        total = sum(map(sum, self)) or 1.0
        return {name: 100 * sum(values) / total for name, values in zip(OUTCOMES, self, strict=True)}


class OutcomesInfo(NamedTuple):
    """One or two results."""

    counts: OutcomeCounts
    source: str
    settings: str
    told: str
    measured: OutcomeCounts | None = None
    measured_source: str = ""


def outcomes(result: RunResult | SimResult, measured: RunResult | None = None) -> go.Figure:
    """Hit, late, miss, on the CPU by layer, of the decode steps.

    Args:
        measured: drawn beside it, hatched.

    Raises:
        BadTrace: no decode step.
    """
    return plot_outcomes(outcomes_info(result, measured))


def outcomes_info(result: RunResult | SimResult, measured: RunResult | None = None) -> OutcomesInfo:
    """As numbers."""
    return OutcomesInfo(
        _counts(result.layers),
        source_of(result),
        settings_of(result),
        told_of(result),
        None if measured is None else _counts(measured.layers),
        "" if measured is None else source_of(measured),
    )


def _counts(layers: pd.DataFrame) -> OutcomeCounts:
    rows = decode_steps(layers)
    layer, steps = rows["moe_layer"].to_numpy(), rows["step"].nunique()

    def mean(values: np.ndarray) -> tuple[float, ...]:
        return tuple((np.bincount(layer, weights=values) / steps).tolist())

    on_cpu = rows["on_cpu"].to_numpy()
    copied = rows["misses"].to_numpy() - on_cpu
    return OutcomeCounts(
        mean(rows["hits"].to_numpy()), mean(rows["late"].to_numpy()), mean(copied), mean(on_cpu)
    )


def outcomes_traces(info: OutcomesInfo) -> list[dict[str, Any]]:
    """Always eight: four outcomes as simulated, the same four as measured (empty without a run)."""
    shift = 0.21 if info.measured is not None else 0.0
    width = 0.4 if info.measured is not None else 0.7
    traces = [
        _trace(name, values, info.source, -shift, width, "")
        for name, values in zip(OUTCOMES, info.counts, strict=True)
    ]
    beside = info.measured or OutcomeCounts((), (), (), ())
    return traces + [
        _trace(name, values, info.measured_source, shift, width, "/")
        for name, values in zip(OUTCOMES, beside, strict=True)
    ]


def _trace(
    name: str, values: tuple[float, ...], source: str, shift: float, width: float, shape: str
) -> dict[str, Any]:
    return {
        "type": "bar",
        "x": [layer + shift for layer in range(len(values))],
        "y": list(values),
        "width": width,
        "name": f"{_WORDS[name]} ({source})" if source else _WORDS[name],
        "marker": {
            "color": COLORS[name], "opacity": 0.85, "line": {"width": 0},
            "pattern": {"shape": shape, "size": 6, "fgcolor": "rgba(255,255,255,.8)", "fillmode": "overlay"},
        },
        "hovertemplate": f"{_WORDS[name]}, {source}: %{{y:.2f}} per step<extra></extra>",
        "showlegend": any(values),
        "visible": len(values) > 0,  # what is empty costs a redraw as much as what is not
    }  # fmt: skip


def outcomes_layout(info: OutcomesInfo, *, brief: bool = False) -> dict[str, Any]:
    """What of the layout depends on the numbers; `brief`: beside controls that say the settings already."""
    lines = [f"<b>{info.source}</b>: {_shares(info.counts)}"]
    if info.measured is not None:
        lines.append(f"<b>{info.measured_source}</b> (hatched): {_shares(info.measured)}")
    elif not brief:
        lines.append(info.told)
    if not brief:
        lines.append(info.settings)
    title = "Are the experts there when a layer needs them?"
    return {
        "title": {"text": titled(title, "<br>".join(lines))},
        "xaxis": {
            "dtick": 1 if len(info.counts.hit) <= 32 else None,
            "range": [-0.6, len(info.counts.hit) - 0.4],
        },
        **(_brief_looks(info.measured is not None) if brief else {}),
    }


def _brief_looks(has_measured: bool) -> dict[str, Any]:
    """Heights for a narrow place, where the legend of two results takes a line for each name."""
    # A longer title is higher than what is left for the plot, and covers the line above it.
    axis = {"title": {"text": "experts per step"}}
    return {"margin": {"t": 84}, "height": 400 if has_measured else 350, "yaxis": axis}


def _shares(counts: OutcomeCounts) -> str:
    return ", ".join(f"{_WORDS[name]} {share:.1f} %" for name, share in counts.shares_pct.items() if share)


def plot_outcomes(info: OutcomesInfo) -> go.Figure:
    """Stacked bars by layer."""
    fig = go.Figure(outcomes_traces(info))
    style(fig, title="", subtitle="", height=410, top=118)
    fig.update_layout(outcomes_layout(info))
    fig.update_layout(barmode="stack", hovermode="closest", uirevision=None)
    fig.update_xaxes(title_text="MoE layer", showgrid=False)
    fig.update_yaxes(title_text="distinct experts per step", rangemode="tozero")
    return fig

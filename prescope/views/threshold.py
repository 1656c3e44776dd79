"""How sure must a prediction be before it is worth a copy? What each threshold foresees, copies in vain, and gains."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from prescope.core.units import count_of
from prescope.errors import UnsupportedOption
from prescope.simulator import Scenario, Scenarios, SimResult, predicts

from .theme import COLORS, settings_of, style, told_of, written

THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class ThresholdInfo(NamedTuple):
    """One entry for each threshold."""

    thresholds: tuple[float, ...]
    precision_pct: tuple[float, ...]  # of the experts scored at least so, those that a step used
    recall_pct: tuple[float, ...]  # of the experts used, those scored at least so
    covered_pct: tuple[float, ...]  # of the misses there would have been, those that a prefetch avoided
    useful_mb: tuple[float, ...]  # per token, over the link ahead of need
    wasted_mb: tuple[float, ...]
    ms_per_token: tuple[float, ...]
    chosen: float
    predictor: str
    lookahead: int
    settings: str
    told: str


def threshold(
    scenarios: Scenarios, scenario: Scenario, thresholds: Sequence[float] = THRESHOLDS
) -> go.Figure:
    """Every threshold with all else of a choice as it is.

    Raises:
        UnsupportedOption: the choice predicts nothing.
    """
    return plot_threshold(threshold_info(scenarios, scenario, thresholds))


def threshold_info(
    scenarios: Scenarios, scenario: Scenario, thresholds: Sequence[float] = THRESHOLDS
) -> ThresholdInfo:
    """As numbers; arguments and errors as `threshold`."""
    if not predicts(scenarios, scenario):
        raise UnsupportedOption(
            "nothing is predicted with these settings; choose a schedule and a predictor that do"
        )
    full = scenarios.resolved(scenario)
    simulator, ahead = scenarios.simulator(scenario), full.lookahead or 1
    scores = simulator.predicted.used_dSLE[ahead - 1][:, ahead:]
    used = simulator.needs.tokens_SLE[:, ahead:] > 0
    rows = []
    for value in thresholds:
        guessed = scores >= max(value, 1e-6)
        right = float((guessed & used).sum())
        result = scenarios.run(replace(scenario, threshold=value))
        rows.append(
            (
                100 * right / max(1.0, float(guessed.sum())),
                100 * right / max(1.0, float(used.sum())),
                *_copied(result),
                result.step_ms,
            )
        )
    precision, recall, covered, useful, wasted, ms = (
        tuple(map(float, column)) for column in zip(*rows, strict=True)
    )
    shown = scenarios.run(scenario)
    return ThresholdInfo(
        tuple(thresholds), precision, recall, covered, useful, wasted, ms, float(full.threshold or 0.0),
        str(full.predictor), ahead, settings_of(shown), told_of(shown),
    )  # fmt: skip


def _copied(result: SimResult) -> tuple[float, float, float]:
    """Misses covered in percent, useful and wasted MB per token."""
    counts = result.counts
    per_token = result.row_bytes / 1e6 / result.num_tokens
    covered = 100 * counts.prefetched / max(1, counts.prefetched + counts.misses)
    return covered, counts.prefetched * per_token, (counts.prefetches - counts.prefetched) * per_token


def plot_threshold(info: ThresholdInfo) -> go.Figure:
    """Shares above, megabytes in the middle, milliseconds below."""
    fig = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    shares = [
        ("precision: predicted ones that are used", info.precision_pct, "experts", "solid"),
        ("recall: used ones that are predicted", info.recall_pct, "prefetch", "dash"),
        ("misses that a prefetch covers", info.covered_pct, "stall", "dot"),
    ]
    for name, values, color, dash in shares:
        fig.add_scatter(
            x=info.thresholds, y=values, name=name, mode="lines+markers",
            line={"color": COLORS[color], "width": 2.2, "dash": dash},
            hovertemplate="%{y:.1f} % " + name.partition(":")[0] + "<extra></extra>", row=1, col=1,
        )  # fmt: skip
    for name, values, color, shape in (
        ("prefetched and used", info.useful_mb, "prefetch", ""),
        ("prefetched for nothing", info.wasted_mb, "prefetch", "/"),
    ):
        fig.add_bar(
            x=info.thresholds, y=values, name=name, width=0.035,
            marker={"color": COLORS[color], "line": {"width": 0}, "pattern": {"shape": shape, "size": 6}},
            hovertemplate="%{y:.3g} MB per token " + name + "<extra></extra>", row=2, col=1,
        )  # fmt: skip
    fig.add_scatter(
        x=info.thresholds, y=info.ms_per_token, name="time", mode="lines+markers", showlegend=False,
        line={"color": COLORS["dense"], "width": 2.2}, hovertemplate="%{y:.3f} ms per token<extra></extra>", row=3,
        col=1,
    )  # fmt: skip
    best = info.thresholds[int(np.argmin(info.ms_per_token))]
    style(
        fig,
        title="How sure must a prediction be?",
        subtitle=f"{written(info.predictor)}, {count_of(info.lookahead, 'layer')} ahead · "
        f"fastest at threshold {best:g}, chosen {info.chosen:g}<br>{info.settings}<br>{info.told}",
        height=590,
        top=124,
    )
    fig.add_vline(x=info.chosen, line={"color": COLORS["bound"], "width": 1.5, "dash": "dot"})
    fig.update_layout(barmode="stack", hovermode="x unified", barcornerradius=0)
    fig.update_xaxes(title_text="threshold: least probability of use", row=3, col=1)
    fig.update_yaxes(title_text="%", range=[0, 103], row=1, col=1)
    fig.update_yaxes(title_text="MB per token", rangemode="tozero", row=2, col=1)
    fig.update_yaxes(title_text="ms per token", row=3, col=1)
    return fig

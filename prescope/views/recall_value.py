"""What would better predictions buy? Tokens/s against recall, by an oracle that errs, and where predictors stand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import plotly.graph_objects as go

from prescope.errors import UnsupportedOption
from prescope.simulator import NOISY, NONE, ORACLE, Scenario, Scenarios, predicts
from prescope.training import score

from .theme import COLORS, settings_of, style, told_of

RECALLS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class RealPredictor(NamedTuple):
    """One that was trained or needs no training."""

    name: str
    recall: float  # recall@K one layer ahead, on this trace's decode steps
    tokens_per_s: float


class RecallValueInfo(NamedTuple):
    """The curve, and what stands beside it."""

    recalls: tuple[float, ...]
    tokens_per_s: tuple[float, ...]
    without: float  # no predictions
    real: tuple[RealPredictor, ...]
    pct_a_point: float  # of tokens/s for 0.01 of recall, mean over the curve
    settings: str
    told: str


def recall_value(scenarios: Scenarios, scenario: Scenario, recalls: Sequence[float] = RECALLS) -> go.Figure:
    """Every recall with all else of a choice as it is.

    Raises:
        UnsupportedOption: the choice's schedule predicts nothing.
    """
    return plot_recall_value(recall_value_info(scenarios, scenario, recalls))


def recall_value_info(
    scenarios: Scenarios, scenario: Scenario, recalls: Sequence[float] = RECALLS
) -> RecallValueInfo:
    """As numbers; arguments and errors as `recall_value`."""
    noisy = replace(scenario, predictor=NOISY)
    if not predicts(scenarios, noisy):
        raise UnsupportedOption("this schedule looks at no prediction; choose one that prefetches by them")
    curve = tuple(scenarios.run(replace(noisy, recall=recall)).tokens_per_s for recall in recalls)
    without = scenarios.run(replace(scenario, predictor=NONE))
    decode = scenarios.trace.select(phase="decode")
    real = tuple(
        RealPredictor(
            name,
            score(scenarios.predictors[name], decode, lookaheads=[1]).recall(1),
            scenarios.run(replace(scenario, predictor=name)).tokens_per_s,
        )
        for name in scenarios.predictor_names
        if name not in (NONE, NOISY, ORACLE)
    )
    return RecallValueInfo(
        tuple(recalls),
        curve,
        without.tokens_per_s,
        real,
        100.0 * (curve[-1] / curve[0] - 1.0) / (100.0 * (recalls[-1] - recalls[0])),
        settings_of(without),
        told_of(without),
    )


def plot_recall_value(info: RecallValueInfo) -> go.Figure:
    """The curve, a dotted line for no predictions, a mark for each predictor."""
    fig = go.Figure()
    fig.add_scatter(
        x=info.recalls, y=info.tokens_per_s, name="an oracle that errs", mode="lines+markers",
        line={"color": COLORS["prefetch"], "width": 2.4},
        hovertemplate="recall %{x:.2f}: %{y:,.1f} tokens/s<extra></extra>",
    )  # fmt: skip
    fig.add_scatter(
        x=[one.recall for one in info.real], y=[one.tokens_per_s for one in info.real], name="predictors",
        mode="markers+text", text=[one.name for one in info.real], textposition="bottom right",
        marker={"color": COLORS["experts"], "size": 10, "symbol": "diamond"},
        hovertemplate="%{text}, recall %{x:.3f}: %{y:,.1f} tokens/s<extra></extra>",
    )  # fmt: skip
    fig.add_hline(
        y=info.without, line={"color": COLORS["bound"], "width": 1.5, "dash": "dot"},
        annotation_text="no predictions", annotation_position="bottom left",
    )  # fmt: skip
    style(
        fig,
        title="What would better predictions buy?",
        subtitle=f"a point of recall, 0.01, is worth {info.pct_a_point:+.2f} % of tokens/s · no predictions "
        f"{info.without:,.1f} tokens/s<br>{info.settings}<br>{info.told}",
        height=430,
        top=124,
    )
    lowest = min((*info.recalls, *(one.recall for one in info.real)))
    fig.update_xaxes(title_text="recall@K of each prediction", range=[lowest - 0.02, 1.02])
    fig.update_yaxes(title_text="decode tokens/s")
    return fig

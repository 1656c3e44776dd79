"""How recall changes from the first MoE layer to the last, for models of different depth on one axis."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from prescope.errors import BadTrace
from prescope.simulator.verdict import TITLES
from prescope.training.score_card import ScoreCard

from .theme import style

#: Of Okabe and Ito, and a mark each: one for a model.
LINES = (
    ("#0072b2", "circle"), ("#d55e00", "square"), ("#009e73", "diamond"), ("#cc79a7", "triangle-up"),
    ("#e69f00", "cross"), ("#56b4e9", "star"),
)  # fmt: skip
DASHES = ("solid", "dot", "dash")


class Recalls(NamedTuple):
    """One predictor of one model."""

    model: str
    predictor: str
    depth: tuple[float, ...]  # of the layer predicted from: 0 the first, 1 the last that predicts
    recall: tuple[float, ...]


def recall_by_layer(
    models: Mapping[str, Mapping[str, ScoreCard | Sequence[float]]], lookahead: int = 1, told: str = ""
) -> go.Figure:
    """Recall@K over depth: a colour for each model, a dash for each predictor.

    Args:
        models: name -> predictor -> its card, or its recall by source layer. told: where they are from.

    Raises:
        BadTrace: no model.
    """
    return plot_recall_by_layer(recall_by_layer_info(models, lookahead), lookahead, told)


def recall_by_layer_info(
    models: Mapping[str, Mapping[str, ScoreCard | Sequence[float]]], lookahead: int = 1
) -> tuple[Recalls, ...]:
    """As numbers."""
    if not models:
        raise BadTrace("recall_by_layer compares models; give one at least")
    found = []
    for model, cards in models.items():
        for predictor, card in cards.items():
            values = card.recalls(lookahead) if isinstance(card, ScoreCard) else tuple(card)
            last = max(1, len(values) - 1)
            found.append(
                Recalls(
                    model,
                    TITLES.get(predictor, predictor),
                    tuple(i / last for i in range(len(values))),
                    values,
                )
            )
    return tuple(found)


def plot_recall_by_layer(found: Sequence[Recalls], lookahead: int = 1, told: str = "") -> go.Figure:
    """Lines."""
    models = list(dict.fromkeys(one.model for one in found))
    predictors = list(dict.fromkeys(one.predictor for one in found))
    fig = go.Figure()
    for one in found:
        color, symbol = LINES[models.index(one.model) % len(LINES)]
        dash = DASHES[predictors.index(one.predictor) % len(DASHES)]
        fig.add_scatter(
            x=one.depth, y=one.recall, mode="lines+markers", name=f"{one.model}, {one.predictor}",
            line={"color": color, "width": 2, "dash": dash},
            marker={"symbol": symbol, "size": 7, "color": color, "line": {"color": "white", "width": 1}},
            text=[f"from MoE layer {i}" for i in range(len(one.recall))],
            hovertemplate="%{y:.3f} %{text}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    ahead = "the next layer" if lookahead == 1 else f"{lookahead} layers ahead"
    style(
        fig, title="How well is each layer predicted?",
        subtitle=f"recall@K, {ahead}; {', '.join(f'{DASHES[i % 3]}: {p}' for i, p in enumerate(predictors))}<br>{told}",
        height=430, top=100, bottom=120,
    )  # fmt: skip
    fig.update_layout(hovermode="closest")
    fig.update_xaxes(
        title_text="depth of the layer predicted from", tickvals=[0, 0.5, 1],
        ticktext=["first", "half-way", "last but one"], range=[-0.03, 1.03],
    )  # fmt: skip
    fig.update_yaxes(title_text="recall@K")
    return fig

"""How well a predictor predicts, as two heat maps: its recall, and what it gains on another predictor."""

from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from prescope.core.units import count_of
from prescope.training.score_card import ScoreCard, difference

from .theme import AMOUNT_SCALE, GAIN_SCALE, style

Rows = tuple[tuple[float, ...], ...]


class ScoreMapInfo(NamedTuple):
    """Recall@K by row (lookahead or domain) and source layer; NaN where there is no such layer."""

    predictor: str
    against: str
    row_title: str
    labels: tuple[str, ...]
    recall: Rows
    gain: Rows
    chance: float  # K / E
    summary: str


def score_map(card: ScoreCard, against: ScoreCard) -> go.Figure:
    """Recall@K by lookahead and layer, and the gain over another card of the same trace."""
    return plot_score_map(score_map_info(card, against))


def domain_map(card: ScoreCard, against: ScoreCard, lookahead: int = 1) -> go.Figure:
    """Recall@K by domain and layer at one lookahead, and the gain over another card of the same trace."""
    return plot_score_map(domain_map_info(card, against, lookahead))


def score_map_info(card: ScoreCard, against: ScoreCard) -> ScoreMapInfo:
    """Rows are lookaheads, the mean over all prompts."""
    mine, other = (
        _by_layer(one, [(a, np.ones(len(one.prompts), dtype=bool)) for a in range(len(one.lookaheads))])
        for one in (card, against)
    )
    gains = [difference(card, against, ahead) for ahead in card.lookaheads]
    parts = [
        f"{ahead}: {card.recall(ahead):.3f} ({gain.value:+.3f}, 95 % {gain.low:+.3f} to {gain.high:+.3f})"
        for ahead, gain in zip(card.lookaheads, gains, strict=True)
    ]
    wrapped = "<br>".join(" · ".join(parts[i : i + 2]) for i in range(0, len(parts), 2))
    return ScoreMapInfo(
        card.predictor,
        against.predictor,
        "lookahead, layers",
        tuple(str(ahead) for ahead in card.lookaheads),
        _rows(mine),
        _rows(mine - other),
        card.shape.top_k / card.shape.num_experts,
        f"mean over layers (gain, interval over {count_of(len(card.prompts), 'prompt')}) at lookahead {wrapped}",
    )


def domain_map_info(card: ScoreCard, against: ScoreCard, lookahead: int = 1) -> ScoreMapInfo:
    """Rows are domains, that of the largest mean recall first."""
    a = card.lookaheads.index(lookahead)
    domains = sorted(set(card.domains.tolist()), key=lambda d: -card.recall(lookahead, domain=d))
    mine, other = (
        _by_layer(one, [(a, one.domains == domain) for domain in domains]) for one in (card, against)
    )
    worst = domains[-1]
    gain = difference(card, against, lookahead, domain=worst)
    return ScoreMapInfo(
        card.predictor,
        against.predictor,
        "domain of the prompts",
        tuple(domains),
        _rows(mine),
        _rows(mine - other),
        card.shape.top_k / card.shape.num_experts,
        f"lookahead {lookahead} · worst: {worst} {card.recall(lookahead, domain=worst):.3f}, gain "
        f"{gain.value:+.3f} (95 % {gain.low:+.3f} to {gain.high:+.3f})",
    )


def plot_score_map(info: ScoreMapInfo) -> go.Figure:
    """Two panels side by side, layers from left to right, numbers in the cells when there is room."""
    fig = make_subplots(
        cols=2,
        rows=1,
        shared_yaxes=True,
        horizontal_spacing=0.1,
        column_titles=["recall@K", "gain in recall@K"],
    )
    reach = max(0.05, float(np.nanmax(np.abs(info.gain))))
    cells = len(info.labels) * len(info.recall[0])
    for column, (values, scale, low, high, form) in enumerate(
        (
            (info.recall, AMOUNT_SCALE, info.chance, 1.0, "{:.2f}"),
            (info.gain, GAIN_SCALE, -reach, reach, "{:+.2f}"),
        ),
        start=1,
    ):
        text = [["" if np.isnan(v) else form.format(v) for v in row] for row in values]
        bar = {"thickness": 10, "outlinewidth": 0, "x": 0.455 if column == 1 else 1.005, "ypad": 0}
        fig.add_heatmap(
            z=values, y=list(info.labels), text=text, texttemplate="%{text}" if cells <= 100 else None,
            textfont={"size": 11.5}, colorscale=scale, zmin=low, zmax=high, xgap=2, ygap=2, colorbar=bar,
            hovertemplate="layer %{x}, %{y}: %{z:.3f}<extra></extra>", hoverongaps=False, row=1, col=column,
        )  # fmt: skip
    style(
        fig,
        title="Which layers does it predict, and how far ahead?"
        if info.row_title.startswith("lookahead")
        else "On which text does it predict?",
        subtitle=f"{info.predictor}, gain over the {info.against} · chance {info.chance:.3f}<br>{info.summary}",
        height=200 + 34 * len(info.labels) + 20 * info.summary.count("<br>"),
        top=126 + 20 * info.summary.count("<br>"),
        bottom=56,
    )
    fig.update_xaxes(
        title_text="MoE layer predicted from", showgrid=False, dtick=1 if len(info.recall[0]) <= 32 else None
    )
    fig.update_yaxes(showgrid=False, autorange="reversed", type="category")
    fig.update_yaxes(title_text=info.row_title, col=1)
    fig.update_annotations(font={"size": 12.5})
    return fig


def _by_layer(card: ScoreCard, rows: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """(rows, L - 1): recall of each (index of lookahead, prompts) and layer; NaN where nothing was used."""
    layers = card.shape.num_layers - 1
    out = np.full((len(rows), layers), np.nan)
    for i, (a, prompts) in enumerate(rows):
        hits, used = (array[a, :layers][:, prompts].sum(axis=1) for array in (card.hits, card.used))
        out[i] = np.divide(hits, used, out=np.full(layers, np.nan), where=used > 0)
    return out


def _rows(values: np.ndarray) -> Rows:
    return tuple(map(tuple, values.tolist()))

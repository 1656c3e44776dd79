"""The predictor's figures: their numbers are those of cards, cues and studies; every axis has a unit or a name."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from prescope import views
from prescope.errors import BadTrace
from prescope.predictor import Chance, Frequency, LayerGroups, Oracle, Transition
from prescope.predictor.layer_groups import Cues
from prescope.training import Shift, savings, score
from prescope.views.layer_groups import layer_groups_info
from prescope.views.savings import savings_info
from prescope.views.score_map import domain_map_info, score_map_info
from prescope.views.text_shift import text_shift_info
from tests.training.test_score_card import COSTS, SHAPE, made_trace

SHIFT = Shift(
    lookahead=1,
    shift_at=130,
    window=64,
    fixed=np.array([0.9, 0.9, 0.6, 0.6]),
    tuned=np.array([0.9, 0.9, 0.7, 0.8]),
    before=0.9,
    after_fixed=0.6,
    after_tuned=0.8,
    recovery_tokens=256,
    cycles=2,
    tuning_ms=5.0,
)


@pytest.fixture(scope="module")
def cards():
    trace = made_trace()
    return score(Transition(trace, 2), trace), score(Chance(SHAPE, 2), trace)


@pytest.fixture(scope="module")
def cues():
    high, low = np.array([0.9, 0.2, 0.1, 0.2, 0.8]), np.array([0.1, 0.7, 0.8, 0.7, 0.2])
    return Cues(high, high, low, high, high, high, high)


@pytest.fixture(scope="module")
def table():
    trace = made_trace()
    found = [savings(p, trace, COSTS) for p in (Oracle(SHAPE, 1), Frequency(trace, 1), Chance(SHAPE, 1))]
    return pd.DataFrame([w._asdict() | {"saved_ms": w.saved_ms} for w in found])


def test_every_figure_has_a_title_and_named_axes(cards, cues, table):
    figures = [
        views.score_map(*cards),
        views.domain_map(*cards),
        views.layer_groups(cues, LayerGroups.at(1, 4, 5, "three groups: for the test")),
        views.text_shift(SHIFT),
        views.savings(table),
    ]
    for figure in figures:
        assert type(figure) is go.Figure
        assert figure.layout.title.text and figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
        figure.to_json()


def test_the_score_map_holds_the_cards_recalls(cards):
    info = score_map_info(*cards)
    frame = cards[0].to_frame()
    one = frame[(frame.lookahead == 2) & (frame.moe_layer == 1)]
    hits = (one.recall * one.used).sum() / one.used.sum()
    assert info.recall[1][1] == pytest.approx(hits)
    assert np.nanmean(info.recall[0]) == pytest.approx(cards[0].recall(1))
    assert np.nanmean(info.gain[1]) == pytest.approx(cards[0].recall(2) - cards[1].recall(2))
    assert np.isnan(info.recall[1][2]), "three layers on from layer 2 there is none"


def test_domains_stand_from_best_to_worst(cards):
    info = domain_map_info(*cards)
    means = [np.mean(row) for row in info.recall]
    assert means == sorted(means, reverse=True)
    assert set(info.labels) == {"odd", "even"}
    assert f"worst: {info.labels[-1]}" in info.summary


def test_layer_groups_are_shaded_where_they_lie(cues):
    info = layer_groups_info(cues, LayerGroups.at(1, 4, 5, "three groups: for the test"))
    assert info.groups == (("input", 0, 1), ("middle", 1, 4), ("output", 4, 5))
    one = layer_groups_info(cues, LayerGroups.one(5, "one group: none found"))
    assert one.groups == (("middle", 0, 5),)
    assert np.argmax(info.contrast) == 0


def test_no_window_of_a_shift_spans_the_change():
    info = text_shift_info(SHIFT)
    assert info.token == (32, 96, 162, 226)
    assert "256 tokens" in info.summary and "2 tuning cycles of 2.5 ms" in info.summary


def test_savings_are_sorted_and_of_one_setting(table):
    info = savings_info(table)
    assert info.names[0] == "oracle"
    assert list(info.saved_ms) == sorted(info.saved_ms, reverse=True)
    assert "by hand" in info.source
    with pytest.raises(BadTrace, match="one lookahead"):
        savings_info(pd.concat([table, table.assign(lookahead=2)]))

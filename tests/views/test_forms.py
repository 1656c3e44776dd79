"""Figures as cells show them."""

import json
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from prescope.report.page import figure_html
from prescope.views import forms
from prescope.widgets import SlimFigureWidget


def test_a_figure_brings_its_html_and_the_page_s_text_colour(monkeypatch):
    """On Lab's dark theme the grey text of plain figures was hardly seen; panels had rules of their own."""
    shown = []
    monkeypatch.setattr(forms, "display", shown.append)
    figure = go.Figure([{"type": "bar", "x": [1], "y": [2]}]).to_dict()
    bundle = forms._BothForms().to_mimebundle(figure)
    assert {name: bundle[forms.PLOTLY_MIME][name] for name in figure} == figure
    assert "plotly" in bundle["text/html"]
    (looks,) = shown
    assert ".jp-OutputArea .js-plotly-plot .main-svg text" in looks.data
    assert "var(--jp-ui-font-color1" in looks.data


@pytest.mark.parametrize(
    "nothing", [float("nan"), float("inf"), np.float64("nan"), pd.NaT, pd.Timestamp("2026-11-30")]
)
def test_what_json_has_no_word_for_is_shown_without_a_warning(monkeypatch, nothing):
    """A heat map's cells that are not there are NaN: Jupyter wrote a red warning under the figure."""
    monkeypatch.setattr(forms, "display", lambda looks: None)
    figure = go.Figure(go.Heatmap(z=[(0.5, nothing)], customdata=[[nothing, 1]]))
    json.dumps(forms._BothForms().to_mimebundle(figure.to_dict()), allow_nan=False)


def test_no_figure_has_a_button_that_sends_it_away(monkeypatch):
    """plotly.js 4.1 shows "Share chart...", which uploads the figure to plotly's makers, unless it is told not to."""
    monkeypatch.setattr(forms, "display", lambda looks: None)
    figure = go.Figure(go.Bar(y=[1, 2]))
    bundle = forms._BothForms().to_mimebundle(figure.to_dict())
    assert bundle[forms.PLOTLY_MIME]["config"]["showSendToCloud"] is False
    widget = SlimFigureWidget(figure)
    assert widget.get_state()["_config"]["showSendToCloud"] is False
    widget.close()
    for html in (bundle["text/html"], figure_html(figure)):
        (config,) = re.findall(r'\{[^{}]*"showSendToCloud":[^{}]*\}', html)
        assert json.loads(config)["showSendToCloud"] is False

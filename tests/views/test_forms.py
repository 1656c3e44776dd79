"""Figures as cells show them."""

import plotly.graph_objects as go

from prescope.views import forms


def test_a_figure_brings_its_html_and_the_page_s_text_colour(monkeypatch):
    """On Lab's dark theme the grey text of plain figures was hardly seen; panels had rules of their own."""
    shown = []
    monkeypatch.setattr(forms, "display", shown.append)
    figure = go.Figure([{"type": "bar", "x": [1], "y": [2]}]).to_dict()
    bundle = forms._BothForms().to_mimebundle(figure)
    assert bundle[forms.PLOTLY_MIME] == figure
    assert "plotly" in bundle["text/html"]
    (looks,) = shown
    assert ".jp-OutputArea .js-plotly-plot .main-svg text" in looks.data
    assert "var(--jp-ui-font-color1" in looks.data

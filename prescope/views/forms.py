"""Figures in a cell's output: in plotly's own form and as html, in the page's own text colour.

Lab takes plotly's form; stock `nbconvert --to html` has no place for it and takes the html, which loads plotly.js from
the web when the page is opened. `prescope.report` writes pages that need no web.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import HTML, display
from plotly.io.base_renderers import MimetypeRenderer

from .theme import CONFIG, figures_css

PLOTLY_MIME = "application/vnd.plotly.v1+json"
#: Name of the renderer that gives figures both forms.
BOTH = "prescope"
#: Lab's plotly knows nothing of its themes: on a dark page the greys of a figure were hardly seen.
LOOKS = f"<style>{figures_css('.jp-OutputArea', 'var(--jp-ui-font-color1, #222)')}</style>"


def figures_html(figures: Sequence[go.Figure]) -> str:
    """Figures as html that loads plotly.js from the web, once."""
    settings = {"full_html": False, "include_mathjax": False, "config": CONFIG}
    return "".join(
        pio.to_html(figure, include_plotlyjs=False if i else "cdn", **settings)
        for i, figure in enumerate(figures)
    )


class _BothForms(MimetypeRenderer):
    """A figure as plotly's own form and as html; each brings the looks along, for any cell may be cleared."""

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        display(HTML(LOOKS))
        # As plotly's own renderers do: NaN, where a heat map has no cell, is no JSON, and Jupyter warned of it in red.
        plain = json.loads(pio.to_json(fig_dict, validate=False, remove_uids=False))
        return {
            PLOTLY_MIME: {**plain, "config": CONFIG},
            "text/html": figures_html([go.Figure(fig_dict, skip_invalid=True)]),
        }


def show_in_both_forms() -> None:
    """Have plain figures of this kernel shown so, unless somebody has chosen a renderer."""
    pio.renderers[BOTH] = _BothForms()
    if "PLOTLY_RENDERER" not in os.environ and pio.renderers.default == "plotly_mimetype":
        pio.renderers.default = BOTH

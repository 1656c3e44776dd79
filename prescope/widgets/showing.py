"""How panels and figures get into a cell's output: live where there is a kernel, as they opened where there is none.

An output may hold the same thing in several forms. Lab and VS Code take the live one; stock `nbconvert --to html` has
no state of widgets and no place for plotly's own form, and takes the html. Its figures load plotly.js from the web when
the page is opened; `prescope.report` writes pages that need no web.
"""

import os
from collections.abc import Sequence
from typing import Any

import ipywidgets as ipw
import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import display
from plotly.io.base_renderers import MimetypeRenderer

from ..views.theme import CONFIG
from .style import CSS

PLOTLY_MIME = "application/vnd.plotly.v1+json"
#: Name of the renderer that gives figures both forms.
BOTH = "prescope"


def figures_html(figures: Sequence[go.Figure]) -> str:
    """Figures as html that loads plotly.js from the web, once."""
    settings = {"full_html": False, "include_mathjax": False, "config": CONFIG}
    return "".join(
        pio.to_html(figure, include_plotlyjs=False if i else "cdn", **settings)
        for i, figure in enumerate(figures)
    )


class _BothForms(MimetypeRenderer):
    """A figure as plotly's own form and as html."""

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        return {PLOTLY_MIME: fig_dict, "text/html": figures_html([go.Figure(fig_dict, skip_invalid=True)])}


def show_in_both_forms() -> None:
    """Let plain figures of this kernel survive stock nbconvert, unless somebody has chosen a renderer."""
    pio.renderers[BOTH] = _BothForms()
    if "PLOTLY_RENDERER" not in os.environ and pio.renderers.default == "plotly_mimetype":
        pio.renderers.default = BOTH


def show_panel(view: ipw.Widget, words: str, figures: Sequence[go.Figure]) -> None:
    """Display a live panel, and beside it, for pages without a kernel, what it opened with."""
    live = view._repr_mimebundle_() or {}
    told = "<p class='ps-soft'>As the panel opened; it is live in a notebook with a kernel.</p>"
    display({**live, "text/html": page_html(f"{words}{told}{figures_html(figures)}")}, raw=True)


def page_html(words: str) -> str:
    """What a panel says, with its looks, for pages without widgets."""
    return f"<style>{CSS}</style><div class='prescope'>{words}</div>"

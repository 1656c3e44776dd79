"""How panels get into a cell's output: live where there is a kernel, as they opened where there is none.

An output may hold the same thing in several forms. Lab and VS Code take the live one; stock `nbconvert --to html` has
no state of widgets, and takes the html.
"""

from collections.abc import Sequence

import ipywidgets as ipw
import plotly.graph_objects as go
from IPython.display import HTML, display

from ..views.forms import figures_html
from .figures import is_headless
from .style import CSS


def show_panel(view: ipw.Widget, words: str, figures: Sequence[go.Figure]) -> None:
    """Display a live panel, and beside it, for pages without a kernel, what it opened with; that alone where a page is
    made and nobody could use the panel.
    """
    if is_headless():
        display(HTML(page_html(words)))
        for figure in figures:
            display(figure)
        return
    live = view._repr_mimebundle_() or {}
    told = "<p class='ps-soft'>As the panel opened; it is live in a notebook with a kernel.</p>"
    display({**live, "text/html": page_html(f"{words}{told}{figures_html(figures)}")}, raw=True)


def take_off(*roots: ipw.Widget) -> None:
    """Close widgets and all that stands in them, the outer ones first.

    A box that lives on and names a closed widget takes all others with it: after a reload Lab shows no widget of the
    whole kernel, but "Loading widget..." for ever (ipywidgets 8.1.9, JupyterLab 4.6.6). Their layouts and styles, which
    are models of their own, ipywidgets leaves: 324 of a dashboard.
    """
    for root in roots:
        inner = root.children if isinstance(root, ipw.Box) else ()
        looks = [getattr(root, name, None) for name in ("layout", "style")]
        root.close()
        for look in looks:
            if isinstance(look, ipw.Widget):  # a figure's layout is plotly's
                look.close()
        take_off(*inner)


def page_html(words: str) -> str:
    """What a panel says, with its looks, for pages without widgets."""
    return f"<style>{CSS}</style><div class='prescope'>{words}</div>"

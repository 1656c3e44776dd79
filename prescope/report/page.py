"""What every page has: plotly.js once, the browser's light or dark, figures that fit on paper, its provenance."""

import base64
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from ..core.machine import machine_facts
from ..errors import BadTrace, UnsupportedOption
from ..views.theme import CONFIG, FONT, figures_css


def drawn(what: str, draw: Callable[[], go.Figure]) -> go.Figure | str:
    """A figure, or why it cannot be drawn: a run of one token has no decode step, one without events no timeline."""
    try:
        return draw()
    except (BadTrace, UnsupportedOption) as error:
        return f"No figure of the {what}: {error}."


def figure_html(figure: go.Figure | str) -> str:
    """A figure without plotly.js; a text stands for one that cannot be drawn and says why."""
    if isinstance(figure, str):
        return f"<p class='note'>{escape(figure)}</p>"
    if isinstance(figure, go.FigureWidget):
        raise TypeError(f"{type(figure).__name__} needs a kernel; pass a plain go.Figure")
    return pio.to_html(figure, full_html=False, include_plotlyjs=False, include_mathjax=False, config=CONFIG)


def download_html(content: bytes, file: str, words: str) -> str:
    """A link whose file is inside the page.

    Args:
        file: name it is saved under.
    """
    data = base64.b64encode(content).decode("ascii")
    name = escape(file, quote=True)
    return f"<a download='{name}' href='data:application/octet-stream;base64,{data}'>{escape(words)}</a>"


def provenance(**facts: Any) -> dict[str, Any]:
    """Where a page comes from: time, command, machine, and what else is given."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "machine": machine_facts(),
        **facts,
    }


def _command() -> str:
    """What to type again: a module that was run by `python -m` stands among the arguments by its file."""
    program, *arguments = sys.argv
    main = getattr(sys.modules["__main__"], "__spec__", None)
    if main is not None:
        program = f"python -m {main.name.removesuffix('.__main__')}"
    return " ".join([program, *arguments])


def json_script(facts: dict[str, Any]) -> str:
    """The provenance as the page's JSON block."""
    # "<!--" and "<script" inside a script make the browser look for another end of it; "<" stands only in texts here.
    text = json.dumps(facts, default=str, indent=1).replace("<", "\\u003c")
    return f'<script type="application/json" id="provenance">{text}</script>'


#: Room across on A4 or Letter, px. What is wider was cut: figures lost their last layers and tokens.
PAPER_PX = 640
#: Figures are drawn anew for paper as for the narrowest cell, for which subtitles are wrapped, and made smaller.
DRAWN_PX = 850
#: A table is made smaller where even its longest words, which are not cut, are too wide for the paper.
PRINT_JS = f"""<script>
const every = (selector, change) => document.querySelectorAll(selector).forEach(change);
addEventListener("beforeprint", () => {{
  every(".js-plotly-plot", (figure) => Plotly.relayout(figure, {{ width: {DRAWN_PX} }}));
  every("table", (table) => {{
    Object.assign(table.style, {{ width: "min-content", tableLayout: "auto" }});
    const zoom = Math.min(1, {PAPER_PX} / table.offsetWidth);
    Object.assign(table.style, {{ width: "", zoom }});
  }});
}});
addEventListener("afterprint", () => {{
  every(".js-plotly-plot", (figure) => Plotly.relayout(figure, {{ width: null, autosize: true }}));
  every("table", (table) => Object.assign(table.style, {{ tableLayout: "", zoom: "" }}));
}});
</script>"""
SHARED_CSS = f"""{figures_css("", "CanvasText")}
@page {{ margin: 12mm; }}
@media print {{ figure, .plotly-figure, table {{ break-inside: avoid; }} body {{ max-width: none; margin: 0; }}
  .table, .ps-scroll, .jp-OutputArea-output {{ overflow: visible !important; }}
  .js-plotly-plot {{ zoom: calc({PAPER_PX} / {DRAWN_PX}); }} table {{ font-size: 11px !important; }}
  tr {{ break-inside: avoid; }} .dataframe th, .dataframe td {{ padding: 2px 4px !important; }}
  /* What announces a figure or a table stands on its page; code that is folded up is nothing to read. */
  h1, h2, h3, .jp-MarkdownCell {{ break-after: avoid; }} details.code:not([open]) {{ display: none; }} }}
"""
_CSS = f"""{SHARED_CSS}
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 {FONT}; max-width: 1080px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.7em; margin-bottom: .2em; }} h2 {{ font-size: 1.15em; margin: 1.6em 0 .4em; }}
figure {{ margin: 1.6em 0; }} .verdict {{ font-size: 1.3em; font-weight: 600; line-height: 1.35; }}
.numbers table {{ width: 100%; font-variant-numeric: tabular-nums; }} .numbers td {{ border-top: 1px solid #8884; }}
.note {{ opacity: .75; }}
.badge {{ border: 1px solid currentColor; border-radius: 1em; padding: .1em .7em; font-size: .85em; }}
.table {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .92em; }}
td, th {{ padding: .2em .8em .2em 0; text-align: left; vertical-align: top; }}
details {{ margin: 1.5em 0; }} summary {{ cursor: pointer; }}
pre {{ font-size: .85em; white-space: pre-wrap; overflow-wrap: anywhere; }}
"""


def page_html(title: str, body: str, facts: dict[str, Any]) -> str:
    """The whole page around a body of html; `facts`: its provenance."""
    shown = escape(json.dumps(facts, default=str, indent=1))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style>'
        f'<link rel="icon" href="data:,"><script>{get_plotlyjs()}</script></head><body>{body}'
        f"<details><summary>Provenance</summary><pre>{shown}</pre></details>{json_script(facts)}{PRINT_JS}"
        f"</body></html>"
    )

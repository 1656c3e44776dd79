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


#: On paper figures are drawn anew for its width: as wide as the screen's they lost their last layers and tokens.
PAPER_PX = 640
PRINT_JS = f"""<script>
const figures = () => [...document.querySelectorAll(".js-plotly-plot")];
addEventListener("beforeprint", () => figures().forEach((f) => Plotly.relayout(f, {{ width: {PAPER_PX} }})));
addEventListener("afterprint", () => figures().forEach((f) => Plotly.relayout(f, {{ width: null, autosize: true }})));
</script>"""
SHARED_CSS = (
    figures_css("", "CanvasText")
    + """
@page { margin: 12mm; }
@media print { figure, .plotly-figure, table { break-inside: avoid; } body { max-width: none; margin: 0; }
  .table, .ps-scroll, .jp-OutputArea-output { overflow: visible !important; }
  table { font-size: 8.5px !important; } th, td { white-space: normal !important; overflow-wrap: anywhere; }
  .dataframe th, .dataframe td { padding: 2px 4px !important; } }
"""
)
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

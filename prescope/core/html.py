"""A few facts as a small table, for `_repr_html_`: what a person wants to know when a name ends a cell."""

from collections.abc import Iterable
from html import escape

_CELL = "text-align:left;padding:2px 16px 2px 0;vertical-align:top;white-space:normal"


def facts_html(title: str, facts: Iterable[tuple[str, str]], notes: Iterable[str] = ()) -> str:
    """A title, one row for each fact, notes below."""
    rows = "".join(
        f"<tr style='background:none'><td style='{_CELL};opacity:.75'>{escape(what)}</td><td style='{_CELL}'>"
        f"{escape(value)}</td></tr>"
        for what, value in facts
    )
    told = "".join(f"<div style='opacity:.75'>{escape(note)}</div>" for note in notes)
    return f"<div><b>{escape(title)}</b><table style='border:0'>{rows}</table>{told}</div>"

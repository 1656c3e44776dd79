"""Frames as tables that people read: heads with units, three digits, nothing where nothing is known."""

import re
from html import escape

import pandas as pd

from ..views.numbers import formatted

#: Characters of a text from which on its cell is wrapped.
LONG = 44
#: A number with its unit, or that it is not known: stands below the others of its column.
_NUMBER = re.compile(r"([-+]?\d[\d.,]*( \S{1,3})?|-|None)$")


def frame_html(frame: pd.DataFrame, *, mark: str = "") -> str:
    """A frame with its index as first column.

    Args:
        mark: the index value of a row that stands out.
    """
    heads = "".join(map(_head, frame.columns, (frame[name] for name in frame.columns)))
    rows = "".join(
        f"<tr{' class=ps-first' if str(index) == mark else ''}><td class='ps-words'>{escape(str(index))}</td>"
        f"{''.join(map(_cell, values))}</tr>"
        for index, values in zip(frame.index, frame.to_numpy(dtype=object), strict=True)
    )
    first = escape(str(frame.index.name or ""))
    return (
        f"<div class='ps-scroll'><table class='ps-table'><thead><tr><th>{first}</th>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _head(name: object, values: pd.Series) -> str:
    """Words stand below the left of their head, numbers, with a unit or without, below its right."""
    is_text = len(values) > 0 and all(isinstance(value, str) and not _NUMBER.match(value) for value in values)
    return f"<th{' class=ps-words' if is_text else ''}>{escape(str(name))}</th>"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return f"<td>{'yes' if value else ''}</td>"
    if isinstance(value, int):
        return f"<td>{value:,}</td>"
    if isinstance(value, float):
        return f"<td>{'' if value != value else formatted(value)}</td>"
    text = str(value)
    if _NUMBER.match(text):
        return f"<td>{escape(text)}</td>"
    return f"<td class='ps-words{' ps-long' if len(text) > LONG else ''}'>{escape(text)}</td>"

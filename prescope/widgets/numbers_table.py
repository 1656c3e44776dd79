"""The table of numbers that is always in sight, and the line that says what they mean."""

from collections.abc import Sequence
from html import escape

import ipywidgets as ipw

from ..simulator import Interval
from ..views.numbers import COLUMNS, MORE_IS_BETTER, NAN, Numbers, change, formatted

#: Rows that are always there, with "-" before there is anything to say.
ROWS = ("simulated", "measured", "pinned", "bound")
#: Start of a row's name -> what it means.
MEANS = {
    "simulated": "What the recorded tokens would take with the settings below",
    "measured": "What a run with these very settings took",
    "bound": "What no schedule can beat with these slots on this machine; each column for itself",
}


class NumbersTable:
    """Simulated, measured, pinned, bound: always in this order.

    Attributes:
        view: the table and, below it, one line of advice.
    """

    def __init__(self) -> None:
        self._table, self._line = ipw.HTML(), ipw.HTML()
        self._line.add_class("ps-verdict")
        self.view = ipw.VBox([self._table, self._line])

    def show(
        self,
        simulated: Numbers,
        measured: Numbers | None,
        pinned: Numbers | None,
        bound: Numbers,
        *,
        pinned_name: str = "",
        note: str = "",
        interval: Interval | None = None,
    ) -> None:
        """Put the numbers in.

        Args:
            pinned: shown as the change of the measured row against it, or of the simulated one where it was simulated.
            pinned_name: what was pinned. `note`: html behind the measured row's name.
            interval: of the simulated tokens/s, where it is known.
        """
        rows = [_cells("simulated", simulated, True, interval=interval)]
        rows.append(_cells(measured.row if measured else "measured", measured, False, note))
        rows.append(self._pinned(simulated, measured, pinned, pinned_name))
        rows.append(_cells("bound", bound, False))
        self._set(self._table, table_html(rows))

    def say(self, html: str) -> None:
        """The line below the table."""
        self._set(self._line, html)

    @property
    def text(self) -> str:
        """Table and line as html, for pages without widgets."""
        return f"{self._table.value}<p class='ps-verdict'>{self._line.value}</p>"

    @staticmethod
    def _set(widget: ipw.HTML, html: str) -> None:
        if widget.value != html:
            widget.value = html

    @staticmethod
    def _pinned(simulated: Numbers, measured: Numbers | None, pinned: Numbers | None, name: str) -> str:
        if pinned is None:
            how = "Pin as baseline keeps the numbers above"
            hint = f"<span class='ps-soft' title='{how}'>against a pinned baseline</span>"
            return f"<tr><td>{hint}</td>{'<td>-</td>' * len(COLUMNS)}</tr>"
        new = simulated if pinned.row == "simulated" or measured is None else measured
        delta = change(new, pinned)
        cells = [f"<td title='{escape(name, quote=True)}'>{new.row} against pinned</td>"]
        for field in COLUMNS:
            value = getattr(delta, field)
            text = formatted(value, signed=True, field=field)
            if field == "tokens_per_s" and value == value:
                text += " %"
            cells.append(f"<td class='{_mood(field, value, pinned)}'>{text}</td>")
        return f"<tr>{''.join(cells)}</tr>"


def table_html(rows: Sequence[str]) -> str:
    """Rows below heads with units."""
    heads = "".join(
        f"<th title='{escape(why, quote=True)}'>{escape(head)}</th>" for head, why in COLUMNS.values()
    )
    head = f"<thead><tr><th></th>{heads}</tr></thead>"
    return (
        f"<div class='ps-scroll'><table class='ps-numbers'>{head}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cells(
    name: str, row: Numbers | None, is_first: bool, note: str = "", interval: Interval | None = None
) -> str:
    texts = {field: formatted(NAN if row is None else getattr(row, field), field=field) for field in COLUMNS}
    if interval is not None:
        low, high = map(formatted, interval)
        why = "expected of a run here: by how far measured times vary, and the simulator's own error"
        texts["tokens_per_s"] += (
            f" <span class='ps-soft' title='{escape(why, quote=True)}'>({low} to {high})</span>"
        )
    cells = "".join(f"<td>{text}</td>" for text in texts.values())
    kind = " class='ps-first'" if is_first else ""
    means = next((words for start, words in MEANS.items() if name.startswith(start)), "")
    return f"<tr{kind}><td><span title='{means}'>{escape(name)}</span>{note}</td>{cells}</tr>"


def _mood(field: str, delta: float, old: Numbers) -> str:
    """Green or orange only where a difference is beyond what repeats of one setting show: 2 %."""
    better = MORE_IS_BETTER.get(field)
    base = 100.0 if field == "tokens_per_s" else getattr(old, field)
    if better is None or delta != delta or abs(delta) < 0.02 * abs(base):
        return ""
    return "ps-good" if (delta > 0) == better else "ps-bad"

"""The best points as a table, and one of them chosen: its timeline."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as ipw
import pandas as pd
import plotly.graph_objects as go

from ..errors import PrescopeError
from ..views.numbers import formatted
from ..views.sweep_points import best_first, points_frame
from .figures import SlimFigureWidget
from .style import boxed
from .sweep_words import error_html
from .tables import frame_html

#: Rows of the table, and points of the menu.
BEST, MOST_OFFERED = 5, 200


class SweepChosen:
    """Best points, a menu of them, and the timeline of the one that is chosen.

    Args:
        shows: opens the timeline of a point's settings: a figure to draw here, or None if it is shown elsewhere.
        settings_of: settings of a point by its number.

    Attributes:
        table, menu, button, timeline, words: widgets. lanes: the figure in the timeline.
    """

    def __init__(
        self,
        shows: Callable[[Mapping[str, Any]], go.Figure | None],
        settings_of: Callable[[int], Mapping[str, Any]],
    ) -> None:
        self._shows, self._settings_of = shows, settings_of
        self.table, self.words = ipw.HTML(), ipw.HTML()
        self.menu = ipw.Dropdown(
            options=[], tooltip="A point, the best first; a click in a figure chooses one too"
        )
        self.menu.layout.width = "min(250px, 100%)"
        self.button = ipw.Button(
            description="Show its timeline", icon="align-left", layout={"width": "auto"}, disabled=True,
            tooltip="Simulate the point's settings again and draw where its time goes",
        )  # fmt: skip
        self.lanes = SlimFigureWidget()
        # A figure's own classes are not followed by the page once it is there: the box around it is hidden.
        self.timeline = boxed(ipw.VBox([self.lanes]), "ps-hidden")
        self._picked: int | None = None
        self._is_quiet = False
        self.menu.observe(self._on_menu, "value")
        self.button.on_click(lambda _: self._on_click())

    def show(self, points: pd.DataFrame, kept: Sequence[int], objectives: Sequence[str]) -> None:
        """The best of the points that a brush leaves.

        Args:
            points: of the sweep. kept: numbers of finished ones.
        """
        finished = points[points["state"] == "finished"] if len(points) else points
        self.button.disabled = self.menu.disabled = not len(finished)
        if not len(finished):
            self.table.value, self.menu.options = "<p class='ps-soft'>No point yet.</p>", []
            return
        chosen = finished[finished["number"].isin(list(kept))]
        which = f"of the {len(chosen):,} that the brush leaves" if len(chosen) < len(finished) else "so far"
        shown = points_frame(chosen, objectives, BEST, like=points)
        html = f"<p class='ps-soft'>best {min(BEST, len(chosen))} {which}</p>{frame_html(shown)}"
        if self.table.value != html:
            self.table.value = html
        self._offer(chosen, points, objectives)

    def open(self, number: int) -> None:
        """Show the timeline of a point, and choose it in the menu."""
        try:
            figure = self._shows(self._settings_of(number))
        except PrescopeError as error:
            self.words.value = error_html(error)
            return
        self.words.value = f"<span class='ps-soft'>point {number}</span>"
        if number in [one for _, one in self.menu.options]:
            self.menu.value = number
        (self.timeline.remove_class if figure is not None else self.timeline.add_class)("ps-hidden")
        if figure is not None:
            self.lanes.show_figure(figure)

    def clear(self) -> None:
        """Another study's points come."""
        self.words.value, self._picked = "", None
        self.timeline.add_class("ps-hidden")

    def _offer(self, chosen: pd.DataFrame, points: pd.DataFrame, objectives: Sequence[str]) -> None:
        rows = best_first(chosen, objectives[0]).head(MOST_OFFERED)
        shown = points_frame(rows, objectives, MOST_OFFERED, like=points)
        head = shown.columns[0]
        options = [
            (f"point {number}: {formatted(value)} {head}", int(number))
            for number, value in shown[head].items()
        ]
        if list(self.menu.options) == options:
            return
        numbers = [number for _, number in options]
        self._is_quiet = True
        self.menu.options = options
        self.menu.value = self._picked if self._picked in numbers else numbers[0] if numbers else None
        self._is_quiet = False

    def _on_menu(self, change: Any) -> None:
        """What a person has picked stays, whatever comes; otherwise the menu stands at the best."""
        if not self._is_quiet:
            self._picked = change["new"]

    def _on_click(self) -> None:
        if self.menu.value is not None:
            self.open(self.menu.value)

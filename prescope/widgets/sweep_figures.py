"""The figures of a sweep side by side: brushed, clicked, and brought up to date in place while it goes on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as ipw
import pandas as pd
import plotly.graph_objects as go

from ..errors import UnsupportedOption
from ..views.sweep_front import plot_sweep_front, sweep_front_info
from ..views.sweep_heat import plot_sweep_heat, sweep_heat_info
from ..views.sweep_history import plot_sweep_history, sweep_history_info
from ..views.sweep_importances import plot_sweep_importances, sweep_importances_info
from ..views.sweep_parallel import SweepParallelInfo, brushed, plot_sweep_parallel, sweep_parallel_info
from ..views.sweep_points import moved_in
from .figures import SlimFigureWidget
from .style import boxed, named, row

NAMES = ("parallel", "heat", "front", "importances", "history")


class SweepFigures:
    """Parallel coordinates, heat map, importances, front and history of a table of points.

    Args:
        clicked: told the number of a point that was clicked. brushed: told the numbers that a brush leaves.

    Attributes:
        figures: by name. across, up: settings of the heat map. why_not: figure -> why it is not drawn. view: all of it.
    """

    def __init__(self, clicked: Callable[[int], None], brushed: Callable[[tuple[int, ...]], None]) -> None:
        self._clicked, self._brushed = clicked, brushed
        self._points = pd.DataFrame()
        self._info: SweepParallelInfo | None = None
        self._importances: Mapping[str, float] = {}
        self._objectives: tuple[str, ...] = ()
        self._is_quiet = False
        self._watched: set[int] = set()
        self.why_not: dict[str, str] = {}
        self.figures = {name: SlimFigureWidget() for name in NAMES}
        self._notes = {name: ipw.HTML() for name in NAMES}
        self.across, self.up = ipw.Dropdown(), ipw.Dropdown()
        for menu, what in ((self.across, "to the right"), (self.up, "upwards")):
            menu.layout.width = "108px"
            menu.tooltip = f"The heat map's setting {what}"
            menu.observe(self._on_pair, "value")
        self._pair = row(named("heat map of", self.across), named("and", self.up))
        parts = {name: ipw.VBox([self._notes[name], self.figures[name]]) for name in NAMES}
        parts["heat"].children = (self._pair, *parts["heat"].children)
        for box in parts.values():
            box.add_class("ps-hidden")  # empty axes say nothing: nothing stands there before the first point
        self._parts = parts
        grid = boxed(ipw.Box([parts[name] for name in NAMES[1:]]), "ps-pairs")
        self.view = boxed(ipw.VBox([parts["parallel"], grid]), "ps-figures")

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the finished points that the brush leaves."""
        return () if self._info is None else brushed(self._info, self._ranges())

    def show(self, points: pd.DataFrame, objectives: Sequence[str], importances: Mapping[str, float]) -> None:
        """Draw a table of points; the brush stays where it is.

        Args:
            objectives: of the sweep, its first gives the colours. importances: setting -> share; empty: not known yet.
        """
        self._points, self._objectives, self._importances = points, tuple(objectives), importances
        for box in self._parts.values():
            (box.remove_class if len(points) else box.add_class)("ps-hidden")
        self._offer_pair(moved_in(points) if len(points) else [])
        self._draw("parallel", self._parallel)
        self._draw("heat", self._heat)
        self._draw("front", self._front)
        self._draw("importances", self._shares)
        self._draw("history", self._history)
        self._brushed(self.kept)

    def plain(self) -> list[go.Figure]:
        """Those that are drawn, without widgets."""
        return [go.Figure(self.figures[name].to_dict()) for name in NAMES if name not in self.why_not]

    def clear(self) -> None:
        """Draw nothing: another study's points come."""
        self._info = None
        for name in NAMES:
            self.figures[name].data = ()
            self._parts[name].add_class("ps-hidden")
            self._say(name, "no point yet")

    # -- each figure -------------------------------------------------------------------------------------------

    def _parallel(self) -> go.Figure:
        former = self._ranges_by_name()
        self._info = sweep_parallel_info(self._points, self._objectives[0])
        figure = plot_sweep_parallel(self._info, brief=True)
        for axis, dimension in zip(self._info.axes, figure.data[0].dimensions, strict=True):
            if axis.name in former:
                dimension.constraintrange = former[axis.name]
        return figure

    def _heat(self) -> go.Figure:
        if self.across.value is None or self.up.value is None:
            raise UnsupportedOption("a heat map needs two settings that move")
        info = sweep_heat_info(self._points, self.across.value, self.up.value, self._objectives[0])
        return plot_sweep_heat(info, brief=True)

    def _front(self) -> go.Figure:
        if len(self._objectives) < 2:
            raise UnsupportedOption("a front needs two objectives")
        info = sweep_front_info(self._points, self._objectives[1], self._objectives[0])
        return plot_sweep_front(info, brief=True)

    def _shares(self) -> go.Figure:
        info = sweep_importances_info(self._points, self._importances, self._objectives[0])
        return plot_sweep_importances(info, brief=True)

    def _history(self) -> go.Figure:
        return plot_sweep_history(sweep_history_info(self._points, self._objectives[0]), brief=True)

    def _draw(self, name: str, make: Callable[[], go.Figure]) -> None:
        try:
            figure = make()
        except UnsupportedOption as error:
            self._say(name, str(error))
            return
        self._is_quiet = True
        try:
            self.figures[name].show_figure(figure)
        finally:
            self._is_quiet = False
        self._say(name, "")
        self._watch(name)

    def _say(self, name: str, why_not: str) -> None:
        """In place of a figure, why it is not there."""
        self._notes[name].value = f"<p class='ps-soft'>No {_TITLES[name]}: {why_not}.</p>" if why_not else ""
        (self.figures[name].add_class if why_not else self.figures[name].remove_class)("ps-hidden")
        if why_not:
            self.why_not[name] = why_not
        else:
            self.why_not.pop(name, None)

    # -- what a person does in them ----------------------------------------------------------------------------

    def _watch(self, name: str) -> None:
        """Traces are made anew when a figure first has some: each is watched once."""
        for trace in self.figures[name].data:
            if id(trace) in self._watched:
                continue
            self._watched.add(id(trace))
            if name == "parallel":
                trace.on_change(self._on_brush, "dimensions")
            elif name == "heat" and trace.type == "heatmap":
                trace.on_click(self._on_cell)
            elif name != "importances":
                trace.on_click(self._on_point)

    def _on_brush(self, *_: Any) -> None:
        if not self._is_quiet:
            self._brushed(self.kept)

    def _on_point(self, trace: Any, points: Any, _state: Any) -> None:
        for place in points.point_inds[:1]:
            if trace.customdata is not None:
                self._clicked(int(trace.customdata[place]))

    def _on_cell(self, trace: Any, points: Any, _state: Any) -> None:
        for x, y in zip(points.xs[:1], points.ys[:1], strict=True):
            number = trace.customdata[list(trace.y).index(str(y))][list(trace.x).index(str(x))]
            if number is not None:
                self._clicked(int(number))

    def _on_pair(self, _change: Any) -> None:
        if not self._is_quiet and len(self._points):
            self._draw("heat", self._heat)

    def _offer_pair(self, names: list[str]) -> None:
        if list(self.across.options) == names:
            return
        first = sorted(names, key=lambda name: -self._importances.get(name, 0.0))[:2]
        first.sort(
            key=lambda name: -self._points[name].map(repr).nunique()
        )  # there is more room to the right
        self._is_quiet = True
        chosen = [menu.value if menu.value in names else None for menu in (self.across, self.up)]
        for menu, former, place in ((self.across, chosen[0], 0), (self.up, chosen[1], 1)):
            menu.options = names
            menu.value = former or (first[place] if place < len(first) else None)
        self._is_quiet = False
        self._pair.layout.display = "" if len(names) > 1 else "none"

    def _ranges(self) -> dict[int, Any]:
        """Axis -> what is brushed on it."""
        if not self.figures["parallel"].data:
            return {}
        found = enumerate(self.figures["parallel"].data[0].dimensions)
        return {place: one.constraintrange for place, one in found if one.constraintrange is not None}

    def _ranges_by_name(self) -> dict[str, Any]:
        ranges = self._ranges()
        return {} if self._info is None else {self._info.axes[i].name: span for i, span in ranges.items()}


_TITLES = {
    "parallel": "parallel coordinates",
    "heat": "heat map",
    "front": "front",
    "importances": "importances",
    "history": "history",
}

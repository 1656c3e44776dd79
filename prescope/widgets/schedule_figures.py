"""The three figures of the schedule panel, and which steps and layers they show."""

from collections.abc import Callable
from typing import Any

import ipywidgets as ipw
import plotly.graph_objects as go

from ..simulator import SimResult
from ..traces.result import RunResult
from ..views.lanes import lanes_info, lanes_layout, lanes_traces, plot_lanes
from ..views.outcomes import outcomes_info, outcomes_layout, outcomes_traces, plot_outcomes
from ..views.step_times import plot_step_times, step_times_info, step_times_layout, step_times_traces
from .control import Control
from .figures import SlimFigureWidget
from .style import boxed

STEPS_SHOWN = 2


class ScheduleFigures:
    """Lanes of some steps, outcomes by layer, and times of all steps, of a simulated result and of a run beside it.

    Args:
        result: to begin with. moved: called when other steps or layers were chosen.

    Attributes:
        figures: name -> SlimFigureWidget: lanes, outcomes, step_times. steps, layers: sliders of what the lanes show;
            dragging over the times chooses steps too. ranges: the two as one row.
    """

    def __init__(self, result: SimResult, moved: Callable[[], None]) -> None:
        self._moved = moved
        self.steps, self.layers = ipw.IntRangeSlider(), ipw.IntRangeSlider()
        self._is_bounding = False
        self._axis_ms = 0.0
        self.bound(result)
        self.figures = {name: SlimFigureWidget(figure) for name, figure in self._plain(result, None).items()}
        steps = Control("steps", self.steps, "Decode steps whose lanes are drawn; or drag over the overview.")
        layers = Control("layers", self.layers, "MoE layers whose lanes are drawn.")
        self.ranges = boxed(ipw.Box([steps.view, layers.view]), "ps-controls")
        for one in (self.steps, self.layers):
            one.observe(self._on_range, "value")
        self.figures["step_times"].on_zoom("xaxis", self._on_dragged)

    @property
    def shown_steps(self) -> range:
        """Steps whose lanes are drawn."""
        first, last = self.steps.value
        return range(first, last + 1)

    @property
    def shown_layers(self) -> range | None:
        """MoE layers whose lanes are drawn; None: all."""
        first, last = self.layers.value
        is_all = (first, last) == (self.layers.min, self.layers.max)
        return None if is_all else range(first, last + 1)

    def bound(self, result: SimResult) -> None:
        """Offer the steps and layers that there are; the two steps behind the first one are shown."""
        there = result.needs.steps
        first, last = int(there[0]), int(there[-1])
        begin = min(first + 1, max(first, last - STEPS_SHOWN + 1))
        self._axis_ms = 0.0
        self._is_bounding = True
        try:
            _bound(self.steps, first, last, (begin, min(begin + STEPS_SHOWN - 1, last)))
            _bound(self.layers, 0, result.trace.num_layers - 1, None)
        finally:
            self._is_bounding = False

    def bound_to(self, result: SimResult) -> None:
        """As `bound`, if the result has other steps than those that are offered: another batch was chosen."""
        there = result.needs.steps
        if (self.steps.min, self.steps.max) != (int(there[0]), int(there[-1])):
            self.bound(result)

    def fit(self) -> None:
        """Show the whole of the steps again at the next drawing: the time axis stays as it was until this."""
        self._axis_ms = 0.0
        for figure in self.figures.values():
            figure.fit()

    def ends_beyond(self, result: SimResult) -> bool:
        """Whether the steps shown end beyond the time axis."""
        shown = result.steps[result.steps["step"].isin(list(self.shown_steps))]
        return bool(shown["dur_us"].sum() / 1e3 > 1.02 * self._axis_ms)

    def draw(self, result: SimResult, measured: RunResult | None, with_bound: bool) -> None:
        """Put numbers into all three."""
        shown = lanes_info(result, self.shown_steps, layers=self.shown_layers)
        beside = outcomes_info(result, measured)
        self._axis_ms = self._axis_ms or shown.end_ms
        parts: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
            "lanes": (lanes_traces(shown), lanes_layout(shown, self._axis_ms, brief=True)),
            "outcomes": (outcomes_traces(beside), outcomes_layout(beside, brief=True)),
        }
        for name, (traces, layout) in parts.items():
            self.figures[name].show_parts(traces, layout)
        self.draw_times(result, measured, with_bound)

    def draw_times(self, result: SimResult, measured: RunResult | None, with_bound: bool = True) -> None:
        """The times of all steps alone, whose bound may be known later than the rest."""
        times = step_times_info(result, measured, with_bound=with_bound)
        layout = step_times_layout(times, brief=True, chosen=self.shown_steps)
        self.figures["step_times"].show_parts(step_times_traces(times), layout)

    def plain(self, result: SimResult, measured: RunResult | None) -> list[go.Figure]:
        """The figures without widgets."""
        return list(self._plain(result, measured).values())

    def _plain(self, result: SimResult, measured: RunResult | None) -> dict[str, go.Figure]:
        return {
            "lanes": plot_lanes(lanes_info(result, self.shown_steps, layers=self.shown_layers)),
            "outcomes": plot_outcomes(outcomes_info(result, measured)),
            "step_times": plot_step_times(step_times_info(result, measured)),
        }

    def _on_range(self, _change: Any) -> None:
        if not self._is_bounding:
            self._axis_ms = 0.0
            self._moved()

    def _on_dragged(self, low: float, high: float) -> None:
        """Steps were marked in the overview, which itself goes on showing all of them."""
        first, last = (min(max(round(x), self.steps.min), self.steps.max) for x in (low, high))
        self.figures["step_times"].fit()
        self.steps.value = first, last


def _bound(slider: ipw.IntRangeSlider, low: int, high: int, value: tuple[int, int] | None) -> None:
    """Give a slider other ends, and a value between them: all of them unless one is given."""
    # No moment at which an end lies beyond the value: the widget would refuse it.
    slider.min, slider.max = min(low, slider.min), max(high, slider.max)
    slider.value = value or (low, high)
    slider.min, slider.max = low, high

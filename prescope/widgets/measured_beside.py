"""The measured lanes under the simulated ones."""

import ipywidgets as ipw

from ..simulator import SimResult
from ..traces.result import RunResult
from ..views.schedule_pair import (
    plot_schedule_pair,
    schedule_pair_info,
    schedule_pair_layout,
    schedule_pair_traces,
)
from .figures import SlimFigureWidget
from .showing import take_off
from .style import boxed


class MeasuredBeside:
    """One figure of two blocks of lanes; empty before the first run.

    Attributes:
        figure: the widget. view: what stands on the page.
    """

    def __init__(self) -> None:
        self.figure = SlimFigureWidget()
        self.view = boxed(ipw.VBox(), "ps-figures")

    def show(self, result: SimResult, run: RunResult, steps: range) -> None:
        """Draw both over these steps; a run without events shows nothing, and the former pair stays."""
        if run.events.empty:
            return
        there = run.steps[run.steps["phase"] == "decode"]["step"]
        # A cancelled run has fewer steps than the simulated one.
        first, last = (min(step, int(there.max())) for step in (steps.start, steps.stop - 1))
        info = schedule_pair_info(result, run, range(first, last + 1))
        if self.figure.data:
            self.figure.show_parts(schedule_pair_traces(info), schedule_pair_layout(info))
        else:
            self.figure.show_figure(plot_schedule_pair(info))
            self.view.children = (self.figure,)

    def close(self) -> None:
        """Take it off the page."""
        take_off(self.view, self.figure)

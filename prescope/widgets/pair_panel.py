"""Two schedules side by side, and why each expert of one layer went where it went."""

from html import escape
from typing import Any

import ipywidgets as ipw
import plotly.graph_objects as go
from IPython.display import HTML, display

from ..scheduler import SCHEDULES, schedule_named
from ..simulator import LayerExplanation, Scenario, Scenarios
from ..views.schedule_pair import (
    SchedulePairInfo,
    plot_schedule_pair,
    schedule_pair_info,
    schedule_pair_layout,
    schedule_pair_traces,
)
from .control import Control, rebound
from .figures import SlimFigureWidget, is_headless
from .showing import page_html, show_panel, take_off
from .style import boxed, panel
from .tables import frame_html


class PairPanel:
    """Lanes of two schedules on the same steps; below, one layer of one step and its experts under both.

    Raises:
        UnsupportedOption: there is no schedule of such a name.

    Attributes:
        upper, lower: schedules. `step`, `layer`: sliders. `figure`: the lanes. `tables`: the reasons.
    """

    def __init__(self, scenarios: Scenarios, scenario: Scenario, upper: str, lower: str) -> None:
        for name in (upper, lower):
            schedule_named(name)  # what is none is refused in words, and not by a menu
        self._scenarios, self._scenario = scenarios, scenario
        self._is_quiet = False
        options = [(schedule.title, name) for name, schedule in SCHEDULES.items()]
        self.upper, self.lower = (ipw.Dropdown(options=options, value=name) for name in (upper, lower))
        first, last = _ends(scenarios, scenario)
        self.step = ipw.IntSlider(value=min(first + 2, last), min=first, max=last, continuous_update=False)
        layers = scenarios.trace.num_layers
        self.layer = ipw.IntSlider(value=min(3, layers - 1), max=layers - 1, continuous_update=False)
        self.figure = SlimFigureWidget(plot_schedule_pair(self._info()))
        self.tables = ipw.HTML()
        fields = [
            Control("above", self.upper, "Schedule of the upper lanes."),
            Control("below", self.lower, "Schedule of the lower lanes."),
            Control("step", self.step, "Decode step that is drawn."),
            Control("MoE layer", self.layer, "Layer whose experts are explained below the lanes."),
        ]
        controls = boxed(ipw.Box([field.view for field in fields]), "ps-controls")
        self.view = panel(controls, boxed(ipw.VBox([self.figure]), "ps-figures"), self.tables)
        for control in (self.upper, self.lower, self.step, self.layer):
            control.observe(self._on_move, "value")
        self._tell()

    def state(self) -> dict[str, Any]:
        """Values of all controls."""
        return {
            "upper": self.upper.value,
            "lower": self.lower.value,
            "step": self.step.value,
            "layer": self.layer.value,
        }

    def redraw(self) -> None:
        """Draw what the controls say, in place."""
        info = self._info()
        self.figure.show_parts(schedule_pair_traces(info), schedule_pair_layout(info))
        self._tell()

    def explained(self) -> tuple[LayerExplanation, LayerExplanation]:
        """The chosen layer and step under both schedules."""
        upper, lower = (
            self._scenarios.explain(self._scenario_of(name), self.step.value, self.layer.value)
            for name in (self.upper.value, self.lower.value)
        )
        return upper, lower

    def use(self, scenarios: Scenarios, scenario: Scenario) -> None:
        """Go by another trace or other settings; step, layer and zoom stay where they were put.

        The upper schedule follows the setting's own until another one is chosen; so does the lower one where both would
        be the same.
        """
        self._is_quiet = True
        try:
            if self.upper.value == self._scenario.schedule:
                self.upper.value = scenario.schedule
            if self.lower.value == self.upper.value:
                self.lower.value = other_than(self.upper.value)
            self._scenarios, self._scenario = scenarios, scenario
            first, last = _ends(scenarios, scenario)
            rebound(self.step, first, last)
            rebound(self.layer, 0, scenarios.trace.num_layers - 1)
        finally:
            self._is_quiet = False
        self.redraw()

    def close(self) -> None:
        """Take the panel off the page."""
        take_off(self.view)

    def _on_move(self, _change: Any) -> None:
        if not self._is_quiet:
            self.redraw()

    def _scenario_of(self, name: str) -> Scenario:
        """The choice it was made with, for its own schedule; another schedule is as published."""
        return (
            self._scenario
            if name == self._scenario.schedule
            else self._scenarios.as_published(self._scenario, name)
        )

    def _info(self) -> SchedulePairInfo:
        upper, lower = (
            self._scenarios.run(self._scenario_of(name)) for name in (self.upper.value, self.lower.value)
        )
        return schedule_pair_info(upper, lower, range(self.step.value, self.step.value + 1))

    def _tell(self) -> None:
        self.tables.value = "".join(map(why_html, self.explained()))

    def _plain(self) -> go.Figure:
        return plot_schedule_pair(self._info())

    def _ipython_display_(self) -> None:
        if not is_headless():
            show_panel(self.view, self.tables.value, [self._plain()])
            return
        display(self._plain())
        display(HTML(page_html(self.tables.value)))


def other_than(schedule: str) -> str:
    """What a schedule is held against where nobody has chosen: on demand, or PreSched."""
    return "on-demand" if schedule != "on-demand" else "presched"


def _ends(scenarios: Scenarios, scenario: Scenario) -> tuple[int, int]:
    """First and last decode step."""
    steps = scenarios.simulator(scenario).needs.steps
    return int(steps[0]), int(steps[-1])


def why_html(why: LayerExplanation) -> str:
    """One layer's experts and the splits of its misses, as a table each."""
    experts = why.experts.drop(columns="reason").rename(
        columns={
            "by_link_us": "by the link, us",
            "by_cpu_us": "by the CPU, us",
            "predicted": "predicted one layer ahead",
        }
    )
    splits = why.splits.rename(
        columns={
            "waited": "late, waited for",
            "on_cpu": "on the CPU",
            "link_us": "link done, us",
            "gpu_us": "GPU done, us",
            "cpu_us": "CPU done, us",
            "layer_us": "layer done, us",
        }
    )
    splits["chosen"] = ["yes" if chosen else "" for chosen in splits["chosen"]]
    by_number = (frame.set_index(frame.columns[0]) for frame in (experts, splits))
    tables = "".join(map(frame_html, by_number))
    backlog = f"The link still owes {why.backlog_us:,.0f} us. " if why.backlog_us else ""
    return (
        f"<p><b>step {why.step}, MoE layer {why.moe_layer}</b>: {escape(why.words)}. {backlog}"
        f"({escape(why.label)})</p><div class='ps-row'>{tables}</div>"
    )

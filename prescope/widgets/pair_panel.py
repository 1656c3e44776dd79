"""Two schedules side by side, and why each expert of one layer went where it went."""

from html import escape
from typing import Any

import ipywidgets as ipw
import plotly.graph_objects as go
from IPython.display import HTML, display

from ..scheduler import SCHEDULES
from ..simulator import LayerExplanation, Scenario, Scenarios
from ..views.schedule_pair import (
    SchedulePairInfo,
    plot_schedule_pair,
    schedule_pair_info,
    schedule_pair_layout,
    schedule_pair_traces,
)
from .figures import SlimFigureWidget, is_headless


class PairPanel:
    """Lanes of two schedules on the same steps; below, one layer of one step and its experts under both.

    Attributes:
        upper, lower: schedules. `step`, `layer`: sliders. `figure`: the lanes. `tables`: the reasons.
    """

    def __init__(self, scenarios: Scenarios, scenario: Scenario, upper: str, lower: str) -> None:
        self._replays, self._choice = scenarios, scenario
        options = [(schedule.title, name) for name, schedule in SCHEDULES.items()]
        slim = {"width": "300px"}
        self.upper = ipw.Dropdown(options=options, value=upper, description="above", layout=slim)
        self.lower = ipw.Dropdown(options=options, value=lower, description="below", layout=slim)
        steps = scenarios.simulator(scenario).needs.steps
        self.step = ipw.IntSlider(
            value=int(steps[min(2, len(steps) - 1)]), min=int(steps[0]), max=int(steps[-1]), description="step",
            continuous_update=False, layout={"width": "400px"},
        )  # fmt: skip
        self.layer = ipw.IntSlider(
            value=min(3, scenarios.trace.num_layers - 1), max=scenarios.trace.num_layers - 1, description="MoE layer",
            continuous_update=False, layout={"width": "400px"},
        )  # fmt: skip
        self.figure = SlimFigureWidget(plot_schedule_pair(self._info()))
        self.tables = ipw.HTML()
        self.view = ipw.VBox(
            [ipw.HBox([self.upper, self.lower]), ipw.HBox([self.step, self.layer]), self.figure, self.tables]
        )
        for control in (self.upper, self.lower, self.step, self.layer):
            control.observe(lambda _: self.redraw(), "value")
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
            self._replays.explain(self._choice_of(name), self.step.value, self.layer.value)
            for name in (self.upper.value, self.lower.value)
        )
        return upper, lower

    def close(self) -> None:
        """Take the panel off the page."""
        for widget in (self.figure, self.view):
            widget.close()

    def _choice_of(self, name: str) -> Scenario:
        """The choice it was made with, for its own schedule; another schedule is as published."""
        return (
            self._choice if name == self._choice.schedule else self._replays.as_published(self._choice, name)
        )

    def _info(self) -> SchedulePairInfo:
        upper, lower = (
            self._replays.run(self._choice_of(name)) for name in (self.upper.value, self.lower.value)
        )
        return schedule_pair_info(upper, lower, range(self.step.value, self.step.value + 1))

    def _tell(self) -> None:
        self.tables.value = "".join(map(why_html, self.explained()))

    def _plain(self) -> go.Figure:
        return plot_schedule_pair(self._info())

    def _ipython_display_(self) -> None:
        if not is_headless():
            display(self.view)
            return
        display(self._plain())
        display(HTML(self.tables.value))


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
            "on_cpu": "on the CPU",
            "link_us": "link done, us",
            "gpu_us": "GPU done, us",
            "cpu_us": "CPU done, us",
            "layer_us": "layer done, us",
        }
    )
    splits["chosen"] = ["yes" if chosen else "" for chosen in splits["chosen"]]
    tables = "".join(
        frame.to_html(index=False, border=0, float_format=_number, na_rep="") for frame in (experts, splits)
    )
    backlog = f"The link still owes {why.backlog_us:,.0f} us. " if why.backlog_us else ""
    return (
        f"<p><b>step {why.step}, MoE layer {why.moe_layer}</b>: {escape(why.words)}. {backlog}"
        f"({escape(why.label)})</p><div style='display:flex;gap:2em;flex-wrap:wrap'>{tables}</div>"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2f}"

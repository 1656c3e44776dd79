"""A slider of slots that runs the model again."""

from html import escape
from typing import Any

import ipywidgets as ipw
import plotly.graph_objects as go
from IPython.display import HTML, display

from .. import views
from ..core.units import GIB, format_bytes
from ..engine.job import Job, NamedPrompts
from ..traces.result import RunResult
from .control import Control
from .figures import SlimFigureWidget, is_headless
from .job_controls import JobControls
from .runner import RealRunner
from .showing import show_panel, take_off
from .style import boxed, panel, row


class SlotsPanel:
    """A slider of slots that re-runs the prompts and updates timeline, hit rate and latency in place.

    Releasing the slider starts a run in the background; a run under way is cancelled first. A run that fails, or that
    is cancelled before its second token, leaves the figures as they are.

    Attributes:
        slots, step: sliders. controls: button, bar, status.
        figures: name -> SlimFigureWidget.
        result: the run that is shown, or None.
    """

    def __init__(self, runner: RealRunner, prompts: NamedPrompts, keywords: dict[str, Any]) -> None:
        self._runner, self._prompts, self._keywords = runner, prompts, keywords
        engine = runner.engine
        total, self._row_bytes = engine.shape.total_experts, engine.shape.row_bytes
        self._total = total
        self.result: RunResult | None = None
        self.slots = ipw.IntSlider(
            value=engine.num_slots, min=max(1, engine.shape.top_k), max=total, continuous_update=False
        )
        self.step = ipw.IntSlider(min=0, max=0, continuous_update=False)
        self._slots_field = Control(
            "slots", self.slots, "Places for experts on the device; releasing the slider runs again."
        )
        self._step_field = Control("first step", self.step, "First of the steps whose lanes are drawn.")
        self.controls = JobControls("Run", self.start, self._shown)
        # Made here and not when the first run ends: that is in another thread.
        self.figures = {name: SlimFigureWidget() for name in ("timeline", "hit_rate", "latency")}
        self._figure_box = boxed(ipw.VBox(), "ps-figures")
        fields = boxed(ipw.Box([self._slots_field.view, self._step_field.view]), "ps-controls")
        self.view = panel(fields, row(self.controls.view), self._figure_box)
        self._label_slots()
        self.slots.observe(self._on_slots, "value")
        self.step.observe(self._on_step_slider, "value")
        with_decode = [run for run in runner.runs if _has_decode(run)]
        if with_decode:
            self._show(with_decode[-1])

    @property
    def job(self) -> Job | None:
        """The latest job, or None."""
        return self.controls.job

    def state(self) -> dict[str, Any]:
        """Values of all controls, and what the panel shows."""
        return {
            "slots": self.slots.value,
            "slots_frac": self.slots.value / self._total,
            "slots_gib": self.slots.value * self._row_bytes / GIB,
            "first_step": self.step.value,
            "running": self.controls.is_running,
            "shown_slots": None if self.result is None else self.result.config["num_slots"],
            "status": self.controls.status.value,
        }

    def start(self) -> Job:
        """Run the prompts with the slots of the slider, in the background."""
        self.controls.cancel()
        job = self._runner.prepare(self._prompts, slots=self.slots.value, **self._keywords)
        return self.controls.watch(job, self._runner.is_running)

    def cancel(self) -> None:
        """End the run after the token it is at; the figures then show what there is."""
        self.controls.cancel()

    def close(self) -> None:
        """Stop the run and take the panel off the page; the former result stays in the runner."""
        self.controls.close()
        take_off(self.view, *self.figures.values())

    def _label_slots(self) -> None:
        count = self.slots.value
        size = format_bytes(count * self._row_bytes)
        self._slots_field.say(
            f"<b>{100 * count / self._total:.0f} %</b> = {count} of {self._total} experts = {size}"
        )

    def _on_slots(self, _change: Any) -> None:
        self._label_slots()
        self.start()

    def _on_step_slider(self, _change: Any) -> None:
        if self.result is not None and not self.result.events.empty:
            self.figures["timeline"].show_figure(views.timeline(self.result, self._steps()))

    def _steps(self) -> range:
        return range(self.step.value, self.step.value + 2)

    def _shown(self, job: Job) -> str:
        run = job.result()
        if _has_decode(run):
            self._show(run)
            return ""
        return "" if self.result is None else "before the second token; the figures show the former run"

    def _show(self, run: RunResult) -> None:
        is_first, self.result = self.result is None, run
        self.step.max = max(0, len(run.steps) - 2)
        self._step_field.allow("" if self.step.max else "there is one step only")
        if is_first and not run.events.empty:
            self.step.value = views.lanes_info(run).steps[0].step
        figures = _figures(run, self._steps())
        for name, figure in figures.items():
            self.figures[name].show_figure(figure)
        self._figure_box.children = tuple(self.figures[name] for name in figures)

    def _ipython_display_(self) -> None:
        if not is_headless():
            shown = () if self.result is None else _figures(self.result, self._steps()).values()
            show_panel(self.view, f"<p>Slots: {self._slots_field.note}</p>", list(shown))
            return
        display(HTML(f"<p>Slots: {self._slots_field.note}</p>"))
        if self.result is None:
            display(HTML(f"<p>{escape('no run yet: session.run(prompts, max_new_tokens=32)')}</p>"))
            return
        for figure in _figures(self.result, self._steps()).values():
            display(figure)


def _has_decode(run: RunResult) -> bool:
    return bool((run.steps["phase"] == "decode").any())


def _figures(run: RunResult, steps: range) -> dict[str, go.Figure]:
    """The panel's figures that this run has the evidence for."""
    figures = {} if run.events.empty else {"timeline": views.timeline(run, steps)}
    return figures | {"hit_rate": views.hit_rate(run), "latency": views.latency(run)}

"""A slider of slots that runs the model again."""

import time
from concurrent.futures import CancelledError
from html import escape
from typing import Any

import ipywidgets as ipw
import plotly.graph_objects as go
from IPython.display import HTML, display

from .. import views
from ..core.units import GIB, format_bytes
from ..engine.job import Job, NamedPrompts
from ..traces.result import RunResult
from .figures import UPDATE_S, SlimFigureWidget, is_headless
from .runner import Runner


class SlotsPanel:
    """A slider of slots that re-runs the prompts and updates timeline, hit rate and latency in place.

    Releasing the slider starts a run in the background; a run under way is cancelled first. A run that fails
    leaves the figures as they are and shows the error.

    Attributes:
        slots, step: sliders. run_button, cancel_button, bar, status: the other controls.
        figures: name -> SlimFigureWidget.
        result: the run that is shown, or None.
        job: the latest job, or None.
    """

    def __init__(self, runner: Runner, prompts: NamedPrompts, keywords: dict[str, Any]) -> None:
        self._runner, self._prompts, self._keywords = runner, prompts, keywords
        engine = runner.engine
        total, self._row_bytes = engine.shape.total_experts, engine.shape.row_bytes
        self._total = total
        self.result: RunResult | None = None
        self.job: Job | None = None
        self._updated = 0.0
        self.slots = ipw.IntSlider(
            value=engine.num_slots, min=max(1, engine.shape.top_k), max=total, continuous_update=False,
            description="slots", readout=False, layout={"width": "420px"},
        )  # fmt: skip
        self.label = ipw.HTML()
        self.run_button = ipw.Button(description="Run", icon="play", button_style="primary")
        self.cancel_button = ipw.Button(description="Cancel", icon="stop", disabled=True)
        self.bar = ipw.FloatProgress(min=0, max=1, layout={"width": "220px"})
        self.status = ipw.HTML()
        self.step = ipw.IntSlider(
            min=0, max=0, description="first step", continuous_update=False, layout={"width": "420px"}
        )
        # Made here and not when the first run ends: that is in another thread.
        self.figures = {name: SlimFigureWidget() for name in ("timeline", "hit_rate", "latency")}
        self._figure_box = ipw.VBox()
        self.view = ipw.VBox(
            [
                ipw.HBox([self.slots, self.label]),
                ipw.HBox([self.run_button, self.cancel_button, self.bar, self.status]),
                self.step,
                self._figure_box,
            ]
        )
        self._label_slots()
        self.slots.observe(self._on_slots, "value")
        self.step.observe(self._on_step_slider, "value")
        self.run_button.on_click(lambda _: self.start())
        self.cancel_button.on_click(lambda _: self.cancel())
        if runner.runs:
            self._show(runner.runs[-1])

    def state(self) -> dict[str, Any]:
        """Values of all controls, and what the panel shows."""
        return {
            "slots": self.slots.value,
            "slots_frac": self.slots.value / self._total,
            "slots_gib": self.slots.value * self._row_bytes / GIB,
            "first_step": self.step.value,
            "running": self.job is not None and not self.job.is_done,
            "shown_slots": None if self.result is None else self.result.config["num_slots"],
            "status": self.status.value,
        }

    def start(self) -> Job:
        """Run the prompts with the slots of the slider, in the background."""
        self.cancel()
        self._busy(True)
        self.status.value = "waiting for the former run" if self._runner.is_running else "running"
        self.job = self._runner.prepare(self._prompts, slots=self.slots.value, **self._keywords)
        self.job.on_step(self._on_token)
        self.job.on_done(self._on_done)
        return self.job.start()

    def cancel(self) -> None:
        """End the run after the token it is at; the figures then show what there is."""
        if self.job is not None:
            self.job.cancel()

    def close(self) -> None:
        """Stop the run and take the panel off the page; the former result stays in the runner."""
        self.cancel()
        self.job = None
        for widget in (*self.figures.values(), self.view):
            widget.close()

    def _label_slots(self) -> None:
        count = self.slots.value
        self.label.value = (
            f"<b>{100 * count / self._total:.0f} %</b> = {count} of {self._total} experts = "
            f"{count * self._row_bytes / GIB:.3g} GiB ({format_bytes(count * self._row_bytes)})"
        )

    def _busy(self, busy: bool) -> None:
        self.cancel_button.disabled = not busy
        self.bar.value = 0.0 if busy else 1.0
        self.bar.bar_style = "info" if busy else "success"

    def _on_slots(self, _change: Any) -> None:
        self._label_slots()
        self.start()

    def _on_step_slider(self, _change: Any) -> None:
        if self.result is not None and not self.result.events.empty:
            self.figures["timeline"].show_figure(views.timeline(self.result, self._steps()))

    def _steps(self) -> range:
        return range(self.step.value, self.step.value + 2)

    def _on_token(self, job: Job) -> None:
        if job is self.job and time.monotonic() - self._updated > UPDATE_S:
            self._updated = time.monotonic()
            self.bar.value = job.progress
            self.status.value = f"{job.num_tokens} tokens"

    def _on_done(self, job: Job) -> None:
        """Runs in the job's thread; a job that a newer one has replaced shows nothing."""
        if job is not self.job:
            return
        self._busy(False)
        error = job.error
        if error is None:
            self._show(job.result())
            self.bar.bar_style = "warning" if job.is_cancelled else "success"
            self.status.value = "; ".join(["done", *map(escape, job.result().notes)])
        elif isinstance(error, CancelledError):
            self.status.value = "cancelled before the first token; the figures show the former run"
        else:
            self.bar.bar_style = "danger"
            text = f"<b>{escape(type(error).__name__)}</b>: {escape(str(error))}"
            self.status.value = f"{text} The figures show the former run."

    def _show(self, run: RunResult) -> None:
        is_first, self.result = self.result is None, run
        self.step.max = max(0, len(run.steps) - 2)
        if is_first and not run.events.empty:
            self.step.value = views.timeline_info(run).steps[0].step
        figures = _figures(run, self._steps())
        for name, figure in figures.items():
            self.figures[name].show_figure(figure)
        self._figure_box.children = tuple(self.figures[name] for name in figures)

    def _ipython_display_(self) -> None:
        if not is_headless():
            display(self.view)
            return
        display(HTML(f"<p>Slots: {self.label.value}</p>"))
        for figure in _figures(self.result, self._steps()).values() if self.result is not None else ():
            display(figure)


def _figures(run: RunResult, steps: range) -> dict[str, go.Figure]:
    """The panel's figures that this run has the evidence for."""
    has_decode = (run.steps["phase"] == "decode").any()
    figures = {} if run.events.empty else {"timeline": views.timeline(run, steps)}
    if has_decode:
        figures |= {"hit_rate": views.hit_rate(run), "latency": views.latency(run)}
    return figures

"""Sliders for everything a schedule can be told; each move simulates the recorded trace again, a button runs it."""

import asyncio
import gc
import math
import threading
import time
from concurrent.futures import CancelledError
from html import escape
from typing import Any, NamedTuple

import ipywidgets as ipw
import plotly.graph_objects as go
from IPython.display import HTML, display

from ..cache.policies import POLICIES
from ..core.units import format_bytes
from ..engine.job import Job, NamedPrompts
from ..errors import PrescopeError
from ..scheduler import SCHEDULES
from ..simulator import NOISY, Scenario, Scenarios, SimResult
from ..traces.result import RunResult
from ..views.lanes import lanes_info, lanes_layout, lanes_traces, plot_lanes
from ..views.outcomes import outcomes_info, outcomes_layout, outcomes_traces, plot_outcomes
from ..views.step_times import plot_step_times, step_times_info, step_times_layout, step_times_traces
from .figures import UPDATE_S, SlimFigureWidget, is_headless
from .runner import Runner

#: Between two redraws while a slider is dragged; the last position is always drawn.
REDRAW_S = 0.15
STEPS_SHOWN = 2
_OWN = "the schedule's own"


class Drawn(NamedTuple):
    """How long the last move took."""

    simulated_ms: float
    drawn_ms: float


class SchedulePanel:
    """What would another schedule have done? And does it, for real?

    Moving anything simulates and redraws at once. "Run it for real" runs the prompts with the same settings on the
    engine, in the background, and lays what was measured over what was simulated; it stays as long as the settings do.

    Attributes:
        choice: the settings as they stand. `result`: simulated with them.
        measured: the run of these very settings, or None.
        figures: name -> SlimFigureWidget: lanes, outcomes, step_times.
        drawn: how long the last move took.
        job: the latest real run, or None.
    """

    def __init__(
        self, runner: Runner, scenarios: Scenarios, prompts: NamedPrompts, keywords: dict[str, Any]
    ) -> None:
        self._runner, self._replays = runner, scenarios
        self._prompts, self._keywords = prompts, keywords
        self._lock = threading.Lock()
        self._is_quiet = False  # several controls change together
        self._updated = self._redrawn = 0.0
        self._later: asyncio.TimerHandle | None = None
        self._runs: dict[Scenario, RunResult] = {}
        self.job: Job | None = None
        self._make_controls()
        self._adopt(SCHEDULES[self.schedule.value])
        self._running: Scenario | None = None
        self.result: SimResult = scenarios.run(self.scenario)
        self.step.min, self.step.max = self._step_bounds()
        self.step.value = min(self.step.max, self.step.min + 1)
        self.figures = {name: SlimFigureWidget(figure) for name, figure in self._plain().items()}
        self.drawn = Drawn(0.0, 0.0)
        self.view = ipw.VBox(
            [
                ipw.HBox([self.schedule, self.predictor, self.recall]),
                ipw.HBox([self.machine, self.cache, self.cpu]),
                ipw.HBox([self.slots, self.slots_label]),
                ipw.HBox([self.lookahead, self.width, self.threshold]),
                self.numbers,
                ipw.HBox([self.run_button, self.cancel_button, self.bar, self.status]),
                self.step,
                *self.figures.values(),
            ]
        )
        for control in self._controls:
            control.observe(self._on_control, "value")
        self.schedule.observe(self._on_schedule, "value")
        self.step.observe(lambda _: self._soon(), "value")
        self.run_button.on_click(lambda _: self.start())
        self.cancel_button.on_click(lambda _: self.cancel())
        self.redraw()
        # With torch and transformers imported a full collection takes 300 ms (2-core machine): a slider would hang.
        gc.collect()
        gc.freeze()

    def _make_controls(self) -> None:
        scenarios, shape = self._replays, self._runner.engine.shape
        wide, slim = {"width": "400px"}, {"width": "300px"}
        self.schedule = ipw.Dropdown(
            options=[(schedule.title, name) for name, schedule in SCHEDULES.items()], value="presched",
            description="schedule", layout=slim,
        )  # fmt: skip
        self.predictor = ipw.Dropdown(options=scenarios.predictor_names, description="predictor", layout=slim)
        self.recall = ipw.FloatSlider(
            value=0.8, min=math.ceil(20 * shape.top_k / shape.num_experts) / 20, max=1.0, step=0.05,
            description="its recall", layout=slim, disabled=True,
        )  # fmt: skip
        self.machine = ipw.Dropdown(options=list(scenarios.machines), description="machine", layout=wide)
        self.cache = ipw.Dropdown(options=[_OWN, *POLICIES], description="cache", layout=slim)
        self.cpu = ipw.Checkbox(value=True, description="CPU lane", indent=False, layout={"width": "110px"})
        self.slots = ipw.IntSlider(
            value=self._runner.engine.num_slots, min=max(1, shape.top_k), max=scenarios.num_experts,
            description="slots", readout=False, layout=wide,
        )  # fmt: skip
        self.slots_label = ipw.HTML()
        self.lookahead = ipw.IntSlider(value=1, min=1, max=4, description="lookahead", layout=slim)
        self.width = ipw.IntSlider(value=1, min=0, max=shape.num_experts, description="width", layout=slim)
        self.threshold = ipw.FloatSlider(
            value=0.0, min=0.0, max=1.0, step=0.01, description="threshold", layout=slim
        )
        self.step = ipw.IntSlider(description="first step", layout=wide)
        self.numbers, self.status = ipw.HTML(), ipw.HTML()
        self.run_button = ipw.Button(description="Run it for real", icon="play", button_style="primary")
        self.cancel_button = ipw.Button(description="Cancel", icon="stop", disabled=True)
        self.bar = ipw.FloatProgress(min=0, max=1, layout={"width": "220px"})
        self._controls = (
            self.predictor, self.recall, self.machine, self.cache, self.cpu, self.slots, self.lookahead, self.width,
            self.threshold,
        )  # fmt: skip

    # -- what is chosen ----------------------------------------------------------------------------------------

    @property
    def scenario(self) -> Scenario:
        """The settings as the controls stand."""
        return Scenario(
            schedule=self.schedule.value,
            slots=self.slots.value,
            cache=None if self.cache.value == _OWN else self.cache.value,
            predictor=self.predictor.value,
            recall=round(self.recall.value, 3),
            lookahead=self.lookahead.value,
            width=self.width.value,
            threshold=round(self.threshold.value, 3),
            cpu=self.cpu.value,
            machine=self.machine.value,
        )

    def choose(self, scenario: Scenario) -> None:
        """Put all controls where a choice has them, and redraw once."""
        full = self._replays.resolved(scenario)
        self._is_quiet = True
        try:
            self.schedule.value, self.predictor.value = full.schedule, full.predictor
            self.cache.value = scenario.cache or _OWN
            self.machine.value, self.cpu.value, self.slots.value = (
                scenario.machine,
                scenario.cpu,
                scenario.slots,
            )
            self.recall.value, self.threshold.value = scenario.recall, full.threshold
            self.lookahead.value, self.width.value = max(1, full.lookahead or 0), full.width
        finally:
            self._is_quiet = False
        self.redraw()

    def state(self) -> dict[str, Any]:
        """Values of all controls, and what the panel shows."""
        return {
            **vars_of(self.scenario),
            "first_step": self.step.value,
            "running": self.job is not None and not self.job.is_done,
            "tokens_per_s": self.result.tokens_per_s,
            "measured_tokens_per_s": None if self.measured is None else self.measured.metrics.tokens_per_s,
            "status": self.status.value,
        }

    @property
    def measured(self) -> RunResult | None:
        """The run of these very settings, if there was one."""
        return self._runs.get(self._replays.resolved(self.scenario))

    def _adopt(self, schedule: Any) -> None:
        """Controls take the schedule's own values."""
        own = self._replays.resolved(Scenario(schedule=schedule.name, slots=self.slots.value))
        self.cache.value, self.predictor.value = _OWN, own.predictor
        self.lookahead.value, self.width.value = max(1, own.lookahead or 0), own.width
        self.threshold.value = own.threshold

    # -- real runs ---------------------------------------------------------------------------------------------

    def start(self) -> Job:
        """Run the prompts with these settings on the engine, in the background.

        Raises:
            UnsupportedOption: they can only be simulated.
        """
        self.cancel()
        scenario = self._replays.resolved(self.scenario)
        settings = self._replays.engine_settings(scenario)
        self._busy(True)
        self.status.value = "waiting for the former run" if self._runner.is_running else "running"
        self._running = scenario
        self.job = self._runner.prepare(self._prompts, configure=settings, **self._keywords)
        self.job.on_step(self._on_token)
        self.job.on_done(self._on_done)
        return self.job.start()

    def cancel(self) -> None:
        """End the real run after the token it is at."""
        if self.job is not None:
            self.job.cancel()

    def close(self) -> None:
        """Stop the run and take the panel off the page; its results stay."""
        self.cancel()
        self.job = None
        if self._later is not None:
            self._later.cancel()
        for widget in (*self.figures.values(), self.view):
            widget.close()
        gc.unfreeze()

    def _busy(self, busy: bool) -> None:
        self.cancel_button.disabled = not busy
        self.bar.value = 0.0 if busy else 1.0
        self.bar.bar_style = "info" if busy else "success"

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
            run = job.result()
            if self._running is not None and (run.steps["phase"] == "decode").any():
                self._runs[self._running] = run
            self.bar.bar_style = "warning" if job.is_cancelled else "success"
            self.status.value = "; ".join(["done", *map(escape, run.notes)])
            self.redraw()
        elif isinstance(error, CancelledError):
            self.status.value = "cancelled before the first token"
        else:
            self.bar.bar_style = "danger"
            self.status.value = f"<b>{escape(type(error).__name__)}</b>: {escape(str(error))}"

    # -- drawing -----------------------------------------------------------------------------------------------

    def _on_schedule(self, _change: Any) -> None:
        if self._is_quiet:
            return
        self._is_quiet = True
        try:
            self._adopt(SCHEDULES[self.schedule.value])
        finally:
            self._is_quiet = False
        self._soon()

    def _on_control(self, _change: Any) -> None:
        if not self._is_quiet:
            self._soon()

    def _soon(self) -> None:
        """Redraw now, or, while a slider is dragged, when the last redraw is long enough ago."""
        wait = self._redrawn + REDRAW_S - time.monotonic()
        loop = _running_loop()
        if wait <= 0 or loop is None:
            self.redraw()
        elif self._later is None:
            self._later = loop.call_later(wait, self._redraw_later)

    def _redraw_later(self) -> None:
        self._later = None
        self.redraw()

    def redraw(self) -> None:
        """Simulate the choice and put its numbers into the figures; settings that cannot be are told in words."""
        with self._lock:
            begin = time.perf_counter()
            try:
                self.result = self._replays.run(self.scenario)
            except PrescopeError as error:
                self.numbers.value = f"<b>{escape(type(error).__name__)}</b>: {escape(str(error))}"
                return
            middle = time.perf_counter()
            for name, (traces, layout) in self._parts().items():
                self.figures[name].show_parts(traces, layout)
            self.drawn = Drawn(1e3 * (middle - begin), 1e3 * (time.perf_counter() - middle))
            self._say()
            self._redrawn = time.monotonic()

    def _steps(self) -> range:
        return range(self.step.value, self.step.value + STEPS_SHOWN)

    def _step_bounds(self) -> tuple[int, int]:
        steps = self.result.needs.steps
        return int(steps[0]), max(int(steps[0]), int(steps[-1]) - STEPS_SHOWN + 1)

    def _parts(self) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
        shown, beside, times = (
            lanes_info(self.result, self._steps()),
            outcomes_info(self.result, self.measured),
            step_times_info(self.result, self.measured),
        )
        return {
            "lanes": (lanes_traces(shown), lanes_layout(shown)),
            "outcomes": (outcomes_traces(beside), outcomes_layout(beside)),
            "step_times": (step_times_traces(times), step_times_layout(times)),
        }

    def _plain(self) -> dict[str, go.Figure]:
        """The figures without widgets."""
        return {
            "lanes": plot_lanes(lanes_info(self.result, self._steps())),
            "outcomes": plot_outcomes(outcomes_info(self.result, self.measured)),
            "step_times": plot_step_times(step_times_info(self.result, self.measured)),
        }

    def _say(self) -> None:
        scenario, total, count = self.scenario, self._replays.num_experts, self.slots.value
        full, machine = self._replays.resolved(scenario), self._replays.machine(scenario)
        self.recall.disabled = full.predictor != NOISY
        self.cpu.disabled = not self._replays.has_cpu(scenario)
        size = format_bytes(count * machine.row_bytes)
        self.slots_label.value = f"<b>{100 * count / total:.0f} %</b> = {count} of {total} experts = {size}"
        notes = "".join(f"<br>{escape(note)}" for note in self.result.notes)
        self.numbers.value = (
            f"<b>simulated</b>: {self.result.tokens_per_s:,.3g} tokens/s; simulated in {self.drawn.simulated_ms:.0f} "
            f"ms, drawn in {self.drawn.drawn_ms:.0f} ms{notes}"
        )
        reason = self._replays.why_not_here(scenario)
        self.run_button.disabled, self.run_button.tooltip = bool(reason), reason

    def _ipython_display_(self) -> None:
        if not is_headless():
            display(self.view)
            return
        display(HTML(f"<p>{self.slots_label.value}<br>{self.numbers.value}</p>"))
        for figure in self._plain().values():
            display(figure)


def vars_of(scenario: Scenario) -> dict[str, Any]:
    """A choice as plain values."""
    return {name: getattr(scenario, name) for name in scenario.__dataclass_fields__}


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The kernel's loop, when a message of the page is being handled; None in tests and in other threads."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

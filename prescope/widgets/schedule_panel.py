"""Sliders for everything a schedule can be told; each move simulates the recorded trace again, a button runs it."""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any, NamedTuple

import ipywidgets as ipw
import plotly.graph_objects as go

from ..core.units import count_of
from ..engine.job import Job, NamedPrompts
from ..errors import PrescopeError
from ..simulator import Scenario, Scenarios, SimResult, verdict
from ..traces.result import RunResult
from ..views.numbers import NO_BOUND, Numbers, bound_numbers, numbers, numbers_there, spread_frac
from .measured_beside import MeasuredBeside
from .numbers_table import NumbersTable
from .presets import Presets
from .real_run import RealRun
from .rest_timer import RestTimer, Throttle, is_alone
from .runner import RealRunner
from .schedule_figures import ScheduleFigures
from .settings import ScenarioControls
from .showing import show_panel, take_off
from .style import boxed, panel, row

#: Between two redraws while a slider is dragged; the last position is always drawn.
REDRAW_S = 0.15
#: A slider at rest for so long is asked whether prediction pays there: that takes several simulations.
REST_S = 0.25


class Drawn(NamedTuple):
    """How long the last move took."""

    simulated_ms: float
    drawn_ms: float


class _Pinned(NamedTuple):
    """A baseline."""

    name: str
    simulated: Numbers
    measured: Numbers | None

    def beside(self, run: RunResult | None) -> Numbers:
        """Its numbers of the kind that a setting has: the simulator may be off by more than settings differ."""
        return self.simulated if run is None or self.measured is None else self.measured


class SchedulePanel:
    """What would another schedule have done? And does it, for real?

    Moving anything simulates and redraws at once. "Run it for real" runs the prompts with the same settings on the
    engine, in the background, and lays what was measured over what was simulated; it stays as long as the settings do.

    Args:
        runner: of real runs; None: what is shown was recorded elsewhere, and can only be simulated.
        slots: where the slider starts; the engine's slots by default.
        how_to_measure: what a person who reads that this machine's CPU was not measured is told to do.

    Attributes:
        settings: the controls. scenario: what they say. result: simulated with them.
        measured: the latest run of these very settings, or None.
        figures: name -> SlimFigureWidget: lanes, outcomes, step_times.
        real: the part that runs, or None. numbers: the table.
        steps, layers: which of them the lanes show; dragging over the overview chooses steps too.
        drawn: how long the last move took.
        parts: the same widgets one by one, for who lays them out otherwise: numbers, live, real. view: all of them.
    """

    def __init__(
        self,
        runner: RealRunner | None,
        scenarios: Scenarios,
        prompts: NamedPrompts,
        keywords: dict[str, Any],
        *,
        slots: int | None = None,
        how_to_measure: str = "run prescope.calibrate(session.engine), then session.scenarios(profile=...)",
    ) -> None:
        self._runner, self._scenarios = runner, scenarios
        self._lock = threading.RLock()  # a redraw without a loop advises at once
        self._is_advised = False
        self._throttle = Throttle(self.redraw, REDRAW_S)
        self._resting = RestTimer(self._advise, REST_S)
        self._runs: dict[Scenario, list[RunResult]] = {}
        self._regrouped: dict[int, Scenarios] = {}
        self._pinned: _Pinned | None = None
        self.presets = Presets(lambda: self._scenarios, lambda: self.scenario, self.choose)
        self._watchers: list[Callable[[], None]] = []
        start = slots or (runner.engine.num_slots if runner is not None else scenarios.num_experts // 2)
        self.settings = ScenarioControls(scenarios, start, self._throttle.call, self._regroup, how_to_measure)
        self.result: SimResult = scenarios.run(self.scenario)
        self.drawn = Drawn(0.0, 0.0)
        self.numbers = NumbersTable()
        self.told = ipw.HTML()
        self.drawing = ScheduleFigures(self.result, self._throttle.call)
        self.steps, self.layers, self.figures = self.drawing.steps, self.drawing.layers, self.drawing.figures
        self.real = None if runner is None else RealRun(runner, prompts, keywords, self._for_engine)
        self.pin_button = ipw.Button(
            description="Pin as baseline", icon="thumb-tack", tooltip="Show changes against it"
        )
        self.fit_button = ipw.Button(
            description="Fit", icon="arrows-h", tooltip="Show the whole of the steps again"
        )
        self.parts = self._laid_out()
        self.view = panel(*self.parts.values())
        self.pin_button.on_click(lambda _: self.pin())
        self.fit_button.on_click(lambda _: self.fit())
        self.redraw()
        # With torch and transformers imported a full collection takes 300 ms (2-core machine): a slider would hang.
        gc.collect()
        gc.freeze()

    def _laid_out(self) -> dict[str, ipw.Widget]:
        for button in (self.pin_button, self.fit_button):
            button.layout.width = "auto"
        tools = row(self.fit_button, self.pin_button, self.presets.view)
        self.drawing.ranges.children = (*self.drawing.ranges.children, self.told)
        drawn = [self.figures[name] for name in ("step_times", "lanes", "outcomes")]
        shown = boxed(ipw.VBox([tools, self.drawing.ranges, *drawn]), "ps-figures")
        live = boxed(ipw.Box([self.settings.view, shown]), "ps-side")
        parts: dict[str, ipw.Widget] = {"numbers": self.numbers.view, "live": live}
        if self.real is not None:
            self._beside = MeasuredBeside()
            self.beside = self._beside.figure
            parts["real"] = ipw.VBox([self.real.view, self._beside.view])
        return parts

    # -- what is chosen ----------------------------------------------------------------------------------------

    @property
    def scenario(self) -> Scenario:
        """The settings as the controls stand."""
        return self.settings.scenario

    @property
    def scenarios(self) -> Scenarios:
        """What is simulated."""
        return self._scenarios

    def choose(self, scenario: Scenario) -> None:
        """Put all controls where a choice has them, and redraw once."""
        self.settings.choose(scenario)
        self.redraw()

    def use(self, scenarios: Scenarios, slots: int) -> None:
        """Simulate another trace from now on; its measured runs are others too."""
        with self._lock:
            self._scenarios = scenarios
            self._runs, self._regrouped = {}, {}
            self.presets.forget()
            self.settings.use(scenarios, slots)
            self.result = scenarios.run(self.scenario)
            self.drawing.bound(self.result)
        self.redraw()

    def _regroup(self, batch: int) -> None:
        """Simulate the same sequences at another batch; settings stay."""
        with self._lock:
            self._regrouped.setdefault(self._scenarios.batch, self._scenarios)
            if batch not in self._regrouped:
                self._regrouped[batch] = self._scenarios.at_batch(batch)
            self._scenarios = self._regrouped[batch]
            self.settings.regroup(self._scenarios)
        self.redraw()

    def state(self) -> dict[str, Any]:
        """Values of all controls, and what the panel shows."""
        return {
            **vars_of(self.scenario),
            "steps": tuple(self.steps.value),
            "layers": tuple(self.layers.value),
            "running": self.real is not None and self.real.controls.is_running,
            "tokens_per_s": self.result.tokens_per_s,
            "measured_tokens_per_s": None if self.measured is None else self.measured.metrics.tokens_per_s,
            "status": "" if self.real is None else self.real.controls.status.value,
        }

    @property
    def measured(self) -> RunResult | None:
        """The latest run of these very settings, if there was one."""
        return self.measured_runs[-1] if self.measured_runs else None

    @property
    def measured_runs(self) -> list[RunResult]:
        """All runs of these very settings, of as many sequences as are simulated."""
        runs = self._runs.get(self._scenarios.resolved(self.scenario), [])
        return [run for run in runs if run.metrics.batch == self._scenarios.batch]

    @property
    def pinned(self) -> Numbers | None:
        """The baseline's numbers, if one was pinned: as measured, where it and the present setting were."""
        return None if self._pinned is None else self._pinned.beside(self.measured)

    @property
    def shown_steps(self) -> range:
        """Steps whose lanes are drawn."""
        return self.drawing.shown_steps

    def pin(self) -> None:
        """From now on numbers are shown against those of this setting: measured ones against measured ones."""
        kept = self.measured
        name = f"{self.result.config['schedule']}, {self.result.config['num_slots']} slots, batch {self.result.batch}"
        self._pinned = _Pinned(name, numbers(self.result), None if kept is None else numbers(kept))
        self.presets.pin(self.scenario)
        self._say()

    def fit(self) -> None:
        """Show the whole of the steps again: the time axis stays as it was at every move until this."""
        self.drawing.fit()
        self.redraw()

    def on_drawn(self, watcher: Callable[[], None]) -> None:
        """Call `watcher()` after each redraw."""
        self._watchers.append(watcher)

    # -- real runs ---------------------------------------------------------------------------------------------

    @property
    def job(self) -> Job | None:
        """The latest real run, or None."""
        return None if self.real is None else self.real.job

    def start(self) -> Job:
        """Run the prompts with these settings on the engine, in the background.

        Raises:
            UnsupportedOption: they can only be simulated.
        """
        if self.real is None:
            raise PrescopeError(
                "what this panel shows was recorded elsewhere; make one with session.schedule_panel"
            )
        return self.real.start()

    def cancel(self) -> None:
        """End the real run after the token it is at."""
        if self.real is not None:
            self.real.controls.cancel()

    def close(self) -> None:
        """Stop the run and take the panel off the page; its results stay."""
        take_off(self.view)
        if self.real is not None:
            self.real.close()
            self._beside.close()
        self._throttle.cancel()
        self._resting.cancel()
        gc.unfreeze()

    def _for_engine(self) -> tuple[dict[str, Any], Callable[[RunResult], str]]:
        scenario = self._scenarios.resolved(self.scenario)
        # Those of this trace: another one may be simulated before the run ends.
        return self._scenarios.engine_settings(scenario), partial(self._finished, self._runs, scenario)

    def _finished(self, runs: dict[Scenario, list[RunResult]], scenario: Scenario, run: RunResult) -> str:
        runs.setdefault(scenario, []).append(run)
        self.redraw()
        if run.metrics.batch != self._scenarios.batch:
            return (
                f"it had {count_of(run.metrics.batch, 'sequence')}, what is simulated has {self._scenarios.batch}: not "
                f"laid beside it, see Runs"
            )
        if self.measured is not run:
            return "the controls were moved meanwhile: this was the setting before"
        return _ended_early(run)

    # -- drawing -----------------------------------------------------------------------------------------------

    def redraw(self) -> None:
        """Simulate the choice and put its numbers into the figures; settings that cannot be are told in words."""
        with self._lock:
            begin = time.perf_counter()
            try:
                self.settings.explain()
                self.result = self._scenarios.run(self.scenario)
                self.drawing.bound_to(self.result)
            except PrescopeError as error:
                text = f"<b>{escape(type(error).__name__)}</b>: {escape(str(error))}"
                self.numbers.say(f"<span class='ps-error'>{text} What is shown is the former setting.</span>")
                return
            middle = time.perf_counter()
            self.drawing.draw(self.result, self.measured, with_bound=self._knows_bounds())
            self.drawn = Drawn(1e3 * (middle - begin), 1e3 * (time.perf_counter() - middle))
            self._say()
            self._throttle.done()
        for watcher in self._watchers:
            watcher()

    def plain(self) -> list[go.Figure]:
        """The figures without widgets."""
        return self.drawing.plain(self.result, self.measured)

    def _say(self) -> None:
        self._say_numbers()
        self.presets.show()
        kept = self.measured_runs
        beyond = " · the steps end beyond the time axis: Fit" if self.drawing.ends_beyond(self.result) else ""
        self.told.value = (
            f"<span class='ps-soft'>simulated in {self.drawn.simulated_ms:.0f} ms, drawn in "
            f"{self.drawn.drawn_ms:.0f} ms{beyond}</span>"
        )
        if self.real is not None:
            self.real.controls.allow(self._scenarios.why_not_here(self.scenario))
            if not self.real.controls.is_running and not kept:
                self.real.controls.forget("not run with these settings yet" if self._runs else "")
            if kept:
                self._beside.show(self.result, kept[-1], self.shown_steps)
        self._rest()

    def _say_numbers(self) -> None:
        kept = self.measured_runs
        now = numbers(self.result)
        name, pinned = "" if self._pinned is None else self._pinned.name, self.pinned
        bound = bound_numbers(self.result) if self._knows_bounds() else NO_BOUND
        there = self._scenarios.measured_there(self.scenario)
        measured, rates = None, [run.metrics.tokens_per_s for run in kept]
        if kept:
            measured = numbers(kept[-1])
        elif there is not None:
            measured = numbers_there(there, self._scenarios.machine(self.scenario).row_bytes)
            rates = there["tokens_per_s_runs"]
        interval = self.result.interval if self._knows_bounds() else None
        note = _beside(now, measured, rates)
        self.numbers.show(now, measured, pinned, bound, pinned_name=name, note=note, interval=interval)

    def _knows_bounds(self) -> bool:
        """Bounds and the interval, which nobody asked about before, take longer than the simulation: a slider does not
        wait for them.
        """
        return {"bounds", "interval"} <= self.result.__dict__.keys() or is_alone()

    # -- the line of advice ------------------------------------------------------------------------------------

    def _rest(self) -> None:
        """Ask whether prediction pays once the slider rests: replays release the kernel's lock, so it goes on."""
        self._is_advised = self._knows_bounds()
        self._resting.restart()

    def _advise(self) -> None:
        scenario, scenarios = self.scenario, self._scenarios
        found = verdict(scenarios, scenario)
        assert self.result.bounds and self.result.interval  # found here, in the background
        if scenario != self.scenario or scenarios is not self._scenarios:
            return  # moved meanwhile: the next rest asks again
        with self._lock:
            if not self._is_advised:
                self._is_advised = True
                self.drawing.draw_times(self.result, self.measured)
                self._say_numbers()
        mood = {True: "ps-good", False: "ps-bad", None: ""}[found.pays]
        head, colon, rest = found.words.partition(" here")
        notes = "".join(f"<br><span class='ps-soft'>{escape(note)}</span>" for note in self.result.notes)
        self.numbers.say(f"<span class='{mood}'>{escape(head)}</span>{colon}{escape(rest)}.{notes}")

    def _ipython_display_(self) -> None:
        show_panel(self.view, self.numbers.text, self.plain())


def _ended_early(run: RunResult) -> str:
    """What to compare where sequences have ended: the simulated ones write a token in each step."""
    longest = max(map(len, run.tokens))
    ended = sum(len(one) < longest for one in run.tokens)
    if not ended:
        return ""
    return (
        f"{ended} of {count_of(len(run.tokens), 'sequence')} ended early, tokens/s counts what was written: compare "
        f"ms per token with the simulated"
    )


def _beside(simulated: Numbers, measured: Numbers | None, rates: Sequence[float]) -> str:
    """How far simulation and measurement are apart, and how far the runs of this setting themselves."""
    if measured is None:
        return ""
    off = 100 * (simulated.tokens_per_s / measured.tokens_per_s - 1)
    spread = spread_frac(rates)
    text, means = f"simulated {off:+.0f} %", "simulated tokens/s against measured"
    if spread == spread:
        text += f", spread {100 * spread:.0f} %"
        means += f"; how far the {len(rates)} runs of this setting lie apart"
    return f" <span class='ps-badge' title='{means}'>{text}</span>"


def vars_of(scenario: Scenario) -> dict[str, Any]:
    """A choice as plain values."""
    return {name: getattr(scenario, name) for name in scenario.__dataclass_fields__}

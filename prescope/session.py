"""The one object a notebook talks to: a model, its runs, and their figures.

    session = Session(slots=0.25)                 # the embedded model; or Session("path/or/hub-id", ...)
    run = session.run("Why is the sky blue?", max_new_tokens=32)
    session.timeline()

Thin: runs come from `engine`, figures from `views`, the panel from `widgets`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np
import pandas as pd

from . import views
from .core.paths import data_dir
from .core.types import Phase
from .engine.engine import Engine
from .engine.graph.prediction_time import prediction_us
from .engine.job import Job, NamedPrompts
from .engine.load import load
from .engine.prompts import Prompts
from .errors import BadTrace, NoProfile, UnsupportedOption
from .predictor import Oracle, Predictor
from .profile import HardwareProfile
from .report import story_of_run, story_of_setting, write_story, write_sweep_report
from .simulator import (
    Machine,
    Recording,
    Scenario,
    Scenarios,
    machine_of_run,
    machine_with_link,
    shipped_machines,
    shipped_recordings,
)
from .traces.metrics import METRIC_DEFINITIONS
from .traces.result import RunResult
from .traces.routing import RoutingTrace
from .widgets import CapacityPanel, Dashboard, PairPanel, SchedulePanel, SlotsPanel

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from .tuning import Proof, Sweep
    from .widgets.sweep_panel import SweepPanel
    from .widgets.sweep_source import SweepSource


#: Of a run that warms up: the third one's step records a graph, where steps run from one.
WARM_UP_TOKENS = 4
#: Of a dashboard's real runs, unless others are given.
PROMPTS = {
    "story": "The old man looked at the sea",
    "code": "import json\n\ndef load(path):",
    "maths": "Question: Tom has 12 apples and buys 30 more. How many apples does he have now?\nSolution:",
}


class Panel(Protocol):
    """What a session remembers of a panel."""

    def close(self) -> None:
        """Take it off the page."""
        ...


P = TypeVar("P", bound=Panel)


class Session:
    """A model with its experts in host memory, its runs and their figures.

    Args:
        model: folder, hub id, or an engine that exists already; None takes the embedded model.
        settings: of the engine, see `EngineConfig`: slots, device, cache, link_gb_per_s, ...

    Attributes:
        engine: the engine; close it through the session.
        runs: every run so far, oldest first.
    """

    def __init__(self, model: str | Path | Engine | None = None, **settings: Any) -> None:
        if isinstance(model, Engine):
            if settings:
                raise UnsupportedOption(f"the engine has its settings already; remove {', '.join(settings)}")
            self.engine = model
        else:
            self.engine = load(model, **settings)
        self.runs: list[RunResult] = []
        #: The newest run's frequencies, unless the engine was told others.
        self._remembered: np.ndarray | None = None
        self._panels: dict[str, Panel] = {}

    def run(
        self,
        prompts: NamedPrompts | Prompts,
        *,
        slots: int | float | str | None = None,
        cache: str | None = None,
        configure: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> RunResult:
        """Generate, and keep the result in `runs`; a job that is under way is waited for.

        Args:
            prompts: as `Engine.generate` takes them, or {name: text}; the names stand in the trace as `domain`.
            slots, cache: changed before the run (the slots are cold then); None leaves them.
            configure: for `Engine.configure`, instead of those two: a schedule and its settings. Some tokens warm
                the code up, then the run starts with cold slots.
            keywords: for `Engine.generate`: max_new_tokens, do_sample, ...
        """
        settings = {"slots": slots, "cache": cache, "configure": configure, **keywords}
        result: RunResult = self.engine.turn.run("a run", self._run, (prompts,), settings)
        return result

    def job(self, prompts: NamedPrompts | Prompts, **keywords: Any) -> Job:
        """As `run`, in a thread of its own."""
        return self.prepare(prompts, **keywords).start()

    def prepare(self, prompts: NamedPrompts | Prompts, **keywords: Any) -> Job:
        """A job that has not begun, so that it can be watched from its first token; `start` it."""
        return Job(partial(self._run, prompts), self.engine.turn, keywords, self.engine.tokens_so_far)

    @property
    def is_running(self) -> bool:
        return self.engine.turn.holder is not None

    def _run(
        self,
        prompts: NamedPrompts | Prompts,
        *,
        slots: int | float | str | None = None,
        cache: str | None = None,
        configure: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> RunResult:
        texts, info = _unfold(prompts)
        is_new = configure is not None or self._is_new(slots, cache)
        if configure is not None:
            self.engine.configure(**configure)
            self.engine.generate(texts, max_new_tokens=WARM_UP_TOKENS)
            self.engine.clear_cache()
        elif is_new:
            self.engine.configure(slots=slots, cache=cache)
        result = self.engine.generate(texts, **keywords)
        if is_new:
            result.notes.append("cold slots at the start (settings changed)")
        if result.trace is not None:
            result = replace(result, trace=replace(result.trace, prompts=info))
        self.runs.append(result)
        return result

    def _is_new(self, slots: int | float | str | None, cache: str | None) -> bool:
        config = self.engine.config
        if cache is not None and cache != config.cache:
            return True
        if slots is None or (type(slots), slots) == (
            type(config.slots),
            config.slots,
        ):  # 1 slot is not a share of 1.0
            return False
        return not (isinstance(slots, int) and slots == self.engine.num_slots)

    @property
    def last(self) -> RunResult:
        """The latest run.

        Raises:
            BadTrace: there is none yet.
        """
        if not self.runs:
            raise BadTrace("the session has no run yet; call session.run(prompts, max_new_tokens=32)")
        return self.runs[-1]

    def timeline(self, run: RunResult | None = None, steps: int | range | None = None) -> "go.Figure":
        """Lanes of some steps of a run (the last one)."""
        return views.timeline(run or self.last, steps)

    def layers(self, run: RunResult | None = None, phase: Phase = "decode") -> "go.Figure":
        """Where a step's time goes, layer by layer."""
        return views.layers(run or self.last, phase)

    def hit_rate(self, run: RunResult | None = None, phase: Phase | None = "decode") -> "go.Figure":
        """Hits, late ones and misses by layer."""
        return views.hit_rate(run or self.last, phase)

    def latency(self, run: RunResult | None = None) -> "go.Figure":
        """Latency of every token."""
        return views.latency(run or self.last)

    def load(self, run: RunResult | None = None, phase: Phase | None = None) -> "go.Figure":
        """Which experts the tokens used."""
        return views.load(run or self.last, phase)

    def slots_curve(self, runs: Sequence[RunResult] | None = None) -> "go.Figure":
        """Hit rate and speed against slots, from all runs of the session or those given."""
        return views.slots_curve(runs or self.runs)

    def compare(self, runs: Sequence[RunResult] | None = None) -> pd.DataFrame:
        """One row for each run: slots, cache, and the figures of `METRIC_DEFINITIONS`."""
        rows = [
            {"slots": run.config["num_slots"], "cache": run.config["cache"], "label": run.label}
            | run.metrics.to_dict()
            for run in (runs or self.runs)
        ]
        return pd.DataFrame(rows, columns=["slots", "cache", "label", *METRIC_DEFINITIONS])

    def panel(self, prompts: NamedPrompts, **keywords: Any) -> SlotsPanel:
        """Slider of slots that re-runs these prompts; a panel made before is closed.

        Args: as `run`; `keywords` are those of every run of the panel.
        """
        return self._keep(SlotsPanel(self, prompts, keywords))

    def scenarios(
        self,
        run: RunResult | None = None,
        *,
        predictors: Sequence[Predictor] = (),
        profile: HardwareProfile | None = None,
        machines: Sequence[Machine] = (),
    ) -> Scenarios:
        """A recorded run's trace under any settings, simulated.

        Args:
            run: the last one unless given; on demand, with events and routing, and with router inputs
                (record_inputs=True) if a predictor reads them.
            predictors: such as `[trained.predictor, *trained.others]` of `train_predictor`.
            profile: of this machine, for the CPU lane; `prescope.calibrate(session.engine)` measures it.
            machines: more of them; this one, this one with a faster link, and those that come with prescope are there.

        Raises:
            BadTrace: the run lacks what is needed.
        """
        run = run or self.last
        if run.trace is None:
            raise BadTrace("the run has no routing trace; run it with record_routing=True")
        here = machine_of_run(run, self.engine.shape, self.engine.expert_size, profile, self.runs)
        width = 0 if run.trace.inputs is None else run.trace.inputs.shape[2]
        is_captured = run.driver != "layered"
        device = self.engine.runner.device
        spent = {
            one.name: prediction_us(one, device, run.metrics.batch, width, is_captured)
            for one in predictors
            if width and not isinstance(one, Oracle)
        }
        self._remember_hot(run)
        return Scenarios(
            run.trace,
            [
                here,
                machine_with_link(here, 4),
                *shipped_machines(self.engine.shape, run.metrics.batch),
                *machines,
            ],
            predictors,
            predict_us=spent,
            frequencies=self.engine.frequencies,
        )

    def _remember_hot(self, run: RunResult) -> None:
        """Which experts are hot, for cache="static", unless the engine was told when it was loaded."""
        if self.engine.frequencies is self._remembered and run.trace is not None:
            self.engine.configure(frequencies=run.trace.expert_counts())
            self._remembered = self.engine.frequencies

    def schedule_panel(self, scenarios: Scenarios, prompts: NamedPrompts, **keywords: Any) -> SchedulePanel:
        """Sliders for all settings of a schedule, and a button that runs them; a panel made before is closed.

        Args:
            scenarios: of a run of these prompts. `keywords`: of every run on the engine, as of the recorded one.
        """
        return self._keep(SchedulePanel(self, scenarios, prompts, keywords))

    def pair_panel(
        self, scenarios: Scenarios, scenario: Scenario, upper: str = "presched", lower: str = "on-demand"
    ) -> PairPanel:
        """Two schedules on the same steps, and why each expert went where it went; a panel made before is closed.

        Args:
            scenario: slots, machine and CPU lane of both, and the settings of its own schedule.
        """
        return self._keep(PairPanel(scenarios, scenario, upper, lower))

    def capacity_panel(self, machine: str | None = None) -> CapacityPanel:
        """What GPU memory buys, for this model or a published one, on any machine; a panel made before is closed."""
        models: dict[str, Any] = {self.engine.name or "this model": self.engine, **_shapes()}
        return self._keep(CapacityPanel(models, machine, self._newest_trace()))

    def _newest_recorded(self) -> RunResult | None:
        return next((run for run in reversed(self.runs) if _is_recorded(run)), None)

    def _newest_trace(self) -> RoutingTrace | None:
        run = self._newest_recorded()
        return None if run is None else run.trace

    def dashboard(
        self,
        prompts: NamedPrompts | None = None,
        *,
        scenarios: Scenarios | None = None,
        predictors: Sequence[Predictor] = (),
        profile: HardwareProfile | None = None,
        recording: str | Path | None = None,
        **keywords: Any,
    ) -> Dashboard:
        """Everything in one place; one made before is closed.

        Opens with a recording that comes with prescope, where prediction pays, if there is one; otherwise with the
        session's latest run, or one that is made now.

        Args:
            prompts: of real runs; three short ones when not given.
            scenarios: to open with instead.
            predictors, profile: of the session's own runs, as in `scenarios`; without a profile what is known of this
                machine, as for a schedule of the engine.
            recording: name or path of one to offer first.
            keywords: of every real run: max_new_tokens, ...
        """
        prompts = PROMPTS if prompts is None else prompts
        keywords = {"max_new_tokens": 24, **keywords}

        def of(run: RunResult) -> Scenarios:
            return self.scenarios(run, predictors=predictors, profile=profile or self._known_profile())

        def own() -> Scenarios:
            return of(self._newest_recorded() or self._record(prompts, keywords))

        def fresh() -> Scenarios:
            return of(self._record(prompts, keywords))

        sources: dict[str, Callable[[], Scenarios]] = {}
        if scenarios is not None:
            sources[f"this session: {scenarios.label}"] = lambda: scenarios
        for name in [recording, *shipped_recordings()]:
            if name is not None:
                sources.setdefault(_title_of(name), partial(_scenarios_of, name))
        if scenarios is None and (not sources or any(map(_is_recorded, self.runs))):
            sources[f"this session: {self.engine.name}"] = own
        sweeps = partial(self._sweep_source, prompts=prompts, keywords=keywords)
        return self._keep(
            Dashboard(
                self,
                prompts,
                keywords,
                sources,
                fresh,
                self._report_here,
                sweeps=sweeps,
                trace=self._newest_trace,
            )
        )

    def sweep_panel(
        self,
        scenarios: Scenarios | None = None,
        prompts: NamedPrompts | None = None,
        *,
        predictors: Sequence[Predictor] = (),
        profile: HardwareProfile | None = None,
        **keywords: Any,
    ) -> "SweepPanel":
        """Say which settings may move, search, and prove the best; one made before is closed.

        Args:
            scenarios: of the recorded run that is swept; by default the session's latest, or one that is made now.
            prompts: of points on the device; three short ones when not given.
            predictors, profile: as in `dashboard`, where no scenarios are given.
            keywords: of every point on the device: max_new_tokens, ...

        Raises:
            ImportError: sweeps come with an extra, which the message names.
        """
        prompts = PROMPTS if prompts is None else prompts
        keywords = {"max_new_tokens": 24, **keywords}
        if scenarios is None:
            run = self._newest_recorded() or self._record(prompts, keywords)
            profile = profile or self._known_profile()
            scenarios = self.scenarios(run, predictors=predictors, profile=profile)
        source = self._sweep_source(scenarios, prompts, keywords)
        kept = {"slots": self.engine.num_slots}
        return self._keep(source.panel(kept=lambda: kept, shows=source.timeline))

    def _sweep_source(
        self, scenarios: Scenarios, prompts: NamedPrompts, keywords: Mapping[str, Any]
    ) -> "SweepSource":
        from .widgets.sweep_source import SweepSource

        return SweepSource(self, scenarios, prompts, keywords, self._sweep_report_here)

    def _sweep_report_here(self, sweep: "Sweep", proof: "Proof | None", commands: str) -> Path:
        return write_sweep_report(sweep, Path(f"{sweep.name}.html").resolve(), commands=commands, proof=proof)

    def _record(self, prompts: NamedPrompts, keywords: Mapping[str, Any]) -> RunResult:
        """A run on demand that can be simulated: with fewer slots than experts, so that it copies some."""
        slots = self.engine.num_slots
        if slots >= self.engine.shape.total_experts:
            slots = max(self.engine.shape.top_k, self.engine.shape.total_experts // 2)
        settings = {"schedule": "on-demand", "slots": slots}
        return self.run(prompts, configure=settings, **keywords)

    def _known_profile(self) -> HardwareProfile | None:
        """What was measured of this machine, by its owner or for prescope; None: nobody has calibrated it."""
        try:
            return HardwareProfile.of_this_machine(self.engine.hardware())
        except NoProfile:
            return None

    def _report_here(self, panel: SchedulePanel) -> Path:
        return self.report(Path("prescope_report.html").resolve(), of=panel)

    def _keep(self, panel: P) -> P:
        """Remember a panel; the former one of its kind is taken off the page."""
        kind = type(panel).__name__
        if kind in self._panels:
            self._panels[kind].close()
        self._panels[kind] = panel
        return panel

    def report(
        self,
        path: str | Path,
        *,
        of: SchedulePanel | SlotsPanel | Dashboard | RunResult | None = None,
        title: str = "Where does each token's time go?",
    ) -> Path:
        """Write one HTML page that opens offline: the answer in one line, numbers and bound, figures, how to get them.

        Args:
            of: a run, or a panel as it stands: its setting, its simulation, and what was measured of it; of `panel` the
                run that it shows. None: the last run.

        Raises:
            UnsupportedOption: `of` is something else.
            BadTrace: there is no run yet.
            CannotWrite: no space, or no permission.
        """
        panel = of.live if isinstance(of, Dashboard) else of
        if isinstance(panel, SchedulePanel):
            story = story_of_setting(
                panel.scenarios, panel.scenario, panel.measured_runs, panel.pinned, panel.shown_steps
            )
        else:
            run = panel.result if isinstance(panel, SlotsPanel) else panel
            run = self.last if run is None else run
            if not isinstance(run, RunResult):
                raise UnsupportedOption(
                    f"of is a {type(of).__name__}; a report is of one run, of `dashboard`, `schedule_panel` or "
                    f"`panel`, or of None for the last run; `prescope.report.write_sweep_report` is of a sweep"
                )
            is_ours = run.config["fingerprint"] == self.engine.fingerprint and _is_recorded(run)
            story = story_of_run(run, self._own_scenarios(run) if is_ours else None)
        return write_story(story, path, title=title)

    def _own_scenarios(self, run: RunResult) -> Scenarios:
        """A recorded run's, with nothing else to choose: changes nothing of the engine."""
        assert run.trace is not None, "it is recorded"
        here = machine_of_run(run, self.engine.shape, self.engine.expert_size, others=self.runs)
        return Scenarios(run.trace, [here])

    def close(self) -> None:
        """Close panels and engine; runs and figures stay."""
        for panel in self._panels.values():
            panel.close()
        self._panels.clear()
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Session of {self.engine!r}, {len(self.runs)} runs>"

    def _repr_html_(self) -> str:
        return self.engine._repr_html_()


def _is_recorded(run: RunResult) -> bool:
    """Whether a run can be simulated: on demand, with routing and events of decode steps that copied something."""
    return (
        run.trace is not None
        and not run.events.empty
        and run.config.get("schedule", "on-demand") == "on-demand"
        and run.metrics.decode.num_steps > 1
        and run.metrics.decode.on_demand_transfers > 0
    )


def _title_of(recording: str | Path) -> str:
    found = Recording.load(recording)
    return str(found.about.get("label", found.trace.model)) + f", batch {found.about.get('batch', '?')}"


def _scenarios_of(recording: str | Path) -> Scenarios:
    return Recording.load(recording).scenarios()


def _shapes() -> dict[str, str]:
    """Published shapes by name."""
    return {path.stem: path.stem for path in sorted((data_dir() / "configs").glob("*.json"))}


def _unfold(prompts: NamedPrompts | Prompts) -> tuple[Any, list[dict[str, Any]]]:
    """Prompts as the engine takes them, and one dict for each sequence of the trace whose text is known."""
    if isinstance(prompts, str):
        return prompts, [{"text": prompts}]
    if isinstance(prompts, Mapping) and prompts and all(isinstance(text, str) for text in prompts.values()):
        return list(prompts.values()), [{"domain": name, "text": text} for name, text in prompts.items()]
    if isinstance(prompts, list | tuple) and all(isinstance(text, str) for text in prompts):
        return list(prompts), [{"text": text} for text in prompts]
    return prompts, []

"""One place for all of it: numbers on top, always in sight, and below them what they come from, tab by tab."""

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import pandas as pd
import plotly.graph_objects as go

from ..core.paths import data_dir
from ..core.units import digits, format_bytes
from ..engine.job import NamedPrompts
from ..errors import PrescopeError
from ..scheduler import SCHEDULES
from ..simulator import Scenarios
from ..traces.routing import RoutingTrace
from ..views.numbers import NAN
from ..views.threshold import plot_threshold, threshold_info
from .background import in_background
from .capacity_panel import CapacityPanel
from .figures import SlimFigureWidget
from .measure_machine import MEASURE
from .pair_panel import PairPanel, other_than
from .runner import RealRunner
from .runs_panel import RunsPanel
from .schedule_panel import SchedulePanel, vars_of
from .showing import show_panel, take_off
from .style import boxed, named, panel, row
from .tables import frame_html

if TYPE_CHECKING:
    from .sweep_panel import SweepPanel
    from .sweep_source import SweepSource

TABS = ("Machine and model", "Live tuning", "Run it for real", "Predictor", "Schedules", "Sweep", "Runs")
LIVE = TABS.index("Live tuning")
#: Columns of the table of all schedules that are shown.
SCHEDULE_COLUMNS = [
    "tokens/s", "hit %", "late %", "miss %", "on CPU %", "misses avoided %", "MB per step", "link busy %",
    "GPU idle %", "bound, tokens/s",
]  # fmt: skip


class Dashboard:
    """The dashboard of a session.

    Args:
        runner: the session. prompts, keywords: of its real runs.
        sources: name -> what makes its scenarios; the first is shown. A name may stand for a recording of another
            machine, or for the session's own latest run.
        record: makes scenarios of this session by running the prompts once; called in a thread.
        report: writes a page of what the live panel shows; None: there is no button.
        sweeps: makes what a sweep of scenarios needs; None: there is no such tab. It may raise ImportError: sweeps
            come with an extra.
        trace: the newest routing of the runner's model; None: none was recorded yet, so that advice guesses it.

    Attributes:
        live: the panel of settings and figures. capacity, runs: panels. tabs, view: widgets.
    """

    def __init__(
        self,
        runner: RealRunner,
        prompts: NamedPrompts,
        keywords: dict[str, Any],
        sources: Mapping[str, Callable[[], Scenarios]],
        record: Callable[[], Scenarios],
        report: Callable[[SchedulePanel], Path] | None = None,
        *,
        sweeps: Callable[[Scenarios], "SweepSource"] | None = None,
        trace: Callable[[], RoutingTrace | None] = lambda: None,
    ) -> None:
        self._trace = trace
        self._runner, self._record, self._report = runner, record, report
        self._sweeps = sweeps
        self._swept: SweepSource | None = None
        self.sweep: SweepPanel | None = None
        self._sweep_box = ipw.VBox()
        self._sources = dict(sources)
        first = next(iter(self._sources))
        scenarios = self._sources[first]()
        self.live = SchedulePanel(
            runner,
            scenarios,
            prompts,
            keywords,
            slots=scenarios.num_experts // 2,
            how_to_measure=f"{MEASURE} (tab Machine and model), then Record a run here",
        )
        self.capacity = CapacityPanel(
            {runner.engine.name or "the model": runner.engine, **{name: name for name in _shapes()}}
        )
        self.runs = RunsPanel(runner)
        self.source = ipw.Dropdown(options=list(self._sources), value=first, layout={"width": "auto"})
        self.record_button = ipw.Button(
            description="Record a run here", icon="circle", layout={"width": "auto"},
            tooltip="Run the prompts once on demand with the session's engine, and simulate that",
        )  # fmt: skip
        self.report_button = ipw.Button(description="Report", icon="file", layout={"width": "auto"})
        self.told, self._head = ipw.HTML(), ipw.HTML()
        self.predictor_figure, self.predictor_told = SlimFigureWidget(), ipw.HTML()
        self.schedules_table = ipw.HTML()
        self.pair: PairPanel | None = None
        self._pair_box = ipw.VBox()
        self._drawn: dict[int, object] = {}  # tab -> the scenario it shows
        self.tabs = ipw.Tab(children=self._tab_children(), titles=TABS, selected_index=LIVE)
        tools = row(
            named("what is simulated", self.source), self.record_button, *self._report_tools(), self.told
        )
        self.view = panel(self._head, tools, self.live.parts["numbers"], self.tabs)
        self._say_head()
        self.source.observe(self._on_source, "value")
        self.tabs.observe(lambda _: self.refresh(), "selected_index")
        self.record_button.on_click(lambda button: self._in_background(self.record, button))
        self.report_button.on_click(lambda button: self._in_background(self._write_report, button))
        self.live.on_drawn(self.refresh)

    def _tab_children(self) -> list[ipw.Widget]:
        self._predictor_box = boxed(ipw.VBox([self.predictor_told]), "ps-figures")
        predictor = self._predictor_box
        schedules = boxed(ipw.VBox([self.schedules_table, self._pair_box]), "ps-figures")
        return [
            self.capacity.part, self.live.parts["live"], self.live.parts["real"], predictor, schedules, self._sweep_box,
            self.runs.part,
        ]  # fmt: skip

    def _report_tools(self) -> list[ipw.Widget]:
        return [] if self._report is None else [self.report_button]

    # -- what is shown -----------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring the tab that is open up to the settings; the others follow when they are opened."""
        index = self.tabs.selected_index
        if index is None or TABS[index] in ("Live tuning", "Run it for real"):
            return
        if TABS[index] == "Runs":
            self.runs.refresh()
            return
        if TABS[index] == "Machine and model":
            self._show_capacity(index)
            return
        state = (self.live.scenario, self.live.scenarios)
        if self._drawn.get(index) == state:
            return
        self._drawn[index] = state
        {"Predictor": self._show_predictor, "Schedules": self._show_schedules, "Sweep": self._show_sweep}[
            TABS[index]
        ]()

    def _show_capacity(self, index: int) -> None:
        """Advice on the session's model goes by its own routing as soon as some was recorded."""
        trace = self._trace()
        if index in self._drawn and trace is self.capacity.trace:
            return
        self._drawn[index] = "once"
        self.capacity.trace = trace
        self.capacity.soon()

    def _show_predictor(self) -> None:
        try:
            info = threshold_info(self.live.scenarios, self.live.scenario)
        except PrescopeError as error:
            self.predictor_told.value = f"<p class='ps-soft'>{escape(str(error))}</p>"
            self.predictor_figure.add_class("ps-stale")
            return
        self.predictor_told.value = ""
        self.predictor_figure.remove_class("ps-stale")
        self.predictor_figure.show_figure(plot_threshold(info))
        self._predictor_box.children = (self.predictor_told, self.predictor_figure)

    def _show_schedules(self) -> None:
        scenarios, scenario = self.live.scenarios, self.live.scenario
        table = scenarios.table(scenarios.compare(scenario)).sort_values("tokens/s", ascending=False)
        rates = {way.title: self._rate_there(name) for name, way in SCHEDULES.items()}
        known = pd.Series(rates, dtype=float).dropna()
        columns = SCHEDULE_COLUMNS
        if len(known):
            table["measured there, tokens/s"] = known
            columns = ["tokens/s", "measured there, tokens/s", *SCHEDULE_COLUMNS[1:]]
        shown = frame_html(table[columns], mark=str(self.live.settings.schedule.label))
        self.schedules_table.value = (
            "<p class='ps-soft'>Each with its own cache and predictor, the chosen one as chosen; the same slots, "
            f"tokens and machine. Simulated.</p>{shown}"
        )
        if self.pair is not None:
            self.pair.use(scenarios, scenario)
            return
        self.pair = PairPanel(scenarios, scenario, scenario.schedule, other_than(scenario.schedule))
        self._pair_box.children = (self.pair.view,)

    def _rate_there(self, schedule: str) -> float:
        """Tokens/s measured where the trace was recorded, under the settings that the table has of a schedule."""
        scenarios, scenario = self.live.scenarios, self.live.scenario
        chosen = scenario if schedule == scenario.schedule else scenarios.as_published(scenario, schedule)
        row = scenarios.measured_there(chosen)
        return NAN if row is None else float(row["tokens_per_s"])

    def _show_sweep(self) -> None:
        """The panel is made when its tab is first opened, and sweeps what the others show."""
        if self._sweeps is None:
            self._sweep_box.children = [ipw.HTML("<p class='ps-soft'>There is nothing to sweep here.</p>")]
            return
        if self._swept is not None and self._swept.scenarios is self.live.scenarios:
            return
        try:
            self._swept = self._sweeps(self.live.scenarios)
        except ImportError as error:
            self._sweep_box.children = [ipw.HTML(f"<p class='ps-error'>{escape(str(error))}</p>")]
            return
        if self.sweep is not None:
            self.sweep.use(self._swept.places(), self._swept.prover())
            return
        self.sweep = self._swept.panel(kept=self._kept, shows=self._open_point)
        self._sweep_box.children = [self.sweep.part]

    def _kept(self) -> dict[str, Any]:
        """What a sweep leaves as it is: the settings as the controls of the live tab stand."""
        return vars_of(self.live.scenario)

    def _open_point(self, settings: Mapping[str, Any]) -> go.Figure | None:
        """Put a point's settings into the live tab; what it has no controls for is drawn where it is."""
        assert self._swept is not None, "points are of its panel"
        scenario = self._swept.scenario(settings)
        if scenario is None:
            return self._swept.timeline(settings)
        self.live.choose(scenario)
        self.tabs.selected_index = LIVE
        return None

    def use(self, name: str, scenarios: Scenarios) -> None:
        """Simulate another trace from now on."""
        self._sources[name] = lambda: scenarios
        if name not in self.source.options:
            self.source.options = [*self.source.options, name]
        self.source.value = name

    def record(self) -> None:
        """Run the prompts once on demand, and simulate that run from now on."""
        self.told.value = "recording a run on demand …"
        scenarios = self._record()
        self.told.value = ""
        name = f"this session: {scenarios.label}"
        self._sources.pop(name, None)
        if self.source.value == name:
            self._sources[name] = lambda: scenarios
            self._simulate(scenarios)
        else:
            self.use(name, scenarios)

    def close(self) -> None:
        """Take the dashboard off the page; runs stay."""
        take_off(self.view, self.predictor_figure)
        self.live.close()
        self.capacity.close()
        self.runs.close()
        if self.sweep is not None:
            self.sweep.close()
        if self.pair is not None:
            self.pair.close()

    def _on_source(self, _change: Any) -> None:
        self._simulate(self._sources[self.source.value]())

    def _simulate(self, scenarios: Scenarios) -> None:
        """From now on; the head says whose costs these are."""
        half = scenarios.num_experts // 2
        is_here = next(iter(scenarios.machines.values())).is_here
        self.live.use(scenarios, self._runner.engine.num_slots if is_here else half)
        self._say_head()

    def _say_head(self) -> None:
        scenarios = self.live.scenarios
        trace, machine = scenarios.trace, next(iter(scenarios.machines.values()))
        experts = (
            f"{trace.num_layers} MoE layers x {trace.num_experts} experts of {digits(machine.row_bytes / 1e6)} MB = "
            f"{format_bytes(scenarios.num_experts * machine.row_bytes)}, top-{trace.top_k}"
        )
        where = "this machine" if machine.is_here else machine.name
        costs = f"<span class='ps-badge'>{escape(_costs_of(where, machine.costs.source))}</span>"
        self._head.value = f"<div class='ps-head'><b>{escape(experts)}</b>{costs}</div>"

    def _in_background(self, work: Callable[[], None], button: ipw.Button) -> None:
        in_background("dashboard", work, self._fail, button)

    def _fail(self, error: Exception) -> None:
        self.told.value = f"<span class='ps-error'><b>{type(error).__name__}</b>: {escape(str(error))}</span>"

    def _write_report(self) -> None:
        assert self._report is not None, "there is no button without it"
        self.told.value = "writing the report …"
        self.told.value = f"written: <code>{escape(str(self._report(self.live)))}</code>"

    def _page_head(self) -> str:
        """What a page without the menu of traces says above the figures."""
        name = escape(self.live.scenarios.label)
        return f"<p><b>{name}</b></p>{self._head.value}{self.live.numbers.text}"

    def plain(self) -> list[go.Figure]:
        """The figures of the live tab without widgets."""
        return self.live.plain()

    def _ipython_display_(self) -> None:
        show_panel(self.view, self._page_head(), self.plain())


def _costs_of(machine: str, source: str) -> str:
    """Whose costs, and where they come from; a machine that the source names is not named twice."""
    return f"costs: {source}" if machine.partition(",")[0] in source else f"{machine}: {source}"


def _shapes() -> list[str]:
    return sorted(path.stem for path in (data_dir() / "configs").glob("*.json"))

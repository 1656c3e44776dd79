"""Sweeps by hand: say which knobs may move, press Start, watch the front grow, click a point, prove the best.

Imports `prescope.tuning`, which comes with an extra of its own; `prescope.widgets` does not import this module.
"""

import threading
import time
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as ipw
import pandas as pd
import plotly.graph_objects as go

from ..core.units import count_of
from ..errors import PrescopeError, UnsupportedOption
from ..tuning import Progress, Proof, Sweep, SweepJob, load_sweep
from ..views.sweep_points import told_of_points
from .background import in_background
from .copy_button import CopyButton
from .showing import show_panel, take_off
from .style import boxed, named, panel, row
from .sweep_chosen import SweepChosen
from .sweep_controls import SweepControls
from .sweep_estimate import SweepEstimate
from .sweep_figures import SweepFigures
from .sweep_plan import AskedSweep, TrialPlace, runners_of
from .sweep_proof import Prover, SweepProof
from .sweep_run import SweepRun
from .sweep_studies import SweepStudies, free_name

#: Between two redraws while a sweep runs: this, or so many times what the last redraw took.
REDRAW_S, REDRAW_SHARE = 1.0, 5.0


class SweepPanel:
    """A sweep: controls on the left, what came of it on the right.

    Args:
        places: by name, the simulator and the device. kept: what settings that do not move stay at.
        shows: opens the timeline of a point's settings: a figure to draw here, or None if it is shown elsewhere.
        prover: runs the best of a sweep against the default; a text says why nothing can be run.
        report: writes a sweep's page; gets the sweep, its latest proof, and the code that repeats it.

    Attributes:
        controls, estimate, run, chosen, proof, figures: parts. study: menu of those that are there.
        sweep: the one that is open, or None. part: all of it without the looks; view: with them.
    """

    def __init__(
        self,
        places: Mapping[str, TrialPlace],
        kept: Callable[[], Mapping[str, Any]],
        shows: Callable[[Mapping[str, Any]], go.Figure | None],
        prover: Prover | str,
        report: Callable[[Sweep, Proof | None, str], Path],
    ) -> None:
        self._places, self._report = dict(places), report
        self.sweep: Sweep | None = None
        self._asked: AskedSweep | None = None
        self._points = pd.DataFrame()
        self._redrawn = self._took_s = 0.0
        self._is_quiet = self._is_closed = False
        self._lock = threading.RLock()
        self.controls = SweepControls(runners_of(places), kept, self._on_move)
        self.estimate = SweepEstimate(self._estimate, lambda: not self.controls.runner.is_here)
        self.run = SweepRun(self.start, self._on_progress, self._is_open)
        self.chosen = SweepChosen(shows, self._settings_of)
        self.proof = SweepProof(prover)
        self.figures = SweepFigures(self.chosen.open, self._show_chosen)
        self._studies = SweepStudies(self._on_study)
        self.study = self._studies.menu
        self.code = CopyButton()
        self.report_button = ipw.Button(
            description="Report", icon="file", layout={"width": "auto"}, disabled=True
        )
        self.report_button.tooltip = "Write the sweep as one page that opens offline"
        self.told = ipw.HTML()
        self.part = self._laid_out()
        self.view = panel(self.part)
        self.report_button.on_click(
            lambda button: in_background("sweep-report", self.write_report, self.run.fail, button)
        )
        self.refresh()
        self.estimate.moved()

    def _laid_out(self) -> ipw.Box:
        asked = ipw.VBox([self.controls.view, self.estimate.view])
        head = row(named("study", self.study), *self.run.view.children)
        tools = row(
            named("point", self.chosen.menu),
            self.chosen.button,
            self.proof.button,
            self.code,
            self.report_button,
        )
        shown = [
            head,
            self.told,
            self.chosen.table,
            tools,
            self.chosen.words,
            self.proof.words,
            self.chosen.timeline,
        ]
        return boxed(
            ipw.Box([asked, boxed(ipw.VBox([*shown, self.figures.view]), "ps-figures")]),
            "ps-side",
            "ps-sweep",
        )

    # -- what is asked for -------------------------------------------------------------------------------------

    @property
    def plan(self) -> AskedSweep:
        """What the controls ask for.

        Raises:
            UnsupportedOption: no setting moves.
        """
        one = self.controls
        return AskedSweep(
            one.where.value,
            one.space.space,
            one.objectives,
            one.method.value,
            one.seed.value,
            one.space.fixed,
        )

    def open(self, sweep: Sweep | str) -> None:
        """Show a study that is there; Start goes on with it.

        Raises:
            BadSweep: there is none of this name.
        """
        found = load_sweep(sweep) if isinstance(sweep, str) else sweep
        self._take(found)
        self._is_quiet = True
        self.controls.space.put(found.space)
        self.controls.put([one.name for one in found.objectives], found.method, found.seed)
        self.controls.name.value = found.name
        self._is_quiet = False
        self._asked = self.plan
        self.refresh()
        self.estimate.moved()

    def start(self) -> SweepJob | None:
        """Begin, or go on with the study that is open; what does not go is told in words. A run under way goes on."""
        if self.run.is_running:  # a double click: the page sends both before the button is greyed
            return self.run.job
        self.estimate.stop()
        try:
            sweep = self._opened()
            job = sweep.prepare(**self.controls.limits)
        except PrescopeError as error:
            self.run.fail(error)
            return None
        self.run.watch(job, sweep.name)
        self.refresh()
        return job

    def _opened(self) -> Sweep:
        """The sweep that the controls ask for: the open one, another that is there, or a new one."""
        plan, typed = self.plan, self.controls.name.value.strip()
        open_name = "" if self.sweep is None else self.sweep.name
        place = self._places[plan.where]
        if self.sweep is not None and plan == self._asked and typed in ("", open_name):
            name, sweep = open_name, self._own_plan(self.sweep).open(open_name, place, self.sweep.url)
        else:  # a study is about one thing: what was changed is another one
            name = typed if typed and typed != open_name else free_name()
            sweep = plan.open(name, place)
        self._take(sweep)
        self._asked = plan
        self._is_quiet = True
        self.controls.name.value = name
        self._is_quiet = False
        return sweep

    def _own_plan(self, sweep: Sweep) -> AskedSweep:
        """Of the study that is open, whatever the controls say now."""
        return AskedSweep.of(sweep, self.controls.where.value if self._asked is None else self._asked.where)

    def _take(self, sweep: Sweep | None) -> None:
        if sweep is None or self.sweep is None or self.sweep.name != sweep.name:
            self.figures.clear()
            self.chosen.clear()
            self._points = pd.DataFrame()
        self.sweep = sweep
        self.run.say_again()

    def _is_open(self, name: str) -> bool:
        return self.sweep is not None and self.sweep.name == name

    def use(self, places: Mapping[str, TrialPlace], prover: Prover | str) -> None:
        """Sweep another trace from now on; a run that is under way goes on."""
        self._places = dict(places)
        self.proof.use(prover)
        self.controls.use(runners_of(places))
        self._on_move()

    def state(self) -> dict[str, Any]:
        """Values of the controls, and what the panel shows."""
        return {
            "study": None if self.sweep is None else self.sweep.name,
            "where": self.controls.where.value,
            "objectives": self.controls.objectives,
            "points": len(self._points),
            "kept": len(self.figures.kept),
            "running": self.run.is_running,
            "status": self.run.status.value,
        }

    # -- what came of it ---------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Show the open study as it is now."""
        with self._lock:
            if self._is_closed:  # a run's last word may come later
                return
            begin = time.monotonic()
            self._studies.show(None if self.sweep is None else self.sweep.name)
            if self.sweep is not None:
                self._points = self.sweep.points()
                self.figures.show(self._points, self._objectives, self._importances(self.sweep))
            self._say()
            self._redrawn, self._took_s = time.monotonic(), time.monotonic() - begin

    @property
    def _objectives(self) -> list[str]:
        return [] if self.sweep is None else [one.name for one in self.sweep.objectives]

    @staticmethod
    def _importances(sweep: Sweep) -> Mapping[str, float]:
        try:
            return sweep.importances()
        except UnsupportedOption:  # too few points to say
            return {}

    def _settings_of(self, number: int) -> dict[str, Any]:
        """All settings of a point that were not left to the schedule."""
        assert self.sweep is not None, "points are of a sweep"
        return {name: value for name, value in self.sweep.settings_of(number).items() if value is not None}

    def _on_progress(self, _progress: Progress | None, is_last: bool) -> None:
        """From the sweep's thread: drawn when the last drawing is long enough ago."""
        wait = max(REDRAW_S, REDRAW_SHARE * self._took_s)
        if is_last or time.monotonic() - self._redrawn >= wait:
            self.refresh()

    def _on_move(self) -> None:
        if not self._is_quiet:
            self._say()
            self.estimate.moved()

    def _on_study(self, name: str | None) -> None:
        if self._is_quiet:
            return
        if name is None:
            self._take(None)
            self._asked, self.controls.name.value = None, ""
            self.refresh()
            return
        try:
            self.open(name)
        except PrescopeError as error:
            self.run.fail(error)

    def _say(self) -> None:
        try:
            is_same = self.plan == self._asked
            wanted = self.controls.limits["points"]
            there = len(self._points)
            is_all = is_same and there >= wanted and not self.run.is_running
            reason = f"it has {count_of(there, 'point')}; ask for more" if is_all else ""
            self.run.allow(reason, "Running" if self.run.is_running else "Go on" if is_same else "Start")
            plan = self._own_plan(self.sweep) if is_same and self.sweep is not None else self.plan
            name = self.controls.name.value.strip() or free_name()
            self.code.text = plan.code(name, self._places[plan.where], self.controls.limits)
        except PrescopeError as error:
            self.run.allow(str(error))
            self.code.text = ""
        self.told.value = told_of_points(self._points) if len(self._points) else ""
        self._show_chosen(self.figures.kept)
        has_points = len(self._points) and (self._points["state"] == "finished").any()
        self.report_button.disabled = not has_points
        self.proof.offer(self.sweep, "" if has_points else "no finished point yet")

    def _show_chosen(self, kept: tuple[int, ...]) -> None:
        self.chosen.show(self._points, kept, self._objectives)

    def _estimate(self) -> str:
        """What the controls ask for will take, in words."""
        plan, limits = self.plan, self.controls.limits
        there = len(self._points) if plan == self._asked else 0
        if self.run.is_running or limits["points"] <= there:
            return ""
        return str(plan.estimate(self.controls.runner, limits["points"], limits["workers"], there))

    # -- a page ------------------------------------------------------------------------------------------------

    def write_report(self) -> Path:
        """Write the open sweep as a page."""
        assert self.sweep is not None, "the button is disabled without one"
        own, limits = self._own_plan(self.sweep), self.controls.limits
        code = own.code(self.sweep.name, self._places[own.where], limits | {"points": len(self._points)})
        path = self._report(self.sweep, self.proof.proof, code)
        self.chosen.words.value = f"<span class='ps-soft'>written: <code>{escape(str(path))}</code></span>"
        return path

    def close(self) -> None:
        """End the run and take the panel off the page; the study stays."""
        with self._lock:
            self._is_closed = True
        self.run.close()
        self.proof.close()
        take_off(self.view, self.run.view)
        self.estimate.stop()

    def plain(self) -> list[go.Figure]:
        """The figures without widgets."""
        return self.figures.plain()

    def _ipython_display_(self) -> None:
        words = f"<p>{self.told.value}</p>{self.chosen.table.value}{self.proof.words.value}"
        show_panel(self.view, words, self.plain())

"""What a sweep is asked for: which settings move, what is best, where it is tried, how it is searched, and how long."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as ipw

from ..errors import UnsupportedOption
from ..tuning import METHODS, Runner
from ..views.sweep_points import OBJECTIVES
from .control import Control
from .style import boxed
from .sweep_space import SpaceControls

#: Method -> its name in a menu.
TITLES = {"tpe": "TPE (learns)", "grid": "grid (all)", "random": "random", "nsga": "NSGA-II (evolves)"}
NOTHING = "nothing else"
HELP = {
    "where": "The simulator replays a recorded run in milliseconds; the device runs the prompts and is measured.",
    "best is": "What is searched for. The first gives figures their colour and the best five their order.",
    "and": "A second objective: there is then no single best but a Pareto front.",
    "method": "TPE learns from the points before; the grid tries all; random draws; NSGA-II breeds fronts.",
    "points": "How many settings are tried, with those that are there already.",
    "minutes": "The sweep ends after this time; 0: when its points are there.",
    "workers": "Processes that simulate side by side. A device is measured by one alone.",
    "seed": "The same seed tries the same points.",
    "name": "Of the study's file in runs/sweeps: one that is there goes on.",
}  # fmt: skip
#: Processes that simulate, until told otherwise.
SIDE_BY_SIDE = min(2, os.cpu_count() or 1)


class SweepControls:
    """The left of a sweep panel.

    Args:
        runners: by name what tries a point, or a text that says why it cannot. kept: what settings that do not move
            stay at. changed: called after each move.

    Attributes:
        space: rows of settings. where, best, second, method, points, minutes, workers, seed, name: widgets.
        view: all of it.
    """

    def __init__(
        self,
        runners: Mapping[str, Runner | str],
        kept: Callable[[], Mapping[str, Any]],
        changed: Callable[[], None],
    ) -> None:
        self._changed, self._is_quiet = changed, True
        self._runners = dict(runners)
        self.where = ipw.Dropdown(options=self._places())
        self.best, self.second = ipw.Dropdown(), ipw.Dropdown()
        self.method = ipw.Dropdown(options=[(TITLES.get(name, name), name) for name in METHODS], value="tpe")
        self.points = ipw.BoundedIntText(value=100, min=1, max=10**6)
        self.minutes = ipw.BoundedFloatText(value=0.0, min=0.0, max=10**5, step=1.0)
        self.workers = ipw.BoundedIntText(value=SIDE_BY_SIDE, min=1, max=os.cpu_count() or 1)
        self.seed = ipw.BoundedIntText(value=0, min=0, max=2**31 - 1)
        self.name = ipw.Text(value="", placeholder="a new one", continuous_update=False)
        widgets = {
            "where": self.where, "best is": self.best, "and": self.second, "method": self.method, "points": self.points,
            "minutes": self.minutes, "workers": self.workers, "seed": self.seed, "name": self.name,
        }  # fmt: skip
        self.fields = {name: Control(name, widget, HELP[name]) for name, widget in widgets.items()}
        self.space = SpaceControls(self.runner.settings, kept, self._on_move)
        first, rest = (
            boxed(ipw.Box([self.fields[name].view for name in names]), "ps-controls")
            for names in (list(widgets)[:3], list(widgets)[3:])
        )
        rules = [ipw.HTML("<hr class='ps-rule'>") for _ in range(2)]
        self.view = ipw.VBox([first, rules[0], self.space.view, rules[1], rest])
        self._offer_objectives()
        for name, widget in widgets.items():
            widget.observe(self._on_where if name == "where" else self._on_move, "value")
        self._is_quiet = False
        self.explain()

    @property
    def runner(self) -> Runner:
        """What tries the points."""
        found = self._runners[self.where.value]
        assert not isinstance(found, str), "places that cannot be used are not offered"
        return found

    @property
    def objectives(self) -> tuple[str, ...]:
        """What is searched for, the leading one first."""
        second = self.second.value
        return (self.best.value,) if second in (NOTHING, self.best.value) else (self.best.value, second)

    @property
    def limits(self) -> dict[str, Any]:
        """Keywords of a start: points, minutes, workers."""
        minutes = float(self.minutes.value)
        return {
            "points": int(self.points.value), "minutes": minutes or None, "workers": int(self.workers.value),
        }  # fmt: skip

    def use(self, runners: Mapping[str, Runner | str]) -> None:
        """Offer other places: another trace is simulated, or the engine has changed."""
        self._is_quiet = True
        self._runners = dict(runners)
        former = self.where.value
        self.where.options = self._places()
        if former in self.where.options:
            self.where.value = former
        self.space.use(self.runner.settings)
        self._offer_objectives()
        self._is_quiet = False
        self.explain()

    def put(self, objectives: Sequence[str], method: str, seed: int) -> None:
        """Show what a study was asked for."""
        self._is_quiet = True
        self.best.value = objectives[0]
        self.second.value = objectives[1] if len(objectives) > 1 else NOTHING
        self.method.value, self.seed.value = method, seed
        self._is_quiet = False
        self.explain()

    def explain(self) -> None:
        """Say of each control what it means now, or why it does nothing."""
        reasons = [f"{name}: {why}" for name, why in self._runners.items() if isinstance(why, str)]
        self.fields["where"].say("; ".join(reasons))
        here = self.runner.is_here
        self.fields["workers"].allow("one engine, one point at a time" if here else "")
        self.fields["points"].allow(note=self._size() if self.method.value == "grid" else "")
        self.space.explain()

    def _size(self) -> str:
        """Of the grid, in words."""
        try:
            size = self.space.space.size
        except UnsupportedOption:  # nothing moves; the button says so
            return ""
        return f"the grid has {size:,}" if size else ""

    def _places(self) -> list[str]:
        return [name for name, one in self._runners.items() if not isinstance(one, str)]

    def _offer_objectives(self) -> None:
        known = [(OBJECTIVES[name].head.removesuffix(", GiB"), name) for name in self.runner.objectives]
        best, second = self.best.value, self.second.value
        names = [name for _, name in known]
        self.best.options = known
        self.second.options = [(NOTHING, NOTHING), *known]
        self.best.value = best if best in names else names[0]
        if second in (*names, NOTHING):
            self.second.value = second
        elif "gpu_bytes" in names:
            self.second.value = "gpu_bytes"

    def _on_where(self, _change: Any) -> None:
        if self._is_quiet:
            return
        self._is_quiet = True
        self.space.use(self.runner.settings)
        self._offer_objectives()
        self.points.value = 12 if self.runner.is_here else 100
        self.workers.value = 1 if self.runner.is_here else SIDE_BY_SIDE
        self._is_quiet = False
        self._on_move()

    def _on_move(self, _change: Any = None) -> None:
        if not self._is_quiet:
            self.explain()
            self._changed()

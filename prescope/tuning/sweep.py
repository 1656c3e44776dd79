"""Sweeps: opened by name, run, watched, and read as tables."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pandas as pd
from optuna.trial import TrialState, create_trial

from ..core.numbers import is_count, is_number, plain
from ..core.paths import user_path
from ..core.units import count_of
from ..core.waiting import waiting_bar
from ..engine.turn import Turn
from ..errors import BadSweep, UnsupportedOption
from .estimate import Estimate, estimate, num_new
from .evaluate import Runner
from .job import SweepJob
from .lease import Lease, holder_of
from .loop import Loop, Watcher
from .objectives import Objective, objectives_named
from .points import table
from .pools import SweepTask, pool_of
from .progress import Progress
from .quiet import unlogged
from .record import Record, StudyPlan, create_or_open, in_words, open_existing, shown, url_of_file
from .search import Known, require_method, search_named
from .space import Space

if TYPE_CHECKING:
    from distributed import Client


class Sweep:
    """Points of a space, tried by a runner, kept in an Optuna study. Made by `open_sweep` or `load_sweep`.

    Attributes:
        name: of the study. `space`: what moves. `fixed`: settings that do not.
        objectives: what it is after, the leading one first. `method`: of the search. `seed`: of the search.
        runner: tries points; None where it was opened for reading.
        url: of the storage, for optuna-dashboard; `place`: the same for people, without a password.
        file: the SQLite file that holds it; None where it lies in memory or in another database.
        study: the Optuna study, live: other processes' points are in it too.
        turn: one run at a time.
    """

    def __init__(self, record: Record, runner: Runner | None) -> None:
        self._record, self.runner = record, runner
        plan = record.plan
        self.name: str = record.study.study_name
        self.space, self.fixed, self.method, self.seed = plan.space, dict(plan.fixed), plan.method, plan.seed
        self.objectives: tuple[Objective, ...] = plan.objectives
        self.prompts = plan.prompts
        self.url, self.place, self.file = record.url, shown(record.url), record.file
        self.turn = Turn()

    @property
    def study(self) -> optuna.Study:
        return self._record.study

    def __repr__(self) -> str:
        names = ", ".join(one.name for one in self.objectives)
        return f"<Sweep {self.name!r}: {', '.join(self.space)} for {names} by {self.method}, {self.place}>"

    # -- runs ------------------------------------------------------------------------------------------------------

    def estimate(self, points: int, *, workers: int = 1) -> Estimate:
        """What so many points in all will take from here on, by the times of those recorded, or of a few tried now.

        Args:
            points: in all, as of `run`.
        """
        known = self._known()
        points, workers = (
            _require_count("points", points, "points in all"),
            _require_count("workers", workers, "processes"),
        )
        new = num_new(points, len(known.trials), self.method, self.space)
        return estimate(self._require_runner(), known, self.method, self.fixed, new, workers)

    def run(
        self,
        points: int | None = None,
        minutes: float | None = None,
        workers: int = 1,
        on_progress: Watcher | None = None,
        cancel: threading.Event | None = None,
        *,
        client: "Client | None" = None,
        pause: threading.Event | None = None,
    ) -> Progress:
        """Try points until there are so many, or time is over; what was begun and never told is tried first.

        Args:
            points: in all, those of former runs too: the same call after a kill goes on to the same number. None: the
                whole grid, or as many as the time allows.
            minutes: after which no point is begun.
            workers: processes on this machine; 1: this one.
            on_progress: called with `Progress` from the calling thread, some times a second. None: a bar shows it.
            cancel: set from elsewhere, it ends the run soon; what is told by then stays.
            client: of a dask cluster, whose workers are used instead; each is given the runner once.
            pause: while it is set no point is begun.

        Returns:
            How far the sweep is at the end of the run.

        Raises:
            UnsupportedOption: neither points nor minutes say when it ends, or the runner cannot leave this process.
            BadSweep: it was opened for reading, another process runs it, or no worker is there.
        """
        if points is None and minutes is None and self.space.size is None:
            raise UnsupportedOption("say when the sweep ends: points=1000, minutes=10, or both")
        if points is None and minutes is None and self.method != "grid":
            points = self.space.size
        if points is not None:
            points = _require_count("points", points, "points in all")
        if minutes is not None and not (is_number(minutes) and minutes > 0):
            raise UnsupportedOption(f"minutes is {minutes!r}; a time above 0")
        workers = _require_count("workers", workers, "processes")
        runner, cancel = self._require_runner(), cancel or threading.Event()
        if runner.is_here and (workers > 1 or client is not None):
            raise UnsupportedOption(
                f"workers={workers}: this runner holds an engine of this process, which serves one at a time; use "
                f"workers=1, or give it a function that loads an engine in each worker: EngineRunner(load, prompts)"
            )
        known = points if points is not None or minutes is not None else self.space.size
        with waiting_bar(known, "trying settings", "point") as bar:
            settings = {
                "points": points, "minutes": minutes, "workers": workers,
                "watcher": on_progress or (lambda at: bar.update(at.done - bar.n)),
                "cancel": cancel, "client": client, "pause": pause or threading.Event(), "runner": runner,
            }  # fmt: skip
            done: Progress = self.turn.run("a sweep", self._run, (), settings, was_told=cancel.is_set)
        return done

    def _run(
        self,
        *,
        points: int | None,
        minutes: float | None,
        workers: int,
        watcher: Watcher | None,
        cancel: threading.Event,
        client: "Client | None",
        pause: threading.Event,
        runner: Runner,
    ) -> Progress:
        job = SweepTask(runner, self.fixed, [one.name for one in self.objectives])
        try:
            with Lease(self.study, self.url) as lease, pool_of(job, workers, client, cancel.is_set) as pool:
                loop = Loop(
                    self._record,
                    search_named(self.method, self._known()),
                    pool,
                    lease,
                    target=points,
                    most_s=None if minutes is None else 60 * minutes,
                    watcher=watcher,
                    cancel=cancel,
                    pause=pause,
                )
                return loop.run()
        finally:
            runner.restore()

    def start(
        self,
        points: int | None = None,
        minutes: float | None = None,
        workers: int = 1,
        on_progress: Watcher | None = None,
        *,
        client: "Client | None" = None,
    ) -> SweepJob:
        """As `run`, in a thread of its own: watch its `status`, `pause`, `resume` or `cancel` it."""
        return self.prepare(points, minutes, workers, on_progress, client=client).start()

    def prepare(
        self,
        points: int | None = None,
        minutes: float | None = None,
        workers: int = 1,
        on_progress: Watcher | None = None,
        *,
        client: "Client | None" = None,
    ) -> SweepJob:
        """A job that has not begun, so that it can be watched from its first point; `start` it."""
        settings = {
            "points": points, "minutes": minutes, "workers": workers, "on_progress": on_progress, "client": client
        }  # fmt: skip
        return SweepJob(self.run, self.turn, settings)

    def _require_runner(self) -> Runner:
        if self.runner is None:
            raise BadSweep(
                f"the sweep {self.name!r} was opened for reading; open_sweep({self.name!r}, space, runner) goes on"
            )
        return self.runner

    def _known(self) -> Known:
        directions = [one.direction for one in self.objectives]
        return Known(
            self.space, self.seed, directions, [one.name for one in self.objectives], self._record.trials()
        )

    # -- tables ----------------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether anybody, here or elsewhere, runs it now."""
        with in_words(self.url):
            return holder_of(self.study) is not None

    def points(self) -> pd.DataFrame:
        """One row a point, by number: number, state ("finished", "infeasible": the library refuses the setting,
        "failed", "running"), reason, seed, seconds, origin ("simulated", "measured", "emulated"), machine, commit,
        started; then each setting under its own name (a machine that moves is in the column machine), and each
        objective, NaN where it is not known. What was begun and not told is there while somebody runs the sweep.
        """
        names = [one.name for one in self.objectives]
        return table(self._record.trials(), list(self.space), names, self.is_running)

    def settings_of(self, number: int) -> dict[str, Any]:
        """All settings of a point, those that do not move too: what the runner takes, and the simulator's `simulate`,
        whose result has the timeline.

        Raises:
            UnsupportedOption: there is no point of this number.
        """
        trials = self._record.trials()
        if not is_count(number) or not 0 <= number < len(trials):
            raise UnsupportedOption(f"there is no point {number!r}; there are {len(trials)}, from 0 on")
        return {**self.fixed, **trials[number].params}

    def best(self, n: int = 5) -> pd.DataFrame:
        """The best finished points by the first objective, rows as of `points`, best first; each setting once, by the
        best of its points.
        """
        finished, first = self._finished(), self.objectives[0]
        order = finished.sort_values([first.name, "number"], ascending=[first.sign < 0, True])
        return order.drop_duplicates(list(self.space)).head(n).reset_index(drop=True)

    def front(self) -> pd.DataFrame:
        """Finished points that no other beats in one objective without losing in another, best in the first one first;
        of equal ones the first.
        """
        finished = self._finished()
        if finished.empty:
            return finished
        values = finished[[one.name for one in self.objectives]].to_numpy() * [
            one.sign for one in self.objectives
        ]
        order = sorted(range(len(values)), key=lambda i: (*(-values[i]), finished["number"].iloc[i]))
        kept: list[int] = []
        for i in order:  # whoever comes later beats none that came before
            if not kept or not (values[kept] >= values[i]).all(axis=1).any():
                kept.append(i)
        return finished.iloc[kept].reset_index(drop=True)

    def importances(self, objective: str | None = None) -> dict[str, float]:
        """Share of an objective's variance that each setting explains, the largest first (Optuna's PED-ANOVA).

        Args:
            objective: the first one unless given.

        Raises:
            UnsupportedOption: it is none of the sweep's, or there is too little to tell yet.
        """
        names = [one.name for one in self.objectives]
        wanted = names[0] if objective is None else objective
        if wanted not in names:
            raise UnsupportedOption(f"objective is {wanted!r}; the sweep has {', '.join(map(repr, names))}")
        at = names.index(wanted)
        done = [trial for trial in self._record.trials() if trial.state == TrialState.COMPLETE]
        num_values = len({trial.values[at] for trial in done})
        if num_values < 2:
            raise UnsupportedOption(
                f"{count_of(len(done), 'finished point')} with {count_of(num_values, 'different value')}: that does "
                f"not tell settings apart; run more points"
            )
        # A study of this objective alone: Optuna warns of any choice among several, and a panel asks from the sweep's
        # thread, which must not touch the filters of warnings.
        with unlogged():
            alone = optuna.create_study(direction=self.objectives[at].direction)
        alone.add_trials(
            create_trial(value=trial.values[at], params=trial.params, distributions=trial.distributions)
            for trial in done
        )
        found = optuna.importance.get_param_importances(alone)
        shares = dict.fromkeys(self.space, 0.0) | {name: float(share) for name, share in found.items()}
        return dict(sorted(shares.items(), key=lambda one: -one[1]))

    def _finished(self) -> pd.DataFrame:
        points = self.points()
        return points[points["state"] == "finished"]


def _require_count(name: str, value: Any, what: str) -> int:
    if not is_count(value) or value < 1:
        raise UnsupportedOption(f"{name} is {value!r}; a number of {what}, 1 or more")
    return int(value)


def open_sweep(
    name: str,
    space: Space | Mapping[str, Any],
    runner: Runner,
    *,
    objectives: Sequence[str] = ("tokens_per_s",),
    method: str = "tpe",
    seed: int = 0,
    storage: str | Path | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Sweep:
    """A sweep by name: a new one, or the one that is there, to go on with it.

    Args:
        name: of the study. `space`: what moves, by the names in the runner's `settings`.
        objectives: of `OBJECTIVES`; with several, `front` shows what can be had together.
        method: "tpe", "grid", "random" or "nsga".
        storage: any Optuna URL, or the path of an SQLite file; None: runs/sweeps/<name>.db.
        fixed: settings that do not move and differ from the runner's own.

    Raises:
        UnsupportedOption: a setting, a range, an objective or a method that is not there, with all that are.
        BadSweep: a sweep of this name is about something else, or the storage cannot be used.
    """
    space = space if isinstance(space, Space) else Space(space)
    held = {one: plain(value) for one, value in (fixed or {}).items()}
    chosen = objectives_named(objectives, runner.objectives)
    require_method(method)
    space = space.checked(runner.settings, held)
    if not is_count(seed) or seed < 0:
        raise UnsupportedOption(f"seed is {seed!r}; a whole number, 0 or more")
    plan = StudyPlan(space, held, chosen, method, int(seed), runner.about(), tuple(runner.prompts))
    search_named(method, Known(space, plan.seed, [one.direction for one in chosen], [], ()))
    if not isinstance(storage, str | Path | None):
        raise UnsupportedOption(f"storage is {storage!r}; give any Optuna URL, or the path of an SQLite file")
    where = None if storage is None else str(storage)
    if where is not None and "://" not in where:
        file = user_path(where)
        where = url_of_file(file)
        with in_words(where):
            file.parent.mkdir(parents=True, exist_ok=True)
    return Sweep(create_or_open(name, plan, where), runner)


def load_sweep(where: str | Path, *, study_name: str | None = None) -> Sweep:
    """A sweep that is there, for reading, while it is run elsewhere too.

    Args:
        where: its name, the path of its file, or the URL of its storage.
        study_name: where the storage holds several.

    Raises:
        BadSweep: there is none, or it is no sweep.
    """
    return Sweep(open_existing(str(where), study_name), None)

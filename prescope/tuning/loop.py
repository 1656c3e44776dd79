"""One run of a sweep: ask, hand out, collect, tell, until it is enough."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Event
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from .lease import Lease
from .objectives import Objective
from .points import INTERRUPTED, NAMES, Asked, Outcome
from .pools import Pool
from .progress import Progress
from .record import Record, open_points
from .search import Search

#: Between two looks at pause and cancel.
LOOK_S = 0.1
#: Between two reports of progress.
REPORT_S = 0.2
#: What is under way when a sweep is cancelled may take so long to end; after that it is tried again another time.
LEAVE_S = 5.0
#: Best points that progress shows.
BEST = 5

Watcher = Callable[[Progress], object]


class Loop:
    """One run.

    Args:
        target: points in all, those of earlier runs too; None: as many as there are.
        most_s: after which no point is begun; None: no limit.
    """

    def __init__(
        self,
        record: Record,
        search: Search,
        pool: Pool,
        lease: Lease,
        *,
        target: int | None,
        most_s: float | None,
        watcher: Watcher | None,
        cancel: Event,
        pause: Event,
    ) -> None:
        self._record, self._search, self._pool, self._lease = record, search, pool, lease
        self._watcher, self._cancel, self._pause = watcher, cancel, pause
        sizes = [n for n in (target, search.size) if n is not None]
        self._target = min(sizes) if sizes else None
        trials = record.trials()
        self._again = deque(open_points(trials))
        self._next = len(trials)
        self._counts = Counter(NAMES[trial.state] for trial in trials if trial.state in NAMES)
        self._settings = {one.number: one.settings for one in self._again}
        self._best = _Best(record.plan.objectives, trials)
        self._begin = time.monotonic()
        self._end = None if most_s is None else self._begin + most_s
        self._told, self._reported = 0, float("-inf")

    def run(self) -> Progress:
        """Until enough points are told, time is over or it is cancelled.

        Raises:
            BadSweep: another process took over, or no worker is left.
        """
        self._report()
        while not self._is_over():
            self._lease.require()
            if not self._pause.is_set():
                self._hand_out()
            if self._pool.running:
                self._take(self._pool.collect(LOOK_S))
            elif self._pause.is_set():
                self._cancel.wait(LOOK_S)
            self._report()
        if self._pool.running:
            self._take(self._pool.rest(LEAVE_S))
        return self._report(is_last=True)

    @property
    def _is_late(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    @property
    def _is_all(self) -> bool:
        """Nothing is left to begin."""
        return not self._again and self._target is not None and self._next >= self._target

    def _is_over(self) -> bool:
        return self._cancel.is_set() or (not self._pool.running and (self._is_all or self._is_late))

    def _hand_out(self) -> None:
        room = 0 if self._is_late else self._pool.room(self._search.most_ahead)
        points = [self._again.popleft() for _ in range(min(room, len(self._again)))]
        left = room - len(points)
        if self._target is not None:
            left = min(left, self._target - self._next)
        if left > 0:
            points += self._new(left)
        if points:
            self._pool.give(points)

    def _new(self, count: int) -> Sequence[Asked]:
        points = self._search.ask(range(self._next, self._next + count))
        self._record.add(points)
        self._next += count
        self._settings.update((one.number, one.settings) for one in points)
        return points

    def _take(self, outcomes: Sequence[Outcome]) -> None:
        told = [one for one in outcomes if one.state != INTERRUPTED]
        if not told:
            return
        self._record.finish(told)
        self._search.tell(told)
        self._counts.update(one.state for one in told)
        self._told += len(told)
        self._best.add([(one.number, self._settings.pop(one.number), one.values) for one in told])

    def _report(self, is_last: bool = False) -> Progress:
        now = time.monotonic()
        progress = self._progress(now)
        if self._watcher is not None and (is_last or now - self._reported >= REPORT_S):
            self._reported = now
            self._watcher(progress)
        return progress

    def _progress(self, now: float) -> Progress:
        done, seconds = self._counts.total(), now - self._begin
        pace = self._told / seconds if self._told else float("nan")
        left = [] if self._target is None else [(self._target - done) / pace]
        if self._end is not None:
            left.append(max(0.0, self._end - now))
        return Progress(
            done,
            self._target,
            self._counts["finished"],
            self._counts["infeasible"],
            self._counts["failed"],
            self._pool.running,
            seconds,
            min(left, default=float("nan")),
            60 * pace,
            self._best.table(),
            self._pause.is_set(),
        )


class _Best:
    """The best settings so far, by the first objective; each by the best of its points."""

    def __init__(self, objectives: Sequence[Objective], trials: Sequence[FrozenTrial]) -> None:
        self._objectives = objectives
        self._rows: list[dict[str, Any]] = []
        names = [one.name for one in objectives]
        self.add(
            (one.number, one.params, dict(zip(names, one.values, strict=True)))
            for one in trials
            if one.state == TrialState.COMPLETE
        )

    def add(self, points: Iterable[tuple[int, Mapping[str, Any], Mapping[str, float]]]) -> None:
        """Number, settings and values of each; a point without values is none of the best."""
        first = self._objectives[0]
        self._rows += [{"number": n, **settings, **values} for n, settings, values in points if values]
        self._rows.sort(key=lambda row: (-first.sign * row[first.name], row["number"]))
        seen: list[dict[str, Any]] = []
        for row in self._rows:
            if len(seen) < BEST and not any(self._settings_of(row) == self._settings_of(one) for one in seen):
                seen.append(row)
        self._rows = seen

    def _settings_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        told = {"number", *(one.name for one in self._objectives)}
        return {name: value for name, value in row.items() if name not in told}

    def table(self) -> pd.DataFrame:
        """One row a point: number, settings, objectives."""
        return pd.DataFrame(self._rows)

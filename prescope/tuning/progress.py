"""How far a sweep is, in numbers and in words."""

from typing import NamedTuple

import pandas as pd


class Progress(NamedTuple):
    """A moment of a sweep.

    Attributes:
        done: points told, of this run and those before; `finished` + `infeasible` + `failed`.
        total: points there will be; None where only time limits it. `running`: handed to workers.
        seconds: since this run began. `remaining_s`: until it ends at this pace; NaN before the first point is told.
        points_per_minute: recorded by this run; NaN before the first.
        best: the best five so far by the first objective: number, settings, objectives.
        is_paused: no new point is begun.
    """

    done: int
    total: int | None
    finished: int
    infeasible: int
    failed: int
    running: int
    seconds: float
    remaining_s: float
    points_per_minute: float
    best: pd.DataFrame
    is_paused: bool = False

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total:,}"
        bad = "".join(
            f", {count:,} {what}"
            for count, what in ((self.infeasible, "infeasible"), (self.failed, "failed"))
            if count
        )
        left = "" if self.remaining_s != self.remaining_s else f", {said_time(self.remaining_s)} left"
        pace = (
            ""
            if self.points_per_minute != self.points_per_minute
            else f", {self.points_per_minute:,.0f} a minute"
        )
        return f"{self.done:,}{of} points{bad}{pace}{left}{', paused' if self.is_paused else ''}"


def said_time(seconds: float) -> str:
    """How long something takes, in seconds, minutes or hours: "99 s", "2 min", "20.1 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

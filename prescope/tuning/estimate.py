"""What a sweep will take, said before it starts: a few points are tried and timed, and not recorded."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState

from ..core.units import count_of, format_bytes
from .evaluate import Runner, evaluate
from .points import Asked
from .progress import said_time
from .search import Known, search_named
from .space import Space

#: Points that are tried, and after how many that the library refuses it is given up.
TRIED, REFUSED = 3, 20
#: Python with torch, numba's compiled decisions and dask, before any trace: resident memory of a worker process.
WORKER_BYTES = 420 << 20
#: Until the workers of a local cluster are there: each imports torch. Two at once on two cores took 8 to 12 s.
START_S = 10.0
#: One core's time to ask for, hand out and record a point, whatever it costs to try: measured by
#: benchmarks/sweep_speed.py. TPE's grows with the points there are.
OVERHEAD_S = {"grid": 0.004, "random": 0.005, "nsga": 0.006, "tpe": 0.008}
TPE_S_PER_POINT = 1.4e-5
#: In the study's file: seven settings, six attributes, one value.
POINT_BYTES = 2300


class Estimate(NamedTuple):
    """What some points will take.

    Attributes:
        points: to be tried. `seconds`: all of them, the start of workers too; NaN where no point could be tried.
        bytes: memory of the workers together, besides this process; of this one alone where it is the only one.
        seconds_per_point: of one worker. `start_s`: until workers are there. `disk_bytes`: that the study grows by.
        is_measured: from points of this sweep; else no point could be tried, `reason` says why.
    """

    points: int
    seconds: float
    bytes: int
    seconds_per_point: float
    start_s: float
    disk_bytes: int
    workers: int
    is_measured: bool
    reason: str = ""

    def __str__(self) -> str:
        who = "this process" if self.workers == 1 else f"{self.workers} processes"
        points = count_of(self.points, "point")
        if not self.points:
            return "no point is left to try"
        if not self.is_measured:
            return f"{points}; what one takes is not known: {self.reason}"
        each = (
            f"{1e3 * self.seconds_per_point:.3g} ms"
            if self.seconds_per_point < 1
            else f"{self.seconds_per_point:.3g} s"
        )
        memory = f"{format_bytes(self.bytes)} of memory, " if self.bytes else ""  # an engine is there already
        return (
            f"{points} of {each} in {who}: about {said_time(self.seconds)}, {memory}"
            f"{format_bytes(self.disk_bytes)} in the study"
        )


def num_new(points: int, there: int, method: str, space: Space) -> int:
    """How many are still to be tried of so many in all; a grid has no more than its size."""
    most = points if method != "grid" or space.size is None else min(points, space.size)
    return max(0, most - there)


def estimate(
    runner: Runner,
    known: Known,
    method: str,
    fixed: Mapping[str, Any],
    points: int,
    workers: int,
) -> Estimate:
    """Of so many new points; what was tried for it leaves the runner's settings as they were.

    Args:
        known: the sweep; its finished points are timed already.
    """
    took, reason = _recorded(known.trials), ""
    if len(took) < TRIED:
        try:
            took, reason = _tried(runner, known, fixed)
        finally:
            runner.restore()
    each = sum(took) / len(took) if took else float("nan")
    start_s = START_S if workers > 1 else 0.0
    there = len(known.trials)
    overhead = OVERHEAD_S[method] + (TPE_S_PER_POINT * (there + points / 2) if method == "tpe" else 0.0)
    # One process asks and records: beside the workers, or before and after its own points.
    paced = max(each / workers, overhead) if workers > 1 else each + overhead
    nbytes = runner.nbytes
    return Estimate(
        points,
        start_s + points * paced,
        workers * (nbytes + WORKER_BYTES) if workers > 1 else nbytes,
        each,
        start_s,
        points * POINT_BYTES,
        workers,
        bool(took),
        reason,
    )


def _recorded(trials: Sequence[FrozenTrial]) -> list[float]:
    return [one.user_attrs["seconds"] for one in trials if one.state == TrialState.COMPLETE]


def _tried(runner: Runner, known: Known, fixed: Mapping[str, Any]) -> tuple[list[float], str]:
    """Times of a few points drawn by chance, each the second time: the first prepares and compiles."""
    drawn = search_named("random", known._replace(trials=()))
    took: list[float] = []
    reason = ""
    for number in range(REFUSED):
        point: Asked = drawn.ask([number])[0]
        for _ in range(2):
            begin = time.perf_counter()
            outcome = evaluate(runner, point, fixed, known.objectives, lambda: False)
            seconds = time.perf_counter() - begin
        if outcome.state == "finished":
            took.append(seconds)
        else:
            reason = outcome.reason
        if len(took) == TRIED:
            break
    return took, reason

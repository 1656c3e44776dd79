"""What a sweep panel's controls ask for, and where its points can be tried."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..tuning import OBJECTIVES, Runner, Space, Sweep, open_sweep
from ..tuning.code import code_of
from ..tuning.estimate import Estimate, estimate, num_new
from ..tuning.search import Known


class TrialPlace(NamedTuple):
    """Where points can be tried.

    Attributes:
        runner: tries them; None where that is not possible. why_not: the reason then. code: Python that makes it.
        prepare: called before a sweep begins there.
    """

    runner: Runner | None
    why_not: str = ""
    code: str = ""
    prepare: Callable[[], None] | None = None


class AskedSweep(NamedTuple):
    """What the controls ask for; the study that is open cannot be changed, only gone on with."""

    where: str
    space: Space
    objectives: tuple[str, ...]
    method: str
    seed: int
    fixed: dict[str, Any]

    @classmethod
    def of(cls, sweep: Sweep, where: str) -> "AskedSweep":
        """What a study was asked for, which controls cannot always show: code can write any range."""
        names = tuple(one.name for one in sweep.objectives)
        return cls(where, sweep.space, names, sweep.method, sweep.seed, dict(sweep.fixed))

    @property
    def settings(self) -> dict[str, Any]:
        """For `open_sweep`, besides name, space and runner."""
        return {
            "objectives": self.objectives, "method": self.method, "seed": self.seed, "fixed": self.fixed
        }  # fmt: skip

    def open(self, name: str, place: TrialPlace, storage: str | None = None) -> Sweep:
        """The sweep of this name, new or there already; storage and errors as of `open_sweep`."""
        assert place.runner is not None, "places that cannot be used are not offered"
        if place.prepare is not None:
            place.prepare()
        return open_sweep(name, self.space, place.runner, storage=storage, **self.settings)

    def estimate(self, runner: Runner, points: int, workers: int, there: int = 0) -> Estimate:
        """What so many points in all will take, of which some are there already."""
        points = num_new(points, there, self.method, self.space)
        directions = [OBJECTIVES[name].direction for name in self.objectives]
        known = Known(self.space, self.seed, directions, self.objectives, ())
        return estimate(runner, known, self.method, self.fixed, points, workers)

    def code(self, name: str, place: TrialPlace, limits: Mapping[str, Any]) -> str:
        """Python that does the same."""
        return code_of(name, place.code, self.space, limits=limits, **self.settings)


def runners_of(places: Mapping[str, TrialPlace]) -> dict[str, Runner | str]:
    """By name, what tries points there, or why nothing does."""
    return {name: place.why_not if place.runner is None else place.runner for name, place in places.items()}

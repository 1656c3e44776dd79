"""Which point is tried next: the grid, chance, TPE or NSGA-II.

Grid and chance know a point by its number alone, so that a sweep that was interrupted goes on with the very points that
it would have tried. TPE and NSGA-II are Optuna's, on a copy of the study in memory: it is told at once, and its storage
is not asked for every value.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from ..errors import UnsupportedOption
from .points import STATES, Asked, Outcome, seed_of
from .quiet import unlogged
from .space import Space

#: Points of a grid that can be numbered in random order.
MOST_GRID = 10_000_000


class Search(Protocol):
    """Asks for points, and learns what became of them.

    Attributes:
        size: points there are; None: any number.
        most_ahead: points that may be asked for before the first of them is told; None: any number.
    """

    size: int | None
    most_ahead: int | None

    def ask(self, numbers: Sequence[int]) -> list[Asked]:
        """The points of these numbers, which follow each other."""
        ...

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """What became of points; in any order."""
        ...


class Known(NamedTuple):
    """What a search is made from."""

    space: Space
    seed: int
    directions: Sequence[Literal["maximize", "minimize"]]
    objectives: Sequence[str]
    trials: Sequence[FrozenTrial]  # there already, by number


class Grid:
    """Every point of the space once, in an order that the seed draws: any part of it is spread over the space."""

    most_ahead: int | None = None

    def __init__(self, known: Known) -> None:
        space = known.space
        without = [name for name, one in space.items() if one.values() is None]
        if without:
            name = without[0]
            raise UnsupportedOption(
                f"a grid needs steps: {', '.join(without)} has none; say Range({space[name].low}, {space[name].high}, "  # type: ignore[union-attr]
                f"step=...) or Choices(...), or take method='random' or 'tpe'"
            )
        self.size = space.size
        assert self.size is not None
        if self.size > MOST_GRID:
            raise UnsupportedOption(
                f"the grid has {self.size:,} points, {MOST_GRID:,} at most; take larger steps, or method='tpe'"
            )
        self._values = {name: one.values() or [] for name, one in space.items()}
        self._order = np.random.default_rng(known.seed).permutation(self.size)
        self._seed = known.seed

    def ask(self, numbers: Sequence[int]) -> list[Asked]:
        return [Asked(n, self._point(int(self._order[n])), seed_of(self._seed, n)) for n in numbers]

    def _point(self, index: int) -> dict[str, Any]:
        point = {}
        for name, values in self._values.items():
            index, at = divmod(index, len(values))
            point[name] = values[at]
        return point

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """It learns nothing."""


class EvenDraws:
    """Points drawn evenly, each by its own number."""

    size: int | None = None
    most_ahead: int | None = None

    def __init__(self, known: Known) -> None:
        self._known = known

    @cached_property
    def _study(self) -> optuna.Study:
        with unlogged():
            return optuna.create_study()

    def ask(self, numbers: Sequence[int]) -> list[Asked]:
        return [self._asked(number) for number in numbers]

    def _asked(self, number: int) -> Asked:
        seed = seed_of(self._known.seed, number)
        sampler, trial = RandomSampler(seed=seed), create_trial(state=TrialState.RUNNING)
        drawn = {
            name: sampler.sample_independent(self._study, trial, name, one)
            for name, one in self._known.space.distributions.items()
        }
        return Asked(number, drawn, seed)

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """It learns nothing."""


class Learned:
    """A sampler of Optuna's, on a copy of the study in memory.

    Its own draws are seeded by the sweep's seed and the first point that it is asked for.
    """

    size: int | None = None
    most_ahead: int | None

    def __init__(self, known: Known, sampler: Callable[[int], BaseSampler], most_ahead: int) -> None:
        self._known = known
        self.most_ahead: int | None = most_ahead
        seed = seed_of(known.seed, len(known.trials))
        with unlogged():
            self._study = optuna.create_study(directions=list(known.directions), sampler=sampler(seed))
        self._study.add_trials(known.trials)

    def ask(self, numbers: Sequence[int]) -> list[Asked]:
        asked = []
        for number in numbers:
            trial = self._study.ask(self._known.space.distributions)
            assert trial.number == number, "the copy has the trials of the study"
            notes = self._study.get_trials(deepcopy=False)[number].system_attrs
            asked.append(Asked(number, trial.params, seed_of(self._known.seed, number), dict(notes)))
        return asked

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        for one in outcomes:
            is_finished = one.state == "finished"
            values = [one.values[name] for name in self._known.objectives] if is_finished else None
            self._study.tell(one.number, values, STATES[one.state])


def _tpe(known: Known) -> Search:
    # What is not told yet teaches nothing: eight are enough to keep two cores busy at 16 ms a point.
    return Learned(known, lambda seed: TPESampler(seed=seed), 8)


def _nsga(known: Known) -> Search:
    # It learns from whole generations of 50.
    return Learned(known, lambda seed: NSGAIISampler(seed=seed), 32)


#: Ways to search by name.
METHODS: dict[str, Callable[[Known], Search]] = {
    "tpe": _tpe,
    "grid": Grid,
    "random": EvenDraws,
    "nsga": _nsga,
}


def search_named(method: str, known: Known) -> Search:
    """The search a person chose.

    Raises:
        UnsupportedOption: there is none of this name, or the space has no grid.
    """
    require_method(method)
    return METHODS[method](known)


def require_method(method: str) -> None:
    """Raises UnsupportedOption unless there is such a way to search."""
    if method not in METHODS:
        raise UnsupportedOption(f"method is {method!r}; choose one of {', '.join(map(repr, METHODS))}")

"""Fit the generator's settings to a recorded trace, so that its traces repeat experts as the recorded one does.

No formula inverts the generator (memory, successors and popularity all make tokens alike), so parameters are searched
by generating: each is bisected in turn on the number that it moves most, on the rows of the recorded trace, with the
same random numbers for all candidates. Whatever the length of a trace does to such a number, it does to both.

Shapes: E experts.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import BadTrace, UnsupportedOption
from ..events import DECODE
from ..routing import RoutingTrace
from .habits import Habits, Overlaps, habits_of, overlaps, transition_recall, used_rows
from .spec import SyntheticSpec

#: (share of the range searched around the last value, halvings of it): the parameters move each other's numbers.
SWEEPS = ((1.0, 6), (0.25, 5), (0.125, 5))
#: Most tokens that a fit reads, and most tokens x layers x experts; about 60 candidates are generated.
MOST_TOKENS, MOST_CELLS = 4096, 4_000_000
FEWEST_TOKENS = 512
#: Tokens read of one sequence at most: time grows with the longest.
SEQUENCE_TOKENS = 512
#: Traces generated to judge a fit, with other random numbers than the search had.
CHECKS = 3


class Parameter(NamedTuple):
    """One parameter, and the number of a trace that it is bisected on."""

    name: str
    most: float
    statistic: str
    rises: bool  # the number grows with the parameter


PARAMETERS = (
    Parameter("zipf", 4.0, "sequence", True),
    Parameter("persistence", 1.0, "next", True),
    Parameter("diversity", 1.0, "others", False),
    Parameter("correlation", 1.0, "transition", True),
)


class Fit(NamedTuple):
    """A fitted spec, and how far its traces are from the recorded one."""

    spec: SyntheticSpec
    recorded: Habits
    fitted: Habits  # of traces like the recorded one, mean of CHECKS; their random numbers were not fitted on
    notes: tuple[str, ...]  # what the trace could not tell

    @property
    def popularity_error(self) -> float:
        """Largest difference of the two popularity curves, each summed from the most used expert on."""
        difference = self.fitted.popularity_E - self.recorded.popularity_E
        return float(np.abs(np.cumsum(difference)).max())

    def rows(self) -> Iterator[tuple[str, float, float]]:
        """(name, recorded, fitted) of each number compared; NaN where the trace cannot tell."""
        pairs = zip(Overlaps._fields, self.recorded.overlaps, self.fitted.overlaps, strict=True)
        names = {
            "next": "overlap, next token",
            "sequence": "overlap, same sequence",
            "others": "overlap, others",
        }
        for name, recorded, fitted in pairs:
            yield names[name], recorded, fitted
        yield "transition recall@K", self.recorded.transition_recall, self.fitted.transition_recall
        yield "LRU hits, 25 % slots", self.recorded.lru_quarter, self.fitted.lru_quarter
        yield "LRU hits, 50 % slots", self.recorded.lru_half, self.fitted.lru_half

    @property
    def errors(self) -> dict[str, float]:
        """Fitted less recorded, by name; "popularity" is `popularity_error`."""
        return {"popularity": self.popularity_error} | {name: fit - was for name, was, fit in self.rows()}

    def __str__(self) -> str:
        lines = [f"{self.spec}", f"{'':22}  recorded  fitted"]
        lines += [f"{name:22}{was:10.3f}{fit:8.3f}" for name, was, fit in self.rows()]
        lines.append(f"popularity curve: cumulative shares differ by {self.popularity_error:.3f} at most")
        return "\n".join([*lines, *self.notes])


def fit(trace: RoutingTrace, *, seed: int = 0, max_tokens: int | None = None) -> Fit:
    """Find the settings whose traces are most like a recorded one; print the result, or read its `spec`.

    Takes some seconds: about 60 traces are generated.

    Args:
        trace: of a real model, at best some dozens of sequences of 64 tokens and more.
        max_tokens: to read at most, of evenly spaced sequences.

    Raises:
        BadTrace: no sequence of the trace has two tokens. UnsupportedOption: fewer than two may be read.
    """
    part = _part_of(trace, max_tokens)
    wanted = _statistics(part, tuple(parameter.statistic for parameter in PARAMETERS))
    if np.isnan(wanted["next"]):
        raise BadTrace(f"the trace of {trace.model} has no two tokens of one sequence; record longer texts")
    settings = [parameter for parameter in PARAMETERS if not np.isnan(wanted[parameter.statistic])]
    spec = SyntheticSpec(num_layers=trace.num_layers, num_experts=trace.num_experts, top_k=trace.top_k)
    for width, halvings in SWEEPS:
        for parameter in settings:
            spec = _bisect(spec, parameter, wanted[parameter.statistic], part, width, halvings, seed)
    made = [habits_of(spec.like(trace, seed=seed + 1 + i)) for i in range(CHECKS)]
    return Fit(spec, habits_of(trace), _mean(made), tuple(_notes(trace, wanted)))


def _bisect(
    spec: SyntheticSpec,
    parameter: Parameter,
    wanted: float,
    part: RoutingTrace,
    width: float,
    halvings: int,
    seed: int,
) -> SyntheticSpec:
    """The spec with one parameter moved to where the generated number is as wanted, or to the end of its window."""
    reach = width * parameter.most
    middle = getattr(spec, parameter.name) if width < 1.0 else 0.5 * parameter.most
    low, high = max(0.0, middle - 0.5 * reach), min(parameter.most, middle + 0.5 * reach)
    for _ in range(halvings):
        middle = 0.5 * (low + high)
        found = _statistics(_with(spec, parameter, middle).like(part, seed=seed), (parameter.statistic,))[
            parameter.statistic
        ]
        if (found < wanted) == parameter.rises:
            low = middle
        else:
            high = middle
    return _with(spec, parameter, 0.5 * (low + high))


def _with(spec: SyntheticSpec, parameter: Parameter, value: float) -> SyntheticSpec:
    changes: dict[str, Any] = {parameter.name: value}
    return replace(spec, **changes)


def _statistics(trace: RoutingTrace, names: tuple[str, ...]) -> dict[str, float]:
    """The numbers named, of one trace."""
    used_RLE = used_rows(trace)
    found = {"transition": transition_recall(trace, used_RLE)} if "transition" in names else {}
    return found if names == ("transition",) else found | overlaps(trace, used_RLE)._asdict()


def _part_of(trace: RoutingTrace, max_tokens: int | None) -> RoutingTrace:
    """The beginnings of evenly spaced sequences, `max_tokens` in all."""
    cells = trace.num_layers * trace.num_experts
    default = max(FEWEST_TOKENS, min(MOST_TOKENS, MOST_CELLS // cells))
    most = default if max_tokens is None else max_tokens
    if most < 2:
        raise UnsupportedOption(f"max_tokens is {most}; persistence shows in two tokens and more")
    sequences, sequence_R, tokens_S = np.unique(trace.sequence, return_inverse=True, return_counts=True)
    head = min(SEQUENCE_TOKENS, most)
    # Sequences differ in length: so many of the mean length fit.
    fit = max(1, int(most / np.minimum(tokens_S, head).mean()))
    chosen = np.unique(np.linspace(0, len(sequences) - 1, min(fit, len(sequences))).astype(int))
    return trace.take(np.flatnonzero(np.isin(sequence_R, chosen) & _is_head(sequence_R, head)))


def _is_head(sequence_R: NDArray[np.integer], head: int) -> NDArray[np.bool_]:
    """Which rows are among the first `head` of their sequence."""
    order = np.argsort(sequence_R, kind="stable")
    is_head = np.empty(len(sequence_R), dtype=bool)
    ordered = sequence_R[order]
    is_head[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered) < head
    return is_head


def _mean(habits: list[Habits]) -> Habits:
    curves = np.mean([h.popularity_E for h in habits], axis=0)
    alike = Overlaps(*np.mean([h.overlaps for h in habits], axis=0).tolist())
    rates = np.mean([h[2:] for h in habits], axis=0).tolist()
    return Habits(curves, alike, *rates)


def _notes(trace: RoutingTrace, wanted: dict[str, float]) -> Iterator[str]:
    if np.isnan(wanted["others"]):
        yield "one sequence only: what sequences have in common is not known, diversity stays as given"
    if np.isnan(wanted["transition"]):
        yield "one layer, or sequences of a few tokens: transitions are not known, correlation stays as given"
    if not (trace.phase == DECODE).any():
        yield "no decode steps: hit rates are not known"

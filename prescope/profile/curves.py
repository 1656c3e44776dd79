"""Fits to measured points, each with its error. Pure numpy.

Errors are relative, |fit / measured - 1|: a time of 5 us counts as much as one of 5 ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.types import ExpertSize
from ..errors import BadProfile
from .points import Point

Floats = NDArray[np.float64]


class FitError(NamedTuple):
    """How far a fit is from the points it stands for, as fractions of the measured time."""

    median: float
    worst: float
    points: int

    def __str__(self) -> str:
        return f"{self.median:.1%} (worst {self.worst:.1%} of {self.points})" if self.points else "not known"


def error_of(fitted: Sequence[float] | Floats, measured: Sequence[float] | Floats) -> FitError:
    """Relative error of fitted times; of no point it is 0 with `points` = 0."""
    if len(measured) == 0:
        return FitError(0.0, 0.0, 0)
    off = np.abs(np.asarray(fitted) / np.asarray(measured) - 1.0)
    return FitError(float(np.median(off)), float(off.max()), len(off))


class Line(NamedTuple):
    """us = base_us + x * slope, both not negative."""

    base_us: float
    slope: float
    error: FitError

    def at(self, x: float) -> float:
        return self.base_us + x * self.slope


def fit_line(x: Sequence[float], us: Sequence[float]) -> Line:
    """The line of least relative squares through (x, us) with no negative coefficient; one point gives us / x.

    Raises:
        BadProfile: there is no point.
    """
    if len(x) == 0:
        raise BadProfile("no point to fit a line to")
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(us, dtype=np.float64)
    a = np.stack([1.0 / ys, xs / ys], axis=1)
    candidates = [
        (0.0, float(a[:, 1].sum() / (a[:, 1] ** 2).sum())) if xs.any() else (float(np.median(ys)), 0.0)
    ]
    if len(set(x)) > 1:
        base, slope = np.linalg.lstsq(a, np.ones(len(xs)), rcond=None)[0].tolist()
        flat = float(a[:, 0].sum() / (a[:, 0] ** 2).sum())
        # Non-negative least squares of two unknowns: the free solution if it is allowed, else the better edge.
        candidates = [(base, slope)] if min(base, slope) >= 0 else [*candidates, (flat, 0.0)]
    base, slope = min(candidates, key=lambda c: float(((a @ np.asarray(c) - 1.0) ** 2).sum()))
    return Line(base, slope, error_of(base + slope * xs, ys))


def interpolate(x: float, xs: Sequence[float], us: Sequence[float]) -> float:
    """Piecewise linear between points in ascending x; the first value before them, a straight line after them."""
    if x <= xs[-1] or len(xs) == 1:
        return float(np.interp(x, xs, us))
    slope = max(0.0, (us[-1] - us[-2]) / (xs[-1] - xs[-2]))
    return us[-1] + (x - xs[-1]) * slope


def rising(us: Sequence[float]) -> list[float]:
    """The non-decreasing values nearest to `us` by least squares: more tokens never take less time, noise may."""
    blocks: list[tuple[float, int]] = []  # mean and length
    for value in us:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, length = blocks.pop()
            mean, count = (before * length + mean * count) / (length + count), length + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def left_out(xs: Sequence[float], us: Sequence[float]) -> list[tuple[float, float]]:
    """(guess, measured) of each inner point, guessed from the others: how good interpolation between points is."""
    inner = range(1, len(xs) - 1)
    return [(interpolate(xs[i], [*xs[:i], *xs[i + 1 :]], [*us[:i], *us[i + 1 :]]), us[i]) for i in inner]


@dataclass(frozen=True)
class LinkCurve:
    """Time of one copy by its size.

    Attributes:
        line: latency + bytes / rate through all points. Within the measured sizes `us` interpolates instead: small
            copies lie above the line.
    """

    nbytes: tuple[int, ...]
    measured_us: tuple[float, ...]
    line: Line

    @classmethod
    def through(cls, points: Sequence[Point]) -> "LinkCurve":
        """The curve of "h2d" points. Raises BadProfile: there is none."""
        ordered = sorted(points)
        sizes, us = tuple(p.of.nbytes for p in ordered), tuple(p.us for p in ordered)
        return cls(sizes, us, fit_line(sizes, us))

    def us(self, nbytes: float) -> float:
        """Microseconds of one copy, in a train of copies."""
        if nbytes < self.nbytes[0]:
            return min(self.measured_us[0], self.line.at(nbytes))
        if nbytes > self.nbytes[-1]:
            return self.measured_us[-1] + (nbytes - self.nbytes[-1]) * self.line.slope
        return interpolate(nbytes, self.nbytes, self.measured_us)

    @property
    def rate_gb_per_s(self) -> float:
        """Of large copies, by the line, GB/s; infinite where all copies took the same time."""
        return 1e-3 / self.line.slope if self.line.slope else float("inf")


@dataclass(frozen=True)
class ExpertCurve:
    """Time of experts of one size by token count: base + experts * us(tokens).

    Attributes:
        base_us: of one submission, however many experts; from a line over their number.
        tokens, each_us: one expert, the base left out; piecewise linear in between.
        error: of the line over the number of experts, and of interpolation with each inner point left out.
    """

    expert: ExpertSize
    base_us: float
    tokens: tuple[int, ...]
    each_us: tuple[float, ...]
    error: FitError

    @classmethod
    def through(cls, points: Sequence[Point]) -> "ExpertCurve":
        """The curve of "cpu" or "gpu" points of one expert size. Raises BadProfile: there is none."""
        if not points:
            raise BadProfile("no point to fit an expert's time to")
        most = max(p.of.experts for p in points)  # with the most experts the base weighs least
        fewest = min(p.of.tokens for p in points if p.of.experts == most)
        counts = sorted((p.of.experts, p.us) for p in points if p.of.tokens == fewest)
        measured = sorted((p.of.tokens, p.us) for p in points if p.of.experts == most)
        tokens, whole_us = [t for t, _ in measured], rising([us for _, us in measured])
        line = fit_line([n for n, _ in counts], [us for _, us in counts])
        base_us = min(line.base_us, *(us for _, us in counts), whole_us[0]) if len(counts) > 1 else 0.0
        each_us = tuple((us - base_us) / most for us in whole_us)
        pairs = [(base_us + n * each_us[0], us) for n, us in counts]
        pairs += left_out(tokens, [us for _, us in measured])
        others = [p for p in points if p.of.experts != most and p.of.tokens != fewest]
        pairs += [(base_us + p.of.experts * interpolate(p.of.tokens, tokens, each_us), p.us) for p in others]
        return cls(points[0].of.expert, base_us, tuple(tokens), each_us, error_of(*zip(*pairs, strict=True)))

    def us(self, tokens: float) -> float:
        """One expert with this many tokens, microseconds; fewer than the fewest measured take as long as those."""
        return interpolate(tokens, self.tokens, self.each_us)

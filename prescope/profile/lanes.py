"""All curves through one machine's points: what copies, CPU experts, GPU experts and the host take. Pure."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

from ..core.types import ExpertSize
from ..errors import BadProfile
from .curves import ExpertCurve, FitError, LinkCurve, error_of, interpolate
from .points import Point

ExpertCurves = Mapping[ExpertSize, ExpertCurve]


class Lanes:
    """Curves by lane.

    Args:
        points: at most one for the same circumstances, at least one copy.

    Raises:
        BadProfile: they are not so.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self._points = tuple(points)
        seen = [point.of for point in self._points]
        if len(set(seen)) < len(seen):
            raise BadProfile(f"measured twice: {next(of for of in seen if seen.count(of) > 1)}")
        if not self.of("h2d"):
            raise BadProfile("a profile needs at least one time of a copy over the link ('h2d')")

    def of(self, kind: str, busy: bool = False) -> list[Point]:
        """The points of a kind."""
        return [point for point in self._points if point.of.kind == kind and point.of.busy == busy]

    @cached_property
    def link(self) -> LinkCurve:
        """Copies to the device while nothing else happens."""
        return LinkCurve.through(self.of("h2d"))

    @cached_property
    def link_beside_cpu(self) -> LinkCurve:
        """Copies while CPU experts run; alone, if that was not measured."""
        return LinkCurve.through(self.of("h2d", busy=True) or self.of("h2d"))

    @cached_property
    def cpu(self) -> ExpertCurves:
        """CPU experts while the link is idle, by size."""
        return _by_expert(self.of("cpu"))

    @cached_property
    def cpu_beside_link(self) -> ExpertCurves:
        """CPU experts while the link copies, by size."""
        return _by_expert(self.of("cpu", busy=True))

    @cached_property
    def gpu(self) -> ExpertCurves:
        """Resident experts on the device, by size."""
        return _by_expert(self.of("gpu"))

    @property
    def measured(self) -> dict[str, ExpertCurves]:
        """The lanes for which experts were measured."""
        named = {"cpu": self.cpu, "cpu beside the link": self.cpu_beside_link, "gpu": self.gpu}
        return {name: curves for name, curves in named.items() if curves}

    def experts_of(self, lane: str, busy_link: bool = True) -> ExpertCurves:
        """Curves of "cpu" or "gpu"; of the CPU beside a busy link or alone, or the other if only that was measured.

        Raises:
            BadProfile: there is neither.
        """
        if lane == "gpu":
            curves = self.gpu
        else:
            curves = self.cpu_beside_link or self.cpu if busy_link else self.cpu or self.cpu_beside_link
        if not curves:
            raise BadProfile(f"no experts were measured on the {lane}; prescope.calibrate() measures them")
        return curves

    def expert_us(self, lane: str, tokens: float, expert: ExpertSize | int, busy_link: bool = True) -> float:
        """One expert, the submission left out; sizes that were not measured are scaled by bytes from the nearest."""
        if tokens <= 0:
            return 0.0
        curve = nearest(self.experts_of(lane, busy_link), expert)
        return curve.us(tokens) * _nbytes(expert) / curve.expert.nbytes

    def layer_us(self, kind: str, expert: ExpertSize, batch: float) -> float | None:
        """Time "rest" or "decide" of a model with experts of this size; None if no engine of one was measured."""
        found = sorted((p.of.tokens, p.us) for p in self.of(kind) if p.of.expert == expert)
        return interpolate(batch, *zip(*found, strict=True)) if found else None

    def small_us(self, kind: str) -> float:
        """A cost by itself: "batch", "enqueue", "read" or "message"; 0.0 where it was not measured."""
        return next((point.us for point in self.of(kind)), 0.0)

    def spread(self, kinds: Collection[str], expert: ExpertSize | None = None) -> float:
        """By what share times of some kinds vary: half of the median spread of their points; 0.0 where none is known.

        Args:
            expert: of this size alone, if any of this size were measured.
        """
        points = [point for point in self._points if point.of.kind in kinds]
        of_size = [point for point in points if point.of.expert == expert]
        spreads = [point.spread for point in of_size or points]
        return float(np.median(spreads)) / 2 if spreads else 0.0

    def dram_gb_per_s(self, busy_link: bool = False) -> float:
        """Rate at which all threads read host memory; NaN where it was not measured."""
        return max((p.of.nbytes / p.us / 1e3 for p in self.of("dram", busy_link)), default=float("nan"))

    @property
    def fit_errors(self) -> dict[str, FitError]:
        """Relative error of every fit: against its own points, or, for "scaled", against other sizes."""
        errors = {"link": self.link.line.error, "link beside CPU experts": self.link_beside_cpu.line.error}
        for lane, curves in self.measured.items():
            errors |= {f"{lane}, {expert}": curve.error for expert, curve in curves.items()}
            if len(curves) > 1:
                errors[f"{lane}, scaled from another size"] = _scaling_error(curves)
        return errors


def nearest(curves: ExpertCurves, expert: ExpertSize | int) -> ExpertCurve:
    """The curve of these sizes, else of the size nearest in bytes, of the same bytes per weight if there is one."""
    if isinstance(expert, ExpertSize) and expert in curves:
        return curves[expert]

    def distance(of: ExpertSize) -> tuple[bool, float]:
        is_alike = not isinstance(expert, ExpertSize) or _weight_bytes(of) == _weight_bytes(expert)
        return not is_alike, abs(np.log(of.nbytes / _nbytes(expert)))

    return curves[min(sorted(curves), key=distance)]


def _weight_bytes(expert: ExpertSize) -> int:
    """Bytes per D x F, which tells the dtype and whether there is a gate; padding and biases do not count."""
    return round(expert.nbytes / max(1, expert.width * expert.expert_width))


def _nbytes(expert: ExpertSize | int) -> int:
    return expert if isinstance(expert, int) else expert.nbytes


def _by_expert(points: Iterable[Point]) -> ExpertCurves:
    groups: dict[ExpertSize, list[Point]] = {}
    for point in points:
        groups.setdefault(point.of.expert, []).append(point)
    return {expert: ExpertCurve.through(groups[expert]) for expert in sorted(groups)}


def _scaling_error(curves: ExpertCurves) -> FitError:
    """How well each size is predicted from the others, so how good the costs of a size that was not measured are."""
    guessed: list[float] = []
    measured: list[float] = []
    for expert, curve in curves.items():
        other = nearest({e: c for e, c in curves.items() if e != expert}, expert)
        for tokens, us in zip(curve.tokens, curve.each_us, strict=True):
            if us > 0:
                guessed.append(other.us(tokens) * expert.nbytes / other.expert.nbytes)
                measured.append(us)
    return error_of(guessed, measured)

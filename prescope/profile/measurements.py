"""What was measured on one machine: the points, where they come from, and the curves through them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..core.machine import Place
from .curves import FitError
from .lanes import Lanes
from .points import Point


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Points of one machine and the curves through them.

    Attributes:
        place: CPU, GPU and link: which machine it is.
        label: where its times come from, for titles: "measured on <GPU>", "emulated ...".
        measured: ISO date of the measurement.
        points: all that was measured (`points.KINDS` says what each is).
        machine: facts and versions, as in `RunResult.hardware`.
        cpu_backend: what computed experts on the CPU.
        link_gb_per_s: rate of an emulated link; None for a real one.
        link_factor: how many times each copy is made, to stand for a slower link.
        origin: how to measure it again.
        notes: what a reader of the numbers must know.
    """

    place: Place
    label: str
    measured: str
    points: tuple[Point, ...]
    machine: Mapping[str, Any] = field(default_factory=dict)
    cpu_backend: str = ""
    link_gb_per_s: float | None = None
    link_factor: int = 1
    origin: str = "prescope.calibrate()"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.lanes  # raises BadProfile now rather than later

    @cached_property
    def lanes(self) -> Lanes:
        """The curves through all points."""
        return Lanes(self.points)

    def dram_gb_per_s(self, *, busy_link: bool = False) -> float:
        """Rate at which all threads read host memory, GB/s; NaN where it was not measured."""
        return self.lanes.dram_gb_per_s(busy_link)

    @property
    def fit_errors(self) -> dict[str, FitError]:
        """Relative error of every fit: against its own points, or, for "scaled", against other sizes."""
        return self.lanes.fit_errors

"""A profile as plain values for JSON, and back, with everything checked."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

from ..core.machine import Place
from ..errors import BadProfile
from .files import FORMAT, VERSION
from .measurements import Measurements
from .points import COLUMNS, point_of, row_of

T = TypeVar("T")


def to_plain(profile: Measurements) -> dict[str, Any]:
    """What the file holds. "fit_errors" is for readers: they are computed anew when a profile is read."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "label": profile.label,
        "measured": profile.measured,
        "place": profile.place._asdict(),
        "machine": dict(profile.machine),
        "cpu_backend": profile.cpu_backend,
        "link_gb_per_s": profile.link_gb_per_s,
        "link_factor": profile.link_factor,
        "origin": profile.origin,
        "notes": list(profile.notes),
        "fit_errors": {name: str(error) for name, error in profile.fit_errors.items()},
        "columns": list(COLUMNS),
        "points": [row_of(point) for point in profile.points],
    }


def from_plain(contents: dict[str, Any], where: str) -> dict[str, Any]:
    """Keywords of `HardwareProfile` from a file's contents; `where` names the file.

    Raises:
        BadProfile: something is missing or is not what it should be.
    """

    def take(
        name: str, kind: type[T] | tuple[type, ...], check: Callable[[Any], bool] = lambda value: True
    ) -> Any:
        if name not in contents:
            raise BadProfile(f"{where}: {name!r} is missing; run prescope.calibrate() again")
        value = contents[name]
        if not isinstance(value, kind) or isinstance(value, bool) or not check(value):
            raise BadProfile(f"{where}: {name} is {value!r}, which it cannot be")
        return value

    columns = take("columns", list)
    if tuple(columns) != COLUMNS:
        raise BadProfile(f"{where}: its points have columns {columns}, this prescope reads {list(COLUMNS)}")
    place = take("place", dict, lambda value: set(value) == set(Place._fields) and _are_words(value))
    rows = take("points", list)
    return {
        "place": Place(
            str(place["cpu"]), _count(place["cores"], where), str(place["device"]), str(place["link"])
        ),
        "label": take("label", str),
        "measured": take("measured", str),
        "machine": take("machine", dict),
        "cpu_backend": take("cpu_backend", str),
        "link_gb_per_s": take(
            "link_gb_per_s", (int, float, type(None)), lambda rate: rate is None or 0 < rate < math.inf
        ),
        "link_factor": take("link_factor", int, lambda factor: factor >= 1),
        "origin": take("origin", str),
        "notes": tuple(map(str, take("notes", list))),
        "points": tuple(point_of(row, f"{where}, point {i}") for i, row in enumerate(rows)),
    }


def _are_words(place: dict[str, Any]) -> bool:
    return all(isinstance(value, str) for name, value in place.items() if name != "cores")


def _count(value: object, where: str) -> int:
    if type(value) is not int or value < 1:
        raise BadProfile(f"{where}: cores is {value!r}, which it cannot be")
    return value

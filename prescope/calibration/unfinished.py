"""Points of a calibration that was interrupted, kept so that the next one goes on where it stopped."""

import time
from pathlib import Path

from ..core.files import read_object
from ..errors import BadProfile
from ..profile import Circumstances, Point, write_json
from ..profile.files import MOST_BYTES
from ..profile.points import point_of, row_of

#: After so long a machine may do other things, and everything is measured anew.
MOST_AGE_S = 3600.0


class Unfinished:
    """The file of an interrupted calibration.

    Args:
        path: of the file, or None to keep nothing.
        identity: what must be equal to go on: machine, link, backends.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self._path, self._identity = path, identity

    def points(self) -> dict[Circumstances, Point]:
        """What an earlier call measured; nothing if it is old, of other settings, or cannot be read."""
        try:
            contents = read_object(self._path, BadProfile, "", MOST_BYTES) if self._path else {}
            points = [point_of(row, "unfinished") for row in contents["points"]]
            is_fresh = 0 <= time.time() - contents["at"] < MOST_AGE_S
        except (OSError, ValueError, KeyError, TypeError, BadProfile):
            return {}  # it only spares time: whatever is wrong with it, measuring anew is right
        return {point.of: point for point in points} if is_fresh and contents["of"] == self._identity else {}

    def keep(self, points: list[Point]) -> None:
        """Write what was measured so far."""
        if self._path is not None and points:
            rows = [row_of(point) for point in points]
            write_json(self._path, {"of": self._identity, "at": time.time(), "points": rows})

    def forget(self) -> None:
        """The calibration is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

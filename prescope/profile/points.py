"""What calibration measures, as one flat table. A point is a time under stated circumstances.

Pure: numbers and words only. Everything else a profile knows (rates, fits, errors) is computed from its points.
"""

import math
from typing import NamedTuple

from ..core.types import ExpertSize
from ..errors import BadProfile

#: kind -> what its `us` is.
KINDS: dict[str, str] = {
    "h2d": "one copy of `nbytes` from host memory to the device in a train of copies; busy: CPU experts run meanwhile",
    "cpu": "`experts` experts with `tokens` tokens each, submitted together to the CPU, until all are done; "
    "busy: the link copies meanwhile",
    "gpu": "the same on the device, all resident: look-up, experts and weighted sum",
    "rest": "the rest of a layer of a model (attention, router, launches) in a decode step of `tokens` sequences",
    "decide": "from the router's choice until the first copy can start, in such a step",
    "batch": "what a batch of one copy takes on the link besides its bytes: marks, the number that says it is there",
    "enqueue": "host time to enqueue one copy",
    "handover": "host time to hand over one copy with its number and mark, as captured steps do; busy: the link copies",
    "read": "a small device-to-host read, the host waiting",
    "message": "a word from the device into host memory, seen by the host, answered by a copy, seen by the device",
    "dram": "reading `nbytes` of host memory by all threads; busy: the link copies meanwhile",
}


#: Of bytes, sizes, counts and microseconds.
MOST = 1e15
#: Microseconds: no clock that measures tells less than a nanosecond, and fits square the inverse of a time.
LEAST_US = 1e-3


class Circumstances(NamedTuple):
    """What was measured; a profile has at most one point of each."""

    kind: str  # of KINDS
    busy: bool = False  # whether the other lane worked meanwhile
    nbytes: int = 0  # of a copy, of a read, or of one expert
    width: int = 0  # D
    expert_width: int = 0  # F
    experts: int = 0  # submitted together
    tokens: int = 0  # of each expert, or the batch

    @property
    def expert(self) -> ExpertSize:
        return ExpertSize(self.nbytes, self.width, self.expert_width)


class Point(NamedTuple):
    """One row of a profile: circumstances, microseconds, and how they were found.

    us: median of the faster half of `runs` samples; spread: (max - min) / median of all.
    """

    of: Circumstances
    us: float
    spread: float
    runs: int


COLUMNS = (*Circumstances._fields, "us", "spread", "runs")


def point_of(row: list[object], where: str) -> Point:
    """A point from a row of COLUMNS.

    Raises:
        BadProfile: it is none; `where` names the file and row.
    """
    if not isinstance(row, list) or len(row) != len(COLUMNS):
        raise BadProfile(f"{where}: a point has {len(COLUMNS)} values ({', '.join(COLUMNS)}), not {row!r}")
    kind, busy, *numbers = row
    if not isinstance(kind, str) or kind not in KINDS:
        raise BadProfile(f"{where}: {kind!r} is not measured by this version; it knows {', '.join(KINDS)}")
    if not isinstance(busy, bool) or any(
        isinstance(n, bool) or not isinstance(n, int | float) for n in numbers
    ):
        raise BadProfile(f"{where}: {row!r} should be a word, true or false, and numbers")
    if any(abs(n) > MOST for n in numbers if isinstance(n, int | float)):
        raise BadProfile(f"{where}: {row!r} has a number that no measurement gives")
    values = [float(n) for n in numbers if isinstance(n, int | float)]
    *sizes, us, spread, runs = values
    if 0 < us < LEAST_US:
        raise BadProfile(f"{where}: {row!r}: no time is below {LEAST_US} us; times are microseconds")
    if not all(map(math.isfinite, values)) or min(*sizes, spread) < 0 or us <= 0 or runs < 1:
        raise BadProfile(f"{where}: {row!r} has a time or size that is not finite, negative or zero")
    if any(size != int(size) for size in (*sizes, runs)):
        raise BadProfile(f"{where}: {row!r}: sizes and counts are whole numbers")
    return Point(Circumstances(str(kind), busy, *map(int, sizes)), us, spread, int(runs))


def row_of(point: Point) -> list[object]:
    """The row of COLUMNS that `point_of` reads."""
    return [*point.of, point.us, point.spread, point.runs]

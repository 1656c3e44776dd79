"""What of a calibration cannot be true, and whether the machine did something else meanwhile. Pure.

A time is never too long by mistake only: two experts that took half as long as one (105 us for 704 MB, H200) were in a
profile that schedules were planned by.
"""

from collections.abc import Sequence
from statistics import median

from ..profile import Circumstances, Point

#: No host memory, and no link to it, gives more GB/s; caches do, so only what is larger than they are is judged.
MOST_HOST_GB_PER_S, LEAST_BYTES = 2_000.0, 1 << 30
#: The peak that a GPU's clock and bus make is not exceeded; a margin for its rounding.
DEVICE_MARGIN = 1.05
#: More experts with the same tokens take at least so much of the time of fewer.
LEAST_SHARE = 0.75
#: On an idle machine half of the points' samples differ by less than this share of their median (H200: 0.17, two shared
#: cores: 0.28).
BUSY_SPREAD = 0.5


def impossible(points: Sequence[Point], device_gb_per_s: float | None = None) -> dict[Circumstances, str]:
    """Points that no machine can give, each with the reason.

    Args:
        device_gb_per_s: peak of the device's memory; None: not known.
    """
    found = {point.of: reason for point in points if (reason := _too_fast(point, device_gb_per_s))}
    believed = [point for point in points if point.of not in found]
    return found | {point.of: reason for point in believed if (reason := _faster_than_fewer(point, believed))}


def _too_fast(point: Point, device_gb_per_s: float | None) -> str:
    of = point.of
    nbytes = of.nbytes * max(1, of.experts)
    if of.kind == "gpu":
        most = None if device_gb_per_s is None else DEVICE_MARGIN * device_gb_per_s
    else:
        most = MOST_HOST_GB_PER_S if of.kind in ("h2d", "cpu", "dram") and nbytes >= LEAST_BYTES else None
    rate = nbytes / point.us / 1e3
    if most is None or rate <= most:
        return ""
    return f"{nbytes / 1e6:,.0f} MB in {point.us:,.0f} us are {rate:,.0f} GB/s, more than memory gives ({most:,.0f})"


def _faster_than_fewer(point: Point, points: Sequence[Point]) -> str:
    """Why a point of several experts is not believed beside those of fewer; empty if it is."""
    of = point.of
    for other in points:
        is_fewer = 0 < other.of.experts < of.experts and other.of._replace(experts=of.experts) == of
        if is_fewer and point.us < LEAST_SHARE * other.us:
            return f"{of.experts} experts in {point.us:,.0f} us, {other.of.experts} in {other.us:,.0f} us"
    return ""


def busy_note(points: Sequence[Point], load: float | None, cores: int) -> str:
    """That the machine was busy while it was measured, with the spread; empty if it was not.

    Args:
        load: mean number of running processes before the calibration, where the system says.
    """
    spread = median(point.spread for point in points) if points else 0.0
    if spread <= BUSY_SPREAD:
        return ""
    others = "" if load is None else f", {load:.1f} processes ran on {cores} cores before it"
    return (
        f"the machine was busy: half of the points' samples differ by more than {spread:.0%} of their median{others}; "
        f"calibrate again when it is idle"
    )

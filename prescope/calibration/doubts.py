"""What of a calibration cannot be true, and whether the machine did something else meanwhile. Pure.

A time is never too long by mistake only: two experts that took half as long as one (105 us for 704 MB, H200) were in a
profile that schedules were planned by.
"""

from collections.abc import Sequence
from statistics import median

from ..profile import Circumstances, Point

#: Kinds whose bytes are all read from memory.
READ = ("h2d", "cpu", "gpu", "dram")
#: What fits into a cache may be faster.
LEAST_BYTES = 512 << 20
#: No host memory, and no link to it, gives more GB/s; nor does a device's, where its own peak is not known.
MOST_HOST_GB_PER_S, MOST_DEVICE_GB_PER_S = 2_000.0, 12_000.0
#: The peak that a GPU's clock and bus make is not exceeded; a margin for its rounding.
DEVICE_MARGIN = 1.05
#: On an idle machine half of the points' samples differ by less than this share of their median (H200: 0.17, two shared
#: cores: 0.28).
BUSY_SPREAD = 0.5


def impossible(points: Sequence[Point], device_gb_per_s: float | None = None) -> dict[Circumstances, str]:
    """Points that no machine can give, each with the reason.

    Args:
        device_gb_per_s: peak of the device's memory; None: not known.
    """
    return {point.of: reason for point in points if (reason := _too_fast(point, device_gb_per_s))}


def _too_fast(point: Point, device_gb_per_s: float | None) -> str:
    """Why a point is not believed: its bytes come from memory, whose rate is known; empty if it is."""
    of = point.of
    nbytes = of.nbytes * max(1, of.experts)
    if of.kind not in READ or nbytes < LEAST_BYTES:
        return ""
    most = MOST_HOST_GB_PER_S
    if of.kind == "gpu":
        most = MOST_DEVICE_GB_PER_S if device_gb_per_s is None else DEVICE_MARGIN * device_gb_per_s
    rate = nbytes / point.us / 1e3
    if rate <= most:
        return ""
    return f"{nbytes / 1e6:,.0f} MB in {point.us:,.0f} us are {rate:,.0f} GB/s, more than memory gives ({most:,.0f})"


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

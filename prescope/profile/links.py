"""Points of the same machine with another link, computed from those that were measured. Pure."""

from collections.abc import Sequence

from .points import Point

#: A copy that took no more than this times bytes / rate had to wait for the emulated link, not the link for it.
PACED = 1.05


def sent_often(points: Sequence[Point], factor: int) -> tuple[Point, ...]:
    """Every copy made `factor` times: it takes that many times as long, and so does enqueueing it. Handed over, all of
    them have one number and mark.

    CPU times beside the link stay as they were beside the full link: an engine that really sends the same bytes several
    times sees them so. A link that is slower by itself would leave the CPU more of the memory.
    """
    enqueue_us = next((p.us for p in points if p.of.kind == "enqueue"), 0.0)

    def slowed(p: Point) -> Point:
        if p.of.kind == "handover":
            return p._replace(us=p.us + (factor - 1) * enqueue_us)
        return p._replace(us=p.us * factor) if p.of.kind in ("h2d", "enqueue") else p

    return tuple(map(slowed, points))


def paced(points: Sequence[Point], old_gb_per_s: float, gb_per_s: float) -> tuple[Point, ...]:
    """An emulated link at another rate: bytes / rate, or what the copy itself took where that was longer."""

    def at_rate(point: Point) -> Point:
        if point.of.kind != "h2d":
            return point
        was_paced = point.us < PACED * point.of.nbytes / (old_gb_per_s * 1e3)
        return point._replace(us=max(point.of.nbytes / (gb_per_s * 1e3), 0.0 if was_paced else point.us))

    return tuple(map(at_rate, points))

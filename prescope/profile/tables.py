"""A profile as tables for people. Pure pandas."""

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd

from .measurements import Measurements
from .points import KINDS


class Row(NamedTuple):
    """One line of `describe`."""

    what: str
    value: float
    unit: str
    fit_error: str = ""


def points_table(profile: Measurements) -> pd.DataFrame:
    """All points, one a row."""
    rows = [{**p.of._asdict(), "us": p.us, "spread": p.spread, "runs": p.runs} for p in profile.points]
    frame = pd.DataFrame(rows)
    frame.attrs["label"] = profile.label
    return frame


def description(profile: Measurements) -> pd.DataFrame:
    """The profile in a few dozen rows."""
    rows = [*_link_rows(profile), *_expert_rows(profile), *_small_rows(profile)]
    frame = pd.DataFrame(rows, columns=["what", "value", "unit", "fit error"])
    frame.attrs["label"] = profile.label
    return frame


def markdown(frame: pd.DataFrame) -> str:
    """A table of `description` as markdown, three digits."""
    lines = [f"| {' | '.join(frame.columns)} |", "|" + "---|" * len(frame.columns)]
    for row in frame.itertuples(index=False):
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _link_rows(profile: Measurements) -> Iterator[Row]:
    for name, busy in (("link", False), ("link beside CPU experts", True)):
        if profile.lanes.of("h2d", busy):
            curve = profile.lanes.link_beside_cpu if busy else profile.lanes.link
            yield Row(f"{name}, rate by the fit", curve.rate_gb_per_s, "GB/s", str(curve.line.error))
            yield Row(f"{name}, latency by the fit", curve.line.base_us, "us")
    for name, busy in (("host memory read", False), ("host memory read beside the link", True)):
        if profile.lanes.of("dram", busy):
            yield Row(name, profile.dram_gb_per_s(busy_link=busy), "GB/s")


def _expert_rows(profile: Measurements) -> Iterator[Row]:
    for name, curves in profile.lanes.measured.items():
        for expert, curve in curves.items():
            error = str(curve.error)
            for tokens, us in zip(curve.tokens, curve.each_us, strict=True):
                yield Row(f"{name}, {expert}, {tokens} tokens", us, "us", error)
                error = ""
            if us := curve.us(1):
                yield Row(f"{name}, {expert}, weights read at 1 token", expert.nbytes / us / 1e3, "GB/s")
            yield Row(f"{name}, {expert}, one submission", curve.base_us, "us")


def _small_rows(profile: Measurements) -> Iterator[Row]:
    for point in profile.points:
        if point.of.kind in ("rest", "decide"):
            yield Row(
                f"{point.of.kind} of a layer, experts of {point.of.expert}, batch {point.of.tokens}",
                point.us,
                "us",
            )
        elif point.of.kind in ("batch", "enqueue", "read", "message"):
            yield Row(KINDS[point.of.kind], point.us, "us")
        elif point.of.kind == "handover":
            beside = "beside a busy link" if point.of.busy else "with an idle link"
            yield Row(f"host time to hand over one copy with its number and mark, {beside}", point.us, "us")

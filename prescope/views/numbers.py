"""The numbers that answer "is it better now?": one row for each of simulated, measured, pinned and bound."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from prescope.core.units import GIB, format_bytes
from prescope.simulator import SimResult, link_frac
from prescope.traces.result import RunResult

from .theme import source_of

NAN = float("nan")


class Numbers(NamedTuple):
    """One row; NaN where it is not known."""

    row: str  # simulated, measured, bound, ...
    tokens_per_s: float  # decode, all sequences
    p50_ms: float  # of a token: of a decode step
    p95_ms: float
    ttft_ms: float  # until the first token
    hit_pct: float  # of distinct experts needed per layer and step
    link_pct: float  # share of the decode time in which the link copies
    mb_per_token: float  # over the link, 10**6 bytes
    slots_gib: float  # memory of the experts' slots


#: Field -> head of its column and what it means.
COLUMNS: dict[str, tuple[str, str]] = {
    "tokens_per_s": ("tokens/s", "decode tokens of all sequences per second"),
    "p50_ms": ("ms per token, p50", "time of a decode step, median: one token of each sequence"),
    "p95_ms": ("p95", "95 of 100 decode steps take no longer"),
    "ttft_ms": ("first token, ms", "from the start of the request to the first token"),
    "hit_pct": ("hit rate, %", "experts that were in their slot when needed, of the distinct ones per layer and step"),
    "link_pct": ("link busy, %", "share of the decode time in which the link copies experts"),
    "mb_per_token": ("MB per token", "copied over the link for each token, 10^6 bytes"),
    "slots_gib": ("GPU memory", "of the experts' slots; the rest of the model comes on top"),
}  # fmt: skip


def numbers(result: RunResult | SimResult) -> Numbers:
    """One result's row, named by its source."""
    return _of_sim(result) if isinstance(result, SimResult) else _of_run(result)


def _of_sim(result: SimResult) -> Numbers:
    steps_ms = result.step_us / 1e3
    copies = len(result.log.copies)
    return Numbers(
        "simulated", result.tokens_per_s, *_percentiles(steps_ms), NAN, 100 * result.counts.hit_rate,
        100 * link_frac(result), copies * result.row_bytes / result.num_tokens / 1e6,
        result.config["num_slots"] * result.row_bytes / GIB,
    )  # fmt: skip


def _of_run(run: RunResult) -> Numbers:
    metrics, decode = run.metrics, run.metrics.decode
    steps = run.steps[run.steps["phase"] == "decode"]
    tokens = int(steps["tokens"].sum())
    has_link = not run.events.empty and decode.num_steps > 0
    return Numbers(
        source_of(run), metrics.tokens_per_s, *_percentiles(steps["dur_us"].to_numpy() / 1e3), metrics.ttft_ms,
        100 * decode.hit_rate, 100 * decode.link_use_frac if has_link else NAN,
        decode.h2d_bytes / tokens / 1e6 if tokens else NAN, run.config["slots_gib"],
    )  # fmt: skip


def numbers_there(row: Mapping[str, Any], row_bytes: int) -> Numbers:
    """A run that was measured where a trace was recorded, as `Recording.measured` keeps it.

    Args:
        row_bytes: of one expert there.
    """
    return Numbers(
        "measured there", row["tokens_per_s"], row["p50_ms"], row["p95_ms"], row.get("ttft_ms", NAN),
        100 * row["hit_rate"], 100 * row["link_use_frac"], row["bytes_per_token"] / 1e6,
        row["num_slots"] * row_bytes / GIB,
    )  # fmt: skip


def _percentiles(ms: np.ndarray) -> tuple[float, float]:
    return (float(np.percentile(ms, 50)), float(np.percentile(ms, 95))) if len(ms) else (NAN, NAN)


#: Before the bounds are found, and where there is none.
NO_BOUND = Numbers("bound", *[NAN] * (len(Numbers._fields) - 1))


def bound_numbers(result: SimResult) -> Numbers:
    """What no schedule can beat with the result's slots on its machine: each column for itself.

    Belady's misses are the fewest copies, not the fewest misses: what a prefetch brings in time is a hit. The mean step
    has a bound, which is that of tokens/s, but its median has none.
    """
    bounds = result.bounds
    copied = bounds.belady_misses * result.row_bytes
    over_link = NAN if result.config["cpu"] else copied / result.num_tokens / 1e6
    return NO_BOUND._replace(tokens_per_s=bounds.tokens_per_s, mb_per_token=over_link)


def numbers_text(rows: Iterable[Numbers]) -> pd.DataFrame:
    """As a person reads it: units in the heads, three digits, "-" where nothing is known."""
    listed = list(rows)
    texts = [[formatted(getattr(row, field), field=field) for field in COLUMNS] for row in listed]
    heads = [head for head, _ in COLUMNS.values()]
    return pd.DataFrame(texts, columns=heads, index=pd.Index([row.row for row in listed], name=""))


def run_in_words(run: RunResult) -> str:
    """What a run was like, in one sentence."""
    metrics, decode = run.metrics, run.metrics.decode
    if not decode.num_steps:
        return f"The first token came after {formatted(metrics.ttft_ms)} ms; nothing was decoded."
    text = (
        f"Measured: {formatted(metrics.tokens_per_s)} tokens/s, {formatted(metrics.tpot_ms)} ms per token; "
    )
    text += f"{100 * decode.hit_rate:.0f} % of the experts needed were in their slots"
    if decode.stall_frac == decode.stall_frac:
        text += f", layers waited for copies {100 * decode.stall_frac:.0f} % of the time"
    return f"{text}."


def change(new: Numbers, old: Numbers) -> Numbers:
    """By how much each number differs: tokens/s in percent, the others in their own unit."""
    values = [a - b for a, b in zip(new[2:], old[2:], strict=True)]
    return Numbers(old.row, 100 * (new.tokens_per_s / old.tokens_per_s - 1), *values)


#: Field -> whether more of it is better; GPU memory is a choice.
MORE_IS_BETTER = {
    "tokens_per_s": True, "p50_ms": False, "p95_ms": False, "ttft_ms": False, "hit_pct": True, "mb_per_token": False,
}  # fmt: skip


def spread_frac(rates: Sequence[float]) -> float:
    """How far the tokens/s of repeated runs lie apart: (most - least) / median; NaN of fewer than two."""
    return (max(rates) - min(rates)) / float(np.median(rates)) if len(rates) > 1 else NAN


def formatted(value: float, signed: bool = False, field: str = "") -> str:
    """Three digits, or as many as a person reads; "-" where nothing is known. Memory has its unit with it."""
    if value != value:
        return "-"
    if field == "slots_gib" and signed and not value:
        return "0"
    if field == "slots_gib":
        mark = "-" if value < 0 else "+" if signed else ""
        return f"{mark}{format_bytes(abs(value) * GIB)}"
    sign = "+" if signed else ""
    size = abs(value)
    if size >= 100:
        return f"{value:{sign},.0f}"
    if size >= 10:
        return f"{value:{sign}.1f}"
    return f"{value:{sign}.2f}" if size >= 0.01 or not value else f"{value:{sign}.2g}"

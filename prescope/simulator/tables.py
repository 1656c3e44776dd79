"""A replay's log as the engine's tables (see `prescope.traces.events`), built column by column.

Shapes: S steps, L MoE layers.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..core.types import Lane, Reason
from ..traces.events import DECODE, DTYPES, KINDS, LANES, LAYER_DTYPES, REASONS, STEP_DTYPES, frame_of
from .prepare import Needs
from .replay import (
    AT_LAYER,
    BEGIN,
    CPU_DONE,
    DECIDED,
    DONE,
    FETCHED,
    GPU_DONE,
    HITS,
    KEY,
    LATE,
    MISSES,
    NEEDED,
    ON_CPU,
    PREFETCHED,
    REASON,
    ROUNDS,
    ROUTED,
    STEP,
    Log,
)


class _Rows(NamedTuple):
    """Rows of the event table of one kind."""

    lane: str
    kind: str
    step: NDArray[np.int64]
    moe_layer: NDArray[np.int64]
    expert: NDArray[np.int64]
    reason: NDArray[np.int64]  # codes of REASONS
    nbytes: int
    start_us: NDArray[np.float64]
    end_us: NDArray[np.float64]


def event_table(log: Log, needs: Needs, row_bytes: int, streams: bool) -> pd.DataFrame:
    """Everything that took time on a lane, by start.

    Args:
        streams: copies ahead belong to whole layers that are streamed, not to predictions.
    """
    parts = [*_layer_rows(log), _step_rows(log), _copy_rows(log, needs, row_bytes, streams)]
    sizes = [len(part.step) for part in parts]

    def column(name: str) -> NDArray[np.generic]:
        return np.concatenate([np.asarray(getattr(part, name)) for part in parts])

    def codes(name: str, words: list[str]) -> NDArray[np.int64]:
        return np.repeat([words.index(getattr(part, name)) for part in parts], sizes)

    start, end = column("start_us").astype(np.float64), column("end_us").astype(np.float64)
    order = np.argsort(start, kind="stable")
    columns = {
        "lane": codes("lane", LANES)[order],
        "kind": codes("kind", KINDS)[order],
        "step": needs.steps[column("step").astype(np.int64)[order]],
        "phase": np.full(len(start), DECODE),
        "moe_layer": column("moe_layer")[order],
        "expert": column("expert")[order],
        "reason": column("reason")[order],
        "bytes": np.repeat([part.nbytes for part in parts], sizes)[order],
        "start_us": start[order],
        "dur_us": (end - start)[order],
    }
    return frame_of(columns, DTYPES)


def layer_table(log: Log, needs: Needs) -> pd.DataFrame:
    """One row per step and MoE layer."""
    S, L, _ = log.counts.shape
    counts = log.counts.reshape(S * L, -1)
    columns = {
        "step": np.repeat(needs.steps, L),
        "phase": np.full(S * L, DECODE),
        "moe_layer": np.tile(np.arange(L), S),
        "tokens": np.repeat(needs.tokens_S, L),
        "needed": counts[:, NEEDED],
        "hits": counts[:, HITS],
        "late": counts[:, LATE],
        "misses": counts[:, MISSES],
        "rounds": counts[:, ROUNDS],
        "on_cpu": counts[:, ON_CPU],
        "prefetched": counts[:, PREFETCHED],
    }
    return frame_of(columns, LAYER_DTYPES)


def step_table(log: Log, needs: Needs) -> pd.DataFrame:
    """One row per decode step."""
    start = np.concatenate(([0.0], log.step_end_us[:-1]))
    columns = {
        "step": needs.steps,
        "phase": np.full(len(start), DECODE),
        "tokens": needs.tokens_S,
        "start_us": start,
        "dur_us": log.step_end_us - start,
    }
    return frame_of(columns, STEP_DTYPES)


def _layer_rows(log: Log) -> list[_Rows]:
    """What each layer did: computing, deciding, waiting."""
    S, L, _ = log.times_us.shape
    step, layer = np.repeat(np.arange(S), L), np.tile(np.arange(L), S)
    t = log.times_us.reshape(S * L, -1)
    spans = [
        (Lane.GPU, "dense", BEGIN, ROUTED, ""),
        (Lane.HOST, "host_wait", ROUTED, DECIDED, ""),
        (Lane.STALL, "stall", DECIDED, FETCHED, ""),
        (Lane.GPU, "experts", FETCHED, GPU_DONE, ""),
        (Lane.CPU, "experts", DECIDED, CPU_DONE, str(Reason.CPU)),
        (Lane.STALL, "cpu_wait", GPU_DONE, DONE, ""),
    ]
    rows = []
    for lane, kind, begin, end, reason in spans:
        there = np.flatnonzero(
            t[:, end] > t[:, begin]
        )  # NaN, where the CPU had nothing to do, is not greater
        rows.append(
            _Rows(
                str(lane),
                kind,
                step[there],
                layer[there],
                np.full(len(there), -1),
                np.full(len(there), REASONS.index(reason)),
                0,
                t[there, begin],
                t[there, end],
            )
        )
    return rows


def _step_rows(log: Log) -> _Rows:
    """What a step does after its last layer."""
    S = len(log.step_end_us)
    last = log.times_us[:, -1, DONE]
    there = np.flatnonzero(log.step_end_us > last)
    none, blank = np.full(len(there), -1), np.zeros(len(there), np.int64)
    return _Rows(
        str(Lane.GPU), "dense", np.arange(S)[there], none, none, blank, 0, last[there], log.step_end_us[there]
    )


def _copy_rows(log: Log, needs: Needs, row_bytes: int, streams: bool) -> _Rows:
    E, copies = needs.num_experts, log.copies.astype(np.int64)
    ahead = REASONS.index(str(Reason.STREAM if streams else Reason.PREFETCH))
    reasons = np.where(copies[:, REASON] == 0, REASONS.index(str(Reason.ON_DEMAND)), ahead)
    return _Rows(
        str(Lane.H2D),
        "transfer",
        copies[:, STEP],
        copies[:, AT_LAYER],
        copies[:, KEY] % E,
        reasons,
        row_bytes,
        log.copy_us[:, 0],
        log.copy_us[:, 1],
    )

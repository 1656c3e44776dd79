"""The event table: one row for everything that took time on a lane.

Engine and simulator write it; metrics, figures and the Perfetto export read it, and nothing else. Knows nothing
of clocks or devices. Times are microseconds since the start of the run.

| column | dtype | meaning |
|---|---|---|
| lane | category | gpu, h2d, cpu, stall, host (`core.types.Lane`) |
| kind | category | dense (all but experts), experts, transfer, host_wait, warm_up, stall, cpu_wait (for a CPU) |
| step | int32 | forward pass within the run, 0 is the prefill |
| phase | category | prefill, decode |
| moe_layer | int16 | rank among MoE layers, -1 where none applies |
| expert | int16 | expert of a transfer, -1 elsewhere |
| reason | category | `core.types.Reason` of transfers and of experts on the CPU; "" elsewhere |
| bytes | int64 | bytes moved by a transfer, 0 elsewhere |
| start_us, dur_us | float64 | start since the run's start, and duration |

A `dense` row of layer l is the compute between the experts of layer l-1 (or the step's start) and the routing of
layer l. A `warm_up` is the part of any of them that went into what is done once: decisions and layers compiled,
a graph recorded. The rows of lanes gpu, stall and host of one step do not overlap: together they are the compute
stream's time.
"""

from collections.abc import Iterable, Mapping
from itertools import repeat
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..core.files import require_checksum
from ..core.types import IntArray, Lane, Reason
from ..errors import BadTrace
from .files import REMEDY, checksum_of, read_table, require_columns, write_table

FORMAT = "prescope-events-1"
LANES = [str(lane) for lane in Lane]
KINDS = ["dense", "experts", "transfer", "stall", "cpu_wait", "host_wait", "warm_up"]
PHASES = ["prefill", "decode"]
#: Their numbers in traces.
PREFILL, DECODE = range(len(PHASES))
#: Whose rows of one step do not overlap, see above.
COMPUTE_LANES = [str(lane) for lane in (Lane.GPU, Lane.STALL, Lane.HOST)]
REASONS = ["", *(str(reason) for reason in Reason)]

DTYPES: dict[str, Any] = {
    "lane": pd.CategoricalDtype(LANES),
    "kind": pd.CategoricalDtype(KINDS),
    "step": np.dtype("int32"),
    "phase": pd.CategoricalDtype(PHASES),
    "moe_layer": np.dtype("int16"),
    "expert": np.dtype("int16"),
    "reason": pd.CategoricalDtype(REASONS),
    "bytes": np.dtype("int64"),
    "start_us": np.dtype("float64"),
    "dur_us": np.dtype("float64"),
}
COLUMNS = list(DTYPES)

#: One row per step and MoE layer: what was needed and how it was found.
LAYER_DTYPES: dict[str, Any] = {
    "step": np.dtype("int32"),
    "phase": pd.CategoricalDtype(PHASES),
    "moe_layer": np.dtype("int16"),
    "tokens": np.dtype("int32"),  # tokens of the step, padding included
    "needed": np.dtype("int16"),  # distinct experts
    "hits": np.dtype("int16"),
    "late": np.dtype("int16"),
    "misses": np.dtype("int16"),
    "rounds": np.dtype("int16"),  # 1 unless the layer needed more experts than there were slots
    "on_cpu": np.dtype("int16"),  # of the misses, those computed on the CPU
    "prefetched": np.dtype("int16"),  # of hits and late, those a prefetch brought that nobody had used since
}

#: One row per forward pass.
STEP_DTYPES: dict[str, Any] = {
    "step": np.dtype("int32"),
    "phase": pd.CategoricalDtype(PHASES),
    "tokens": np.dtype("int32"),  # tokens of the step over all sequences
    "start_us": np.dtype("float64"),
    "dur_us": np.dtype("float64"),  # until the next step's start, so all of a token's time is in it
}


class Event(NamedTuple):
    """One row of the event table."""

    lane: str
    kind: str
    step: int
    phase: str
    moe_layer: int
    expert: int
    reason: str
    bytes: int
    start_us: float
    dur_us: float


class LayerRow(NamedTuple):
    """One row of the layer table."""

    step: int
    phase: str
    moe_layer: int
    tokens: int
    needed: int
    hits: int
    late: int
    misses: int
    rounds: int
    on_cpu: int = 0
    prefetched: int = 0


class StepRow(NamedTuple):
    """One row of the step table."""

    step: int
    phase: str
    tokens: int
    start_us: float
    dur_us: float


def event_frame(rows: Iterable[Event]) -> pd.DataFrame:
    """The event table, sorted by start; an empty one has all columns too."""
    return _frame(sorted(rows, key=attrgetter("start_us")), DTYPES)


def layer_frame(rows: Iterable[LayerRow]) -> pd.DataFrame:
    """The layer table: one row per step and MoE layer."""
    return _frame(rows, LAYER_DTYPES)


def step_frame(rows: Iterable[StepRow]) -> pd.DataFrame:
    """The step table: one row per forward pass."""
    return _frame(rows, STEP_DTYPES)


def frame_of(columns: Mapping[str, ArrayLike], dtypes: Mapping[str, Any]) -> pd.DataFrame:
    """One of the tables from its columns, in the order of `dtypes`; categories by their codes."""
    return pd.DataFrame(
        {
            name: pd.Categorical.from_codes(np.asarray(columns[name], np.int8), dtype=dtype)
            if isinstance(dtype, pd.CategoricalDtype)
            else np.asarray(columns[name], dtype)
            for name, dtype in dtypes.items()
        }
    )


def codes_of(frame: pd.DataFrame, name: str) -> IntArray:
    """A column of categories by their codes in `DTYPES`."""
    codes: IntArray = frame[name].astype(DTYPES[name]).cat.codes.to_numpy(np.int64)
    return codes


def _frame(rows: Iterable[tuple], dtypes: Mapping[str, Any]) -> pd.DataFrame:
    # By column: pandas takes 9 ms for the rows of one step, as long as a small model's step takes.
    by_column: Iterable[tuple] = list(zip(*rows, strict=True)) or repeat(())
    columns: dict[str, ArrayLike] = {}
    for (name, dtype), column in zip(dtypes.items(), by_column, strict=False):
        if isinstance(dtype, pd.CategoricalDtype):
            code = {word: i for i, word in enumerate(dtype.categories)}
            columns[name] = [code[word] for word in column]
        else:
            columns[name] = column
    return frame_of(columns, dtypes)


#: Table of a run -> format of its file, and its columns.
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "events": (FORMAT, DTYPES),
    "layers": ("prescope-layers-1", LAYER_DTYPES),
    "steps": ("prescope-steps-1", STEP_DTYPES),
}
_TIMES = ["start_us", "dur_us"]


def write_events(events: pd.DataFrame, path: str | Path) -> Path:
    """Write an event table as Parquet.

    Raises:
        CannotWrite: no space, or no permission.
    """
    return write_named_table("events", events, path)


def read_events(path: str | Path) -> pd.DataFrame:
    """Read an event table written by `write_events`.

    Raises:
        BadTrace: it is no event table, one of another version, damaged, or not as it was written.
        FileNotFoundError: there is none.
    """
    return read_named_table("events", path)


def write_named_table(name: str, table: pd.DataFrame, path: str | Path) -> Path:
    """Write one of `TABLES` as Parquet; raises as `write_events`."""
    return write_table(path, table, TABLES[name][0], {}, _columns(name, table))


def read_named_table(name: str, path: str | Path) -> pd.DataFrame:
    """Read one of `TABLES`; raises as `read_events`."""
    dtypes = TABLES[name][1]
    one = {"events": "an event", "layers": "a layer", "steps": "a step"}[name]
    frame, stored = read_table(path, None, list(dtypes), f"not {one} table of this version of prescope")
    require_columns(frame, dtypes, path)
    table = frame[list(dtypes)].astype(dtypes)
    times = [column for column in _TIMES if column in dtypes]
    if not np.isfinite(table[times].to_numpy()).all():
        raise BadTrace(f"{path} holds times that are NaN or infinite; {REMEDY}")
    require_checksum(stored.checksum, checksum_of(stored.text, _columns(name, table)), path, BadTrace, REMEDY)
    return table


def digest_of_table(name: str, table: pd.DataFrame) -> str:
    """A checksum of what one of `TABLES` holds."""
    return checksum_of(name, _columns(name, table))


def _columns(name: str, table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Each column as numbers, categories by their codes."""
    dtypes = TABLES[name][1]
    return {
        name: (column.cat.codes if isinstance(column.dtype, pd.CategoricalDtype) else column).to_numpy()
        for name, column in table[list(dtypes)].astype(dtypes).items()
    }

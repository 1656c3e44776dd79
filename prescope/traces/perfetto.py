"""A run's timeline as Chrome-trace JSON in torch.profiler's (Kineto) schema.

Open it at ui.perfetto.dev or chrome://tracing. A process for each run holds one named track for each lane,
above them a track of steps with their MoE layers, and four counters: hit rate of the step, slots used in it, bytes in
flight, link GB/s.
Times are microseconds with nanosecond digits. `tests/traces/test_perfetto.py` checks the schema and that slices of
a track nest. traceinsight (HTA) 0.6.1 loads the file; Perfetto's own importer is a download and was not run.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from ..core.files import write_bytes
from ..core.units import gb_per_s
from ..errors import BadTrace
from .events import COMPUTE_LANES

#: Of the first run.
PID = 1
STEPS_TID = 1
#: lane -> track id, title. Spare ids between them take slices that overlap others of their lane.
LANE_TRACKS: dict[str, tuple[int, str]] = {
    "gpu": (100, "GPU compute"),
    "h2d": (200, "PCIe host to device"),
    "cpu": (300, "CPU experts"),
    "stall": (400, "Stall: compute waits for bytes"),
    "host": (500, "Host wait: compute waits for routing"),
}
_CATEGORY = {
    "gpu": "kernel",
    "h2d": "gpu_memcpy",
    "cpu": "cpu_op",
    "stall": "user_annotation",
    "host": "cpu_op",
}


class Timeline(Protocol):
    """What is drawn of a run, measured or simulated: `RunResult` and `simulator.SimResult` have it."""

    @property
    def events(self) -> pd.DataFrame: ...

    @property
    def layers(self) -> pd.DataFrame: ...

    @property
    def hardware(self) -> dict[str, Any]: ...

    @property
    def config(self) -> dict[str, Any]: ...


def write_perfetto(runs: Timeline | Mapping[str, Timeline], path: str | Path) -> Path:
    """Write the timeline of a run, or of several below each other, by name; compressed when the name ends in `.gz`.

    Runs of one file begin at the same time, each as a process of its own.

    Args:
        path: .json or .json.gz. Hardware and settings of each run are stored under `otherData`, so that the file says
            where it comes from.

    Raises:
        BadTrace: a run has no events: it was made with events=False; or there is no run, or several without names.
        CannotWrite: no space, or no permission.
    """
    if isinstance(runs, list | tuple):
        raise BadTrace(f"{len(runs)} runs without names; give a name to each: {{'on demand': run, ...}}")
    named = runs if isinstance(runs, Mapping) else {"": runs}
    if not named:
        raise BadTrace("there is no run to write")
    for name, run in named.items():
        if run.events.empty:
            which = f"run {name!r}" if name else "run"
            raise BadTrace(f"the {which} has no events to write; run it with events=True")
    origins = [{"name": name, "hardware": run.hardware, "config": run.config} for name, run in named.items()]
    origin = (
        {"runs": origins} if isinstance(runs, Mapping) else {"hardware": runs.hardware, "config": runs.config}
    )
    events = [
        event
        for pid, (name, run) in enumerate(named.items(), PID)
        for event in trace_events(run.events, run.layers, _title(name, run), pid)
    ]
    events.sort(key=lambda e: (e["ph"] != "M", e["ts"], -e.get("dur", 0.0)))  # stable: parents stay first
    document = {
        "schemaVersion": 1,
        "displayTimeUnit": "ms",
        "distributedInfo": {"rank": 0},  # HTA wants it
        "deviceProperties": [],
        "otherData": {"writer": "prescope"} | origin,
        "traceEvents": events,
    }
    # In ASCII: half a surrogate pair in a prompt is escaped like any other letter, and both readers take it.
    text = json.dumps(document, separators=(",", ":"), default=str).encode()
    return write_bytes(path, gzip.compress(text, compresslevel=6) if Path(path).suffix == ".gz" else text)


def _title(name: str, run: Timeline) -> str:
    label = str(run.hardware.get("label", "prescope run"))
    return f"{name}: {label}" if name else label


def trace_events(
    events: pd.DataFrame, layers: pd.DataFrame, process_name: str, pid: int
) -> list[dict[str, Any]]:
    """The `traceEvents` of one run: names first, then slices and counter samples by time, parents first."""
    slices = [*_range_slices(events)]
    tracks = {STEPS_TID: "Steps and MoE layers"}
    for lane, rows in events.groupby("lane", observed=True):
        slices += _lane_slices(str(lane), rows, tracks)
    samples = [*slices, *_of_steps(events, layers), *_link_counters(events[events["lane"] == "h2d"])]
    samples.sort(key=lambda e: (e["ts"], -e.get("dur", 0.0)))
    names = [
        _metadata("process_name", 0, name=process_name),
        _metadata("process_sort_index", 0, sort_index=pid),
    ]
    for tid, title in sorted(tracks.items()):
        names += [
            _metadata("thread_name", tid, name=title),
            _metadata("thread_sort_index", tid, sort_index=tid),
        ]
    return [event | {"pid": pid} for event in names + samples]


def _metadata(kind: str, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "tid": tid, "ts": 0, "args": args}


def _slice(
    name: str, category: str, tid: int, start_ns: int, end_ns: int, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "tid": tid,
        "ts": start_ns / 1e3,
        "dur": (end_ns - start_ns) / 1e3,
        "args": args,
    }


def _nanoseconds(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends as whole nanoseconds, so that neighbours that touch still touch after rounding."""
    starts = rows["start_us"].to_numpy()
    ends = starts + rows["dur_us"].to_numpy()
    return np.rint(starts * 1e3).astype(np.int64), np.rint(ends * 1e3).astype(np.int64)


def _range_slices(events: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Steps, and within each the span of every MoE layer on the compute lanes."""
    compute = events[events["lane"].isin(COMPUTE_LANES)]
    starts, ends = _nanoseconds(compute)
    compute = compute.assign(start_ns=starts, end_ns=ends)
    for (step, phase), first, last in _spans(compute, ["step", "phase"]):
        args = {"step": step, "phase": phase}
        yield _slice(f"ProfilerStep#{step} {phase}", "user_annotation", STEPS_TID, first, last, args)
    in_layers = compute[compute["moe_layer"] >= 0]
    for (step, phase, layer), first, last in _spans(in_layers, ["step", "phase", "moe_layer"]):
        args = {"step": step, "phase": phase, "layer": layer}
        yield _slice(f"layer {layer}", "user_annotation", STEPS_TID, first, last, args)


def _spans(rows: pd.DataFrame, by: list[str]) -> Iterator[tuple[tuple[Any, ...], int, int]]:
    """(key, first nanosecond, last nanosecond) of each group."""
    spans = rows.groupby(by, observed=True).agg(first=("start_ns", "min"), last=("end_ns", "max"))
    yield from zip(spans.index.tolist(), spans["first"].tolist(), spans["last"].tolist(), strict=True)


def _lane_slices(lane: str, rows: pd.DataFrame, tracks: dict[int, str]) -> Iterator[dict[str, Any]]:
    """Slices of a lane; one that overlaps an earlier one goes to a further track, noted in `tracks`."""
    base, title = LANE_TRACKS[lane]
    rows = rows.sort_values("start_us", kind="stable")
    free_at: list[int] = []  # end of the last slice of each track of this lane
    for row, start, end in zip(rows.itertuples(index=False), *_nanoseconds(rows), strict=True):
        track = next((i for i, free in enumerate(free_at) if free <= start), len(free_at))
        free_at[track : track + 1] = [int(end)]
        tracks.setdefault(base + track, title if track == 0 else f"{title} ({track + 1})")
        yield _slice(
            _name(row), _CATEGORY[lane], base + track, int(start), int(end), _args(row, base + track)
        )


def _name(row: Any) -> str:
    if row.kind == "transfer":  # HTA reads the direction from the first eleven characters
        return f"Memcpy HtoD layer {row.moe_layer} expert {row.expert} {row.reason.replace('_', '-')}"
    where = f"layer {row.moe_layer}" if row.moe_layer >= 0 else "after the last MoE layer"
    return f"{row.kind.replace('_', ' ')} {where}"


def _args(row: Any, tid: int) -> dict[str, Any]:
    args: dict[str, Any] = {"step": int(row.step), "phase": row.phase, "layer": int(row.moe_layer)}
    if row.lane in ("gpu", "h2d"):  # HTA takes whatever has a stream for work of the GPU
        args["stream"] = tid
    if row.kind == "transfer":
        args |= {
            "expert": int(row.expert),
            "reason": row.reason,
            "bytes": int(row.bytes),
            "memory bandwidth (GB/s)": round(gb_per_s(row.bytes, row.dur_us), 3),
        }
    return args


def _counter(name: str, ts_ns: float, unit: str, value: float) -> dict[str, Any]:
    return {"ph": "C", "name": name, "tid": 0, "ts": ts_ns / 1e3, "args": {unit: value}}


def _of_steps(events: pd.DataFrame, layers: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Hit rate of each step, and the experts that were computed from slots in it."""
    starts = events.groupby("step")["start_us"].min()
    sums = layers.groupby("step")[["hits", "needed", "on_cpu"]].sum()
    for step, row in sums[sums["needed"] > 0].iterrows():
        if step not in starts.index:
            continue
        ts_ns = round(starts[step] * 1e3)
        yield _counter("hit rate of the step", ts_ns, "%", 100 * row["hits"] / row["needed"])
        yield _counter("slots used in the step", ts_ns, "slots", int(row["needed"] - row["on_cpu"]))


def _link_counters(copies: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Bytes in flight and link GB/s: both change where a copy starts or ends."""
    starts, ends = _nanoseconds(copies)
    nbytes = copies["bytes"].to_numpy()
    rates = nbytes / np.maximum(ends - starts, 1)  # bytes per ns = GB/s
    times, index = np.unique(np.concatenate((starts, ends)), return_inverse=True)
    for name, unit, values in (("bytes in flight", "bytes", nbytes), ("link GB/s", "GB/s", rates)):
        change = np.zeros(len(times))
        np.add.at(change, index, np.concatenate((values, -values)))
        # Adding and taking away floats leaves residues; below a millionth of the peak it is nothing.
        level = np.cumsum(change)
        level[np.abs(level) < 1e-6 * max(values.max(initial=0), 1e-12)] = 0
        for ts_ns, value in zip(times.tolist(), level.tolist(), strict=True):
            yield _counter(name, ts_ns, unit, round(value, 3))

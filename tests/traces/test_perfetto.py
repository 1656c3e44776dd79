import gzip
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from prescope.errors import BadTrace
from prescope.traces.events import Event, event_frame, layer_frame, read_events
from prescope.traces.perfetto import LANE_TRACKS, write_perfetto
from tests.support.small_run import LABEL, NUM_LAYERS, small_run

REQUIRED = {"X": {"name", "cat", "ts", "dur", "pid", "tid", "args"}, "C": {"name", "ts", "pid", "args"}}
REQUIRED["M"] = {"name", "pid", "tid", "args"}
CATEGORIES = {"kernel", "gpu_memcpy", "cpu_op", "user_annotation"}  # of Kineto


def timeline(rows: list[Event]) -> SimpleNamespace:
    return SimpleNamespace(events=event_frame(rows), layers=layer_frame([]), hardware={}, config={})


def read_trace(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def assert_valid(document: dict) -> None:
    """What an importer relies on: keys, order by time, no negative durations, slices of a track that nest."""
    assert document["schemaVersion"] == 1
    last_ts, open_ends = 0.0, defaultdict(list)
    for event in document["traceEvents"]:
        assert event.keys() >= REQUIRED[event["ph"]], event
        if event["ph"] == "M":
            continue
        assert event["ts"] >= last_ts, "not sorted"
        last_ts = event["ts"]
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
            continue
        assert event["dur"] >= 0
        assert event["cat"] in CATEGORIES
        start_ns, end_ns = round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3)
        stack = open_ends[event["tid"]]
        while stack and stack[-1] <= start_ns:
            stack.pop()
        assert not stack or end_ns <= stack[-1], f"{event} crosses the end of its parent"
        stack.append(end_ns)


@pytest.fixture
def run():
    return small_run(steps=5)


@pytest.fixture
def document(run, tmp_path):
    return read_trace(run.save_perfetto(tmp_path / "run.json"))


def test_the_file_has_the_schema_an_importer_relies_on(document):
    assert_valid(document)


def test_the_compressed_file_holds_the_same(run, document, tmp_path):
    assert read_trace(run.save_perfetto(tmp_path / "run.json.gz")) == document


def test_every_event_of_the_run_is_one_slice_of_its_lane(run, document):
    slices = [e for e in document["traceEvents"] if e["ph"] == "X" and e["tid"] >= 100]
    assert len(slices) == len(run.events)
    for lane, (track, _) in LANE_TRACKS.items():
        mine = [e for e in slices if track <= e["tid"] < track + 100]
        rows = run.events[run.events["lane"] == lane]
        assert len(mine) == len(rows)
        assert sum(e["dur"] for e in mine) == pytest.approx(rows["dur_us"].sum(), abs=1e-3 * (1 + len(rows)))


def test_there_is_one_process_and_every_track_has_a_name(document):
    events = document["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {e["tid"] for e in events if e["ph"] == "X"} == set(names)
    assert len({e["pid"] for e in events}) == 1
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [LABEL]


def test_transfers_say_layer_expert_reason_bytes_and_bandwidth(run, document):
    copies = [e for e in document["traceEvents"] if e.get("cat") == "gpu_memcpy"]
    assert sum(e["args"]["bytes"] for e in copies) == run.metrics.h2d_bytes
    assert {e["args"]["reason"] for e in copies} == {"on_demand", "prefetch"}
    for event in copies:
        assert event["name"].startswith("Memcpy HtoD")
        assert 0 <= event["args"]["layer"] < NUM_LAYERS
        assert event["args"]["memory bandwidth (GB/s)"] == pytest.approx(25.0, rel=1e-3)


def test_steps_hold_their_layers(document):
    ranges = [e for e in document["traceEvents"] if e.get("cat") == "user_annotation" and e["tid"] == 1]
    steps = [e for e in ranges if e["name"].startswith("ProfilerStep#")]
    assert [e["args"]["step"] for e in steps] == list(range(5))
    assert len(ranges) == 5 * (1 + NUM_LAYERS)


def test_counters_start_and_end_at_nothing_in_flight(run, document):
    def series(name: str) -> list[float]:
        return [next(iter(e["args"].values())) for e in document["traceEvents"] if e["name"] == name]

    in_flight = series("bytes in flight")
    assert min(in_flight) == 0
    assert in_flight[-1] == 0
    assert max(series("link GB/s")) == pytest.approx(25.0, rel=1e-3)
    by_step = run.layers.groupby("step")[["hits", "needed"]].sum()
    expected = 100 * by_step["hits"] / by_step["needed"]
    assert series("hit rate of the step") == pytest.approx(expected.tolist())
    on_gpu = run.layers.groupby("step")[["needed", "on_cpu"]].sum()
    assert series("slots used in the step") == (on_gpu["needed"] - on_gpu["on_cpu"]).tolist()


def test_several_runs_are_processes_of_one_file(run, document, tmp_path):
    """Side by side on one time: each holds what it holds alone, under a name of its own."""
    other = small_run(steps=3, seed=1)
    together = read_trace(write_perfetto({"a": run, "b": other}, tmp_path / "two.json.gz"))
    assert [one["name"] for one in together["otherData"]["runs"]] == ["a", "b"]
    names = [e["args"]["name"] for e in together["traceEvents"] if e["name"] == "process_name"]
    assert names == [f"a: {LABEL}", f"b: {LABEL}"]
    for pid, alone in ((1, document), (2, read_trace(other.save_perfetto(tmp_path / "b.json")))):
        mine = [e for e in together["traceEvents"] if e["pid"] == pid]
        assert_valid({**together, "traceEvents": mine})
        slices = [[e for e in events if e["ph"] == "X"] for events in (mine, alone["traceEvents"])]
        assert [e["ts"] for e in slices[0]] == [e["ts"] for e in slices[1]]
    with pytest.raises(BadTrace, match="no run"):
        write_perfetto({}, tmp_path / "none.json")
    with pytest.raises(BadTrace, match="2 runs without names"):
        write_perfetto([run, run], tmp_path / "list.json")


def test_the_event_table_is_saved_as_parquet(run, tmp_path):
    pd.testing.assert_frame_equal(read_events(run.save_events(tmp_path / "e.parquet")), run.events)


def test_copies_that_overlap_get_tracks_of_their_own(tmp_path):
    """Slices that cross on one track are dropped or misdrawn by viewers."""
    rows = [
        Event("h2d", "transfer", 0, "prefill", 0, expert, "on_demand", 10, start, 10.0)
        for expert, start in enumerate((0.0, 4.0, 10.0, 14.0))
    ]
    path = write_perfetto(timeline(rows), tmp_path / "t.json")
    document = read_trace(path)
    assert_valid(document)
    tracks = [e["tid"] for e in document["traceEvents"] if e.get("cat") == "gpu_memcpy"]
    assert tracks == [200, 201, 200, 201]


def test_neighbours_that_touch_still_touch_after_rounding(tmp_path):
    """A third of a microsecond has no exact decimal: start and duration rounded apart would overlap."""
    third = 1 / 3
    rows = [Event("gpu", "dense", 0, "prefill", i, -1, "", 0, i * third, third) for i in range(300)]
    path = write_perfetto(timeline(rows), tmp_path / "t.json")
    document = read_trace(path)
    assert_valid(document)
    assert {e["tid"] for e in document["traceEvents"] if e.get("cat") == "kernel"} == {100}


def test_the_file_says_where_it_comes_from(run, document):
    assert document["otherData"]["hardware"] == run.hardware
    assert document["otherData"]["config"] == run.config


def test_a_run_without_events_is_refused_with_the_remedy(run, tmp_path):
    with pytest.raises(BadTrace, match="events=True"):
        write_perfetto(timeline([]), tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()

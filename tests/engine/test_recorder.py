"""The recording of steps that ran from a graph: their stamps become the same three tables as everything else."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prescope.core.types import Reason
from prescope.device import NullDevice
from prescope.engine.positions import Forward
from prescope.engine.recorder import Recorder
from prescope.kernels import StepLog
from prescope.traces.events import PHASES
from prescope.traces.metrics import compute_metrics
from prescope.traces.result import RunResult

LAYERS, TOKENS, TOP_K = 2, 1, 2
ROW_BYTES = [1000, 1000]


def step_log(begin_us: float, *, missing: list[int], fetched_by_gpu: bool = True) -> StepLog:
    """Two layers: 10 us around each, 1 us to decide, 20 us for each miss, 5 us of experts; 10 us at the end."""
    now, stamps = begin_us, []
    for count in missing:
        routed = now + 10
        decided = routed + 1
        fetched = decided + 20 * count
        now = fetched + 5
        stamps.append([routed, decided, fetched, now, 0])
    fetched_ids = np.full((LAYERS, 2), -1, dtype=np.int32)
    if fetched_by_gpu:
        for layer, count in enumerate(missing):
            fetched_ids[layer, :count] = np.arange(count) + 3
    return StepLog(
        tokens=np.array([7]),
        ids_LTK=np.array([[[3, 4]], [[3, 5]]], dtype=np.int32),
        weights_LTK=np.full((LAYERS, TOKENS, TOP_K), 0.5, dtype=np.float32),
        needs=np.array([[2, count] for count in missing], dtype=np.int32),
        fetched=fetched_ids,
        stamps_ns=(np.array(stamps) * 1e3).astype(np.int64),
        begin_ns=int(begin_us * 1e3),
        end_ns=int((now + 10) * 1e3),
    )


@pytest.fixture
def recording():
    """A prefill by marks, then two graph steps by stamps; the GPU's clock is 1,000,000 us ahead of the run's."""
    device = NullDevice()
    recorder = Recorder(device, events=True, routing=True, inputs=False)
    recorder.begin_step(Forward(1, 4, 0, "prefill", object()))
    recorder.routed(0, device.mark(True))
    recorder.computed(0, device.mark(True))
    recorder.anchor(device.mark(True), 1_000_000_000)
    for begin, missing in ((1_000_100.0, [1, 0]), (1_000_200.0, [2, 1])):
        recorder.log(recorder.begin_logged_step(1), step_log(begin, missing=missing))
    return recorder


def test_a_graph_steps_rows_fill_its_time_without_overlap(recording):
    tables = recording.tables(ROW_BYTES)
    for step in (1, 2):
        rows = tables.events[
            (tables.events["step"] == step) & tables.events["lane"].isin(["gpu", "stall", "host"])
        ]
        ends = rows["start_us"] + rows["dur_us"]
        assert (rows["start_us"].to_numpy()[1:] >= ends.to_numpy()[:-1] - 1e-6).all(), (
            "two rows of one stream overlap"
        )
    steps = tables.steps
    assert steps["phase"].tolist() == ["prefill", "decode", "decode"]
    assert steps["dur_us"].tolist()[1] == pytest.approx(100.0), "from one step's start to the next one's"
    gap = tables.events[(tables.events["kind"] == "host_wait") & (tables.events["moe_layer"] < 0)]
    # 100 us from start to start, of which 62 are the step: 2 x (10 + 1 + 5) + one miss of 20 + 10 at the end.
    assert gap["dur_us"].tolist() == [pytest.approx(38.0)]


def test_what_the_gpu_fetched_is_on_the_link_and_shares_the_wait(recording):
    tables = recording.tables(ROW_BYTES)
    copies = tables.events[tables.events["kind"] == "transfer"]
    assert copies[["step", "moe_layer", "expert"]].to_numpy().tolist() == [
        [1, 0, 3],
        [2, 0, 3],
        [2, 0, 4],
        [2, 1, 3],
    ]
    assert copies["dur_us"].tolist() == [pytest.approx(20.0)] * 4
    assert copies["bytes"].tolist() == [1000] * 4
    stall = tables.events[tables.events["kind"] == "stall"]["dur_us"].sum()
    assert stall == pytest.approx(copies["dur_us"].sum())


def test_counts_routing_metrics_and_pictures_are_as_of_any_run(recording, tmp_path):
    tables = recording.tables(ROW_BYTES)
    decode = tables.layers[tables.layers["phase"] == "decode"]
    assert decode["needed"].sum() == 8
    assert decode["misses"].tolist() == [1, 0, 2, 1]
    metrics = compute_metrics(*tables, batch=1, output_tokens=3)
    assert metrics.decode.miss_rate == pytest.approx(4 / 8)
    assert metrics.decode.stall_ms == pytest.approx(0.08)
    trace = recording.trace(
        num_experts=8, decoder_layers=[0, 1], model="m", fingerprint="f", versions={"prescope": "0"}
    )
    assert trace.expert_ids[trace.phase == PHASES.index("decode")][:, 0].tolist() == [[3, 4], [3, 4]]
    run = RunResult(
        text=[""], tokens=[[7]], metrics=metrics, events=tables.events, layers=tables.layers, steps=tables.steps,
        trace=trace, config={"num_slots": 8, "slots_frac": 0.5, "cache": "lru"},
        hardware={"label": "virtual clock", "link": "virtual"},
    )  # fmt: skip
    assert run.save_perfetto(tmp_path / "timeline.json").stat().st_size > 0
    views = pytest.importorskip("prescope.views", reason="of the extra lab", exc_type=ImportError)
    info = views.lanes_info(run, range(1, 3))
    assert len(info.layers) == 2 * LAYERS
    assert info.end_ms == pytest.approx((100 + 2 * 16 + 3 * 20 + 10) / 1e3)


def test_a_step_launched_after_the_end_leaves_nothing(recording):
    recording.begin_logged_step(1)
    recording.drop_step()
    tables = recording.tables(ROW_BYTES)
    assert len(tables.steps) == 3
    assert tables.events["step"].max() == 2


def test_a_step_that_waits_for_the_cpu_says_so_and_a_batch_of_copies_shares_its_time(recording):
    log = step_log(1_000_300.0, missing=[1, 0], fetched_by_gpu=False)
    log.stamps_ns[:, 4] = log.stamps_ns[:, 3] - 2_000  # the GPU's part ends 2 us before the layer does
    number = recording.begin_logged_step(1)
    begin = recording._device.mark(True)
    recording._device.now_us += 30.0 - recording._device._compute_us
    end = recording._device.mark(True)
    events = SimpleNamespace(mark=lambda place: {7: begin, 8: end}[place])
    needs = np.array([[2, 0, 0, 1, 0]])
    on_demand = list(Reason).index(Reason.ON_DEMAND)
    copies = np.array([[0, 3, on_demand, 7, 8, 0, 2], [0, 5, on_demand, 7, 8, 1, 2]])
    recording.served(number, TOKENS, needs, copies, np.array([[0, number, 1_000, 9_000]]), events)
    recording.served_late(np.array([[0, number + 1, 1_000, 9_000]]))  # of a step that never was
    recording.log(number, log, is_counted=True)
    tables = recording.tables(ROW_BYTES)
    waits = tables.events[tables.events["kind"] == "cpu_wait"]
    assert len(waits) == LAYERS and np.allclose(waits["dur_us"], 2.0)
    moved = tables.events[(tables.events["kind"] == "transfer") & (tables.events["step"] == number)]
    assert moved["expert"].tolist() == [3, 5]
    assert moved["dur_us"].tolist() == [pytest.approx(15.0)] * 2
    on_cpu = tables.events[tables.events["lane"] == "cpu"]
    assert on_cpu["dur_us"].tolist() == [pytest.approx(8.0)]
    rows = tables.layers[tables.layers["step"] == number]
    assert len(rows) == 1 and rows["on_cpu"].tolist() == [1], (
        "the host counted while it served, and nobody again"
    )


def test_recorded_inputs_saturate_and_what_is_not_finite_is_said():
    """A run is over when its trace is made: a NaN must not take its text away."""

    def recorded(value):
        recorder = Recorder(NullDevice(), events=False, routing=True, inputs=True)
        recorder.begin_step(Forward(1, 1, 0, "prefill", object()))
        recorder.routing(0, np.array([[0]]), torch.ones(1, 1), torch.tensor([[value, 1.5]]))
        trace = recorder.trace(num_experts=2, decoder_layers=[0], model="m", fingerprint="f")
        return trace.inputs.tolist(), recorder.notes()

    assert recorded(-1e9) == ([[[-65504.0, 1.5]]], [])
    for value in ("inf", "nan"):
        inputs, (note,) = recorded(float(value))
        assert inputs == [[[0.0, 1.5]]] and "router inputs of 1 tokens are not finite in MoE layer 0" in note


def test_compiling_decisions_is_warm_up_and_in_no_figure_of_speed(monkeypatch):
    """Seconds on the first call of a process, wherever in a layer that is; they were shown as a host that waits."""
    compiled_us = [5.0]
    monkeypatch.setattr("prescope.engine.recorder.warm_up_us", lambda: compiled_us[0])
    device = NullDevice()
    recorder = Recorder(device, events=True, routing=False, inputs=False)

    def passes(us: float = 0.0) -> None:
        device.now_us += 950.0 + us  # and a mark takes 50
        compiled_us[0] += us

    for phase in ("prefill", "decode"):
        recorder.begin_step(Forward(1, 4, 0, phase, object()))
        for layer, us in enumerate((0.0, 700.0, 0.0)):
            passes(10 * us)  # a copy that follows the layer before
            recorder.routed(layer, device.mark(True))
            passes(us)
            recorder.decided(layer, device.mark(True))
            passes()
            recorder.computed(layer, device.mark(True))
    tables = recorder.tables([1, 1, 1])
    events = tables.events[tables.events["moe_layer"] == 1]
    first = [(row.lane, row.kind, row.dur_us) for row in events[events["step"] == 0].itertuples()]
    assert sorted(first) == [
        ("gpu", "dense", 1000.0), ("gpu", "experts", 1000.0), ("host", "host_wait", 1000.0),
        ("host", "warm_up", 700.0), ("host", "warm_up", 7000.0),
    ]  # fmt: skip
    ends = (tables.events["start_us"] + tables.events["dur_us"]).sort_values().to_numpy()
    starts = tables.events["start_us"].sort_values().to_numpy()
    assert (ends[:-1] == starts[1:]).all(), "the compute lane's rows follow one another"
    metrics = compute_metrics(*tables, batch=1, output_tokens=2)
    # Per step nine spans and a mark at its begin, 50 us each of which the last span's is beside.
    assert metrics.prefill.warm_up_ms == metrics.decode.warm_up_ms == 7.7
    assert metrics.ttft_ms == pytest.approx(metrics.prefill.wall_ms - 7.7 + tables.steps["start_us"][0] / 1e3)
    assert metrics.tpot_ms == pytest.approx(metrics.decode.wall_ms - 7.7)
    assert metrics.tokens_per_s == pytest.approx(1e3 / metrics.tpot_ms)
    assert metrics.end_to_end_s == pytest.approx((metrics.ttft_ms + metrics.tpot_ms) / 1e3)


def test_warm_up_that_no_event_tells_apart_is_said(monkeypatch):
    compiled_us = [5.0]
    monkeypatch.setattr("prescope.engine.recorder.warm_up_us", lambda: compiled_us[0])

    def notes(events: bool) -> list[str]:
        recorder = Recorder(NullDevice(), events=events, routing=False, inputs=False)
        assert recorder.notes() == []
        compiled_us[0] += 2_500_000.0
        return recorder.notes()

    assert notes(events=True) == []
    (note,) = notes(events=False)
    assert note.startswith("2.5 s of this run went") and "its times hold that" in note

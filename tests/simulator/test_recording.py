"""A recording holds all that a simulation needs: what is loaded replays to the same microsecond as what was saved."""

import json
from dataclasses import replace

import numpy as np
import pytest

from prescope.errors import BadTrace, TraceMismatch, UnsupportedOption
from prescope.predictor import BadPredictor, Oracle, RecordedPredictor
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Machine, Recording, Scenario, Scenarios
from tests.support.small_run import small_trace

COSTS = LayerCosts(
    link_us=60.0, gpu_us=12.0, rest_us=25.0, decide_us=6.0, cpu_us=(0.0, 40.0, 50.0), source="made up"
)
MACHINE = Machine("elsewhere", COSTS, 1_500_000, 30.0, 2, on_demand=replace(COSTS, decide_us=0.0))


def recorded(trace, seed: int = 0) -> RecordedPredictor:
    rng = np.random.default_rng(seed)
    rows, L, E = int((trace.phase == 1).sum()), trace.num_layers, trace.num_experts
    scores = [rng.random((rows, L - ahead, E)).astype(np.float32) for ahead in (1, 2)]
    return RecordedPredictor.of_scores(trace, scores, name="llapor", is_calibrated=True)


@pytest.fixture
def recording():
    trace = small_trace(steps=9, seed=4)
    return Recording(trace=trace, predictors=[recorded(trace)], machine=MACHINE, predict_us={"llapor": 3.0})


@pytest.mark.parametrize("schedule", ["on-demand", "presched"])
def test_a_loaded_recording_replays_as_the_saved_one(recording, tmp_path, schedule):
    recording.save(tmp_path, "small.b2")
    again = Recording.load(tmp_path / "small.b2.json")
    scenario = Scenario(schedule=schedule, slots=12, machine="elsewhere")
    before, after = (one.scenarios().run(scenario) for one in (recording, again))
    assert after.log.step_end_us.tolist() == before.log.step_end_us.tolist()
    assert after.config == before.config
    assert after.config["predictor"] == ("llapor" if schedule == "presched" else "none")


def test_on_demand_does_not_wait_for_a_host_that_decides_nothing(recording):
    """The device decides by itself there; charged with the host's decision, prediction would look better than it is."""
    result = recording.scenarios().run(Scenario(schedule="on-demand", slots=12, machine="elsewhere"))
    assert result.metrics.decode.host_wait_ms == 0.0
    other = replace(recording, machine=MACHINE._replace(on_demand=None)).scenarios()
    assert other.run(Scenario(schedule="on-demand", slots=12, machine="elsewhere")).total_us > result.total_us


def test_scores_come_back_in_the_rows_of_the_decode_steps(recording):
    trace, one = recording.trace, recording.predictors[0]
    made = one.replay(trace, 1)
    assert made.shape == (len(trace), trace.num_layers - 1, trace.num_experts)
    assert not made[trace.phase == 0].any()
    assert made[trace.phase == 1].any(axis=(1, 2)).all()


def test_predictions_belong_to_one_trace(recording):
    with pytest.raises(TraceMismatch, match="another trace"):
        recording.predictors[0].replay(small_trace(steps=9, seed=5), 1)
    with pytest.raises(UnsupportedOption, match="train"):
        recording.predictors[0].predict(0, None)


def test_recorded_predictions_are_not_run_for_real(recording):
    here = replace(recording, machine=MACHINE._replace(is_here=True)).scenarios()
    why = here.why_not_here(Scenario(slots=12, predictor="llapor", machine="elsewhere"))
    assert "recorded" in why


def test_an_oracle_written_down_stays_one(tmp_path):
    trace = small_trace(steps=5)
    oracle = Oracle(trace.shape, 2)
    rows = trace.phase == 1
    kept = RecordedPredictor.of_scores(
        trace, [oracle.replay(trace, a)[rows] for a in (1, 2)], name="all-knowing", is_calibrated=True
    )
    path = kept.save(tmp_path / "o.safetensors")
    again = RecordedPredictor.load(path)
    assert (again.name, again.lookahead, again.shape) == ("all-knowing", 2, trace.shape)
    assert np.array_equal(again.replay(trace, 2)[rows], oracle.replay(trace, 2)[rows])


@pytest.mark.parametrize("damage", ["cut", "other format", "no costs"])
def test_a_damaged_recording_says_so(recording, tmp_path, damage):
    path = recording.save(tmp_path, "small")[0]
    contents = json.loads(path.read_text())
    if damage == "cut":
        path.write_text(path.read_text()[:200])
    elif damage == "other format":
        path.write_text(json.dumps(contents | {"version": 99}))
    else:
        path.write_text(json.dumps(contents | {"machine": {}}))
    with pytest.raises(BadTrace, match=r"small\.json"):
        Recording.load(path)


def test_scores_outside_probability_are_refused():
    trace = small_trace(steps=3)
    rows = int((trace.phase == 1).sum())
    wrong = np.full((rows, trace.num_layers - 1, trace.num_experts), 1.5, np.float32)
    with pytest.raises(BadPredictor, match="record them again"):
        RecordedPredictor.of_scores(trace, [wrong], name="x", is_calibrated=False)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(BadTrace, match="come with prescope"):
        Recording.load("no such recording")


def test_a_measured_run_is_found_by_its_very_setting_and_by_no_other():
    scenarios = Recording.load("medium.b1").scenarios()
    here = next(iter(scenarios.machines))
    other = Scenario(slots=128, machine=here)
    assert scenarios.measured_there(other)["way"] == "presched, CPU lane"
    assert scenarios.measured_there(replace(other, cpu=False))["way"] == "presched"
    assert scenarios.measured_there(replace(other, schedule="on-demand"))["way"] == "on-demand"
    assert scenarios.measured_there(replace(other, recall=0.3))["way"] == "presched, CPU lane", (
        "of another predictor"
    )
    for change in (
        {"slots": 127},
        {"lookahead": 1},
        {"predictor": "oracle"},
        {"cache": "lfu"},
        {"schedule": "fate"},
    ):
        assert scenarios.measured_there(replace(other, **change)) is None, change
    without = Scenarios(scenarios.trace, list(scenarios.machines.values()), scenarios.predictors.values())
    assert without.measured_there(Scenario(slots=128, machine=here)) is None

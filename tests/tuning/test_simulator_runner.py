"""Points on the simulator are the simulator's own answers, in whichever process they are asked for."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest

from prescope.errors import TraceMismatch, UnsupportedOption
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Machine, Recording, Scenario, Scenarios, Simulator
from prescope.traces.synthetic import SyntheticSpec
from prescope.tuning import Choices, Range, SimulatorRunner, Space, open_sweep
from prescope.tuning.candidates import simulated_default
from prescope.tuning.evaluate import evaluate
from prescope.tuning.points import Asked
from prescope.weights.formats import PACKED, lossy_name

COSTS = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=50.0, cpu_us=(0.0, 300.0, 400.0), source="made up")
SPEC = SyntheticSpec(num_layers=4, num_experts=16, top_k=2, zipf=0.5, persistence=0.3)


@pytest.fixture(scope="module")
def recording():
    return Recording.load("medium.b1")


@pytest.fixture(scope="module")
def runner(recording):
    return SimulatorRunner.of_recording(recording)


def outcome(runner, **settings):
    return evaluate(runner, Asked(0, settings, 0), {}, ["tokens_per_s"], lambda: False)


def test_a_point_is_what_a_dashboard_shows(runner, recording):
    scenarios = recording.scenarios()
    machine = recording.machine.name
    for settings in (
        {"schedule": "on-demand", "slots": 64},
        {"schedule": "presched", "slots": 100, "lookahead": 3, "threshold": 0.4, "width": 8},
        {"schedule": "hybrimoe", "slots": 40, "predictor": "oracle", "cpu": False},
        {"schedule": "presched", "slots": 80, "predictor": "noisy oracle", "recall": 0.7},
        {"schedule": "presched", "slots": 80, "cache": "lru", "predictor": None, "width": None},
    ):
        shown = scenarios.run(Scenario(machine=machine, **settings))
        found = runner.run(settings)
        assert found.values["tokens_per_s"] == shown.tokens_per_s
        assert found.values["gpu_bytes"] == shown.config["num_slots"] * shown.row_bytes
        assert found.values["p50_ms"] <= found.values["p95_ms"]
        assert (found.origin, found.machine) == ("simulated", machine)


@pytest.mark.parametrize("form", [*PACKED, None])
def test_a_point_on_a_packed_models_routing_says_that_it_is_lossy(form):
    model = "a model" if form is None else lossy_name("a model", form)
    trace = replace(SPEC.generate(new_tokens=4, prompt_tokens=4), model=model)
    found = SimulatorRunner(trace, Machine("made up", COSTS, 1000, 0.0, 0)).run({"slots": 8})
    assert found.machine == ("made up" if form is None else f"made up, {form} experts (lossy)")


def test_another_process_finds_the_same(runner):
    there = pickle.loads(pickle.dumps(runner))
    settings = {"slots": 0.3, "schedule": "presched", "threshold": 0.3}
    assert there.run(settings) == runner.run(settings)
    assert there.about() == runner.about()
    assert len(pickle.dumps(there)) < 2 * len(pickle.dumps(runner))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slots": 2}, "SlotPoolTooSmall"),
        ({"width": 33}, "width is 33"),
        ({"lookahead": 6}, "lookahead is 6"),
        ({"schedule": "presched", "batch": 2, "predictor": "llapor"}, "predictor is 'llapor'"),
    ],
)
def test_what_the_library_refuses_is_infeasible(runner, settings, said):
    found = outcome(runner, **{"slots": 40, "schedule": "presched"} | settings)
    assert found.state == "infeasible"
    assert said in found.reason


def test_settings_that_a_schedule_does_not_look_at_do_not_make_it_infeasible(runner):
    found = outcome(runner, schedule="on-demand", slots=40, lookahead=4, width=32, threshold=1.0, cpu=True)
    assert found.state == "finished"


def test_machines_traces_and_batches_move_like_other_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    traces = {name: SPEC.generate(new_tokens=12, batch=2, seed=i) for i, name in enumerate(("calm", "wild"))}
    runner = SimulatorRunner(traces, COSTS, row_bytes=1000, slots=0.5)
    space = Space(
        trace=Choices("calm", "wild"),
        batch=Choices(None, 1, 2),
        machine=Choices("made up"),
        slots=Choices(0.25, 20),
    )
    sweep = open_sweep("a", space, runner, method="grid", objectives=("tokens_per_s", "p95_ms"))
    assert sweep.run().finished == 12
    points = sweep.points()
    assert list(points.columns).count("machine") == 1 and (points["machine"] == "made up").all()
    assert points["tokens_per_s"].nunique() >= 6
    with pytest.raises(UnsupportedOption, match="'calm', 'wild'"):
        open_sweep("b", Space(trace=Choices("windy")), runner)


def test_costs_alone_are_a_machine():
    trace = SPEC.generate(new_tokens=12)
    runner = SimulatorRunner(trace, COSTS, row_bytes=1000)
    by_hand = Simulator(trace, COSTS, row_bytes=1000).run("on-demand", slots=12, least_bytes=0)
    assert runner.run({"schedule": "on-demand", "slots": 12}).values["tokens_per_s"] == by_hand.tokens_per_s
    with pytest.raises(UnsupportedOption, match="row_bytes"):
        SimulatorRunner(trace, COSTS)


def test_traces_of_different_models_are_refused():
    others = {"a": SPEC.generate(), "b": SPEC.with_shape(4, 8, 2).generate()}
    with pytest.raises(TraceMismatch, match="'b'"):
        SimulatorRunner(others, COSTS, row_bytes=1000)


def test_the_time_to_the_first_token_is_not_promised(runner):
    with pytest.raises(UnsupportedOption, match=r"ttft_ms.*no prefill.*'tokens_per_s'"):
        open_sweep("a", Space(slots=Range(0.1, 0.9)), runner, objectives=("ttft_ms",))


def test_what_a_dashboard_simulates_can_be_swept(recording):
    scenarios = recording.scenarios()
    runner = SimulatorRunner.of_scenarios(scenarios)
    settings = {"schedule": "presched", "slots": 90}
    machine = scenarios.first_machine
    assert (
        runner.run(settings).values["tokens_per_s"]
        == scenarios.run(Scenario(machine=machine, **settings)).tokens_per_s
    )


def test_points_know_the_hot_experts_that_the_engine_knows():
    """A session tells its engine what the last run used, and PreSched begins with it: so do a sweep's points."""
    trace = SPEC.generate(new_tokens=12, batch=2)
    hot = SPEC.generate(new_tokens=30, batch=4, seed=2).expert_counts()
    machine = Machine("made up", COSTS, 1000, 0.0, 0)
    scenarios = Scenarios(trace, [machine], frequencies=hot)
    settings = {"schedule": "presched", "slots": 12, "predictor": "none"}
    runner = SimulatorRunner.of_scenarios(scenarios)
    by_hand = Simulator(trace, COSTS, row_bytes=1000).run(
        "presched", slots=12, frequencies=hot, least_bytes=0
    )
    told = {"tokens_per_s": by_hand.tokens_per_s}
    for one in (runner, pickle.loads(pickle.dumps(runner)), SimulatorRunner(trace, machine, frequencies=hot)):
        assert {"tokens_per_s": one.run(settings).values["tokens_per_s"]} == told
    untold = SimulatorRunner(trace, machine)
    for simulator, known, is_said in ((runner, hot.copy(), False), (runner, None, True), (untold, hot, True)):
        default = {
            "schedule": "presched",
            "cache": "auto",
            "cpu_threads": None,
            "predictor": "none",
            "slots": 12,
        }
        device = SimpleNamespace(
            engine=SimpleNamespace(frequencies=known, shape=untold.shape), default=default
        )
        notes = []
        simulated = simulated_default(SimpleNamespace(runner=simulator, fixed={}), device, {}, notes)
        assert simulated == simulator.run(settings).values["tokens_per_s"]
        assert any("other hot experts" in note for note in notes) == is_said
    assert untold.run(settings).values["tokens_per_s"] != told["tokens_per_s"]
    assert "frequencies" not in untold.about() and runner.about()["frequencies"], "another study"


def test_a_sweep_over_recalls_keeps_memory(runner):
    """Each recall is a predictor of its own, prepared for the trace: most of them are dropped again."""
    for i in range(80):
        runner.run(
            {"schedule": "presched", "slots": 40, "predictor": "noisy oracle", "recall": 0.3 + i / 200}
        )
    ready = next(iter(runner._ready.values()))
    assert len(ready._simulators) <= 64

"""One trace under any choice: names, settings for the engine, and why each expert went where it went."""

from dataclasses import replace

import numpy as np
import pytest

from prescope.core.types import ExpertSize, MoEShape
from prescope.errors import UnsupportedOption
from prescope.predictor import Frequency
from prescope.profile import HardwareProfile
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts, compiled_costs
from prescope.scheduler.presched import split
from prescope.simulator import (
    HERE,
    NOISY,
    NONE,
    ORACLE,
    WHERE,
    Machine,
    Scenario,
    Scenarios,
    machine_of_profile,
    machine_with_link,
    shipped_machines,
)
from prescope.simulator.explain import splits_of
from prescope.simulator.replay import HITS, LATE, MISSES, ON_CPU
from tests.support.small_run import NUM_EXPERTS, NUM_LAYERS, small_trace

COSTS = LayerCosts(
    link_us=100.0,
    link_busy_us=120.0,
    gpu_us=10.0,
    rest_us=150.0,
    cpu_us=(0.0, 80.0, 90.0),
    cpu_base_us=20.0,
    decide_us=5.0,
    source="made for this test",
)
MACHINE = Machine(HERE, COSTS, 1_500_000, 30.0, 2, is_here=True)


def scenarios_of(frequencies=None):
    trace = small_trace(steps=7, batch=3)
    return Scenarios(
        trace, [MACHINE, machine_with_link(MACHINE, 4)], [Frequency(trace, 2)], predict_us={"frequency": 8.0},
        frequencies=frequencies,
    )  # fmt: skip


@pytest.fixture(scope="module")
def scenarios():
    return scenarios_of()


@pytest.fixture(scope="module")
def scenarios_with_hot_experts():
    return scenarios_of(np.random.default_rng(2).random((NUM_LAYERS, NUM_EXPERTS)))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("predictor", [None, NOISY])
def test_where_each_expert_was_is_what_the_replay_counted(scenarios, name, predictor):
    """The explanation replays up to a layer's decision; a mistake there would tell a plausible tale."""
    check_explained(scenarios, name, predictor)


@pytest.mark.parametrize("name", ["presched", "fiddler", "static-split"])
def test_so_it_was_where_hot_experts_are_known(scenarios_with_hot_experts, name):
    check_explained(scenarios_with_hot_experts, name, None)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_table_of_bounds_is_that_of_the_result(scenarios, scenarios_with_hot_experts, name):
    """PreSched places hot experts only where they are known: its table did not know it."""
    for one in (scenarios, scenarios_with_hot_experts):
        scenario = Scenario(schedule=name, slots=10)
        bounds, needed = one.run(scenario).bounds, one.run(scenario).counts.needed
        values = one.bounds(scenario)["value"].tolist()
        assert values[0] == pytest.approx(100 * bounds.belady_misses / needed)
        assert values[-1] == pytest.approx(bounds.tokens_per_s)


def check_explained(scenarios, name, predictor):
    scenario = Scenario(schedule=name, slots=14, predictor=predictor, recall=0.6)
    result = scenarios.run(scenario)
    for s, step in enumerate(result.needs.steps.tolist()):
        for layer in range(NUM_LAYERS):
            why = scenarios.explain(scenario, step, layer, result)
            needed = why.experts[why.experts["tokens"] > 0]
            found = [int((needed["was"] == where).sum()) for where in WHERE]
            assert found == result.log.counts[s, layer, [HITS, LATE, MISSES]].tolist()
            assert int((needed["reason"] == "cpu").sum()) == result.log.counts[s, layer, ON_CPU]
            assert why.splits["chosen"].sum() == 1
            assert f"of {len(needed)} experts needed" in why.words


@pytest.mark.parametrize("cpu", [True, False])
def test_the_best_of_the_splits_is_the_one_presched_finds(cpu):
    """The table shows the formula that the decision minimises; two copies of it may not part."""
    rng = np.random.default_rng(0)
    none = np.zeros(0)
    for _ in range(50):
        costs = compiled_costs(
            replace(
                COSTS,
                link_us=float(rng.uniform(20, 200)),
                link_busy_us=float(rng.uniform(200, 300)),
                gpu_us=float(rng.uniform(1, 40)),
            ),
            cpu=cpu,
            predicts=False,
        )
        tokens = -np.sort(-rng.integers(1, 5, rng.integers(1, 7)))
        hits, backlog = int(rng.integers(0, 4)), float(rng.uniform(0, 300))
        late_us = np.sort(rng.uniform(0, backlog, rng.integers(0, 3)))
        tokens = np.concatenate([rng.integers(1, 5, len(late_us)), tokens])
        linked, _, best_us, _, _ = split(costs, tokens, hits, late_us, backlog, none, none)
        table = splits_of(costs, tokens, hits, late_us.tolist(), backlog, linked)
        assert table["layer_us"].min() == pytest.approx(best_us)
        assert table[table["chosen"]]["layer_us"].item() == pytest.approx(best_us)


def test_fiddler_takes_the_sooner_of_the_two_for_each_expert_and_the_table_says_so(scenarios):
    result = scenarios.run(Scenario(schedule="fiddler", slots=6))
    assert result.counts.on_cpu
    why = scenarios.explain(Scenario(schedule="fiddler", slots=6), int(result.needs.steps[0]), 1)
    missing = why.experts[why.experts["was"] == WHERE[2]]
    assert len(missing)
    by_cpu = missing["by_cpu_us"].to_numpy()
    assert by_cpu[-1] == 20.0 + {1: 80.0, 2: 90.0, 3: 100.0}[missing["tokens"].iloc[-1]]
    assert np.all(np.diff(by_cpu) < 0), "each stands with those behind it"
    assert why.layer_us >= why.splits["layer_us"].min() - 1e-6 or len(missing) == 0


def test_a_choice_takes_the_schedules_own_values_and_stays_within_what_there_is(scenarios):
    own = scenarios.resolved(Scenario(schedule="presched", slots=8))
    assert (own.cache, own.width) == (SCHEDULES["presched"].cache, NUM_EXPERTS)
    assert own.predictor == "frequency", "LLaPor is not there: the next best"
    assert own.lookahead == 2
    assert scenarios.resolved(Scenario(schedule="presched", slots=8, predictor=NONE)).lookahead == 0
    assert not scenarios.resolved(Scenario(schedule="fate", slots=8)).cpu, "it never uses the CPU"
    assert scenarios.predictor_names == [NONE, "frequency", NOISY, ORACLE]
    with pytest.raises(UnsupportedOption, match="'noisy oracle'"):
        scenarios.run(Scenario(slots=8, predictor="crystal ball"))
    with pytest.raises(UnsupportedOption, match="link 4 times"):
        scenarios.run(Scenario(slots=8, machine="moon"))


def test_what_only_the_simulator_can_is_refused_for_real(scenarios):
    for scenario in (
        Scenario(slots=8, predictor=ORACLE),
        Scenario(slots=8, schedule="fate", predictor=NONE),
        Scenario(slots=8, machine=list(scenarios.machines)[1]),
    ):
        assert scenarios.why_not_here(scenario)
        with pytest.raises(UnsupportedOption):
            scenarios.engine_settings(scenario)


def test_the_engine_is_told_what_was_simulated(scenarios):
    settings = scenarios.engine_settings(Scenario(schedule="presched", slots=9, width=3, threshold=0.4))
    assert settings["costs"] == COSTS
    assert (settings["slots"], settings["width"], settings["threshold"], settings["lookahead"]) == (
        9,
        3,
        0.4,
        2,
    )
    assert settings["predictor"].name == "frequency" and settings["cpu_threads"] is None
    off = scenarios.engine_settings(Scenario(schedule="presched", slots=9, cpu=False, predictor=NONE))
    assert (off["cpu_threads"], off["lookahead"], off["costs"].link_us) == (0, None, 100.0)
    assert off["predictor"] == NONE


def test_more_recall_is_worth_more_and_a_faster_link_too(scenarios):
    def rate(**settings: object) -> float:
        return scenarios.run(Scenario(schedule="fate", slots=10, **settings)).tokens_per_s

    assert rate(predictor=NOISY, recall=0.3) < rate(predictor=NOISY, recall=1.0)
    assert rate(machine=HERE) < rate(machine=list(scenarios.machines)[1])


def test_a_prediction_of_unknown_cost_is_said_to_be_free(scenarios):
    assert scenarios.run(Scenario(slots=10, predictor="frequency")).notes == []
    assert "free" in scenarios.run(Scenario(slots=10, predictor=NOISY)).notes[-1]
    elsewhere = Scenario(slots=10, predictor="frequency", machine=list(scenarios.machines)[1])
    assert "frequency costs here is not known" in scenarios.run(elsewhere).notes[-1]


def test_machines_that_come_with_prescope_are_labelled_and_slower_links_emulated():
    shape = MoEShape(NUM_LAYERS, NUM_EXPERTS, 2, 122_880)
    machines = shipped_machines(shape, batch=2)
    assert machines and not any(machine.is_here for machine in machines)
    assert all("experts of" in machine.name and machine.costs.cpu_us for machine in machines)
    # As if its link were a real one.
    profile = replace(HardwareProfile.load("test_machine"), link_gb_per_s=None)
    real, slower = (
        machine_of_profile(one, "test", shape, ExpertSize(122_880, 256, 80), 2)
        for one in (profile, profile.emulated(4, "PCIe 3"))
    )
    assert slower.costs.link_us == pytest.approx(4 * real.costs.link_us)
    assert "emulated PCIe 3" in slower.costs.source
    assert slower.costs.link_busy_us == pytest.approx(4 * real.costs.link_busy_us)
    without = slower.costs_with(cpu=False)
    assert without.cpu_us == () and without.link_busy_us is None


def test_the_table_names_every_schedule_with_the_bound_beside(scenarios):
    results = scenarios.compare(Scenario(slots=10))
    table = scenarios.table(results)
    assert list(table.index) == [schedule.title for schedule in SCHEDULES.values()]
    shares = table[["hit %", "late %", "miss %", "on CPU %"]].sum(axis=1)
    np.testing.assert_allclose(shares, 100.0)
    assert (table["tokens/s"] <= table["bound, tokens/s"] * 1.001).all()
    assert {result.counts.needed for result in results.values()} == {results["fate"].counts.needed}
    bounds = scenarios.bounds(Scenario(slots=10))
    assert bounds["value"].iloc[-1] == pytest.approx(table["bound, tokens/s"].max())
    assert scenarios.notes().loc["PreSched", "source"].endswith("2509.23638")
    same = scenarios.compare(Scenario(slots=10, cache="lfu"), published=False)
    assert {result.config["cache"] for result in same.values()} == {"lfu"}

"""The interval of simulated tokens/s: what follows from how far the costs vary."""

from dataclasses import asdict, replace

import pytest

from prescope.cache.policies import POLICIES
from prescope.calibration import calibrate
from prescope.engine import attach
from prescope.errors import UnsupportedOption
from prescope.scheduler.costs import (
    ASSUMED_HANDOVER,
    DECIDE_US,
    HANDOVER_US,
    LayerCosts,
    Spread,
    decide_us_of,
)
from prescope.simulator import Machine, Scenario, Scenarios, Simulator, machine_of_run
from prescope.simulator.simulator import LEAST_OFF
from prescope.traces.synthetic import SyntheticSpec
from tests.support.models import prompt, tiny_moe

COSTS = LayerCosts(
    link_us=172.0, gpu_us=5.0, rest_us=90.0, decide_us=60.0, cpu_us=(0.0, 140.0, 150.0), source="made up"
)
SPEC = SyntheticSpec(
    num_layers=4, num_experts=16, top_k=4, zipf=0.8, persistence=0.3, correlation=0.3, diversity=0.3
)
TRACE = SPEC.generate(prompt_tokens=6, new_tokens=16, batch=2, seed=0)


def run(spread: Spread, schedule: str = "on-demand", **settings):
    return Simulator(TRACE, replace(COSTS, spread=spread), row_bytes=9_400_000).run(schedule, **settings)


def test_exact_costs_leave_what_the_simulator_may_be_wrong_by():
    result = run(Spread())
    assert result.interval.low == pytest.approx(result.tokens_per_s / (1 + LEAST_OFF))
    assert result.interval.high == pytest.approx(result.tokens_per_s * (1 + LEAST_OFF))


@pytest.mark.parametrize(
    ("lane", "schedule", "is_used"),
    [
        ("link", "on-demand", True), ("gpu", "on-demand", True), ("rest", "on-demand", True),
        ("cpu", "on-demand", False), ("cpu", "static-split", True), ("link", "static-split", False),
    ],
)  # fmt: skip
def test_each_lane_that_varies_widens_it_on_both_sides_where_it_is_used(lane, schedule, is_used):
    """The CPU's speed says nothing of a run that does not use it."""
    exact, wide = (run(spread, schedule) for spread in (Spread(), Spread(**{lane: 0.2})))
    assert (wide.interval.low < exact.interval.low) == is_used
    assert (wide.interval.high > exact.interval.high) == is_used
    assert wide.tokens_per_s == exact.tokens_per_s


def test_all_times_longer_by_a_fifth_are_its_lower_end():
    result = run(Spread(0.2, 0.2, 0.2, 0.2))
    assert result.interval.low == pytest.approx(result.tokens_per_s / 1.2 / (1 + LEAST_OFF))


def test_a_person_reads_the_speed_with_its_interval():
    assert run(Spread(rest=0.1)).speed.count(" to ") == 1


def test_a_time_does_not_vary_by_less_than_nothing():
    with pytest.raises(UnsupportedOption, match="not negative"):
        replace(COSTS, spread=Spread(link=-0.1))


def test_what_other_runs_took_is_inside():
    """Only what drifts widens it; other runs say nothing of the CPU's experts."""
    others = [replace(COSTS, rest_us=100.0), replace(COSTS, rest_us=60.0, gpu_us=4.0, cpu_us=(0.0, 9.0, 9.0))]
    known = replace(COSTS, spread=Spread(link=0.1, gpu=0.5)).drifting(others)
    assert known.spread == pytest.approx(Spread(link=0.1, gpu=0.5, cpu=0.0, rest=0.5))
    assert COSTS.drifting([]) == COSTS
    slow = replace(COSTS, rest_us=4.0 * COSTS.rest_us)
    alone, both = (
        Simulator(TRACE, costs, row_bytes=9_400_000).run("on-demand")
        for costs in (COSTS, COSTS.drifting([slow]))
    )
    slower = Simulator(TRACE, slow, row_bytes=9_400_000).run("on-demand")
    assert both.interval.low <= slower.tokens_per_s < alone.interval.low


def test_runs_of_the_same_kind_say_how_far_the_machine_drifts():
    with attach(tiny_moe(), slots=6, device="cpu", decode="layered") as engine:
        run = engine.generate(prompt(), max_new_tokens=6)
        here = engine.shape, engine.expert_size
    slow = replace(run, events=run.events.assign(dur_us=2.0 * run.events["dur_us"]))
    alone, drifting = machine_of_run(run, *here), machine_of_run(run, *here, others=[run, slow])
    assert drifting.costs.spread == pytest.approx(
        [max(share, least) for share, least in zip(alone.costs.spread, (1.0, 1.0, 0.0, 1.0), strict=True)]
    )
    assert replace(drifting.costs, spread=alone.costs.spread) == alone.costs
    strangers = [
        replace(slow, config=run.config | {"schedule": "fate"}),
        replace(slow, hardware=run.hardware | {"label": "another machine"}),
        replace(slow, events=slow.events[slow.events["kind"] != "transfer"]),
    ]
    assert machine_of_run(run, *here, others=strangers) == alone


def test_a_host_that_stopped_once_is_not_what_a_layer_takes():
    """90 ms in one step are a stop of the machine; each layer's times are medians of its steps."""
    with attach(tiny_moe(), slots=6, device="cpu", decode="layered") as engine:
        run = engine.generate(prompt(), max_new_tokens=8)
        here = engine.shape, engine.expert_size
    longer = run.events["kind"].isin(["host_wait", "dense"]) & (run.events["step"] == 3)
    stopped = replace(run, events=run.events.assign(dur_us=run.events["dur_us"] + 90_000.0 * longer))
    usual, found = machine_of_run(run, *here), machine_of_run(stopped, *here)
    for name in ("rest_us", "decide_us"):
        assert getattr(found.costs, name) < 3.0 * getattr(usual.costs, name)
    assert found.step_us < 3.0 * usual.step_us + 1.0


@pytest.mark.filterwarnings("ignore::UserWarning")  # a busy machine; float32 is torch's, not the kernel's
def test_the_cpu_lane_is_as_it_was_in_runs_with_as_many_threads_as_the_newest():
    """It is as slow as the newest run was; one with another number of threads is not asked."""
    with attach(tiny_moe(), slots=6, device="cpu", link_gb_per_s=0.5, decode="layered") as engine:
        profile = calibrate(engine, seconds=4, save=False)
        here = engine.shape, engine.expert_size, profile
        run = engine.generate(prompt(), max_new_tokens=12)
        engine.configure(schedule="static-split", profile=profile)
        lane = engine.generate(prompt(), max_new_tokens=12)
    assert lane.metrics.decode.on_cpu >= 16
    slower = replace(lane, events=lane.events.assign(dur_us=3.0 * lane.events["dur_us"]))
    other = replace(slower, config=lane.config | {"cpu_threads": 7})
    plain, once, thrice = (
        machine_of_run(run, *here, others=others).costs for others in ([], [lane], [slower])
    )
    assert "of the engine" in once.source and "of the engine" not in plain.source
    total = [one.cpu_base_us + 2 * one.cpu_alone_us[1] for one in (once, thrice)]
    assert total[1] > 1.5 * total[0]
    assert machine_of_run(run, *here, others=[other, lane]).costs == once


def test_from_a_graph_only_layers_that_miss_wait_for_the_host():
    """Layer by layer all do. Two of three layers of a step have all of their experts in slots."""
    with attach(tiny_moe(), slots=6, device="cpu", decode="layered") as engine:
        run = engine.generate(prompt(), max_new_tokens=8)
        here = engine.shape, engine.expert_size
    hits = run.layers["needed"].where(run.layers["moe_layer"] > 0, 0)
    reasons = run.config["reasons"]
    layered = replace(run, layers=run.layers.assign(hits=hits))
    graph = replace(layered, config=run.config | {"reasons": reasons | {"decode": "host-driven: it fits"}})
    all_wait, one_waits = (machine_of_run(one, *here).costs.decide_us for one in (layered, graph))
    assert one_waits == pytest.approx(engine.shape.num_layers * all_wait) and all_wait > 0
    nobody = replace(graph, layers=graph.layers.assign(hits=graph.layers["needed"]))
    assert machine_of_run(nobody, *here).costs.decide_us == 0.0


def driven_by(run, driver: str, **columns):
    """The same run, as if another had served its misses."""
    reasons = run.config["reasons"] | {"decode": f"{driver}: it fits"}
    return replace(run, config=run.config | {"reasons": reasons}, **columns)


def test_where_the_gpu_decided_a_schedule_waits_for_the_host_all_the_same():
    """Simulated with the waits of such a run, PreSched made 2,666 tokens/s of an H200's 1,520."""
    with attach(tiny_moe(), slots=6, device="cpu", decode="layered") as engine:
        run = engine.generate(prompt(), max_new_tokens=8)
        here = engine.shape, engine.expert_size
    is_wait = run.events["kind"] == "host_wait"
    alone = driven_by(run, "copy-engine", events=run.events[~is_wait])
    longer = replace(run, events=run.events.assign(dur_us=run.events["dur_us"] * (1.0 + is_wait)))
    asked = [driven_by(one, "host-driven") for one in (run, run, longer)]
    strangers = [
        replace(asked[2], hardware=run.hardware | {"label": "another machine"}),
        driven_by(run, "layered"),
    ]
    assert (
        decide_us_of(asked[2]) == pytest.approx(2.0 * decide_us_of(asked[0])) and decide_us_of(asked[0]) > 0.0
    )

    unknown = machine_of_run(alone, *here, others=strangers)
    assert unknown.costs_of("presched").decide_us == DECIDE_US and "assumed" in unknown.costs.source
    known = machine_of_run(alone, *here, others=[alone, *strangers, *asked])
    assert known.costs_of("presched").decide_us == pytest.approx(decide_us_of(asked[0]))
    assert known.costs_of("on-demand") == unknown.costs_of("on-demand")
    assert known.costs_of("on-demand").decide_us == 0.0
    assert (known.costs.handover_us, known.on_demand.handover_us) == (HANDOVER_US, 0.0)
    assert ASSUMED_HANDOVER in known.costs.source and ASSUMED_HANDOVER not in known.on_demand.source
    assert machine_of_run(strangers[1], *here).costs.handover_us == 0.0, (
        "layer by layer it is part of the rest"
    )
    for name in asdict(known.costs).keys() - {"decide_us", "handover_us", "source"}:
        assert getattr(known.costs, name) == getattr(known.on_demand, name), "the layers are the same"
    assert machine_of_run(asked[0], *here).on_demand is None, "its own waits are those of a schedule"
    # The other way round: recorded under a schedule, on demand is not charged with a wait that it does not have.
    planned = machine_of_run(asked[0], *here, others=[*strangers, alone, asked[1]])
    assert planned.costs_of("presched").decide_us == pytest.approx(decide_us_of(asked[0]))
    assert planned.costs_of("on-demand").decide_us == 0.0 and "GPU decides" in planned.on_demand.source
    assert machine_of_run(strangers[1], *here, others=[alone]).on_demand is None, "layer by layer all wait"


def test_runs_that_tell_nothing_of_the_host_are_not_asked_what_it_took():
    """Without events, or where nothing was missed, nothing waited: that is no host that decides in no time."""
    with attach(tiny_moe(), slots=6, device="cpu", decode="layered") as engine:
        run = engine.generate(prompt(), max_new_tokens=8)
        here = engine.shape, engine.expert_size
    with attach(tiny_moe(), slots=6, device="cpu", decode="layered", events=False) as engine:
        blind = driven_by(engine.generate(prompt(), max_new_tokens=8), "host-driven")
    alone = driven_by(run, "copy-engine", events=run.events[run.events["kind"] != "host_wait"])
    sated = driven_by(run, "host-driven", layers=run.layers.assign(hits=run.layers["needed"]))
    other_model = driven_by(run, "host-driven")
    other_model = replace(other_model, config=other_model.config | {"fingerprint": "another model's"})
    unknown = machine_of_run(alone, *here, others=[blind, sated, other_model])
    assert unknown.costs.decide_us == DECIDE_US and "assumed" in unknown.costs.source
    known = machine_of_run(alone, *here, others=[blind, driven_by(run, "host-driven"), sated])
    assert known.costs.decide_us == pytest.approx(decide_us_of(driven_by(run, "host-driven"))) != DECIDE_US
    assert "of 1 run " in known.costs.source


@pytest.mark.parametrize("cache", POLICIES)
def test_on_demand_waits_for_the_host_under_a_cache_that_only_the_host_can_run(cache):
    """As the engine: with such a policy its steps are host-driven on demand too."""
    machine = Machine("a GPU", COSTS, 1_500_000, 0.0, 0, on_demand=replace(COSTS, decide_us=0.0))
    scenarios = Scenarios(TRACE, [machine], frequencies=TRACE.expert_counts())
    run = scenarios.run(Scenario(schedule="on-demand", slots=9, cache=cache, machine="a GPU"))
    assert (run.metrics.decode.host_wait_ms == 0.0) == POLICIES[cache].runs_on_gpu
    other = scenarios.run(Scenario(schedule="fiddler", slots=9, cache=cache, machine="a GPU"))
    assert other.metrics.decode.host_wait_ms > 0.0

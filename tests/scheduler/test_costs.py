"""Costs as runs tell them, and what cannot be costs."""

from dataclasses import replace

import numpy as np
import pytest

from prescope.errors import BadTrace, UnsupportedOption
from prescope.scheduler.costs import LayerCosts, Spread, compiled_costs, costs_of_run
from tests.support.small_run import small_run

COSTS = LayerCosts(link_us=100.0, gpu_us=10.0, rest_us=50.0, source="by hand")


def test_costs_are_read_from_a_run():
    run = small_run(steps=8)
    decode, costs = run.metrics.decode, costs_of_run(run)
    assert costs.link_us == run.events.query("kind == 'transfer' and phase == 'decode'")["dur_us"].median()
    # The other two vary by a few per cent in this run, so median and mean are near one another.
    assert costs.gpu_us * decode.needed == pytest.approx(1e3 * decode.experts_gpu_ms, rel=0.25)
    assert costs.rest_us * decode.num_steps * 4 == pytest.approx(1e3 * decode.dense_gpu_ms, rel=0.25)
    assert run.label in costs.source


def test_one_interrupted_step_does_not_change_the_costs():
    """Means would: a step of two seconds, in which the machine did something else, made a layer much dearer."""
    run = small_run(steps=8)
    slow = run.events["step"] == 3
    events = run.events.assign(dur_us=run.events["dur_us"].where(~slow, run.events["dur_us"] * 1000))
    disturbed, costs = costs_of_run(replace(run, events=events)), costs_of_run(run)
    for name in ("link_us", "gpu_us", "rest_us"):
        assert getattr(disturbed, name) == pytest.approx(getattr(costs, name), rel=0.25), name


def test_a_run_without_copies_tells_no_cost():
    with pytest.raises(BadTrace, match="fewer slots"):
        costs_of_run(small_run(steps=1))
    with pytest.raises(UnsupportedOption, match="negative"):
        LayerCosts(link_us=-1.0, gpu_us=1.0, rest_us=1.0, source="")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "100", True])
@pytest.mark.parametrize("name", ["link_us", "rest_us", "link_busy_us", "decide_us", "cpu_us"])
def test_what_is_no_time_is_no_cost(name, wrong):
    """NaN is less than nothing and more than nothing, so every comparison of a decision with it would be false."""
    with pytest.raises(UnsupportedOption, match="times in microseconds"):
        replace(COSTS, **{name: (0.0, wrong) if name == "cpu_us" else wrong})


@pytest.mark.parametrize("name", ["cpu_us", "cpu_alone_us", "spread"])
def test_several_times_may_come_as_a_list_or_an_array_and_nothing_else(name):
    """Costs are compared and written to files: an array has no truth value, and cannot be compared as a whole."""
    times = (0.0, 2.0, 3.0)
    curve = {"cpu_us": times} if name == "cpu_alone_us" else {}
    expected = replace(COSTS, **curve, **{name: times})
    for given in (list(times), np.array(times), np.array(times, dtype=np.float32), list(np.array(times))):
        assert replace(COSTS, **curve, **{name: given}) == expected
    for wrong in (None, 3.0, "12", {0.0, 1.0}, np.zeros((2, 2))):
        with pytest.raises(UnsupportedOption, match=f"{name} of costs is .*; it is a list of numbers"):
            replace(COSTS, **{name: wrong})
    for wrong in (["a"], [None, 1.0], [1.0] * 5) if name == "spread" else ():
        with pytest.raises(UnsupportedOption, match="4 numbers at most"):
            replace(COSTS, spread=wrong)


def test_the_cpu_lane_of_costs_is_off_unless_given():
    """Costs written before there was a CPU lane mean the same as before."""
    assert (COSTS.cpu_us, COSTS.cpu_base_us, COSTS.decide_us, COSTS.copy_us) == ((), 0.0, 0.0, 0.0)
    with pytest.raises(UnsupportedOption, match="negative"):
        replace(COSTS, cpu_us=(0.0, -1.0))
    with pytest.raises(UnsupportedOption, match="without tokens"):
        replace(COSTS, cpu_us=(3.0, 4.0))
    for alone in ((0.0,), (0.0, 1.0, 2.0)):
        with pytest.raises(UnsupportedOption, match="cpu_alone_us has"):
            replace(COSTS, cpu_us=(0.0, 1.0), cpu_alone_us=alone)
    assert replace(COSTS, cpu_us=(0.0, 2.0), cpu_alone_us=(0.0, 1.0)).cpu_alone_us == (0.0, 1.0)


def test_a_layer_computed_on_the_cpu_alone_says_nothing_of_the_gpu():
    run = small_run(steps=8)
    layers = run.layers.copy()
    layers.loc[layers["moe_layer"] < 3, "on_cpu"] = layers["needed"]
    assert costs_of_run(replace(run, layers=layers)).gpu_us == pytest.approx(12.0)


def test_where_the_host_launches_each_layer_it_is_in_each_layers_way():
    """From a graph predictions are made beside the layer, and decisions while the GPU waits."""
    costs = replace(COSTS, predict_us=7.0, decide_us=3.0)
    graph, layered = (
        compiled_costs(c, cpu=True, predicts=True) for c in (costs, replace(costs, is_layered=True))
    )
    assert (graph.rest_us, graph.predict_us, graph.decide_us) == (50.0, 7.0, 3.0)
    assert (layered.rest_us, layered.predict_us, layered.decide_us) == (60.0, 0.0, 0.0)
    assert compiled_costs(costs, cpu=True, predicts=False).predict_us == 0.0


def test_nothing_varies_unless_it_is_said_and_all_times_vary_by_their_share():
    assert Spread() == (0.0, 0.0, 0.0, 0.0)
    known = replace(
        COSTS, predict_us=7.0, decide_us=3.0, batch_us=4.0, link_busy_us=120.0, cpu_us=(0.0, 50.0, 60.0),
        cpu_alone_us=(0.0, 40.0, 45.0), cpu_base_us=20.0, spread=Spread(link=0.1, gpu=0.2, cpu=0.3, rest=0.4),
    )  # fmt: skip
    worst, best = known.at_worst(), known.at_best()
    shares = {
        "link_us": 1.1, "link_busy_us": 1.1, "batch_us": 1.1, "gpu_us": 1.2, "cpu_us": 1.3, "cpu_alone_us": 1.3,
        "cpu_base_us": 1.3, "rest_us": 1.4, "predict_us": 1.4, "decide_us": 1.4,
    }  # fmt: skip
    for name, share in shares.items():
        usual = np.asarray(getattr(known, name))
        assert np.asarray(getattr(worst, name)) == pytest.approx(share * usual), name
        assert np.asarray(getattr(best, name)) == pytest.approx(usual / share), name


def test_layers_that_computed_one_expert_say_what_one_takes():
    run = small_run(steps=8)
    layers = run.layers.assign(on_cpu=run.layers["needed"] - 1)
    assert costs_of_run(replace(run, layers=layers)).gpu_us > costs_of_run(run).gpu_us > 0

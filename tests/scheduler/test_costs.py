"""The timeline of `step_times`, held against timelines worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from prescope.errors import BadTrace, UnsupportedOption
from prescope.scheduler.costs import LayerCosts, costs_of_run
from prescope.training.step_times import step_times
from tests.support.small_run import small_run

COSTS = LayerCosts(link_us=100.0, gpu_us=10.0, rest_us=50.0, source="by hand")
NOBODY = np.zeros((3, 4), dtype=bool)


def needs(*experts_by_layer: list[int]) -> np.ndarray:
    """(1, L, 4): one step."""
    mask = np.zeros((1, len(experts_by_layer), 4), dtype=bool)
    for layer, experts in enumerate(experts_by_layer):
        mask[0, layer, experts] = True
    return mask


def test_on_demand_every_copy_is_waited_for():
    found = step_times(needs([0, 1], [2], [3]), NOBODY, COSTS)
    assert found.stall_us.tolist() == [400.0]
    assert found.total_us.tolist() == [400.0 + 4 * 10.0 + 3 * 50.0]
    assert found.demanded.tolist() == [4] and found.prefetched.tolist() == [0]


def test_resident_experts_cost_no_copy():
    everyone = ~NOBODY
    assert step_times(needs([0, 1], [2], [3]), everyone, COSTS).total_us.tolist() == [4 * 10.0 + 3 * 50.0]


def test_a_prefetch_hides_as_much_as_the_layer_before_it_lasts():
    """Layer 0 takes 60 us after its own copy, so a copy of 100 us has 40 left when layer 1 asks for it."""
    wanted = np.array([[[-1], [2], [3]]])
    found = step_times(needs([0], [2], [3]), NOBODY, COSTS, wanted)
    assert found.stall_us.tolist() == [100.0 + 40.0 + 40.0]
    assert found.demanded.tolist() == [1]
    assert found.useful.tolist() == found.prefetched.tolist() == [2]


def test_a_wrong_prefetch_keeps_the_link_from_what_is_needed():
    """Its copy is not interrupted: demand waits for the 40 us that are left of it, and for its own 100."""
    wanted = np.array([[[-1], [1], [-1]]])
    found = step_times(needs([0], [2], []), NOBODY, COSTS, wanted)
    assert found.stall_us.tolist() == [100.0 + 40.0 + 100.0]
    assert found.useful.tolist() == [0]


def test_more_lookahead_gives_a_copy_more_time():
    """Decided two layers before: 120 us of work hide all of the 100."""
    wanted = np.array([[[-1], [-1], [3]]])
    found = step_times(needs([], [], [3]), NOBODY, COSTS, wanted, lookahead=2)
    assert found.stall_us.tolist() == [0.0]
    late = step_times(needs([], [], [3]), NOBODY, COSTS, wanted, lookahead=1)
    assert late.stall_us.tolist() == [50.0]


def test_a_predictor_costs_its_time_in_every_layer():
    nothing = np.full((1, 3, 1), -1)
    free, dear = (
        step_times(needs([0], [1], [2]), NOBODY, c, nothing) for c in (COSTS, COSTS.with_predictor(7))
    )
    assert dear.total_us - free.total_us == pytest.approx(3 * 7.0)


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


def test_the_cpu_lane_of_costs_is_off_unless_given():
    """Costs written before there was a CPU lane mean the same as before."""
    assert (COSTS.cpu_us, COSTS.cpu_base_us, COSTS.decide_us, COSTS.copy_us) == ((), 0.0, 0.0, 0.0)
    with pytest.raises(UnsupportedOption, match="negative"):
        replace(COSTS, cpu_us=(0.0, -1.0))
    with pytest.raises(UnsupportedOption, match="without tokens"):
        replace(COSTS, cpu_us=(3.0, 4.0))

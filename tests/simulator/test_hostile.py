"""Hostile routing on a recorded run's machines."""

import pytest

from prescope.simulator import NOISY, ORACLE, Machine, Scenario, Scenarios, hostile
from prescope.traces.synthetic import ADVERSARIAL
from tests.support.small_run import small_trace
from tests.views.test_scheduling_views import COSTS


@pytest.fixture(scope="module")
def cases():
    recorded = Scenarios(small_trace(steps=6, batch=2), [Machine("test", COSTS, 1_500_000, 30.0, 2)])
    return recorded, hostile(recorded, new_tokens=24)


def test_each_kind_has_the_recorded_shape_and_batch(cases):
    recorded, kinds = cases
    assert kinds.keys() == ADVERSARIAL.keys()
    for kind, one in kinds.items():
        assert one.trace.shape[:3] == recorded.trace.shape[:3]
        assert one.batch == recorded.batch == 2
        assert list(one.machines) == ["test"]
        assert kind in one.label


def test_hostile_routing_costs_on_demand_what_it_promises(cases):
    """LRU never hits what goes round and round, and hits everything where all tokens use the same."""
    _, kinds = cases
    plain = Scenario(schedule="on-demand", slots=16, machine="test")
    assert kinds["cyclic"].run(plain).counts.hits == 0
    assert kinds["hot"].run(plain).counts.misses == 0


def test_prediction_can_be_emulated_on_it(cases):
    one = cases[1]["uniform"]
    steps = [
        one.run(Scenario(slots=16, machine="test", predictor=name, recall=0.8)).step_ms
        for name in ("none", NOISY, ORACLE)
    ]
    assert steps[2] < steps[0]
    assert len(set(steps)) == 3

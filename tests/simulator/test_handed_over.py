"""What handing over copies costs the host, on the simulator's clock: by hand-made costs and arithmetic."""

from dataclasses import replace

import numpy as np
import pytest

from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Simulator
from prescope.simulator.replay import (
    AHEAD,
    BEGIN,
    DECIDED,
    FETCHED,
    HITS,
    LOOKED,
    NEEDED,
    REASON,
    ROUTED,
    STEP,
)
from prescope.traces.synthetic import SyntheticSpec

#: An expert takes the link 3 us and the host 16 as a prefetch, 4 as one more of a layer's copies.
COSTS = LayerCosts(
    link_us=3.0, gpu_us=1.0, rest_us=100.0, decide_us=20.0, copy_us=4.0, handover_us=16.0, source="stated"
)
FREE = replace(COSTS, copy_us=0.0, handover_us=0.0)
L, E = 4, 10
KEEPS_ALL = {"slots": 22, "least_bytes": 4 << 20}


def run_of(costs: LayerCosts, schedule: str, top_k: int = 1, slots: int = KEEPS_ALL["slots"]):
    spec = SyntheticSpec(
        num_layers=L, num_experts=E, top_k=top_k, zipf=0.0, persistence=0.0, correlation=0.0, diversity=0.5
    )
    trace = spec.generate(prompt_tokens=4, new_tokens=9, batch=1, seed=1)
    return Simulator(trace, costs, row_bytes=120_000).run(schedule, slots=slots, least_bytes=4 << 20)


def prefetches_of(log, step, layer):
    """(n, 2) begin and end of those begun between the question of a layer and that of the next one, us."""
    ahead = (log.copies[:, REASON] == AHEAD) & (log.copies[:, STEP] == step)
    begins, ends = log.times_us[step, layer, LOOKED], log.times_us[step, layer + 1, LOOKED]
    us = log.copy_us[ahead]
    return us[(us[:, 0] > begins) & (us[:, 0] <= ends)]


def test_prefetches_of_small_experts_are_bounded_by_the_host_and_not_by_the_link():
    """Ten experts of the next layer are wanted, 16 us each: one copy every 16 us, the link is at work 3 of them. With
    hand-overs that cost nothing one follows the other.
    """
    log = run_of(COSTS, "streaming").log
    seen = 0
    for step in range(2, len(log.times_us)):
        for layer in range(L - 1):
            us = prefetches_of(log, step, layer)
            if len(us) < 2:
                continue
            decided = log.times_us[step, layer, LOOKED] + COSTS.decide_us
            np.testing.assert_allclose(us[:, 0], decided + 16.0 * np.arange(1, len(us) + 1))
            np.testing.assert_allclose(us[:, 1] - us[:, 0], 3.0)
            seen += 1
    assert seen > 8
    free = run_of(FREE, "streaming").log
    us = prefetches_of(free, 2, 1)
    np.testing.assert_allclose(np.diff(us[:, 0]), 3.0)
    assert len(us) > 5


def test_the_host_sees_a_question_when_it_is_done_with_the_hand_over_it_is_in():
    """Decided 20 us behind a question: hand-overs end at 36, 52, ... 116, and the next question comes at 101."""
    log = run_of(COSTS, "streaming").log
    busy = 0
    for step in range(2, len(log.times_us)):
        for layer in range(L - 1):
            times, after = log.times_us[step, layer], log.times_us[step, layer + 1]
            late = after[LOOKED] - after[ROUTED]
            assert 0.0 <= late < 16.0
            us = prefetches_of(log, step, layer)
            if late > 0.0:
                assert us[-1, 0] == after[LOOKED], "the last copy can begin as the host looks"
                busy += 1
            if times[LOOKED] == times[ROUTED] and after[ROUTED] - times[ROUTED] == 101.0 and len(us) == 6:
                assert late == pytest.approx(15.0)
    assert busy > 8
    free = run_of(FREE, "streaming").log.times_us[2:]
    np.testing.assert_array_equal(free[..., LOOKED], free[..., ROUTED])


@pytest.mark.parametrize("rest_us", [2.0, 100.0])
def test_of_copies_on_demand_the_answer_comes_behind_the_first_and_the_rest_behind_the_answer(rest_us):
    """n missing: the first begins as it is decided, each of the others 4 us later, longer than a copy takes: the last
    one lands 4 (n - 1) + 3 us behind the decision. The host is free again when it has handed over the last one with its
    number, 4 (n - 2) + 16 us behind it, and looks at the next question no sooner.
    """
    costs = replace(COSTS, rest_us=rest_us)
    result = run_of(costs, "on-demand", top_k=4, slots=8)
    times, counts = result.log.times_us, result.log.counts
    num_missing = counts[..., NEEDED] - counts[..., HITS]
    waits = times[..., FETCHED] - times[..., DECIDED]
    some = num_missing > 0
    np.testing.assert_allclose(waits[some], 4.0 * (num_missing[some] - 1) + 3.0)
    assert (num_missing == 4).any() and (num_missing > 1).sum() > 10
    num, looked, asked = num_missing[:, :-1], times[:, :-1, LOOKED], times[:, 1:, ROUTED]
    handed = looked + 20.0 + np.where(num > 1, 4.0 * (num - 2) + 16.0, 0.0)
    np.testing.assert_allclose(times[:, 1:, LOOKED], np.maximum(asked, handed))
    assert (handed > asked).any() == (rest_us == 2.0)
    # Four misses: the rest, 3 us more behind a host that still hands over, 20 to decide, 15 to copy, 4 to compute.
    full = times[:, :-1][num == 4]
    late_us = full[:, LOOKED] - full[:, ROUTED]
    np.testing.assert_allclose(np.diff(times[..., BEGIN])[num == 4], rest_us + late_us + 20.0 + 15.0 + 4.0)


def test_hand_overs_that_cost_nothing_change_nothing_and_layer_by_layer_they_are_part_of_the_rest():
    for schedule in ("streaming", "on-demand", "presched"):
        layered = [run_of(replace(costs, is_layered=True), schedule).log for costs in (COSTS, FREE)]
        for one, other in zip(*layered, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_host_that_hands_over_slowly_makes_no_run_faster():
    for schedule in ("streaming", "on-demand", "klotski", "presched"):
        ends = [
            run_of(replace(COSTS, handover_us=us), schedule, top_k=3).log.step_end_us[-1]
            for us in (0.0, 16.0, 64.0)
        ]
        assert ends == sorted(ends), schedule

"""The planner: one compiled call decides what table and plan decide step by step; costs follow the clock."""

import numpy as np
import pytest

from prescope.cache.policies import make_policy
from prescope.cache.residency import ResidencyTable, distinct
from prescope.core.config import EngineConfig
from prescope.core.types import MoEShape
from prescope.engine.schedule import plan_by
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts
from prescope.scheduler.layer import Decision, Slots, decide_layer, reconsider
from prescope.scheduler.planner import MOST_CONTENTION, NEWEST, Planner

L, E, K, D = 4, 12, 3, 2
SHAPE = MoEShape(L, E, K, 1000)
COSTS = LayerCosts(
    link_us=100.0, gpu_us=4.0, rest_us=80.0, cpu_us=(0.0, 60.0, 90.0, 130.0), cpu_base_us=20.0, decide_us=10.0,
    source="made up for a test",
)  # fmt: skip


class Foresees:
    """Stands for a predictor: only its depth is looked at."""

    lookahead = D


def planner(schedule: str) -> Planner:
    way = SCHEDULES[schedule]
    return plan_by(way, EngineConfig(lookahead=D), SHAPE, Foresees(), COSTS, way.uses_cpu)


def decided(
    one: Planner, layer: int, ids: np.ndarray, sums: np.ndarray, table: ResidencyTable, predicted
) -> Decision:
    policy = table.policy
    policy.tick += 1
    slots = Slots(
        table.slot_of, table.key_of, table.in_flight, table.prefetched, table.protected, policy.scores
    )
    tokens, used = (part.copy() for part in predicted)
    return decide_layer(
        one.settings,
        one.costs,
        policy.kind,
        policy.tick,
        layer,
        E,
        ids,
        sums,
        slots,
        0.0,
        one.memory,
        tokens,
        used,
    )


@pytest.mark.parametrize("schedule", ["presched", "hybrimoe", "fate", "streaming", "fiddler"])
@pytest.mark.parametrize("cache", ["lru", "lfu", "score", "shallow", "next-use"])
def test_one_call_decides_what_table_and_plan_decide_in_steps(schedule, cache):
    rng = np.random.default_rng(0)
    whole, steps = planner(schedule), planner(schedule)
    tables = [ResidencyTable(SHAPE, 14, make_policy(cache, SHAPE)) for _ in range(2)]
    predicted = nothing = np.zeros((D, E)), np.zeros((D, E))
    num_changed = 0
    for _ in range(12):
        for layer in range(L):
            ids = rng.integers(-1, E + 1, (2, K)).ravel()  # sentinels among them
            sums = np.bincount(ids[(ids >= 0) & (ids < E)], minlength=E) + rng.random(E) * (cache == "score")
            former, predicted = predicted, (rng.random((D, E)) * 2, rng.random((D, E)))
            known = predicted if not whole.settings.lag else former if layer else nothing
            tables[0].prefetched |= (rng.random(14) < 0.3) & (tables[0].key_of >= 0)
            tables[1].prefetched[:] = tables[0].prefetched
            decision = decided(whole, layer, ids, sums, tables[0], known)
            table = tables[1]
            experts, counts = distinct(ids, E)
            need = table.need(layer, experts, counts, sums[experts])
            plan = steps.plan(need, table, 0.0, predicted)
            here = need.num_hits + need.num_late
            table.unprotect()
            table.protect(table.slots_for(layer, need.experts[:here]))
            slots = table.take(layer, need.experts[here : here + plan.num_load], plan.keep)
            table.landed(slots)
            table.protect(slots)
            assert decision.need.experts.tolist() == need.experts.tolist()
            assert (decision.need.num_hits, decision.need.num_late) == (need.num_hits, need.num_late)
            assert decision.num_prefetched == need.num_prefetched
            assert (tables[0].prefetched == table.prefetched).all()
            assert not steps.memory.predicted_dLE[:, layer].any(), "what it used would count once more"
            assert decision.plan.num_load == plan.num_load
            assert decision.plan.prefetch.tolist() == plan.prefetch.tolist()
            assert decision.slots.tolist() == slots.tolist()
            assert (tables[0].slot_of == table.slot_of).all() and (
                tables[0].protected == table.protected
            ).all()
            assert np.allclose(tables[0].policy.scores, table.policy.scores)
            again = steps.reconsider(layer, plan, table)
            assert again.num_load == plan.num_load
            if whole.settings.lag and layer + 1 < L:
                own, slots_of = [part.copy() for part in predicted], tables[0]
                direct = reconsider(
                    whole.settings, whole.costs, layer, decision.need, plan.num_load, 0.0, slots_of.slot_of,
                    slots_of.key_of, slots_of.policy.scores, whole.memory, *own,
                )  # fmt: skip
                assert again.prefetch.tolist() == direct.prefetch.tolist()
                num_changed += again.prefetch.tolist() != plan.prefetch.tolist()
            else:
                assert again is plan
            cold = need.experts[here + plan.num_load :]
            for i, expert in enumerate(cold.tolist()):
                pairs = decision.cpu_pairs[decision.cpu_first[i] : decision.cpu_first[i + 1]]
                assert pairs.tolist() == np.flatnonzero(ids == expert).tolist()
            tables[0].check_integrity()
    assert (num_changed > 0) == (whole.settings.lag > 0), "a layer's own predictions say something new"


def test_costs_follow_what_the_steps_show():
    one = planner("presched")
    for _ in range(40):
        one.saw_step(200.0, 150.0, 8.0)
        one.saw_cpu(2.0 * (20.0 + 60.0 + 90.0), 20.0 + 60.0 + 90.0)
    assert one.costs.rest_us == pytest.approx(200.0, rel=0.01)
    assert one.costs.gpu_us == pytest.approx(8.0, rel=0.01)
    assert one.costs.decide_us == pytest.approx(150.0, rel=0.01)
    assert one.costs.cpu_us.tolist() == pytest.approx([0.0, 120.0, 180.0, 260.0], rel=0.01)
    assert one.costs.cpu_base_us == pytest.approx(40.0, rel=0.01)


def test_the_links_cost_follows_what_copies_take():
    one = planner("presched")
    link_us, busy_us = one.costs.link_us, one.costs.link_busy_us
    for i in range(80):
        each_us = busy_us if i % 2 else link_us
        one.saw_link([4.0 * each_us, 4.0 * each_us, 1e6], has_cpu=bool(i % 2))  # one was held up
    assert one.costs.link_us == pytest.approx(4.0 * link_us, rel=0.01)
    assert one.costs.link_busy_us == pytest.approx(4.0 * busy_us, rel=0.01)
    one.saw_link([], has_cpu=True)
    assert one.costs.link_us == pytest.approx(4.0 * link_us, rel=0.01), "a step without copies says nothing"


def test_beside_the_cpu_the_link_by_itself_is_learned_as_far_as_contention_cannot_explain_it():
    one = planner("presched")
    link_us, busy_us = one.costs.link_us, one.costs.link_busy_us
    for factor, alone_us in ((1.2, link_us), (4.0, 4.0 * busy_us / MOST_CONTENTION), (0.5, 0.5 * busy_us)):
        for _ in range(60):
            one.saw_link([factor * busy_us], has_cpu=True)
        assert one.costs.link_busy_us == pytest.approx(factor * busy_us, rel=0.01)
        assert one.costs.link_us == pytest.approx(min(alone_us, factor * busy_us), rel=0.01)
    for _ in range(60):
        one.saw_link([2.0 * link_us], has_cpu=False)
    assert one.costs.link_us == pytest.approx(2.0 * link_us, rel=0.01)
    assert one.costs.link_us <= one.costs.link_busy_us <= MOST_CONTENTION * one.costs.link_us + 1e-9


def test_one_interrupted_job_moves_the_cpus_cost_by_little():
    one = planner("presched")
    one.saw_cpu(1e9, 80.0)
    assert one.costs.cpu_us[1] <= 60.0 * (1 + NEWEST * 3.0) + 1e-9
    calm = planner("presched")
    for took_us in (80.0, 80.0, 1e9, 80.0, 80.0):
        calm.saw_cpu(took_us, 80.0)
    assert calm.costs.cpu_us[1] == 60.0, "others say that it was one"


def test_a_cpu_that_seemed_slow_is_tried_again():
    """The Fiddler-like leaves an expert to the CPU or copies it, by what it believes: without jobs it saw no more."""
    one = planner("fiddler")
    for _ in range(3):
        one.saw_cpu(1e9, 80.0)
    slow_us = one.costs.cpu_us[1]
    for _ in range(60):
        one.saw_cpu(0.0, 0.0)
    assert slow_us > 100.0 and one.costs.cpu_us[1] == pytest.approx(60.0, rel=0.1)

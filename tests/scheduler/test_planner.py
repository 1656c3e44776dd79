"""The planner: one way to decide, whoever serves the layer; costs follow the clock."""

import numpy as np
import pytest

from prescope.cache.policies import make_policy
from prescope.cache.prefetch import Waiting, want
from prescope.cache.residency import ResidencyTable
from prescope.core.types import MoEShape
from prescope.engine.graph.host_cpu import pairs_of
from prescope.engine.graph.host_loop import take_for_layer
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts, compiled_costs
from prescope.scheduler.layer import count_experts, decide_layer, learn_layer, prefetch_layer, take_down
from prescope.scheduler.learn import learn_reuse, reuse_lasts
from prescope.scheduler.planner import MOST_CONTENTION, NEWEST, Planner
from prescope.scheduler.settings import resolve
from prescope.scheduler.types import FORMER_STEPS, Memory

L, E, K, D = 4, 12, 3, 2
SHAPE = MoEShape(L, E, K, 1000)
COSTS = LayerCosts(
    link_us=100.0, gpu_us=4.0, rest_us=80.0, cpu_us=(0.0, 60.0, 90.0, 130.0), cpu_base_us=20.0, decide_us=10.0,
    source="made up for a test",
)  # fmt: skip


#: Prefetch nothing; the artefact does for more than 16 sequences.
NOT_AHEAD = ("on-demand", "fiddler", "static-split", "artefact")


def planner(schedule: str) -> Planner:
    """As an engine with a predictor for D layers ahead makes it."""
    found = resolve(schedule, num_experts=E, depth=D)
    form = compiled_costs(COSTS, cpu=found.cpu, predicts=found.predicts > 0)
    return Planner(found.settings, form, SHAPE, found.predicts)


@pytest.mark.parametrize("cache", ["lru", "score", "next-use"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_engine_that_serves_layer_by_layer_decides_as_a_captured_step_does(schedule, cache):
    """Both call `decide_layer`; layer by layer the planner keeps the predictions of the layer before, where there is a
    lag, and slots are taken through the table.
    """
    rng = np.random.default_rng(3)
    whole, steps = planner(schedule), planner(schedule)
    tables = [ResidencyTable(SHAPE, 14, make_policy(cache, SHAPE)) for _ in range(2)]
    d = whole.predicts
    predicted = nothing = np.zeros((d, E)), np.zeros((d, E))
    num_ahead = 0
    for layer in [*range(L)] * 12:
        ids = rng.integers(-1, E + 1, 2 * K)  # sentinels among them
        experts, tokens = count_experts(ids, E)
        weights = tokens + rng.random(len(experts)) * (cache == "score")
        former, predicted = predicted, (rng.random((d, E)) * 2, rng.random((d, E)))
        known = predicted if not whole.settings.lag else former if layer else nothing
        tables[0].prefetched |= (rng.random(14) < 0.3) & (tables[0].key_of >= 0)
        tables[1].prefetched[:] = tables[0].prefetched
        policy = tables[0].policy
        policy.tick += 1
        tokens_dE, used_dE = (part.copy() for part in known)
        decision = decide_layer(
            whole.settings,
            whole.costs,
            layer,
            experts,
            tokens,
            0.0,
            tables[0].arrays,
            whole.memory,
            tokens_dE,
            used_dE,
        )
        num_prefetched = learn_layer(
            whole.settings,
            policy.kind,
            policy.tick,
            layer,
            decision,
            experts,
            weights,
            tables[0].arrays,
            whole.memory,
        )
        found, its_prefetched = steps.decide(
            layer, experts, tokens, weights, tables[1], 0.0, predicted if d else None
        )
        need, num_load = found.need, found.num_load
        assert not steps.memory.predicted_dLE[:, layer].any(), "what it used would count once more"
        for one, other in zip(decision.need, need, strict=True):
            assert np.array_equal(one, other)
        assert (decision.num_load, num_prefetched) == (num_load, its_prefetched)
        here, first = need.num_hits + need.num_late, layer * E
        load, cold = need.experts[here : here + num_load], need.experts[here + num_load :]
        taken = take_for_layer(first + need.experts[:here], first + load, decision.keep, tables[0].arrays)
        table = tables[1]
        table.unprotect()
        table.protect(table.slots_for(layer, need.experts[:here]))
        slots = table.take(layer, load, found.keep)
        table.landed(slots)
        table.protect(slots)
        assert taken.tolist() == slots.tolist()
        for one, other in zip(tables[0].arrays, table.arrays, strict=True):
            assert np.allclose(one, other)
        ahead = steps.prefetches(layer, table)
        is_own = whole.settings.lag > 0 and layer + 1 < L
        if is_own:
            tokens_dE, used_dE = (part.copy() for part in predicted)
        direct = prefetch_layer(
            whole.settings, whole.costs, layer, decision, 0.0, tables[0].arrays, whole.memory, tokens_dE, used_dE,
            is_own,
        )  # fmt: skip
        assert ahead.keys.tolist() == direct.keys.tolist() and ahead.keep.tolist() == direct.keep.tolist()
        num_ahead += len(ahead.keys)
        first_pair, pairs = pairs_of(ids, cold, need.tokens[here + num_load :], E)
        for i, expert in enumerate(cold.tolist()):
            assert pairs[first_pair[i] : first_pair[i + 1]].tolist() == np.flatnonzero(ids == expert).tolist()
        tables[0].check_integrity()
    assert (num_ahead > 0) == (schedule not in NOT_AHEAD)


def test_a_layer_without_predictions_is_planned_as_without_a_predictor():
    """The first ones after a prompt, say."""
    with_one, without = planner("presched"), planner("presched")
    without.restart()
    tables = [ResidencyTable(SHAPE, 14, make_policy("next-use", SHAPE)) for _ in range(2)]
    experts, tokens = np.array([1, 4, 7]), np.array([1, 2, 3])
    bare = Planner(with_one.settings, with_one.costs, SHAPE, 0)
    for layer in range(L):
        plans = [
            (
                one.decide(layer, experts, tokens, tokens.astype(float), table, 0.0, None)[0].num_load,
                len(one.prefetches(layer, table).keys),
            )
            for one, table in zip((with_one, bare), tables, strict=True)
        ]
        assert plans[0] == plans[1]


def test_reuse_is_measured_against_the_experts_in_slots():
    """Four of twelve are needed in turn, two steps each; four that nobody wants have the slots of the layer."""
    one, table = planner("presched"), ResidencyTable(SHAPE, 14, make_policy("lru", SHAPE))
    table.landed(table.take(0, np.arange(8, 12)))
    former, reuse = np.zeros(E, np.int64), np.zeros(FORMER_STEPS + 4)
    for step in range(400):
        expert = np.array([step // 2 % 4])
        one.decide(0, expert, np.ones(1, np.int64), np.ones(1), table, 0.0, None)
        learn_reuse(reuse, former, expert, num_misses=1, num_absent=8)
    assert reuse_lasts(one.memory.reuse) == pytest.approx(0.5, abs=0.05)
    assert np.allclose(one.memory.reuse, reuse)


def test_a_factor_of_the_cpu_does_not_depend_on_how_small_its_experts_are():
    small, large = planner("presched"), planner("presched")
    for _ in range(5):
        small.saw_cpu(0.4, 0.2)
        large.saw_cpu(400.0, 200.0)
    assert small.cpu_factor == pytest.approx(large.cpu_factor) and small.cpu_factor > 1.1


@pytest.mark.parametrize("schedule", ["presched", "hybrimoe"])
@pytest.mark.parametrize(("backlog_us", "is_soon"), [(50.0, True), (5_000.0, False)])
def test_a_copy_that_lands_too_late_is_left_to_later_steps(schedule, backlog_us, is_soon):
    """PreSched has its expert computed on the CPU, where it is a miss; the copy goes on, and counts as used when it
    is. The others wait, as they are published.
    """
    one = planner(schedule)
    table = ResidencyTable(SHAPE, 8, make_policy("lru", SHAPE))
    table.landed(table.take(1, np.array([3])))
    waiting = Waiting.none(SHAPE.total_experts)
    want(waiting, np.array([E + 5]), np.empty(0, np.int64))
    _, slot = table.take_prefetch(waiting, 0, 1)
    tokens = np.ones(3, np.int64)
    one.issued(1, 0.0)
    one._link_free_us = backlog_us
    one.costs = one.costs._replace(link_busy_us=backlog_us)
    decision, num_prefetched = one.decide(
        1, np.array([3, 5, 7]), tokens, tokens.astype(np.float64), table, 0.0, None
    )
    need, here = decision.need, decision.need.num_hits + decision.need.num_late
    assert need.num_hits == 1 and need.experts[0] == 3
    is_awaited = is_soon or schedule == "hybrimoe"
    assert need.num_late == int(is_awaited) == num_prefetched
    if not is_awaited:
        assert 5 in need.experts[here + decision.num_load :], "it is the CPU's"
    assert table.in_flight[slot] and table.prefetched[slot] != is_awaited


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


def test_a_layers_own_predictions_are_kept_for_the_layers_they_are_about():
    """They are compared with what those layers use, which is what trust goes by."""
    one, table = planner("presched"), ResidencyTable(SHAPE, 14, make_policy("next-use", SHAPE))
    experts, tokens = np.array([1, 4]), np.array([1, 1])
    used = np.random.default_rng(0).random((D, E))
    one.decide(0, experts, tokens, tokens.astype(float), table, 0.0, (used, used))
    one.prefetches(0, table)
    for ahead in range(1, D + 1):
        assert np.array_equal(one.memory.predicted_dLE[ahead - 1, ahead], used[ahead - 1])


@pytest.mark.parametrize("wrong", ["tokens", "probability"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_prediction_that_is_not_finite_is_none_and_the_others_stay(wrong, value):
    """Kept, it would spoil trust for good; the same expert's prediction for another layer is a good one."""
    memory, tokens, used = Memory.fresh(D, L, E), np.full((D, E), 2.0), np.full((D, E), 0.5)
    (tokens if wrong == "tokens" else used)[0, 3] = value
    take_down(memory, 0, 0, tokens, used)
    others = np.ones((D, E), dtype=bool)
    others[0, 3] = False
    assert tokens[0, 3] == used[0, 3] == memory.predicted_dLE[0, 1, 3] == 0.0
    assert (tokens[others] == 2.0).all() and (used[others] == 0.5).all()

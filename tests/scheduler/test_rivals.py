"""The systems that PreSched is compared with decide as they are described, by costs alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prescope.cache.slots import Slots, sort_need
from prescope.errors import UnsupportedOption
from prescope.scheduler import SCHEDULES
from prescope.scheduler.baselines import artefact, fiddler, hybrimoe, static_split
from prescope.scheduler.costs import LayerCosts, compiled_costs
from prescope.scheduler.fill import KnownUses
from prescope.scheduler.impact import delay_us, split_us
from prescope.scheduler.plan import ARTEFACT_BATCH, Situation
from prescope.scheduler.settings import resolve
from prescope.scheduler.types import Costs, ScheduleSettings, cpu_time
from tests.support.whole_plan import whole_plan

L, E, K = 4, 8, 2


def costs_of(
    link=172.0, busy=1.0, gpu=5.0, rest=90.0, decide=60.0, base=20.0, each=6.0, alone=1.0, cpu=True
) -> Costs:
    cpu_us = np.array([0.0, *(140.0 + each * n for n in range(1, 33))]) if cpu else np.empty(0)
    return Costs(link, link * busy, gpu, rest, 0.0, decide, base, cpu_us, alone * cpu_us)


def need_of(tokens, slots=None):
    n = len(tokens)
    where = np.full(n, -1) if slots is None else np.array(slots)
    return sort_need(np.arange(n), np.array(tokens, dtype=np.int64), where, np.zeros(L * E, dtype=bool))


NO_HABITS = KnownUses(0.0, 0.0, np.zeros(5), np.zeros(L * E), np.zeros(L * E, np.int64))


def plan(name, need, used, *, costs=None, layer=0, slot_of=None, tokens=None, **settings):
    schedule = SCHEDULES[name]
    slot_of = np.full(L * E, -1) if slot_of is None else slot_of
    flags = np.zeros((3, 4), dtype=bool)
    slots = Slots(slot_of, np.full(4, -1), *flags, np.zeros(L * E), np.zeros(5, np.int64))
    told = ScheduleSettings(
        schedule.number,
        settings.get("lookahead", schedule.lookahead),
        E if schedule.width is None else schedule.width,
        settings.get("threshold", schedule.threshold),
        0,
        K,
    )
    tokens = used if tokens is None else tokens
    return whole_plan(
        Situation(
            told, costs or costs_of(), layer, L, need, 0.0, slots, tokens.copy(), used.copy(), NO_HABITS
        )
    )


# -- HybriMoE's impact -----------------------------------------------------------------------------------------


def test_an_expert_is_prefetched_where_it_saves_more_than_its_copy_costs():
    """The link is idle until the next router has chosen: a copy costs nothing, and each saves the next layer time."""
    used = np.zeros((3, E))
    used[0, :4] = 0.9
    costs = costs_of(link=60.0)
    made = plan("hybrimoe", need_of([1, 1]), used, costs=costs)
    free_us = delay_us(costs, need_of([1, 1]), made.num_load, 0.0, 0) + costs.rest_us + costs.decide_us
    assert 0 < len(made.prefetch) <= int((free_us - made.num_load * costs.link_us) / costs.link_us) + 1
    assert set(made.prefetch.tolist()) <= {8, 9, 10, 11}


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_a_copy_that_makes_others_wait_longer_than_it_saves_is_not_made(probability):
    """The link is so slow that a prefetch would still be on it when the next layer asks; the CPU is done far sooner."""
    used = np.zeros((3, E))
    used[0, :4] = probability
    slow = costs_of(link=5_000.0)
    assert len(plan("hybrimoe", need_of([1, 1]), used, costs=slow).prefetch) == 0


def test_a_copy_that_slows_the_cpu_down_by_more_than_it_saves_is_not_made():
    """All of this layer is on the CPU, which is twice as fast beside an idle link: as with Mixtral's experts."""
    used = np.zeros((3, E))
    used[0, :2] = 0.6
    need = need_of([4, 4, 4])
    quiet = costs_of(link=900.0, each=0.0, alone=0.3, rest=2_000.0)
    loud = quiet._replace(cpu_alone_us=quiet.cpu_us)
    assert len(plan("hybrimoe", need, used, costs=quiet).prefetch) < len(
        plan("hybrimoe", need, used, costs=loud).prefetch
    )


def test_the_layer_that_gains_most_goes_first():
    """Layer 2 misses three experts with many tokens, layer 1 one with a single token."""
    used, tokens = np.zeros((3, E)), np.zeros((3, E))
    used[0, 0], tokens[0, 0] = 0.6, 0.6
    used[1, 1:4], tokens[1, 1:4] = 0.95, 0.95 * 8
    made = plan("hybrimoe", need_of([8] * 4), used, tokens=tokens, costs=costs_of(rest=3_000.0))
    assert made.prefetch[0] in (17, 18, 19)
    assert made.keep.tolist() == [8, 17, 18, 19]


def test_of_experts_with_as_many_tokens_the_likeliest_goes_first():
    used = np.zeros((3, E))
    used[0, [0, 3, 6]] = 0.6, 0.95, 0.7
    made = plan("hybrimoe", need_of([1, 1]), used, costs=costs_of(link=60.0))
    assert made.prefetch[:2].tolist() == [11, 14]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_every_prefetch_gains_what_it_costs_and_the_next_one_would_not(data):
    """By trying: what each prefetch saves its own layer, weighed by probability, against the delay it adds. All have
    one token, so the likeliest goes first.
    """
    us = st.floats(1.0, 600.0)
    costs = costs_of(
        data.draw(us),
        data.draw(st.floats(1.0, 1.5)),
        data.draw(st.floats(0.0, 30.0)),
        data.draw(us),
        data.draw(us),
        data.draw(us),
        data.draw(st.floats(0.0, 30.0)),
        data.draw(st.floats(0.3, 1.0)),
        data.draw(st.booleans()),
    )
    need = need_of(sorted(data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=E)), reverse=True))
    probabilities = data.draw(st.lists(st.floats(0.0, 1.0), min_size=E, max_size=E))
    used = np.zeros((1, E))
    used[0] = probabilities
    slot_of = np.full(L * E, -1)
    slot_of[[8, 13]] = 0, 1
    made = plan("hybrimoe", need, used, costs=costs, slot_of=slot_of, lookahead=1)
    chosen = [key - E for key in made.prefetch.tolist()]
    wanted = [e for e in range(E) if used[0, e] >= 0.5]
    absent = [e for e in wanted if e not in (0, 5)]
    assert set(chosen) <= set(absent)
    here, k = len(wanted) - len(absent), made.num_load

    def takes(prefetched):
        return split_us(costs, np.ones(len(absent) - prefetched), here + prefetched)

    def delay(prefetched):
        return delay_us(costs, need, k, 0.0, prefetched)

    saved = [takes(i) - takes(i + 1) for i in range(len(absent))]
    rest = chosen + sorted(set(absent) - set(chosen), key=lambda e: -used[0, e])
    for i, expert in enumerate(chosen):
        assert max(0.0, saved[i]) * used[0, expert] >= delay(i + 1) - delay(i) - 1e-6
    if len(chosen) < len(absent):
        following = rest[len(chosen)]
        assert (
            max(0.0, saved[len(chosen)]) * used[0, following]
            < delay(len(chosen) + 1) - delay(len(chosen)) + 1e-6
        )


def test_a_coming_layers_time_is_that_of_the_greedy_split():
    costs, tokens = costs_of(), np.array([9.0, 4.0, 2.0, 1.0])
    k = hybrimoe(costs, tokens, 3, 0.0)
    gpu = k * costs.link_us + (3 + k) * costs.gpu_us
    cpu = costs.cpu_base_us + sum(cpu_time(costs.cpu_us, t) for t in tokens[k:])
    assert 0 < k < 4 and split_us(costs, tokens, 3) == max(gpu, cpu)
    assert split_us(costs_of(cpu=False), tokens, 3) == 4 * 172.0 + 7 * 5.0


# -- the artefact, the static split ----------------------------------------------------------------------------


def test_the_artefact_copies_while_that_is_sooner_than_the_cpu():
    """Worked by hand: c = 140 + 6 n, so 236, 200, 152 and 146 us; copies end at 177, 349 us."""
    assert artefact(costs_of(), np.array([16, 10, 2, 1])) == 2  # 177 < 734, 349 < 498, but not 521 < 298
    assert artefact(costs_of(), np.array([1])) == 0  # 177 is not sooner than 146
    assert artefact(costs_of(cpu=False), np.array([3, 1])) == 2
    assert artefact(costs_of(), np.empty(0, np.int64)) == 0


@pytest.mark.parametrize(("sequences", "count"), [(1, 0), (ARTEFACT_BATCH, 0), (ARTEFACT_BATCH + 1, 2)])
def test_the_artefact_prefetches_two_experts_in_large_batches_only(sequences, count):
    used = np.zeros((1, E))
    used[0, :5] = 0.5, 0.9, 0.6, 0.4, 0.7
    tokens = np.array([[1.0, 3.0, 2.0, 9.0, 5.0, 0.0, 0.0, 0.0]])
    made = plan("artefact", need_of([sequences] * K), used, tokens=tokens)
    assert made.prefetch.tolist() == [8 + 4, 8 + 1][:count]


def test_the_static_split_copies_nothing():
    used = np.ones((1, E))
    assert static_split(costs_of(), np.array([30, 2])) == 0
    assert static_split(costs_of(cpu=False), np.array([30, 2])) == 2
    made = plan("static-split", need_of([30, 2]), used)
    assert made.num_load == 0 and len(made.prefetch) == len(made.keep) == 0


@pytest.mark.parametrize(("cpu_us", "copied"), [(10.0, 0), (1000.0, 2)])
@pytest.mark.parametrize("decide", [fiddler, lambda costs, tokens: hybrimoe(costs, tokens, 0, 0.0)])
def test_a_cpu_whose_time_is_known_for_one_token_alone_is_a_cpu(decide, cpu_us, copied):
    costs = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=50.0, cpu_us=(0.0, cpu_us), source="by hand")
    assert decide(compiled_costs(costs, cpu=True, predicts=False), np.array([1, 1])) == copied


@pytest.mark.parametrize("cpu_us", [(), (0.0,)])
@pytest.mark.parametrize(
    "decide", [fiddler, static_split, artefact, lambda costs, tokens: hybrimoe(costs, tokens, 0, 0.0)]
)
def test_where_no_token_has_a_time_on_the_cpu_all_are_copied(decide, cpu_us):
    costs = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=50.0, cpu_us=cpu_us, source="by hand")
    assert decide(compiled_costs(costs, cpu=True, predicts=False), np.array([4, 1, 1])) == 3


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_experts", [1, 2, 3])
def test_a_schedules_own_settings_fit_a_layer_of_few_experts(name, num_experts):
    """The artefact prefetches two experts: with one in a layer its own setting was refused, and a comparison too."""
    found = resolve(name, num_experts=num_experts, depth=2)
    assert 1 <= found.settings.width <= num_experts
    with pytest.raises(UnsupportedOption, match="choose 0 to"):
        resolve(name, num_experts=num_experts, depth=2, width=num_experts + 1)

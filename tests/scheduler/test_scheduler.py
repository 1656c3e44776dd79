"""Decisions: the window's optimum, whom a layer's misses go to, how far predictions are trusted."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prescope.cache.slots import by_landing, landing_us, slots_to_give, sort_need, take_slots
from prescope.errors import UnsupportedOption
from prescope.scheduler import PREDICTORS, SCHEDULES, schedule_named
from prescope.scheduler.baselines import fiddler, hybrimoe
from prescope.scheduler.fill import (
    KnownUses,
    cpu_of,
    price_us,
    watch_demand,
    worth_a_copy,
)
from prescope.scheduler.learn import (
    USE_STEPS,
    discount,
    gain_of_swap,
    learn_reuse,
    learn_swaps,
    learn_trust,
    reuse_lasts,
)
from prescope.scheduler.plan import Situation, make_prefetches
from prescope.scheduler.presched import FORECAST, NOTHING_LATER, Later, split
from prescope.scheduler.types import FORMER_STEPS, Costs, ScheduleSettings, cpu_time
from tests.support.slot_arrays import arrays
from tests.support.speed import assert_within, taken_ms
from tests.support.whole_plan import whole_plan

NUMBERS = {name: schedule.number for name, schedule in SCHEDULES.items()}


def costs_of(
    link=172.0, busy=1.0, gpu=5.0, rest=90.0, decide=60.0, base=20.0, first=140.0, each=6.0, cpu=True, alone=1.0
) -> Costs:  # fmt: skip
    cpu_us = np.array([0.0, *(first + each * n for n in range(1, 17))]) if cpu else np.empty(0)
    return Costs(link, link * busy, gpu, rest, 0.0, decide, base, cpu_us, alone * cpu_us)


# -- the window ------------------------------------------------------------------------------------------------


@st.composite
def windows(draw):
    """A layer's misses and the next one's candidates, small enough to try everything."""
    us = st.floats(0.0, 400.0)
    costs = costs_of(
        draw(st.floats(1.0, 400.0)), draw(st.floats(1.0, 2.0)), draw(st.floats(0.0, 50.0)), draw(us), draw(us),
        draw(us), draw(st.floats(0.0, 500.0)), draw(st.floats(0.0, 50.0)), draw(st.booleans()),
        draw(st.floats(0.4, 1.0)),
    )  # fmt: skip
    tokens = sorted(draw(st.lists(st.integers(1, 30), max_size=6)), reverse=True)
    candidates = draw(st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(1.0, 30.0)), max_size=5))
    candidates.sort(key=lambda pair: -pair[0] * pair[1])
    used = np.array([used for used, _ in candidates])
    expected = np.array([used * each for used, each in candidates])
    backlog = draw(st.floats(0.0, 600.0))
    late_us = np.array(sorted(draw(st.lists(st.floats(0.0, 1.0), max_size=2)))) * backlog
    tokens = [draw(st.integers(1, 30)) for _ in late_us] + tokens
    hits = draw(st.integers(0, 8))
    return costs, np.array(tokens, dtype=np.int64), hits, late_us, backlog, expected, used


def cpu_us_of(costs, beside, alone, link):
    """When the CPU is done: slower until the link is."""
    return beside if beside <= link else link + (beside - link) * alone / beside


def layer_us(costs, tokens, hits, late_us, backlog, k, p):
    """F(k), C(k, p) and T(k, p) of the formulas in `presched`'s docstring."""
    copied = max(0, k - len(late_us))
    link = backlog + copied * (costs.link_busy_us if k < len(tokens) else costs.link_us)
    there = link if copied else late_us[k - 1] if k else 0.0
    gpu = (hits + k) * costs.gpu_us + there
    if k == len(tokens):
        return link, 0.0, gpu
    beside, alone = (
        costs.cpu_base_us + sum(cpu_time(cpu_us, float(n)) for n in tokens[k:])
        for cpu_us in (costs.cpu_us, costs.cpu_alone_us)
    )
    cpu = cpu_us_of(costs, beside, alone, link + p * costs.link_busy_us)
    return link, cpu, max(gpu, cpu)


def next_us(costs, expected, used, owed, p, s):
    """N when V_p+1..V_s are copied and the rest goes to the CPU, and when the link is done."""
    link = owed + sum(used[p:s]) * costs.link_us
    gpu = link + costs.gpu_us if s > p or (p > 0 and owed > 0) else 0.0
    if len(costs.cpu_us) == 0 or p == len(used):
        return gpu, link
    beside, alone = (
        costs.cpu_base_us * min(1.0, sum(used[s:]))
        + sum(u * cpu_time(cpu_us, max(1.0, e / u)) for u, e in zip(used[s:], expected[s:], strict=True))
        for cpu_us in (costs.cpu_us, costs.cpu_alone_us)
    )
    return max(gpu, cpu_us_of(costs, beside, alone, link)), link


def window_us(costs, tokens, hits, late_us, backlog, expected, used, k, p, later=NOTHING_LATER):
    """T + FORECAST * N of a choice (k, p), and FORECAST^2 * M, with the best s of all."""
    link, cpu, done = layer_us(costs, tokens, hits, late_us, backlog, k, p)
    free = done + costs.rest_us + costs.decide_us - link
    free -= (1.0 - costs.link_us / costs.link_busy_us) * max(0.0, min(free, cpu - link))
    owed = max(0.0, p * costs.link_us - free)
    both = []
    for s in range(p, len(used) + 1) if len(costs.cpu_us) else [len(used)]:
        rest, link_then = next_us(costs, expected, used, owed, p, s)
        if link_then == 0.0 and (p == len(used) or k <= len(late_us)):
            link_then = p * costs.link_us - free
        late = link_then + costs.link_us - rest - costs.rest_us - costs.decide_us - later.rest_us
        behind = FORECAST**2 * later.used * max(0.0, min(later.cpu_us, late))
        both.append((done + FORECAST * rest, behind))
    return min(both, key=sum)


def choices(window):
    costs, tokens, _, _, _, _, used = window
    copied = range(len(tokens) + 1) if len(costs.cpu_us) else [len(tokens)]
    return product(copied, range(len(used) + 1))


def worth_us(window, gain):
    """w of the formulas: a layer's least time for each expert that is not there, as often as a swap gains a use; no
    more than the price of a copy for reuse, where that pays.
    """
    costs, tokens, _, late_us, _ = window[:5]
    missing = tokens[len(late_us) :]
    if len(costs.cpu_us) == 0 or len(missing) == 0:
        return 0.0
    least_us = min(layer_us(*window[:5], k, 0)[2] for k in range(len(tokens) + 1))
    cpu_us = cpu_of(costs, missing)
    price = price_us(costs, cpu_us, max(least_us, cpu_us) + costs.rest_us + costs.decide_us)
    worth = gain * least_us / len(tokens)
    return min(worth, price) if gain * cpu_us / len(missing) > price else worth


@settings(max_examples=300, deadline=None)
@given(
    windows(),
    st.floats(-2.0, 2.0),
    st.builds(Later, st.floats(0.0, 1.0), st.floats(0.0, 500.0), st.floats(0.0, 500.0)),
)
def test_the_split_is_the_windows_optimum(window, gain, later):
    """One scan finds what trying every (k, p) and every split of the next layer finds."""
    worth, num_late = worth_us(window, gain), len(window[3])

    def less_worth(us, k):
        return us - max(0, k - num_late) * worth

    best = min(less_worth(sum(window_us(*window, k, p, later)), k) for k, p in choices(window))
    k, p, found_us, done_us, _ = split(*window, -1, gain, later)
    us, later_us = window_us(*window, k, p, later)
    assert less_worth(us + later_us, k) == pytest.approx(best, abs=1e-8)
    assert us == pytest.approx(found_us, abs=1e-9)
    assert done_us == pytest.approx(layer_us(*window[:5], k, p)[2], abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(windows())
def test_the_optimum_of_times_that_are_a_thousand_times_as_short_is_as_exact(window):
    """Experts of a small model take microseconds: no choice is good enough for being near."""
    costs, tokens, hits, late_us, backlog, expected, used = window
    brief = Costs(*(one / 1000.0 for one in costs))
    window = brief, tokens, hits, late_us / 1000.0, backlog / 1000.0, expected, used
    best = min(window_us(*window, k, p)[0] for k, p in choices(window))
    assert split(*window)[2] == pytest.approx(best, abs=1e-8)


@settings(max_examples=100, deadline=None)
@given(windows())
def test_the_split_is_never_worse_than_a_simple_choice(window):
    costs, tokens = window[:2]
    _, _, found_us, _, _ = split(*window)
    simple = [(len(tokens), 0)] + ([(0, 0), (0, len(window[-1]))] if len(costs.cpu_us) else [])
    simple += [(k, 0) for k, _ in choices(window)]
    for k, p in simple:
        assert found_us <= window_us(*window, k, p)[0] + 1e-9


def test_nothing_is_prefetched_where_nothing_is_predicted():
    nothing = np.empty(0)
    k, p, window, done_us, free_us = split(
        costs_of(cpu=False), np.array([3, 1]), 4, nothing, 0.0, nothing, nothing
    )
    assert (k, p) == (2, 0)
    assert window == done_us == 2 * 172.0 + 6 * 5.0 and free_us == 6 * 5.0 + 90.0 + 60.0


def test_no_copy_is_made_that_slows_the_cpu_down_by_more_than_it_saves():
    """Like Mixtral's experts, 352 MB each: what the link reads from memory, the CPU does not."""
    tokens, surely = np.array([4, 4, 4]), np.ones(2)
    for alone, is_quiet in ((0.5, True), (1.0, False)):
        costs = costs_of(6400.0, 1.2, 90.0, 200.0, 40.0, 70.0, 4400.0, 60.0, alone=alone)
        k, p, *_ = split(costs, tokens, 4, np.empty(0), 0.0, 4.0 * surely, surely)
        assert (k + p == 0) == is_quiet


def test_no_copy_is_begun_that_only_moves_the_wait_to_the_layer_after_the_next():
    """Mixtral's experts behind PCIe 5, two of eight without a slot in every layer: beside a copy that is on its way the
    next one would save layer l + 1 a millisecond, and layer l + 2 would wait for its own. On an idle link it is made.
    """
    costs = costs_of(6345.0, 1.148, 125.0, 159.0, 21.0, 436.0, 2700.0, 20.0, alone=0.96)
    tokens, surely = np.array([16, 16]), np.ones(2)
    later = Later(1.0, 3000.0, 3000.0)

    def prefetched(backlog, later):
        late_us = np.full(1, backlog) if backlog else np.empty(0)
        return split(costs, tokens, 6, late_us, backlog, 16.0 * surely, surely, -1, 0.0, later)[1]

    assert [prefetched(us, later) for us in (0.0, 5500.0)] == [1, 0]
    assert prefetched(5500.0, NOTHING_LATER) == 1


@settings(max_examples=200, deadline=None)
@given(windows())
def test_a_late_copy_is_waited_for_only_if_that_is_sooner_than_the_cpu(window):
    """What is on its way is one more way to get an expert, never a reason to be slower than without it."""
    costs, tokens, hits, late_us, backlog, *_ = window
    nothing = np.empty(0)
    k, _, _, done_us, _ = split(costs, tokens, hits, late_us, backlog, nothing, nothing)
    if len(costs.cpu_us):
        alone = layer_us(costs, tokens, hits, late_us, backlog, 0, 0)[2]
        assert done_us <= alone + 1e-9
        if 0 < k <= len(late_us):
            assert late_us[k - 1] < alone
    else:
        assert k == len(tokens)


def test_an_expert_is_copied_on_demand_for_what_it_is_worth_behind_the_layer():
    """Six of GLM's experts of one token, which the CPU computes about as soon as five of them beside one copy. What
    stays and is used again is copied then, what pushes out a better one is not.
    """
    tokens, nothing = np.ones(6, np.int64), np.empty(0)

    def copied(gain, link, alone=0.757):
        costs = costs_of(link, 1.13, 7.0, 218.0, 21.0, 69.0, 382.0, 0.0, alone=alone)
        return split(costs, tokens, 4, nothing, 0.0, nothing, nothing, -1, gain)[0]

    assert [copied(gain, 1252.0) for gain in (-0.1, 0.0, 0.1, 0.3)] == [0, 0, 0, 1]
    assert [copied(gain, 1000.0) for gain in (-0.1, 0.0, 0.1, 0.3)] == [0, 1, 1, 1]
    assert copied(0.3, 2075.0, alone=0.995) == 0, "a copy for reuse brings it for nearly nothing"


def test_a_copy_that_outlasts_layers_is_left_alone():
    """Mixtral's expert over PCIe 3: 25 ms to come, 2.7 on the CPU."""
    costs = costs_of(25_400.0, 1.15, 117.0, 160.0, 21.0, 430.0, 2_600.0, 100.0)
    nothing, one = np.empty(0), np.array([1])
    assert split(costs, one, 1, np.array([22_000.0]), 22_000.0, nothing, nothing)[0] == 0
    assert split(costs, one, 1, np.array([1_000.0]), 1_000.0, nothing, nothing)[0] == 1
    two = np.array([1, 1])
    assert split(costs, two, 1, np.array([500.0, 24_000.0]), 24_000.0, nothing, nothing)[0] == 1


# -- who gives up a slot ---------------------------------------------------------------------------------------


def habits(lasting=0.0, gain=0.0, num_keys=1024) -> KnownUses:
    return KnownUses(lasting, gain, np.zeros(5), np.zeros(num_keys), np.zeros(num_keys, np.int64))


def test_late_ones_stand_in_the_order_in_which_they_land():
    """Three copies are under way, one of them for another layer: what lands last, lands when the link is free."""
    slot_of = np.full(16, -1)
    slot_of[[8, 9, 10, 3]] = 0, 1, 2, 3
    slots = arrays(slot_of, np.array([8, 9, 10, 3]), np.zeros(16))
    slots.in_flight[[0, 2, 3]] = True
    slots.order[:] = [7, 1, 5, 6, 7]
    need = sort_need(np.array([0, 1, 2]), np.array([5, 1, 2]), slot_of[8:11], slots.in_flight)
    by_landing(need, 8, slots)
    assert need.experts.tolist() == [1, 2, 0] and need.tokens.tolist() == [1, 2, 5]
    assert landing_us(need, 8, slots, 250.0, 100.0).tolist() == [50.0, 250.0]


# -- the schedules ---------------------------------------------------------------------------------------------


def test_every_schedule_says_what_it_is():
    assert sorted(NUMBERS.values()) == list(range(len(SCHEDULES)))
    for name, schedule in SCHEDULES.items():
        assert schedule.name == name and schedule.predictor in PREDICTORS
        assert schedule.same and schedule.unknown and schedule.source
        assert schedule.lookahead or schedule.predictor == "none" or schedule.streams
        assert 0.0 <= schedule.threshold <= 1.0


def test_an_unknown_schedule_names_the_choices():
    with pytest.raises(UnsupportedOption, match="'on-demand', 'streaming'"):
        schedule_named("best")


def one_plan(
    name, need, *, costs=None, used=None, slot_of=None, layer=0, L=3, lookahead=1, threshold=0.1, backlog=0.0
):
    E = 8
    used = np.zeros((2, E)) if used is None else used
    slot_of = np.full(L * E, -1) if slot_of is None else slot_of
    slots = arrays(slot_of, np.full(4, -1), np.zeros(L * E))
    settings = ScheduleSettings(NUMBERS[name], lookahead, E, threshold)
    return whole_plan(
        Situation(settings, costs or costs_of(), layer, L, need, backlog, slots, used, used, habits())
    )


def need_of(tokens):
    n = len(tokens)
    return sort_need(np.arange(n), np.array(tokens, dtype=np.int64), np.full(n, -1), np.zeros(1, dtype=bool))


def test_a_likely_expert_is_prefetched_and_an_unlikely_one_is_not():
    used = np.zeros((2, 8))
    used[0, 5], used[0, 6] = 0.9, 0.05
    for name in ("fate", "moe-infinity", "hybrimoe", "presched"):
        made = one_plan(name, need_of([1, 1]), used=used)
        assert made.prefetch.tolist() == [8 + 5] and made.keep.tolist() == [8 + 5], name
    for name in ("on-demand", "fiddler"):
        assert len(one_plan(name, need_of([1, 1]), used=used).prefetch) == 0


def test_streaming_copies_what_is_absent_of_the_next_layer_and_keeps_the_rest():
    slot_of = np.full(24, -1)
    slot_of[[8, 11]] = 0, 1
    made = one_plan("streaming", need_of([1]), slot_of=slot_of)
    assert made.prefetch.tolist() == [9, 10, 12, 13, 14, 15] and made.num_load == 1
    assert set(made.keep.tolist()) == set(range(8, 16))
    assert len(one_plan("streaming", need_of([1]), slot_of=slot_of, layer=2).prefetch) == 0, (
        "no layer behind the last"
    )


def test_fiddler_copies_what_the_cpu_would_take_longer_for():
    tokens = np.array([16, 9, 2, 1])
    assert fiddler(costs_of(), tokens) == 2  # 140 + 6 n > 177 from 7 tokens on
    assert fiddler(costs_of(cpu=False), tokens) == 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 16), max_size=8), st.floats(0.0, 500.0), st.integers(0, 5))
def test_the_greedy_split_is_as_balanced_as_one_expert_allows(tokens, backlog, here):
    """Neither side ends later than the other would have if it had taken one expert more."""
    tokens = np.array(sorted(tokens, reverse=True), dtype=np.int64)
    costs = costs_of()
    k = hybrimoe(costs, tokens, here, backlog)
    assert 0 <= k <= len(tokens)
    link = backlog + k * costs.link_us + (here + k) * costs.gpu_us
    cpu = costs.cpu_base_us + sum(cpu_time(costs.cpu_us, float(n)) for n in tokens[k:])
    if k < len(tokens):
        assert cpu <= link + costs.link_us + costs.gpu_us + cpu_time(costs.cpu_us, float(tokens[k])) + 1e-9
    if k:
        assert link <= cpu + cpu_time(costs.cpu_us, float(tokens[k - 1])) + costs.link_us + 1e-9


def test_a_predictor_that_expects_too_many_tokens_is_scaled_to_those_there_are():
    """An inverted predictor expects nearly every token at nearly every expert. Taken at its word, the CPU would seem
    hopeless for the next layer, and all of this layer's copies would make room for prefetches.
    """
    tokens = np.arange(16, 8, -1)
    need = need_of(tokens)
    used, right = np.ones((2, 8)), np.full((2, 8), tokens.sum() / 8)
    slot_of = np.full(24, -1)
    settings = ScheduleSettings(NUMBERS["presched"], 1, 8, 0.1)
    slots = arrays(slot_of, np.full(4, -1), np.zeros(24))
    now = Situation(settings, costs_of(), 0, 3, need, 0.0, slots, right, used, habits())
    honest, wild = whole_plan(now), whole_plan(now._replace(tokens_dE=50.0 * right))
    assert (wild.num_load, wild.prefetch.tolist()) == (honest.num_load, honest.prefetch.tolist())


def test_trust_falls_to_the_share_of_predictions_that_came_true():
    trust, predicted = np.zeros((2, 2)), np.zeros((2, 3, 8))
    assert discount(trust, 1) == 1.0, "nothing is known yet"
    counts = np.array([1, 0, 0, 0, 1, 1, 0, 0])
    for _ in range(50):
        predicted[0, 1, :4] = 0.8
        learn_trust(trust, 1, counts, predicted, 0.1)
    assert discount(trust, 1) == pytest.approx(1 / 3.2)
    before = trust.copy()
    learn_trust(trust, 1, counts, predicted, 0.1)
    assert (trust == before).all(), "the next predictions came too late, and these counted before"
    assert discount(trust, 2) == 1.0, "layer 1 has no layer two before it"


# -- what a decision costs -------------------------------------------------------------------------------------


def test_a_decision_takes_microseconds():
    """128 experts of which 64 tokens use some 125, 1,536 slots: sorted, planned, slots taken. 49 us on one shared core
    before the window was bounded, some 20 of them for the three ways into compiled code. The best of many repeats,
    since other work shares the machine and its caches.
    """
    rng = np.random.default_rng(0)
    L, E, S, d = 48, 128, 1536, 4
    keys = rng.permutation(L * E)[:S]
    slot_of, scores = np.full(L * E, -1), rng.random(L * E)
    slot_of[keys] = np.arange(S)
    tokens = rng.poisson(4, E)
    experts = np.flatnonzero(tokens)
    tokens, in_flight = tokens[experts], np.zeros(S, dtype=bool)
    used = rng.random((d, E))
    settings, costs = ScheduleSettings(NUMBERS["presched"], 2, E, 0.1), costs_of()
    known = habits(0.5, 0.5, L * E)

    def decided_ms():
        key_of, table = keys.copy(), slot_of.copy()
        slots = arrays(table, key_of, scores)  # which a residency table has at hand

        def decide():
            need = sort_need(experts, tokens, table[5 * E + experts], in_flight)
            made = whole_plan(Situation(settings, costs, 5, L, need, 0.0, slots, 4.0 * used, used, known))
            wanted = 5 * E + need.experts[need.num_hits :][: made.num_load]
            take_slots(wanted, in_flight, made.keep, slots)

        return taken_ms(decide)

    best_ms = assert_within(0.080, lambda: min(decided_ms() for _ in range(300)), "a decision", tries=100)
    print(f"one decision: {1e3 * best_ms:.1f} us")


@pytest.mark.parametrize("seed", range(20))
def test_experts_are_worth_a_slot_while_the_cache_would_rather_have_them(seed):
    rng = np.random.default_rng(seed)
    E, S = 24, 8
    scores = np.round(rng.random(E), 1)  # some alike
    key_of = np.where(rng.random(S) < 0.2, -1, rng.permutation(E)[:S])
    slot_of = np.full(E, -1)
    slot_of[key_of[key_of >= 0]] = np.flatnonzero(key_of >= 0)
    absent = np.flatnonzero(slot_of < 0)[: rng.integers(0, 9)]
    for most in (0, 1, 3, 20):
        slots = arrays(slot_of, key_of, scores)
        victims = slots_to_give(most, slots.in_flight, absent[:0], slots)
        found = worth_a_copy(absent, 100.0, 10.0, victims, habits(gain=1.0), slots)
        least = np.sort(np.where(key_of < 0, -np.inf, scores[key_of]))
        best = np.sort(scores[absent])[::-1]
        n = min(most, len(absent), S)
        count = int(np.cumprod(best[:n] > least[:n]).sum())
        assert len(found) == count and len(set(found)) == count and set(found) <= set(absent)
        assert np.array_equal(scores[found], best[:count])


def test_a_copy_costs_the_cpu_what_it_is_slower_beside_it():
    """A copy of 100 us makes the CPU slower by a fifth of it, as far as the CPU is busy meanwhile; beside the CPU it
    may take longer itself.
    """
    costs = costs_of()._replace(
        link_us=100.0,
        link_busy_us=100.0,
        cpu_base_us=20.0,
        cpu_us=np.array([0.0, 50.0, 60.0]),
        cpu_alone_us=np.array([0.0, 40.0, 48.0]),
    )
    cpu_us = cpu_of(costs, np.ones(2, np.int64))
    assert cpu_us == 120.0 and cpu_of(costs, np.ones(0, np.int64)) == 0.0
    for layer_us, lost_us in ((60.0, 20.0), (120.0, 20.0), (240.0, 10.0), (1_200.0, 2.0)):
        assert price_us(costs, cpu_us, layer_us) == pytest.approx(lost_us)
    slower = costs._replace(link_busy_us=150.0)
    for layer_us in (60.0, 120.0):
        assert price_us(slower, cpu_us, layer_us) == pytest.approx(30.0)
    # Half of its time beside the CPU, in which it gets a third less done.
    assert price_us(slower, cpu_us, 240.0) == pytest.approx(0.2 * 0.5 * 120.0)
    assert price_us(slower._replace(link_us=0.0, link_busy_us=0.0), cpu_us, 60.0) == pytest.approx(
        0.0, abs=1e-6
    )
    assert price_us(costs._replace(cpu_alone_us=costs.cpu_us), cpu_us, 60.0) == 0.0, (
        "such a copy costs nothing"
    )
    assert price_us(costs_of(cpu=False), 0.0, 60.0) == 0.0


def test_what_the_cpu_computes_is_copied_where_such_swaps_have_saved_more_than_that():
    """Expert 5 for expert 0, whose slot it would get; both are watched, whether it is copied or not."""
    slot_of = np.full(8, -1)
    slot_of[0] = 0
    slots = arrays(slot_of, np.array([0]), np.arange(8, dtype=np.float64))

    def copied(gain, price, key=5, slots=slots):
        known = habits(gain=gain)
        return len(
            worth_a_copy(np.array([key]), 100.0, price, np.zeros(1, np.int64), known, slots)
        ) == 1, known

    for gain, is_made in ((1.5 + 1e-6, True), (1.5 - 1e-6, False)):
        found, known = copied(gain, 150.0)
        assert found == is_made == known.copied[5]
        assert known.swaps[0] == known.credit[5] == 1.0 and known.credit[0] == -1.0
        assert np.abs(known.credit).sum() == 2.0 and known.copied.sum() == is_made
    assert not copied(0.0, 0.0)[0], "nothing is known of it"
    slots.scores[0] = 6.0
    found, known = copied(9.0, 0.0)
    assert not found and not known.swaps.any(), "the cache would rather keep what is there"
    free = slots._replace(slot_of=np.full(8, -1), key_of=np.array([-1]))
    found, known = copied(0.0, 1e9, slots=free)
    assert found and not known.swaps.any() and not known.credit.any(), "a free slot is worth filling"


def test_the_next_copy_on_demand_is_watched_with_who_gives_up_its_slot():
    """Expert 5 is used by more tokens than 4, so it would be copied next, for the first of those that give up slots."""
    slots = arrays(np.full(8, -1), np.array([0, 1, -1]), np.zeros(8))
    known = habits()
    watch_demand(np.array([5, 4]), np.array([1, 0]), known, slots)
    assert known.swaps[0] == known.credit[5] == 1.0 and known.credit[1] == -1.0
    assert np.count_nonzero(known.credit) == 2 and not known.copied.any(), "it was not copied"
    known, nothing = habits(), np.empty(0, np.int64)
    for keys, victims in ((nothing, np.array([1])), (np.array([5]), nothing), (np.array([5]), np.array([2]))):
        watch_demand(keys, victims, known, slots)
    assert not known.swaps.any() and not known.credit.any(), (
        "nobody is missing, or nobody would be pushed out"
    )


def test_what_is_copied_on_demand_has_its_life_learned_and_the_next_one_is_watched():
    """Six misses of one token, of which the first is copied; who is predicted for the next layer keeps its slot."""
    slot_of, used, known = np.full(24, -1), np.zeros((2, 8)), habits()
    slot_of[[8, 16]], used[0, 0] = [0, 1], 0.9
    need = need_of([1] * 6)
    slots = arrays(slot_of, np.array([8, 16]), np.arange(24, dtype=np.float64))
    settings = ScheduleSettings(NUMBERS["presched"], 1, 8, 0.1)
    make_prefetches(Situation(settings, costs_of(), 0, 3, need, 0.0, slots, used, used, known, 1))
    assert known.copied.nonzero()[0].tolist() == [0]
    assert known.credit[1] == known.swaps[0] == 1.0 and known.credit[16] == -1.0


def learned_swaps(steps, swap_of, slot_of=None, E=8, num_layers=1):
    """What swaps are said to be worth after steps of one layer, of which each looks at one: an absent expert for one in
    a slot, which is made if `slot_of` says what became of it."""
    known, gains = habits(num_keys=E), []
    slots = np.full(E, -1) if slot_of is None else slot_of
    for step, experts in enumerate(steps):
        learn_swaps(known.swaps, known.credit, known.copied, slots, num_layers, np.array(experts, np.int64))
        gains.append(float(gain_of_swap(known.swaps)))
        key, victim = swap_of(step)
        known.swaps[0] += 1.0
        known.credit[key] += 1.0
        known.credit[victim] -= 1.0
        known.copied[key] = slot_of is not None
    return np.array(gains)


def test_a_swap_is_worth_the_uses_that_followed():
    """An expert that each step uses for one that none does: all of its life. The other way round as much is lost."""
    often = learned_swaps([(3, 5)] * 400, lambda step: (3, 0))
    assert (
        often[0] == 0.0 and (np.diff(often) > -2e-3).all() and often[-1] == pytest.approx(USE_STEPS, rel=0.15)
    )
    assert learned_swaps([(3, 5)] * 400, lambda step: (0, 3))[-1] < -0.8 * USE_STEPS
    assert learned_swaps([(3, 5)] * 400, lambda step: (3, 5))[-1] == 0.0, "both alike"
    once = learned_swaps([(step % 8,) for step in range(800)], lambda step: (step % 8, (step + 4) % 8))
    assert abs(once[-1]) < 0.5, "it comes back, and so does the other"


def test_a_swap_is_worth_nothing_where_experts_differ_by_chance():
    """The expert that chance has favoured lately, for the one that it has not: what the last steps show is no use."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        steps, uses, best = [rng.permutation(16)[:3] for _ in range(400)], np.zeros(16), []
        for experts in steps:
            uses *= 0.95
            uses[experts] += 0.05
            best.append((int(uses.argmax()), int(uses.argmin())))
        assert uses.max() - uses.min() > 0.15
        assert learned_swaps(steps, lambda step, best=best: best[step], E=16)[-1] < 0.25


def test_a_copy_that_loses_its_slot_at_once_is_worth_what_it_was_used_before():
    """Between two looks a prefetch takes the slot: only the next step counts."""
    steps, swap_of = [(3, 5)] * 400, lambda step: (3, 0)
    stays = np.arange(8)
    assert learned_swaps(steps, swap_of, stays)[-1] == pytest.approx(USE_STEPS, rel=0.15)
    assert 0.5 < learned_swaps(steps, swap_of, np.full(8, -1))[-1] < 1.5


@pytest.mark.parametrize("period", range(1, FORMER_STEPS + 1))
def test_what_a_layer_needed_some_steps_ago_lasts_if_it_comes_back(period):
    former, reuse = np.zeros(8, np.int64), np.zeros(FORMER_STEPS + 4)
    for step in range(400):
        learn_reuse(reuse, former, np.array([step % period, 4 + step % period]), 0, 4)
        lasting = reuse_lasts(reuse)
    assert lasting == pytest.approx(1.0, abs=0.05)


def test_slots_that_hold_what_nobody_wants_do_not_keep_out_what_is_used_again():
    """Four of eight experts are needed in turn, two steps each, and the other four have the slots."""
    former, reuse = np.zeros(8, np.int64), np.zeros(FORMER_STEPS + 4)
    for step in range(400):
        learn_reuse(reuse, former, np.array([step // 2 % 4]), num_misses=1, num_absent=4)
    assert reuse_lasts(reuse) == pytest.approx(0.5, abs=0.05), (
        "measured against those in slots, which are not needed"
    )


def test_what_does_not_come_back_in_time_does_not_last():
    former, reuse = np.zeros(16, np.int64), np.zeros(FORMER_STEPS + 4)
    for step in range(400):
        learn_reuse(reuse, former, np.array([step % 8, 8 + step % 8]), 1, 4)
        lasting = reuse_lasts(reuse)
    assert lasting == pytest.approx(-1 / 12, abs=0.02), "against the 12 in slots, of which one is needed"


@pytest.mark.parametrize(
    ("name", "layers"), [("fate", 1), ("artefact", 1), ("moe-infinity", 1), ("klotski", 1), ("hybrimoe", 3)]
)
def test_rivals_look_as_far_ahead_as_published(name, layers):
    assert SCHEDULES[name].lookahead == layers

"""What a plan does with a layer's misses and the link's free time, by schedule."""

import numpy as np
import pytest

from prescope.cache.slots import SortedNeed, sort_need
from prescope.errors import UnsupportedOption
from prescope.scheduler import SCHEDULES
from prescope.scheduler.baselines import hybrimoe
from prescope.scheduler.fill import KnownUses
from prescope.scheduler.layer import as_served
from prescope.scheduler.learn import learn_trust
from prescope.scheduler.plan import LONG_LASTING, Situation, wanted
from prescope.scheduler.presched import split
from prescope.scheduler.settings import resolve
from prescope.scheduler.types import Costs, Plan, ScheduleSettings, cpu_time
from tests.support.slot_arrays import arrays
from tests.support.whole_plan import whole_plan

E, L = 8, 4
NUMBERS = {name: schedule.number for name, schedule in SCHEDULES.items()}


def costs_of(link=100.0, gpu=5.0, rest=90.0, cpu=True) -> Costs:
    cpu_us = np.array([0.0, *(50.0 + 5.0 * n for n in range(1, 9))]) if cpu else np.empty(0)
    return Costs(link, link, gpu, rest, 0.0, 10.0, 20.0, cpu_us, cpu_us)


def need_of(*tokens: int) -> SortedNeed:
    n = len(tokens)
    return sort_need(np.arange(n), np.array(tokens, dtype=np.int64), np.full(n, -1), np.zeros(1, dtype=bool))


#: Slots of experts that the cache would rather keep.
TAKEN = 3 * E + np.arange(4)


def plan_of(
    name, need, *, tokens=None, used=None, layer=0, lasting=0.0, scores=None, key_of=None, costs=None, lookahead=2,
    backlog=0.0, d=2,
):  # fmt: skip
    used = np.zeros((d, E)) if used is None else used
    tokens = used if tokens is None else tokens
    key_of = np.full(4, -1) if key_of is None else key_of
    slot_of = np.full(L * E, -1)
    slot_of[key_of[key_of >= 0]] = np.flatnonzero(key_of >= 0)
    slots = arrays(slot_of, key_of, np.zeros(L * E) if scores is None else scores)
    settings = ScheduleSettings(NUMBERS[name], lookahead, E, 0.1)
    habits = KnownUses(lasting, 2.0 * lasting, np.zeros(5), np.zeros(L * E), np.zeros(L * E, np.int64))
    return whole_plan(
        Situation(settings, costs or costs_of(), layer, L, need, backlog, slots, tokens, used, habits)
    )


@pytest.mark.parametrize("layer", range(L))
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_plans_without_a_predictor(name, layer):
    made = plan_of(name, need_of(2, 1), layer=layer, d=0)
    assert 0 <= made.num_load <= 2
    streams = name in ("streaming", "klotski") and layer + 1 < L
    fills = 2 - made.num_load if name == "presched" else 0  # free slots, with what the CPU computes
    assert len(made.prefetch) == (E if streams else fills)


def test_the_most_tokens_come_first():
    tokens = np.array([1.0, 4.0, 0.0, 2.0, 4.0, 3.0, 9.0, 9.0])
    used = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.05, 1.0])
    slot_of = np.full(2 * E, -1)
    slot_of[E + 7] = 3
    settings = ScheduleSettings(NUMBERS["fate"], 1, 4, 0.1)
    assert wanted(settings, 1, slot_of, tokens, used).tolist() == [E + 1, E + 4, E + 5, E + 3]


def test_klotski_streams_the_next_layers_hottest_first_and_streaming_in_order():
    tokens = np.array([np.arange(E), -np.arange(E)], dtype=float)
    assert plan_of("klotski", need_of(1), tokens=tokens, used=np.ones((2, E))).prefetch.tolist() == [
        *range(2 * E - 1, E - 1, -1)
    ]
    assert plan_of("streaming", need_of(1), d=0).prefetch.tolist() == [*range(E, 2 * E)]


@pytest.mark.parametrize("name", ["fate", "moe-infinity"])
def test_who_has_no_cpu_lane_copies_every_miss(name):
    assert plan_of(name, need_of(1, 1, 1), backlog=10_000.0).num_load == 3
    assert plan_of("hybrimoe", need_of(1, 1, 1), backlog=10_000.0).num_load == 0


def test_presched_prefetches_the_next_layer_by_the_next_layers_predictions():
    used, tokens = np.zeros((2, E)), np.zeros((2, E))
    used[0, 5], tokens[0, 5] = 1.0, 8.0
    tokens[1] = 1e6
    cold = costs_of(rest=400.0)
    made = plan_of("presched", need_of(8), used=used, tokens=tokens, costs=cold)
    other = plan_of("presched", need_of(8), used=used, tokens=np.array([tokens[0], tokens[0]]), costs=cold)
    assert (made.num_load, made.prefetch.tolist()) == (other.num_load, other.prefetch.tolist())
    assert E + 5 in made.prefetch


@pytest.mark.parametrize(("tokens", "copied"), [(1.0, []), (8.0, [E + 5])])
def test_how_many_tokens_the_next_layer_has_decides_and_not_the_layer_after_it(tokens, copied):
    """The CPU is quick with one token of an expert and slow with eight."""
    used, expected = np.zeros((2, E)), np.zeros((2, E))
    used[0, 5], expected[0, 5], expected[1, 5] = 1.0, tokens, 9.0 - tokens
    made = plan_of(
        "presched",
        need_of(7, 5),
        key_of=TAKEN,
        used=used,
        tokens=expected,
        costs=costs_of(link=288.0, rest=0.0),
    )
    assert made.prefetch.tolist() == copied


def test_link_time_that_is_left_goes_to_further_layers_and_no_more_than_is_left():
    used = np.zeros((2, E))
    used[1] = 0.9
    plenty = plan_of("presched", need_of(), used=used, costs=costs_of(rest=330.0))
    assert plenty.prefetch.tolist() == [
        2 * E + e for e in range(4)
    ]  # 340 us left: three copies and one begun
    none = plan_of("presched", need_of(), used=used, costs=costs_of(rest=330.0), backlog=5_000.0)
    assert not len(none.prefetch)


def test_what_the_cpu_computed_is_copied_behind_while_it_lasts():
    """Experts 0 to 6 are needed, of layer 1; four in slots, and the cache rates two of the missing above them."""
    key_of = np.array([E, E + 1, E + 2, E + 3])
    scores = np.full(L * E, 1.0)
    scores[[E + 5, E + 6]] = 3.0, 2.0
    experts = np.array([0, 1, 2, 3, 4, 5, 6])
    need = SortedNeed(experts, np.ones(7, np.int64), 4, 0)
    quick = costs_of(link=200.0, rest=2_000.0)
    for lasting, copied in ((0.0, []), (1.0, [E + 5, E + 6])):
        made = plan_of("presched", need, layer=1, lasting=lasting, scores=scores, key_of=key_of, costs=quick)
        assert made.num_load == 0, "the CPU is quicker than the link"
        assert made.prefetch.tolist() == copied


def test_a_use_that_is_foreseen_comes_before_a_swap():
    """One expert of layer 3 is sure to be used; the cache would rather have expert 6, which the CPU computes now."""
    key_of, scores = np.array([E, E + 1, E + 2, E + 3]), np.full(L * E, 1.0)
    scores[E + 6] = 3.0
    need = SortedNeed(np.array([0, 1, 2, 3, 6]), np.ones(5, np.int64), 4, 0)
    used = np.zeros((2, E))
    used[1, 4] = 1.0
    foreseen, again = 3 * E + 4, E + 6
    for rest, copied in ((100.0, [foreseen]), (1_000.0, [foreseen, again])):
        quick = costs_of(link=200.0, rest=rest)
        made = plan_of(
            "presched", need, used=used, layer=1, lasting=1.0, scores=scores, key_of=key_of, costs=quick
        )
        assert made.prefetch.tolist() == copied


def test_what_is_copied_behind_is_what_the_cpu_computed():
    """Three are there, the link has time for one miss, and the CPU computes the others."""
    key_of, scores = np.array([E, E + 1, E + 2, -1]), np.full(L * E, 1.0)
    need = SortedNeed(np.arange(8), np.ones(8, np.int64), 3, 0)
    slow_cpu = costs_of(link=120.0, rest=2_000.0)
    made = plan_of("presched", need, layer=1, lasting=1.0, scores=scores, key_of=key_of, costs=slow_cpu)
    assert made.num_load == 1
    assert made.prefetch.tolist() == [E + 4], "the one free slot's, of those that were not loaded"


def test_where_experts_last_the_unlikely_come_behind_and_the_unlikelier_not_at_all():
    key_of, scores = np.array([E, E + 1, E + 2, E + 3]), np.full(L * E, 1.0)
    scores[E + 6] = 3.0
    need = SortedNeed(np.array([0, 1, 2, 3, 6]), np.ones(5, np.int64), 4, 0)
    used = np.zeros((2, E))
    used[0, :3] = 0.9, 0.4, 0.2
    quick = costs_of(link=200.0, rest=3_000.0)
    likely, maybe, hardly = 2 * E, 2 * E + 1, 2 * E + 2
    asked = {"used": used, "layer": 1, "scores": scores, "key_of": key_of, "costs": quick}
    for lasting in (LONG_LASTING, 1.0):
        made = plan_of("presched", need, lasting=lasting, **asked)
        assert made.prefetch.tolist() == [likely, E + 6, maybe]
    brief = plan_of("presched", need, lasting=0.9 * LONG_LASTING, **asked).prefetch.tolist()
    assert set(brief) >= {likely, maybe, hardly} and brief[0] == likely


def test_decided_loads_stay_as_they_were_decided():
    """Also none at all, when prefetches are reconsidered."""
    nothing = np.empty(0)
    for num_load in range(4):
        k, *_ = split(costs_of(link=1.0), np.array([3, 2, 1]), 3, nothing, 0.0, nothing, nothing, num_load)
        assert k == num_load


@pytest.mark.parametrize("seed", range(10))
def test_hybrimoe_gives_each_expert_to_the_side_that_is_done_with_it_first(seed):
    rng = np.random.default_rng(seed)
    costs = costs_of(link=float(rng.integers(20, 90)), gpu=float(rng.integers(1, 40)))
    tokens = np.sort(rng.integers(1, 9, 7))[::-1].astype(np.int64)
    here, backlog = int(rng.integers(0, 5)), float(rng.integers(0, 300))
    for_link, for_cpu, left = [], [], tokens.tolist()
    while left:
        link_us = backlog + (len(for_link) + 1) * costs.link_us + (here + len(for_link) + 1) * costs.gpu_us
        cpu_us = costs.cpu_base_us + sum(cpu_time(costs.cpu_us, n) for n in [*for_cpu, left[-1]])
        for_cpu.append(left.pop()) if cpu_us < link_us else for_link.append(left.pop(0))
    assert hybrimoe(costs, tokens, here, backlog) == len(for_link)


def test_trust_looks_at_what_is_prefetched():
    """An expert of just the threshold is prefetched, so whether it was used counts."""
    trust, predicted = np.zeros((1, 2)), np.zeros((1, 2, E))
    predicted[0, 1, :2] = 0.25
    assert (
        len(
            wanted(
                ScheduleSettings(NUMBERS["fate"], 1, E, 0.25),
                1,
                np.full(2 * E, -1),
                np.ones(E),
                predicted[0, 1],
            )
        )
        == 2
    )
    learn_trust(trust, 1, np.ones(E, np.int64), predicted, 0.25)
    assert trust[0].tolist() == [0.5, 2.0]


# -- settings --------------------------------------------------------------------------------------------------


def test_who_uses_the_cpu_and_who_predicts():
    assert {name for name, schedule in SCHEDULES.items() if schedule.uses_cpu} == {
        "artefact",
        "fiddler",
        "hybrimoe",
        "presched",
        "static-split",
    }
    for schedule in SCHEDULES.values():
        assert schedule.predictor == "none" or schedule.lookahead >= 1
        assert schedule.predictor != "none" or schedule.streams or schedule.lookahead == 0


def test_settings_are_taken_within_their_range_only():
    def made(name="presched", **given):
        return resolve(name, num_experts=E, depth=2, **given)

    for bad in ({"width": -1}, {"width": E + 1}, {"lookahead": 3}, {"lookahead": -1}, {"threshold": 1.5}):
        with pytest.raises(UnsupportedOption):
            made(**bad)
    assert made(width=0).settings.width == 0 and made(width=E).settings.width == E
    assert made(cpu=True).cpu and made().cpu and not made(cpu=False).cpu
    for name, has_cpu in (("presched", False), ("fate", True)):
        with pytest.raises(UnsupportedOption, match="cpu=True, but"):
            made(name, cpu=True, has_cpu=has_cpu)
        assert not made(name, has_cpu=has_cpu).cpu
    for name, schedule in SCHEDULES.items():
        found = made(name, lookahead=2)
        assert found.settings.lookahead == (0 if schedule.predictor == "none" else 2)


@pytest.mark.parametrize("num_load", [0, 1, 3])
def test_late_ones_that_are_not_waited_for_are_behind_the_misses_that_are_copied(num_load):
    """Five hits, of four late ones the first is waited for, five misses of which the first are copied."""
    experts = np.array([40, 41, 42, 43, 44, 20, 21, 22, 23, 10, 11, 12, 13, 14])
    need = as_served(SortedNeed(experts, 2 * experts, 5, 4), Plan(1, num_load))
    misses = [10, 11, 12, 13, 14]
    expected = [40, 41, 42, 43, 44, 20, *misses[:num_load], 21, 22, 23, *misses[num_load:]]
    assert need.experts.tolist() == expected and (need.tokens == 2 * need.experts).all()
    assert (need.num_hits, need.num_late) == (5, 1)
    assert experts.tolist()[5:9] == [20, 21, 22, 23], "the need that was given stays as it was"


@pytest.mark.parametrize("threshold", [-0.5, -1e-9, 1.0001, float("nan"), "0.5"])
def test_a_threshold_is_a_probability(threshold):
    with pytest.raises(UnsupportedOption, match="a probability lies in"):
        resolve("presched", num_experts=8, depth=1, threshold=threshold)
    for edge in (0.0, 1.0):
        assert resolve("presched", num_experts=8, depth=1, threshold=edge).settings.threshold == edge


def test_all_less_likely_experts_that_the_link_has_time_for_are_prefetched():
    """Where what was used is used again they come behind the likely ones: five of them, on an idle link."""
    used = np.zeros((2, E))
    used[0, :6] = 0.95, 0.5, 0.45, 0.4, 0.35, 0.3
    quick = costs_of(link=10.0, rest=30_000.0)
    need = sort_need(np.arange(2), np.ones(2, np.int64), np.arange(2), np.zeros(2, dtype=bool))
    made = plan_of(
        "presched", need, used=used, layer=1, costs=quick, lasting=1.0, key_of=np.array([E, E + 1, -1, -1])
    )
    assert made.prefetch.tolist() == [2 * E + expert for expert in range(6)]

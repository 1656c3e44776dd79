"""Laws of residency and cache policies, on random sequences of needs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prescope.cache.frequencies import require_frequencies
from prescope.cache.num_slots import resolve_slots
from prescope.cache.policies import POLICIES, make_policy
from prescope.cache.residency import ResidencyTable, distinct
from prescope.core.types import MoEShape
from prescope.errors import SlotPoolTooSmall, UnsupportedOption
from prescope.traces.bounds import belady_misses
from prescope.traces.routing import RoutingTrace

SHAPE = MoEShape(num_layers=3, num_experts=8, top_k=2, row_bytes=1024)


def table_of(policy: str, num_slots: int) -> ResidencyTable:
    frequencies = np.random.default_rng(0).random((SHAPE.num_layers, SHAPE.num_experts))
    return ResidencyTable(SHAPE, num_slots, make_policy(policy, SHAPE, frequencies))


def serve(table: ResidencyTable, layer: int, ids: np.ndarray) -> int:
    """What the engine does with one layer, without bytes; returns the misses."""
    experts, tokens = distinct(ids, SHAPE.num_experts)
    need = table.need(layer, experts, tokens, tokens.astype(float))
    assert sorted(need.experts.tolist()) == sorted(experts.tolist()), "nothing needed is lost or invented"
    rounds = table.rounds(need)
    assert sorted(np.concatenate(rounds).tolist()) == sorted(experts.tolist()), "each expert is in one round"
    table.protect(table.slots_for(layer, need.experts[: need.num_hits]))
    for chosen in rounds:
        missing = chosen[table.slots_for(layer, chosen) < 0]
        assert table.can_take(len(missing))
        slots = table.take(layer, missing)
        assert (table.slots_for(layer, chosen) >= 0).all(), "a round was computed without all of its experts"
        table.landed(slots)
        table.check_integrity()
        table.unprotect(table.slots_for(layer, chosen))
    table.unprotect()
    return need.num_misses


def random_trace(seed: int, steps: int = 30, tokens: int = 2) -> RoutingTrace:
    """A trace with skew: some experts are popular."""
    rng = np.random.default_rng(seed)
    rows = steps * tokens
    popularity = rng.dirichlet(np.full(SHAPE.num_experts, 0.6), size=SHAPE.num_layers)
    ids = np.stack(
        [
            [
                rng.choice(SHAPE.num_experts, SHAPE.top_k, replace=False, p=popularity[layer])
                for _ in range(rows)
            ]
            for layer in range(SHAPE.num_layers)
        ],
        axis=1,
    )
    step = np.repeat(np.arange(steps), tokens)
    return RoutingTrace(
        expert_ids=ids,
        weights=np.full(ids.shape, 0.5),
        step=step,
        sequence=np.tile(np.arange(tokens), steps),
        position=step,
        phase=(step > 0).astype(int),
        model="random",
        fingerprint="",
        num_experts=SHAPE.num_experts,
        top_k=SHAPE.top_k,
        decoder_layers=[0, 1, 2],
    )


def replay(trace: RoutingTrace, policy: str, num_slots: int) -> int:
    table = table_of(policy, num_slots)
    ids = trace.expert_ids
    return sum(
        serve(table, layer, ids[trace.step == step, layer])
        for step in trace.steps
        for layer in range(SHAPE.num_layers)
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    policy=st.sampled_from(sorted(POLICIES)),
    num_slots=st.integers(2, SHAPE.total_experts),
    tokens=st.integers(1, 9),
)
def test_slots_never_hold_two_experts_and_every_need_is_served(seed, policy, num_slots, tokens):
    """Any sequence of needs, also of more experts than there are slots."""
    rng = np.random.default_rng(seed)
    table = table_of(policy, num_slots)
    for _ in range(12):
        serve(
            table,
            int(rng.integers(SHAPE.num_layers)),
            rng.integers(0, SHAPE.num_experts, (tokens, SHAPE.top_k)),
        )
    table.clear()
    table.check_integrity()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_slots", [2, 5, 9, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_beats_belady(policy, num_slots, seed):
    """Belady knows the future; a policy with fewer misses means that one of the two miscounts."""
    trace = random_trace(seed)
    floor = belady_misses(trace, num_slots)
    assert replay(trace, policy, num_slots) >= floor.misses_prefill + floor.misses_decode


def test_belady_with_a_slot_for_each_expert_misses_each_once():
    trace = random_trace(1)
    floor = belady_misses(trace, SHAPE.total_experts)
    assert floor.misses_prefill + floor.misses_decode == np.count_nonzero(trace.expert_counts())
    assert belady_misses(trace, SHAPE.total_experts, before=trace).misses_decode == 0


def test_belady_on_a_sequence_worked_by_hand():
    """Two slots, one layer, needs a b c a b: a and b miss, c evicts b (needed last), a hits, b misses again."""
    ids = np.array([0, 1, 2, 0, 1]).reshape(5, 1, 1)
    trace = RoutingTrace(
        expert_ids=ids, weights=np.ones(ids.shape), step=np.arange(5), sequence=np.zeros(5, int), position=np.arange(5),
        phase=np.ones(5, int), model="", fingerprint="", num_experts=3, top_k=1, decoder_layers=[0],
    )  # fmt: skip
    assert belady_misses(trace, 2).misses_decode == 4
    assert belady_misses(trace, 2).needed_decode == 5


def test_lru_below_one_steps_working_set_never_hits():
    """The cliff: cyclic needs of n experts through n - 1 slots."""
    table = table_of("lru", 2)
    assert [serve(table, layer, np.array([[0]])) for _ in range(10) for layer in range(3)] == [1] * 30


def test_static_keeps_the_frequent_experts():
    frequencies = np.zeros((SHAPE.num_layers, SHAPE.num_experts))
    frequencies[0, 0] = 10
    table = ResidencyTable(SHAPE, 2, make_policy("static", SHAPE, frequencies))
    misses = [serve(table, 0, np.array([[0, expert]])) for expert in (1, 2, 3, 4, 5)]
    assert misses == [2, 1, 1, 1, 1]


def test_prefetches_in_flight_are_neither_evicted_nor_counted_as_hits():
    table = table_of("lru", 4)
    slots = table.take(0, np.array([0, 1]))
    need = table.need(0, np.array([0, 1, 2]), np.ones(3, dtype=np.int64), np.ones(3))
    assert (need.num_hits, need.num_late, need.num_misses) == (0, 2, 1)
    assert not table.can_take(3), "two free, two on the wire"
    table.landed(slots)
    assert table.can_take(4)


@pytest.mark.parametrize(
    ("slots", "count"), [(5, 5), (0.25, 6), (1.0, 24), ("4KiB", 4), ("1MiB", 24), (1000, 24)]
)
def test_slots_are_a_count_a_share_or_a_size(slots, count):
    assert resolve_slots(slots, total_experts=24, row_bytes=1024, top_k=2)[0] == count


def test_slots_below_top_k_are_refused_with_the_least_that_works():
    with pytest.raises(SlotPoolTooSmall, match="use slots=2"):
        resolve_slots("1KiB", total_experts=24, row_bytes=1024, top_k=2)


def test_static_needs_frequencies_of_this_model():
    with pytest.raises(UnsupportedOption, match="record a run first"):
        make_policy("static", SHAPE)
    with pytest.raises(UnsupportedOption, match="3 MoE layers x 8 experts"):
        make_policy("static", SHAPE, np.ones((2, 8)))


def test_the_shallow_cache_gives_up_the_deepest_layer_first_and_there_the_oldest_use():
    """Whatever was used when: turned round, the first layers, which have the least time to prefetch, would go first."""
    table = table_of("shallow", 4)
    used = [(2, 1), (1, 0), (2, 3), (0, 2)]
    for layer, expert in used:
        serve(table, layer, np.array([expert]))
    keys = {layer * SHAPE.num_experts + expert: (layer, expert) for layer, expert in used}
    given_up = []
    for newcomer in (4, 5, 6):  # of the first layer, which stay once they are used
        before = set(table.key_of.tolist())
        serve(table, 0, np.array([newcomer]))
        (gone,) = before - set(table.key_of.tolist())
        given_up.append(keys[gone])
    assert given_up == [(2, 1), (2, 3), (1, 0)]


@pytest.mark.parametrize("ids", [[], [-1, 0, 2, 2], [1, 5], [4, 4, 0, -3, 9]])
def test_ids_of_no_expert_are_not_counted(ids):
    """Sentinels stand on either side of [0, E), and a text-only batch has no tokens for a family's image experts."""
    experts, uses = distinct(np.array([ids], dtype=np.int64), 5)
    known = [e for e in ids if 0 <= e < 5]
    assert dict(zip(experts.tolist(), uses.tolist(), strict=True)) == {e: known.count(e) for e in known}


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_frequencies_are_counts(wrong):
    """Of experts that were never used, too; one number that is none would decide who stays."""
    shape = (SHAPE.num_layers, SHAPE.num_experts)
    found = np.arange(float(np.prod(shape))).reshape(shape)
    assert (require_frequencies(SHAPE, found.tolist()) == found).all()
    found[1, 2] = wrong
    with pytest.raises(UnsupportedOption, match="negative numbers, NaN or infinities"):
        require_frequencies(SHAPE, found)


def test_the_most_frequent_experts_without_a_slot_are_put_back_layer_by_layer():
    """Four slots: 5, 7 and 1 of the first layer's experts and 6 of the last's are the most frequent; 5 is there."""
    table = ResidencyTable(SHAPE, 4, make_policy("lru", SHAPE))
    known_LE = np.zeros((SHAPE.num_layers, SHAPE.num_experts))
    known_LE[0, [5, 7, 1]], known_LE[2, 6], known_LE[1, 4] = (9.0, 8.0, 7.0), 6.0, 1.0
    table.known_LE = known_LE
    table.landed(table.take(0, np.array([5, 2])))
    found = [
        (layer, experts.tolist()) for layer, experts, slots in table.put_back() if table.landed(slots) is None
    ]
    assert found == [(0, [1, 7]), (2, [6])]
    assert table.slots_for(0, np.array([1, 5, 7])).min() >= 0 and table.slots_for(2, np.array([6])).min() >= 0
    assert table.slots_for(0, np.array([2])).max() < 0  # made room


def test_too_few_slots_say_how_many_bytes_would_do():
    with pytest.raises(SlotPoolTooSmall, match=r"use slots=4 \(8 KiB\) or more"):
        resolve_slots(1, total_experts=64, row_bytes=2048, top_k=4)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_that_forgets_is_as_it_was_when_it_was_made(name):
    """What a run has shown is gone: another run from cold slots decides as the first did."""
    frequencies = np.random.default_rng(0).random((SHAPE.num_layers, SHAPE.num_experts))
    policy, new = (make_policy(name, SHAPE, frequencies) for _ in range(2))
    rng = np.random.default_rng(1)

    def used() -> list[tuple[int, np.ndarray]]:
        steps = [(layer, rng.permutation(SHAPE.num_experts)[:3]) for layer in range(SHAPE.num_layers)] * 20
        return [(layer, np.sort(experts)) for layer, experts in steps]

    for layer, experts in used():
        policy.use(layer, experts, np.ones(3))
    policy.reset()
    assert np.array_equal(policy.scores, new.scores)
    for layer, experts in used():
        for one in (policy, new):
            one.use(layer, experts, np.ones(3))
        assert np.array_equal(policy.scores, new.scores)


def test_a_layer_is_kept_when_all_of_it_is_there_and_nothing_can_be_evicted():
    table = ResidencyTable(SHAPE, SHAPE.total_experts, make_policy("lru", SHAPE))
    assert not table.keeps(0, SHAPE.num_experts)
    slots = table.take(0, np.arange(SHAPE.num_experts))
    assert 0 in slots and not table.keeps(0, SHAPE.num_experts), "they are on their way"
    table.landed(slots)
    assert table.keeps(0, SHAPE.num_experts) and not table.keeps(1, SHAPE.num_experts)
    fewer = ResidencyTable(SHAPE, SHAPE.total_experts - 1, make_policy("lru", SHAPE))
    fewer.landed(fewer.take(0, np.arange(SHAPE.num_experts)))
    assert not fewer.keeps(0, SHAPE.num_experts), "another layer may take its slots"


def test_lfu_counts_uses_and_the_last_one_breaks_ties_only():
    policy = make_policy("lfu", SHAPE)
    for layer, expert in [(0, 3), (0, 1), (2, 5), (0, 1), (1, 0), (0, 3), (0, 3)]:
        policy.use(layer, np.array([expert]), np.ones(1))
    scores = policy.scores[: SHAPE.total_experts]
    assert {key: int(scores[key]) for key in np.flatnonzero(scores)} == {1: 2, 3: 3, 8: 1, 21: 1}
    assert scores[8] > scores[21], "the later of two that were used once"


def test_a_layers_own_late_ones_take_no_room_from_it():
    """Of four slots three are in flight, two of them for this layer: with the third of its experts it is one round."""
    table = ResidencyTable(SHAPE, 4, make_policy("lru", SHAPE))
    table.take(0, np.array([2, 5]))
    table.take(1, np.array([7]))
    need = table.need(0, np.array([2, 5, 6]), np.ones(3, np.int64), np.ones(3))
    assert need.num_late == 2 and [one.tolist() for one in table.rounds(need)] == [[2, 5, 6]]
    need = table.need(0, np.array([1, 2, 5, 6]), np.ones(4, np.int64), np.ones(4))
    assert [one.tolist() for one in table.rounds(need)] == [[2, 5], [1], [6]]

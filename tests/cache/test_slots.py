"""What is evicted, and how a need is sorted."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prescope.cache.slots import sort_need, take_slots
from tests.support.slot_arrays import arrays


@st.composite
def tables(draw):
    L, E = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    S = draw(st.integers(1, L * E))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    key_of = rng.permutation(L * E)[:S]
    key_of[rng.random(S) < 0.3] = -1
    slot_of = np.full(L * E, -1)
    slot_of[key_of[key_of >= 0]] = np.flatnonzero(key_of >= 0)
    absent = rng.permutation(np.flatnonzero(slot_of < 0))
    keys = absent[: draw(st.integers(0, len(absent)))]
    fixed = rng.random(S) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    keep = rng.permutation(L * E)[: draw(st.integers(0, L * E))]
    scores = rng.integers(-4, 4, L * E).astype(np.float64)  # ties are common
    return keys, key_of, slot_of, fixed, keep, scores


def taken_by_sorting(keys, key_of, slot_of, fixed, keep, scores):
    kept = {int(slot_of[key]) for key in keep if slot_of[key] >= 0}
    rank = [
        (s in kept, -np.inf if key_of[s] < 0 else scores[key_of[s]], s)
        for s in range(len(key_of))
        if not fixed[s]
    ]
    return [slot for _, _, slot in sorted(rank)][: len(keys)]


@settings(max_examples=300, deadline=None)
@given(tables())
def test_slots_are_taken_as_sorting_them_would(table):
    keys, key_of, slot_of, fixed, keep, scores = table
    expected = taken_by_sorting(*table)
    before = key_of.copy()
    slots = take_slots(keys, fixed, keep, arrays(slot_of, key_of, scores))
    assert slots.tolist() == expected
    assert not fixed[slots].any(), "a fixed slot was given up"
    assert (key_of[slots] == keys[: len(slots)]).all() and (slot_of[keys[: len(slots)]] == slots).all()
    untouched = np.setdiff1d(np.arange(len(key_of)), slots)
    assert (key_of[untouched] == before[untouched]).all()
    owned = np.flatnonzero(key_of >= 0)
    assert (slot_of[key_of[owned]] == owned).all() and (slot_of >= 0).sum() == len(owned)


@settings(max_examples=100, deadline=None)
@given(tables())
def test_what_is_kept_goes_only_when_there_is_nothing_else(table):
    keys, key_of, slot_of, fixed, keep, scores = table
    kept = np.zeros(len(key_of), dtype=bool)
    kept[slot_of[keep][slot_of[keep] >= 0]] = True
    slots = take_slots(keys, fixed, keep, arrays(slot_of, key_of, scores))
    if kept[slots].any():
        assert np.isin(np.flatnonzero(~fixed & ~kept), slots).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_need_is_sorted_by_where_then_by_tokens(data):
    E = data.draw(st.integers(1, 12))
    experts = np.array(sorted(data.draw(st.sets(st.integers(0, E - 1), min_size=1))), dtype=np.int64)
    n = len(experts)
    tokens = np.array(data.draw(st.lists(st.integers(1, 3), min_size=n, max_size=n)), dtype=np.int64)
    slots = np.array(data.draw(st.lists(st.integers(-1, 5), min_size=n, max_size=n)), dtype=np.int64)
    in_flight = np.array(data.draw(st.lists(st.booleans(), min_size=6, max_size=6)))
    need = sort_need(experts, tokens, slots, in_flight)
    where = np.where(slots < 0, 2, in_flight[slots].astype(int))
    order = np.lexsort((experts, -tokens, where))
    assert need.experts.tolist() == experts[order].tolist() and need.tokens.tolist() == tokens[order].tolist()
    assert (need.num_hits, need.num_late) == ((where == 0).sum(), (where == 1).sum())

"""Evicting by the layers' bounds gives up the slots that looking at all of them would, in the same order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prescope.cache.policies import CHANGES_ALL, POLICIES, make_policy
from prescope.cache.prefetch import Waiting, next_prefetch, want
from prescope.cache.residency import ResidencyTable
from prescope.cache.slots import bounds_of, renew_bound, slots_to_give, take_slots
from prescope.core.types import MoEShape

SHAPE = MoEShape(num_layers=4, num_experts=9, top_k=2)
NAMES = sorted(name for name, policy in POLICIES.items() if policy.kind not in CHANGES_ALL)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, SHAPE.total_experts))
def test_the_same_slots_are_given_up_whatever_came_before(name, seed, num_slots):
    """Two tables side by side, one with bounds: needs, copies on demand, prefetches, with slots fixed and kept."""
    rng = np.random.default_rng(seed)
    frequencies = rng.random((SHAPE.num_layers, SHAPE.num_experts))
    plain, bounded = (
        ResidencyTable(SHAPE, num_slots, make_policy(name, SHAPE, frequencies)) for _ in range(2)
    )
    slots = bounded.arrays._replace(lowest=bounds_of(bounded.arrays, SHAPE.num_layers))
    for _ in range(30):
        layer = int(rng.integers(SHAPE.num_layers))
        experts = np.sort(rng.permutation(SHAPE.num_experts)[: rng.integers(1, min(num_slots, 5) + 1)])
        tokens = rng.integers(1, 4, len(experts))
        needs = [table.need(layer, experts, tokens, tokens.astype(float)) for table in (plain, bounded)]
        renew_bound(slots, layer)
        load = needs[0].experts[needs[0].num_hits + needs[0].num_late :]
        keys = layer * SHAPE.num_experts + load
        fixed = np.zeros(num_slots, dtype=bool)
        fixed[plain.slots_for(layer, needs[0].experts[: needs[0].num_hits])] = True
        keep = rng.permutation(SHAPE.total_experts)[: rng.integers(0, 12)]
        count = int(rng.integers(0, num_slots + 1))
        assert slots_to_give(count, fixed, keep, slots).tolist() == (
            slots_to_give(count, fixed, keep, plain.arrays).tolist()
        )
        taken = [take_slots(keys, fixed, keep, arrays).tolist() for arrays in (plain.arrays, slots)]
        assert taken[0] == taken[1]
        wanted = rng.permutation(SHAPE.total_experts)[:2]
        found = []
        for arrays in (plain.arrays, slots):
            waiting = Waiting.none(SHAPE.total_experts)
            want(waiting, wanted, keep)
            found.append([next_prefetch(waiting, arrays, 0, 2) for _ in range(2)])
        assert found[0] == found[1]
        assert plain.key_of.tolist() == bounded.key_of.tolist()
        assert slots.lowest[-1] == (plain.key_of < 0).sum()
        for other in range(SHAPE.num_layers):
            held = plain.key_of[plain.key_of // SHAPE.num_experts == other]
            assert slots.lowest[other] <= plain.policy.scores[held].min(initial=np.inf)

"""What waits for the link: who is next, what a table that changes says, and how many may be on the link."""

import numpy as np
import pytest

from prescope.cache.policies import POLICIES, make_policy
from prescope.cache.prefetch import NUM_WAITING, Waiting, most_on_wire, next_prefetch, on_the_way, want
from prescope.cache.residency import ResidencyTable
from prescope.cache.slots import use_prefetched
from prescope.core.types import MoEShape

SHAPE = MoEShape(num_layers=3, num_experts=8, top_k=2, row_bytes=1024)


def table_with(*keys: int, num_slots: int = 4) -> ResidencyTable:
    table = ResidencyTable(SHAPE, num_slots, make_policy("lru", SHAPE))
    for key in keys:
        layer, expert = divmod(key, SHAPE.num_experts)
        table.landed(table.take(layer, np.array([expert])))
    return table


def waiting(*keys: int) -> Waiting:
    made = Waiting.none(SHAPE.total_experts)
    want(made, np.array(keys), np.empty(0, np.int64))
    return made


def test_what_came_by_another_way_waits_no_longer_and_all_others_still_do():
    """9 and 11 are there already; 10, 12 and 13 are copied, in this order."""
    table, left = table_with(9, 11, num_slots=8), waiting(9, 10, 11, 12, 13)
    found = [next_prefetch(left, table.arrays, 0, 2)[0] for _ in range(4)]
    assert found == [10, 12, 13, -1]


def test_a_prefetch_that_can_have_no_slot_goes_on_waiting():
    table, left = table_with(0, 1, 2, 3), waiting(9)
    table.protect(np.arange(4))
    before = table.key_of.copy()
    assert next_prefetch(left, table.arrays, 0, 2) == (-1, -1, -1)
    assert table.take_prefetch(left, 0, 2) == (-1, -1) and (table.key_of == before).all()
    table.unprotect()
    assert next_prefetch(left, table.arrays, 2, 2) == (-1, -1, -1), "the link has no room"
    assert next_prefetch(left, table.arrays, 1, 2)[0] == 9


def test_a_layers_version_tells_whether_its_row_has_changed():
    """Kernels keep copies of rows; one that is stale unnoticed computes with another expert's weights."""
    rng, table = np.random.default_rng(0), table_with(0, 8, 9, 16)
    for _ in range(200):
        rows, versions = table.slot_of.reshape(3, 8).copy(), table.versions.copy()
        if rng.random() < 0.5:
            layer = int(rng.integers(3))
            absent = np.flatnonzero(table.row(layer) < 0)[:2]
            table.landed(table.take(layer, absent))
        else:
            key, slot = table.take_prefetch(waiting(int(rng.integers(24))), 0, 2)
            table.landed(np.array([slot] if key >= 0 else [], dtype=np.int64))
        changed = (table.slot_of.reshape(3, 8) != rows).any(axis=1)
        assert (changed == (table.versions != versions)).all()


def test_a_prefetched_expert_counts_as_used_once():
    prefetched = np.array([True, True, False, True])
    assert use_prefetched(prefetched, np.array([-1, 1, 2, 3])) == 2
    assert prefetched.tolist() == [True, False, False, False]
    assert use_prefetched(prefetched, np.array([1, 3])) == 0


@pytest.mark.parametrize(
    ("row_bytes", "most"), [(64 << 10, 64), (1 << 20, 4), (9 << 20, 2), (20 << 20, 1), (352 << 20, 1)]
)
def test_a_miss_waits_for_32_mib_of_prefetches_and_small_ones_fill_the_link(row_bytes, most):
    assert most_on_wire(row_bytes, 1000) == most
    assert most_on_wire(row_bytes, 2) == 1, "one slot is left to what is needed now"


def test_the_gpu_runs_the_policies_that_its_kernel_knows():
    assert {name for name, policy in POLICIES.items() if policy.runs_on_gpu} == {"lru", "lfu", "static"}


def test_prefetches_are_numbered_in_the_order_of_their_copies():
    """Late ones land in that order, which is how long a layer waits for them."""
    slots = table_with(0, 1, 2).arrays
    for slot in (2, 0, 1, 2):
        on_the_way(slots, slot)
    assert slots.order[0] < slots.order[1] < slots.order[2] == slots.order[-1] == 4


def test_what_is_on_the_way_waits_no_longer():
    table, left = table_with(num_slots=8), waiting(9, 10)
    assert left.counts[NUM_WAITING] == 2
    for key, still in ((9, 1), (10, 0)):
        assert next_prefetch(left, table.arrays, 0, 2)[0] == key
        assert left.counts[NUM_WAITING] == still


def test_only_what_came_ahead_of_its_use_counts_as_a_used_prefetch():
    table, experts = table_with(num_slots=8), np.array([1, 2])
    table.landed(table.take(0, experts))
    table.landed(table.take(1, experts, ahead=True))
    found = [table.need(layer, experts, np.ones(2, np.int64), np.ones(2)) for layer in (0, 1, 1)]
    assert [(need.num_hits, need.num_prefetched) for need in found] == [(2, 0), (2, 2), (2, 0)]

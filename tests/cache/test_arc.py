"""ARC written as scores evicts what the published algorithm evicts; the decayed score that outlives eviction."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prescope.cache.arc import B1, B2, NOWHERE, T1, T2
from prescope.cache.policies import make_policy
from prescope.cache.residency import ResidencyTable
from prescope.core.types import MoEShape

LAYERS, EXPERTS = 3, 17  # 51 in all: lists begin behind them, at no round number
SHAPE = MoEShape(num_layers=LAYERS, num_experts=EXPERTS, top_k=2)


class Published:
    """ARC as its paper has it, one page at a time (figure 4)."""

    def __init__(self, size: int) -> None:
        self.size, self.target = size, 0.0
        self.t1, self.t2, self.b1, self.b2 = (OrderedDict() for _ in range(4))

    def replace(self, is_in_b2: bool) -> None:
        longer = len(self.t1) > self.target or (is_in_b2 and len(self.t1) == self.target)
        source, ghosts = (self.t1, self.b1) if self.t1 and longer else (self.t2, self.b2)
        page, _ = source.popitem(last=False)
        ghosts[page] = None

    def ask(self, page: int) -> bool:
        """Whether it was there."""
        t1, t2, b1, b2 = self.t1, self.t2, self.b1, self.b2
        for there in (t1, t2):
            if page in there:
                del there[page]
                t2[page] = None
                return True
        if page in b1:
            self.target = min(self.size, self.target + max(1.0, len(b2) / len(b1)))
            self.replace(False)
            del b1[page]
            t2[page] = None
        elif page in b2:
            self.target = max(0.0, self.target - max(1.0, len(b1) / len(b2)))
            self.replace(True)
            del b2[page]
            t2[page] = None
        else:
            if len(t1) + len(b1) == self.size:
                if len(t1) < self.size:
                    b1.popitem(last=False)
                    self.replace(False)
                else:
                    t1.popitem(last=False)
            elif (total := len(t1) + len(t2) + len(b1) + len(b2)) >= self.size:
                if total == 2 * self.size:
                    b2.popitem(last=False)
                self.replace(False)
            t1[page] = None
        return False


def ask(table: ResidencyTable, key: int) -> bool:
    """One expert, as a layer that needs no other."""
    layer, expert = divmod(key, table.shape.num_experts)
    experts = np.array([expert])
    need = table.need(layer, experts, np.ones(1, np.int64), np.ones(1))
    if need.num_misses:
        table.landed(table.take(layer, experts))
    return need.num_hits == 1


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.0, 1.0), st.sampled_from([EXPERTS, 7, 6]))
def test_it_hits_and_holds_what_the_published_algorithm_does(seed, size, looping, experts):
    """On skewed requests, on loops that do not fit, and on both in turn, where the target moves to and fro."""
    rng = np.random.default_rng(seed)
    shape = MoEShape(num_layers=LAYERS, num_experts=experts, top_k=2)
    table, published = ResidencyTable(shape, size, make_policy("arc", shape)), Published(size)
    skew = rng.dirichlet(np.full(LAYERS * experts, 0.3))
    for loop in range(200):
        key = (
            loop % min(size + 2, LAYERS * experts)
            if rng.random() < looping
            else rng.choice(LAYERS * experts, p=skew)
        )
        assert ask(table, int(key)) == published.ask(int(key))
        assert set(table.key_of[table.key_of >= 0].tolist()) == {*published.t1, *published.t2}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["arc", "shallow-arc"]), st.integers(2, 16))
def test_its_lists_stay_whole_whatever_is_asked_prefetched_or_left_to_the_cpu(seed, name, size):
    """Each key stands in one list, each list is a chain from its oldest to its newest, and ghosts are few."""
    rng = np.random.default_rng(seed)
    policy = make_policy(name, SHAPE)
    table = ResidencyTable(SHAPE, size, policy)
    N = SHAPE.total_experts
    for _ in range(60):
        layer = int(rng.integers(LAYERS))
        experts = np.sort(rng.permutation(EXPERTS)[: rng.integers(1, min(size, EXPERTS) + 1)])
        need = table.need(layer, experts, np.ones(len(experts), np.int64), np.ones(len(experts)))
        table.protect(table.slots_for(layer, need.experts[: need.num_hits]))
        copied = need.experts[need.num_hits :][: rng.integers(0, need.num_misses + 1)]  # the CPU has the rest
        table.landed(table.take(layer, copied))
        table.unprotect()
        other = int(rng.integers(LAYERS))
        absent = np.flatnonzero(table.row(other) < 0)[:1]
        table.landed(table.take(other, absent, ahead=True))
        table.check_integrity()
        stood, lengths = policy.scores[N : 2 * N], policy.scores[5 * N + 10 : 5 * N + 15]
        newer, older = policy.scores[4 * N + 5 : 5 * N + 10], policy.scores[3 * N : 4 * N + 5]
        for which in (T1, T2, B1, B2):
            chain, place = [], int(newer[N + which])
            while place < N:
                assert older[int(newer[place])] == place
                chain.append(place)
                place = int(newer[place])
            assert place == N + which and len(chain) == lengths[which] == (stood == which).sum()
        assert lengths[B1] <= size and lengths[B1] + lengths[B2] <= 2 * size
        assert (stood == NOWHERE).sum() == N - lengths[1:].sum()


def test_the_deepest_layers_go_first_where_the_first_ones_are_favoured():
    table = ResidencyTable(SHAPE, 6, make_policy("shallow-arc", SHAPE))
    second, deepest = EXPERTS, 2 * EXPERTS
    for key in (
        0,
        second,
        deepest,
        1,
        deepest + 1,
        second + 1,
        0,
        deepest,
        deepest + 1,
    ):  # the deepest's again
        ask(table, key)
    for key in (2, 3, 4):
        ask(table, key)
    held = set(table.key_of.tolist())
    assert {0, 1, 2, 3, 4} <= held and not {deepest, deepest + 1} & held


def test_after_clear_it_knows_nothing_but_its_size():
    policy = make_policy("arc", SHAPE)
    table = ResidencyTable(SHAPE, 4, policy)
    fresh = policy.scores.copy()
    for key in (0, 1, 2, 0, 9, 17, 5, 0, 2):
        ask(table, key)
    assert not np.array_equal(policy.scores, fresh)
    table.clear()
    policy.reset()
    assert np.array_equal(policy.scores, fresh) and policy.tick == 0


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_use_counts_half_after_128_tokens_in_or_out_of_a_slot(tokens):
    policy = make_policy("class-lru", SHAPE)
    other = np.array([2, 3])
    policy.use(0, np.array([1, 4]), np.array([1.0, 1.0]))
    assert policy.scores[1] == 1.0
    for _ in range(128 // tokens):
        policy.use(0, other, np.full(2, float(tokens)))
        policy.use(1, other, np.full(2, float(tokens)))  # another layer's tokens are not its own
    assert policy.scores[1] == pytest.approx(0.5)
    assert policy.scores[2] > 90

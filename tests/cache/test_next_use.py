"""The policy that knows the order of the layers."""

import numpy as np
import pytest

from prescope.cache.next_use import FIRST_EVIDENCE, LAST_STEP_DECAY, LEAST_USE, NextUse
from prescope.core.types import MoEShape


def test_next_use_evicts_the_layer_just_passed_before_the_one_that_comes():
    """All experts alike: LRU would evict those of the layer that comes next."""
    policy = NextUse(MoEShape(4, 2, 1, 1))
    experts, tokens = np.array([0, 1]), np.ones(2)
    for step in range(50):
        for layer in range(4):
            policy.use(layer, experts, tokens)
            if step == 49 and layer == 1:
                order = np.argsort(policy.scores[:8]) // 2
                assert order.tolist() == [1, 1, 0, 0, 3, 3, 2, 2]


def test_next_use_evicts_the_rarely_used_first():
    policy = NextUse(MoEShape(2, 3, 1, 1))
    for step in range(100):
        policy.use(0, np.array([0, 1]) if step % 10 == 0 else np.array([0]), np.ones(2))
        policy.use(1, np.array([2]), np.ones(1))
    assert np.argsort(policy.scores[:3]).tolist() == [2, 1, 0]
    policy.reset()
    assert not policy.scores.any() and policy.tick == 0


def test_next_use_keeps_a_newcomer_where_tokens_repeat_each_others_choice():
    """Each expert serves twenty tokens in a row: the new one's first use says more than all those of the one before."""
    policy = NextUse(MoEShape(1, 8, 1, 1))
    for step in range(121):
        policy.use(0, np.array([step // 20 % 6]), np.ones(1))
    assert policy.scores[:8].argmax() == 0


def test_next_use_gives_up_what_was_just_used_where_two_take_turns():
    policy = NextUse(MoEShape(1, 8, 1, 1))
    for step in range(121):
        policy.use(0, np.array([step % 2]), np.ones(1))
    assert policy.scores[:8].argmax() == 1


def test_slots_go_by_the_expected_next_use():
    """As the module says; p is the share of uses, mixed with the last one."""
    L, E, k = 5, 6, 3
    policy, rng = NextUse(MoEShape(L, E, k, 1)), np.random.default_rng(0)
    chance = rng.dirichlet(np.ones(E), L)
    for tick in range(1, 100 * L + 4):
        layer = (tick - 1) % L
        policy.use(layer, np.sort(rng.choice(E, k, replace=False, p=chance[layer])), np.ones(k))
    share, last, sums = np.split(policy.scores[L * E :], [L * E, 2 * L * E])
    worth = min(1.0, max(-0.3, sums[0] / (FIRST_EVIDENCE + sums[1])))
    since = (layer - np.arange(L)) % L  # layers since it was passed
    # Learned at their own layers with the worth of then, which changes by little within a step.
    p = np.maximum((1.0 - worth) * share + worth * last, LEAST_USE)
    layers_away = np.repeat(L - since, E) + L * (1.0 / p - 1.0)
    assert LAST_STEP_DECAY > 0.9 and 0.0 < abs(worth) < 1.0
    away = -policy.scores[: L * E]
    assert np.corrcoef(np.argsort(np.argsort(away)), np.argsort(np.argsort(layers_away)))[0, 1] > 0.99
    near = layers_away < 5 * L
    assert np.allclose(
        (away - away[near].min())[near], (layers_away - layers_away[near].min())[near], atol=0.7
    )


def test_before_a_run_has_shown_anything_an_expert_is_used_as_often_as_the_recorded_run_used_it():
    """Of 10 uses in a layer of top-2, one with 2 of them is used in 0.4 of the steps, one with 8 in all."""
    shape = MoEShape(num_layers=2, num_experts=4, top_k=2, row_bytes=1)
    policy = NextUse(shape, np.array([[2, 8, 0, 0], [5, 1, 3, 1]]))
    assert policy.scores[4 * 2 : 2 * 4 * 2].tolist() == pytest.approx(
        [0.4, 1.0, 0.0, 0.0, 1.0, 0.2, 0.6, 0.2]
    )


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_layer_just_passed_goes_first_whatever_the_sizes_of_steps(batch):
    """A prompt and steps of a batch that use all experts alike, behind what a recorded run of one token used: shares
    follow slowly, and a layer that has just been learned from seemed to be used more than those to come.
    """
    L, E = 6, 8
    policy = NextUse(MoEShape(L, E, 2, 1), np.ones((L, E)))
    every = np.arange(E)
    for step, tokens in enumerate([200.0 * batch, *[float(batch)] * 30]):
        for layer in range(L):
            policy.use(layer, every, np.full(E, tokens))
            if step > 0:
                by_layer = policy.scores[: L * E].reshape(L, E).max(axis=1)
                assert by_layer.argmin() == layer, f"step {step}"

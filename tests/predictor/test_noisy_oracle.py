"""Laws of the oracle that errs at a chosen rate."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prescope.errors import BadTrace, TraceMismatch, UnsupportedOption
from prescope.predictor import NoisyOracle, Oracle
from prescope.traces.synthetic import SyntheticSpec
from prescope.training import score
from prescope.training.score_sums import best_mask

SPEC = SyntheticSpec(
    num_layers=6, num_experts=32, top_k=4, zipf=1.0, persistence=0.2, correlation=0.3, diversity=0.5
)
RECALL = {1: 0.9, 2: 0.86, 4: 0.6}


@pytest.fixture(scope="module")
def trace():
    return SPEC.generate(prompt_tokens=64, new_tokens=64, batch=8)


@pytest.fixture(scope="module")
def noisy(trace):
    return NoisyOracle(trace, RECALL)


@pytest.mark.parametrize(("lookahead", "recall"), [(1, 0.9), (2, 0.86), (3, 0.73), (4, 0.6)])
def test_its_recall_is_the_one_asked_for(noisy, trace, lookahead, recall):
    """Between two lookaheads given, the line through them."""
    card = score(noisy, trace, lookaheads=[lookahead])
    assert card.recall(lookahead) == pytest.approx(recall, abs=0.02)
    assert card.recall(lookahead, double=True) >= card.recall(lookahead)


@settings(max_examples=25, deadline=None)
@given(
    recall=st.floats(0.25, 1.0), zipf=st.floats(0.0, 1.5), top_k=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_whatever_the_recall_and_the_routing(recall, zipf, top_k, seed):
    """About 2,500 guesses for each K: a standard error of at most 0.01 for K = 1, so 0.04 is four of them."""
    spec = SyntheticSpec(num_layers=6, num_experts=16, top_k=top_k, zipf=zipf)
    trace = spec.generate(prompt_tokens=64, new_tokens=32, batch=5, seed=seed)
    card = score(NoisyOracle(trace, {1: recall}, seed=seed), trace)
    assert card.recall(1) == pytest.approx(recall, abs=0.04)


@pytest.mark.parametrize("lookahead", [1, 2, 4])
def test_its_scores_are_probabilities(noisy, trace, lookahead):
    """Of the guesses, and of the experts that were not guessed."""
    card = score(noisy, trace, lookaheads=[lookahead])
    assert card.is_calibrated and card.ece(lookahead) < 0.01
    table = card.reliability(lookahead)
    table = table[table["pairs"] > 2000]
    np.testing.assert_allclose(table["probability"], table["used_frac"], atol=0.02)


def test_with_recall_one_it_is_the_oracle(trace):
    perfect, oracle = NoisyOracle(trace, {1: 1.0, 3: 1.0}), Oracle(trace.shape, 3)
    for lookahead in (1, 2, 3):
        np.testing.assert_array_equal(perfect.replay(trace, lookahead), oracle.replay(trace, lookahead))


def test_each_token_gets_k_distinct_guesses(noisy, trace):
    scores = noisy.replay(trace, 2)
    assert ((scores == np.float32(0.86)).sum(axis=-1) == trace.top_k).all()


def test_wrong_guesses_are_likely_experts(noisy, trace):
    scores, used = noisy.replay(trace, 4), Oracle(trace.shape, 4).replay(trace, 4) > 0
    wrong = best_mask(scores, trace.top_k) & ~used
    popular_LE = trace.expert_counts()[4:] > np.median(trace.expert_counts()[4:], axis=1, keepdims=True)
    assert (wrong & popular_LE).sum() > 0.6 * wrong.sum()


def test_what_is_foreseen_early_is_still_foreseen_later(noisy, trace):
    """Recall falls with the lookahead, token by token: a right guess four layers ahead is one two layers ahead too."""
    used = Oracle(trace.shape, 4).replay(trace, 4) > 0
    early = best_mask(noisy.replay(trace, 4), trace.top_k) & used
    late = best_mask(noisy.replay(trace, 2)[:, 2:], trace.top_k) & used
    assert (late | ~early).all()


def test_a_seed_gives_its_errors(trace, noisy):
    np.testing.assert_array_equal(NoisyOracle(trace, RECALL).replay(trace, 1), noisy.replay(trace, 1))
    assert (NoisyOracle(trace, RECALL, seed=1).replay(trace, 1) != noisy.replay(trace, 1)).any()


def test_live_answers_are_those_of_the_replay(noisy, trace):
    for step in (0, 7, 63):
        rows = np.flatnonzero(trace.step == step)
        noisy.set_step(step)
        for layer in (0, 3, 5):
            predictions = noisy.predict(layer, torch.zeros(len(rows), 2))
            assert [p.moe_layer for p in predictions] == list(range(layer + 1, min(layer + 4, 5) + 1))
            for p in predictions:
                assert p.lookahead == p.moe_layer - layer
                replayed = noisy.replay(trace, p.lookahead)[rows, layer]
                np.testing.assert_array_equal(p.scores_TE.numpy(), replayed)


def test_live_it_must_know_the_step(trace):
    noisy = NoisyOracle(trace, RECALL)
    with pytest.raises(BadTrace, match="set_step"):
        noisy.predict(0, torch.zeros(8, 2))
    with pytest.raises(BadTrace, match="no step 999"):
        noisy.set_step(999)
    noisy.set_step(1)
    with pytest.raises(BadTrace, match="has 8 tokens, predict was given 7"):
        noisy.predict(0, torch.zeros(7, 2))


def test_its_name_says_that_it_is_none(noisy, trace):
    assert noisy.name == "oracle with recall 0.90 / 0.86 / 0.60 at 1 / 2 / 4 (emulated predictor)"
    assert NoisyOracle(trace, {1: 0.9}).name == "oracle with recall 0.90 (emulated predictor)"


def test_it_knows_its_own_trace_only(noisy, trace):
    with pytest.raises(TraceMismatch, match="and no other"):
        noisy.replay(SPEC.generate(prompt_tokens=64, new_tokens=64, batch=8, seed=1), 1)
    noisy.replay(replace(trace, model="the same under another name"), 1)


@pytest.mark.parametrize(
    ("recall", "says"),
    [
        ({}, "recall is {}"),
        ({0: 0.9}, "there are 1 to 5"),
        ({6: 0.9}, "there are 1 to 5"),
        ({1: 1.1}, "recall 1.1 at lookahead 1"),
        ({1: 0.1}, "choose chance, 0.125, to 1"),
    ],
)
def test_a_recall_nobody_can_have_is_refused(recall, says, trace):
    with pytest.raises(UnsupportedOption, match=says):
        NoisyOracle(trace, recall)


def test_tokens_that_used_fewer_experts_get_fewer_guesses(trace):
    ids = trace.expert_ids.copy()
    ids[:, :, 3] = -1
    ids[5] = -1
    fewer = replace(trace, expert_ids=ids)
    scores = NoisyOracle(fewer, {1: 0.8}).replay(fewer, 1)
    guessed = (scores == np.float32(0.8)).sum(axis=-1)
    assert (guessed[5] == 0).all() and (np.delete(guessed, 5, axis=0) == 3).all()


def test_where_most_experts_are_used_there_may_be_too_few_wrong_ones():
    """4 experts of which 3 are used leave one to guess wrongly."""
    trace = SyntheticSpec(num_layers=3, num_experts=4, top_k=3).generate(batch=16)
    assert score(NoisyOracle(trace, {1: 0.9}), trace).recall(1) == pytest.approx(0.9, abs=0.03)
    with pytest.raises(UnsupportedOption, match=r"choose chance, 0\.750, to 1"):
        NoisyOracle(trace, {1: 0.7})

"""Adversarial traces do what they claim."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prescope.core.types import MoEShape
from prescope.errors import UnsupportedOption
from prescope.predictor import Frequency, PreviousToken, Transition
from prescope.traces.bounds import belady_misses
from prescope.traces.synthetic import ADVERSARIAL, adversarial, habits_of, lru_hit_rate
from prescope.training import score

SHAPE = {"num_layers": 4, "num_experts": 16, "top_k": 2}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_every_kind_is_a_trace_and_says_its_name(name):
    trace = adversarial(name, **SHAPE, prompt_tokens=3, new_tokens=4, batch=2)
    assert len(trace) == 2 * (3 + 3) and trace.steps == [0, 1, 2, 3]
    assert "synthetic" in trace.model and f"adversarial: {name}" in trace.model
    assert (np.diff(np.sort(trace.expert_ids, axis=-1), axis=-1) > 0).all()
    again = adversarial(name, **SHAPE, prompt_tokens=3, new_tokens=4, batch=2)
    np.testing.assert_array_equal(trace.expert_ids, again.expert_ids)


@settings(max_examples=40, deadline=None)
@given(layers=st.integers(1, 5), experts=st.integers(2, 12), batch=st.integers(1, 3), data=st.data())
def test_lru_never_hits_a_cycle(layers, experts, batch, data):
    """With as many slots as the description allows, whether or not K divides E."""
    top_k = data.draw(st.integers(1, experts - 1))
    slots = (layers * (experts // top_k) - 1) * top_k
    if slots < 1:
        return
    trace = adversarial(
        "cyclic",
        num_layers=layers,
        num_experts=experts,
        top_k=top_k,
        prompt_tokens=3,
        new_tokens=40,
        batch=batch,
    )
    assert lru_hit_rate(trace, slots / (layers * experts)) == 0.0


def test_a_cycle_could_be_cached():
    """What hurts is the policy: with half of the experts in slots the best possible policy hits nearly half."""
    trace = adversarial("cyclic", **SHAPE, new_tokens=64)
    bound = belady_misses(trace, 32)
    assert bound.misses_decode < 0.6 * bound.needed_decode


def test_after_the_flip_what_was_learnt_is_wrong():
    trace = adversarial("flip", **SHAPE, batch=8)
    half = (int(trace.position.max()) + 1) // 2
    before, after = trace.take(trace.position < half), trace.take(trace.position >= half)
    learnt = Frequency(before, 1)
    assert score(learnt, before).recall(1) > 0.35
    assert score(learnt, after).recall(1) < 0.5 * 2 / 16
    counts = before.expert_counts()
    static = np.argsort(-counts, axis=1)[:, :4]  # the best fixed quarter
    served = [np.take_along_axis(c, static, axis=1).sum() / c.sum() for c in (counts, after.expert_counts())]
    assert served[0] > 0.6 and served[1] < 0.15


def test_uniform_routing_has_no_habits():
    trace = adversarial("uniform", **SHAPE, new_tokens=256)
    assert lru_hit_rate(trace, 0.5) == pytest.approx(0.5, abs=0.06)
    found = habits_of(adversarial("uniform", **SHAPE, new_tokens=64, batch=16))
    assert tuple(found.overlaps) == pytest.approx((2 / 16,) * 3, abs=0.01)
    learnt_on, judged_on = (adversarial("uniform", **SHAPE, batch=16, seed=s) for s in (0, 1))
    for predictor in (
        Frequency(learnt_on, 1),
        Transition(learnt_on, 1),
        PreviousToken(MoEShape(4, 16, 2), 1),
    ):
        assert score(predictor, judged_on).recall(1) == pytest.approx(2 / 16, abs=0.02)


def test_hot_routing_needs_nothing_after_the_first_step():
    trace = adversarial("hot", **SHAPE, batch=8)
    assert all(len(need.experts) == 2 for step in trace.steps for need in trace.needed(step))
    assert lru_hit_rate(trace, 2 / 16) == 1.0


@pytest.mark.parametrize("batch", [1, 4, 8, 13])
def test_disjoint_tokens_need_as_many_experts_as_there_can_be(batch):
    trace = adversarial("disjoint", **SHAPE, prompt_tokens=2, new_tokens=8, batch=batch)
    for step in trace.steps:
        tokens = batch * (2 if step == 0 else 1)
        for need in trace.needed(step):
            assert len(need.experts) == min(tokens * 2, 16)
            assert need.tokens.max() - need.tokens.min() <= 1


def test_an_unknown_kind_is_answered_with_the_known_ones():
    with pytest.raises(UnsupportedOption, match="cyclic, flip, uniform, hot, disjoint"):
        adversarial("mean", **SHAPE)
    with pytest.raises(UnsupportedOption, match="top_k is 17"):
        adversarial("hot", num_layers=4, num_experts=16, top_k=17)

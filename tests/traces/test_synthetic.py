"""Laws of made-up traces: they look like an engine's, each habit does what it says, and a fit finds habits again."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prescope.cache.policies import LRU
from prescope.cache.residency import ResidencyTable
from prescope.core.types import MoEShape
from prescope.errors import BadTrace, TraceMismatch, UnsupportedOption
from prescope.predictor import Frequency, Transition
from prescope.traces import synthetic
from prescope.traces.routing import RoutingTrace
from prescope.traces.synthetic import SyntheticSpec, habits_of, lru_hit_rate
from prescope.traces.synthetic.drawing import draw_ranks, popularity_of_ranks
from prescope.training import score
from tests.support.speed import assert_within, taken_ms

SMALL = SyntheticSpec(num_layers=4, num_experts=16, top_k=2)


def made(batch: int = 8, **habits: float) -> RoutingTrace:
    return replace(SMALL, **habits).generate(prompt_tokens=64, new_tokens=64, batch=batch, seed=3)


@st.composite
def specs(draw):
    experts = draw(st.integers(1, 24))
    share = st.floats(0.0, 1.0)
    return SyntheticSpec(
        num_layers=draw(st.integers(1, 6)),
        num_experts=experts,
        top_k=draw(st.integers(1, experts)),
        zipf=draw(st.floats(0.0, 8.0)),
        persistence=draw(share),
        correlation=draw(share),
        diversity=draw(share),
        seed=draw(st.integers(0, 3)),
    )


@settings(max_examples=60, deadline=None)
@given(
    spec=specs(),
    prompt=st.integers(1, 6),
    new=st.integers(1, 5),
    batch=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_a_made_trace_has_the_form_of_a_recorded_one(spec, prompt, new, batch, seed):
    """A prefill step over all prompts, sequence by sequence, then a row for each sequence and step; K distinct ids."""
    trace = spec.generate(prompt_tokens=prompt, new_tokens=new, batch=batch, seed=seed)
    assert len(trace) == batch * (prompt + new - 1)
    assert trace.steps == list(range(new))
    prefill, decode = trace.select(phase="prefill"), trace.select(phase="decode")
    assert prefill.sequence.tolist() == [s for s in range(batch) for _ in range(prompt)]
    assert prefill.position.tolist() == list(range(prompt)) * batch
    assert decode.sequence.tolist() == list(range(batch)) * (new - 1)
    assert decode.position.tolist() == [prompt + i for i in range(new - 1) for _ in range(batch)]
    ids = np.sort(trace.expert_ids, axis=-1)
    assert (np.diff(ids, axis=-1) > 0).all() and ids.min() >= 0 and ids.max() < spec.num_experts
    np.testing.assert_allclose(trace.weights.sum(-1), 1.0, atol=1e-5)
    assert (trace.weights > 0).all() and (np.diff(trace.weights, axis=-1) <= 0).all()


def test_a_seed_gives_its_trace_and_another_one_another():
    first, again = (SMALL.generate(seed=1) for _ in range(2))
    np.testing.assert_array_equal(first.expert_ids, again.expert_ids)
    np.testing.assert_array_equal(first.weights, again.weights)
    assert (first.expert_ids != SMALL.generate(seed=2).expert_ids).any()


def test_traces_of_one_spec_are_of_one_model_and_say_so():
    """They share fingerprint and popular experts, so a table learnt on one serves the other."""
    trace, other = (replace(SMALL, zipf=1.5).generate(batch=8, seed=seed) for seed in (1, 2))
    RoutingTrace.concat([trace, other])
    assert score(Frequency(trace, 1), other).recall(1) > 0.3
    foreign = replace(SMALL, zipf=1.5, seed=1).generate(batch=8, seed=1)
    assert foreign.fingerprint != trace.fingerprint
    assert score(Frequency(foreign, 1), other.take(other.position >= 0)).recall(1) < 0.3
    assert "synthetic" in trace.model and "Zipf 1.50" in trace.model
    assert trace.versions["synthetic"].startswith("no model was run")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_experts": 2**15}, "num_experts is 32768"),
        ({"top_k": 17}, "1 to num_experts = 16"),
        ({"zipf": -0.1}, "zipf is -0.1"),
        ({"zipf": float("nan")}, "zipf is nan"),
        ({"persistence": 1.1}, "persistence is 1.1; choose 0 to 1"),
        ({"correlation": -1.0}, "correlation is -1.0"),
        ({"diversity": 2.0}, "diversity is 2.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_habit_outside_its_range_is_named(change, says):
    with pytest.raises(UnsupportedOption, match=says):
        replace(SMALL, **change)


def test_a_run_without_tokens_is_refused():
    for wrong in ({"prompt_tokens": 0}, {"new_tokens": 0}, {"batch": 0}):
        with pytest.raises(UnsupportedOption, match=f"{next(iter(wrong))} is 0"):
            SMALL.generate(**wrong)


def test_zipf_makes_experts_popular_and_the_slots_hit():
    flat, skewed = made(batch=1, zipf=0.0), made(batch=1, zipf=1.5)
    assert habits_of(flat).popularity_E[:4].sum() < 0.35 < 0.6 < habits_of(skewed).popularity_E[:4].sum()
    assert lru_hit_rate(skewed, 0.25) > lru_hit_rate(flat, 0.25) + 0.2


def test_the_popularity_of_a_layer_does_not_depend_on_the_layer_before():
    """Were a successor less popular than whom it follows, popularity would fade from layer to layer."""
    alone, chained = (made(batch=16, zipf=1.2, correlation=c) for c in (0.0, 0.9))
    for trace in (alone, chained):
        counts = -np.sort(-trace.expert_counts(), axis=1) / (len(trace) * 2)
        assert counts[:, :4].sum(1).std() < 0.02
    np.testing.assert_allclose(habits_of(alone).popularity_E, habits_of(chained).popularity_E, atol=0.02)


@pytest.mark.parametrize("persistence", [0.0, 0.3, 0.8])
def test_persistence_is_the_probability_to_be_used_again(persistence):
    """Popularity comes on top: an expert that was not kept may be drawn again. Uniform popularity, so K / E at most."""
    found = habits_of(made(batch=16, zipf=0.0, persistence=persistence)).overlaps
    chance = SMALL.top_k / SMALL.num_experts
    assert persistence - 0.02 < found.next < persistence + (1 - persistence) * chance + 0.02
    assert found.others == pytest.approx(chance, abs=0.01)


def test_persistence_makes_the_slots_hit():
    rates = [lru_hit_rate(made(batch=1, zipf=0.5, persistence=p), 0.25) for p in (0.0, 0.4, 0.8)]
    assert rates[0] + 0.1 < rates[1] < rates[2] - 0.1


def test_at_persistence_one_every_token_is_the_first_one_again():
    trace = made(batch=2, persistence=1.0)
    for sequence in (0, 1):
        ids = np.sort(trace.expert_ids[trace.sequence == sequence], axis=-1)
        assert (ids == ids[0]).all()


def test_correlation_lets_transitions_foresee_the_next_layer():
    recalls = [score(Transition(t, 1), t).recall(1) for t in (made(correlation=c) for c in (0.0, 0.4, 0.8))]
    assert recalls[0] + 0.1 < recalls[1] < recalls[2] - 0.1


def test_at_correlation_one_a_layer_tells_the_next_exactly():
    trace = made(correlation=1.0)
    assert score(Transition(trace, 1), trace).recall(1) > 0.99


def test_diversity_gives_each_sequence_its_own_favourites():
    """What tokens of one sequence share stays; what they share with other sequences goes."""
    common, own = (habits_of(made(zipf=1.2, diversity=d)).overlaps for d in (0.0, 1.0))
    assert own.sequence == pytest.approx(common.sequence, abs=0.02)
    assert common.others == pytest.approx(common.sequence, abs=0.02)
    assert own.others < common.others - 0.1


def test_without_diversity_popularity_is_zipf():
    popularity_SE = popularity_of_ranks(8, 1.0, 0.0, 2, np.random.default_rng(0))
    np.testing.assert_allclose(popularity_SE, np.tile(1.0 / np.arange(1, 9), (2, 1)), rtol=1e-6)


def test_one_expert_of_each_token_is_drawn_by_its_popularity():
    """K = 1 has a known law; 40,000 draws, so a share is 0.01 off once in 10^4 seeds, and this one is fixed."""
    popularity_SE = np.array([[8.0, 4.0, 2.0, 2.0]], dtype=np.float32)
    ranks = draw_ranks(popularity_SE, 1, 40_000, 1, 0.0, 0.0, np.random.default_rng(0))
    shares = np.bincount(ranks.ravel(), minlength=4) / 40_000
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.125, 0.125], atol=0.01)


@pytest.mark.parametrize("zipf", [0.3, 1.0, 2.0])
def test_lru_hits_are_those_of_the_residency_table(zipf):
    """The engine's own table with its LRU, each layer's experts looked up together."""
    trace = made(batch=2, zipf=zipf, persistence=0.2)
    shape = MoEShape(trace.num_layers, trace.num_experts, trace.top_k, 1)
    table = ResidencyTable(shape, 32, LRU(shape))
    hits = needed = 0
    for step in trace.steps:
        for need in trace.needed(step):
            found = table.need(need.moe_layer, need.experts, need.tokens, np.zeros(len(need.experts)))
            here = table.slots_for(need.moe_layer, need.experts)
            table.protect(here[here >= 0])
            missing = found.experts[found.num_hits :]
            table.landed(table.take(need.moe_layer, missing))
            table.unprotect()
            if step:
                hits, needed = hits + found.num_hits, needed + len(need.experts)
    assert lru_hit_rate(trace, 0.5) == pytest.approx(hits / needed, abs=1e-12)


def test_lru_needs_a_share_of_slots():
    with pytest.raises(UnsupportedOption, match="slots_frac is 0"):
        lru_hit_rate(made(), 0.0)
    assert np.isnan(lru_hit_rate(made().select(phase="prefill"), 0.5))


def test_a_trace_like_another_has_its_rows(trace_with_padding):
    like = SMALL.like(trace_with_padding, seed=1)
    for name in ("step", "sequence", "position", "phase"):
        np.testing.assert_array_equal(getattr(like, name), getattr(trace_with_padding, name))
    assert like.prompts == trace_with_padding.prompts
    with pytest.raises(TraceMismatch, match=r"with_shape\(4, 16, 2\)"):
        SMALL.with_shape(4, 16, 3).like(trace_with_padding)


@pytest.fixture
def trace_with_padding():
    """Two runs, one of which starts with padding in one sequence, as left-padded prompts do."""
    trace = RoutingTrace.concat([SMALL.generate(batch=3, new_tokens=5), SMALL.generate(batch=1, seed=1)])
    position = trace.position.copy()
    position[(trace.sequence == 1)] -= 4
    return replace(trace, position=np.maximum(position, -1))


def test_padding_is_nobodys_habit(trace_with_padding):
    ids = trace_with_padding.expert_ids.copy()
    ids[trace_with_padding.position < 0] = [0, 1]
    changed, before = (
        habits_of(t) for t in (replace(trace_with_padding, expert_ids=ids), trace_with_padding)
    )
    assert changed.overlaps == before.overlaps
    assert changed.transition_recall == before.transition_recall


@pytest.mark.parametrize(
    "habits",
    [
        {"zipf": 0.8, "persistence": 0.3, "correlation": 0.4, "diversity": 0.0},
        {"zipf": 1.2, "persistence": 0.0, "correlation": 0.2, "diversity": 0.6},
        {"zipf": 0.5, "persistence": 0.5, "correlation": 0.1, "diversity": 0.3},
    ],
)
def test_a_fit_finds_the_habits_again(habits):
    """From 16 sequences of 127 tokens; errors allowed are 1.5 to 3 times the largest seen over 6 seeds:
    0.01, 0.005, 0.024 and 0.15. Diversity shows in differences between sequences, and 16 are few.
    """
    fit = synthetic.fit(made(batch=16, **habits))
    assert fit.spec.zipf == pytest.approx(habits["zipf"], abs=0.03)
    assert fit.spec.persistence == pytest.approx(habits["persistence"], abs=0.015)
    assert fit.spec.correlation == pytest.approx(habits["correlation"], abs=0.05)
    assert fit.spec.diversity == pytest.approx(habits["diversity"], abs=0.22)
    assert max(abs(error) for error in fit.errors.values()) < 0.08


def test_a_fit_says_what_it_missed_and_what_it_could_not_know():
    trace = made(batch=1, zipf=1.0, persistence=0.2)
    fit = synthetic.fit(trace, max_tokens=64)
    text = str(fit)
    assert "LRU hits, 25 % slots" in text and "recorded" in text and str(fit.spec) in text
    assert "one sequence only" in text and fit.spec.diversity == 0.0
    assert np.isnan(fit.errors["overlap, others"])
    assert fit.errors["LRU hits, 50 % slots"] == pytest.approx(0.0, abs=0.1)
    assert "no decode steps" in str(synthetic.fit(trace.select(phase="prefill")))


def test_a_trace_that_shows_no_habit_is_refused():
    trace = made(batch=4)
    with pytest.raises(BadTrace, match="no two tokens of one sequence"):
        synthetic.fit(trace.take(trace.position == 0))
    with pytest.raises(BadTrace, match="no token that used an expert"):
        habits_of(replace(trace, expert_ids=np.full_like(trace.expert_ids, -1)))
    with pytest.raises(UnsupportedOption, match="max_tokens is 1"):
        synthetic.fit(trace, max_tokens=1)


def test_habits_are_carried_to_another_shape():
    spec = replace(SMALL, zipf=0.9, persistence=0.3, diversity=0.5)
    large = spec.with_shape(16, 64, 8)
    assert (large.num_layers, large.num_experts, large.top_k) == (16, 64, 8)
    assert replace(large, num_layers=4, num_experts=16, top_k=2) == spec
    small, wide = (habits_of(s.generate(batch=4)).popularity_E for s in (spec, large))
    assert small[:4].sum() == pytest.approx(wide[:16].sum(), abs=0.1)


def test_a_large_trace_is_made_in_seconds():
    """128 tokens, 48 layers, 128 experts, batch 64: 0.9 s on one core."""
    spec = SMALL.with_shape(48, 128, 8)
    made = []
    assert_within(
        3000.0,
        lambda: taken_ms(lambda: made.append(spec.generate(prompt_tokens=64, new_tokens=64, batch=64))),
    )
    assert len(made[0]) == 64 * 127

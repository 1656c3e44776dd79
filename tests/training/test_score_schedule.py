"""Laws of what a prediction is worth to a cache and a schedule."""

import numpy as np
import pytest

from prescope.errors import TraceMismatch, UnsupportedOption
from prescope.predictor import Chance, NoisyOracle, Oracle
from prescope.simulator import as_decode
from prescope.traces.bounds import belady_misses
from prescope.traces.routing import used_mask
from prescope.training import schedule_cards
from prescope.training.misses import absent_pairs
from tests.training.test_score_card import COSTS, EXPERTS, LAYERS, LENGTH, PROMPTS, SHAPE, TOP_K, made_trace

BYTES = 1000


@pytest.fixture(scope="module")
def trace():
    return made_trace()


def cards_of(predictor, trace, **settings):
    return schedule_cards(predictor, trace, COSTS, row_bytes=BYTES, **settings)


def test_an_oracle_foresees_every_miss_and_wastes_next_to_nothing(trace):
    """At an eighth of the experts a layer has one slot, of two that each token needs."""
    assert cards_of(Oracle(SHAPE, 2), trace, slots=[0.125])[0].value("recall_at_slots").value == 0.5
    for card in cards_of(Oracle(SHAPE, 2), trace, slots=[0.25, 0.5]):
        assert card.value("coverage") == card.value("recall_at_slots") == (1.0, 1.0, 1.0)
        useful, wasted = card.value("useful_bytes").value, card.value("wasted_bytes").value
        assert useful > 0 and wasted < 0.05 * useful
        assert card.gain().low > 0
        assert card.value("stall_us").value < card.value("stall_without_us").value
        assert card.value("lost_us").value < card.value("lost_without_us").value


def test_chance_is_below_the_threshold_and_changes_nothing(trace):
    """Its probability is that of any expert, 1/6; PreSched asks for 0.2."""
    for card in cards_of(Chance(SHAPE, 2), trace):
        assert card.value("coverage").value == card.value("wasted_bytes").value == 0.0
        assert card.value("recall_at_slots").value == pytest.approx(
            card.num_slots // LAYERS / EXPERTS, abs=0.03
        )
        assert card.gain() == (0.0, 0.0, 0.0)


def test_more_recall_covers_more_misses_and_is_faster(trace):
    steps = as_decode(trace)
    found = [
        cards_of(NoisyOracle(steps, {1: recall, 2: recall}), steps, slots=[0.5])[0] for recall in (0.5, 0.9)
    ]
    assert found[0].value("coverage").value < found[1].value("coverage").value
    assert found[1].gain(found[0]).low > 0
    assert found[1].gain(found[0]).value == pytest.approx(
        found[1].value("tokens_per_s").value / found[0].value("tokens_per_s").value - 1
    )


def test_stalls_and_bytes_are_those_of_all_tokens(trace):
    """Without predictions a layer waits for exactly its cache's misses, one copy each."""
    card = cards_of(Chance(SHAPE, 2), trace, slots=[0.5])[0]
    tokens = (trace.position >= 0).sum()
    missed = card.sums["missed"].sum()
    assert missed < card.sums["needed"].sum() == TOP_K * tokens * (LAYERS - 1)
    all_missed = (absent_pairs(trace, slots=0.5) & used_mask(trace.expert_ids, EXPERTS)).sum()
    assert card.value("stall_without_us").value == pytest.approx(all_missed * COSTS.link_us / tokens / LAYERS)
    assert card.value("lost_without_us").value == pytest.approx(card.value("stall_without_us").value)


def test_units_are_prompts_and_groups_of_them(trace):
    one, four = (cards_of(Oracle(SHAPE, 1), trace, slots=[0.5], batch=b)[0] for b in (1, 4))
    assert len(one.domains) == PROMPTS and set(one.domains) == {"odd", "even"}
    assert len(four.domains) == PROMPTS / 4 and set(four.domains) == {"mixed"}
    assert one.sums["tokens"].sum() == four.sums["tokens"].sum() == PROMPTS * LENGTH - 4
    parts = [one.value("useful_bytes", domain=name).value for name in ("odd", "even")]
    assert min(parts) < one.value("useful_bytes").value < max(parts)
    with pytest.raises(TraceMismatch, match="different traces or settings"):
        one.gain(four)
    with pytest.raises(UnsupportedOption, match="poetry"):
        one.value("coverage", domain="poetry")
    with pytest.raises(UnsupportedOption, match="choose 1 to"):
        cards_of(Oracle(SHAPE, 1), trace, lookahead=2)


def test_absent_experts_are_the_cache_s_misses(trace):
    used = used_mask(trace.expert_ids, EXPERTS)
    absent = absent_pairs(trace, slots=0.5, cache="lru")
    misses = [(absent_pairs(trace, slots=s, cache="lru") & used).sum() for s in (0.25, 0.5, 0.75, 1.0)]
    assert misses == sorted(misses, reverse=True)
    assert misses[-1] == len(
        np.unique(used.nonzero()[1] * EXPERTS + used.nonzero()[2])
    )  # the first use of each
    assert misses[1] >= belady_misses(as_decode(trace), LAYERS * EXPERTS // 2).misses_decode
    assert not absent[trace.position < 0].any()
    assert absent[~used].any() and not absent[~used].all()

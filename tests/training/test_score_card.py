"""Laws of the score card, of the failure studies and of what a predictor is worth."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from prescope.core.types import MoEShape
from prescope.errors import BadTrace, TraceMismatch, UnsupportedOption
from prescope.predictor import Chance, Frequency, Oracle, PreviousToken, Transition
from prescope.scheduler.costs import LayerCosts
from prescope.traces.routing import RoutingTrace
from prescope.training import (
    Inverted,
    adversarial_trace,
    difference,
    joined_stream,
    random_predictor,
    rows_of,
    savings,
    schedule_cards,
    score,
    train,
    train_on_trace,
    train_predictor,
)
from prescope.training.savings import some_prompts

LAYERS, EXPERTS, TOP_K, PROMPTS, LENGTH = 4, 12, 2, 20, 48
SHAPE = MoEShape(LAYERS, EXPERTS, TOP_K)
COSTS = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=150.0, source="by hand")


def made_trace(seed: int = 0) -> RoutingTrace:
    """Two domains that prefer different experts; the experts of a layer tell those of the next."""
    rng = np.random.default_rng(seed)
    R = PROMPTS * LENGTH
    sequence = np.repeat(np.arange(PROMPTS), LENGTH)
    first = (rng.zipf(1.6, R) + 5 * (sequence % 2)) % EXPERTS
    steps = rng.integers(0, 3, (R, LAYERS)).cumsum(axis=1)
    ids = (first[:, None] + steps)[:, :, None] + np.array([0, 1])
    position = np.tile(np.arange(LENGTH), PROMPTS)
    position[sequence == 3] -= 4
    return RoutingTrace(
        expert_ids=(ids % EXPERTS).astype(np.int64),
        weights=np.full(ids.shape, 0.5, dtype=np.float32),
        step=np.zeros(R, dtype=np.int64),
        sequence=sequence,
        position=np.maximum(position, -1),
        phase=np.zeros(R, dtype=np.int64),
        model="made",
        fingerprint="made",
        num_experts=EXPERTS,
        top_k=TOP_K,
        decoder_layers=list(range(LAYERS)),
        prompts=[{"domain": "odd" if i % 2 else "even"} for i in range(PROMPTS)],
    )


@pytest.fixture(scope="module")
def trace():
    return made_trace()


def everyone(trace):
    return [
        Frequency(trace, 2),
        PreviousToken(SHAPE, 2),
        Transition(trace, 2),
        Chance(SHAPE, 2),
        Oracle(SHAPE, 2),
    ]


def test_the_oracle_scores_one_everywhere(trace):
    card = score(Oracle(SHAPE, 3), trace)
    for ahead in card.lookaheads:
        assert card.recall(ahead) == card.recall(ahead, double=True) == card.hot(ahead) == 1.0
        assert card.count_error_frac(ahead) == card.ece(ahead) == 0.0
    frame = card.to_frame()
    assert (frame[["recall", "precision", "recall_double", "hot"]] == 1.0).all().all()
    assert set(frame["domain"]) == {"odd", "even"}


@pytest.mark.parametrize("unused", [0, 2, LAYERS - 1])
def test_a_layer_that_no_token_uses_says_nothing(trace, unused):
    """Traces of other programs have rows for dense layers: the oracle's recall over all layers was below 1."""
    ids = trace.expert_ids.copy()
    ids[:, unused] = -1
    # One domain does not use another layer either: its own mean leaves that out too.
    of_odd = np.flatnonzero(trace.sequence % 2)
    ids[of_odd, 1] = -1
    partly = replace(trace, expert_ids=ids)
    card = score(Oracle(SHAPE, 2), partly)
    for domain in (None, "odd", "even"):
        for ahead in (1, 2):
            assert card.recall(ahead, domain=domain) == card.exact_frac(ahead, domain=domain) == 1.0
            assert card.recall_interval(ahead, domain=domain) == (1.0, 1.0, 1.0)
    frequency = score(Frequency(trace, 1), partly)
    known = [recall for recall in frequency.recalls(1) if recall == recall]
    assert frequency.recall(1) == pytest.approx(np.mean(known)) and len(known) < LAYERS
    nothing = score(Oracle(SHAPE, 2), replace(trace, expert_ids=np.full_like(ids, -1)))
    assert np.isnan([nothing.recall(1), *nothing.recall_interval(1), nothing.exact_frac(1)]).all()


def test_chance_scores_chance(trace):
    card = score(Chance(SHAPE, 3), trace)
    for ahead in card.lookaheads:
        assert card.recall(ahead) == pytest.approx(TOP_K / EXPERTS, abs=0.02)
        assert card.recall(ahead, double=True) == pytest.approx(2 * TOP_K / EXPERTS, abs=0.02)


def test_nobody_beats_the_oracle_and_twice_as_many_guesses_find_no_less(trace):
    for predictor in everyone(trace):
        card = score(predictor, trace)
        for ahead in card.lookaheads:
            assert card.recall(ahead) <= card.recall(ahead, double=True) <= 1.0, predictor.name


def test_precision_equals_recall_when_each_token_uses_k_and_k_are_predicted(trace):
    frame = score(Transition(trace, 2), trace).to_frame()
    np.testing.assert_allclose(frame["precision"], frame["recall"])


def test_what_cannot_be_judged_is_told(trace):
    one_layer = replace(
        trace, expert_ids=trace.expert_ids[:, :1], weights=trace.weights[:, :1], decoder_layers=[0]
    )
    with pytest.raises(BadTrace, match="no coming layer"):
        score(Oracle(one_layer.shape, 1), one_layer)
    for empty in (trace.take(trace.position > 10**6), replace(trace, position=np.full(len(trace), -1))):
        with pytest.raises(BadTrace, match="no token to score"):
            score(Oracle(SHAPE, 1), empty)
    card = score(Oracle(SHAPE, 2), trace)
    with pytest.raises(UnsupportedOption, match="choose one of 'input', 'middle', 'output'"):
        card.recall(1, group="first")
    one_text = replace(trace, prompts=[{"text": "the same"}] * PROMPTS)
    with pytest.raises(TraceMismatch, match="different traces"):
        difference(card, score(Oracle(SHAPE, 2), one_text), 1)


@pytest.mark.parametrize("given", ["trace.safetensors", None, {"expert_ids": []}], ids=repr)
def test_what_is_no_trace_is_told(trace, given):
    oracle = Oracle(SHAPE, 1)
    for call in (
        lambda: score(oracle, given),
        lambda: schedule_cards(oracle, given, COSTS, row_bytes=1),
        lambda: train(given),
        lambda: train_on_trace(given),
    ):
        with pytest.raises(UnsupportedOption, match="a trace is a RoutingTrace, this is"):
            call()
    for wrong in ({"config": {"hidden": 8}}, {"training": {"epochs": 2}}):
        for call in (train, train_on_trace, partial(train_predictor, "no model is loaded for this")):
            with pytest.raises(
                UnsupportedOption, match="config is a LlaporConfig and training a TrainConfig"
            ):
                call(trace, **wrong)


def test_padding_is_not_scored(trace):
    card = score(Oracle(SHAPE, 1), trace)
    assert card.used[0, 0].sum() == TOP_K * (trace.position >= 0).sum() < TOP_K * len(trace)


def test_an_interval_holds_its_value_and_narrows_with_more_prompts(trace):
    few = rows_of(trace, np.flatnonzero(trace.sequence < 5))
    many, some = (score(Frequency(trace, 1), t).recall_interval(1) for t in (trace, few))
    for interval in (many, some):
        assert interval.low <= interval.value <= interval.high
    assert many.high - many.low < some.high - some.low


def test_a_difference_is_paired(trace):
    """On the same prompts a predictor differs from itself by exactly nothing, with no spread."""
    card = score(Frequency(trace, 1), trace)
    assert difference(card, card, 1) == (0.0, 0.0, 0.0)
    with pytest.raises(TraceMismatch, match="different traces"):
        difference(card, score(Frequency(trace, 1), made_trace(1)), 1)
    with pytest.raises(ValueError, match="no prompt of domain"):
        card.recall(1, domain="poetry")
    with pytest.raises(UnsupportedOption, match="choose 1 to"):
        score(Frequency(trace, 1), trace, lookaheads=[2])


def test_frequencies_are_calibrated_on_what_they_counted(trace):
    card = score(Frequency(trace, 1), trace)
    table = card.reliability(1)
    assert card.ece(1) < 0.01
    assert table["pairs"].sum() == (trace.position >= 0).sum() * (LAYERS - 1) * EXPERTS


def test_inverted_predictions_are_worse_than_none_known(trace):
    """And turning them round twice gives them back."""
    good = Transition(trace, 1)
    bad = score(Inverted(good), trace).recall(1)
    assert bad < score(random_predictor(SHAPE, 1), trace).recall(1) < score(good, trace).recall(1)
    assert score(Inverted(Inverted(good)), trace).recall(1) == pytest.approx(score(good, trace).recall(1))


def test_adversarial_routing_leaves_nothing_to_find(trace):
    predictor = Transition(trace, 1)
    hostile = adversarial_trace(trace, Frequency(trace, 1))
    assert score(Frequency(trace, 1), hostile).recall(1) == 0.0
    assert len(hostile) == len(trace)
    assert score(Oracle(SHAPE, 1), adversarial_trace(trace, predictor)).recall(1) == 1.0


def test_a_stream_knows_where_the_text_changes(trace):
    stream = joined_stream(trace, made_trace(1))
    domains = [stream.prompts[s]["domain"] for s in stream.sequence]
    assert domains == ["before"] * len(trace) + ["after"] * len(trace)


def test_the_oracle_is_worth_most_and_its_time_is_never_longer(trace):
    found = {p.name: savings(p, trace, COSTS) for p in everyone(trace)}
    assert all(w.without_ms == found["oracle"].without_ms for w in found.values())
    assert found["oracle"].saved_ms == max(w.saved_ms for w in found.values()) > 0
    assert found["oracle"].useful_frac == 1.0


def test_a_predictor_pays_for_what_it_costs(trace):
    """One that comes too late saves nothing; one that is in the way of every layer less than nothing."""
    oracle = Oracle(SHAPE, 1)
    free = savings(oracle, trace, COSTS)
    assert savings(oracle, trace, COSTS.with_predictor(1.0)).saved_ms < free.saved_ms
    assert savings(oracle, trace, COSTS.with_predictor(1000.0)).saved_ms <= 0
    in_the_way = replace(COSTS, is_layered=True)
    spent = savings(oracle, trace, in_the_way.with_predictor(1000.0))
    assert spent.saved_ms == pytest.approx(free.saved_ms - LAYERS * 1.0, abs=0.5)


def test_with_all_experts_resident_nothing_is_saved(trace):
    found = savings(Oracle(SHAPE, 1), trace, COSTS, resident_frac=1.0)
    assert found.saved_ms == pytest.approx(0.0) and found.stall_without_ms == 0.0


def test_without_a_width_nothing_is_prefetched(trace):
    assert savings(Chance(SHAPE, 1), trace, COSTS, width=0).saved_ms == pytest.approx(0.0)
    with pytest.raises(UnsupportedOption, match="resident_frac"):
        savings(Oracle(SHAPE, 1), trace, COSTS, resident_frac=1.5)


def test_a_batch_needs_the_union_of_its_tokens(trace):
    one, eight = (savings(Oracle(SHAPE, 1), trace, COSTS, batch=b) for b in (1, 8))
    assert one.without_ms < eight.without_ms < 8 * one.without_ms


def test_more_slots_leave_less_to_save_and_a_share_of_them_is_not_copied_first(trace):
    """At the beginning the most frequent experts are there: with all of their slots nothing is ever copied."""
    found = [savings(Oracle(SHAPE, 1), trace, COSTS, resident_frac=frac) for frac in (0.25, 0.5, 0.75, 1.0)]
    stalls = [one.stall_without_ms for one in found]
    assert stalls == sorted(stalls, reverse=True) and stalls[0] > 0 == stalls[-1]
    assert [one.without_ms - one.stall_without_ms for one in found] == pytest.approx(
        [found[0].without_ms - found[0].stall_without_ms] * 4
    )


def test_a_long_trace_is_sampled_by_whole_prompts(trace):
    part = some_prompts(trace, 100, batch=2)
    assert len(np.unique(part.sequence)) == 4 and len(part) == 4 * LENGTH
    assert some_prompts(trace, len(trace) + 1, batch=1) is trace


def test_a_batch_holds_one_token_of_a_prompt(trace):
    """Where it held neighbouring tokens of a prompt, "previous token" found the batch's own experts: 1.00."""
    drawn = np.argsort(np.random.default_rng(0).random((len(trace), LAYERS, EXPERTS)), axis=-1)[..., :TOP_K]
    noise = replace(trace, expert_ids=drawn, sequence=np.arange(len(trace)) // LENGTH)
    cards = [score(one, noise) for one in (PreviousToken(SHAPE, 1), Chance(SHAPE, 1))]
    assert cards[0].hot(1) == pytest.approx(cards[1].hot(1), abs=0.06)
    for card in cards:
        assert card.batch_size.max() == PROMPTS / 2  # a domain's prompts
        assert card.batch_size.sum() == (trace.position >= 0).sum()


def test_sequences_of_one_text_are_not_in_one_batch(trace):
    twice = RoutingTrace.concat([trace, trace])
    shared = replace(twice, prompts=[{"text": str(i % PROMPTS), "domain": "all"} for i in range(2 * PROMPTS)])
    assert score(Chance(SHAPE, 1), shared).batch_size.max() == PROMPTS


def test_large_batches_are_dealt_evenly(trace):
    one = replace(trace, prompts=[])
    sizes = score(Chance(SHAPE, 1), one, batch_tokens=12).batch_size
    assert set(sizes.tolist()) <= {9, 10} and sizes.sum() == (trace.position >= 0).sum()


def test_exact_sets_are_whole_sets(trace):
    """Two experts of two: both must be among the best two; by chance once in 66 times."""
    card = score(Transition(trace, 1), trace)
    assert card.exact_frac(1) <= card.recall(1) <= (1 + card.exact_frac(1)) / 2 + 1e-9
    assert score(Chance(SHAPE, 1), trace).exact_frac(1) == pytest.approx(1 / 66, abs=0.01)
    assert score(Oracle(SHAPE, 1), trace).exact_frac(1, domain="odd") == 1.0


def test_kinds_of_text_add_up_to_all_text(trace):
    card = score(Frequency(rows_of(trace, np.flatnonzero(trace.sequence % 2 == 0)), 1), trace)
    table = card.by_domain(1).set_index("domain")
    assert table["prompts"].sum() == PROMPTS
    assert (
        table.loc["even", "recall"] > table.loc["odd", "recall"] + 0.1
    )  # what it counted, and what it did not
    assert table.loc["even", "ece"] < table.loc["odd", "ece"]
    whole, parts = card.reliability(1), [card.reliability(1, domain=name) for name in ("even", "odd")]
    assert (sum(part["pairs"] for part in parts) == whole["pairs"]).all()


def test_the_made_trace_is_one_trace(trace):
    """The tests above lean on it: 4 rows of padding in one sequence, both domains."""
    assert (trace.position < 0).sum() == 4
    assert replace(trace).num_layers == LAYERS

"""A large model's trace takes memory by what it needs, not by layers x experts x steps."""

import tracemalloc

import numpy as np
import pytest

from prescope.predictor import Chance, Frequency, NoisyOracle, Oracle, RecordedPredictor
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Simulator, prepare, simulator
from prescope.traces.routing import RoutingTrace
from prescope.traces.synthetic import SyntheticSpec

COSTS = LayerCosts(
    link_us=172.0, gpu_us=5.0, rest_us=90.0, decide_us=60.0, cpu_us=(0.0, *(140.0 + 6.0 * n for n in range(1, 17))),
    cpu_base_us=20.0, source="made up for a test",
)  # fmt: skip
SPEC = SyntheticSpec(
    num_layers=4, num_experts=16, top_k=4, zipf=0.8, persistence=0.3, correlation=0.3, diversity=0.3
)


def large_trace(layers: int, experts: int, tokens: int, top_k: int = 10) -> RoutingTrace:
    """One sequence; a token uses neighbours, so that they are distinct."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, experts, (tokens, layers, 1))
    step = np.arange(tokens)
    return RoutingTrace(
        expert_ids=(first + np.arange(top_k)) % experts,
        weights=np.full((tokens, layers, top_k), 1.0 / top_k),
        step=step,
        sequence=np.zeros(tokens, int),
        position=step,
        phase=np.ones(tokens, int),
        model="drawn",
        fingerprint="",
        num_experts=experts,
        top_k=top_k,
        decoder_layers=list(range(layers)),
    )


@pytest.mark.parametrize("predicted", [False, True])
def test_memory_is_that_of_what_is_needed_and_of_a_part_of_the_predictions(predicted, monkeypatch):
    """Two numbers for every expert, layer and step would be 67 MB, and predictions for two layers ahead 134 more."""
    monkeypatch.setattr(prepare, "KEPT_BYTES", 0)
    monkeypatch.setattr(prepare, "PART_BYTES", 2 << 20)
    monkeypatch.setattr(simulator, "PART_BYTES", 2 << 20)
    trace = large_trace(16, 512, 1024)
    tracemalloc.start()
    try:
        made = Simulator(
            trace,
            COSTS,
            row_bytes=1_000_000,
            predictor=Oracle(trace.shape, 2) if predicted else None,
            lookahead=2,
        )
        run = made.run("presched", slots=0.25)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert run.counts.needed == 16 * 1024 * 10
    assert peak < (40 << 20), f"{peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("kind", ["oracle", "noisy", "frequency", "recorded", "chance"])
@pytest.mark.parametrize("batch", [1, 3])
def test_predictions_made_in_parts_are_those_made_at_once(kind, batch, monkeypatch):
    """Whole replays too, to the last bit: also across a second prompt, and with parts of a few rows."""
    runs = [SPEC.generate(prompt_tokens=5, new_tokens=11, batch=batch, seed=seed) for seed in (0, 1)]
    trace = RoutingTrace.concat(runs)
    noisy = NoisyOracle(trace, {1: 0.8, 3: 0.6})
    decode = trace.phase == prepare.DECODE
    predictor = {
        "oracle": Oracle(trace.shape, 3),
        "noisy": noisy,
        "frequency": Frequency(trace, 3),
        "chance": Chance(trace.shape, 3),
        "recorded": RecordedPredictor.of_scores(
            trace, [noisy.replay(trace, ahead)[decode] for ahead in (1, 2)], name="x", is_calibrated=True
        ),
    }[kind]
    whole = Simulator(trace, COSTS, row_bytes=9_400_000, predictor=predictor)
    monkeypatch.setattr(prepare, "KEPT_BYTES", 0)
    for part_bytes in (1, 40_000):
        monkeypatch.setattr(prepare, "PART_BYTES", part_bytes)
        monkeypatch.setattr(simulator, "PART_BYTES", part_bytes)
        parts = Simulator(trace, COSTS, row_bytes=9_400_000, predictor=predictor)
        for one, other in zip(whole.predicted, parts.predicted, strict=True):
            assert np.array_equal(one, other) and one.any()
        for schedule in ("presched", "hybrimoe"):
            logs = [each.run(schedule, slots=20).log for each in (whole, parts)]
            for one, other in zip(*logs, strict=True):
                assert np.array_equal(one, other, equal_nan=True)


def test_needs_as_entries_are_those_of_the_trace():
    trace = SPEC.generate(prompt_tokens=5, new_tokens=7, batch=3, seed=0)
    needs = prepare.needs_of(trace)
    for s, step in enumerate(needs.steps.tolist()):
        for use in trace.needed(step):
            experts, tokens = needs.at(s, use.moe_layer)
            assert experts.tolist() == use.experts.tolist() and tokens.tolist() == use.tokens.tolist()
            assert np.flatnonzero(needs.tokens_SLE[s, use.moe_layer]).tolist() == experts.tolist()
    cut = needs.until(2, 1)
    expected = needs.tokens_SLE
    expected[2, 1:] = 0
    assert np.array_equal(cut.tokens_SLE, expected)
    assert needs.weights.sum() == pytest.approx(trace.select(phase="decode").weights.sum(), rel=1e-5)

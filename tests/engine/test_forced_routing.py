"""Routing from a trace: what does not fit the model, the trace or the run is refused, and the engine works on."""

import numpy as np
import pytest
import torch

import prescope
from prescope.errors import TraceMismatch, UnsupportedOption
from prescope.predictor import EarlyRouter, Routers
from prescope.scheduler.costs import LayerCosts
from tests.support.models import EXPERTS, LAYERS, plain_tokens, prompt, tiny_moe

FAST_LINK = {"device": "cpu", "link_gb_per_s": 50.0}
COSTS = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, 80.0, 120.0), source="made up")
NEW = 6
STEPS = NEW - 1


@pytest.fixture
def model():
    return tiny_moe(pad_token_id=0)


@pytest.mark.parametrize(
    "batch, settings",
    [
        (2, {}),
        (3, {}),
        (1, {"num_beams": 2}),
        (1, {"do_sample": True, "num_return_sequences": 4}),
    ],
)
def test_a_run_of_more_sequences_than_the_traces_is_told_so(model, batch, settings):
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        run = engine.generate(prompt(), max_new_tokens=NEW)
        engine.force_routing(run.trace)
        with pytest.raises(TraceMismatch, match="of 1 tokens a step, and this one has"):
            engine.generate(prompt(batch=batch), max_new_tokens=NEW, **settings)
        assert engine.generate(prompt(), max_new_tokens=NEW).tokens == run.tokens, "its own routing"
        engine.force_routing(None)
        assert engine.generate(prompt(batch=2), max_new_tokens=NEW).tokens == plain_tokens(
            model, prompt(batch=2), new=NEW
        )


def scores(steps=STEPS, layers=LAYERS, ahead=2, kinds=2, experts=EXPERTS):
    return np.random.default_rng(0).random((steps, layers, ahead, kinds, experts), dtype=np.float32)


REFUSED = {
    "a run": (lambda run: (run,), UnsupportedOption, "trace is a RunResult"),
    "a name": (lambda run: ("trace.npz",), UnsupportedOption, "trace is a str"),
    "a prompt alone": (lambda run: (run.trace.select(phase="prefill"),), TraceMismatch, "no decode steps"),
    "nothing": (lambda run: (run.trace.select(steps=[]),), TraceMismatch, "no decode steps"),
    "scores in words": (lambda run: (run.trace, "high"), UnsupportedOption, "scores are a str"),
    "scores of no step": (lambda run: (run.trace, scores(steps=0)), TraceMismatch, "scores are"),
    "scores of fewer steps": (lambda run: (run.trace, scores(steps=STEPS - 1)), TraceMismatch, "scores are"),
    "of fewer layers": (lambda run: (run.trace, scores(layers=LAYERS - 1)), TraceMismatch, "scores are"),
    "of no layer ahead": (lambda run: (run.trace, scores(ahead=0)), TraceMismatch, "scores are"),
    "of one kind": (lambda run: (run.trace, scores(kinds=1)), TraceMismatch, "scores are"),
    "of more experts": (lambda run: (run.trace, scores(experts=EXPERTS + 1)), TraceMismatch, "scores are"),
    "of one layer's experts": (lambda run: (run.trace, scores()[0, 0, 0, 0]), TraceMismatch, "scores are"),
}  # fmt: skip


def test_what_is_no_trace_of_this_model_is_refused_and_nothing_is_forced(model):
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        run = engine.generate(prompt(), max_new_tokens=NEW)
        for name, (give, error, message) in REFUSED.items():
            with pytest.raises(error, match=message):
                engine.force_routing(*give(run))
            assert engine.runner.forced is None, name
        assert engine.generate(prompt(), max_new_tokens=NEW).tokens == run.tokens


@pytest.mark.parametrize("ahead", [1, 2, 7])
@pytest.mark.parametrize("lookahead", [1, 2])
def test_scores_may_say_nothing_of_the_last_layers_that_are_looked_at(model, ahead, lookahead):
    """Compiled decisions read as many layers as the schedule looks at: behind shorter scores lay foreign memory."""
    routers = Routers.of_weights(
        torch.stack([layer.mlp.gate.weight.detach() for layer in model.model.layers])
    )
    with prescope.attach(model, slots=6, costs=COSTS, cpu_threads=0, **FAST_LINK) as engine:
        engine.configure(
            schedule="presched", predictor=EarlyRouter(engine.shape, routers, 2), lookahead=lookahead
        )
        run = engine.generate(prompt(), max_new_tokens=NEW)
        engine.force_routing(run.trace, given := scores(ahead=ahead))
        assert engine.generate(prompt(), max_new_tokens=NEW).tokens == run.tokens
        predicting = engine.runner.schedule_runner.predicting
        predicting.forced.restart()
        predicting.forced.advance()
        for layer in range(LAYERS):
            found = predicting.scores(layer, *(torch.zeros(1, 1) for _ in range(3))).numpy()
            assert found.shape == (predicting.lookahead, 2, EXPERTS)
            assert (found[:ahead] == given[0, layer, : predicting.lookahead]).all() and not found[
                ahead:
            ].any()

"""Graphs are recorded once for many runs: a longer one in the same bucket, other batch sizes, settings not baked in."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

import prescope
from prescope.core.jit import IS_COMPILED, behind
from prescope.engine.graph.copy_driver import follow_orders
from prescope.engine.graph.host_loop import serve
from prescope.engine.graph.warm import order_arguments, serve_arguments
from prescope.hf import bucket_of
from prescope.predictor import EarlyRouter, Routers
from prescope.scheduler.costs import LayerCosts
from tests.support.models import LAYERS, plain_tokens, prompt, tiny_moe
from tests.support.predictors import SHAPE

pytest.importorskip("triton", reason="Triton exists for Linux only")
NEW = 3  # by the prompt, layer by layer, and from the graph
CACHES = import_module("prescope.hf.static_cache")  # its function of that name hides it
COSTS = LayerCosts(
    link_us=100.0, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, 80.0, 120.0), cpu_base_us=10.0, decide_us=30.0,
    source="made up for a test",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


@pytest.fixture
def small_buckets(monkeypatch):
    for name, value in {"LEAST_TOKENS": 16, "MOST_TOKENS": 64, "LEAST_LENGTH": 8}.items():
        monkeypatch.setattr(CACHES, name, value)


def recorded(engine, model, length=5, batch=1, new=NEW) -> int:
    """How many graphs a run has recorded; its tokens are the plain model's."""
    ids = prompt(batch=batch, length=length, seed=length)
    run = engine.generate(ids, max_new_tokens=new)
    assert run.tokens == plain_tokens(model, ids, new=new)
    assert not run.config["reasons"]["decode"].startswith("layered"), run.config["reasons"]["decode"]
    return run.config["graphs"]["recorded"]


@pytest.mark.parametrize(
    ("length", "batch", "expected"),
    [(1, 1, 256), (256, 1, 256), (257, 1, 512), (1025, 1, 2048), (4097, 1, 8192), (9000, 1, 12288), (600, 8, 1024),
     (100, 8, 128), (130, 8, 256), (600, 64, 640), (1, 500, 128)],
)  # fmt: skip
def test_buckets_waste_little(length, batch, expected):
    assert bucket_of(length, batch) == expected
    assert expected - length < max(4096 // batch, 128) or expected < 2 * length


def test_a_longer_run_in_the_bucket_and_batches_in_turn_record_nothing(model, gpu, small_buckets):
    with prescope.attach(model, slots=12, decode="gpu-driven", **gpu) as engine:
        assert recorded(engine, model) == 1
        assert recorded(engine, model, length=7) == 0, "the bucket of 16 has room for it"
        assert [recorded(engine, model, batch=batch) for batch in (2, 1, 2)] == [1, 0, 0]
        assert engine.decoder.describe()["kept"] == 2
        engine.check_integrity()


@pytest.mark.slow
def test_the_next_bucket_is_recorded_and_the_former_one_stays(model, gpu, small_buckets):
    with prescope.attach(model, slots=12, decode="gpu-driven", **gpu) as engine:
        assert [recorded(engine, model, length=length) for length in (5, 20, 4, 24, 7)] == [1, 1, 0, 0, 0]
        assert engine.decoder.describe()["kept"] == 2


@pytest.mark.slow
def test_memory_of_kept_steps_is_bounded(model, gpu, small_buckets, monkeypatch):
    monkeypatch.setattr("prescope.engine.graph.choose.MOST_BYTES", 1)
    with prescope.attach(model, slots=12, decode="gpu-driven", **gpu) as engine:
        assert [recorded(engine, model, batch=batch) for batch in (1, 2, 1)] == [1, 1, 1]
        assert engine.decoder.describe()["kept"] == 1


@pytest.mark.slow
def test_padding_and_none_in_turn_record_once_each(model, gpu, small_buckets):
    ids, mask = prompt(batch=2, length=6).clamp(min=1), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    with prescope.attach(model, slots=12, decode="gpu-driven", **gpu) as engine:
        counts = []
        for _ in range(2):
            counts.append(recorded(engine, model, batch=2))
            run = engine.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0)
            counts.append(run.config["graphs"]["recorded"])
            assert run.tokens == padded[:, 6:].tolist()
    assert counts[2:] == [0, 0]


@pytest.fixture
def scheduled(model, gpu):
    """An engine whose graphs hold a predictor, which has run once; and that predictor."""
    weights = torch.stack([layer.mlp.gate.weight for layer in model.model.layers])
    early = EarlyRouter(SHAPE, Routers.of_weights(weights), LAYERS - 1)
    settings = {"schedule": "presched", "predictor": early, "costs": COSTS, "cpu_threads": 1, "cache": "lru"}
    with prescope.attach(model, slots=7, **settings, **gpu) as engine:
        assert recorded(engine, model) == 1
        yield engine, early


@pytest.mark.filterwarnings("ignore:experts on the CPU run on torch")
def test_settings_that_are_not_baked_in_record_nothing(model, scheduled):
    engine, early = scheduled
    engine.configure(
        width=2, threshold=0.4, costs=replace(COSTS, link_us=50.0), cache="score", slots=7, predictor=early
    )
    assert recorded(engine, model) == 0
    engine.check_integrity()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:experts on the CPU run on torch")
def test_settings_that_are_baked_in_record_once(model, scheduled):
    engine, early = scheduled
    engine.configure(predictor="none")
    assert recorded(engine, model) == 1, "predictions are part of the graph"
    engine.configure(predictor=early)
    assert recorded(engine, model) == 0
    engine.configure(slots=9)
    assert recorded(engine, model) == 1, "slots have other addresses"


@pytest.mark.slow
def test_an_interrupt_while_a_step_is_captured_leaves_no_half_of_it(model, gpu, small_buckets, monkeypatch):
    """Two drivers are captured; the run behind finds both or none."""
    with prescope.attach(model, slots=6, **gpu) as engine:
        capture, calls = engine._device.capture, []

        def interrupted(run):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return capture(run)

        monkeypatch.setattr(engine._device, "capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompt(length=5), max_new_tokens=NEW)
        assert recorded(engine, model) == 2


@pytest.mark.parametrize("decode", ["host-driven", "copy-engine"])
def test_what_is_compiled_while_experts_are_loaded_is_what_runs_call(model, gpu, decode):
    """Arguments of another type would have it compiled again, in the first step."""
    function = {"host-driven": serve, "copy-engine": follow_orders}[decode]
    made = {"host-driven": serve_arguments, "copy-engine": order_arguments}[decode]()
    if not IS_COMPILED:
        pytest.skip("nothing is compiled without numba")
    signature = tuple(map(function.typeof_pyval, made))
    with prescope.attach(model, slots=6, decode=decode, **gpu) as engine:
        behind.wait()
        assert signature in function.signatures
        before = len(function.signatures)
        recorded(engine, model)
    assert len(function.signatures) == before

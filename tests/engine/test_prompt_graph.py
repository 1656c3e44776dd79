"""Short prompts come from a graph where all experts have slots; the text and the evidence are the same."""

import numpy as np
import pytest
import torch

import prescope
from prescope.engine.graph.prompt import filled_length
from prescope.scheduler.costs import LayerCosts
from tests.support.models import EXPERTS, LAYERS, plain_tokens, prompt, tiny_moe

pytest.importorskip("triton", reason="Triton exists for Linux only")
ALL, NEW = LAYERS * EXPERTS, 3
COSTS = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=200.0, decide_us=30.0, source="made up for a test")
COLUMNS = ["step", "phase", "moe_layer", "tokens", "needed", "hits", "late", "misses"]


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


@pytest.fixture
def engine(model, gpu):
    """All experts are in their slots."""
    with prescope.attach(model, slots=ALL, **gpu) as engine:
        fill(engine)
        yield engine


def fill(engine) -> None:
    """Prompts that bring all experts into slots; long ones, which no other test has."""
    while (engine.runner.residency.slot_of < 0).any():
        engine.generate(prompt(3, 30, seed=engine.runner.residency.policy.tick), max_new_tokens=1)


def is_from_graph(engine, model, ids, **settings) -> bool:
    """Whether a prompt came from a graph; the tokens are the plain model's."""
    run = engine.generate(ids, max_new_tokens=NEW, **settings)
    assert run.tokens == plain_tokens(model, ids, new=NEW)
    return run.config["graphs"]["prompt"]


@pytest.mark.parametrize(("length", "filled"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_prompts_are_filled_up_to_powers_of_two(length, filled):
    assert filled_length(length) == filled


def test_the_second_prompt_of_a_length_and_others_up_to_it_come_from_the_graph(engine, model):
    assert [is_from_graph(engine, model, prompt(1, length, seed=length)) for length in (9, 9, 16, 3)] == [
        False, True, True, True,
    ]  # fmt: skip
    assert [is_from_graph(engine, model, prompt(1, length, seed=length)) for length in (17, 20, 9)] == [
        False, True, True,
    ]  # fmt: skip
    # A mask is not made for one token: inputs of another form, and a graph of their own.
    assert [is_from_graph(engine, model, prompt(1, 1, seed=seed)) for seed in (1, 2)] == [False, True]
    engine.check_integrity()


def test_the_evidence_is_that_of_a_prompt_without_a_graph(engine, model, monkeypatch):
    ids = prompt(2, 6)
    assert not is_from_graph(engine, model, ids)
    run = engine.generate(ids, max_new_tokens=NEW)
    assert run.config["graphs"]["prompt"]
    monkeypatch.setattr("prescope.engine.graph.prompt.MOST_FILLED", 0)
    former = engine.generate(ids, max_new_tokens=NEW)
    assert not former.config["graphs"]["prompt"]
    assert run.tokens == former.tokens
    assert run.layers[COLUMNS].equals(former.layers[COLUMNS])
    assert (run.trace.expert_ids == former.trace.expert_ids).all()
    np.testing.assert_allclose(run.trace.weights, former.trace.weights, rtol=1e-5)
    assert run.metrics.prefill.hit_rate == 1.0


def test_prompts_padded_on_the_left_are_filled_up_on_the_right(engine, model):
    ids = prompt(2, 6).clamp(min=1).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for expected in (False, True):
        run = engine.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0)
        assert run.tokens == padded[:, 6:].tolist()
        assert run.config["graphs"]["prompt"] is expected
    former = engine.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0).trace
    assert (run.trace.position == former.position).all()


def test_experts_that_have_changed_slots_are_found(engine, model):
    ids = prompt(1, 9)
    assert [is_from_graph(engine, model, ids) for _ in range(2)] == [False, True]
    engine.clear_cache()
    assert not is_from_graph(engine, model, ids), "they have to be copied"
    fill(engine)
    assert is_from_graph(engine, model, ids)


def test_what_an_interrupt_has_left_is_put_right_before_slots_are_believed(engine, model):
    ids = prompt(1, 9)
    assert [is_from_graph(engine, model, ids) for _ in range(2)] == [False, True]
    engine.runner._begin_work()  # and ended in the middle of it
    assert [is_from_graph(engine, model, ids) for _ in range(2)] == [False, True]
    engine.check_integrity()


def test_what_the_host_decides_or_nobody_knows_is_launched_by_the_host(engine, model, monkeypatch):
    ids = prompt(1, 9)
    assert [is_from_graph(engine, model, ids) for _ in range(2)] == [False, True]
    with monkeypatch.context() as patch:
        patch.setattr("prescope.engine.graph.prompt.KNOWN", {"input_ids"})
        assert not is_from_graph(engine, model, ids)
    trace = engine.generate(ids, max_new_tokens=NEW).trace
    engine.force_routing(trace)
    assert not engine.generate(ids, max_new_tokens=NEW).config["graphs"]["prompt"]
    engine.force_routing(None)
    assert is_from_graph(engine, model, ids)


def test_a_prompt_that_cannot_be_recorded_is_said_once_and_answered(engine, model, monkeypatch):
    def refuse(run, shares_memory):
        raise RuntimeError("operation not permitted when stream is capturing")

    ids = prompt(1, 9)
    assert not is_from_graph(engine, model, prompt(1, 20))  # its steps are recorded
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="kernel by kernel"):
        patch.setattr(engine.runner.device, "capture", refuse)
        engine.generate(ids, max_new_tokens=1)
    run = engine.generate(ids, max_new_tokens=NEW)
    assert run.tokens == plain_tokens(model, ids, new=NEW)
    assert any("not permitted" in note for note in run.notes)


def test_where_memory_is_short_it_is_not_taken_for_graphs(engine, model, monkeypatch):
    monkeypatch.setattr(engine.runner.device, "free_bytes", lambda: 1 << 29)
    ids = prompt(1, 9)
    assert [is_from_graph(engine, model, ids) for _ in range(2)] == [False, False]
    assert any("1 GiB of the GPU's memory" in note for note in engine.generate(ids, max_new_tokens=1).notes)


def test_a_prompt_longer_than_the_positions_the_model_was_made_for_is_not_filled_up(gpu):
    model = tiny_moe(max_position_embeddings=40)
    with prescope.attach(model, slots=ALL, **gpu) as engine:
        while (engine.runner.residency.slot_of < 0).any():
            engine.generate(prompt(3, 30, seed=engine.runner.residency.policy.tick), max_new_tokens=1)
        assert [is_from_graph(engine, model, prompt(1, 33)) for _ in range(2)] == [False, False]


@pytest.mark.filterwarnings("ignore:experts on the CPU run on torch")
def test_a_schedule_learns_from_it_as_from_any_prompt(model, gpu, monkeypatch):
    ids, seen = prompt(2, 5), []
    with prescope.attach(model, slots=ALL, schedule="presched", costs=COSTS, cpu_threads=0, **gpu) as engine:
        runner = engine.runner.schedule_runner
        observe = runner.observe

        def watched(layer, used_TK):
            seen.append((layer, used_TK.tolist()))
            observe(layer, used_TK)

        monkeypatch.setattr(runner, "observe", watched)
        prompts = []
        for is_recorded in (False, True):
            seen.clear()
            assert is_from_graph(engine, model, ids) is is_recorded
            prompts.append(sorted(seen[:LAYERS]))
        with monkeypatch.context() as patch:
            patch.setattr("prescope.engine.graph.prompt.MOST_FILLED", 0)
            seen.clear()
            assert not is_from_graph(engine, model, ids)
    assert prompts == [sorted(seen[:LAYERS])] * 2
    assert len(prompts[0][0][1]) == ids.numel(), "what was filled up was chosen by nobody"

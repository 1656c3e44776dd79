"""What other code does to an attached model: torch's modes, gradients, wrappers, copies, and a cell that is run twice.

The plain model says what is right. What is not served is refused with the way round, and the engine works afterwards.
"""

import copy
import gc
import io
import pickle
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import prescope
from prescope.errors import (
    AlreadyAttached,
    NotAttached,
    NotEnoughMemory,
    PrescopeError,
    UnsupportedExperts,
    UnsupportedOption,
)
from prescope.hf import addresses_of, has_hooks
from prescope.scheduler.costs import LayerCosts
from tests.support import families
from tests.support.models import plain_tokens, prompt, tiny_moe

FAST_LINK = {"device": "cpu", "link_gb_per_s": 50.0}


def attach(model, slots=6, **settings):
    return prescope.attach(model, slots=slots, **FAST_LINK, **settings)


@pytest.fixture
def model():
    return tiny_moe()


@pytest.fixture(scope="module")
def expected():
    return plain_tokens(tiny_moe(), prompt())


# -- modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["generate", "model.generate", "configure", "attach", "detach", "all"])
def test_inference_mode_around_a_part_or_all_changes_nothing(inside, model, expected):
    """Tensors made inside it cannot be written outside: slots, caches and weights live longer than the block."""

    def mode(*parts):
        return torch.inference_mode(inside in parts)

    with mode("attach", "all"):
        engine = attach(model)
    with mode("configure", "all"):
        engine.configure(slots=5)
    for _ in range(2):
        with mode("generate", "all"):
            assert engine.generate(prompt(), max_new_tokens=12).tokens == expected
        with mode("model.generate", "all"):
            assert plain_tokens(model, prompt()) == expected
        assert engine.generate(prompt(), max_new_tokens=12).tokens == expected
    engine.check_integrity()
    with mode("detach", "all"):
        engine.detach()
    model(input_ids=prompt(), labels=prompt()).loss.backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())


#: That link and CPU are both used.
COSTS = LayerCosts(
    link_us=100.0, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, 80.0, 120.0), source="made up for a test"
)


def test_an_engine_closed_in_its_recording_in_inference_mode_gives_back_weights_that_train(model):
    engine = attach(model)
    with torch.inference_mode(), engine.record():
        plain_tokens(model, prompt())
        engine.close()
    assert engine.is_closed
    model(input_ids=prompt(), labels=prompt()).loss.backward()


def test_a_model_made_in_inference_mode_is_served_and_given_back(expected):
    with torch.inference_mode():
        model = tiny_moe()
    with attach(model) as engine:
        assert engine.generate(prompt(), max_new_tokens=12).tokens == expected
    assert plain_tokens(model, prompt()) == expected


@pytest.mark.parametrize("of_model", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_mode", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_the_plain_model_gives_under_it(of_model, of_mode):
    model = tiny_moe(of_model)
    with torch.no_grad(), torch.autocast("cpu", of_mode):
        want, tokens = model(prompt(2)).logits, plain_tokens(model, prompt())
        with attach(model) as engine:
            torch.testing.assert_close(model(prompt(2)).logits, want, rtol=0.03, atol=0.1)
            assert engine.generate(prompt(), max_new_tokens=12).tokens == tokens


@pytest.mark.parametrize("schedule", ["on-demand", "presched"])
@pytest.mark.parametrize("cache", ["lru", "score"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_router_that_is_not_finite_leaves_text_metrics_and_a_note(value, cache, schedule, model):
    gate = model.model.layers[1].mlp.gate
    gate.weight.data[:] = value
    tokens = plain_tokens(model, prompt(), 4)
    settings = {} if schedule == "on-demand" else {"schedule": schedule, "costs": COSTS, "cpu_threads": 0}
    with attach(model, cache=cache, **settings) as engine:
        run = engine.generate(prompt(), max_new_tokens=4)
        assert run.tokens == tokens and run.metrics.output_tokens == 4
        assert any("layer 1" in note and "not finite" in note for note in run.notes)
        assert run.trace is not None and run.trace.weights[:, 0].all()
        gate.weight.data[:] = 0.1
        assert not engine.generate(prompt(), max_new_tokens=4).notes, "the next run is clean"
        assert torch.isfinite(torch.from_numpy(engine.runner.residency.policy.scores)).all()


@pytest.mark.parametrize("wrong", [-1, -7, 8, 9, 1000])
def test_ids_of_no_expert_contribute_nothing(wrong, model):
    """As the sentinels of expert parallelism do."""
    x, ids = torch.randn(5, 32), torch.randint(0, 8, (5, 2), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(5, 2)
    module = model.model.layers[1].mlp.experts
    without = weights.clone()
    without[1, 0] = without[4, 1] = 0.0
    want = module(x, ids, without)
    ids[1, 0] = ids[4, 1] = wrong
    with attach(model):
        torch.testing.assert_close(module(x, ids, weights), want)


# -- gradients -----------------------------------------------------------------------------------------------------


def freeze_experts(model):
    for layer in model.model.layers:
        layer.mlp.experts.requires_grad_(False)


def gradients(model, ids):
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("slots, cache", [(3, "score"), (24, "lru")])
def test_gradients_go_through_frozen_experts(slots, cache, checkpointing, model):
    """To attention, norms, routers and embeddings, as in the plain model; also when a layer runs again in backward."""
    freeze_experts(model)
    want = gradients(model, prompt(2))
    if checkpointing is not None:
        model._set_gradient_checkpointing(
            gradient_checkpointing_func=partial(checkpoint, use_reentrant=checkpointing)
        )
        model.train()
    with attach(model, slots, cache=cache) as engine:
        got = gradients(model, prompt(2))
        assert got.keys() == want.keys() and any("gate.weight" in name for name in got)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)
        engine.check_integrity()


TRANSFORMS = {
    "grad": lambda logits: torch.func.grad(lambda x: logits(x).sum()),
    "vmap": torch.func.vmap,
    "grad of each": lambda logits: torch.func.vmap(torch.func.grad(lambda x: logits(x).sum())),
    "jacobian": lambda logits: torch.func.jacrev(lambda x: logits(x)[..., -1, :3]),
}


# torch itself, of the plain model's experts
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule"
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_are_the_plain_models(transform, model):
    """They hand the experts tensors that are none, with a dimension that nobody sees."""
    model.requires_grad_(False)
    x_BTD = model.get_input_embeddings()(prompt(2, 4)).detach()

    def logits(embeds):
        whole = embeds if embeds.dim() == 3 else embeds[None]
        return model(inputs_embeds=whole, use_cache=False).logits.reshape(*embeds.shape[:-1], -1)

    want = TRANSFORMS[transform](logits)(x_BTD)
    with attach(model) as engine:
        torch.testing.assert_close(TRANSFORMS[transform](logits)(x_BTD), want, rtol=1e-4, atol=1e-4)
        engine.check_integrity()


def test_training_the_experts_is_refused_before_any_gradient_is_kept_from_them(model):
    with attach(model):
        loss = model(input_ids=prompt(), labels=prompt()).loss
        with pytest.raises(UnsupportedOption, match=r"requires_grad_\(False\)"):
            loss.backward()
        freeze_experts(model)
        assert gradients(model, prompt())
    assert not model.model.layers[0].mlp.experts.down_proj.requires_grad, "what was set while attached stays"


def test_only_the_experts_to_be_trained_is_refused_too(model):
    model.requires_grad_(False)
    model.model.layers[2].mlp.experts.down_proj.requires_grad_(True)
    with attach(model), pytest.raises(UnsupportedOption, match=r"layers\.2\.mlp\.experts"):
        model(input_ids=prompt(), labels=prompt()).loss.backward()


def test_backward_after_detach_says_so(model):
    freeze_experts(model)
    with attach(model):
        loss = model(input_ids=prompt(), labels=prompt()).loss
    with pytest.raises(NotAttached, match="between forward and backward"):
        loss.backward()


# -- engines that are lost, and models that share --------------------------------------------------------------------


@pytest.mark.parametrize("is_lost", [True, False])
def test_attaching_again_takes_over(is_lost, model, expected):
    former = attach(model)
    if is_lost:
        del former
        gc.collect()
    engine = attach(model, slots=4)
    assert engine.generate(prompt(), max_new_tokens=12).tokens == expected
    if not is_lost:
        with pytest.raises(NotAttached, match="attached again"):
            former.generate(prompt())
        former.detach()
        assert engine.generate(prompt(), max_new_tokens=12).tokens == expected, (
            "it is not the former's any more"
        )
    engine.detach()
    assert plain_tokens(model, prompt()) == expected


def test_settings_that_are_refused_leave_the_former_engine(model, expected):
    with attach(model) as engine:
        for bad in ({"slots": 1}, {"cache": "static"}, {"kernels": "triton"}):
            with pytest.raises(PrescopeError):
                prescope.attach(model, **{"slots": 6, **FAST_LINK, **bad})
        assert engine.generate(prompt(), max_new_tokens=12).tokens == expected


def test_an_engine_in_use_is_not_taken_over(model, expected):
    engine = attach(model)

    def try_to(count):
        with pytest.raises(AlreadyAttached, match="middle of a run"):
            attach(model)

    assert engine.generate(prompt(), max_new_tokens=12, on_step=try_to).tokens == expected
    engine.detach()


def test_two_models_of_one_configuration_do_not_know_of_each_other(model, expected):
    second = type(model)(model.config).eval()
    second.load_state_dict(model.state_dict())
    former = model.config._experts_implementation
    with attach(model) as first:
        assert plain_tokens(second, prompt()) == expected
        with attach(second) as other:
            assert other.generate(prompt(), max_new_tokens=12).tokens == expected
        assert first.generate(prompt(), max_new_tokens=12).tokens == expected
        assert plain_tokens(second, prompt()) == expected
        third = type(model)(model.config).eval()
        third.load_state_dict(second.state_dict())
        assert plain_tokens(third, prompt()) == expected
    assert model.config._experts_implementation == former
    assert all(layer.mlp.experts.config is model.config for layer in model.model.layers)


# -- wrappers, adapters and copies -----------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, model, own=None):
        super().__init__()
        self.model, self.own = model, own

    def forward(self, *args, **keywords):
        return self.model(*args, **keywords)


@pytest.mark.parametrize("wrap", [Wrapper, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_is_attached_inside_and_the_wrapper_works(wrap, model, expected):
    logits = model(prompt()).logits
    wrapped = wrap(model)
    with attach(wrapped) as engine:
        assert engine.model is model
        assert engine.generate(prompt(), max_new_tokens=12).tokens == expected
        with torch.no_grad():
            torch.testing.assert_close(wrapped(prompt()).logits, logits)


def test_a_wrapper_with_weights_of_its_own_is_refused(model):
    with pytest.raises(UnsupportedOption, match=r"weights of its own \(own.weight\)"):
        attach(Wrapper(model, nn.Linear(2, 2)))
    for other in ("a/folder", nn.Linear(2, 2), None):
        with pytest.raises(UnsupportedOption, match=r"prescope.load|no transformers model"):
            attach(other)


class Plus(nn.Module):
    def __init__(self, delta):
        super().__init__()
        self.delta = delta

    def forward(self, weight):
        return weight + self.delta


class Adapter(nn.Module):
    """Changes the weight during forward, as PEFT's target_parameters does."""

    def __init__(self, experts, delta):
        super().__init__()
        self.inner, self.delta = experts, nn.Parameter(delta)

    def forward(self, *args, **keywords):
        parametrize.register_parametrization(self.inner, "gate_up_proj", Plus(self.delta))
        try:
            return self.inner(*args, **keywords)
        finally:
            parametrize.remove_parametrizations(self.inner, "gate_up_proj", leave_parametrized=False)


@pytest.mark.parametrize("when", ["before", "while attached"])
def test_an_adapter_on_the_experts_is_refused_and_works_without_us(when, model, expected):
    engine = attach(model) if when != "before" else None
    for layer in model.model.layers:
        layer.mlp.experts = Adapter(layer.mlp.experts, 0.3 * torch.ones(8, 48, 32))
    with pytest.raises(UnsupportedExperts, match=r"merge_and_unload|detach"):
        attach(model) if engine is None else plain_tokens(model, prompt())
    if engine is not None:
        engine.detach()
    assert plain_tokens(model, prompt()) != expected
    for layer in model.model.layers:
        layer.mlp.experts = layer.mlp.experts.inner
    assert plain_tokens(model, prompt()) == expected


def test_an_adapter_on_attention_is_effective_at_once(model, expected):
    class LowRank(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    with attach(model) as engine:
        torch.manual_seed(1)
        before = addresses_of(model)
        model.model.layers[0].self_attn.q_proj = LowRank(model.model.layers[0].self_attn.q_proj)
        assert addresses_of(model) != before, "a captured step would go on without it"
        got = engine.generate(prompt(), max_new_tokens=12).tokens
        assert got != expected
    assert plain_tokens(model, prompt()) == got


def test_captured_steps_notice_replaced_weights_and_hooks(model):
    weight = model.lm_head.weight
    before = addresses_of(model)
    with torch.no_grad():
        weight.mul_(2.0)
    assert addresses_of(model) == before
    weight.data = weight.data.clone()
    assert addresses_of(model) != before
    with torch.no_grad():
        model(
            prompt(), output_hidden_states=True, output_router_logits=True
        )  # leaves hooks of transformers behind
    assert not has_hooks(model)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert has_hooks(model)
    handle.remove()
    with attach(model):
        assert not has_hooks(model), "the engine's own"


@pytest.mark.parametrize("of", ["model", "engine", "layer", "parameter"])
@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps, lambda x: torch.save(x, io.BytesIO())])
def test_copies_of_what_is_attached_are_refused(how, of, model, expected):
    with attach(model) as engine:
        layer = model.model.layers[1]
        found = {"model": model, "engine": engine, "layer": layer, "parameter": layer.mlp.experts.down_proj}[
            of
        ]
        with pytest.raises(PrescopeError, match=r"detach\(\)"):
            how(found)
        assert engine.generate(prompt(), max_new_tokens=12).tokens == expected
    assert plain_tokens(copy.deepcopy(model), prompt()) == expected


@pytest.mark.parametrize("what", ["experts", "attention", "spread"])
def test_weights_that_are_elsewhere_are_named_before_anything_moves(what, model):
    module = (
        model.model.layers[2].mlp.experts if what == "experts" else model.model.layers[1].self_attn.q_proj
    )
    if what == "spread":
        model.hf_device_map = {"model": "cuda:0", "lm_head": "cpu"}
    else:
        for name, weight in list(module.named_parameters()):
            module._parameters[name] = nn.Parameter(torch.empty_like(weight, device="meta"))
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedExperts, match="without device_map"):
        attach(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: no memory"),
    ],
)
@pytest.mark.parametrize("at_call", [0, 7])
def test_memory_that_runs_out_in_a_run_is_said_with_what_to_do(error, at_call, model, expected, monkeypatch):
    held = []

    class Activation:
        def __del__(self):
            held.append("freed")

    with attach(model) as engine:
        run, calls = engine.runner.kernel.run, iter(range(1000))

        def full(*args):
            activation = Activation()
            if next(calls) == at_call:
                raise error
            del activation
            held.clear()
            run(*args)

        monkeypatch.setattr(engine.runner.kernel, "run", full)
        with pytest.raises(NotEnoughMemory, match=r"6 slots take .*configure\(slots") as caught:
            engine.generate(prompt(), max_new_tokens=12)
        assert held, "what the failed run held is free although its error is kept"
        assert caught.value.__cause__ is error
        assert engine.generate(prompt(), max_new_tokens=12).tokens == expected
        engine.check_integrity()


# -- models without a generate of the usual kind ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("diffusion_gemma", "model.generate"),
        ("openai_privacy_filter", "model"),
        ("base of mixtral", "model"),
        ("base of qwen3_moe", "model"),
    ],
)
def test_a_model_that_does_not_add_token_by_token_is_told_what_to_call_and_that_works(name, call):
    family = name.removeprefix("base of ")
    whole = families.build(family)
    other = whole.base_model if name.startswith("base") else whole
    inputs = families.prompts(2)

    def run():
        if call == "model.generate":
            return families.greedy_ids(whole, family, inputs).tolist()
        return other(**inputs)[0]

    with torch.no_grad():
        expected = run()
        with prescope.attach(other, slots=0.5, **FAST_LINK) as engine:
            for prompts in (inputs, [[5, 6, 7]]):
                with pytest.raises(UnsupportedOption, match=re.escape(f"call {call}(...)")):
                    engine.generate(prompts, max_new_tokens=2)
            with engine.record() as results:
                found = run()
    assert len(results[0].steps)
    if call == "model":
        torch.testing.assert_close(found, expected)
    else:
        assert found == expected

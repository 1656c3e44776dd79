"""Weights of experts while their model is attached: whatever would read or write them is refused, nothing is lost.

One list of ways to change weights; one law: refused by an error that says what to do, and the engine goes on with all
the old weights; or effective. Which of the two, by what the same call does to the plain model.
"""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

import prescope
from prescope.errors import PrescopeError, UnsupportedExperts
from prescope.hf import HostParameter
from tests.support import families
from tests.support.families import FAMILIES
from tests.support.models import plain_tokens, prompt, tiny_moe

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"slots": 6, "device": "cpu", "link_gb_per_s": 50.0, "events": False}
OTHER = tiny_moe(seed=5)


def experts_of(model):
    return model.model.layers[1].mlp.experts


def no_grad(write: Callable[[nn.Parameter], object]) -> Callable[[PreTrainedModel], object]:
    """A write to one expert weight."""

    def change(model):
        with torch.no_grad():
            write(experts_of(model).down_proj)

    return change


REFUSED: dict[str, Callable[[PreTrainedModel], object]] = {
    "load_state_dict": lambda m: m.load_state_dict(OTHER.state_dict()),
    "load_state_dict, not strict": lambda m: m.load_state_dict(OTHER.state_dict(), strict=False),
    "load_state_dict, assign": lambda m: m.load_state_dict(OTHER.state_dict(), assign=True),
    "load_state_dict of the base": lambda m: m.model.load_state_dict(OTHER.model.state_dict()),
    "load_state_dict of a layer": lambda m: m.model.layers[1].load_state_dict(OTHER.model.layers[1].state_dict()),
    "load_state_dict of experts": lambda m: experts_of(m).load_state_dict(experts_of(OTHER).state_dict()),
    "data.copy_": no_grad(lambda p: p.data.copy_(experts_of(OTHER).down_proj)),
    "data =": no_grad(lambda p: setattr(p, "data", experts_of(OTHER).down_proj.data)),
    "copy_": no_grad(lambda p: p.copy_(experts_of(OTHER).down_proj)),
    "add_": no_grad(lambda p: p.add_(1.0)),
    "+=": no_grad(lambda p: p.__iadd__(1.0)),
    "zero_": no_grad(lambda p: p.zero_()),
    "detach().zero_": no_grad(lambda p: p.detach().zero_()),
    "an expert": no_grad(lambda p: p.__setitem__(3, 0.0)),
    "an expert's view": no_grad(lambda p: p[3].zero_()),
    "a view": no_grad(lambda p: p.view(-1).zero_()),
    "foreach": no_grad(lambda p: torch._foreach_add_([p], 1.0)),
    "out=": no_grad(lambda p: torch.add(p.data, 1.0, out=p)),
    "init": no_grad(lambda p: nn.init.normal_(p)),
    "set_": no_grad(lambda p: p.set_(experts_of(OTHER).down_proj.detach())),
    "data.set_": no_grad(lambda p: p.data.set_(experts_of(OTHER).down_proj.detach())),
    "set_ to nothing": no_grad(lambda p: p.set_()),
    "a parametrization": lambda m: parametrize.register_parametrization(experts_of(m), "down_proj", nn.Identity()),
    "vector": lambda m: nn.utils.vector_to_parameters(torch.zeros(80_000), m.parameters()),
    "apply(init)": lambda m: m.apply(m._init_weights),
    "to(dtype)": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double of the base": lambda m: m.model.double(),
    "half of a layer": lambda m: m.model.layers[1].half(),
    "half of experts": lambda m: experts_of(m).half(),
    "to(device)": lambda m: m.to("meta"),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "reading: state_dict": lambda m: m.state_dict(),
    "reading: state_dict of experts": lambda m: experts_of(m).state_dict(),
    "reading: clone": lambda m: experts_of(m).down_proj.clone(),
    "reading: an expert": lambda m: experts_of(m).down_proj[3],
    "reading: numpy": lambda m: experts_of(m).down_proj.detach().numpy(),
    "reading: norm": lambda m: experts_of(m).down_proj.norm().item(),
    "reading: a product": lambda m: torch.ones(1, 24) @ experts_of(m).down_proj[0].T,
}  # fmt: skip

EFFECTIVE: dict[str, Callable[[PreTrainedModel], object]] = {
    "other weights": lambda m: m.load_state_dict({"lm_head.weight": OTHER.lm_head.weight.detach()}, strict=False),
    "other weights, assign": lambda m: m.load_state_dict(
        {"lm_head.weight": OTHER.lm_head.weight.detach().clone()}, strict=False, assign=True
    ),
    "attention in place": lambda m: m.model.layers[1].self_attn.q_proj.weight.data.mul_(-1.0),
    "a router": lambda m: m.model.layers[1].mlp.gate.weight.data.mul_(-1.0),
    "the same dtype": lambda m: m.to(torch.float32),
    "the same device": lambda m: m.cpu(),
    "tie_weights": lambda m: m.tie_weights(),
    "resize_token_embeddings": lambda m: m.resize_token_embeddings(160, mean_resizing=False),
    "requires_grad_": lambda m: m.requires_grad_(False),
    "an optimizer without gradients": lambda m: torch.optim.AdamW(m.parameters()).step(),
    "clipping": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0),
    "train and eval": lambda m: m.train().eval(),
    "share_memory": lambda m: m.share_memory(),
    "another experts implementation": lambda m: m.set_experts_implementation("eager"),
}  # fmt: skip


@pytest.mark.parametrize("way", REFUSED)
def test_what_would_write_or_read_experts_is_refused_and_nothing_changes(way):
    model = tiny_moe()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens = plain_tokens(model, prompt())
    with prescope.attach(model, **SETTINGS) as engine:
        with pytest.raises(PrescopeError, match=r"detach\(\)"):
            REFUSED[way](model)
        if way in ("apply(init)", "vector"):
            return  # module by module in Python: those before the first experts were written, as the error says
        assert engine.generate(prompt(), max_new_tokens=12).tokens == tokens
        engine.check_integrity()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert plain_tokens(model, prompt()) == tokens


def test_no_method_of_a_tensor_that_writes_gets_by():
    """Each with no, one and two arguments of several kinds: refused, or not called at all for what it is given."""
    model = tiny_moe()
    kinds = (torch.zeros(8, 32, 24), 0, (8, 32, 24), torch.float32, lambda value: value)
    given = [(), *((one,) for one in kinds), *((one, other) for one in kinds for other in kinds)]
    writers = [name for name in dir(torch.Tensor) if name.endswith("_") and not name.startswith("_")]
    done = []
    with prescope.attach(model, **SETTINGS), torch.no_grad():
        weight = experts_of(model).down_proj
        for name in sorted(set(writers) - {"requires_grad_"}):
            for arguments in given:
                try:
                    getattr(weight, name)(*arguments)
                except (UnsupportedExperts, TypeError, RuntimeError, ValueError):
                    continue
                done.append((name, arguments))
    assert len(writers) > 100 and not done


@pytest.mark.parametrize("way", EFFECTIVE)
def test_what_leaves_the_experts_alone_is_effective(way):
    model, plain = tiny_moe(), tiny_moe()
    torch.manual_seed(0)
    EFFECTIVE[way](plain)
    tokens = plain_tokens(plain, prompt())
    with prescope.attach(model, **SETTINGS) as engine:
        torch.manual_seed(0)
        EFFECTIVE[way](model)
        assert engine.generate(prompt(), max_new_tokens=12).tokens == tokens
        assert plain_tokens(model, prompt()) == tokens
    found = model.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in plain.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]


@pytest.mark.parametrize("put", ["attribute", "parameters", "swap", "delete"])
def test_a_replaced_weight_is_refused_at_the_next_forward_and_stays(put):
    """Not every way to put something in a weight's place can be refused at once; it is never served as the old one."""
    model = tiny_moe()
    new = nn.Parameter(experts_of(OTHER).down_proj.detach().clone())
    engine = prescope.attach(model, **SETTINGS)
    experts = experts_of(model)
    if put == "attribute":
        experts.down_proj = new
    elif put == "parameters":
        experts._parameters["down_proj"] = new
    elif put == "swap":
        torch.utils.swap_tensors(experts.down_proj, new)
    else:
        del experts.down_proj
    with pytest.raises(UnsupportedExperts, match="down_proj of MoE layer 1 was replaced"):
        engine.generate(prompt(), max_new_tokens=3)
    engine.detach()
    if put in ("attribute", "parameters"):
        assert experts.down_proj is new
        plain = tiny_moe()
        experts_of(plain).down_proj = new
        assert plain_tokens(model, prompt()) == plain_tokens(plain, prompt())


def test_a_parameter_held_from_before_is_refused_too_and_comes_back():
    """An optimizer, an average of weights or a variable of the user's has the model's own Parameter objects."""
    model = tiny_moe()
    held = experts_of(model).down_proj
    before = held.detach().clone()
    optimizer = torch.optim.SGD([held], lr=1.0)
    with prescope.attach(model, **SETTINGS):
        for write in (lambda: held.add_(1.0), lambda: held.data.fill_(0.0), lambda: held.clone()):
            with torch.no_grad(), pytest.raises(UnsupportedExperts, match=r"detach\(\)"):
                write()
    assert experts_of(model).down_proj is held and type(held) is nn.Parameter and torch.equal(held, before)
    held.grad = torch.ones_like(held)
    optimizer.step()
    assert torch.equal(experts_of(model).down_proj, before - 1.0)


def test_facts_of_the_weights_can_be_asked_for():
    model = tiny_moe()
    facts = [(p.shape, p.dtype, p.device, p.numel(), p.nbytes, p.requires_grad) for p in model.parameters()]
    with prescope.attach(model, **SETTINGS):
        attached = [
            (p.shape, p.dtype, p.device, p.numel(), p.nbytes, p.requires_grad) for p in model.parameters()
        ]
        assert attached == facts
        assert model.num_parameters() == tiny_moe().num_parameters() and model.dtype is torch.float32
        assert "host rows" in repr(experts_of(model).down_proj)
        assert isinstance(experts_of(model).down_proj, nn.Parameter)


def test_files_are_not_written_without_the_experts(tmp_path):
    model = tiny_moe()
    with prescope.attach(model, **SETTINGS):
        for work in (
            lambda: model.save_pretrained(tmp_path / "a"),
            lambda: save_model(model, str(tmp_path / "b.safetensors")),
            lambda: save_file(dict(model.named_parameters()), tmp_path / "c.safetensors"),
            lambda: torch.save(model.state_dict(), tmp_path / "d.pt"),
            lambda: torch.save(dict(model.named_parameters()), tmp_path / "e.pt"),
        ):
            with pytest.raises(PrescopeError, match=r"detach\(\)"):
                work()
    assert not list(tmp_path.rglob("*.safetensors"))


class Adapted(nn.Module):
    """A wrapper with weights of its own, as an adapter's is."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.full((2,), 3.0))


def test_a_wrapper_saves_its_own_weights_and_nothing_of_the_experts(tmp_path):
    """Who saves an adapter takes its weights out of the whole state; refused, what was trained could not be kept."""
    model = tiny_moe()
    plain = Adapted(tiny_moe()).state_dict()
    with prescope.attach(model, **SETTINGS) as engine:
        wrapper = Adapted(model)
        state = wrapper.state_dict()
        assert state.keys() == plain.keys()
        experts = {name for name in state if ".experts." in name}
        assert len(experts) == 6 and all("host rows" in repr(state[name]) for name in experts)
        assert all(torch.equal(state[name], plain[name]) for name in state.keys() - experts)
        save_file({"scale": state["scale"]}, tmp_path / "adapter.safetensors")
        for work in (
            lambda: save_file(state, tmp_path / "a.safetensors"),
            lambda: save_model(wrapper, str(tmp_path / "b.safetensors")),
            lambda: torch.save(state, tmp_path / "c.pt"),
            lambda: torch.save(wrapper.state_dict(), tmp_path / "d.pt"),
            lambda: Adapted(tiny_moe()).load_state_dict(state),
            lambda: wrapper.load_state_dict(plain),
            lambda: {name: weight.clone() for name, weight in state.items()},
        ):
            with pytest.raises((PrescopeError, RuntimeError), match=r"detach\(\)"):
                work()
        engine.check_integrity()
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["adapter.safetensors"]
    assert all(torch.equal(weight, plain[name]) for name, weight in Adapted(model).state_dict().items())


# -- every family ----------------------------------------------------------------------------------------------------


@lru_cache
def model_of(name: str) -> PreTrainedModel:
    return families.build(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_refuses_writes_and_comes_back(name):
    model, other = model_of(name), families.build(name, seed=1).state_dict()
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    with prescope.attach(model, **SETTINGS):
        for change in (
            lambda: model.load_state_dict(other),
            lambda: model.load_state_dict(other, strict=False, assign=True),
            model.half,
            model.state_dict,
        ):
            with pytest.raises(UnsupportedExperts, match=r"detach\(\)"):
                change()
        weights = [p for p in model.parameters() if isinstance(p, HostParameter)]
        assert len(weights) >= 2
        for weight in weights:
            with torch.no_grad(), pytest.raises(UnsupportedExperts, match=r"detach\(\)"):
                weight.mul_(2.0)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], weight) for key, weight in before.items())


def gradients(model, name):
    """Of one forward, by name; as `families.logits`, but with a graph."""
    model.zero_grad(set_to_none=True)
    logits = families.logits.__wrapped__(model, name, families.prompts(2))
    logits.float().pow(2).mean().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_pass_the_frozen_experts_of_every_family(name):
    model = families.build(name)
    for experts in families.experts_modules(model).values():
        experts.requires_grad_(False)
    want = gradients(model, name)
    with prescope.attach(model, **SETTINGS):
        got = gradients(model, name)
    assert got.keys() == want.keys()
    for key, grad in want.items():
        assert (got[key] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-9, key


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_in_inference_mode(name):
    model = model_of(name)
    plain = families.logits(model, name, families.prompts(2))
    with torch.inference_mode():
        engine = prescope.attach(model, **SETTINGS)
        inside = families.logits(model, name, families.prompts(2))
    outside = families.logits(model, name, families.prompts(2))
    engine.detach()
    for logits in (inside, outside):
        assert (logits - plain).abs().max() <= 1e-5 * plain.abs().max()

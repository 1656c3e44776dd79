"""Every MoE family of the installed transformers gives the plain model's results with its experts elsewhere.

One list of families and one law each; the way the experts are served is `offloaded`, nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import prescope
from tests.support import families
from tests.support.distances import distance
from tests.support.families import FAMILIES, UNSUPPORTED

pytestmark = pytest.mark.usefixtures("one_thread")

TABLE = Path(__file__).resolve().parents[2] / "docs" / "families.md"

BATCHES = [1, 3]
SLOTS = ["top_k", "half", "all"]
GENERATING = [name for name, family in FAMILIES.items() if family.generates]

# Of the largest logit. Experts summed one token and one expert at a time, in reverse, move a logit by at
# most 2.2e-6 of it (minimax, float32, CPU), a wrong expert by at least 0.2. One per cent too much from every
# expert moves it by 6e-4 or more, except in the five families that normalise what the experts give.
TOLERANCE = 1e-5


def reference(
    experts: nn.Module, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """What an experts module computes, read off its attributes alone (T tokens, D model, K top-k)."""
    out_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
    for expert in ids_TK.unique().tolist():
        if expert >= experts.num_experts:
            continue
        token, rank = torch.where(ids_TK == expert)
        up = _project(experts, "gate_up_proj" if experts.has_gate else "up_proj", expert, hidden_TD[token])
        down = _project(
            experts, "down_proj", expert, (experts._apply_gate if experts.has_gate else experts.act_fn)(up)
        )
        if getattr(experts, "has_post_expert_norm", False):
            down = experts.post_expert_norm(down)
        out_TD.index_add_(0, token, (down * weights_TK[token, rank, None]).float())
    return out_TD.to(hidden_TD.dtype)


def _project(experts: nn.Module, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[expert]
    y = x @ (weight if experts.is_transposed else weight.T)
    return y + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else y


def with_a_wrong_expert(
    experts: nn.Module, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """A wrong answer: each token's last expert is replaced by its neighbour."""
    ids_TK = ids_TK.clone()
    ids_TK[:, -1] = (ids_TK[:, -1] + 1) % experts.num_experts
    return reference(experts, hidden_TD, ids_TK, weights_TK)


ALL_EXPERTS_FUNCTIONS.register("_test_reference", reference)
ALL_EXPERTS_FUNCTIONS.register("_test_wrong", with_a_wrong_expert)


@contextmanager
def implemented_by(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    before = model.get_experts_implementation()
    model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def offloaded(model: PreTrainedModel, slots: int) -> prescope.Engine:
    """Serve the experts from slots, on a link fast enough not to matter."""
    return prescope.attach(model, slots=slots, device="cpu", link_gb_per_s=50.0, events=False)


def num_slots(model: PreTrainedModel, name: str, share: str) -> int:
    """Slots of the whole pool: the fewest that can serve one token, half of all experts, all of them."""
    num_experts = sum(experts.num_experts for experts in families.experts_modules(model).values())
    return {"top_k": FAMILIES[name].top_k, "half": num_experts // 2, "all": num_experts}[share]


@lru_cache
def model_of(name: str) -> PreTrainedModel:
    return families.build(name)


@lru_cache
def plain_logits(name: str, batch: int) -> torch.Tensor:
    return families.logits(model_of(name), name, families.prompts(batch))


@lru_cache
def plain_ids(name: str, batch: int) -> torch.Tensor:
    return families.greedy_ids(model_of(name), name, families.prompts(batch))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_offloaded_logits_equal_the_plain_models(name, slots, batch):
    model = model_of(name)
    plain = plain_logits(name, batch)
    with offloaded(model, num_slots(model, name, slots)):
        logits = families.logits(model, name, families.prompts(batch))
    assert distance(logits, plain) < TOLERANCE


@pytest.mark.parametrize(
    ("slots", "batch"),
    [
        # Logits are compared in all six ways; generation adds the cache and one token at a time.
        ("top_k", 3),
        ("half", 1),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (("top_k", 1), ("half", 3), ("all", 1), ("all", 3))
        ),
    ],
)
@pytest.mark.parametrize("name", GENERATING)
def test_offloaded_generation_gives_the_plain_models_tokens(name, slots, batch):
    model = model_of(name)
    plain = plain_ids(name, batch)
    with offloaded(model, num_slots(model, name, slots)):
        ids = families.greedy_ids(model, name, families.prompts(batch))
    assert ids.tolist() == plain.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plain_model_comes_back(name):
    """Detaching is exact: the same kernels on the same weights, so the same bits."""
    model = model_of(name)
    plain = plain_logits(name, 1)
    with offloaded(model, num_slots(model, name, "half")):
        families.logits(model, name, families.prompts(1))
    assert torch.equal(families.logits(model, name, families.prompts(1)), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_expert_would_be_noticed(name):
    """Else the laws above would hold for a family whose experts never ran, or whose output hides them."""
    model = model_of(name)
    with implemented_by(model, "_test_wrong"):
        wrong = families.logits(model, name, families.prompts(1))
    assert distance(wrong, plain_logits(name, 1)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tiny_models_are_worth_comparing(name):
    """A model that routes all tokens alike, or repeats one token, hides a wrong expert or a stale slot."""
    model = model_of(name)
    used: dict[int, set[int]] = {}

    def note(experts, args):
        used.setdefault(id(experts), set()).update(args[1].flatten().tolist())

    hooks = [experts.register_forward_pre_hook(note) for experts in families.experts_modules(model).values()]
    logits = families.logits(model, name, families.prompts(3))
    for hook in hooks:
        hook.remove()
    assert torch.isfinite(logits).all()
    assert len(used) >= 2, "fewer than two MoE layers ran"
    assert min(len(experts) for experts in used.values()) > FAMILIES[name].top_k
    if FAMILIES[name].generates:
        assert len(set(plain_ids(name, 3).flatten().tolist())) >= 3


def test_a_call_without_tokens_is_served():
    """ernie4_5_vl_moe calls its text experts with nothing when there are only image tokens."""
    model = model_of("mixtral")
    module = next(iter(families.experts_modules(model).values()))
    empty = (torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    with offloaded(model, 4):
        assert module(*empty).shape == (0, 32)


def test_the_same_seed_gives_the_same_model():
    again = families.build("mixtral", seed=0).state_dict()
    other = families.build("mixtral", seed=1).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model_of("mixtral").state_dict().items())
    assert any(not torch.equal(other[key], value) for key, value in again.items())


def test_every_family_of_the_installed_transformers_is_accounted_for():
    """A new transformers brings new families: each is served or refused with a reason, never unknown."""
    assert set(families.decorated_packages()) == set(FAMILIES) | set(UNSUPPORTED)
    assert not set(FAMILIES) & set(UNSUPPORTED)


def test_at_least_forty_families_are_served():
    assert len(FAMILIES) >= 40


def test_the_table_lists_the_registry():
    """Names only: what else the table says may follow the installed transformers."""
    rows = [
        line.split("|")[1].strip()
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    listed = {row.strip("`") for row in rows}
    assert listed == {*FAMILIES, *families.missing(), *UNSUPPORTED}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_is_loaded_as_what_it_is(name, tmp_path):
    """Vision-language and other models are no AutoModelForCausalLM: the class stands in config.json."""
    model = families.build(name)
    model.save_pretrained(tmp_path)
    settings = {"slots": 1.0, "device": "cpu", "link_gb_per_s": 50.0, "events": False}
    with prescope.load(tmp_path, **settings) as engine:
        assert type(engine.model) is type(model)
        logits = families.logits(engine.model, name, families.prompts(1))
    # Not `plain_logits`: transformers itself does not give zaya its balancing biases back.
    again = type(model).from_pretrained(tmp_path).eval()
    assert distance(logits, families.logits(again, name, families.prompts(1))) < TOLERANCE

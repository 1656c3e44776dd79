"""LLaPor's networks in a few launches against torch's; in Triton's interpreter where there is no GPU."""

import pytest
import torch

from prescope.core.types import MoEShape
from prescope.engine.predicting import Predicting, of_step
from prescope.predictor import BadState, LayerGroups, Llapor, LlaporConfig, ModelTag, Routers

llapor_triton = pytest.importorskip("prescope.predictor.llapor_triton", reason="Triton exists for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = MoEShape(6, 12, 3)
WIDTH, PCA = 80, 40
FIXED = ("pca_mean", "pca", "whiten", "router")


def made(**settings) -> Llapor:
    """A predictor of random tensors: nothing in it is zero, one or alike."""
    config = LlaporConfig(width_outer=PCA, width_middle=PCA, hidden=48, block=24, lookahead=3, **settings)
    draw = torch.Generator().manual_seed(3)
    L, E = SHAPE[:2]
    pca = (
        torch.randn(L, 1, WIDTH, generator=draw) / 5, torch.randn(L, WIDTH, PCA, generator=draw) / WIDTH**0.5,
        torch.rand(L, 1, PCA, generator=draw) / PCA,
    )  # fmt: skip
    routers = Routers.of_weights(torch.randn(L, E, WIDTH, generator=draw) / WIDTH**0.5)
    groups = LayerGroups.at(2, 4, L, "for a test")
    fresh = Llapor.fresh(config, SHAPE, groups, pca, ModelTag(model="m", fingerprint="f"), routers, 0)
    tensors = {
        name: tensor + (name not in FIXED) * torch.randn(tensor.shape, generator=draw) / 3
        for name, tensor in fresh.tensors.items()
    }  # fmt: skip
    if config.residual:
        tensors["trust"] = torch.full((L, 1, 1), 0.8)
    return Llapor(config, SHAPE, groups, tensors, fresh.tag).to(DEVICE)


def case(tokens: int, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, WIDTH, generator=draw).to(dtype)
    ids = torch.stack(
        [torch.randperm(SHAPE.num_experts, generator=draw)[: SHAPE.top_k] for _ in range(tokens)]
    )
    ids[-1, 0] = -1
    weights = torch.rand(tokens, SHAPE.top_k, generator=draw).to(dtype)
    return x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE)


SETTINGS = {
    "default": {},
    "always trusted": {"trust": 0.0},
    "without the choice": {"use_choice": False},
    "the paper's": {"residual": False, "distill": 0.0},
    "plain logits": {"relative": False},
}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        # The number of tokens decides the tiles, the settings what is computed in them.
        pytest.param(name, tokens, marks=[pytest.mark.slow] if name != "default" and tokens != 3 else [])
        for name in SETTINGS
        for tokens in (1, 3, 16)
    ],
)
def test_scores_are_those_of_the_torch_networks(name, tokens):
    predictor, last = made(**SETTINGS[name]), SHAPE.num_layers - 1
    x, ids, weights = case(tokens, torch.bfloat16)
    for lookahead, layers in ((1, (0, last)), (3, range(last + 1))):
        foreseen = llapor_triton.LlaporKernels(predictor, lookahead)
        for layer in layers:
            expected = of_step(
                predictor.predict(layer, x, ids, weights)[:lookahead], lookahead, SHAPE.num_experts, x.device
            )
            found = foreseen(layer, x, ids, weights)
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
    spread = predictor.predict(0, x, ids, weights)[0].scores_TE
    assert spread.max() - spread.min() > 0.2, "scores that are all alike would test nothing"


@pytest.mark.parametrize("top_k", [1, SHAPE.num_experts - 1, SHAPE.num_experts])
def test_thresholds_are_right_at_any_top_k_and_with_ties(top_k):
    """Experts of equal logits: the K-th and the next one may be the same number. With K = E nobody is beyond it."""
    predictor = made()
    predictor.shape = SHAPE._replace(top_k=top_k)
    predictor.tensors["head"][..., 1::2] = predictor.tensors["head"][..., ::2].clone()
    predictor.tensors["skip"].zero_()
    predictor.tensors["head_bias"].zero_()
    x, ids, weights = case(3, torch.float32)
    found = llapor_triton.LlaporKernels(predictor, 3)(1, x, ids, weights)
    expected = of_step(predictor.predict(1, x, ids, weights), 3, SHAPE.num_experts, x.device)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def test_corrections_of_strange_states_fade_alike():
    predictor = made()
    x, ids, weights = case(2, torch.float32)
    near, far = (
        [p.scores_TE for p in predictor.predict(1, factor * x, ids, weights)] for factor in (0.1, 10.0)
    )
    assert not torch.allclose(near[0], far[0], atol=0.01)
    found = llapor_triton.LlaporKernels(predictor, 3)(1, 10.0 * x, ids, weights)
    torch.testing.assert_close(found[:, 0], torch.stack(far).sum(1), rtol=2e-4, atol=2e-5)


def test_a_schedule_asks_for_a_few_tokens_this_way_and_for_many_the_predictor_itself(monkeypatch):
    predictor = made()
    few = llapor_triton.LlaporKernels(predictor, 3)
    asked = []
    monkeypatch.setattr(
        Llapor, "predict", lambda self, *case, real=Llapor.predict: asked.append(1) or real(self, *case)
    )
    fast, slow = Predicting(predictor, 3, few), Predicting(predictor, 3)
    for tokens, times in ((few.most_tokens, 1), (few.most_tokens + 1, 2)):
        asked.clear()
        tensors = case(tokens, torch.float32)
        found, expected = fast.scores(1, *tensors), slow.scores(1, *tensors)
        assert len(asked) == times
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def test_what_does_not_fit_is_refused_as_by_the_predictor():
    x, ids, weights = case(1, torch.float32)
    with pytest.raises(BadState, match="wide"):
        llapor_triton.LlaporKernels(made(), 2)(0, x[:, 1:], ids, weights)

"""Kernels that compiled layers get instead of a library's, and the pass that puts them there."""

import os
import shutil
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton exists for Linux only")

from prescope.kernels import layer_options
from prescope.kernels.skinny_linear import MOST_TOKENS, skinny_linear
from prescope.kernels.topk import topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("tokens", [1, 3, MOST_TOKENS])
@pytest.mark.parametrize("sizes", [(48,), (40, 1), (33, 16, 17), (5, 70, 1, 24)])
def test_products_with_several_weights_are_torchs(tokens, sizes):
    x = numbers(tokens, 72)
    weights = [numbers(size, 72, seed=size) for size in sizes]
    for ours, weight in zip(skinny_linear(x, weights), weights, strict=True):
        torch.testing.assert_close(ours, x @ weight.T, rtol=1e-5, atol=1e-4)


def test_products_take_a_slice_of_a_wider_tensor():
    x, weight = numbers(4, 80)[:, 8:72], numbers(20, 64, seed=1)
    torch.testing.assert_close(skinny_linear(x, [weight])[0], x @ weight.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("columns", "k"), [(1, 1), (7, 7), (60, 6), (128, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_are_torchs(columns, k, dtype):
    x = numbers(5, columns, dtype=torch.float32).to(dtype)
    values, indices = topk(x, k)
    expected = x.topk(k)
    assert torch.equal(values, expected.values)
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_equal_scores_infinities_and_not_a_number_give_distinct_experts_in_torchs_order():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -0.0, 1.0, 1.0], [-inf, -inf, -inf, 2.0], [nan, inf, -nan, 1.0]], device=DEVICE)
    values, indices = topk(x, 3)
    assert indices.tolist() == [[2, 3, 0], [3, 0, 1], [0, 2, 1]]
    assert values[:2].tolist() == [[1.0, 1.0, 0.0], [2.0, -inf, -inf]]
    assert values[2].isnan().tolist() == [True, True, False]


class Layer(nn.Module):
    """Three projections of one input, one of another, a router and its choice; a biased one and a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, size, bias=False) for size in (32, 8, 8))
        self.out, self.biased = nn.Linear(32, 24, bias=False), nn.Linear(24, 24)
        self.router = nn.Linear(24, 12, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.biased(self.out(q * torch.cat([k, v, k, v], -1).sigmoid()))
        scores = self.router(x.flatten(0, 1)).softmax(-1)
        weights, experts = scores.topk(3, dim=-1)
        return x * weights.sum(-1).view(*x.shape[:2], 1), experts


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch compiles with g++, which is not here"
)
@pytest.mark.skipif(
    " " in torch.__file__,
    reason="torch's C++ compiler does not find torch in a folder with a blank in its name",
)
@pytest.mark.parametrize(("batch", "is_ours"), [(1, True), (4, True), (MOST_TOKENS + 1, False)])
def test_a_compiled_layer_gives_the_same_with_fewer_launches(monkeypatch, batch, is_ours):
    torch.manual_seed(0)
    layer, x = Layer().to(DEVICE), numbers(batch, 1, 24)
    launches: list[tuple[str, int]] = []
    for name, module in (("skinny", "skinny_linear"), ("topk", "topk")):
        kernel = __import__(f"prescope.kernels.{module}", fromlist=["_"])
        inner = getattr(kernel, f"_{module}")

        class Counted:
            def __getitem__(self, grid, inner=inner, name=name):
                def launch(*args, **kwargs):
                    launches.append((name, kwargs.get("NUM", 0)))
                    return inner[grid](*args, **kwargs)

                return launch

        monkeypatch.setattr(kernel, f"_{module}", Counted())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises on its own settings while it compiles
        expected, chosen = layer(x)
        torch.compiler.reset()
        ours, experts = torch.compile(layer, dynamic=False, options=layer_options())(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(experts, chosen)
    wanted = [("skinny", 1), ("skinny", 1), ("skinny", 3), ("topk", 0)] if is_ours else [("topk", 0)]
    if is_ours and DEVICE == "cuda" and len(launches) > len(wanted):
        wanted.insert(
            0, ("skinny", 1)
        )  # on a GPU Inductor may add the bias apart: that product is one like the others
    assert sorted(launches) == wanted

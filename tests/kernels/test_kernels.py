"""Kernels against float64, on random shapes: every family's layout, bias, ids of nobody, several rounds.

Triton runs in its interpreter where there is no GPU: the same source, element by element.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional

from prescope.cache.residency import LayerNeed, distinct
from prescope.kernels import ExpertsSpec, LayerWeights, TorchKernel, Work, combine
from tests.support.distances import norm_distance
from tests.support.gates import silu_gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

try:
    from prescope.kernels.triton_experts import TritonKernel
except ImportError:  # Triton exists for Linux only
    TritonKernel = None  # type: ignore[assignment,misc]

KERNELS = [
    TorchKernel,
    pytest.param(
        TritonKernel, marks=pytest.mark.skipif(TritonKernel is None, reason="Triton exists for Linux only")
    ),
]


def norm(y: torch.Tensor) -> torch.Tensor:
    return y * torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(y.dtype)


def make_case(
    seed: int, *, tokens: int, transposed: bool, bias: bool, post_norm: bool, sentinel: bool, dtype
):
    rng = torch.Generator().manual_seed(seed)
    experts, slots, k, d, f = 6, 4, 2, 48, 40

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    up, down = rand(experts, 2 * f, d) / 7, rand(experts, d, f) / 6
    up_bias, down_bias = rand(experts, 2 * f), rand(experts, d)
    x, weights = rand(tokens, d), rand(tokens, k).abs()
    ids = torch.stack([torch.randperm(experts, generator=rng)[:k] for _ in range(tokens)])
    if sentinel:
        ids[0, 0], ids[-1, 1] = experts, -1
    full = {
        "up": up,
        "down": down,
        "up_bias": up_bias if bias else None,
        "down_bias": down_bias if bias else None,
    }
    expected = torch.zeros(tokens, d, dtype=torch.float64)
    for t in range(tokens):
        for j in range(k):
            e = int(ids[t, j])
            if 0 <= e < experts:
                y = functional.linear(
                    silu_gate(functional.linear(x[t], up[e], up_bias[e] if bias else None)),
                    down[e],
                    down_bias[e] if bias else None,
                )
                expected[t] += (norm(y) if post_norm else y) * weights[t, j]
    spec = ExpertsSpec(
        up="gate_up_proj", down="down_proj", up_bias="b" if bias else None, down_bias="b" if bias else None,
        is_transposed=transposed, gate=silu_gate, post_norm=norm if post_norm else None,
    )  # fmt: skip
    return full, spec, x, ids, weights, expected, experts, slots, dtype


def run_in_rounds(kernel, case) -> torch.Tensor:
    """Serve the case with fewer slots than experts: each round overwrites the slots of the one before."""
    full, spec, x, ids, weights, _, experts, num_slots, dtype = case

    def pool(name: str) -> torch.Tensor | None:
        tensor = full[name]
        if tensor is None:
            return None
        if spec.is_transposed and tensor.dim() == 3:
            tensor = tensor.transpose(1, 2)
        return torch.full((num_slots, *tensor.shape[1:]), float("nan"), dtype=dtype, device=DEVICE)

    pools = {name: pool(name) for name in full}
    host_ids = ids.numpy()
    needed, tokens = distinct(host_ids, experts)
    work = Work(
        x_TD=x.to(DEVICE, dtype),
        ids_TK=ids.to(DEVICE),
        host_ids_TK=host_ids,
        need=LayerNeed(0, needed, tokens, 0, 0),
        num_experts=experts,
        out_PD=torch.zeros(ids.numel(), x.shape[1], dtype=dtype, device=DEVICE),
        num_rounds=-(-len(needed) // (num_slots - 1)),
        slot_row=np.full(experts, -1),
        version=0,
    )
    kernel.prepare(work)
    for first in range(0, len(needed), num_slots - 1):
        chunk = needed[first : first + num_slots - 1]
        slots = np.arange(len(chunk))[::-1] + 1
        for expert, slot in zip(chunk, slots, strict=True):
            for name, target in pools.items():
                if target is not None:
                    source = full[name][expert]
                    target[slot] = (source.T if spec.is_transposed and source.dim() == 2 else source).to(
                        dtype
                    )
        work.slot_row[chunk] = slots
        layer = LayerWeights(pools["up"], pools["down"], pools["up_bias"], pools["down_bias"])
        kernel.run(work, spec, layer, chunk, slots)
    return combine(work.out_PD, weights.to(DEVICE, dtype), dtype).cpu()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
def test_a_kernel_equals_float64_in_any_layout(kernel, tokens, transposed, bias, post_norm):
    """float32 sums of 48 terms differ from float64 by about 1e-6; 1e-5 leaves room, a wrong weight gives 1e-1."""
    case = make_case(
        tokens,
        tokens=tokens,
        transposed=transposed,
        bias=bias,
        post_norm=post_norm,
        sentinel=False,
        dtype=torch.float32,
    )
    assert norm_distance(run_in_rounds(kernel(), case), case[5]) < 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [2, 30])
def test_ids_of_no_expert_contribute_nothing(kernel, tokens):
    """Routers of some families mask experts with ids outside [0, E)."""
    case = make_case(
        5, tokens=tokens, transposed=False, bias=True, post_norm=False, sentinel=True, dtype=torch.float32
    )
    assert norm_distance(run_in_rounds(kernel(), case), case[5]) < 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_rounds_no_more_than_once_per_linear(kernel):
    """Two roundings of 2**-9 and the sum's: anything above 1e-2 is an accumulation in half precision.

    Triton's interpreter multiplies bfloat16 as if it were integers (seen with 3.6.0), so it gets float16.
    """
    dtype = torch.bfloat16 if DEVICE == "cuda" or kernel is TorchKernel else torch.float16
    case = make_case(9, tokens=20, transposed=False, bias=False, post_norm=False, sentinel=False, dtype=dtype)
    assert norm_distance(run_in_rounds(kernel(), case), case[5]) < 1e-2

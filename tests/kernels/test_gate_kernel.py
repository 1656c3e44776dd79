"""A gate in one launch gives what the family's own code gives, to the bit; in Triton's interpreter without a GPU."""

import pytest
import torch
from torch.nn import functional

from prescope.kernels import ExpertsSpec
from tests.support.gates import alternating, silu_gate

gate_kernel = pytest.importorskip("prescope.kernels.gate_kernel", reason="Triton exists for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def no_product(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return torch.maximum(gate, up)


def of_one_width(h: torch.Tensor) -> torch.Tensor:
    return silu_gate(h) * torch.linspace(0.5, 2.0, 40, device=h.device).to(h.dtype)


def spec_of(gate) -> ExpertsSpec:
    return ExpertsSpec(
        up="up", down="down", up_bias=None, down_bias=None, is_transposed=False, gate=gate, post_norm=None
    )


#: Triton's interpreter cuts off what it should round to bfloat16 (seen with 3.7.1).
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [silu_gate, alternating, no_product, of_one_width, functional.gelu])
def test_a_gate_gives_what_the_familys_own_code_gives(gate, dtype):
    h = (torch.randn(3, 80, generator=torch.Generator().manual_seed(0)) * 4).to(DEVICE, dtype)
    width = 80 if gate is functional.gelu else 40
    found = gate_kernel.Gates().apply(spec_of(gate), h, width)
    assert found.is_contiguous() and torch.equal(found, gate(h))


def test_layers_with_gates_alike_share_their_tables():
    gates, h = gate_kernel.Gates(), torch.randn(1, 80).to(DEVICE, torch.float16)
    for gate in (silu_gate, lambda x: silu_gate(x), alternating):
        for _ in range(2):
            gates.apply(spec_of(gate), h, 40)
    assert len(gates._known) == 2

"""What a GPU that is not here would need for the expert and layer kernels, compiled by Triton without one.

python -m tests.support.compiled_for 86    # compute capability 8.6; JSON: bytes of shared memory by launch
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from prescope.kernels import packed_linear, skinny_linear, triton_experts
from prescope.weights.formats import Fp8, Int4, Int8, Mxfp4, Nvfp4, PackedMatrices

S, P, WIDE, NARROW = 4, 8, 2048, 768
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = (Int8(None), Fp8(128, 128), Mxfp4(), Nvfp4(), Int4(128), Int4(32, torch.bfloat16, True))


class AbsentGpu:
    """As Triton asks its driver while it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def recorder(found: dict[str, int]) -> Callable[..., None]:
    """`launch` that compiles only, and takes down the shared memory."""

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        sizes = {name: value for name, value in options.items() if name.startswith(("BLOCK", "num"))}
        tensors = [str(one.dtype) for one in arguments if isinstance(one, torch.Tensor)]
        name = f"{kernel.__name__} {' '.join(tensors[:2])} {sizes}"  # one for all formats
        found[name] = max(found.get(name, 0), compiled.metadata.shared)

    return compile_only


def launch_all() -> None:
    """Whatever tile is taken without tuning, of each kind of weights."""
    order, blocks = torch.zeros(P, dtype=torch.int32), torch.zeros((S, 3), dtype=torch.int32)
    for dtype in DTYPES:
        x, out = torch.empty((P, WIDE), dtype=dtype), torch.empty((P, NARROW), dtype=dtype)
        plain = [
            triton_experts.Linear(x, 1, torch.empty((S, NARROW, WIDE), dtype=dtype), None, out, False),
            triton_experts.Linear(x, 1, torch.empty((S, WIDE, NARROW), dtype=dtype), None, out, True),
        ]
        packed = [
            packed_linear.PackedLinear(x, 1, _slots(format, dtype), None, out)
            for format in FORMATS
            if dtype != torch.float16
        ]
        for linear in (*plain, *packed):
            for block_m in (16, 128):
                linear.tiles(order, blocks, len(blocks), block_m)
        for tokens in (1, skinny_linear.MOST_TOKENS):
            for columns in (NARROW, 2 * WIDE):
                weights = [torch.empty((NARROW, columns), dtype=dtype)]
                skinny_linear.skinny_linear(torch.empty((tokens, columns), dtype=dtype), weights)


def _slots(format: Any, dtype: torch.dtype) -> PackedMatrices:
    shape = (NARROW, WIDE)
    parts = {part.suffix: torch.empty((S, *part.shape), dtype=part.dtype) for part in format.parts(shape)}
    return PackedMatrices(format, parts, shape, dtype)


if __name__ == "__main__":
    shared: dict[str, int] = {}
    triton.runtime.driver.set_active(AbsentGpu(int(sys.argv[1])))
    for module in (triton_experts, packed_linear, skinny_linear):
        module.launch = recorder(shared)  # type: ignore[attr-defined]
    launch_all()
    print(json.dumps(shared))

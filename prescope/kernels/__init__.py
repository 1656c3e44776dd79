"""Expert kernels: plain torch everywhere, Triton on CUDA."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from ..core.types import MoEShape
from ..errors import UnsupportedOption
from ..weights.layout import RowLayout
from .base import (
    CannotLaunch,
    ExpertKernel,
    ExpertsSpec,
    LayerWeights,
    StepLog,
    TensorFunction,
    Work,
    layer_weights,
)
from .packed_forms import packed_problem
from .reference import TorchKernel, combine, expert_output

if TYPE_CHECKING:
    from .graph_buffers import DeviceTable, HostOptions

__all__ = [
    "MOST_PAIRS",
    "CannotLaunch",
    "ExpertKernel",
    "ExpertsSpec",
    "LayerWeights",
    "StepLog",
    "TensorFunction",
    "TorchKernel",
    "Work",
    "combine",
    "expert_output",
    "layer_options",
    "layer_weights",
    "make_device_table",
    "make_host_options",
    "make_kernel",
]

#: Most pairs of token and expert in one layer of a captured step: one program sorts them.
MOST_PAIRS = 2048
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make_kernel(
    name: str, device_kind: str, dtype: torch.dtype, layouts: Sequence[RowLayout] = ()
) -> tuple[ExpertKernel, str]:
    """The kernel a setting means here, with the reason.

    Args:
        dtype: of what is computed.
        layouts: of what slots hold, where it may be packed.

    Raises:
        UnsupportedOption: "triton" where it cannot run.
    """
    problem = _triton_problem(device_kind, dtype, layouts)
    if name == "triton" and problem:
        raise UnsupportedOption(f"kernels='triton' cannot run here: {problem}; use kernels='torch'")
    if name == "torch" or problem:
        return TorchKernel(), "as given" if name == "torch" else problem
    # Triton is large and exists only where there is a GPU, so it is imported only where it is used.
    from .triton_experts import TritonKernel

    return TritonKernel(), "as given" if name == "triton" else "CUDA with Triton"


def _triton_problem(device_kind: str, dtype: torch.dtype, layouts: Sequence[RowLayout]) -> str:
    if device_kind != "cuda":
        return "Triton kernels need CUDA"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"Triton kernels take {TRITON_DTYPES}, the experts are {dtype}"
    return next(filter(None, map(packed_problem, layouts)), "")


@cache
def layer_options() -> dict[str, Any]:
    """Options of `torch.compile` for decoder layers in captured steps; always the same object.

    With other options dynamo takes every layer for one that it has not compiled.
    """
    from .inductor_pass import FewTokens

    return {"post_grad_custom_post_pass": FewTokens()}


def make_host_options(**settings: Any) -> "HostOptions":
    """What a schedule adds to a captured step; see `graph_buffers.HostOptions`."""
    from .graph_buffers import HostOptions

    return HostOptions(**settings)


def make_device_table(shape: MoEShape, num_slots: int, device: torch.device) -> "DeviceTable":
    """The residency table's copy on a GPU, for captured steps."""
    from .graph_buffers import DeviceTable

    return DeviceTable(shape, num_slots, device)

"""Whether a predictor can be part of a graph: tried, since anybody may write one.

Captured, Python runs once: what it decides, draws or remembers stays as it was then, and what it reads back from the
GPU cannot be read. Shapes: T tokens, D model width, K top-k, L MoE layers, E experts, d layers ahead.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...device import Device
from ..predicting import Predicting

#: Answers of a graph are the predictor's own if they are this near: kernels may be others.
RELATIVE, ABSOLUTE = 1e-2, 1e-3


class NotInGraph(Exception):
    """An operation that no graph can hold."""


class _OnDevice(TorchDispatchMode):
    """Refuses operations that need the host."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise NotInGraph("it reads a number back from the device")
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.device != self._device:
                raise NotInGraph(f"it works with tensors on {leaf.device}, the model runs on {self._device}")
        return out


def why_not_in_graph(
    predicting: Predicting,
    device: Device,
    layers: Iterable[int],
    num_tokens: int,
    width: int,
    dtype: torch.dtype,
) -> str:
    """Why a predictor has to run beside the graph, "" if it need not: its own capture gives what it gives itself.

    Args:
        layers: MoE layers it is asked at. `num_tokens`, `width`, `dtype`: of the router inputs there.
    """
    if predicting.is_forced:
        return ""
    # A fast path is made for graphs: it is asked once, since it may not run here.
    is_fast = num_tokens <= predicting.most_fast_tokens
    if predicting.observing is not None and not is_fast:
        return "it learns from what layers used, which it is told in Python"
    where = device.torch_device
    generator = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return torch.randn(num_tokens, width, generator=generator, dtype=torch.float32, device="cpu").to(
            where, dtype
        )

    shape = predicting.predictor.shape
    inputs = draw()
    ids_TK = torch.arange(shape.top_k, device=where).expand(num_tokens, -1).contiguous()
    weights_TK = torch.full((num_tokens, shape.top_k), 1.0 / shape.top_k, device=where, dtype=dtype)

    def answers() -> torch.Tensor:
        return torch.stack([predicting.scores(layer, inputs, ids_TK, weights_TK) for layer in layers])

    try:
        with torch.no_grad():
            answers()  # what it does once, it has done
        if is_fast:
            return ""
        with torch.no_grad(), _OnDevice(where):
            answers()
        with torch.no_grad():
            replay, found = device.capture(answers)
            for _ in range(2):
                inputs.copy_(draw())
                expected = answers()
                replay()
                device.synchronize()
                if found.shape != expected.shape or not torch.allclose(found, expected, RELATIVE, ABSOLUTE):
                    return (
                        "captured, its answers are not its own: it decides or remembers something in Python"
                    )
    except Exception as error:  # noqa: BLE001 - it may be anybody's code: whatever it is, it is not captured
        return str(error) or type(error).__name__
    return ""

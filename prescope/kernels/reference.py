"""Expert computation in plain torch, one expert after the other: the reference, and the CPU's kernel."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..cache.residency import IntArray
from .base import ExpertsSpec, LayerWeights, Work


class TorchKernel:
    """Loops over experts; each is two matrix products over its own tokens."""

    name = "torch"
    serves_unread = False

    def __init__(self) -> None:
        self._order = torch.empty(0, dtype=torch.int64, device="cpu")  # pairs sorted by expert
        self._first = np.zeros(1, dtype=np.int64)  # first place of each expert in that order

    def prepare(self, work: Work) -> None:
        flat = work.host_ids_TK.ravel()
        order = np.argsort(flat, kind="stable")
        self._first = np.searchsorted(flat[order], np.arange(work.num_experts + 1))
        self._order = torch.from_numpy(order).to(work.x_TD.device, non_blocking=True)

    def run(
        self,
        work: Work,
        spec: ExpertsSpec,
        weights: LayerWeights,
        experts: IntArray,
        slots: IntArray,
    ) -> None:
        top_k = work.ids_TK.shape[1]
        for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
            pairs = self._order[self._first[expert] : self._first[expert + 1]]
            x = work.x_TD[pairs // top_k]
            work.out_PD[pairs] = expert_output(x, spec, weights, slot)

    def slots_on_device(self, *_: Any) -> torch.Tensor:
        raise AssertionError("it takes slots from the host")

    def run_unread(self, *_: Any) -> torch.Tensor:
        raise AssertionError("it loops over experts, and so must know which are chosen")


def expert_output(x: torch.Tensor, spec: ExpertsSpec, weights: LayerWeights, slot: int) -> torch.Tensor:
    """What the expert in a slot makes of its tokens (n, D); packed matrices are unpacked for it."""
    h = _linear(x, weights.up[slot], _at(weights.up_bias, slot), spec.is_transposed)
    y = _linear(spec.gate(h), weights.down[slot], _at(weights.down_bias, slot), spec.is_transposed)
    return y if spec.post_norm is None else spec.post_norm(y)


def _at(bias: torch.Tensor | None, slot: int) -> torch.Tensor | None:
    return None if bias is None else bias[slot]


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool
) -> torch.Tensor:
    if not is_transposed:
        return functional.linear(x, weight, bias)
    y = x @ weight
    return y if bias is None else y + bias


def combine(out_PD: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of each token's pairs times their router weights, (T, D).

    In the order of the top-k and in the wider of the two dtypes, as transformers' `grouped_mm` and `batched_mm`
    experts do (transformers/integrations/moe.py): tokens can only be equal if roundings happen at the same places.
    """
    num_tokens, top_k = weights_TK.shape
    weighted = out_PD.view(num_tokens, top_k, -1) * weights_TK.unsqueeze(-1)
    return weighted.sum(dim=1).to(dtype)

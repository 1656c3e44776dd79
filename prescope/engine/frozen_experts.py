"""Gradients through experts that are not trained themselves: to the layers before them, and to their router.

Forward from slots, as always; backward expert by expert from the host rows, so that neither keeps a slot nor more
than one expert on the device. Shapes: T tokens, K top-k, D model width, n tokens of an expert.
"""

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ..errors import NotAttached, UnsupportedOption
from ..hf import MoELayer, ServeFunction
from ..kernels import ExpertsSpec, LayerWeights, expert_output
from ..weights.host_pool import HostLayer, HostPool


class FrozenExperts(torch.autograd.Function):
    """A layer's experts as a function of x (T, D) and router weights (T, K).

    Those of its weights that require gradients are inputs too, so that a backward pass to them is refused.
    """

    @staticmethod
    def forward(
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        serve: ServeFunction,
        layer: MoELayer,
        host: HostPool,
        *trained: torch.nn.Parameter,
    ) -> torch.Tensor:
        return serve(layer.moe_layer, x_TD.detach(), ids_TK, weights_TK.detach())

    # Apart from `forward`, so that transforms of torch.func find it.
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x_TD, weights_TK, ids_TK, _, ctx.layer, ctx.host, *_ = inputs
        ctx.save_for_backward(x_TD, weights_TK, ids_TK)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[torch.Tensor, int]:
        """Over one more dimension: experts know no order of tokens, so it becomes more of them."""
        out: torch.Tensor = FrozenExperts.apply(*_folded(info.batch_size, in_dims, inputs[:3]), *inputs[3:])
        return out.unflatten(0, (info.batch_size, -1)), 0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer: MoELayer = ctx.layer
        if not ctx.host.layers:
            raise NotAttached("the engine was detached between forward and backward; run the forward again")
        if any(ctx.needs_input_grad[6:]):
            raise UnsupportedOption(
                f"{layer.name} has weights that require gradients, and experts in host rows are not trained; freeze "
                f"them (model.{layer.name}.requires_grad_(False)), or call detach() before training"
            )
        x_TD, weights_TK, ids_TK = ctx.saved_tensors
        rows: HostLayer = ctx.host.layers[layer.moe_layer]
        found = _Gradients.apply(x_TD, ids_TK, weights_TK, grads[0], layer, rows)
        needed = zip(found, ctx.needs_input_grad, strict=False)
        wanted = [grad if is_needed else None for grad, is_needed in needed]
        return (*wanted, *(None for _ in ctx.needs_input_grad[len(wanted) :]))


class _Gradients(torch.autograd.Function):
    """`gradients` as a function of its tensors: to it, too, transforms of torch.func hand their own."""

    @staticmethod
    def forward(
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        grad_TD: torch.Tensor,
        layer: MoELayer,
        rows: HostLayer,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients(layer, rows, x_TD, ids_TK, weights_TK, grad_TD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass  # it is not differentiated itself

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, int]]:
        found = _Gradients.apply(*_folded(info.batch_size, in_dims, inputs[:4]), *inputs[4:])
        return tuple(grad.unflatten(0, (info.batch_size, -1)) for grad in found), (0, 0)


def _folded(
    size: int, in_dims: tuple[int | None, ...], values: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    """Tensors of tokens with one more dimension of a size as tensors of so many times more tokens."""
    return [
        (value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(0, 1)
        for value, dim in zip(values, in_dims, strict=False)
    ]


def gradients(
    layer: MoELayer,
    rows: HostLayer,
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    grad_TD: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x (T, D) and of the router weights (T, K), from that of the layer's output (T, D)."""
    grad_x_TD, grad_weights_TK = torch.zeros_like(x_TD), torch.zeros_like(weights_TK)
    for expert in np.unique(ids_TK.cpu().numpy()).tolist():
        if not 0 <= expert < layer.num_experts:
            continue
        token, rank = torch.where(ids_TK == expert)
        one = _weights_of(expert, layer.spec, rows, x_TD.device)
        with torch.enable_grad():
            x = x_TD[token].detach().requires_grad_()
            y = expert_output(x, layer.spec, one, 0)
        grad = grad_TD[token]
        grad_weights_TK[token, rank] = (grad * y.detach()).sum(-1).to(grad_weights_TK.dtype)
        of_output = (grad * weights_TK[token, rank, None]).to(y.dtype)
        grad_x_TD.index_add_(0, token, torch.autograd.grad(y, x, of_output)[0])
    return grad_x_TD, grad_weights_TK


def _weights_of(expert: int, spec: ExpertsSpec, rows: HostLayer, device: torch.device) -> LayerWeights:
    """One expert's weights (1, ...) where its tokens are."""

    def field(name: str) -> torch.Tensor:
        return rows.layout.matrices(rows.rows, name)[expert].unsqueeze(0).to(device)

    return LayerWeights(
        up=field(spec.up),
        down=field(spec.down),
        up_bias=field(spec.up_bias) if spec.up_bias else None,
        down_bias=field(spec.down_bias) if spec.down_bias else None,
    )

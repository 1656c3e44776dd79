"""Find a transformers model's MoE layers and say how their experts compute.

transformers routes every experts module marked `use_experts_implementation` through a registry of functions
(transformers/integrations/moe.py). The module itself says what it is: `has_gate`, `has_bias`, `is_transposed`, its
gate function and its stacked weights. So one function serves all families.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.types import ExpertSize
from ..errors import NotAMoE, UnsupportedExperts
from ..kernels import ExpertsSpec
from ..weights.layout import RowLayout, row_layout
from .host_parameter import HostParameter, LostParameter

#: What `use_experts_implementation` sets on every experts module.
_MARKS = ("has_gate", "has_bias", "is_transposed")


@dataclass(frozen=True)
class MoELayer:
    """One experts module of the model."""

    moe_layer: int  # rank among the MoE layers
    decoder_layer: int  # index in the model's layer list, -1 if the name has none
    name: str  # dotted module name
    module: nn.Module
    twins: tuple[nn.Module, ...]  # modules that share its parameters, such as a decoder tied to an encoder
    num_experts: int
    spec: ExpertsSpec
    weight_names: tuple[str, ...]
    layout: RowLayout
    #: Fields (E, ...) of all experts, read or made anew, where they are not the module's weights as they are.
    read_fields: Callable[[], dict[str, torch.Tensor]] | None = None
    is_lossy: bool = False  # whether those differ from the checkpoint's
    is_read_whole: bool = False  # whether the module's weights are in memory before those are made of them

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stacked expert weights (E, ...) by name."""
        return {name: getattr(self.module, name) for name in self.weight_names}

    @property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of an expert's matrices by name, N outputs and K inputs."""
        shapes = {name: self.layout.shape(name) for name in (self.spec.up, self.spec.down)}
        is_turned = self.spec.is_transposed
        return {name: (b, a) if is_turned else (a, b) for name, (a, b) in shapes.items()}

    @property
    def bias_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of an expert's biases, if it has some."""
        names = (self.spec.up_bias, self.spec.down_bias)
        return {name: self.layout.shape(name) for name in names if name is not None}

    @property
    def nbytes(self) -> int:
        """Of the rows of all experts."""
        return self.num_experts * self.layout.row_bytes

    @property
    def expert_size(self) -> ExpertSize:
        """Bytes of a row, and the sizes of an expert's matrices."""
        width, expert_width = self.matrix_shapes[self.spec.down]
        return ExpertSize(self.layout.row_bytes, width, expert_width)


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """All experts modules of a model in the order in which they are registered, which is that of the layers.

    Raises:
        NotAMoE: there is none.
        UnsupportedExperts: one holds its weights in a form that cannot be moved expert by expert.
    """
    for name, module in model.named_modules():
        if _is_packed_by_transformers(module):
            raise UnsupportedExperts(
                f"{name} is a {type(module).__name__}, in which transformers keeps packed experts for kernels of its "
                f"own; load the checkpoint with prescope.load(folder), which serves it packed"
            )
    found = [
        (name, module)
        for name, module in model.named_modules()
        if all(hasattr(module, mark) for mark in _MARKS) and hasattr(module, "num_experts")
    ]
    if not found:
        raise NotAMoE(
            f"{type(model).__name__} has no MoE layer that goes through transformers' experts interface; prescope "
            f"serves mixture-of-experts models (Mixtral, Qwen3-MoE, OLMoE, ...; docs/families.md lists them)"
        )
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in found:
        owners.setdefault(id(module.down_proj), []).append((name, module))
    return [
        _moe_layer(rank, *same[0], tuple(module for _, module in same[1:]))
        for rank, same in enumerate(owners.values())
    ]


def _is_packed_by_transformers(module: nn.Module) -> bool:
    """Whether a quantizer has put its own module in the place of a family's experts (FP8Experts, ...)."""
    kind = type(module)
    return kind.__module__.startswith("transformers.integrations.") and kind.__name__.endswith("Experts")


def top_k_of(model: PreTrainedModel) -> int:
    """Experts per token that the configuration names, the largest of all sub-configurations; 1 if none does."""
    names = (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "top_k_experts",
        "moe_k",
    )
    configs = [model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)]
    values: list[int] = []
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                values.append(value)
            elif isinstance(value, list) and value:
                values.append(max(value))
    return max(values, default=1)


def _moe_layer(rank: int, name: str, module: Any, twins: tuple[nn.Module, ...]) -> MoELayer:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, "down_proj"]
    if module.has_bias:
        names = [up, f"{up}_bias", "down_proj", "down_proj_bias"]
    tensors: dict[str, torch.Tensor] = {}
    for weight in names:
        tensor = getattr(module, weight, None)
        if isinstance(tensor, LostParameter):
            tensor.refuse(f"attaching a model without its experts ({name}.{weight})")
        is_plain = type(tensor) in (nn.Parameter, HostParameter)
        if not isinstance(tensor, nn.Parameter) or not is_plain or tensor.shape[0] != module.num_experts:
            what = (
                "missing" if tensor is None else f"a {type(tensor).__name__} of shape {tuple(tensor.shape)}"
            )
            raise UnsupportedExperts(
                f"{name}.{weight} is {what}; prescope needs one stacked parameter of {module.num_experts} experts"
            )
        if not tensor.dtype.is_floating_point or tensor.element_size() < 2:
            raise UnsupportedExperts(
                f"{name}.{weight} is {tensor.dtype}; a packed checkpoint is served by prescope.load(folder), a model "
                f"in memory has to be in bfloat16, float16 or float32"
            )
        tensors[weight] = tensor
    spec = ExpertsSpec(
        up=up,
        down="down_proj",
        up_bias=f"{up}_bias" if module.has_bias else None,
        down_bias="down_proj_bias" if module.has_bias else None,
        is_transposed=module.is_transposed,
        gate=module._apply_gate if module.has_gate else module.act_fn,
        # Set by transformers from 5.2x on; earlier versions have no family with a norm behind its experts.
        post_norm=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
    )
    index = re.search(r"\.(\d+)\.", name)
    return MoELayer(
        moe_layer=rank,
        decoder_layer=int(index[1]) if index else -1,
        name=name,
        module=module,
        twins=twins,
        num_experts=module.num_experts,
        spec=spec,
        weight_names=tuple(names),
        layout=row_layout(tensors),
    )

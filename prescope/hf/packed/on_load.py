"""Packing experts while they are loaded: plain weights in, rows of fewer bits out. The numbers change."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from ...kernels import ExpertsSpec
from ...kernels.cpu import physical_cores
from ...weights.formats import format_for
from ...weights.layout import PackedMatrix, Packing, pack, packed_layout
from ..moe_layers import MoELayer
from .gate_order import in_two_halves, is_interleaved
from .in_files import ExpertsInFiles


def packed_on_load(
    layers: Sequence[MoELayer], name: str, files: ExpertsInFiles | None = None
) -> list[MoELayer]:
    """The layers with rows in the format of that name (`formats.PACKED`).

    Args:
        files: where their weights are; None: in their modules, where they stay until their rows are filled.

    Raises:
        UnsupportedOption: rows of their lengths cannot be packed so.
    """
    return [_packed(layer, name, files) for layer in layers]


def _packed(layer: MoELayer, name: str, files: ExpertsInFiles | None) -> MoELayer:
    spec = layer.spec
    shapes = layer.matrix_shapes
    format = format_for(name, *(columns for _, columns in shapes.values()))
    matrices = [PackedMatrix(matrix, format, shape) for matrix, shape in shapes.items()]
    layout = packed_layout(matrices, layer.layout.dtype(spec.up), layer.bias_shapes)
    is_halved = bool(layer.module.has_gate) and is_interleaved(spec.gate, shapes[spec.up][0])
    gate = in_two_halves(spec.gate) if is_halved else spec.gate
    assert layout.packing is not None
    return replace(
        layer,
        layout=layout,
        spec=replace(spec, is_transposed=False, gate=gate),
        read_fields=partial(_packed_fields, layer, files, layout.packing, is_halved),
        is_lossy=True,
        is_read_whole=files is None,
    )


@torch.no_grad()
def _packed_fields(
    layer: MoELayer, files: ExpertsInFiles | None, packing: Packing, is_halved: bool
) -> dict[str, torch.Tensor]:
    """A layer's fields (E, ...), expert by expert: packing takes a few times the memory of what is packed."""
    held = layer.tensors() if files is None else {}
    read = {} if files is None else files.take(layer)

    def packed(expert: int) -> dict[str, torch.Tensor]:
        one = slice(expert, expert + 1)
        tensors = {name: tensor[one].detach() for name, tensor in held.items()}
        tensors |= {name: source.of(one) for name, source in read.items()}
        return pack(packing, _in_order(tensors, layer.spec, is_halved))

    experts = _on_all_cores(packed, layer.num_experts)
    return {name: torch.cat([one[name] for one in experts]) for name in experts[0]}


def _on_all_cores(
    function: Callable[[int], dict[str, torch.Tensor]], count: int
) -> list[dict[str, torch.Tensor]]:
    """What a function makes of 0 to `count` - 1, each on one core.

    Torch's own threads make operations as short as those on a piece of a matrix longer: beside other work on two cores
    180 ms for a matrix that one thread packs to mxfp4 in 46.
    """
    before = torch.get_num_threads()

    def start() -> None:
        torch.get_num_threads()  # at its first use a thread takes the number set last by anyone, over its own
        torch.set_num_threads(1)

    try:
        with ThreadPoolExecutor(physical_cores(), "prescope-packing", initializer=start) as pool:
            return list(pool.map(function, range(count)))
    finally:
        torch.set_num_threads(before)  # for threads to come


def _in_order(
    tensors: dict[str, torch.Tensor], spec: ExpertsSpec, is_halved: bool
) -> dict[str, torch.Tensor]:
    """An expert's tensors (1, ...) with matrices as (1, N, K), gate before up."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        one = tensor.mT if spec.is_transposed and name in (spec.up, spec.down) else tensor
        if is_halved and name in (spec.up, spec.up_bias):
            one = torch.cat([one[:, 0::2], one[:, 1::2]], dim=1)
        found[name] = one
    return found

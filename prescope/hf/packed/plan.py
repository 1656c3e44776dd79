"""What of a packed checkpoint stays packed, what is unpacked, and the model with its experts left out."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ...core.units import format_bytes
from ...errors import BadModelFolder, UnsupportedExperts
from ..moe_layers import MoELayer
from .checkpoint import Checkpoint
from .expert_weights import ExpertWeights
from .gathered import Gathered, LeftOut, order_of
from .layer_rows import LayerRows
from .origin import Origin
from .places import WeightPlace
from .published import Group, Matrix, matrices_in


class Unpacked:
    """A packed matrix as its plain weight: unpacked to float32 when transformers slices it, and cast by it then.

    Args:
        is_turned: the plain weight has its inputs first.
    """

    def __init__(self, checkpoint: Checkpoint, matrix: Matrix, is_turned: bool) -> None:
        self._checkpoint, self._matrix, self._is_turned = checkpoint, matrix, is_turned

    def __getitem__(self, index: Any) -> torch.Tensor:
        matrix, checkpoint = self._matrix, self._checkpoint
        format, parts = matrix.format(checkpoint), matrix.read(checkpoint)
        weight = format.unpack(parts, matrix.shape(checkpoint))
        return (weight.mT if self._is_turned else weight)[index]


@dataclass(frozen=True)
class PackedPlan:
    """How a packed checkpoint is loaded.

    Attributes:
        rows: by the names of the layers that stay packed.
        label: how its packed experts are written, or all of it where none stay packed.
        unpacked: matrices that become plain weights. `plain`: names of tensors that are already.
        spare: matrices for which the model has no place, such as those of layers that predict further tokens.
        turned: plain weights that have their inputs first, where the packed ones have not.
        left_out: parameters of the layers that stay packed.
        gathered: by the names of parameters, what they are put together of, and how: `in_turns` and `is_turned`.
        dtype: of what computes.
    """

    checkpoint: Checkpoint
    label: str
    rows: Mapping[str, LayerRows]
    unpacked: Sequence[Matrix]
    spare: Sequence[Matrix]
    plain: Sequence[str]
    turned: Collection[str]
    left_out: Mapping[str, torch.Tensor]
    gathered: Mapping[str, tuple[Origin, tuple[bool, bool]]]
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        groups: Sequence[Group],
        model: PreTrainedModel,
        layers: Sequence[MoELayer],
        dtype: torch.dtype,
        keep: bool = True,
    ) -> "PackedPlan":
        """For a model on meta and its layers.

        Args:
            keep: experts stay packed; else they are unpacked like everything else.

        Raises:
            UnsupportedExperts, BadModelFolder: its experts cannot be rows.
        """
        matrices = {matrix.weight: matrix for matrix in matrices_in(groups, checkpoint.entries)}
        if not matrices:
            said = _labels(group.published.label for group in groups)
            raise BadModelFolder(
                f"the config names a quantization_config ({said}), and none of {len(checkpoint.entries)} tensors in "
                f"the files is packed so; they do not belong together. Fetch the checkpoint again"
            )
        packed_names = {name for matrix in matrices.values() for name in matrix.names.values()}
        plain = [name for name in checkpoint.entries if name not in packed_names]
        weights = ExpertWeights.of(model, layers, [*matrices, *plain])
        found, owned, spare = weights
        _require_scales(checkpoint, [name for name in plain if name not in spare])
        parameters = model.state_dict()
        packed = [layer for layer in layers if keep and _is_packed(layer, weights, matrices)]
        rows = {layer.name: _rows_of(layer, checkpoint, matrices, found, dtype) for layer in packed}
        targets = [f"{layer.name}.{name}" for layer in packed for name in layer.weight_names]
        taken = {weight for target in targets for weight in found[target]}
        unpacked = [
            matrix for weight, matrix in matrices.items() if weight not in taken and weight not in spare
        ]
        for matrix in unpacked:
            matrix.format(checkpoint)  # refused now, and not in the middle of reading
        return cls(
            checkpoint,
            _labels(
                matrix.published.label for weight, matrix in matrices.items() if weight in taken or not rows
            ),
            rows,
            unpacked=unpacked,
            spare=[matrix for weight, matrix in matrices.items() if weight in spare],
            plain=[name for name in plain if name not in taken],
            turned={
                weight
                for layer in layers
                if layer.spec.is_transposed
                for name in layer.weight_names
                for weight in found[f"{layer.name}.{name}"]
                if weight in matrices and matrices[weight].published.is_out_in
            },
            left_out={name: parameters[name] for name, target in owned.items() if target in targets},
            gathered=_gathered([layer for layer in layers if layer.name not in rows], found),
            dtype=dtype,
        )

    def layers(self, layers: Sequence[MoELayer]) -> list[MoELayer]:
        """The layers of a model, with the rows of those that stay packed."""
        return [self.rows[layer.name].of(layer) if layer.name in self.rows else layer for layer in layers]

    def state_dict(self) -> dict[str, Any]:
        """What transformers loads: everything but packed experts, in plain form, and nothing of it read yet."""
        weights = {
            **{name: self.checkpoint.lazy(name) for name in self.plain},
            **{
                matrix.weight: Unpacked(self.checkpoint, matrix, matrix.weight in self.turned)
                for matrix in [
                    *self.unpacked,
                    *self.spare,
                ]  # of which transformers says that they have no place
            },
        }
        whole = {
            target: Gathered([[weights.pop(name) for name in part] for part in source.parts], *order)
            for target, (source, order) in self.gathered.items()
        }
        left_out = {target: LeftOut(parameter) for target, parameter in self.left_out.items()}
        return weights | whole | left_out

    def describe(self, layers: Sequence[MoELayer]) -> str:
        """What is served packed and what is not, in one line, for the layers as `layers` gives them."""
        dtype = str(self.dtype).removeprefix("torch.")
        spare = f"; {len(self.spare)} more have no place in this model" if self.spare else ""
        if not self.rows:
            return f"all {len(self.unpacked)} packed matrices ({self.label}) are unpacked to {dtype}{spare}"
        packed = [layer for layer in layers if layer.name in self.rows]
        names = " and ".join(sorted({layer.layout.packing.name for layer in packed if layer.layout.packing}))
        size = format_bytes(sum(layer.nbytes for layer in packed))
        text = f"{len(packed)} of {len(layers)} MoE layers stay packed in {names} ({self.label}), {size}"
        if self.unpacked:
            text += f"; {len(self.unpacked)} other packed matrices are unpacked to {dtype}"
        return text + spare


def _labels(labels: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(labels))


def _require_scales(checkpoint: Checkpoint, plain: Sequence[str]) -> None:
    """Weights of 8 bits whose scale is nowhere would be taken for plain numbers."""
    lonely = [name for name in plain if checkpoint.entries[name].dtype in ("F8_E4M3", "F8_E5M2", "I8")]
    if lonely:
        raise BadModelFolder(
            f"{lonely[0]} and {len(lonely) - 1} other weights are {checkpoint.entries[lonely[0]].dtype} and have no "
            f"scales that are known; fetch the checkpoint again"
        )


def _is_packed(layer: MoELayer, weights: ExpertWeights, matrices: Mapping[str, Matrix]) -> bool:
    """Whether a layer's matrices are packed in the files.

    Raises:
        UnsupportedExperts: some are; or they are split from the weights of another parameter.
        BadModelFolder: they are not there at all.
    """
    for name in layer.weight_names:
        weights.require(f"{layer.name}.{name}")
    targets = [f"{layer.name}.{name}" for name in (layer.spec.up, layer.spec.down)]
    are_packed = [name in matrices for target in targets for name in weights.found[target]]
    if any(are_packed) and not all(are_packed):
        raise UnsupportedExperts(
            f"{layer.name} has {sum(are_packed)} packed weights of {len(are_packed)}; all of a layer are packed, or "
            f"none"
        )
    return any(are_packed)


def _gathered(
    layers: Sequence[MoELayer], found: Mapping[str, Mapping[str, WeightPlace]]
) -> dict[str, tuple[Origin, tuple[bool, bool]]]:
    """The parameters of layers which are not packed that have to be put together here; see `PackedPlan.gathered`."""
    gathered = {}
    for layer in layers:
        for name in layer.weight_names:
            target = f"{layer.name}.{name}"
            if any(place.is_ours for place in found[target].values()):
                source = Origin.of(target, found[target], layer.num_experts)
                gathered[target] = source, order_of(layer, name)
    return gathered


def _rows_of(
    layer: MoELayer,
    checkpoint: Checkpoint,
    matrices: Mapping[str, Matrix],
    found: Mapping[str, Mapping[str, WeightPlace]],
    dtype: torch.dtype,
) -> LayerRows:
    sources = {
        name: Origin.of(f"{layer.name}.{name}", found[f"{layer.name}.{name}"], layer.num_experts)
        for name in layer.weight_names
    }
    return LayerRows(layer, checkpoint, matrices, sources, dtype)

"""The rows of one MoE layer out of a checkpoint: their layout from the headers, their bytes when they are asked for.

Shapes: E experts, N outputs and K inputs of a matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ...errors import BadModelFolder, UnsupportedExperts
from ...kernels import ExpertsSpec
from ...weights.formats import Format, Fp8
from ...weights.layout import PackedMatrix, packed_layout
from ..moe_layers import MoELayer
from .checkpoint import Checkpoint
from .gate_order import in_two_halves, is_interleaved
from .places import STACKED, STACKED_PAIRS, Place, in_order
from .published import Matrix


class Source(NamedTuple):
    """Where one of a layer's parameters comes from.

    Attributes:
        parts: what is put one behind the other, each the names of E weights, or of one that has all experts.
        is_stacked: whether they are weights of single experts.
    """

    parts: tuple[tuple[str, ...], ...]
    is_stacked: bool

    @classmethod
    def of(cls, target: str, weights: Mapping[str, Place], num_experts: int) -> "Source":
        """Of the weights that belong to a parameter, with the place of each.

        Raises:
            UnsupportedExperts: it is made of them in a way that packed weights cannot go through.
            BadModelFolder: some are missing.
        """
        steps = {place.steps for place in weights.values()}
        if steps == {()} and len(weights) == 1:
            return cls((tuple(weights),), False)
        if len(steps) != 1 or steps.isdisjoint((STACKED, STACKED_PAIRS)):
            names = ", ".join(name for name, _ in next(iter(steps))) or "several weights"
            raise UnsupportedExperts(f"{target} is made by {names}, which packed weights cannot go through")
        num_parts = 1 + max(place.part for place in weights.values())
        parts = tuple(
            tuple(in_order(name for name, place in weights.items() if place.part == part))
            for part in range(num_parts)
        )
        if any(len(part) != num_experts for part in parts):
            found = ", ".join(str(len(part)) for part in parts)
            raise BadModelFolder(
                f"{target} needs the weights of {num_experts} experts, the files have {found}; fetch them again"
            )
        return cls(parts, True)


class LayerRows:
    """Reads the rows of one layer.

    Args:
        layer: on meta.
        matrices: all packed matrices, by the plain weight's name.
        sources: of each of the layer's parameters.
        dtype: of what computes.

    Raises:
        UnsupportedExperts, BadModelFolder: they cannot be packed rows.
    """

    def __init__(
        self,
        layer: MoELayer,
        checkpoint: Checkpoint,
        matrices: Mapping[str, Matrix],
        sources: Mapping[str, Source],
        dtype: torch.dtype,
    ) -> None:
        self._checkpoint, self._matrices, self._sources = checkpoint, matrices, sources
        self._num_experts, self._dtype = layer.num_experts, dtype
        packed = [self._packed(layer, name) for name in (layer.spec.up, layer.spec.down)]
        biases = [name for name in (layer.spec.up_bias, layer.spec.down_bias) if name is not None]
        shapes = {name: tuple(getattr(layer.module, name).shape[1:]) for name in biases}
        self.layout = packed_layout(packed, dtype, shapes)
        (up_rows, _), up = packed[0].shape, packed[0].format
        self._is_halved = (
            layer.module.has_gate
            and up.is_by_row(packed[0].shape)
            and is_interleaved(layer.spec.gate, up_rows)
        )
        self._up, self._up_bias = layer.spec.up, layer.spec.up_bias

    def of(self, layer: MoELayer) -> MoELayer:
        """The same layer of a model that computes, with its rows packed."""
        gate = in_two_halves(layer.spec.gate) if self._is_halved else layer.spec.gate
        spec: ExpertsSpec = replace(layer.spec, is_transposed=False, gate=gate)
        return replace(layer, layout=self.layout, spec=spec, read_fields=self.read)

    def read(self) -> dict[str, torch.Tensor]:
        """All fields (E, ...)."""
        fields: dict[str, torch.Tensor] = {}
        assert self.layout.packing is not None
        for matrix in self.layout.packing.matrices:
            fields |= self._read_matrix(matrix)
        for name in self._sources.keys() - {matrix.name for matrix in self.layout.packing.matrices}:
            fields[name] = self._halved(name, self._read_bias(self._sources[name]).to(self._dtype))
        return fields

    # -- headers -----------------------------------------------------------------------------------------------

    def _packed(self, layer: MoELayer, name: str) -> PackedMatrix:
        """What one of the layer's matrices is in the rows."""
        where, source = f"{layer.name}.{name}", self._sources[name]
        formats, shapes = set(), set()
        for part in source.parts:
            for weight in part:
                one = self._matrices[weight]
                entries = {role: self._checkpoint.entries[tensor] for role, tensor in one.names.items()}
                try:
                    formats.add(one.published.format(entries))
                except UnsupportedExperts as error:
                    raise UnsupportedExperts(
                        f"{one.stem} is packed ({one.published.label}): {error}"
                    ) from error
                shapes.add(one.published.shape(entries)[-2:])
            first = self._matrices[part[0]]
            first.published.check(self._tensors(first), first.stem)
        if len(formats) != 1 or len(shapes) != 1:
            raise UnsupportedExperts(f"{where} has experts of several formats or shapes: {formats}, {shapes}")
        (rows, columns), format = shapes.pop(), formats.pop()
        self._require_shape(layer, name, (len(source.parts) * rows, columns))
        if isinstance(format, Fp8) and len(source.parts) > 1:
            format = format.aligned(rows)
        return PackedMatrix(name, format, (len(source.parts) * rows, columns))

    def _require_shape(self, layer: MoELayer, name: str, found: tuple[int, int]) -> None:
        wanted = tuple(getattr(layer.module, name).shape[1:])
        source = self._sources[name]
        published = self._matrices[source.parts[0][0]].published
        if layer.spec.is_transposed and not source.is_stacked and not published.is_out_in:
            raise UnsupportedExperts(
                f"{layer.name}.{name} is packed ({published.label}) with its inputs first, which is not served"
            )
        if layer.spec.is_transposed:
            wanted = wanted[::-1]
        if found != wanted:
            raise BadModelFolder(
                f"{layer.name}.{name} is packed as {found} in the files, the config says {wanted}; fetch it again"
            )

    # -- values ------------------------------------------------------------------------------------------------

    def _tensors(self, matrix: Matrix) -> dict[str, torch.Tensor]:
        return {role: self._checkpoint.read(name) for role, name in matrix.names.items()}

    def _read_matrix(self, matrix: PackedMatrix) -> dict[str, torch.Tensor]:
        source = self._sources[matrix.name]
        if not source.is_stacked:
            parts = self._parts([source.parts[0][0]], matrix.format)
            return {
                field: self._halved(matrix.name, parts[suffix])
                for suffix, field in matrix.field_names.items()
            }
        fields = {
            part.suffix: torch.empty((self._num_experts, *part.shape), dtype=part.dtype)
            for part in matrix.format.parts(matrix.shape)
        }
        for expert in range(self._num_experts):
            parts = self._parts([part[expert] for part in source.parts], matrix.format)
            for suffix, field in fields.items():
                field[expert] = self._halved(matrix.name, parts[suffix].unsqueeze(0))[0]
        return {matrix.name + suffix: field for suffix, field in fields.items()}

    def _parts(self, weights: Sequence[str], format: Format) -> dict[str, torch.Tensor]:
        """The format's parts of matrices, one behind the other."""
        found: list[dict[str, torch.Tensor]] = []
        for weight in weights:
            matrix = self._matrices[weight]
            tensors = self._tensors(matrix)
            matrix.published.check(tensors, matrix.stem)
            parts = matrix.published.convert(tensors)
            if isinstance(format, Fp8) and len(weights) > 1:
                own = matrix.published.format(
                    {role: self._checkpoint.entries[name] for role, name in matrix.names.items()}
                )
                assert isinstance(own, Fp8)
                parts = own.align(parts, parts[""].shape[-2])
            found.append(parts)
        if len(found) == 1:
            return found[0]
        return {suffix: torch.cat([one[suffix] for one in found]) for suffix in found[0]}

    def _read_bias(self, source: Source) -> torch.Tensor:
        if not source.is_stacked:
            return self._checkpoint.read(source.parts[0][0])
        parts = [torch.stack([self._checkpoint.read(name) for name in part]) for part in source.parts]
        return torch.cat(parts, dim=1)

    def _halved(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Rows (E, N, ...) of gate and up one behind the other, where the family has them in turns."""
        if not self._is_halved or name not in (self._up, self._up_bias):
            return tensor
        return torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)

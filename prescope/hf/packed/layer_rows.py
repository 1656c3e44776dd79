"""The rows of one MoE layer out of a checkpoint: their layout from the headers, their bytes when they are asked for.

Shapes: E experts, N outputs and K inputs of a matrix.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from ...errors import BadModelFolder, UnsupportedExperts
from ...kernels import ExpertsSpec
from ...weights.formats import Fp8
from ...weights.layout import PackedMatrix, packed_layout
from ...weights.pages import run_jobs
from ..moe_layers import MoELayer
from .checkpoint import Checkpoint
from .gate_order import in_two_halves, is_interleaved
from .origin import Origin
from .published import Matrix


class LayerRows:
    """Reads the rows of one layer, once.

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
        sources: Mapping[str, Origin],
        dtype: torch.dtype,
    ) -> None:
        self._checkpoint: Checkpoint | None = checkpoint
        self._matrices, self._sources = matrices, sources
        self._num_experts, self._dtype = layer.num_experts, dtype
        self._turned: set[str] = set()  # matrices whose inputs come first in the files
        self._in_halves = {name for name, source in sources.items() if source.is_ours}
        self._is_halved = False
        packed = [self._packed(layer, name) for name in (layer.spec.up, layer.spec.down)]
        if len(names := dict.fromkeys(matrix.format.name for matrix in packed)) > 1:
            raise UnsupportedExperts(
                f"the experts of {layer.name} are packed in {' and '.join(names)}; one format a layer is served"
            )
        biases = [name for name in (layer.spec.up_bias, layer.spec.down_bias) if name is not None]
        shapes = {name: tuple(getattr(layer.module, name).shape[1:]) for name in biases}
        for name, shape in shapes.items():
            sources[name].require_shapes(checkpoint, (layer.num_experts, *shape), f"{layer.name}.{name}")
        self.layout = packed_layout(packed, dtype, shapes)
        self._up, self._up_bias = packed[0], layer.spec.up_bias

    def of(self, layer: MoELayer) -> MoELayer:
        """The same layer of a model, with its rows packed; that of the model which computes comes last."""
        up = self._up
        self._is_halved = (
            bool(layer.module.has_gate)
            and (up.name in self._in_halves or up.format.is_by_row(up.shape))
            and is_interleaved(layer.spec.gate, up.shape[0])
        )
        gate = in_two_halves(layer.spec.gate) if self._is_halved else layer.spec.gate
        spec: ExpertsSpec = replace(layer.spec, is_transposed=False, gate=gate)
        return replace(layer, layout=self.layout, spec=spec, read_fields=self.read)

    def read(self) -> dict[str, torch.Tensor]:
        """All fields (E, ...). The files are let go then: the engine keeps this object as long as it lives."""
        assert self._checkpoint is not None and self.layout.packing is not None, "rows are read once"
        fields: dict[str, torch.Tensor] = {}
        for matrix in self.layout.packing.matrices:
            fields |= self._read_matrix(matrix)
        for name in self._sources.keys() - {matrix.name for matrix in self.layout.packing.matrices}:
            bias = self._read_bias(self._checkpoint, self._sources[name]).to(self._dtype)
            fields[name] = self._halved(name, bias)
        self._checkpoint, self._matrices, self._sources = None, {}, {}
        return fields

    # -- headers -----------------------------------------------------------------------------------------------

    def _packed(self, layer: MoELayer, name: str) -> PackedMatrix:
        """What one of the layer's matrices is in the rows."""
        where, source = f"{layer.name}.{name}", self._sources[name]
        assert self._checkpoint is not None
        found = {
            (one.format(self._checkpoint), one.shape(self._checkpoint))
            for one in (self._matrices[weight] for part in source.parts for weight in part)
        }
        if len(found) != 1:
            raise BadModelFolder(
                f"{where} has experts of several formats or shapes, one is served: {sorted(map(str, found))}"
            )
        held = {
            self._matrices[weight].num_experts(self._checkpoint) for part in source.parts for weight in part
        }
        if held != {None if source.is_stacked else self._num_experts}:
            raise BadModelFolder(
                f"{where} is packed for {held} experts at once, the config says {self._num_experts}; fetch it again"
            )
        for part in source.parts:
            self._matrices[part[0]].check(self._checkpoint)
        format, (rows, columns) = found.pop()
        shape = len(source.parts) * rows, columns
        wanted: tuple[int, ...] = tuple(getattr(layer.module, name).shape[1:])
        if layer.spec.is_transposed:
            wanted = wanted[::-1]
        is_own = not source.is_stacked and not self._matrices[source.parts[0][0]].published.is_out_in
        is_square_turned = is_own and layer.spec.is_transposed and rows == columns
        is_turned = is_own and (shape != wanted or is_square_turned)
        if is_turned and isinstance(format, Fp8):
            # A block is as good the other way round; a scale of each input would be no scale of a row.
            shape, format = shape[::-1], Fp8(format.block_columns, format.block_rows)
            self._turned.add(name)
        if shape != wanted:
            raise BadModelFolder(
                f"{where} is packed as {(len(source.parts) * rows, columns)} in the files, the config says {wanted}; "
                f"fetch it again"
            )
        if is_turned and isinstance(format, Fp8) and format.block_columns == 1:
            raise UnsupportedExperts(
                f"{where} is packed with its inputs first and scales of rows of those or of the matrix, which is not "
                f"served, scales of blocks are"
            )
        if isinstance(format, Fp8) and len(source.parts) > 1:
            format = format.aligned(rows)
        return PackedMatrix(name, format, shape)

    # -- values ------------------------------------------------------------------------------------------------

    def _read_matrix(self, matrix: PackedMatrix) -> dict[str, torch.Tensor]:
        source = self._sources[matrix.name]
        if not source.is_stacked:
            assert self._checkpoint is not None
            found = self._matrices[source.parts[0][0]].read(self._checkpoint)
            fields = {
                suffix: part.mT if matrix.name in self._turned else part for suffix, part in found.items()
            }
        else:
            fields = {
                part.suffix: torch.empty((self._num_experts, *part.shape), dtype=part.dtype, device="cpu")
                for part in matrix.format.parts(matrix.shape)
            }
            # By several threads: both mapped files and fresh memory are faulted in page by page.
            run_jobs([partial(self._fill, fields, source, expert) for expert in range(self._num_experts)])
        return {
            field: self._halved(matrix.name, fields[suffix]) for suffix, field in matrix.field_names.items()
        }

    def _fill(self, fields: Mapping[str, torch.Tensor], source: Origin, expert: int) -> None:
        """Write an expert's matrices into the fields, one behind the other."""
        assert self._checkpoint is not None
        ends = dict.fromkeys(fields, 0)
        for weights in source.parts:
            matrix = self._matrices[weights[expert]]
            parts, format = matrix.read(self._checkpoint), matrix.format(self._checkpoint)
            if isinstance(format, Fp8) and len(source.parts) > 1:
                parts = format.align(parts, parts[""].shape[-2])
            for suffix, part in parts.items():
                start, ends[suffix] = ends[suffix], ends[suffix] + part.shape[0]
                fields[suffix][expert, start : ends[suffix]].copy_(part)

    def _read_bias(self, checkpoint: Checkpoint, source: Origin) -> torch.Tensor:
        if not source.is_stacked:
            return checkpoint.read(source.parts[0][0])
        parts = [torch.stack([checkpoint.read(name) for name in part]) for part in source.parts]
        return torch.cat(parts, dim=1)

    def _halved(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Rows (E, N, ...) of gate and up one behind the other, where the family and the files have them in turns."""
        if not self._is_halved or name in self._in_halves or name not in (self._up.name, self._up_bias):
            return tensor
        return torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)

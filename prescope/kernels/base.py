"""What an expert kernel takes and returns.

Shapes: T tokens, K top-k, P = T * K pairs of (token, chosen expert), D model width, S slots. Each pair's output is
computed on its own row and summed at the end, in one order: so the result does not depend on which experts were in
slots, nor on how many rounds the layer took.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache.residency import IntArray, LayerNeed
from ..weights.formats import PackedMatrices
from ..weights.layout import RowLayout

TensorFunction = Callable[[torch.Tensor], torch.Tensor]


class CannotLaunch(RuntimeError):
    """A kernel cannot be compiled for this GPU, or needs more of it than there is; another may do."""


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """How a family's experts compute: y = down(gate(up(x))), each linear with or without bias.

    `up` is gate_up_proj (2F wide) or up_proj; `gate` is the family's own gating or activation.
    """

    up: str
    down: str
    up_bias: str | None
    down_bias: str | None
    is_transposed: bool  # weights are (in, out) instead of (out, in)
    gate: TensorFunction
    post_norm: TensorFunction | None


@dataclass(frozen=True)
class LayerWeights:
    """Views of the slot pool as one layer's weights, (S, ...) each; packed ones are unpacked where they are used."""

    up: torch.Tensor | PackedMatrices  # (S, 2F, D) or (S, D, 2F) when transposed
    down: torch.Tensor | PackedMatrices  # (S, D, F) or (S, F, D)
    up_bias: torch.Tensor | None  # (S, 2F)
    down_bias: torch.Tensor | None  # (S, D)

    def widths(self, is_transposed: bool) -> tuple[int, int, int]:
        """D of what goes in, 2F or F behind `up`, D of what comes out."""
        out_axis, in_axis = (2, 1) if is_transposed else (1, 2)
        return self.up.shape[in_axis], self.up.shape[out_axis], self.down.shape[out_axis]

    def inner_width(self, is_transposed: bool) -> int:
        """F, between the gate and `down`."""
        return self.down.shape[1 if is_transposed else 2]


def layer_weights(layout: RowLayout, spec: ExpertsSpec, rows: torch.Tensor) -> LayerWeights:
    """A layer's weights as views of rows (S, >= row_bytes) of uint8."""
    return LayerWeights(
        layout.matrices(rows, spec.up),
        layout.matrices(rows, spec.down),
        layout.view(rows, spec.up_bias) if spec.up_bias else None,
        layout.view(rows, spec.down_bias) if spec.down_bias else None,
    )


@dataclass
class Work:
    """One layer call, over all its rounds."""

    x_TD: torch.Tensor
    ids_TK: torch.Tensor  # int64, on the device; ids outside [0, E) mean no expert
    host_ids_TK: IntArray
    need: LayerNeed  # distinct experts and the tokens of each
    num_experts: int
    out_PD: torch.Tensor  # rows of pairs without an expert stay as they are
    num_rounds: int
    slot_row: IntArray  # (E,) slot of each expert, -1 for none: the residency table's own row unless it has no version
    version: int  # of that row; -1 for none


class StepLog(NamedTuple):
    """What a step that ran from a graph wrote down by itself (`graph_buffers`): copies, on the host."""

    tokens: NDArray[np.int64]  # (T,) chosen
    ids_LTK: NDArray[np.int32]  # -1 for no expert
    weights_LTK: NDArray[np.float32]
    needs: NDArray[np.int32]  # (L, 2): needed, missing
    fetched: NDArray[np.int32]  # (L, M): the missing experts in front, if the GPU fetched them; else -1
    stamps_ns: NDArray[np.int64]  # (L, 5): routed, decided, fetched, done, GPU done or 0; by the GPU's clock
    begin_ns: int
    end_ns: int
    inputs_LTD: torch.Tensor | None = None  # what each router saw, if the step keeps it


class ExpertKernel(Protocol):
    """Computes the pairs of one round.

    Attributes:
        serves_unread: it can compute a layer whose routing the host has not seen (`run_unread`).
    """

    name: str
    serves_unread: bool

    def prepare(self, work: Work) -> None:
        """Once per layer call, before the first round."""
        ...

    def run(
        self,
        work: Work,
        spec: ExpertsSpec,
        weights: LayerWeights,
        experts: IntArray,
        slots: IntArray,
    ) -> None:
        """Write the outputs of all pairs whose expert is among `experts` (n,), which are in `slots` (n,)."""
        ...

    def slots_on_device(
        self, moe_layer: int, slot_row: IntArray, version: int, device: torch.device
    ) -> torch.Tensor:
        """The residency table's row (E,) of that version on the device; -1 for a row of no version."""
        ...

    def run_unread(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        spec: ExpertsSpec,
        weights: LayerWeights,
        slots_E: torch.Tensor,
    ) -> torch.Tensor:
        """The outputs (P, D) of all pairs, zero for those of no expert, where all experts are in slots: int32, on the
        device.
        """
        ...

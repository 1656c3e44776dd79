"""The types that all parts of prescope use. Standard library and numpy only.

Shapes used everywhere: T tokens, D model width, F expert width, E experts, K top-k, L MoE layers, S slots.
"""

from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .units import digits

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

Phase = Literal["prefill", "decode"]
#: What a function that is handed on returns.
Returned = TypeVar("Returned")


class ExpertKey(NamedTuple):
    """One expert of the model: always (moe_layer, expert), in this order. Arrays hold moe_layer * E + expert instead.

    `moe_layer` is the rank among the MoE layers, not the decoder index: they differ when some layers are dense.
    """

    moe_layer: int
    expert: int


class NeedOutcome(StrEnum):
    """Outcome of one expert a layer needs in one step. Late is neither a hit nor a miss."""

    HIT = "hit"  # resident when needed
    LATE = "late"  # in flight when needed, and waited for
    MISS = "miss"  # absent when needed, or in flight and computed on the CPU meanwhile


class Reason(StrEnum):
    """Why an expert went where it went. Compiled decisions name them by their rank."""

    ON_DEMAND = "on_demand"  # needed now and absent: over the link
    PREFETCH = "prefetch"  # predicted for a coming layer
    CPU = "cpu"  # needed now and absent: computed on the CPU, since that is done sooner
    STREAM = "stream"  # its whole layer is copied, whatever is predicted


REASONS = tuple(Reason)
#: Ways to decode in which the GPU decides, so that no layer waits for the host.
DEVICE_DRIVERS = ("gpu-driven", "copy-engine")


class Lane(StrEnum):
    """The four lanes of a timeline, and the host's own time."""

    GPU = "gpu"  # compute of the model's device
    H2D = "h2d"  # the link: host memory -> slots
    CPU = "cpu"  # experts computed on the CPU
    STALL = "stall"  # the compute lane waited for bytes
    HOST = "host"  # the compute lane waited for the host to read the routing and decide


class MoEShape(NamedTuple):
    """Sizes of a model's MoE part that decisions need; all layers alike unless `row_bytes` says otherwise."""

    num_layers: int  # L, MoE layers
    num_experts: int  # E, the most experts any layer has
    top_k: int  # K, the most experts one token uses in a layer; 0 until the first forward shows it
    row_bytes: int = 0  # bytes of the largest expert, all projections and biases, padded; 0 where nobody asks

    @classmethod
    def of(cls, trace: Any) -> "MoEShape":
        """Of whatever has these three sizes; for who knows it by the class's former name, `Shape`."""
        return cls(trace.num_layers, trace.num_experts, trace.top_k)

    @property
    def total_experts(self) -> int:
        return self.num_layers * self.num_experts

    @property
    def routing(self) -> "MoEShape":
        """The part that traces and predictors know: without the bytes."""
        return self._replace(row_bytes=0)


class ExpertSize(NamedTuple):
    """What an expert's time depends on: its bytes and its sizes. All zero where no expert is meant."""

    nbytes: int  # all projections and biases
    width: int  # D
    expert_width: int  # F

    def __str__(self) -> str:
        return f"{digits(self.nbytes / 1e6)} MB ({self.width} x {self.expert_width})"

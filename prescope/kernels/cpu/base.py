"""What the CPU lane takes and returns.

Shapes: E experts, D model width, F expert width, T tokens, K top-k, n experts of one call, m pairs of (token, expert)
that fall to them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache.residency import IntArray
from ...core.types import Returned
from ...weights.layout import RowLayout
from ..base import ExpertsSpec

#: Longer than any job takes that a decode step submits: all experts of a layer, read at 1 GB/s, are done sooner.
MOST_JOB_S = 60.0


class CpuLayer(NamedTuple):
    """One MoE layer's experts in host memory."""

    rows: torch.Tensor  # (E, row_bytes) of uint8: HostLayer.rows
    layout: RowLayout
    spec: ExpertsSpec

    @property
    def dtype(self) -> torch.dtype:
        """Of x, and of the output."""
        return self.layout.dtype(self.spec.down)

    @property
    def in_dim(self) -> int:
        """Width of x."""
        return self.layout.shape(self.spec.up)[0 if self.spec.is_transposed else 1]

    @property
    def up_dim(self) -> int:
        """Width between `up` and the gate, 2F with a gate."""
        return self.layout.shape(self.spec.up)[1 if self.spec.is_transposed else 0]

    @property
    def width(self) -> int:
        """F, the width between the gate and `down`."""
        return self.layout.shape(self.spec.down)[0 if self.spec.is_transposed else 1]

    @property
    def out_dim(self) -> int:
        """Width of the output."""
        return self.layout.shape(self.spec.down)[1 if self.spec.is_transposed else 0]

    def weight_bytes(self) -> int:
        """Bytes of one expert that a computation reads."""
        return sum(field.nbytes for field in self.layout.fields)


class ExpertBatch(NamedTuple):
    """Which pairs one call computes, by expert; all int64."""

    experts: IntArray  # (n,)
    first: IntArray  # (n + 1,): the pairs of experts[i] are first[i] .. first[i + 1]
    tokens: IntArray  # (m,) rows of x
    places: IntArray  # (m,) rows of the output

    def compact(self) -> "ExpertBatch":
        """The same with outputs one after another, (m, D) in the order of `places`: what must cross the link."""
        return self._replace(places=np.arange(len(self.places), dtype=np.int64))


def expert_batch_of(ids_TK: NDArray[np.integer], experts: Sequence[int] | IntArray) -> ExpertBatch:
    """All pairs of the given experts in a layer's routing, in the order of the tokens.

    Args:
        ids_TK: chosen experts; ids that are not among `experts` (sentinels too) are left out.

    Returns:
        A batch whose places are pairs t * K + k, the rows of `Work.out_PD`.
    """
    wanted = np.asarray(experts, dtype=np.int64)
    flat = ids_TK.ravel()
    order = np.argsort(flat, kind="stable")
    ids = flat[order]
    begins, ends = np.searchsorted(ids, wanted, "left"), np.searchsorted(ids, wanted, "right")
    parts = [order[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
    places = np.concatenate([np.empty(0, dtype=np.int64), *parts])
    first = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(ends - begins)])
    return ExpertBatch(wanted, first, places // ids_TK.shape[1], places)


class Flag(NamedTuple):
    """A word that a GPU can wait for, so that no host thread has to."""

    word: torch.Tensor  # (1,) of int32, pinned
    value: int  # what it is set to


class CpuJob(Protocol):
    """One submission under way. Its tensors must not be touched before it is over."""

    def done(self) -> bool:
        """Whether it is over, without waiting: computed, failed or cancelled."""
        ...

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the outputs are there.

        Raises:
            CancelledError: it was cancelled, or the lane was closed, before it was done.
            TimeoutError: it is not over after `timeout_s`; WaitTimedOut: after far longer than any takes.
            Exception: whatever its computation raised.
        """
        ...

    def cancel(self) -> None:
        """Compute nothing more of it; what was written by then stays. Nothing happens if it is over."""
        ...

    def span_ns(self) -> tuple[int, int]:
        """Start and end by the clock of `time.perf_counter_ns`, of a job that is over. Threads that have to wake for it
        do so after its start.
        """
        ...


class LaneAddresses(NamedTuple):
    """Addresses of C functions of a lane, for compiled code (see `native.call`), and the lane they are called with."""

    submit: int  # (lane, layer, batch): a job, or 0 if it is refused
    state: int  # (job): 0 while it runs, 1 when it is done
    span: int  # (job, where its start is written, where its end is), nanoseconds
    free: int  # (job)
    lane: int


class LaneFunctions:
    """How compiled code computes experts on the CPU.

    Args:
        addresses: of its functions.
        layers: by MoE layer, what `submit` takes for it.
        keep: what must stay as long as they are called.
    """

    def __init__(self, addresses: LaneAddresses, layers: Sequence[int], keep: Any = None) -> None:
        self.addresses, self.layers, self._keep = addresses, list(layers), keep

    @classmethod
    def without(cls) -> "LaneFunctions":
        """Of no lane: nothing is ever submitted."""
        return cls(LaneAddresses(0, 0, 0, 0, 0), [])

    def serving(self, serve: Callable[..., Returned], *arguments: Any) -> Returned:
        """What compiled code returns that calls these functions. Raises what a signal's handler raised in between."""
        return serve(*arguments)

    def settle(self, job: int) -> None:
        """Compute nothing more of a job, or with 0 of one whose submission was interrupted; return when it is over."""

    def explain(self) -> NoReturn:
        """Raise what went wrong in a job, or in its submission."""
        raise RuntimeError("an expert was sent to a CPU lane that is not there")


class CpuLane(Protocol):
    """A way to compute experts on the CPU."""

    name: str
    threads: int

    def submit(
        self,
        moe_layer: int,
        expert_batch: ExpertBatch,
        x_TD: torch.Tensor,
        out: torch.Tensor,
        flag: Flag | None,
    ) -> CpuJob:
        """Begin to compute checked arguments."""
        ...

    def functions(self) -> LaneFunctions:
        """The same for compiled code: what it submits is not checked."""
        ...

    def stay_awake(self, on: bool) -> None:
        """Whether threads without work wait for more without sleeping."""
        ...

    def close(self) -> None:
        """Cancel what is under way and end the threads."""
        ...

"""Experts computed on CPU threads from the host rows, while the GPU works and the link copies."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch

from ...errors import UnsupportedOption
from .base import CpuJob, CpuLane, CpuLayer, ExpertBatch, Flag, LaneFunctions
from .build import CannotBuild
from .checks import check_tensors
from .native import NativeLane
from .threads import default_threads, may_stay_awake
from .with_torch import TorchLane

IMPLEMENTATIONS = ("auto", "native", "torch")
#: Warnings that were given: each setting that is tried opens a lane, and Python gives a warning anew whenever its
#: filters were touched meanwhile, as torch and numba do.
_given: set[str] = set()


class CpuExperts:
    """The CPU lane of a model.

    Args:
        layers: by MoE layer. Rows must stay where they are until `close`.
        threads: None for all cores but two.
        implementation: "native" is compiled for this machine at the first use (some seconds, once), "torch" needs no
            compiler; "auto" takes the first that works and warns if that is torch.

    Attributes:
        implementation: "native" or "torch".
        reason: why it is that one.

    Raises:
        UnsupportedOption: "native" was asked for and cannot be had; the text says why.
    """

    def __init__(
        self, layers: Sequence[CpuLayer], *, threads: int | None = None, implementation: str = "auto"
    ) -> None:
        if implementation not in IMPLEMENTATIONS:
            raise UnsupportedOption(f"implementation is {implementation!r}; use one of {IMPLEMENTATIONS}")
        self._layers = list(layers)
        self._lane, self.reason = _open(self._layers, threads or default_threads(), implementation)

    @property
    def implementation(self) -> str:
        return self._lane.name

    @property
    def threads(self) -> int:
        return self._lane.threads

    def submit(
        self,
        moe_layer: int,
        expert_batch: ExpertBatch,
        x_TD: torch.Tensor,
        out: torch.Tensor,
        flag: Flag | None = None,
    ) -> CpuJob:
        """Begin to compute out[places] = expert(x_TD[tokens]) of a batch, unweighted; returns at once.

        Several jobs may be under way; they are computed in the order of their submission.

        Args:
            x_TD: (T, D) on the CPU in the experts' dtype, complete: a copy from a GPU must have arrived.
            out: (P, D) of the same dtype; rows that are not in the batch stay as they are. What follows the experts
                (`spec.post_norm`, router weights) is left to the caller: its parameters live on the GPU.
            flag: set when the job is over, also when it failed or was cancelled.

        Raises:
            ValueError: the arguments do not fit the layer or one another.
            CancelledError: the lane is closed.
        """
        check_tensors(self._layers[moe_layer], expert_batch, x_TD, out, flag)
        return self._lane.submit(moe_layer, expert_batch, x_TD, out, flag)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While jobs may follow one another: threads do not sleep between them, if there are cores enough.

        Waking the sleeping cores of a virtual machine takes nearly as long as an expert: one of 12.6 MB after 3 ms
        without work took 342 us, with threads awake 210 (14 threads, H200 machine;
        `benchmarks/cpu_experts.py --parts latency`).
        """
        if not may_stay_awake(self.threads):
            yield
            return
        self._lane.stay_awake(True)
        try:
            yield
        finally:
            self._lane.stay_awake(False)

    def functions(self) -> LaneFunctions:
        """How compiled code submits (`host_loop.serve`); what it submits is not checked."""
        return self._lane.functions()

    def close(self) -> None:
        """Cancel what is under way and end the threads; does nothing the second time."""
        self._lane.close()

    def __enter__(self) -> "CpuExperts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(layers: list[CpuLayer], threads: int, implementation: str) -> tuple[CpuLane, str]:
    if implementation == "torch":
        return TorchLane(layers, threads), "as given"
    try:
        lane = NativeLane(layers, threads)
    except CannotBuild as error:
        if implementation == "native":
            raise UnsupportedOption(
                f"implementation='native' cannot run here: {error}; use 'torch'"
            ) from error
        _warn_once(f"experts on the CPU run on torch, at about half the speed: {error}")
        return TorchLane(layers, threads), str(error)
    return lane, "as given" if implementation == "native" else "compiled for this machine"


def _warn_once(text: str) -> None:
    if text not in _given:
        warnings.warn(text, stacklevel=5)
        _given.add(text)

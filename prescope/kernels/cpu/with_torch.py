"""The lane without a compiler: expert after expert, each product by torch's own threads, led by a thread of the lane.

Any dtype, any gate. To give each thread a shard of the weights, torch single-threaded within it, was tried and reads
3 to 17 GB/s where this reads 31 to 63 (16 cores): a call costs 150 us when 14 Python threads want the interpreter.
"""

import ctypes
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch.nn import functional

from ...core.native import address_of
from ...core.types import Returned
from ...core.worker import Latch, Worker
from .base import MOST_JOB_S, CpuJob, CpuLayer, ExpertBatch, Flag, LaneAddresses, LaneFunctions
from .checks import check_batch


class TorchLane:
    """Experts by torch, in a thread of the lane that has `threads` of OpenMP's for itself."""

    name = "torch"

    def __init__(self, layers: Sequence[CpuLayer], threads: int) -> None:
        self.threads = threads
        self._layers = list(layers)
        self._leader = _leader(threads)
        self._jobs: deque[_TorchJob] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def submit(
        self,
        moe_layer: int,
        expert_batch: ExpertBatch,
        x_TD: torch.Tensor,
        out: torch.Tensor,
        flag: Flag | None,
    ) -> CpuJob:
        self._leader.require_here()  # in a forked process the lock may be taken for ever
        layer = self._layers[moe_layer]
        check_batch(layer, expert_batch, x_TD, out)
        job = _TorchJob(self._leader, flag, partial(_compute, layer, expert_batch, x_TD=x_TD, out=out))
        with self._lock:
            if self._closed:
                raise CancelledError("the CPU lane is closed")
            while self._jobs and self._jobs[0].done():
                self._jobs.popleft()
            self._leader.submit(partial(job.run, len(expert_batch.experts)))
            self._jobs.append(job)
        return job

    def functions(self) -> LaneFunctions:
        return _TorchFunctions(self, self._layers)

    def drain(self) -> None:
        """Wait until nothing is computed any more."""
        self._leader.drain("experts on the CPU", MOST_JOB_S)

    def stay_awake(self, on: bool) -> None:
        """Torch's threads spin for some milliseconds of their own accord."""

    def close(self) -> None:
        if self._leader.is_here:
            with self._lock:
                self._closed = True
                for job in self._jobs:
                    job.cancel()
        self._leader.close("the end of what experts on the CPU were at", MOST_JOB_S)


class _TorchJob:
    def __init__(self, leader: Worker, flag: Flag | None, compute: Callable[[int], None]) -> None:
        self._leader, self._flag, self._compute = leader, flag, compute
        self._over = Latch()
        self._error: BaseException | None = None
        self._cancelled = False
        self._span = 0, 0

    def run(self, num_experts: int) -> None:
        start = time.perf_counter_ns()
        try:
            for i in range(num_experts):
                if self._cancelled:
                    raise CancelledError("experts on the CPU were cancelled")
                self._compute(i)
        except BaseException as error:  # noqa: BLE001 - raised by `wait`
            self._error = error
        finally:  # a GPU may wait for the flag, so it is set whatever happened
            self._span = start, time.perf_counter_ns()
            if self._flag is not None:
                self._flag.word.fill_(self._flag.value)
            self._over.set()

    def done(self) -> bool:
        return self._over.is_set

    def wait(self, timeout_s: float | None = None) -> None:
        if timeout_s is None:
            self._leader.wait(self._over, "an expert computed on the CPU", MOST_JOB_S)
        elif not self._over.wait(timeout_s):
            raise TimeoutError(f"experts on the CPU are not done after {timeout_s} s")
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        self._cancelled = True

    def span_ns(self) -> tuple[int, int]:
        return self._span


_int64 = ctypes.c_int64


class _TorchFunctions(LaneFunctions):
    """The lane behind callbacks. A batch lies in memory as the compiled lane's does, in words of 8 bytes.

    Python runs a signal's handler in the main thread where Python code begins, a callback too. What the handler raises
    there, before the first line, cannot pass through C: ctypes reports it as unraisable and returns 0.
    """

    def __init__(self, lane: TorchLane, layers: Sequence[CpuLayer]) -> None:
        self._lane, self._of = lane, list(layers)
        self._jobs: dict[int, CpuJob] = {}
        self._error: BaseException | None = None
        self._callbacks = (
            ctypes.CFUNCTYPE(_int64, _int64, _int64, _int64)(self._submit),
            ctypes.CFUNCTYPE(_int64, _int64)(self._state),
            ctypes.CFUNCTYPE(_int64, _int64, _int64, _int64)(self._span),
            ctypes.CFUNCTYPE(_int64, _int64)(self._free),
        )
        submit, state, span, free = map(address_of, self._callbacks)
        super().__init__(LaneAddresses(submit, state, span, free, lane=0), range(len(self._of)))

    def _submit(self, lane: int, moe_layer: int, expert_batch: int) -> int:
        try:
            layer = self._of[moe_layer]
            x, out, _, _, tokens, places, n, m, indices, flag, value = _words(expert_batch, 11).tolist()
            words = _words(indices, 2 * n + 1 + 2 * m).copy()
            parts = np.split(words, np.cumsum([n, n + 1, m]))
            word = _tensor(flag, torch.int32, 1)
            job = self._lane.submit(
                moe_layer, ExpertBatch(*parts), _tensor(x, layer.dtype, tokens, layer.in_dim),
                _tensor(out, layer.dtype, places, layer.out_dim), Flag(word, value),
            )  # fmt: skip
        except BaseException as error:  # noqa: BLE001 - raised by `explain`: it cannot pass through C
            self._error = error
            return 0
        self._jobs[id(job)] = job
        return id(job)

    def _state(self, job: int) -> int:
        at = self._jobs[job]
        if not at.done():
            return 0
        try:
            at.wait()
        except BaseException as error:  # noqa: BLE001 - as above
            self._error = error
            return 2
        return 1

    def _span(self, job: int, start: int, end: int) -> int:
        _words(start, 1)[0], _words(end, 1)[0] = self._jobs[job].span_ns()
        return 0

    def _free(self, job: int) -> int:
        del self._jobs[job]
        return 0

    def serving(self, serve: Callable[..., Returned], *arguments: Any) -> Returned:
        if threading.current_thread() is not threading.main_thread():
            return serve(*arguments)
        raised: list[BaseException] = []
        former = sys.unraisablehook

        def note(report: "sys.UnraisableHookArgs") -> None:
            if report.exc_value is not None and "ctypes callback" in (report.err_msg or ""):
                raised.append(report.exc_value)
            else:
                former(report)

        try:
            sys.unraisablehook = note
            return serve(*arguments)
        finally:
            sys.unraisablehook = former
            if raised:
                raise raised[0]

    def settle(self, job: int) -> None:
        if job in self._jobs:
            self._jobs[job].cancel()
        with suppress(Exception):  # its run is over, whatever it says
            self._lane.drain()

    def explain(self) -> NoReturn:
        error, self._error = self._error, None
        raise error or RuntimeError("the CPU lane refused experts without a reason")


def _words(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((_int64 * count).from_address(address))


def _tensor(address: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count = int(np.prod(shape))
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


@torch.no_grad()
def _compute(
    layer: CpuLayer, expert_batch: ExpertBatch, i: int, x_TD: torch.Tensor, out: torch.Tensor
) -> None:
    """All pairs of the i-th expert, rounded where the GPU's kernels round: after each product, after its bias.

    A packed matrix is unpacked for it, and rounded to the dtype that computes.
    """
    pairs = slice(int(expert_batch.first[i]), int(expert_batch.first[i + 1]))
    if pairs.start == pairs.stop:
        return
    spec, expert = layer.spec, int(expert_batch.experts[i])

    def linear(x: torch.Tensor, weight: str, bias: str | None) -> torch.Tensor:
        w = layer.layout.matrices(layer.rows, weight)[expert]
        y = x @ w if spec.is_transposed else functional.linear(x, w)
        return y if bias is None else y + layer.layout.view(layer.rows, bias)[expert]

    h = linear(x_TD[torch.from_numpy(expert_batch.tokens[pairs])], spec.up, spec.up_bias)
    out[torch.from_numpy(expert_batch.places[pairs])] = linear(spec.gate(h), spec.down, spec.down_bias)


def _leader(threads: int) -> Worker:
    """One thread in which torch computes with `threads`, while it goes on as before in all others.

    `torch.set_num_threads` holds for the calling thread and for threads that are yet to come, not for others that are
    there (an OpenMP setting). So when the leader is set, the caller's own number is set again for those to come.
    """
    before = torch.get_num_threads()

    def start() -> None:
        torch.get_num_threads()  # at its first use a thread takes the number set last by anyone, over its own
        torch.set_num_threads(threads)

    leader = Worker("prescope-cpu", begin=start)
    leader.drain("the start of the CPU lane's thread")
    torch.set_num_threads(before)
    return leader

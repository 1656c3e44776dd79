"""The compiled lane: kernel.c behind ctypes. Python submits and waits; threads of C do the rest.

Knows bfloat16 and float16, weights stored either way or packed (`packed`), and gates that are tables.
"""

import ctypes
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import NoReturn

import numpy as np
import torch

from ...core.native import address_of
from ...core.worker import despite_interrupts, process_id, require_process
from ...errors import WaitTimedOut
from ..base import ExpertsSpec
from ..gates import GateTables, activation_tables, gate_tables
from .base import MOST_JOB_S, CpuJob, CpuLayer, ExpertBatch, Flag, LaneAddresses, LaneFunctions
from .build import CannotBuild, load
from .checks import check_batch
from .packed import Packed, packed_as

DTYPES = (torch.bfloat16, torch.float16)
#: How long a thread without work stays awake, unless it is told to: longer than from one layer's submission to the
#: next's where all layers have experts on the CPU.
SPIN_US = 200.0
_RUNNING, _DONE = 0, 1
#: So often a waiting thread returns to the interpreter, which is when Ctrl-C is heard.
_WAIT_NS = 100_000_000

_int64, _int32, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = (
        ("rows", _pointer), ("row_bytes", _int64), ("num_experts", _int64),
        ("up", _int64), ("down", _int64), ("up_bias", _int64), ("down_bias", _int64),
        ("in_dim", _int64), ("width", _int64), ("out_dim", _int64),
        ("gated", _int32), ("interleaved", _int32), ("transposed", _int32), ("half", _int32),
        ("gate", _pointer), ("value", _pointer), ("up_packing", Packed), ("down_packing", Packed),
    )  # fmt: skip


class _Lot(ctypes.Structure):
    _fields_ = (
        ("x", _pointer), ("out", _pointer),
        ("x_stride", _int64), ("out_stride", _int64), ("num_tokens", _int64), ("num_places", _int64),
        ("num_experts", _int64), ("num_pairs", _int64), ("indices", _pointer),
        ("flag", _pointer), ("flag_value", _int64),
    )  # fmt: skip


class NativeLane:
    """Experts by the compiled kernel.

    Args:
        threads: of C, which spin for `spin_us` after work and sleep then.
        defines: constants of kernel.c to try others of.

    Raises:
        CannotBuild: no compiler, another system, or a layer the kernel cannot compute; with the reason.
    """

    name = "native"

    def __init__(
        self,
        layers: Sequence[CpuLayer],
        threads: int,
        spin_us: float = SPIN_US,
        defines: tuple[str, ...] = (),
    ) -> None:
        tables = _Tables()
        self._layers = list(layers)
        self._tables = [tables.of(layer) for layer in layers]
        self._structs = [_struct(*both) for both in zip(self._layers, self._tables, strict=True)]
        self._calls = _Calls(load(defines=defines))
        self._pool = self._calls.open(threads, int(spin_us * 1e3))
        self.threads = self._calls.num_threads(self._pool) if self._pool else 0
        self.has_tiles = bool(self._pool and self._calls.has_tiles(self._pool))
        self._jobs: deque[_NativeJob] = deque()  # hold what threads may still read and write
        self._lost: list[
            _NativeJob
        ] = []  # submitted, and interrupted before their address was known: held to the end
        self._lock = threading.Lock()
        self._close = weakref.finalize(self, _close_pool, self._calls, self._pool)
        if self.threads < threads:
            self.close()
            raise CannotBuild(f"only {self.threads} of {threads} threads could be started")

    def submit(
        self,
        moe_layer: int,
        expert_batch: ExpertBatch,
        x_TD: torch.Tensor,
        out: torch.Tensor,
        flag: Flag | None,
    ) -> CpuJob:
        self._calls.require_here()
        indices = np.concatenate(expert_batch)
        struct = _Lot(
            x_TD.data_ptr(), out.data_ptr(), x_TD.stride(0), out.stride(0), x_TD.shape[0], out.shape[0],
            len(expert_batch.experts), len(expert_batch.tokens), indices.ctypes.data,
            flag.word.data_ptr() if flag else None, flag.value if flag else 0,
        )  # fmt: skip
        with self._lock:
            if not self._close.alive:
                raise CancelledError("the CPU lane is closed")
            while self._jobs and self._jobs[0].done():
                job = self._jobs.popleft()
                if not job.address:
                    self._lost.append(job)
            job = _NativeJob(self._calls, (x_TD, out, flag))
            self._jobs.append(job)
            job.address = self._calls.submit(
                self._pool, ctypes.byref(self._structs[moe_layer]), ctypes.byref(struct)
            )
            if not job.address:
                self._jobs.pop()
                check_batch(self._layers[moe_layer], expert_batch, x_TD, out)
                raise MemoryError(f"no memory for {len(expert_batch.tokens)} pairs on the CPU lane")
        return job

    def functions(self) -> LaneFunctions:
        calls = self._calls
        submit, state, span, free = map(address_of, (calls.submit, calls.state, calls.span, calls.free))
        layers = [ctypes.addressof(struct) for struct in self._structs]
        return _NativeFunctions(LaneAddresses(submit, state, span, free, self._pool), layers, self)

    def stay_awake(self, on: bool) -> None:
        self._calls.require_here()
        with self._lock:
            if self._close.alive:
                self._calls.stay_awake(self._pool, on)

    def close(self) -> None:
        if not self._calls.is_here:
            return
        with self._lock:
            self._close()
            self._jobs.clear()
            self._lost.clear()


class _NativeFunctions(LaneFunctions):
    def settle(self, job: int) -> None:
        calls = self._keep._calls
        if job:  # submission is one call of C: a job or none
            calls.cancel(job)
            calls.state_after(job, MOST_JOB_S)

    def explain(self) -> NoReturn:
        raise CancelledError("experts on the CPU were cancelled, or there is no memory for them")


class _NativeJob:
    def __init__(self, calls: "_Calls", keep: object) -> None:
        self._calls, self._keep = calls, keep
        self.address = 0  # until it is submitted

    def __del__(self) -> None:
        if (
            self.address and self._calls.is_here
        ):  # in a forked child a thread that is not there may hold the lock
            self._calls.free(self.address)

    def done(self) -> bool:
        return not self.address or self._calls.state(self.address) != _RUNNING

    def wait(self, timeout_s: float | None = None) -> None:
        state = self._calls.state_after(self.address, MOST_JOB_S if timeout_s is None else timeout_s)
        if state == _DONE:
            return
        if state != _RUNNING:
            raise CancelledError("experts on the CPU were cancelled")
        if timeout_s is None:
            raise WaitTimedOut(
                f"experts computed on the CPU did not come within {MOST_JOB_S:.0f} s; run again"
            )
        raise TimeoutError(f"experts on the CPU are not done after {timeout_s} s")

    def cancel(self) -> None:
        self._calls.cancel(self.address)

    def span_ns(self) -> tuple[int, int]:
        start, end = _int64(), _int64()
        self._calls.span(self.address, ctypes.byref(start), ctypes.byref(end))
        return start.value, end.value


class _Calls:
    """The library's functions with their types. Only those that wait give up the interpreter's lock: to get it back
    from a busy main thread takes longer than the others run.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._owner = process_id()
        brief = ctypes.PyDLL(library._name)
        self.open = _typed(library.prescope_open, _pointer, ctypes.c_int, _int64)
        self.close = _typed(library.prescope_close, ctypes.c_int, _pointer, _int64)
        self.wait = _typed(library.prescope_wait, ctypes.c_int, _pointer, _int64)
        self.num_threads = _typed(brief.prescope_num_threads, ctypes.c_int, _pointer)
        self.has_tiles = _typed(brief.prescope_has_tiles, ctypes.c_int, _pointer)
        self.submit = _typed(brief.prescope_submit, _pointer, _pointer, _pointer, _pointer)
        self.stay_awake = _typed(brief.prescope_stay_awake, None, _pointer, ctypes.c_int)
        self.free = _typed(brief.prescope_free, None, _pointer)
        self.state = _typed(brief.prescope_state, ctypes.c_int, _pointer)
        self.cancel = _typed(brief.prescope_cancel, None, _pointer)
        self.span = _typed(brief.prescope_span, None, _pointer, _pointer, _pointer)

    @property
    def is_here(self) -> bool:
        """Whether this is the process whose threads compute, and not one forked from it."""
        return self._owner == process_id()

    def require_here(self) -> None:
        """Before a lock is taken: in a forked process a thread that is not there may hold it."""
        require_process(self._owner, "the CPU lane")

    def state_after(self, job: int, timeout_s: float) -> int:
        """A job's state when it is over, or after `timeout_s`, by the waits rather than the clock, as `Worker.wait`."""
        self.require_here()
        left_ns = int(timeout_s * 1e9)
        while True:
            begin_ns = time.monotonic_ns()
            state = int(self.wait(job, min(left_ns, _WAIT_NS)))
            if state != _RUNNING or left_ns <= 0:
                return state
            left_ns -= min(_WAIT_NS, time.monotonic_ns() - begin_ns)  # a signal ends a wait early


def _typed(function, result, *arguments):  # type: ignore[no-untyped-def]
    function.restype, function.argtypes = result, arguments
    return function


def _close_pool(calls: _Calls, pool: int) -> None:
    """Raises WaitTimedOut: an expert takes longer than MOST_JOB_S; a job ends behind the expert it is at."""
    if pool and calls.is_here:  # a forked child has the memory, but not the threads that would end
        # What threads still read and write is given up afterwards, so an interrupt waits as well.
        despite_interrupts(partial(_await_end, calls, pool))


def _await_end(calls: _Calls, pool: int) -> None:
    for _ in range(int(MOST_JOB_S * 1e9 / _WAIT_NS)):
        if not (num_left := calls.close(pool, _WAIT_NS)):
            return
    raise WaitTimedOut(
        f"{num_left} threads of the CPU lane have not ended within {MOST_JOB_S:.0f} s: they are computing an expert; "
        f"their memory is kept"
    )


class _Tables:
    """Gate tables by layer. Layers of a model have gates alike: they share one, which then stays in the caches."""

    def __init__(self) -> None:
        self._known: dict[bytes, GateTables] = {}

    def of(self, layer: CpuLayer) -> GateTables:
        if layer.dtype not in DTYPES:
            raise CannotBuild(f"the compiled kernel computes {DTYPES}, the experts are {layer.dtype}")
        gated = layer.up_dim == 2 * layer.width
        if not gated and layer.up_dim != layer.width:
            raise CannotBuild(f"`up` is {layer.up_dim} wide and `down` takes {layer.width}")
        tables = _tables_of(layer.spec, gated, layer.dtype)
        if tables is None:
            raise CannotBuild("the gate between up and down is not a product of functions of one number each")
        parts = [tables.gate, *([] if tables.value is None else [tables.value])]
        key = b"".join([bytes([tables.interleaved]), *(part.numpy().tobytes() for part in parts)])
        return self._known.setdefault(key, tables)


def _tables_of(spec: ExpertsSpec, gated: bool, dtype: torch.dtype) -> GateTables | None:
    try:
        return gate_tables(spec.gate, dtype) if gated else activation_tables(spec.gate, dtype)
    except (RuntimeError, ValueError, TypeError) as error:  # code of the family's own, on the CPU
        raise CannotBuild(f"the gate cannot be called on the CPU: {error}") from error


def _struct(layer: CpuLayer, tables: GateTables) -> _Layer:
    spec, layout = layer.spec, layer.layout

    def offset(name: str | None) -> int:
        return -1 if name is None else layout.field(name).offset

    return _Layer(
        layer.rows.data_ptr(), layer.rows.stride(0), layer.rows.shape[0],
        offset(spec.up), offset(spec.down), offset(spec.up_bias), offset(spec.down_bias),
        layer.in_dim, layer.width, layer.out_dim,
        tables.value is not None, tables.interleaved, spec.is_transposed, layer.dtype == torch.float16,
        tables.gate.data_ptr(), None if tables.value is None else tables.value.data_ptr(),
        packed_as(layout, spec.up), packed_as(layout, spec.down),
    )  # fmt: skip

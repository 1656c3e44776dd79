"""Pages of host memory: mapped on their own, huge where the kernel allows it, touched by several threads.

Knows nothing of experts or CUDA. What decides how fast memory can be filled and pinned is the size of its pages and
who faults them in; `benchmarks/startup.py` measures both.
"""

import _thread
import mmap
import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from ..core.units import format_bytes
from ..core.worker import PATIENCE_S, SLICE_S, Latch
from ..errors import NotEnoughMemory, WaitTimedOut

HUGE_PAGE_BYTES = 2 << 20
#: Bytes one thread copies or touches at a time: a few huge pages, and enough that handing it out costs nothing.
JOB_BYTES = 8 << 20
#: Two threads of a 2-core VM fill fresh huge pages at 11 GB/s; sixteen are beyond what one socket's DRAM takes.
MOST_THREADS = 16


class HostPages:
    """`nbytes` of anonymous memory that shares no page with anything else.

    `cudaHostRegister` works on whole pages, and two tensors from the ordinary allocator may share one.

    Raises:
        NotEnoughMemory: the system does not give it.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        is_large = nbytes >= HUGE_PAGE_BYTES
        length = max(1, nbytes) + (HUGE_PAGE_BYTES if is_large else 0)
        # Private: Python maps shared by default, which is shmem, for which most kernels give no huge pages whatever
        # madvise says (shmem_enabled=never). Touching it by two threads ran at 2.5 instead of 16 GB/s (2-core VM).
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        try:
            self._memory: mmap.mmap | None = mmap.mmap(-1, length, **flags)
        except (OSError, ValueError) as error:
            raise NotEnoughMemory(
                f"the system refuses {format_bytes(length)} of host memory for experts ({error}); close other "
                f"programs, raise a limit (ulimit -v, a container's), or take a smaller model or dtype"
            ) from error
        if is_large and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                # A kernel without huge pages answers EINVAL. Ordinary pages hold the same bytes; only slower to fault.
                self.advice = "refused"
            else:
                self.advice = "huge"
        else:
            self.advice = "none"
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE_PAGE_BYTES if is_large else 0
        #: The memory as a flat uint8 tensor, on a huge page's boundary if it is as large as one.
        self.data = whole[start : start + nbytes]

    def touch(self, threads: int | None = None) -> None:
        """Fault all pages in, by several threads; they read as zeros. Bytes that are there already are lost."""
        flat = self.data.numpy()
        pieces = [flat[i : i + JOB_BYTES : mmap.PAGESIZE] for i in range(0, self.nbytes, JOB_BYTES)]
        run_jobs([partial(piece.fill, 0) for piece in pieces], threads)

    def keep_from_children(self) -> None:
        """Leave these pages out of a child process: a fork would copy pinned pages one by one, all of them."""
        if self._memory is not None and hasattr(mmap, "MADV_DONTFORK"):
            self._memory.madvise(mmap.MADV_DONTFORK)

    def close(self) -> None:
        """Give the memory back as soon as no view of it is left."""
        self.data = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._memory = None


def copy_rows(target: torch.Tensor, source: torch.Tensor, threads: int | None = None) -> None:
    """Copy (N, n) bytes of `source` to `target`, both on the CPU with contiguous rows, by several threads."""
    to, of = target.numpy(), source.numpy()
    num_rows, row_bytes = of.shape
    if row_bytes >= JOB_BYTES:
        jobs = [
            partial(np.copyto, to[row, i : i + JOB_BYTES], of[row, i : i + JOB_BYTES])
            for row in range(num_rows)
            for i in range(0, row_bytes, JOB_BYTES)
        ]
    else:
        step = max(1, JOB_BYTES // max(1, row_bytes))
        jobs = [partial(np.copyto, to[i : i + step], of[i : i + step]) for i in range(0, num_rows, step)]
    run_jobs(jobs, threads)


def run_jobs(jobs: Sequence[Callable[[], None]], threads: int | None = None) -> None:
    """Run jobs that leave the interpreter (copies) by `threads`, or all CPUs; the first error is raised."""
    threads = min(threads or num_threads(), len(jobs))
    if threads <= 1:
        for job in jobs:
            job()
        return
    # Our own threads, not torch's: those are set to one in tests and by users for good reasons of their own.
    left, errors = deque(jobs), list[BaseException]()
    ended = [Latch() for _ in range(threads)]
    try:
        for latch in ended:
            _thread.start_new_thread(_work_off, (left, errors, latch))
        _await_all(ended, left)
    except BaseException:
        left.clear()  # what has begun is waited for: nobody writes into memory that is given up
        _await_all(ended, left)
        raise
    if errors:
        raise errors[0]


def _work_off(left: deque[Callable[[], None]], errors: list[BaseException], ended: Latch) -> None:
    try:
        while not errors:
            try:
                job = left.popleft()
            except IndexError:  # there is nothing left
                return
            job()
    except BaseException as error:  # noqa: BLE001 - raised by `run_jobs`
        errors.append(error)
    finally:
        ended.set()


def _await_all(ended: Sequence[Latch], left: deque[Callable[[], None]]) -> None:
    num_left, waited_s = len(left), 0.0
    for latch in ended:
        while not latch.wait(SLICE_S):
            num_left, waited_s = len(left), 0.0 if len(left) < num_left else waited_s + SLICE_S
            if waited_s > PATIENCE_S:
                raise WaitTimedOut(
                    f"{num_left} pieces of host memory are left to fill, and none was for {PATIENCE_S:.0f} s; "
                    f"the machine may be out of memory"
                )


def num_threads() -> int:
    """Threads that fill host memory: the CPUs this process may use, at most MOST_THREADS."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, MOST_THREADS)

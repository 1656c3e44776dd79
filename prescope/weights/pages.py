"""Pages of host memory: mapped on their own, huge where the kernel allows it, touched by several threads.

Knows nothing of experts or CUDA. What decides how fast memory can be filled and pinned is the size of its pages and
who faults them in; `benchmarks/startup.py` measures both.
"""

import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

HUGE_PAGE_BYTES = 2 << 20
#: Bytes one thread copies or touches at a time: a few huge pages, and enough that handing it out costs nothing.
JOB_BYTES = 8 << 20
#: Two threads of a 2-core VM fill fresh huge pages at 11 GB/s; sixteen are beyond what one socket's DRAM takes.
MOST_THREADS = 16


class HostPages:
    """`nbytes` of anonymous memory that shares no page with anything else.

    `cudaHostRegister` works on whole pages, and two tensors from the ordinary allocator may share one.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        is_large = nbytes >= HUGE_PAGE_BYTES
        length = max(1, nbytes) + (HUGE_PAGE_BYTES if is_large else 0)
        # Private: Python maps shared by default, which is shmem, for which most kernels give no huge pages whatever
        # madvise says (shmem_enabled=never). Touching it by two threads ran at 2.5 instead of 16 GB/s (2-core VM).
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._memory: mmap.mmap | None = mmap.mmap(-1, length, **flags)
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
        self.data = torch.empty(0, dtype=torch.uint8)
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
    with ThreadPoolExecutor(threads, thread_name_prefix="prescope-fill") as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


def num_threads() -> int:
    """Threads that fill host memory: the CPUs this process may use, at most MOST_THREADS."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, MOST_THREADS)

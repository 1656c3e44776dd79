"""A thread that works through jobs in order, and waits that end whatever happens.

Ctrl-C may come between any two lines of Python in the main thread. A Condition of threading, and what is built on it
(Event, queue.Queue, Future, ThreadPoolExecutor), is Python: interrupted while it is entered, it stays locked, and
whoever wants it next waits for ever. Here are primitive locks and SimpleQueue only, each step of them one call of C.
"""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

from ..errors import ForkedProcess, PrescopeError, WaitTimedOut

#: So often a wait looks at whether what it waits for can still come.
SLICE_S = 0.1
#: What a wait gives the other side beyond the time that the work itself takes. It counts slices, not the clock: a
#: process that was stopped for an hour has not waited for it.
PATIENCE_S = 60.0

_process = os.getpid()


def _forked() -> None:
    global _process
    _process = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def process_id() -> int:
    """This process; os.getpid asks the kernel, which takes up to a microsecond in a sandbox."""
    return _process


def require_process(owner: int, what: str) -> None:
    """Raise ForkedProcess if `what` belongs to another process, the one that this was forked from."""
    if owner != _process:
        raise ForkedProcess(
            f"{what} belongs to process {owner}, and process {_process} was forked from it: the threads and the GPU's "
            f"memory stayed behind. Load the model in this process, or start processes by multiprocessing's 'spawn'"
        )


def despite_interrupts(function: Callable[[], object]) -> None:
    """Call a function again and again until no interrupt came in between, and raise the last one then.

    For what may not be left half done, where the function does what is left when it is called again. A signal's handler
    may raise anything, a TimeoutError say: that is an interrupt too, unless it comes again. Then it is the function's
    own error, as one of prescope's is at once.
    """
    interrupt: BaseException | None = None
    while True:
        try:
            function()
            break
        except PrescopeError:
            raise
        except BaseException as error:
            if isinstance(interrupt, Exception) and isinstance(error, Exception):
                raise
            interrupt = error
    if interrupt is not None:
        raise interrupt


class Latch:
    """Something that comes true once, which threads can wait for."""

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Call it once."""
        self._is_set = True
        self._lock.release()

    @property
    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_s: float) -> bool:
        """Whether it is true, after `timeout_s` at most."""
        # An interrupt between the two calls leaves the lock taken: others then learn it when their time is over.
        if not self._is_set and self._lock.acquire(timeout=timeout_s):
            self._lock.release()
        return self._is_set


class Worker:
    """A thread that runs jobs one after the other, in their order.

    Args:
        name: of the thread. `begin`: called in it before the first job.
    """

    def __init__(self, name: str, begin: Callable[[], object] | None = None) -> None:
        self._name, self._owner = name, process_id()
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._ended = Latch()
        threading.Thread(target=self._work, args=(begin,), name=name, daemon=True).start()

    def _work(self, begin: Callable[[], object] | None) -> None:
        try:
            if begin is not None:
                begin()
            while (job := self._jobs.get()) is not None:
                job()
                del job  # and with it the tensors it was about
        finally:
            self._ended.set()

    @property
    def has_ended(self) -> bool:
        """Whether its thread is gone: closed, or ended by a job's error."""
        return self._ended.is_set

    @property
    def is_here(self) -> bool:
        """Whether this is the process that started the thread, and not one forked from it."""
        return self._owner == _process

    def require_here(self) -> None:
        """Raise ForkedProcess in a process that was forked since the thread was started."""
        require_process(self._owner, f"the thread {self._name}")

    def submit(self, job: Callable[[], object]) -> None:
        """Run a job behind all others. Raises ForkedProcess."""
        self.require_here()
        self._jobs.put(job)

    def wait(self, latch: Latch, what: str, work_s: float = 0.0) -> None:
        """Wait for a latch that one of its jobs sets.

        Args:
            what: is waited for, in words. `work_s`: what the jobs before it take, and itself.

        Raises:
            ForkedProcess: the thread is in another process.
            WaitTimedOut: the thread has ended, or it took PATIENCE_S longer than that.
        """
        if latch.is_set:
            return
        self.require_here()
        slices_left = int((work_s + PATIENCE_S) / SLICE_S)
        while not latch.wait(SLICE_S):
            slices_left -= 1
            if self.has_ended and not latch.is_set:
                raise WaitTimedOut(
                    f"{what} will not come: the thread {self._name} has ended; attach the model again"
                )
            if slices_left <= 0:
                raise WaitTimedOut(
                    f"{what} did not come within {work_s + PATIENCE_S:.0f} s from the thread {self._name}; "
                    f"recover() and run again"
                )

    def drain(self, what: str, work_s: float = 0.0) -> None:
        """Wait until all jobs so far are done. Raises as `wait`."""
        done = Latch()
        self.submit(done.set)
        self.wait(done, what, work_s)

    def leave(self) -> None:
        """End the thread behind its jobs, which nobody waits for; does nothing in a forked process."""
        if not self.has_ended and self.is_here:
            self._jobs.put(None)

    def close(self, what: str, work_s: float = 0.0) -> None:
        """End the thread behind its jobs; does nothing the second time or in a forked process. Raises WaitTimedOut."""
        if self.has_ended or not self.is_here:
            return
        self._jobs.put(None)
        self.wait(self._ended, what, work_s)

"""Whose turn it is: slots, graph buffers and the static cache serve one run, or one forward pass, at a time.

Knows nothing of models; `forwards` takes a turn for each forward pass, `generate` and `job` for a whole run.
"""

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import torch

from ..core.types import Returned
from ..core.worker import process_id, require_process
from ..errors import WaitTimedOut

P = ParamSpec("P")
#: After this long whoever waits is told for whom.
PATIENCE_S = 2.0
#: How often a wait looks whether it was cancelled.
POLL_S = 0.05
#: Who comes while others wait lets them go first: a lock that is given back wakes a thread, and whoever is awake
#: already would take it before that one runs.
YIELD_S = 1e-3


@dataclass(eq=False)
class Claim:
    """One thread's wish to have the turn, and its holding it.

    Attributes:
        what: what it is for, as others read it who wait. `thread`: its ident; `thread_name`: its name.
        was_told: asked for a sign from outside to end; `is_told` is one given to this claim alone.
        is_patient: whether `Turn.cancel` leaves it alone: it comes after what is cancelled.
        afterwards: called when its turn is over, before anybody else has one.
    """

    what: str
    was_told: Callable[[], bool] | None = None
    is_patient: bool = False
    thread: int = field(default_factory=threading.get_ident)
    thread_name: str = field(default_factory=lambda: threading.current_thread().name)
    is_told: bool = False
    afterwards: Callable[[], None] | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether it is to end."""
        return self.is_told or (self.was_told is not None and self.was_told())

    def __str__(self) -> str:
        return f"{self.what} in thread {self.thread_name!r}"


class Turn:
    """Lets one thread in at a time, and that one as deep as it likes.

    A turn is given back whatever ends it, a `KeyboardInterrupt` between any two instructions included.

    Args:
        around: entered around every turn, in its thread.

    Attributes:
        owner: ident of the thread that has the turn, or 0. Asked in every layer, so no property.
    """

    def __init__(self, around: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self._around = around
        # Owned by a thread: giving back what was never taken is an error instead of somebody else's loss.
        self._lock = threading.RLock()
        self._holder: Claim | None = None
        self.owner = 0
        self._process = process_id()
        self._waiting: list[Claim] = []

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has the turn."""
        return self.owner == threading.get_ident()

    @property
    def holder(self) -> Claim | None:
        """Who has the turn, or None."""
        return self._holder

    def tell(self) -> None:
        """Tell whoever has the turn to end."""
        if (holder := self._holder) is not None:
            holder.is_told = True

    def cancel(self) -> None:
        """Tell whoever has the turn to end, and whoever waits for it to give up, but for the patient."""
        self.tell()
        for claim in list(self._waiting):
            claim.is_told = claim.is_told or not claim.is_patient

    def afterwards(self, function: Callable[[], None]) -> None:
        """Call a function when the turn of the calling thread, which has it, is over."""
        assert self.is_mine and self._holder is not None
        self._holder.afterwards = function

    # The frames between a model's `__call__` and its forward are not dynamo's to trace; the forward is.
    @torch.compiler.disable(recursive=False)
    def run(
        self,
        what: str,
        function: Callable[..., Any],
        arguments: Sequence[Any] = (),
        keywords: Mapping[str, Any] | None = None,
        was_told: Callable[[], bool] | None = None,
        is_patient: bool = False,
        most_s: float | None = None,
    ) -> Any:
        """Call a function when it is this thread's turn, at once if it has the turn already.

        Args:
            what: what for, as others read it who wait.
            was_told, is_patient: as of `Claim`; asked every 50 ms while waiting.
            most_s: longest wait, for one who has told the other to end; else it lasts until that is over.

        Raises:
            CancelledError: told to end before the turn came.
            WaitTimedOut: the wait took longer than `most_s`.
            ForkedProcess: whose turns these are is in the process that this one was forked from.
        """
        require_process(self._process, "this engine")  # before anything of the GPU's is asked for
        keywords = keywords or {}
        if self.is_mine:
            return function(*arguments, **keywords)
        claim = Claim(what, was_told, is_patient)
        lock = self._lock
        if self._waiting:
            time.sleep(YIELD_S)
        # CPython looks for signals after a call, not before one: between `acquire` and `try`, or in a `finally`
        # before `release`, there is no place for an interrupt. Hence no method of ours and no `with` of Python's here.
        try:
            if not lock.acquire(False):
                self._wait(claim, most_s)
            self._holder, self.owner = claim, claim.thread
            with self._around():
                try:
                    if claim.is_cancelled:
                        raise CancelledError(f"{what} was cancelled before it began")
                    return function(*arguments, **keywords)
                finally:
                    if claim.afterwards is not None:
                        claim.afterwards()
        finally:
            if self._holder is claim:
                self._holder, self.owner = None, 0
            # Not `suppress`: that is a call, and an interrupt could strike behind it.
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:  # interrupted while it waited: it never had the turn
                pass

    def _wait(self, claim: Claim, most_s: float | None) -> None:
        """Return with the lock taken."""
        self._waiting.append(claim)
        num_waits, is_said = 0, False
        try:
            while not self._lock.acquire(timeout=POLL_S):
                # Waits are counted, not the clock: a process that was stopped for an hour has not waited for it.
                num_waits += 1
                if claim.is_cancelled:
                    raise CancelledError(f"{claim.what} was cancelled while it waited for {self._holder}")
                if most_s is not None and num_waits * POLL_S >= most_s:
                    raise WaitTimedOut(
                        f"{claim.what} waited {most_s:.0f} s for {self._holder}, which was told to end and has not"
                    )
                if not is_said and num_waits * POLL_S >= PATIENCE_S:
                    is_said = True
                    warnings.warn(
                        f"{claim} waits for {self._holder}: an engine serves one at a time. cancel() of the engine "
                        f"ends both, Ctrl-C this wait",
                        stacklevel=3,
                    )
        finally:
            self._waiting.remove(claim)


def in_turn(
    what: str, is_patient: bool = True
) -> Callable[[Callable[Concatenate[Any, P], Returned]], Callable[Concatenate[Any, P], Returned]]:
    """Make a method of whoever has a `turn` run in it; arguments as of `Turn.run`."""

    def decorate(method: Callable[Concatenate[Any, P], Returned]) -> Callable[Concatenate[Any, P], Returned]:
        @wraps(method)
        def in_its_turn(self: Any, *args: P.args, **kwargs: P.kwargs) -> Returned:
            result: Returned = self.turn.run(what, method, (self, *args), kwargs, is_patient=is_patient)
            return result

        return in_its_turn

    return decorate

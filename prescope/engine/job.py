"""A run in a thread of its own, so that whoever started it can watch it and go on."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Self

from ..core.types import Returned
from ..core.worker import SLICE_S, Latch, process_id, require_process
from ..errors import WaitTimedOut
from .turn import Turn

#: One text, several, or a name (a domain, say) for each: the names go into the trace.
NamedPrompts = str | Sequence[str] | Mapping[str, str]
Watcher = Callable[["Job[Any]"], None]
#: Least time between two calls of who shows a run; a person reads no faster, and the run is not kept from its work.
SHOW_S = 0.1
#: Most that a result waits for a viewer; one that itself waits for the result would keep it for ever.
LAST_SHOW_S = 5.0
#: Tokens whose times say how fast the others will come.
RECENT = 32


class Job(Generic[Returned]):
    """A run in a thread: watch `progress`, `cancel` it at the next token, or wait for its `result`.

    Args:
        run: makes the result; takes `on_step` and `settings`.
        turn: held while it runs.
        so_far: the new tokens of each sequence, asked from the run's thread; None: they come with the result.
        what: it is, as others read it who wait for it.

    Attributes:
        token_times_s: when each token came, by `time.monotonic`.
        tokens: new tokens of each sequence as of the last `on_progress`.
    """

    def __init__(
        self,
        run: Callable[..., Returned],
        turn: Turn,
        settings: dict[str, Any],
        so_far: Callable[[], list[list[int]]] | None = None,
        what: str = "a job",
    ) -> None:
        self._owner = process_id()
        self._future: Future[Returned] = Future()
        self._ended = Latch()
        self._cancel = threading.Event()
        self._run, self._turn, self._settings = run, turn, settings
        self._so_far, self._what = so_far, what
        self.token_times_s: list[float] = []
        self.tokens: list[list[int]] = []
        self._watchers: list[Watcher] = []
        self._viewers: list[Watcher] = []
        self._viewed_s = 0.0
        self._view, self._is_over = threading.Event(), False
        self._viewing = threading.Thread(target=self._show, name="prescope-progress", daemon=True)
        self._thread = threading.Thread(target=self._main, name="prescope-run", daemon=True)

    def start(self) -> Self:
        """Begin, once; a run that is under way is waited for first."""
        self._thread.start()
        return self

    @property
    def progress(self) -> float:
        """Share of the new tokens that are there, 0 to 1; a sequence may end early."""
        if self.is_done:
            return 1.0
        wanted = self._settings.get("max_new_tokens")
        return min(1.0, self.num_tokens / wanted) if wanted else 0.0

    @property
    def num_tokens(self) -> int:
        """New tokens of each sequence so far."""
        return len(self.token_times_s)

    @property
    def left_s(self) -> float | None:
        """Seconds until the last token, as fast as the recent ones came; None before the second one."""
        recent, wanted = self.token_times_s[-RECENT:], self._settings.get("max_new_tokens")
        if len(recent) < 2 or not wanted:
            return None
        return (wanted - self.num_tokens) * (recent[-1] - recent[0]) / (len(recent) - 1)

    @property
    def is_done(self) -> bool:
        return self._future.done()

    @property
    def is_cancelled(self) -> bool:
        return self._cancel.is_set()

    @property
    def error(self) -> BaseException | None:
        """What the run raised; None while it runs and when it went well."""
        return self._future.exception() if self.is_done else None

    def cancel(self) -> None:
        """End after the token the run is at; `result` then returns what there is by then. A job that waits gives up."""
        self._cancel.set()

    def result(self, timeout_s: float | None = None) -> Returned:
        """Wait for the run, and for those who watch it, and return it; Ctrl-C ends the wait and not the run.

        Raises:
            CancelledError: cancelled before the first token.
            TimeoutError: not ready after `timeout_s`.
            WaitTimedOut: it can never be: the job was not started, or its thread is gone.
            ForkedProcess: it runs in the process that this one was forked from.
            PrescopeError and others: what the run raised.
        """
        if threading.current_thread() is not self._thread:  # a watcher asks from the run's own thread
            self._await_thread(timeout_s)
        return self._future.result(0)

    def _await_thread(self, timeout_s: float | None) -> None:
        """Return when the thread has ended, or after `timeout_s`."""
        # Not the thread's own join: interrupted, CPython 3.11 takes it for ended, and the next one returns at once.
        require_process(self._owner, "this job")
        if self._thread.ident is None:
            raise WaitTimedOut("the run will not come: this job was not started; call start()")
        slices, rest_s = (-1, 0.0) if timeout_s is None else divmod(max(0.0, timeout_s), SLICE_S)
        while slices != 0 and not self._ended.wait(SLICE_S):
            slices -= 1
        if self._ended.wait(rest_s) and not self.is_done:
            raise WaitTimedOut(
                "the run will not come: its thread has ended without a result; start another one"
            )

    def on_step(self, watcher: Watcher) -> None:
        """Call `watcher(job)` from the run's thread after each token."""
        self._watchers.append(watcher)

    def on_progress(self, viewer: Watcher) -> None:
        """Call `viewer(job)` ten times a second at most while tokens come, and not any more once `on_done` is told.

        From a thread of its own, so that what it shows keeps no step waiting; before `start`. It must not wait for the
        result.
        """
        self._viewers.append(viewer)

    def on_done(self, watcher: Watcher) -> None:
        """Call `watcher(job)` once the run has ended in whatever way."""
        self._future.add_done_callback(lambda _: watcher(self))

    def _main(self) -> None:
        try:
            self._work()
        finally:
            self._ended.set()

    def _work(self) -> None:
        if self._viewers:
            self._viewing.start()
        try:
            settings = {"on_step": self._step, **self._settings}
            result = self._turn.run(self._what, self._run, (), settings, was_told=self._cancel.is_set)
        except BaseException as error:  # noqa: BLE001 - nothing is lost: result() raises it in the caller's thread
            self._end_view()
            self._future.set_exception(error)
        else:
            self._end_view()
            self._future.set_result(result)

    def _step(self, num_tokens: int) -> None:
        now = time.monotonic()
        # A draft's tokens come several at a time.
        self.token_times_s.extend([now] * (num_tokens - len(self.token_times_s)))
        for watcher in self._watchers:
            watcher(self)
        if self._viewers and now - self._viewed_s >= SHOW_S:
            self._viewed_s = now
            if self._so_far is not None:
                self.tokens = self._so_far()
            self._view.set()

    def _show(self) -> None:
        while True:
            self._view.wait()
            self._view.clear()
            if self._is_over:
                return
            for viewer in self._viewers:
                viewer(self)

    def _end_view(self) -> None:
        """Let the viewers come to their end, so that nothing they show comes after the result."""
        self._is_over = True
        self._view.set()
        if self._viewers:
            self._viewing.join(LAST_SHOW_S)

"""A run in a thread of its own, so that whoever started it can watch it and go on."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Self, TypeVar

from .turn import Turn

#: One text, several, or a name (a domain, say) for each: the names go into the trace.
NamedPrompts = str | Sequence[str] | Mapping[str, str]
Watcher = Callable[["Job[Any]"], None]
#: What a run returns.
R = TypeVar("R")


class Job(Generic[R]):
    """A run in a thread: watch `progress`, `cancel` it at the next token, or wait for its `result`.

    Args:
        run: makes the result; takes `on_step` and `settings`.
        turn: held while it runs.
    """

    def __init__(
        self,
        run: Callable[..., R],
        turn: Turn,
        settings: dict[str, Any],
    ) -> None:
        self._future: Future[R] = Future()
        self._cancel = threading.Event()
        self._run, self._turn, self._settings = run, turn, settings
        self._tokens = 0
        self._watchers: list[Watcher] = []
        self._thread = threading.Thread(target=self._work, name="prescope-run", daemon=True)

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
        return min(1.0, self._tokens / wanted) if wanted else 0.0

    @property
    def num_tokens(self) -> int:
        """New tokens of each sequence so far."""
        return self._tokens

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

    def result(self, timeout_s: float | None = None) -> R:
        """Wait for the run, and for those who watch it, and return it.

        Raises:
            CancelledError: cancelled before the first token.
            TimeoutError: not ready after `timeout_s`.
            PrescopeError and others: what the run raised.
        """
        if threading.current_thread() is not self._thread:  # a watcher asks from the run's own thread
            self._thread.join(timeout_s)
        return self._future.result(0)

    def on_step(self, watcher: Watcher) -> None:
        """Call `watcher(job)` from the run's thread after each token."""
        self._watchers.append(watcher)

    def on_done(self, watcher: Watcher) -> None:
        """Call `watcher(job)` once the run has ended in whatever way."""
        self._future.add_done_callback(lambda _: watcher(self))

    def _work(self) -> None:
        try:
            settings = {"on_step": self._step, **self._settings}
            result = self._turn.run("a job", self._run, (), settings, was_told=self._cancel.is_set)
        except BaseException as error:  # noqa: BLE001 - nothing is lost: result() raises it in the caller's thread
            self._future.set_exception(error)
        else:
            self._future.set_result(result)

    def _step(self, num_tokens: int) -> None:
        self._tokens = num_tokens
        for watcher in self._watchers:
            watcher(self)

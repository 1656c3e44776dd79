"""What is asked once a slider rests, and what a slider waits for while it is dragged."""

import asyncio
import threading
import time
from collections.abc import Callable

from .figures import is_headless


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The kernel's loop, when a message of the page is being handled; None in tests and in other threads."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def is_alone() -> bool:
    """Nobody waits for the page: without a browser, in tests and in other threads."""
    return is_headless() or running_loop() is None


class RestTimer:
    """Calls `work` in a thread of its own once nothing has moved for `rest_s`; at once where nobody waits."""

    def __init__(self, work: Callable[[], None], rest_s: float) -> None:
        self._work, self._rest_s = work, rest_s
        self._timer: threading.Timer | None = None

    def restart(self) -> None:
        """Something moved."""
        self.cancel()
        if is_alone():
            self._work()
            return
        self._timer = threading.Timer(self._rest_s, self._work)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Ask no more."""
        if self._timer is not None:
            self._timer.cancel()


class Throttle:
    """Calls `work` now, or, while calls come fast, when the last one is `least_s` ago; the last call always counts."""

    def __init__(self, work: Callable[[], None], least_s: float) -> None:
        self._work, self._least_s = work, least_s
        self._done = 0.0
        self._later: asyncio.TimerHandle | None = None

    def call(self) -> None:
        """Soon."""
        wait = self._done + self._least_s - time.monotonic()
        loop = running_loop()
        if wait <= 0 or loop is None:
            self._work()
        elif self._later is None:
            self._later = loop.call_later(wait, self._call_later)

    def done(self) -> None:
        """The work was done just now, whoever asked for it."""
        self._done = time.monotonic()

    def cancel(self) -> None:
        """Drop a call that waits."""
        if self._later is not None:
            self._later.cancel()

    def _call_later(self) -> None:
        self._later = None
        self._work()

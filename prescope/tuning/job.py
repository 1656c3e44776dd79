"""A sweep in a thread of its own: watched, paused, cancelled from elsewhere."""

import threading
from collections.abc import Callable
from typing import Any

from ..engine.job import Job
from ..engine.turn import Turn
from .progress import Progress


class SweepJob(Job[Progress]):
    """A job, as of a run, that can also be paused; `status` says how far it is, `progress` is the share of its points.

    Watchers (`on_step`) are called with every progress, from the sweep's thread.

    Args:
        run: `Sweep.run`. `turn`: of the sweep. `settings`: of the run.
    """

    def __init__(self, run: Callable[..., Progress], turn: Turn, settings: dict[str, Any]) -> None:
        super().__init__(self._sweep, turn, settings)
        self._of_sweep = run
        self._pause = threading.Event()
        self._status: Progress | None = None

    @property
    def status(self) -> Progress | None:
        """The last progress: points, remaining time, the best five; None before the first."""
        return self._status

    @property
    def progress(self) -> float:
        """Share of the points that are told, 0 to 1; of the time, where only that limits the sweep."""
        status = self._status
        if self.is_done:
            return 1.0
        if status is None:
            return 0.0
        if status.total is not None:
            return status.done / max(1, status.total)
        whole = status.seconds + status.remaining_s
        return status.seconds / whole if whole > 0 else 0.0

    @property
    def is_paused(self) -> bool:
        return self._pause.is_set()

    def pause(self) -> None:
        """Begin no more points; those under way end and are told."""
        self._pause.set()

    def resume(self) -> None:
        """Go on."""
        self._pause.clear()

    def _sweep(self, on_step: Callable[[int], None], **settings: Any) -> Progress:
        watcher = settings.pop("on_progress")

        def told(progress: Progress) -> None:
            self._status = progress
            on_step(progress.done)
            if watcher is not None:
                watcher(progress)

        return self._of_sweep(on_progress=told, cancel=self._cancel, pause=self._pause, **settings)

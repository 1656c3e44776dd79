"""The progress of a calibration."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from ..core.waiting import waiting_bar

#: (what is measured now, share that is done)
OnProgress = Callable[[str, float], None]


class ProgressBar:
    """A progress bar, or a caller's own function.

    Args:
        total: things to measure.
        on_progress: None shows a bar.
    """

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._total, self._done, self._tell = max(1, total), 0, on_progress
        self._bar = waiting_bar(total, "calibrating", "point", 0.0) if on_progress is None else None

    def at(self, what: str) -> None:
        """Say what is measured now."""
        if self._tell is not None:
            self._tell(what, min(1.0, self._done / self._total))
        if self._bar is not None:
            self._bar.set_postfix_str(what)

    def done(self) -> None:
        """Count a measurement as done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._tell is not None:
            self._tell("done", 1.0)

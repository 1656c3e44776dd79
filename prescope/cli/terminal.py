"""What a person sees beside the result: progress on a terminal, nothing of it in a pipe. Standard library only."""

import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

#: Exit status after Ctrl-C.
INTERRUPTED = 130


def tell(line: str) -> None:
    """One line on stderr."""
    print(line, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Bars of other libraries only on a terminal, and warnings as one line each."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning) or sys.stderr.isatty():
        tell(f"note: {message}")


class StatusLine:
    """A line that is written over itself, on a terminal; silent elsewhere."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Put this text in place of the former."""
        if self._is_shown:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)

    def share(self, text: str, done: float) -> None:
        """Show a text and how much is done, in [0, 1]."""
        self.show(f"{100 * done:3.0f} %  {text}")

    def clear(self) -> None:
        """Take the line away."""
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()


@contextmanager
def on_interrupt(cancel: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C calls `cancel` instead of raising, so that what is there can be kept; the second one raises.

    Yields a function that says whether there was one.
    """
    was_interrupted = False

    def first(number: int, frame: FrameType | None) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cancel()

    former = signal.signal(signal.SIGINT, first)
    try:
        yield lambda: was_interrupted
    finally:
        signal.signal(signal.SIGINT, former)

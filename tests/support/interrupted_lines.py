"""An error between any two lines of Python, as a signal's handler raises one."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import prescope

FOLDER = str(Path(prescope.__file__).parent)
#: Not host_parameter.py: a tracer may raise between a `with` block and its end, where CPython hears no signal, and
#: torch's hooks would stay switched off for all tests that follow.
NAMES = ("hf/attach.py", "hf/guards.py", "weights/host_pool.py", "engine/forwards.py")
FILES = tuple(f"{FOLDER}/{name}" for name in NAMES)
#: Where an engine changes what it runs with. `prescope.engine.turn` is tried by instructions, not by lines.
ENGINE_FILES = tuple(
    f"{FOLDER}/{name}"
    for name in ("engine/engine.py", "engine/layered.py", "weights/loader.py", "cache/residency.py")
)


@contextmanager
def interrupted(
    at: set[int], files: tuple[str, ...] = FILES, error: type[BaseException] = KeyboardInterrupt
) -> Iterator[list[int]]:
    """Raise an error before these lines, counted as they are run in `files`; gives how many there were."""
    lines = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(files):
            return None
        if event == "line":
            lines[0] += 1
            if lines[0] in at:
                raise error
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(former)


def is_interrupted(
    at: set[int],
    call: Callable[[], object],
    error: type[BaseException] = KeyboardInterrupt,
    files: tuple[str, ...] = FILES,
) -> bool:
    """Whether the lines were come to: helpers' threads make it a few more or less from time to time."""
    try:
        with interrupted(at, files, error):
            call()
    except error:
        return True
    return False

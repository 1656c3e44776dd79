"""How numba takes note of warnings while it infers types: outside the main thread, not by filters of its own.

The filters of warnings are the process's. numba puts others in their place, and the former ones back, for each
statement whose types it infers (numba 0.68.1: its `WarningsFixer`). In a thread that compiles behind
something else this undid what the user had set meanwhile: a notebook's `warnings.simplefilter("error")` was gone.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from numba.core import errors

_catch = errors.WarningsFixer.catch_warnings  # type: ignore[attr-defined]


def install() -> None:
    """From now on numba's warnings in other threads come at once, from where numba says them."""
    errors.WarningsFixer.catch_warnings = _catch_in_main_thread  # type: ignore[attr-defined]


@contextmanager
def _catch_in_main_thread(
    fixer: Any, filename: str | None = None, lineno: int | None = None
) -> Iterator[None]:
    is_main = threading.current_thread() is threading.main_thread()
    with _catch(fixer, filename, lineno) if is_main else nullcontext():
        yield

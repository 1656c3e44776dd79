"""The one door to numba: decisions are written as plain loops and compiled where numba is installed.

Engine and simulator call the same functions, so that a decision costs microseconds in both. Without numba they run
as ordinary Python, with the same results and some hundred times slower; that is said once.
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

try:
    from numba import njit
except ImportError:  # a requirement of the package, but the core has to run where it is missing
    njit = None
    warnings.warn(
        "numba is not installed: scheduling decisions run as plain Python, some hundred times slower; "
        "install it with `pip install numba`",
        stacklevel=2,
    )

F = TypeVar("F", bound=Callable[..., Any])

#: Whether decisions are compiled here; recorded in `RunResult.hardware`.
IS_COMPILED = njit is not None


def jit(function: F) -> F:
    """Compile on the first call, once per machine (numba keeps the code on disk); releases the GIL."""
    return function if njit is None else njit(cache=True, nogil=True)(function)

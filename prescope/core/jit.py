"""The one door to numba: decisions are written as plain loops and compiled where numba is installed.

Engine and simulator call the same functions, so that a decision costs microseconds in both. Without numba they run
as ordinary Python, with the same results, some hundred times slower; a warning says so once.
"""

import hashlib
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar, cast

from tqdm.auto import tqdm

from . import paths
from .private_folders import private_folder

try:
    import numba
    from numba.core import event
except ImportError:  # a requirement of the package, but the core has to run where it is missing
    numba = None
    warnings.warn(
        "numba is not installed: scheduling decisions run as plain Python, some hundred times slower; "
        "install it with `pip install numba`",
        stacklevel=2,
    )

F = TypeVar("F", bound=Callable[..., Any])
#: Longest wait for functions that are compiled behind something else: all of them take 80 s on two busy cores.
MOST_COMPILE_S = 300.0

if numba is not None:
    from . import boxing, inference_warnings

    boxing.install()
    inference_warnings.install()

#: Whether decisions are compiled here; recorded in `RunResult.hardware`.
IS_COMPILED = numba is not None and not numba.config.DISABLE_JIT


class _Spent(threading.local):
    """What one thread has spent warming up; spans lie in one another."""

    depth, begin_s, total_s = 0, 0.0, 0.0

    def begin(self) -> None:
        if self.depth == 0:
            self.begin_s = time.perf_counter()
        self.depth += 1

    def end(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.total_s += time.perf_counter() - self.begin_s

    def so_far_s(self) -> float:
        return self.total_s + (time.perf_counter() - self.begin_s if self.depth else 0.0)


_spent = _Spent()

if numba is not None:

    class _Compiling(event.Listener):
        """Told of the compiler's lock, by the thread that takes it. It is also held while a function is read from
        numba's cache on disk, which takes most of a second for all of them.
        """

        def on_start(self, event: Any) -> None:
            _spent.begin()

        def on_end(self, event: Any) -> None:
            _spent.end()

    event.register("numba:compiler_lock", _Compiling())


def warm_up_us() -> float:
    """Time that this thread has spent compiling decisions, or reading them from the disk, or in `warming_up`, so far,
    microseconds.
    """
    return _spent.so_far_s() * 1e6


@contextmanager
def warming_up() -> Iterator[None]:
    """Around what a process does once, and no later run again: compile layers, record a graph."""
    _spent.begin()
    try:
        yield
    finally:
        _spent.end()


@cache
def cache_dir() -> str:
    """Where compiled code is kept: a folder for each state of all sources that are compiled.

    The package's own folder, or the user's where that is read-only; inside $NUMBA_CACHE_DIR if that is set. numba
    unpickles what lies there, so it must be this user's alone.

    numba itself looks at the file of the function alone, and what is compiled into it from other files would be kept
    when those change: an edit of `take_slots` did not reach `replay` (numba 0.68.1).
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source = path.read_bytes()
        if b"import jit" in source or b"import numba" in source or b"from numba" in source:
            digest.update(str(path.relative_to(package)).encode() + b"\0" + source + b"\0")
    name = f"compiled-{digest.hexdigest()[:16]}"
    here = hashlib.sha256(str(package).encode()).hexdigest()[
        :8
    ]  # several installations share the user's folder
    given = numba.config.CACHE_DIR if numba is not None else ""
    own = [package / "__pycache__" / name, paths.cache_dir() / f"{here}-{name}"]
    folder = private_folder([*([Path(given) / name] if given else []), *own], "compiled code")
    if folder in own and not any(
        folder.iterdir()
    ):  # what former states of the sources left is of no use any more
        for stale in folder.parent.glob(folder.name.replace(name, "compiled-*")):
            if stale != folder:
                shutil.rmtree(stale, ignore_errors=True)
    return str(folder)


@contextmanager
def said_if_compiled_first(function: Any, what: str) -> Iterator[None]:
    """Wrap a call that may have to compile its function first, which takes tens of seconds once; says so if it does."""
    is_known = not IS_COMPILED or getattr(function, "signatures", True)
    if not is_known:
        name = f"{Path(function.py_func.__code__.co_filename).stem}.{function.__name__}"
        is_known = any(Path(cache_dir()).rglob(f"{name}-*.nbi"))
    if is_known:
        yield
        return
    words = f"compiling {what}: a minute or two, on this machine the first time only"
    with tqdm(total=1, desc=words, bar_format="{desc}", leave=False) as bar:
        yield
        bar.update()


def compile_first(function: Any, arguments: tuple[Any, ...], what: str) -> None:
    """Compile a function for arguments like these now rather than at its first call; says so if that takes long.

    For a function that another processor will wait for. What is not compiled has no need of it.
    """
    if IS_COMPILED and hasattr(function, "compile"):
        with said_if_compiled_first(function, what):
            function.compile(tuple(map(function.typeof_pyval, arguments)))


class Behind:
    """Compiles functions in a thread while something else goes on, once in a process.

    What needs one of them meanwhile waits for numba's own lock. A fork waits for the thread: the child would find that
    lock taken for ever. So does the end of the interpreter.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self.wait)

    def start(self, compile_all: Callable[[], None]) -> None:
        """Begin, unless it was begun before, or nothing is compiled here."""
        if IS_COMPILED and self._thread is None:
            self._thread = threading.Thread(target=compile_all, name="prescope-compile")
            self._thread.start()

    def wait(self) -> None:
        """Return when it is done, or after MOST_COMPILE_S."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(MOST_COMPILE_S)


behind = Behind()


def jit(function: F) -> F:
    """Compile on the first call, once per machine (numba keeps the code on disk); releases the GIL."""
    if numba is None:
        return function
    former = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = cache_dir()
    try:
        compiled: Any = numba.njit(cache=True, nogil=True)(function)
    finally:
        numba.config.CACHE_DIR = former
    if IS_COMPILED:
        compiled._cache.load_overload = _or_compile(compiled._cache)
    return cast(F, compiled)


def _or_compile(kept: Any) -> Callable[[Any, Any], Any]:
    """Read a function from numba's cache on disk; one that is damaged there is forgotten, and so compiled anew.

    A machine that loses power leaves empty files behind a rename; numba raises pickle's error for them, at every run.
    """
    load = kept.load_overload

    def load_or_forget(signature: Any, context: Any) -> Any:
        try:
            return load(signature, context)
        except (EOFError, UnpicklingError, ValueError, TypeError, LookupError) as error:
            words = f"compiled code in {cache_dir()} is damaged ({type(error).__name__}); it is compiled anew"
            warnings.warn(words, stacklevel=2)
            kept.flush()
            return None

    return load_or_forget

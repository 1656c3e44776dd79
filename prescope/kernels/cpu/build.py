"""Compile the C sources of the CPU lane for this machine, once, into the user's cache folder.

No compiler is required: without one the lane runs on torch and says so. Where Triton runs there is one, because Triton
builds its launchers with it.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from ...core import paths
from ...core.private_folders import private_folder, why_unsafe

SOURCE = Path(__file__).parent / "kernel" / "kernel.c"
FLAGS = (
    "-O3",
    "-march=native",
    "-std=gnu11",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
    "-pthread",
    "-Wno-psabi",
)
MOST_SECONDS = 120


class CannotBuild(Exception):
    """There is no compiled kernel here; the text says why."""


def load(source: Path = SOURCE, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled library of a C source and the headers beside it, from the cache if it was built before.

    Args:
        defines: NAME=VALUE for the preprocessor, for benchmarks that try other constants.

    Raises:
        CannotBuild: with the reason.
    """
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"the compiled kernel waits with Linux' futex, this is {sys.platform}")
    compiler = find_compiler()
    flags = (*FLAGS, *(f"-D{define}" for define in defines))
    headers = sorted(source.parent.glob("*.h"))
    text = b"".join(path.read_bytes() for path in [source, *headers])
    target = cache_dir() / f"{source.stem}_{_key(text, compiler, flags)}.so"
    foreign = why_unsafe(target) if target.exists() else "not there"
    if foreign:
        if target.exists():
            warnings.warn(f"a compiled kernel is not run but built anew: {foreign}", stacklevel=2)
        _compile(compiler, flags, source, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise CannotBuild(f"{target} cannot be loaded ({error}); delete it to have it built anew") from error


def find_compiler() -> str:
    """$CC, or the first of gcc, clang and cc: the order in which Triton looks.

    Raises:
        CannotBuild: there is none.
    """
    named = os.environ.get("CC")
    found = [shutil.which(name) for name in ([named] if named else ["gcc", "clang", "cc"])]
    compiler = next((path for path in found if path), None)
    if compiler is None:
        raise CannotBuild(f"there is no C compiler ({named or 'gcc, clang or cc'}) on the PATH; install gcc")
    return compiler


def cache_dir() -> Path:
    """Where compiled kernels are kept: they are run, so only where nobody else can write."""
    return private_folder([paths.cache_dir() / "compiled"], "the compiled kernel of the CPU lane")


def _key(text: bytes, compiler: str, flags: tuple[str, ...]) -> str:
    """A home folder may be shared by machines, and -march=native means another thing on each."""
    facts = [compiler, *flags, platform.machine(), _cpu_flags()]
    return hashlib.blake2b(b"\0".join([text, *(fact.encode() for fact in facts)]), digest_size=10).hexdigest()


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _compile(compiler: str, flags: tuple[str, ...], source: Path, target: Path) -> None:
    try:
        # Beside the target, so that the rename is atomic: another process may build the same.
        handle, unfinished = tempfile.mkstemp(suffix=".so", dir=target.parent)
    except OSError as error:
        raise CannotBuild(f"{target.parent} cannot be written ({error}); set XDG_CACHE_HOME") from error
    os.close(handle)
    try:
        subprocess.run(
            [compiler, *flags, str(source), "-o", unfinished],
            check=True,
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
        )
        os.chmod(unfinished, 0o700)  # whatever the umask makes of it: others must not write it
        os.replace(unfinished, target)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[:1]
        raise CannotBuild(f"{compiler} failed on {source.name}: {' '.join(last)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{compiler} did not build {source.name}: {error}") from error
    finally:
        if os.path.exists(unfinished):
            os.unlink(unfinished)

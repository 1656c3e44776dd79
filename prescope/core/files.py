"""The one way prescope writes and reads files: whole or not at all, regular files only, with a checksum of the content.

A file is written beside its target and renamed, so a crash, a full disk or an interrupt leaves the old file or the new
one. What a killed save left is removed by the next save of the same file.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from ..errors import CannotWrite, PrescopeError
from .machine import available_memory_bytes
from .units import format_bytes

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be deleted: no lock is needed to tell
    fcntl = None

#: Objects in objects that a JSON file of ours or of a model may have; Python's parser gives up at about 1,000.
MOST_DEPTH = 100
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# -- writing -----------------------------------------------------------------------------------------------------


def write_file(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a file whole: `write` fills a temporary file beside the target, which then takes the target's place.

    The folder is made if it is not there. A link stays a link: what it points to is replaced. The mode is that of the
    file replaced, else by the user's umask.

    Raises:
        CannotWrite: no space, no permission, or something at `path` that is no file. The old file is as it was.
    """
    given = Path(path)
    try:
        # The link's own text, not `resolve`: that fails late on a loop of links.
        target = Path(os.path.realpath(given))
        mode = _mode_of(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(target)
        unfinished, lock = _temporary_beside(target)
        try:
            if mode is not None:
                os.chmod(unfinished, mode)
            write(unfinished)
            _to_disk(unfinished)
            _close(lock)
            lock = -1
            os.replace(unfinished, target)
        finally:
            _close(lock)
            unfinished.unlink(missing_ok=True)
        _to_disk(target.parent)
    except CannotWrite:
        raise
    except (OSError, SafetensorError) as error:
        raise CannotWrite(
            f"{given} cannot be written: {error}; what was there before is unchanged"
        ) from error
    return given


def write_text(path: str | Path, text: str) -> Path:
    """`write_file` of a text as UTF-8; half a surrogate pair, which no file can hold, becomes a question mark."""
    return write_bytes(path, text.encode("utf-8", "replace"))


def write_bytes(path: str | Path, content: bytes) -> Path:
    """`write_file` of bytes."""
    return write_file(path, lambda unfinished: unfinished.write_bytes(content))


def _mode_of(target: Path) -> int | None:
    """Permissions of the file that is replaced; None if there is none."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise CannotWrite(
            f"{target} cannot be written: it is {_kind_of(found)}, not a file; give another name"
        )
    return stat.S_IMODE(found.st_mode)


def _temporary_beside(target: Path) -> tuple[Path, int]:
    """A new empty file, and a descriptor whose lock says that somebody is writing it."""
    while True:
        path = target.with_name(f"{_prefix(target)}{uuid4().hex[:12]}.part")
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if fcntl is None:
            os.close(descriptor)
            return path, -1
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Between these two lines another save may have taken the file for a left-over.
            if path.exists():
                return path, descriptor
        except (
            OSError
        ):  # a file system without locks: nobody can tell left-overs there, so nobody removes any
            return path, descriptor
        os.close(descriptor)


def _remove_left_over(target: Path) -> None:
    """Remove temporary files of this target whose writer is gone."""
    prefix = _prefix(target)
    for name in os.listdir(target.parent):
        if name.startswith(prefix) and name.endswith(".part"):
            _remove_unless_locked(target.with_name(name))


def _remove_unless_locked(path: Path) -> None:
    try:
        if fcntl is None:
            path.unlink(missing_ok=True)
            return
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
    except OSError:  # it is being written, or is not ours to remove: it is in nobody's way
        return


def _prefix(target: Path) -> str:
    return f".{target.name[:60]}."  # a name has 255 bytes at most


def _to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, has reached the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows has no such call for folders
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)


# -- reading -----------------------------------------------------------------------------------------------------


def require_file(path: str | Path, error: type[PrescopeError], most_bytes: int | None = None) -> int:
    """Bytes of a regular file. Asked before it is opened: opening a pipe waits for a writer for ever.

    Raises:
        error: it is a folder, a pipe, a socket or a device, or larger than `most_bytes`.
        FileNotFoundError: there is none.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as problem:  # a loop of links, a name too long, no permission, a null byte
        raise error(f"{path} cannot be read: {problem}") from problem
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is {_kind_of(found)}, not a file; give the file itself")
    if most_bytes is not None and found.st_size > most_bytes:
        raise error(
            f"{path} has {format_bytes(found.st_size)}, more than the {format_bytes(most_bytes)} such a file can "
            f"have; it is another file, or damaged"
        )
    return found.st_size


def _kind_of(found: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(found.st_mode), "something else")


def read_object(path: str | Path, error: type[PrescopeError], remedy: str, most_bytes: int) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        error: it is no regular file, too large, no UTF-8, no JSON, too deep, or no object; with the remedy.
        FileNotFoundError: there is none.
    """
    require_file(path, error, most_bytes)
    return parse_object(read_text(path, error, remedy), str(path), error, remedy)


def read_text(path: str | Path, error: type[PrescopeError], remedy: str) -> str:
    """The text of a file in UTF-8, without the mark that some editors put before it.

    Raises:
        error: it cannot be read, or is no UTF-8; with the remedy.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read ({problem}); {remedy}") from problem


def read_lines(path: str | Path, error: type[PrescopeError], remedy: str) -> list[str]:
    """The lines of a file, raises as `read_text`.

    A line ends where an editor says so. Python knows eight more ends of lines, among them U+2028 and U+0085, which
    stand within JSON texts as they are.
    """
    return read_text(path, error, remedy).split("\n")


def parse_object(text: str, where: str, error: type[PrescopeError], remedy: str) -> dict[str, Any]:
    """The object in a JSON text; `where` names it.

    Raises:
        error: as `read_object`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError, TypeError) as problem:
        raise error(f"{where} is not whole JSON ({problem}); {remedy}") from problem
    if not isinstance(value, dict):
        raise error(f"{where} holds a {type(value).__name__} instead of an object; {remedy}")
    if _is_deeper(value, MOST_DEPTH):
        raise error(f"{where} is nested more than {MOST_DEPTH} deep; {remedy}")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not layer:
            return False
    return True


def require_memory(nbytes: int, what: str, error: type[PrescopeError]) -> None:
    """Make sure that so many bytes are free before they are asked for.

    Raises:
        error: they are not.
    """
    free = available_memory_bytes()
    if nbytes > free:
        raise error(
            f"{what} would need {format_bytes(nbytes)} of memory, {format_bytes(free)} are free; if that is more than "
            f"it should hold, it is damaged"
        )


# -- checksums ---------------------------------------------------------------------------------------------------


def checksum(text: str, arrays: Mapping[str, tuple[str, Any]] | None = None) -> str:
    """A digest of a file's content: its metadata as text, and its arrays by name, each with its form and its bytes.

    Of the content and not of the file: it stands in the file itself. Bytes come as anything with a contiguous buffer.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
    for name, (form, content) in sorted((arrays or {}).items()):
        digest.update(f"\0{name}\0{form}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def require_checksum(
    written: object, found: str, where: str | Path, error: type[PrescopeError], remedy: str
) -> None:
    """Hold what a file says its content's checksum is against what it is; None: written before there was one.

    Raises:
        error: they differ.
    """
    if written is not None and written != found:
        raise error(
            f"{where}: its content is not what was written (checksum {found}, not {written}); {remedy}"
        )


def sorted_json(values: Mapping[str, Any], without: Iterable[str] = ()) -> str:
    """The text of plain values that a checksum is made of: keys in order, some left out."""
    left_out = set(without)
    return json.dumps({k: v for k, v in values.items() if k not in left_out}, sort_keys=True, default=str)

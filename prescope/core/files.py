"""The one way prescope writes and reads files: whole or not at all, regular files only, with a checksum of the content.

A file is written in a folder beside its target and renamed, so a crash, a full disk or an interrupt leaves the old file
or the new one. What a killed save left is removed by the next save of the same file.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from ..errors import CannotWrite, PrescopeError
from .machine import available_memory_bytes
from .paths import user_path
from .units import format_bytes

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be deleted, which tells as much as a lock
    fcntl = None

#: In the folder of a file that is being written; held as long as somebody writes there.
_LOCK = "lock"
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
    """Write a file whole: `write` fills a file in a folder beside the target, which then takes the target's place.

    The folder is made if it is not there. A link stays a link: what it points to is replaced. The mode is that of the
    file replaced, else by the user's umask, whatever `write` makes of it: safetensors puts a file of its own, which is
    its owner's alone, in the place of the one that it is given.

    Raises:
        CannotWrite: no space, no permission, or something at `path` that is no file. The old file is as it was.
    """
    given = user_path(path)
    with _beside(given) as (target, unfinished, mode):
        write(unfinished)
        os.chmod(unfinished, mode)
        _to_disk(unfinished)
        os.replace(unfinished, target)
        _to_disk(target.parent)
    return given


def require_writable(path: str | Path) -> None:
    """Say before a long work, not behind it, that its result cannot be written there. The folder is made.

    Raises:
        CannotWrite: as `write_file`, as far as it can be known now.
    """
    with _beside(user_path(path)):
        pass


@contextmanager
def _beside(given: Path) -> Iterator[tuple[Path, Path, int]]:
    """What a name stands for, an empty file in a folder beside that, which goes at the end, and the file's mode then.

    Raises:
        CannotWrite: as `write_file`; for what is done meanwhile, too.
    """
    try:
        # The link's own text, not `resolve`: that fails late on a loop of links.
        target = Path(os.path.realpath(given))
        mode = _mode_of(target)
    except ValueError as error:
        raise CannotWrite(f"{str(given)!a} is no name of a file: {error}") from error
    except OSError as error:
        raise _cannot_write(given, error) from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(target)
        folder, lock = _folder_beside(target)
        try:
            unfinished = folder / target.name
            unfinished.touch(0o666)
            yield target, unfinished, stat.S_IMODE(unfinished.stat().st_mode) if mode is None else mode
        finally:
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)
    except CannotWrite:
        raise
    except (OSError, SafetensorError) as error:
        raise _cannot_write(given, error) from error


def _cannot_write(path: Path, error: Exception) -> CannotWrite:
    why = str(error).removeprefix(f"{path} cannot be written: ")  # of `_mode_of`, which names the path itself
    return CannotWrite(f"{path} cannot be written: {why}; what was there before is unchanged")


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


def _folder_beside(target: Path) -> tuple[Path, int]:
    """A new folder, for all that is made on the way, and a descriptor of its lock, to be closed at the end."""
    while True:
        folder = target.with_name(f"{_prefix(target)}{uuid4().hex[:12]}.part")
        folder.mkdir(0o700)
        try:
            lock = os.open(folder / _LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        except FileNotFoundError:  # another save has taken the folder for a left-over
            continue
        if fcntl is None:
            return folder, lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except (
            OSError
        ):  # no locks on this file system: nobody can tell left-overs there, so nobody removes any
            return folder, lock
        # Before it was locked another save may have taken it for a left-over too.
        if (folder / _LOCK).exists():
            return folder, lock
        os.close(lock)


def _remove_left_over(target: Path) -> None:
    """Remove the folders of saves of this target whose writer is gone, and its files that former versions left."""
    prefix = _prefix(target)
    for name in os.listdir(target.parent):
        if name.startswith(prefix) and name.endswith(".part"):
            _remove_unless_locked(target.with_name(name))


def _remove_unless_locked(path: Path) -> None:
    is_folder = path.is_dir() and not path.is_symlink()
    lock = path / _LOCK if is_folder else path
    remove = shutil.rmtree if is_folder else Path.unlink
    try:
        if fcntl is None:
            lock.unlink(missing_ok=True)  # refused while it is open
            if is_folder:
                remove(path)
            return
        descriptor = os.open(lock, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
        finally:
            os.close(descriptor)
    except FileNotFoundError:  # killed before it had a lock, or removed by somebody else
        _remove_empty(path)
    except OSError:  # it is being written, or is not ours to remove: it is in nobody's way
        return


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
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

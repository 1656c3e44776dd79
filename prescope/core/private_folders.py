"""Folders for compiled code, which is run as it lies there: only where nobody but this user can have written it."""

import atexit
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .worker import process_id


def why_unsafe(path: Path) -> str:
    """Why a file or folder may hold what somebody else wrote; "" if it is this user's or root's alone.

    Windows keeps a user's folders by lists of rights, which are not looked at.
    """
    if not hasattr(os, "getuid"):
        return ""
    at = path.resolve()
    status = at.stat()
    if status.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to user {status.st_uid}, not to you"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o}); chmod 700 it, or delete it"
    for parent in at.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"{path} can be replaced by anybody, since {parent} has mode {stat.S_IMODE(mode):o}"
    return ""


def private_folder(candidates: Iterable[Path], what: str) -> Path:
    """The first candidate that can be written by this user and by nobody else, made if it is not there.

    One that others can write is said aloud. Where there is none (a read-only home), a temporary folder of this process.

    Args:
        what: is kept there, in words.
    """
    unsafe, refused = [], []
    chosen: Path | None = None
    for folder in candidates:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            reason = why_unsafe(folder)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:  # also a read-only file system, where os.access tells root yes
            refused.append(f"{folder} cannot be written ({error.strerror})")
            continue
        if not reason:
            chosen = folder
            break
        unsafe.append(reason)
    if unsafe or chosen is None:
        chosen = chosen or _temporary_folder()
        warnings.warn(f"{what} is kept in {chosen}: {'; '.join([*unsafe, *refused])}", stacklevel=3)
    return chosen


@cache
def _temporary_folder() -> Path:
    folder, owner = tempfile.mkdtemp(prefix="prescope-"), process_id()  # mode 0700

    def remove() -> None:
        if owner == process_id():  # not by a forked process
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)

"""Who runs a sweep: one process at a time, said in the study itself, so that a dead one is not waited for.

A process on another machine that fell silent counts as dead after `LEASE_S`; one on this machine at once.
"""

import os
import platform
import threading
import time
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import optuna

from ..errors import BadSweep
from .record import in_words

#: Attribute of the study.
KEY = "prescope:lease"
#: A lease that was not renewed for this long is over. Machines' clocks may differ by much less.
LEASE_S = 30.0
RENEW_S = 5.0


def holder_of(study: optuna.Study) -> dict[str, Any] | None:
    """Who runs a sweep now: host, pid, until (seconds since 1970); None if nobody does."""
    held = study.user_attrs.get(KEY)
    return held if held and held["until"] > time.time() and not _is_gone(held) else None


def _is_gone(held: dict[str, Any]) -> bool:
    if os.name != "posix" or held["host"] != platform.node():  # elsewhere signal 0 is no question
        return False
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, so it is there
        return False
    return False


class Lease:
    """Holds a sweep while the block runs.

    Raises:
        BadSweep: another process, or another thread of this one, runs it.
    """

    def __init__(self, study: optuna.Study, url: str) -> None:
        self._study, self._url = study, url
        self._mine = {"id": uuid4().hex, "host": platform.node(), "pid": os.getpid()}
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._keep, name="prescope-lease", daemon=True)

    def __enter__(self) -> Self:
        with in_words(self._url):
            held = holder_of(self._study)
        if held is not None:
            where = (
                "this process" if held["pid"] == os.getpid() else f"process {held['pid']} on {held['host']}"
            )
            raise BadSweep(
                f"the sweep {self._study.study_name!r} is under way in {where}; watch it with load_sweep, or end that "
                f"one first. If it is gone already, this is noticed in {max(1, round(held['until'] - time.time()))} s"
            )
        self._renew()
        self._require_mine()  # of two that came together, the one that wrote last has it
        self._thread.start()
        return self

    def require(self) -> None:
        """Raise BadSweep if another process has taken the sweep over, because this one was silent for too long."""
        if self._error is not None:
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._error is None:
            with in_words(self._url):
                self._study.set_user_attr(KEY, None)

    def _keep(self) -> None:
        try:
            while not self._end.wait(RENEW_S):
                self._require_mine()
                self._renew()
        except BaseException as error:  # noqa: BLE001 - nothing is lost: `require` raises it in the sweep's thread
            self._error = error

    def _renew(self) -> None:
        with in_words(self._url):
            self._study.set_user_attr(KEY, {**self._mine, "until": time.time() + LEASE_S})

    def _require_mine(self) -> None:
        with in_words(self._url):
            held = self._study.user_attrs.get(KEY)
        if held is None or held["id"] != self._mine["id"]:
            raise BadSweep(
                f"the sweep {self._study.study_name!r} was taken over by another process; open it again when that one "
                f"has ended"
            )

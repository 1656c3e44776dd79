"""Where points are tried: in this process, or by the workers of a dask cluster, on this machine or on many.

Several processes on this machine are a cluster too, made for the run and closed with it: dask starts a killed worker
again, gives it the runner again and what it was at to somebody else, and says it when a point kills whoever tries it.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, nullcontext
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

from dask.config import set as configured
from distributed import Client, Future, KilledWorker, LocalCluster, SpecCluster, WorkerPlugin, get_worker

from ..device import visible_gpus
from ..errors import BadSweep, UnsupportedOption
from .evaluate import Runner, evaluate
from .gpus import OneGpuEach, require_gpus_apart
from .points import Asked, Outcome

#: Work of one message to a worker: many points of milliseconds, one of minutes.
MESSAGE_S = 0.2
MOST_POINTS = 32
#: Messages given out for each worker: one it is at and one that waits.
AHEAD = 2
#: Without any worker for so long a sweep ends; what is there stays.
PATIENCE_S = 120.0
#: How often a cluster is asked how many workers it has.
ASK_S = 2.0


class SweepTask(NamedTuple):
    """What is the same for all points of a sweep."""

    runner: Runner
    fixed: Mapping[str, Any]
    objectives: Sequence[str]


class Pool(Protocol):
    """Tries points.

    Attributes:
        running: points given to it that are not back.
    """

    @property
    def running(self) -> int: ...

    def room(self, most: int | None) -> int:
        """Points that it would take now; with `most`, so many may be under way, or what keeps its workers busy."""
        ...

    def give(self, points: Sequence[Asked]) -> None:
        """Points to try."""
        ...

    def collect(self, timeout_s: float) -> list[Outcome]:
        """What became of some, all that are ready; waits so long for the first."""
        ...

    def rest(self, timeout_s: float) -> list[Outcome]:
        """No more is begun: what is done within that time."""
        ...


class Here:
    """In the calling thread, one after the other.

    Args:
        is_cancelled: asked in the middle of a point.
    """

    def __init__(self, job: SweepTask, is_cancelled: Callable[[], bool]) -> None:
        self._job, self._is_cancelled = job, is_cancelled
        self._waiting: deque[Asked] = deque()
        self._took_s = MESSAGE_S

    @property
    def running(self) -> int:
        return len(self._waiting)

    def room(self, most: int | None) -> int:
        size = _points_of(self._took_s)
        return 0 if self._waiting else size if most is None else min(size, most)

    def give(self, points: Sequence[Asked]) -> None:
        self._waiting.extend(points)

    def collect(self, timeout_s: float) -> list[Outcome]:
        outcomes = []
        begin = time.perf_counter()
        while self._waiting and not self._is_cancelled():
            outcomes.append(evaluate(*_arguments(self._job, self._waiting[0]), self._is_cancelled))
            self._waiting.popleft()
        if outcomes:
            self._took_s = (time.perf_counter() - begin) / len(outcomes)
        return outcomes

    def rest(self, timeout_s: float) -> list[Outcome]:
        return []  # nothing is under way between two calls


def _arguments(job: SweepTask, asked: Asked) -> tuple[Runner, Asked, Mapping[str, Any], Sequence[str]]:
    return job.runner, asked, job.fixed, job.objectives


def _points_of(took_s: float) -> int:
    """Points of one message, each taking so long."""
    return max(1, min(MOST_POINTS, int(MESSAGE_S / max(took_s, 1e-6))))


class _Carrier(WorkerPlugin):
    """Brings the runner, and with it the traces, to each worker once, to one that is started again too."""

    def __init__(self, job: SweepTask) -> None:
        self.job = job

    def setup(self, worker: Any) -> None:
        """One point at a time in a process: threads would take each other's cores, and with them their times."""
        self.turn = threading.Lock()


def _try(name: str, points: Sequence[Asked]) -> list[Outcome]:
    carrier = get_worker().plugins[name]
    assert isinstance(carrier, _Carrier)
    with carrier.turn:
        return [evaluate(*_arguments(carrier.job, point), _never) for point in points]


def _never() -> bool:
    return False


class Cluster:
    """By the workers of a dask client.

    Raises:
        BadSweep: there is no worker, or none any more.
        UnsupportedOption: the runner can only run in this process, or two workers would measure on one GPU.
    """

    def __init__(self, client: Client, job: SweepTask) -> None:
        if job.runner.is_here:
            raise UnsupportedOption(
                "this runner holds an engine of this process; for workers give it a function that loads one there: "
                "EngineRunner(load, prompts)"
            )
        self._client, self._name = client, f"prescope-sweep-{uuid4().hex}"
        self._points: dict[Future, Sequence[Asked]] = {}
        # Points whose workers died. dask blames all that a dead worker had, so each is tried with nothing beside it.
        self._suspects: deque[Asked] = deque()
        self._suspected: Future | None = None
        self._done: SimpleQueue[tuple[Future, list[Outcome] | BaseException]] = SimpleQueue()
        self._took_s = MESSAGE_S
        self._workers, self._asked_at = 0, float("-inf")
        self._alone_since: float | None = None
        try:
            client.wait_for_workers(1, timeout=PATIENCE_S)
        except TimeoutError as error:
            raise BadSweep(f"{client} has no worker; start one, then run the sweep again") from error
        if job.runner.takes_gpu:
            require_gpus_apart(client)
        client.register_plugin(_Carrier(job), name=self._name)

    @property
    def running(self) -> int:
        return sum(map(len, self._points.values())) + len(self._suspects)

    @property
    def _num_workers(self) -> int:
        now = time.monotonic()
        if now - self._asked_at > ASK_S:
            self._workers, self._asked_at = len(self._client.nthreads()), now
            cluster = self._client.cluster
            if isinstance(cluster, SpecCluster) and self._workers < len(cluster.worker_spec):
                # What watches over a worker gives up if that is killed while it starts.
                cluster.scale(len(cluster.worker_spec))
            if self._workers:
                self._alone_since = None
            elif self._alone_since is None:
                self._alone_since = now
            elif now - self._alone_since > PATIENCE_S:
                raise BadSweep(
                    f"{self._client} has lost all its workers; start some, then run the sweep again: it goes on"
                )
        return self._workers

    def room(self, most: int | None) -> int:
        if self._suspects or self._suspected in self._points:
            return 0
        messages = AHEAD * self._num_workers
        room = max(0, messages - len(self._points)) * _points_of(self._took_s)
        return room if most is None else max(0, min(room, max(most, messages) - self.running))

    def give(self, points: Sequence[Asked]) -> None:
        size = min(_points_of(self._took_s), math.ceil(len(points) / max(1, self._num_workers)))
        for first in range(0, len(points), size):
            self._submit(points[first : first + size])

    def _submit(self, points: Sequence[Asked]) -> Future:
        key = f"{self._name}-{points[0].number}-{uuid4().hex}"
        future = self._client.submit(_try, self._name, points, key=key, pure=False)
        self._points[future] = points
        future.add_done_callback(self._fetch)
        return future

    def _fetch(self, future: Future) -> None:
        """Its answer, as soon as there is one: from dask's thread, for this waits if the worker dies with the answer
        until somebody has computed it again, and the sweep must not.
        """
        try:
            answer = future.result()
        except Exception as error:  # noqa: BLE001 - raised by `collect`, in the sweep's thread
            answer = error
        self._done.put((future, answer))

    def collect(self, timeout_s: float) -> list[Outcome]:
        done = []
        try:
            done.append(self._done.get(timeout=timeout_s))
            while True:
                done.append(self._done.get_nowait())
        except Empty:
            pass
        _ = self._num_workers  # or no worker at all would go unnoticed
        outcomes: list[Outcome] = []
        for future, answer in done:
            if (points := self._points.pop(future, None)) is not None:
                is_alone = future is self._suspected
                outcomes += answer if isinstance(answer, list) else self._lost(answer, points, is_alone)
        if self._suspects and not self._points:
            self._suspected = self._submit([self._suspects.popleft()])
        took = [one.seconds for one in outcomes if one.state == "finished"]
        if took:
            self._took_s = sum(took) / len(took)
        return outcomes

    def _lost(self, error: BaseException, points: Sequence[Asked], is_alone: bool) -> list[Outcome]:
        """A message that nobody could answer: its points alone, so that the one whose fault it is is found."""
        if isinstance(error, CancelledError):
            raise BadSweep(
                f"{self._client} has lost its scheduler; connect again and run the sweep again: it goes on"
            ) from error
        if not isinstance(error, KilledWorker):
            raise error
        if not is_alone:
            self._suspects.extend(points)
            return []
        return [
            Outcome(points[0].number, "failed", {}, f"its worker died, {error.allowed_failures + 1} times")
        ]

    def rest(self, timeout_s: float) -> list[Outcome]:
        end, outcomes = time.monotonic() + timeout_s, []
        while (self._points or self._suspects) and (left := end - time.monotonic()) > 0:
            outcomes += self.collect(left)
        return outcomes

    def close(self) -> None:
        """Take the work and the runner away from the workers."""
        self._client.cancel(list(self._points))
        self._points.clear()
        self._client.unregister_worker_plugin(self._name)


@contextmanager
def pool_of(
    job: SweepTask, workers: int, client: Client | None, is_cancelled: Callable[[], bool]
) -> Iterator[Pool]:
    """The workers of a run: this thread, so many processes, or whatever a client has.

    Raises: as `Cluster`.
    """
    if client is None and workers == 1:
        yield Here(job, is_cancelled)
        return
    gpus = visible_gpus() if job.runner.takes_gpu and client is None else []
    with _local(workers, gpus) if client is None else nullcontext(client) as found:
        cluster = Cluster(found, job)
        try:
            yield cluster
        finally:
            cluster.close()


@contextmanager
def _local(workers: int, gpus: Sequence[str]) -> Iterator[Client]:
    # A worker's memory is not watched: dask would restart one that holds a large trace in the middle of a point.
    common: dict[str, Any] = {
        "n_workers": workers, "threads_per_worker": 1, "processes": True, "memory_limit": 0,
        "dashboard_address": "127.0.0.1:0", "worker_dashboard_address": None, "silence_logs": "ERROR",
    }  # fmt: skip
    with configured({"distributed.comm.timeouts.connect": PATIENCE_S}):
        try:
            cluster = OneGpuEach(gpus, **common) if gpus else LocalCluster(**common)
        except RuntimeError as error:
            raise BadSweep(
                f"no worker process could be started: {error}. In a script everything that starts processes stands "
                f"under if __name__ == '__main__':; or use workers=1"
            ) from error
        with cluster, Client(cluster) as client:
            yield client

"""Kernel configurations tuned once per GPU and kept in the user's cache folder."""

import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import triton
from tqdm.auto import tqdm

from ..core.files import write_text
from ..core.paths import cache_dir
from ..device.cuda import capture_graph
from ..errors import CannotWrite
from .base import CannotLaunch

Config = TypeVar("Config", bound=tuple[int, ...])

#: Runs by which a candidate's time is guessed, the time that a graph of its runs takes by that, and its replays.
TRIAL_RUNS, GRAPH_MS, REPLAYS = 5, 5.0, 10
#: Runs in the graph of a candidate that is too quick for the GPU's clock.
MOST_RUNS = 1000

_loaded: dict[str, dict[str, Any]] = {}  # by file


def _file(device: torch.device) -> Path:
    gpu = torch.cuda.get_device_name(device).replace(" ", "-")
    return cache_dir() / f"kernels_{gpu}_triton-{triton.__version__}.json"


def _known(file: Path) -> dict[str, Any]:
    if str(file) not in _loaded:
        _loaded[str(file)] = _read(file)
    return _loaded[str(file)]


def _read(file: Path) -> dict[str, Any]:
    """What was kept; nothing if there is no such file, or something else in its place. It is only ever made anew."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def tuned(device: torch.device, key: str, candidates: Sequence[Config]) -> Config | None:
    """Which of the candidates was found to be the fastest for `key` on this GPU; None if it was not tuned."""
    if device.type != "cuda":
        return None
    known = _known(_file(device))
    found: Any = known.get(key)
    if isinstance(found, list):  # as it was read: of another version's candidates, or anybody's
        known[key] = found = next((one for one in candidates if list(one) == found), None)
    is_one_of_them: bool = isinstance(found, tuple)
    return found if is_one_of_them else None


def tune(
    device: torch.device,
    key: str,
    candidates: Sequence[Config],
    run: Callable[[Config], None],
) -> None:
    """Time `run(candidate)` of each candidate (CUDA graph of many runs, median) and keep the fastest for `key`; none,
    where none can run. Where the file cannot be written, each process does so anew, which a warning says.
    """
    if device.type != "cuda" or tuned(device, key, candidates) is not None:
        return
    # Each candidate is compiled first, half a second or so: some seconds once per shape and GPU.
    bar = tqdm(candidates, desc=f"tuning expert kernels ({key})", leave=False)
    times = [_time_of(device, partial(run, candidate)) for candidate in bar]
    if min(times) == inf:  # what runs by the default will say why
        return
    file = _file(device)
    known = _known(file)
    known[key] = candidates[times.index(min(times))]
    try:
        write_text(file, json.dumps(known, indent=1))
    except CannotWrite as error:
        warnings.warn(f"expert kernels are tuned again in the next process: {error}", stacklevel=2)


def _time_of(device: torch.device, run: Callable[[], None]) -> float:
    """Milliseconds, median; infinite for a tile that this GPU has no room for."""
    try:
        run()  # compiles it, which cannot be done while a graph is captured
    except CannotLaunch:
        return inf
    once_ms = _took_ms(partial(_repeat, run, TRIAL_RUNS)) / TRIAL_RUNS
    repeats = max(1, int(GRAPH_MS / once_ms)) if once_ms > 0.0 else MOST_RUNS
    # Not by Triton's do_bench_cudagraph: while it captures, what other threads ask of CUDA fails in this whole process.
    replay, _ = capture_graph(device, partial(_repeat, run, repeats))
    return median(_took_ms(replay) / repeats for _ in range(REPLAYS))


def _repeat(run: Callable[[], None], times: int) -> None:
    for _ in range(times):
        run()


def _took_ms(work: Callable[[], None]) -> float:
    """What the GPU took for what is launched."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))

"""Kernel configurations tuned once per GPU and kept in the user's cache folder."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from typing import TypeVar

import torch
import triton
from tqdm.auto import tqdm
from triton.testing import do_bench_cudagraph

from ..core.files import write_text
from ..core.paths import cache_dir
from .base import CannotLaunch

Config = TypeVar("Config", bound=tuple[int, ...])

_loaded: dict[str, dict[str, list[int]]] = {}  # by file


def _file(device: torch.device) -> Path:
    gpu = torch.cuda.get_device_name(device).replace(" ", "-")
    return cache_dir() / f"kernels_{gpu}_triton-{triton.__version__}.json"


def _known(file: Path) -> dict[str, list[int]]:
    if str(file) not in _loaded:
        try:
            _loaded[str(file)] = json.loads(file.read_text())
        except (OSError, json.JSONDecodeError):  # none yet, or half-written by a process that was killed
            _loaded[str(file)] = {}
    return _loaded[str(file)]


def tuned(device: torch.device, key: str) -> list[int] | None:
    """The configuration found for `key` on this GPU, if it was tuned."""
    return _known(_file(device)).get(key) if device.type == "cuda" else None


def tune(
    device: torch.device,
    key: str,
    candidates: Sequence[Config],
    run: Callable[[Config], None],
) -> None:
    """Time `run(candidate)` of each candidate (CUDA graph of many runs, median) and keep the fastest for `key`; none,
    where none can run.
    """
    if device.type != "cuda" or tuned(device, key) is not None:
        return
    # Each candidate is compiled first, half a second or so: some seconds once per shape and GPU.
    bar = tqdm(candidates, desc=f"tuning expert kernels ({key})", leave=False)
    with _captured_on(device):
        times = [_time_of(partial(run, candidate)) for candidate in bar]
    if min(times) == inf:  # what runs by the default will say why
        return
    file = _file(device)
    known = _known(file)
    known[key] = list(candidates[times.index(min(times))])
    write_text(file, json.dumps(known, indent=1))


def _time_of(run: Callable[[], None]) -> float:
    """Milliseconds; infinite for a tile that this GPU has no room for."""
    try:
        return float(do_bench_cudagraph(run, rep=5))
    except CannotLaunch:
        return inf


@contextmanager
def _captured_on(device: torch.device) -> Iterator[None]:
    """Let graphs that name no stream be captured on this GPU: torch keeps one stream for them all, of the GPU that was
    the first to capture in this process, and its kernels would be launched there.
    """
    former = torch.cuda.graph.default_capture_stream
    torch.cuda.graph.default_capture_stream = torch.cuda.Stream(device)
    try:
        yield
    finally:
        torch.cuda.graph.default_capture_stream = former

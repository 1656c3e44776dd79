"""Compiled functions called under a rain of signals whose handler raises; run in a process of its own."""

import random
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from prescope.cache.policies import make_policy
from prescope.cache.residency import ResidencyTable
from prescope.core.jit import jit
from prescope.core.types import MoEShape


class Inner(NamedTuple):
    first: np.ndarray
    count: int


class Alike(NamedTuple):  # fields of one type are another kind of tuple to numba
    low: float
    high: float


class Outer(NamedTuple):
    inner: Inner
    alike: Alike
    plain: tuple[np.ndarray, float]


@jit
def nested(values: np.ndarray) -> Outer:
    """All that compiled code hands back: arrays and numbers, in tuples with names and without, in one another."""
    return Outer(Inner(values + 1, len(values)), Alike(0.5, 2.0), (values * 2, 1.5))


@jit
def refused(values: np.ndarray) -> int:
    """An error raised by compiled code."""
    if len(values) < 100:
        raise ValueError("too short")
    return len(values)


def call_nested() -> None:
    got = nested(np.arange(3))
    assert type(got) is Outer and type(got.inner) is Inner and got.alike == Alike(0.5, 2.0)
    assert got.inner.first.tolist() == [1, 2, 3] and got.plain[0].tolist() == [0, 2, 4]


def call_refused() -> None:
    try:
        refused(np.arange(3))
    except ValueError:
        return
    raise AssertionError("nothing was raised")


def table_calls() -> Callable[[], Any]:
    shape = MoEShape(8, 16, 2, 1024)
    table = ResidencyTable(shape, 32, make_policy("lru", shape, None))
    need = (0, np.array([1, 2]), np.array([1, 1]), np.ones(2))

    def call() -> None:
        table.clear()  # an interrupt may have ended the last call half-way
        assert table.need(*need).num_misses == 2
        assert len(table.take(0, need[1])) == 2

    return call


def rain(calls: list[Callable[[], Any]], interrupts: int, seed: int = 0) -> int:
    """Call them in turn until so many interrupts were raised; returns how many were."""
    rng = random.Random(seed)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for call in calls:
        call()  # compiles
    for number in range(interrupts):
        call = calls[number % len(calls)]
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-4))
            while True:
                call()
        except KeyboardInterrupt:
            pass
    return interrupts


def main(interrupts: int) -> None:
    print(rain([call_nested, call_refused, table_calls()], interrupts), "survived")

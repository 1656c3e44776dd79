"""Calls under a rain of signals whose handler raises; run in a process of its own."""

import faulthandler
import random
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

import prescope
from prescope.cache.policies import make_policy
from prescope.cache.residency import ResidencyTable
from prescope.core.jit import jit
from prescope.core.types import MoEShape
from prescope.device import EmulatedLinkDevice
from tests.support.forked_engine import COSTS
from tests.support.models import plain_tokens, prompt, tiny_moe


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


def link_calls() -> Callable[[], Any]:
    device = EmulatedLinkDevice(1000.0)
    rows, slots = torch.arange(64, dtype=torch.uint8).view(8, 8), torch.empty((8, 8), dtype=torch.uint8)

    def call() -> None:
        device.recover()
        slots.fill_(255)
        _, ready = device.copy(list(zip(slots.unbind(0), rows.unbind(0), strict=True)), [], timed=False)
        for mark in ready:
            device.wait(mark)
        assert torch.equal(slots, rows)

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


def compiled(interrupts: int) -> None:
    """Of decisions."""
    print(rain([call_nested, call_refused, table_calls()], interrupts), "survived")


def link(interrupts: int) -> None:
    """Of copies on the emulated link, and of what recovers it."""
    faulthandler.dump_traceback_later(100, exit=True)
    print(rain([link_calls()], interrupts), "survived")


def runs(interrupts: int, schedule: str) -> None:
    """Of whole runs: each interrupted one is followed by one that must be right."""
    faulthandler.dump_traceback_later(140, exit=True)
    model, ids = tiny_moe(), prompt(batch=2)
    expected = plain_tokens(model, ids)
    rng = random.Random(0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    with prescope.attach(
        model, slots=5, device="cpu", link_gb_per_s=50.0, schedule=schedule, costs=COSTS, cpu_threads=1
    ) as engine:
        assert engine.generate(ids, max_new_tokens=12).tokens == expected
        raised = 0
        while raised < interrupts:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 8e-2))
                engine.generate(ids, max_new_tokens=12)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                raised += 1
                assert engine.generate(ids, max_new_tokens=12).tokens == expected
                engine.check_integrity()
    print(raised, "survived")

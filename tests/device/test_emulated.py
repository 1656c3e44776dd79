"""The emulated link: copies arrive whole and at their pace, and every wait for one ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from prescope.device import EmulatedLinkDevice
from prescope.errors import NotAttached, SlotPoolTooLarge, TransferFailed, WaitTimedOut

ROOT = Path(__file__).resolve().parents[2]


def pairs(count: int, nbytes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = torch.arange(count, dtype=torch.uint8)[:, None].repeat(1, nbytes)
    return list(zip(torch.zeros_like(rows).unbind(0), rows.unbind(0), strict=True))


def test_copies_arrive_in_order_and_no_sooner_than_the_link_carries_them():
    device = EmulatedLinkDevice(0.1)  # 100 bytes a microsecond
    try:
        begin = device.mark(True)
        start, ready = device.copy(pairs(3, 500_000), [begin], timed=True)
        device.wait(ready[-1])
        assert all(device.is_done(mark) for mark in ready)
        times = [start.time_us, *(mark.time_us for mark in ready)]
        assert times == sorted(times) and device.elapsed_us(start, ready[-1]) >= 14_990
    finally:
        device.close()


@pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="no interval timer here to raise interrupts with"
)
def test_no_interrupt_leaves_a_copy_or_a_recovery_waiting_for_ever():
    """Formerly within 3,000: a queue and an event made of Python stayed locked when Ctrl-C came inside them."""
    code = "from tests.support.interrupted_calls import link; link(3000)"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert child.returncode == 0, f"ended with {child.returncode}: {child.stderr[-2000:]}"
    assert "3000 survived" in child.stdout


def test_close_drops_what_has_not_begun_and_ends_every_wait():
    device = EmulatedLinkDevice(0.01)
    _, ready = device.copy(pairs(50, 1_000_000), [], timed=False)  # 5 s
    started = time.perf_counter()
    device.close()
    device.close()
    assert time.perf_counter() - started < 4.0
    with pytest.raises(TransferFailed, match="closed before"):
        device.wait(ready[-1])
    with pytest.raises((TransferFailed, NotAttached, WaitTimedOut)):
        device.copy(pairs(1, 8), [], timed=False)


def test_slots_that_do_not_fit_are_refused_with_numbers():
    device = EmulatedLinkDevice(1.0)
    try:
        with pytest.raises(SlotPoolTooLarge, match=r"slots of 1.0 TiB|slots of 1024.0 GiB|use fewer slots"):
            device.allocate_slots(1 << 20, 1 << 40)
    finally:
        device.close()

"""Timing how the host hands copies over, by the code that does it in captured steps, on a link that is not a GPU's."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from prescope.calibration import handover
from prescope.calibration.handover import handover_us
from prescope.calibration.plan import host_plan
from prescope.profile import Circumstances
from tests.support.interpreted_gpu import InterpretedGpu, LateLink

NBYTES, COUNT = 256, 12


@pytest.mark.parametrize("is_busy", [False, True])
def test_each_copy_is_handed_over_with_its_number_and_awaited_on_an_idle_link_alone(monkeypatch, is_busy):
    monkeypatch.setattr(handover, "HANDOVERS", COUNT)
    link = LateLink(seed=1)
    device = InterpretedGpu(link)
    pool, rows = torch.zeros(NBYTES, dtype=torch.uint8), torch.full((4, NBYTES), 7, dtype=torch.uint8)
    try:
        us = handover_us(device, pool, rows, NBYTES, is_busy)
        assert 0.0 < us < 1e5
        assert link.issued == link.done == 2 * COUNT, "the bytes, and a number"
        assert (link.asked_too_early > 0) != is_busy
        assert np.all(pool[4:].numpy() == 7) and int(pool[:4].view(torch.int32)) == COUNT
    finally:
        device.close()
        link.close()


def test_a_driver_that_refuses_a_copy_is_told(monkeypatch):
    monkeypatch.setattr(handover, "hand_over", lambda *_: False)
    device = InterpretedGpu()
    memory = torch.zeros(NBYTES, dtype=torch.uint8)
    with pytest.raises(handover.TransferFailed, match="calibrate again"):
        handover_us(device, memory, memory, NBYTES, False)
    device.close()


@pytest.mark.parametrize(("kind", "is_measured"), [("cuda", True), ("cpu", False)])
def test_hand_overs_are_measured_where_the_host_decides_captured_steps(kind, is_measured):
    plan = host_plan([], 64 << 20, device_kind=kind)
    for busy in (False, True):
        assert (Circumstances("handover", busy) in plan) == is_measured

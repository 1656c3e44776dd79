"""Time of a message from the GPU to the host and of the answer: the least that a host-driven step waits.

The same way as in `graph_buffers`: a word in mapped host memory, and a copy behind whatever the H2D stream carries.
"""

import time

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from ..device import Device
from ..errors import TransferFailed
from .launch import launch

#: The GPU stops waiting after this, so that an interrupted host cannot hang it.
MOST_NS = 200_000_000
#: Work in front of the kernels, so that both are queued before the first one runs.
HOLD_DIM, HOLD_PRODUCTS = 4096, 6


# The number is left unspecialised: a variant compiled between two launches would be taken for the message's time.
@triton.jit(do_not_specialize=["number"])
def _say(word, started, number):  # type: ignore[no-untyped-def]
    tl.store(started, globaltimer())
    tl.store(word, number)


@triton.jit(do_not_specialize=["number"])
def _hear(ack, ended, number, LIMIT_NS: tl.constexpr):  # type: ignore[no-untyped-def]
    begin = globaltimer()
    while (tl.atomic_add(ack, 0, sem="acquire") != number) & (globaltimer() - begin < LIMIT_NS):
        pass
    tl.store(ended, globaltimer())


class Ping:
    """Messages between a GPU and the host.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._word = torch.zeros(1, dtype=torch.int32, pin_memory=True, device="cpu")
        self._answer = torch.zeros(1, dtype=torch.int32, pin_memory=True, device="cpu")
        self._ack = torch.zeros(1, dtype=torch.int32, device=device.torch_device)
        self._times = torch.zeros(2, dtype=torch.int64, device=device.torch_device)
        self._hold = torch.zeros((HOLD_DIM, HOLD_DIM), dtype=torch.bfloat16, device=device.torch_device)
        self._number = 0

    def round_trip_us(self) -> float:
        """One message and its answer, by the GPU's clock.

        Raises:
            TransferFailed: the host did not see the message.
        """
        self._number += 1
        for _ in range(HOLD_PRODUCTS):
            torch.mm(self._hold, self._hold)
        launch(_say, (1,), self._word, self._times, self._number)
        launch(_hear, (1,), self._ack, self._times[1:], self._number, LIMIT_NS=MOST_NS)
        seen, deadline = self._word.numpy(), time.perf_counter() + 10.0
        while int(seen[0]) != self._number:
            if time.perf_counter() > deadline:
                raise TransferFailed("a message from the GPU did not reach the host within 10 s")
        self._answer.fill_(self._number)
        self._device.send([], (self._ack, self._answer))
        self._device.synchronize()
        started, ended = self._times.tolist()
        return (ended - started) / 1e3

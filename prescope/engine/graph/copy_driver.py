"""The host's part of a captured step whose copies the GPU orders: hand them to the copy engine, nothing else.

Compiled, as `serve`: until the first copy is issued the link is idle, and each order waits for the one before it.
"""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.jit import jit
from ...core.native import call, clock_address, load_int64, now_us, store_int32
from ...core.types import IntArray
from ...core.worker import PATIENCE_S
from ...device import LinkFunctions
from ...errors import TransferFailed, WaitTimedOut
from ..layered import LayeredRunner
from .host_loop import LINK_FAILED, NOBODY_ASKED, PAUSED, SERVED, WAIT_US, has_time

if TYPE_CHECKING:
    from ...kernels.graph_buffers import GraphBuffers


#: What the host has to do besides serving a step, in small parts.
SideTasks = deque[Callable[[], None]]


class Orders(NamedTuple):
    """Where things lie in memory. L layers; n experts at most."""

    orders: IntArray  # (L, 1 + n), as `kernels.graph_buffers.OrderMessages`
    ack_sources: NDArray[np.int32]  # (L,)
    ack: int
    served: NDArray[np.int32]
    row_bytes_L: IntArray
    rows_L: IntArray  # addresses of the host rows
    pool: int  # address of the slots
    slot_bytes: int


@jit
def follow_orders(
    link: LinkFunctions,
    clock: int,
    orders: Orders,
    progress: IntArray,
    words: IntArray,
    step: int,
    number: int,
    side_tasks: int,
) -> int:
    """Serve the layers of a running step from progress[0] on; call again if nobody asked.

    Args:
        progress: (3,) the layer, the driver's code if it failed, and how many of the layer's orders, and the word
            before them, were followed: each once. `words`: (2,) for the clock.
        step: since the buffers' restart; `number`: the same in messages. `side_tasks`: as in `serve`.

    Returns: SERVED, PAUSED, NOBODY_ASKED or LINK_FAILED.
    """
    L = len(orders.rows_L)
    while progress[0] < L:
        layer = progress[0]
        address = orders.orders[layer].ctypes.data
        begin = now_us(clock, words)
        count = load_int64(address) & 0xFFFF if progress[2] > 0 else 0  # the first word says how many follow
        while progress[2] <= count:
            word = load_int64(address + 8 * progress[2])
            if word >> 48 != number:
                if now_us(clock, words) - begin > WAIT_US:
                    return NOBODY_ASKED
                continue
            if progress[2] == 0:
                count = word & 0xFFFF
            else:
                nbytes = orders.row_bytes_L[layer]
                target = orders.pool + (word & 0xFFFFFF) * orders.slot_bytes
                source = orders.rows_L[layer] + (word >> 24 & 0xFFFFFF) * nbytes
                for _ in range(link.repeats):
                    progress[1] = call(link.memcpy, (target, source, nbytes, link.stream)) & 0xFFFFFFFF
                    if progress[1] != 0:
                        return LINK_FAILED
                # Later steps may order less: this one must not be there when numbers come round again.
                orders.orders[layer, progress[2]] = 0
            progress[2] += 1
        if count > 0:
            orders.ack_sources[layer] = step + 1  # its last copy is over: the GPU has gone on since
            source = orders.ack_sources.ctypes.data + 4 * layer
            progress[1] = call(link.memcpy, (orders.ack + 4 * layer, source, 4, link.stream)) & 0xFFFFFFFF
            if progress[1] != 0:
                return LINK_FAILED
        progress[0], progress[2] = layer + 1, 0
        if has_time(side_tasks, L - progress[0], count > 0):
            return PAUSED
    store_int32(orders.served.ctypes.data, np.int32(step + 1))
    return SERVED


class CopyDriver:
    """Serves captured steps whose copies the GPU orders.

    Args:
        runner: slots and link.
        captured: the step's buffers.
    """

    def __init__(self, runner: LayeredRunner, captured: "GraphBuffers") -> None:
        self._runner, self._captured = runner, captured
        pool = runner.loader.pool
        self._link = runner.device.link_functions()
        self._orders = Orders(
            *captured.order_messages(),
            row_bytes_L=np.array([layer.layout.row_bytes for layer in runner.layers]),
            rows_L=np.array([held.rows.data_ptr() for held in runner.host.layers]),
            pool=pool.data_ptr(),
            slot_bytes=pool.stride(0),
        )
        self._progress, self._words = np.zeros(3, np.int64), np.zeros(2, np.int64)

    def run(self, step: int, side_tasks: SideTasks) -> None:
        """Serve all layers of a step that is running, with side tasks between them.

        Raises:
            TransferFailed: the GPU stopped, or the driver refused a copy.
        """
        self._progress[:] = layer = 0
        number = self._captured.number(step)
        arguments = self._link, clock_address(), self._orders, self._progress, self._words, step, number
        num_idle, is_idle = 0, False
        while (code := follow_orders(*arguments, len(side_tasks))) != SERVED:
            if code == PAUSED:
                side_tasks.popleft()()
                continue
            is_same = layer == self._progress[0]
            num_idle, layer = num_idle + 1 if is_same else 0, int(self._progress[0])
            failure = int(self._progress[1])
            is_idle = require_running(self._runner, code, failure, layer, num_idle, is_same and is_idle)

    def abandon(self, step: int) -> None:
        """Let a step that is still waiting run to its end, with whatever weights there are."""
        self._captured.served(step + 1)
        # Not by the function that may have failed.
        for layer in range(len(self._runner.layers)):
            self._runner.device.send([self._captured.acknowledgement(layer, step)], None)


def require_running(
    runner: LayeredRunner, code: int, failure: int, layer: int, num_idle: int, was_idle: bool
) -> bool:
    """After `serve` or `follow_orders` came back before the end.

    Args:
        layer: that is waited for. `num_idle`: how often they came back for it before.
        was_idle: what this returned then.

    Returns: whether the GPU has nothing left to do: what it said last may have come since they looked.

    Raises:
        TransferFailed: the driver refused a copy with `failure`, or the GPU stopped.
        WaitTimedOut: nobody asked for the layer for PATIENCE_S.
    """
    if code == LINK_FAILED:
        raise TransferFailed(
            f"the CUDA driver refused a copy to the GPU with {failure}; the slots are cold now, run again"
        )
    if was_idle:
        raise TransferFailed("the GPU stopped without a message; the CUDA error is above, if there is one")
    if num_idle * WAIT_US > PATIENCE_S * 1e6:
        raise WaitTimedOut(f"the GPU did not come to MoE layer {layer} within {PATIENCE_S:.0f} s; run again")
    return runner.device.is_idle()

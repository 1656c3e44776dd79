"""Orders that the GPU writes for the copy engine, followed by the host."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from prescope.core.native import address_of, clock_address
from prescope.device import LinkFunctions
from prescope.engine.graph.copy_driver import Orders, follow_orders, require_running
from prescope.engine.graph.host_state import NOBODY_ASKED, SERVED
from prescope.errors import TransferFailed

STEP, NUMBER, ROW = 3, 4, 16
_int64 = ctypes.c_int64


def word(expert: int, slot: int) -> int:
    return NUMBER << 48 | expert << 24 | slot


def test_orders_that_come_late_are_followed_once():
    """The GPU may be kept from its work between two of them, by another process's: for longer than a call waits."""
    copied = []

    @ctypes.CFUNCTYPE(_int64, _int64, _int64, _int64, _int64)
    def memcpy(target: int, source: int, nbytes: int, stream: int) -> int:
        copied.append((target, nbytes))
        ctypes.memmove(target, source, nbytes)
        return 0

    rows = np.arange(4 * ROW, dtype=np.uint8).reshape(4, ROW)
    pool, ack = np.zeros((3, ROW), np.uint8), np.zeros(2, np.int32)
    written = np.zeros((2, 3), np.int64)
    served, progress = np.zeros(1, np.int32), np.zeros(3, np.int64)
    orders = Orders(
        written, np.zeros(2, np.int32), ack.ctypes.data, served, np.full(2, ROW), np.full(2, rows.ctypes.data),
        pool.ctypes.data, ROW,
    )  # fmt: skip
    link = LinkFunctions(address_of(memcpy), 0, 0, 0, stream=0, repeats=1)
    arguments = link, clock_address(), orders, progress, np.zeros(2, np.int64), STEP, NUMBER, 0
    written[0, :2] = NUMBER << 48 | 2, word(expert=3, slot=1)
    for _ in range(2):
        assert follow_orders(*arguments) == NOBODY_ASKED
        assert [nbytes for _, nbytes in copied] == [ROW] and not ack.any()
    written[0, 2], written[1, 0] = word(expert=0, slot=2), NUMBER << 48
    assert follow_orders(*arguments) == SERVED
    assert [nbytes for _, nbytes in copied] == [ROW, ROW, 4], "each once, and behind them that they are there"
    assert (pool[1] == rows[3]).all() and (pool[2] == rows[0]).all()
    assert ack.tolist() == [STEP + 1, 0] and served[0] == STEP + 1
    # 32,767 steps later, none of which missed as much, the same number: the count comes before the orders.
    progress[:], copied[:] = 0, []
    written[0, 0] = NUMBER << 48 | 2
    assert follow_orders(*arguments) == NOBODY_ASKED and not copied, "a former order is no order"
    written[0, 1:] = word(expert=1, slot=0), word(expert=2, slot=1)
    assert follow_orders(*arguments) == SERVED
    assert [nbytes for _, nbytes in copied] == [ROW, ROW, 4]
    assert (pool[0] == rows[1]).all() and (pool[1] == rows[2]).all() and (pool[2] == rows[0]).all()


def test_a_gpu_is_taken_for_stopped_only_if_its_messages_were_looked_for_once_more():
    """It may write the last one and be done between the host's look for messages and that for work left."""
    runner, is_idle = SimpleNamespace(device=SimpleNamespace(is_idle=lambda: True)), False
    is_idle = require_running(runner, NOBODY_ASKED, 0, 0, 1, is_idle)
    assert is_idle
    with pytest.raises(TransferFailed, match="stopped"):
        require_running(runner, NOBODY_ASKED, 0, 0, 2, is_idle)

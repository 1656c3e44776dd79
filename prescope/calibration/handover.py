"""What handing over a copy costs the host, by the code that hands it over in captured decode steps."""

import numpy as np
import torch

from ..core.jit import jit
from ..core.native import call, clock_address, now_us
from ..core.types import FloatArray
from ..device import Device
from ..engine.graph.host_link import send
from ..engine.graph.host_state import (
    BATCHES,
    EVENTS,
    NOT_READY,
    WIRE_COUNT,
    Addresses,
    Functions,
    HostState,
)
from ..engine.graph.warm import serve_arguments
from ..errors import TransferFailed

#: Copies handed over one by one, for one median.
HANDOVERS = 256


def handover_us(device: Device, pool: torch.Tensor, rows: torch.Tensor, nbytes: int, is_busy: bool) -> float:
    """Host time to hand over one copy of `nbytes` with its number and mark, microseconds: the median of some hundred.

    Args:
        pool, rows: memory of the device, and of the host; both are at least `nbytes` long.
        is_busy: the link has work, and none is awaited; else each copy has landed before the next one.

    Raises:
        TransferFailed: the driver refused a copy.
    """
    functions, addresses, state, *_ = serve_arguments()
    events = device.open_events(timed=False)
    events.reserve(HANDOVERS)
    numbers = torch.zeros(HANDOVERS, dtype=torch.int32, pin_memory=pool.is_cuda, device="cpu")
    functions = functions._replace(link=device.link_functions(), clock=clock_address())
    addresses = addresses._replace(
        numbers=numbers.numpy(),
        landed=pool.data_ptr(),
        row_bytes_L=np.array([nbytes]),
        rows_L=np.array([rows.data_ptr()]),
        pool=pool.data_ptr(),
        prefetch=addresses.on_demand + 1,
    )
    took_us = np.zeros(HANDOVERS)
    if not hand_over(functions, addresses, state._replace(events=events.handles), took_us, is_busy):
        raise TransferFailed("the driver refused a copy while handing one over was timed; calibrate again")
    device.synchronize()  # before the numbers are given back
    return float(np.median(took_us))


@jit
def hand_over(
    functions: Functions, addresses: Addresses, state: HostState, took_us: FloatArray, is_busy: bool
) -> bool:
    """Hand over one copy after the other and fill in what each took the host (n,); whether the driver was content."""
    counts, one = state.counts, np.zeros(1, np.int64)
    for i in range(len(took_us)):
        begin = now_us(functions.clock, state.words)
        if not send(functions, addresses, state, 0, one, one, addresses.prefetch, True):
            return False
        took_us[i] = now_us(functions.clock, state.words) - begin
        counts[WIRE_COUNT] = 0
        event = state.events[(counts[EVENTS] - 1) % len(state.events)]
        while (
            not is_busy and call(functions.link.query_event, (event,)) & 0xFFFFFFFF == NOT_READY
        ):  # its number is there too
            pass
    return counts[BATCHES] == len(took_us)

"""Compile the host's parts of captured steps, or read them from numba's cache, while a model's experts are loaded.

What is compiled depends on the types of the arguments alone, so made-up ones of a few bytes do.
"""

from typing import Any

import numpy as np

from ...cache.prefetch import Waiting
from ...cache.slots import Slots
from ...core.jit import compile_first
from ...core.types import IntArray, MoEShape
from ...device import LinkFunctions
from ...kernels.cpu import LaneFunctions
from ...scheduler.types import Memory
from ..schedule import on_demand
from . import host_state as at
from .copy_driver import Orders, follow_orders
from .host_loop import serve
from .stamps import read_stamps


def compile_host_parts() -> None:
    """Compile all that the host runs while a step does."""
    compile_first(serve, serve_arguments(), "the host's part of a decode step")
    compile_first(follow_orders, order_arguments(), "the copy engine's part of a decode step")
    stamps = _numbers(1, 5), 0, np.zeros(1, np.int32), _numbers(1), _numbers(1)
    compile_first(read_stamps, stamps, "what a step says of its time")


def serve_arguments() -> tuple[Any, ...]:
    """Arguments of the types that `serve` is called with; `HostDriver` makes the real ones."""
    shape = MoEShape(num_layers=1, num_experts=1, top_k=1, row_bytes=1)
    planner = on_demand(shape).planner
    flags = np.zeros(1, np.bool_)
    slots = Slots(_numbers(1), _numbers(1), flags, flags.copy(), flags.copy(), np.zeros(1), _numbers(2))
    functions = at.Functions(_link(), LaneFunctions.without().addresses, 0)
    state = at.HostState(
        counts=_numbers(at.NUM_COUNTS), times=np.zeros(at.NUM_TIMES), shown_in=_numbers(1), loaded=_numbers(1),
        copy_of=_numbers(1), waiting=Waiting.none(1), wire_slot=_numbers(1), wire_event=_numbers(1),
        events=_numbers(1), needs=_numbers(1, at.NEED_COLUMNS), copies=_numbers(0, at.COPY_COLUMNS),
        jobs=_numbers(1, at.JOB_COLUMNS), expert_batch=_numbers(at.BATCH_WORDS), indices=_numbers(1), words=_numbers(4),
    )  # fmt: skip
    planner_state = at.PlannerState(
        planner.settings, planner.costs, *planner.calibrated_cpu(), Memory.fresh(1, 1, 1)
    )
    return functions, _addresses(), state, planner_state, slots, 0, 0, -1, 0


def order_arguments() -> tuple[Any, ...]:
    """The same of `follow_orders`; `CopyDriver` makes the real ones."""
    words = np.zeros(1, np.int32)
    orders = Orders(_numbers(1, 2), words, 0, words.copy(), _numbers(1), _numbers(1), 0, 0)
    return _link(), 0, orders, _numbers(3), _numbers(2), 0, 0, 0


def _addresses() -> at.Addresses:
    return at.Addresses(
        ask=_numbers(1, 1), scores=_numbers(1, 1), answers=_numbers(1, 1), shown=np.zeros(1, np.int32),
        looked=_numbers(1), served=np.zeros(1, np.int32), numbers=np.zeros(1, np.int32), landed=0, head=0,
        num_experts_L=_numbers(1), row_bytes_L=_numbers(1), rows_L=_numbers(1), inputs_L=_numbers(1),
        outputs_L=_numbers(1), flags_L=_numbers(1), cpu_layers_L=_numbers(1), top_k=1, width=1, pool=0, slot_bytes=1,
        uses_weights=0, policy=0, most_on_wire=1, on_demand=0, prefetch=0, timed=0, ask_shift=0, scores_shift=0,
    )  # fmt: skip


def _link() -> LinkFunctions:
    return LinkFunctions(0, 0, 0, 0, stream=0, repeats=1)


def _numbers(*shape: int) -> IntArray:
    return np.zeros(shape, dtype=np.int64)

"""What the host keeps while it decides captured steps, in forms that compiled code reads and changes."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...cache.prefetch import Waiting
from ...core.types import FloatArray, IntArray
from ...device import LinkFunctions
from ...kernels.cpu import LaneAddresses
from ...scheduler.types import Costs, Memory, ScheduleSettings

#: What `serve` returns: all layers are served; nobody has asked for WAIT_US; a function of the driver, or the CPU lane,
#: failed (the code is in `counts[FAILURE]`); there is time for a side task. `wait`: the next layer has asked before.
SERVED, NOBODY_ASKED, LINK_FAILED, CPU_FAILED, PAUSED, NEXT_ASKED = range(6)
#: So long a message is awaited before the interpreter is asked for signals, and whether the GPU still runs.
WAIT_US = 20_000.0
#: So long a decision waits for predictions that were made a layer before. They are there, unless the GPU was busy; and
#: nothing promises that it makes them while a layer waits for the host.
PATIENCE_US = 50.0
#: Places in `HostState.counts`. ASKED: layers of the step that have asked; FORESEEN: layers that were decided with
#: predictions.
(
    LAYER, TICK, BATCHES, FAILURE, WIRE_FIRST, WIRE_COUNT, EVENTS, NUM_COPIES, NUM_JOBS, JOB, JOB_LAYER,
    JOB_STEP, NUMBER, LOADED, ASKED, FORESEEN, NUM_COUNTS,
) = range(17)  # fmt: skip
#: Places in `HostState.times`: when the link is free; what the CPU's jobs took, and were calibrated to take; the same
#: the job under way; when `serve` was left.
LINK_FREE, CPU_TOOK, CPU_CALIBRATED, JOB_CALIBRATED, LEFT, NUM_TIMES = range(6)
#: Columns of the log (`recorder`): of each layer's needs, of each copy, of each job.
NEEDED, HITS, LATE, ON_CPU, PREFETCHED, NEED_COLUMNS = range(6)
COPY_COLUMNS, JOB_COLUMNS = 7, 4
#: Words of the CPU lane's `ExpertBatch` (kernels/cpu/native.py).
BATCH_WORDS = 11
#: Events of a layer's on-demand copies at most: before and behind the first one, before and behind the rest.
EVENTS_OF_LAYER = 4
#: cuEventQuery: not yet.
NOT_READY = 600


class Functions(NamedTuple):
    """Addresses of C functions, and what they are called with."""

    link: LinkFunctions
    lane: LaneAddresses
    clock: int  # as `native.clock_address`
    # Where a predictor answers beside the graph, what rings for it, and its bell, which is 0 where none does.
    ring: int = 0
    bell: int = 0


class Addresses(NamedTuple):
    """Where things lie in memory; constant while a run's steps are decided."""

    # As `graph_buffers.Messages`.
    ask: IntArray  # (L, P) step << 48 | expert << 32 | bits of the router weight
    scores: IntArray  # (L, d * 2 * E) step << 32 | bits of the prediction; d may be 0
    answers: IntArray
    shown: NDArray[np.int32]
    looked: IntArray
    served: NDArray[np.int32]
    numbers: NDArray[np.int32]  # sources of the copies that follow each batch
    landed: int  # where these numbers are copied to
    head: int  # words in front of an answer's row
    num_experts_L: IntArray
    row_bytes_L: IntArray
    rows_L: IntArray  # addresses of the host rows
    inputs_L: IntArray  # addresses of (T, D), 0 without a CPU lane
    outputs_L: IntArray  # of (P, D)
    flags_L: IntArray
    cpu_layers_L: IntArray
    top_k: int
    width: int  # D
    pool: int  # address of the slots
    slot_bytes: int
    uses_weights: int  # whether the cache policy looks at router weights
    policy: int  # its kind
    most_on_wire: int  # prefetches under way at most
    on_demand: int  # reason of a copy, by its rank
    prefetch: int  # the same
    timed: int
    # Constants in a call of compiled code would have the function compiled once more for each.
    ask_shift: int
    scores_shift: int


class HostState(NamedTuple):
    """What changes from layer to layer."""

    counts: IntArray  # (NUM_COUNTS,)
    times: FloatArray  # (NUM_TIMES,)
    shown_in: IntArray  # (S,) key that is shown to be in a slot, -1 for none
    loaded: IntArray  # (E,) slots whose bytes the layer decided last waits for
    copy_of: IntArray  # (S,) number of the batch that brings a slot's bytes
    waiting: Waiting  # prefetches that are not on the link yet
    wire_slot: IntArray  # (most_on_wire,) ring of prefetches under way
    wire_event: IntArray
    events: IntArray  # handles
    needs: IntArray  # (L, NEED_COLUMNS)
    copies: IntArray  # (N, COPY_COLUMNS)
    jobs: IntArray  # (L + 1, JOB_COLUMNS)
    expert_batch: IntArray  # (BATCH_WORDS,)
    indices: IntArray  # of an expert batch
    words: IntArray  # (4,) for functions that write their results


class PlannerState(NamedTuple):
    """What the planner knows; its arrays are changed."""

    settings: ScheduleSettings
    costs: Costs
    cpu_base_us: float  # as calibrated, as `cpu_us`
    cpu_us: FloatArray
    memory: Memory

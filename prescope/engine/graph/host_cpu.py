"""The CPU's experts in captured steps that the host decides: a job is handed over, and taken down when it is done."""

import numpy as np

from ...core.jit import jit
from ...core.native import call
from ...core.types import IntArray
from ...scheduler.types import cpu_time
from .host_state import (
    CPU_CALIBRATED,
    CPU_TOOK,
    FAILURE,
    JOB,
    JOB_CALIBRATED,
    JOB_LAYER,
    JOB_STEP,
    NUM_JOBS,
    Addresses,
    Functions,
    HostState,
    PlannerState,
)

_JOB_RUNS = 0


@jit
def collect(functions: Functions, state: HostState) -> bool:
    """The CPU's part of an earlier layer is over, since the GPU waited for it: take down its time."""
    counts, times, words, jobs = state.counts, state.times, state.words, state.jobs
    job = counts[JOB]
    if job == 0:
        return True
    job_state = call(functions.lane.state, (job,)) & 0xFFFFFFFF
    while job_state == _JOB_RUNS:  # it tells the GPU first
        job_state = call(functions.lane.state, (job,)) & 0xFFFFFFFF
    call(functions.lane.span, (job, words.ctypes.data, words.ctypes.data + 8))
    row = counts[NUM_JOBS]
    jobs[row, :] = (counts[JOB_LAYER], counts[JOB_STEP], words[0], words[1])
    times[CPU_TOOK] += (words[1] - words[0]) * 1e-3
    times[CPU_CALIBRATED] += times[JOB_CALIBRATED]
    counts[NUM_JOBS] += 1
    call(functions.lane.free, (job,))
    counts[JOB] = 0
    if job_state != 1:
        counts[FAILURE] = job_state
    return job_state == 1


@jit
def compute(
    functions: Functions,
    addresses: Addresses,
    state: HostState,
    layer: int,
    number: int,
    experts: IntArray,
    first: IntArray,
    pairs: IntArray,
) -> int:
    """Hand experts (n,) to the CPU; returns the job, 0 if it was refused. `first`, `pairs`: as `pairs_of`."""
    expert_batch, indices, n, m = state.expert_batch, state.indices, len(experts), len(pairs)
    indices[:n] = experts
    indices[n : 2 * n + 1] = first
    indices[2 * n + 1 : 2 * n + 1 + m] = pairs // addresses.top_k
    indices[2 * n + 1 + m : 2 * n + 1 + 2 * m] = pairs
    P = addresses.ask.shape[1]
    expert_batch[0], expert_batch[1] = addresses.inputs_L[layer], addresses.outputs_L[layer]
    expert_batch[2], expert_batch[3] = addresses.width, addresses.width
    expert_batch[4], expert_batch[5], expert_batch[6], expert_batch[7] = P // addresses.top_k, P, n, m
    expert_batch[8], expert_batch[9], expert_batch[10] = indices.ctypes.data, addresses.flags_L[layer], number
    return call(
        functions.lane.submit, (functions.lane.lane, addresses.cpu_layers_L[layer], expert_batch.ctypes.data)
    )


@jit
def calibrated_us(planner: PlannerState, first: IntArray) -> float:
    """What a job was calibrated to take; `first` as `pairs_of`."""
    total = planner.cpu_base_us
    for i in range(len(first) - 1):
        total += cpu_time(planner.cpu_us, float(first[i + 1] - first[i]))
    return total


@jit
def pairs_of(
    ids: IntArray, experts: IntArray, tokens: IntArray, num_experts: int
) -> tuple[IntArray, IntArray]:
    """The pairs (t * K + k) of some experts (n,) in a layer's choice (P,), expert by expert.

    Args:
        tokens: (n,) of each expert.

    Returns: `first` (n + 1,) and `pairs`: those of the i-th expert are pairs[first[i] : first[i + 1]].
    """
    first, place = np.zeros(len(experts) + 1, np.int64), np.full(num_experts, -1)
    for i in range(len(experts)):
        first[i + 1] = first[i] + tokens[i]
        place[experts[i]] = first[i]
    pairs = np.empty(first[-1], np.int64)
    for pair in range(len(ids)):
        expert = ids[pair]
        if 0 <= expert < num_experts and place[expert] >= 0:
            pairs[place[expert]] = pair
            place[expert] += 1
    return first, pairs

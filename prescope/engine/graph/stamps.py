"""What a step's stamps say of this machine: compiled, since it is read while the GPU may be waiting for the host.

As some forty calls of numpy it kept the layer behind it waiting for 200 us and more (H200 machine,
docs/log/engine.md): between two layers that compiled code serves the interpreter's caches are cold.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.jit import jit
from ...core.types import IntArray


class Seen(NamedTuple):
    """Of the layers of one step; microseconds."""

    rest_us: float  # a layer besides its experts, median
    decide_us: float  # from the router's choice to the host's answer, median; NaN if no layer waited for one
    gpu_us: float  # an expert on the GPU, mean


@jit
def read_stamps(
    stamps_ns: IntArray, begin_ns: int, missing_L: NDArray[np.int32], needed_L: IntArray, on_cpu_L: IntArray
) -> Seen:
    """Read a step's stamps.

    Args:
        stamps_ns: (L, stamps) as `kernels.StepLog`. `begin_ns`: of the step.
        missing_L: experts that were not shown when a layer asked.
        needed_L, on_cpu_L: its experts, and those that the CPU computed.
    """
    L = len(stamps_ns)
    rest, decide = np.empty(L), np.empty(L)
    num_asked, num_on_gpu, gpu_ns, before = 0, 0, 0.0, begin_ns
    for layer in range(L):
        routed, decided, fetched, done, computed = stamps_ns[layer]
        if computed <= 0:  # without a CPU lane a layer ends with the GPU's part
            computed = done
        rest[layer] = (routed - before) / 1e3
        if missing_L[layer] > 0:  # the others did not wait for the host
            decide[num_asked] = (decided - routed) / 1e3
            num_asked += 1
        num_on_gpu += needed_L[layer] - on_cpu_L[layer]
        gpu_ns += computed - fetched
        before = done
    decide_us = np.median(decide[:num_asked]) if num_asked else np.nan
    return Seen(np.median(rest), decide_us, gpu_ns / 1e3 / max(1, num_on_gpu))

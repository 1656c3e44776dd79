"""What a schedule takes and returns, in forms that numba compiles.

Times are microseconds. Shapes: n experts needed by a layer, E experts of a layer, L MoE layers, d layers ahead.
"""

from typing import NamedTuple

import numpy as np

from ..core.jit import jit
from ..core.types import FloatArray, IntArray


class Costs(NamedTuple):
    """`costs.LayerCosts` as compiled code reads it."""

    link_us: float  # one expert over the link
    link_busy_us: float  # the same while the CPU computes experts: both read the same memory
    gpu_us: float  # one expert on the GPU
    rest_us: float  # the rest of a layer
    predict_us: float  # a prediction, made while the layer computes; decisions without a lag wait for it
    decide_us: float  # from the router's choice to the first copy on the link
    cpu_base_us: float  # one submission to the CPU and the merging of its result
    cpu_us: FloatArray  # (N + 1,) one expert with n tokens on the CPU; empty: there is no CPU lane
    cpu_alone_us: FloatArray  # the same while the link is idle
    # For the simulator's clock:
    batch_us: float = 0.0  # on the link, copies handed over together, besides their bytes
    copy_us: float = 0.0  # of the host, one more copy of a batch
    handover_us: float = 0.0  # of the host, a batch of one copy with its number and mark


class ScheduleSettings(NamedTuple):
    """Settings of a schedule."""

    schedule: int  # number in `scheduler.SCHEDULES`
    lookahead: int  # layers ahead whose predictions are looked at
    width: int  # experts prefetched for one layer at most
    threshold: float  # least probability of use of an expert worth prefetching
    lag: int = 0  # a layer is decided by predictions made this many layers before; its prefetches by its own
    top_k: int = 1  # experts that a token uses in a layer


class Plan(NamedTuple):
    """What serves one layer whose router has chosen."""

    num_wait: (
        int  # of the late ones, how many (those that land first) are waited for; the CPU computes the others
    )
    num_load: int  # of the misses, how many (the first ones) are copied on demand; the rest go to the CPU


class Prefetches(NamedTuple):
    """What the link copies for the layers after it."""

    keys: IntArray  # (p,) flat (moe_layer * E + expert), the most wanted first
    keep: IntArray  # flat keys that are evicted last meanwhile


#: Steps back in which `Memory.former_LE` looks for a use: text may repeat itself every few tokens.
FORMER_STEPS = 4


class Memory(NamedTuple):
    """What a schedule remembers from layer to layer; changed by each decision."""

    trust: FloatArray  # (d, 2), see `learn.learn_trust`
    predicted_dLE: FloatArray  # the last probability of use
    reuse: FloatArray  # (FORMER_STEPS + 4,), see `learn.learn_reuse`
    former_LE: IntArray  # bit m: each layer used it m + 1 steps ago
    swaps: FloatArray  # (5,), see `learn.learn_swaps`
    credit: FloatArray  # (L * E,) by key
    copied: IntArray  # (L * E,) 1: copied for reuse or on demand, and still there

    @classmethod
    def fresh(cls, lookahead: int, num_layers: int, num_experts: int) -> "Memory":
        """Nothing is known, of predictions for `lookahead` layers."""
        return cls(
            np.zeros((lookahead, 2)),
            np.zeros((lookahead, num_layers, num_experts)),
            np.zeros(FORMER_STEPS + 4),
            np.zeros((num_layers, num_experts), np.int64),
            np.zeros(5),
            np.zeros(num_layers * num_experts),
            np.zeros(num_layers * num_experts, np.int64),
        )


@jit
def cpu_time(cpu_us: FloatArray, tokens: float) -> float:
    """Microseconds of one expert with this many tokens on the CPU; linear between the points and beyond."""
    last = len(cpu_us) - 1
    low = min(int(tokens), last - 1)
    return cpu_us[low] + (tokens - low) * (cpu_us[low + 1] - cpu_us[low])
